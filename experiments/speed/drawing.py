"""The figure of results.csv: how much faster, with intervals, a line a case."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from tinygpt import fileio
from tinygpt.scaling.drawing import BLUE, GREY, ORANGE, PAGE, STYLE

COLOURS = {"plain": BLUE, "transformers": ORANGE}
WORDS = {"plain": "over a plain PyTorch loop", "transformers": "over a transformers loop"}


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Ratios of tokens per CPU second; the ticks are what was promised."""
    cases = list(dict.fromkeys(label(row) for row in rows))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(PAGE, 1.1 + 0.36 * len(cases)))
        axes.axvline(1, color=GREY, linewidth=0.8, zorder=0)
        for shift, (rival, colour) in zip((-0.14, 0.14), COLOURS.items(), strict=True):
            found = [row for row in rows if row["rival"] == rival and row["clock"] == "cpu"]
            for n, row in enumerate(found):
                _point(axes, row, cases.index(label(row)) + shift, colour, WORDS[rival], n == 0)
        axes.set_yticks(range(len(cases)), cases)
        axes.set_ylim(len(cases) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("tokens per CPU second, tinygpt / the other (median, 95 % interval)")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
        axes.margins(x=0.08)
        with fileio.replacing(path) as temporary:
            figure.savefig(temporary, format="png")
        plt.close(figure)


def _point(
    axes: Axes, row: dict[str, Any], y: float, colour: str, word: str, labelled: bool
) -> None:
    axes.plot([row["low"], row["high"]], [y, y], color=colour, linewidth=1.6, alpha=0.5)
    axes.plot(row["ratio"], y, "o", color=colour, markersize=4.5, label=word if labelled else None)
    axes.annotate(
        f"{row['ratio']:.2f}",
        (row["high"], y),
        xytext=(5, 0),
        textcoords="offset points",
        va="center",
        fontsize=6.5,
        color=colour,
    )
    if row["target"]:
        axes.plot(row["target"], y, "|", color=colour, markersize=9, markeredgewidth=1.2)


def label(row: dict[str, Any]) -> str:
    return f"{row['model']}, batch {row['batch_size']}, vocabulary {row['vocab_size']:,}"
