"""The report of an analysis: a folder of files, and the same in brief on the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd
from rich.console import Console

from tinygpt import fileio
from tinygpt.scaling import document, images, plots, sections
from tinygpt.scaling.analysis import Analysis
from tinygpt.scaling.document import Block
from tinygpt.scaling.facts import facts


def write(analysis: Analysis, folder: Path) -> list[Path]:
    """Writes report, figures, numbers and tables; what an earlier analysis left is replaced."""
    with fileio.turn(folder):
        fileio.remove_torn(folder, folder / "tensorboard")
        figures = plots.draw(analysis, folder)
        images.write(folder, figures)
        _write_table(analysis.runs, folder / "runs.csv")
        left_out = folder / "left_out.csv"
        if len(analysis.left_out):
            _write_table(analysis.left_out, left_out)
        else:
            left_out.unlink(missing_ok=True)
        files = document.write(list(compose(analysis, figures)), folder)
        fileio.write_json(folder / "fit.json", facts(analysis))
    files += ["fit.json", "runs.csv"]
    files += ["left_out.csv"] if len(analysis.left_out) else []
    files += [f"{name}.{kind}" for name in figures for kind in ("png", "svg")]
    return [folder / name for name in files]


def _write_table(table: pd.DataFrame, path: Path) -> None:
    fileio.write_text(path, table.to_csv(index=False, lineterminator="\n"))


def show(analysis: Analysis, folder: Path, console: Console | None = None) -> None:
    """Prints what the report says first, and where it lies."""
    document.show(
        [
            *sections.title(analysis),
            *sections.answer(analysis),
            *sections.notes(analysis),
            *sections.warning(analysis),
            *sections.law(analysis),
            *sections.selection(analysis),
            *sections.checklist(analysis, brief=True),
            *sections.predictions(analysis),
            *sections.budgets(analysis),
            *sections.next_run(analysis),
        ],
        folder,
        console,
    )


def compose(analysis: Analysis, figures: Sequence[str]) -> Iterator[Block]:
    """The whole report, in the order it is read."""
    yield from sections.title(analysis)
    yield from sections.answer(analysis)
    yield from sections.warning(analysis)
    yield from sections.notes(analysis)
    yield from sections.runs(analysis)
    yield from sections.law(analysis)
    yield from sections.pictures(analysis, figures, "scaling", "residuals")
    yield from sections.selection(analysis)
    yield from sections.pictures(analysis, figures, "extrapolation")
    yield from sections.checklist(analysis)
    yield from sections.single_runs(analysis)
    yield from sections.predictions(analysis)
    yield from sections.optimum(analysis)
    yield from sections.pictures(analysis, figures, "contours", "isoflop", "frontier")
    yield from sections.pictures(analysis, figures, "curves")
    yield from sections.next_run(analysis)
    yield from sections.method(analysis)
    yield from sections.files(analysis, figures)
