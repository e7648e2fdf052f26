"""The notebooks run from the first cell to the last; as committed they show what they are about.

To write them anew, outputs included, run `jupyter execute --inplace` on each in an empty folder.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from tests.conftest import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
FIGURES = {"01_quickstart": 2, "02_scaling_laws": 5, "03_inside_the_model": 9}
LARGEST = 500_000  # bytes


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def figures(notebook: Any) -> int:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return sum("image/png" in output.get("data", {}) for output in outputs)


def test_all_are_here() -> None:
    assert [path.stem for path in NOTEBOOKS] == list(FIGURES)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_as_committed_it_is_whole(path: Path) -> None:
    notebook = read(path)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert "pip install" in code[0].source
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert figures(notebook) == FIGURES[path.stem]
    assert path.stat().st_size < LARGEST
    text = path.read_text(encoding="utf-8")
    assert not [word for word in ("/tmp/", "/home/", "/root/", "\\u001b") if word in text]


# What may have digits in prose: code, formulas, links, the year of a paper.
NO_PROSE = re.compile(
    r"`[^`]*`|\$\$.*?\$\$|\$[^$]*\$|\]\([^)]*\)|\[\d\d_\w+\]|et al\. \(?\d{4}\)?", re.S
)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_numbers_come_from_cells(path: Path) -> None:
    prose = [cell.source for cell in read(path).cells if cell.cell_type == "markdown"]
    lines = NO_PROSE.sub("", "\n".join(prose)).splitlines()
    assert [line for line in lines if re.search(r"\d", line)] == []


def test_the_quickstart_answers_its_question_by_what_it_measured() -> None:
    notebook = read(ROOT / "notebooks" / "01_quickstart.ipynb")
    assert "How close does this one come?" in notebook.cells[0].source
    shown = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", [])
    )
    losses = re.search(r"this model +([\d.]+)\nexact floor +([\d.]+)", shown)
    above = re.search(r"its loss is (\d+) % above the lowest possible", shown)
    assert losses is not None
    assert above is not None
    final, floor = map(float, losses.groups())
    assert float(above[1]) == pytest.approx(100 * (final / floor - 1), abs=0.6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "scale"),
    [*((name, "smoke") for name in FIGURES), ("02_scaling_laws", "laptop")],  # no training there
)
def test_it_runs(
    name: str, scale: str, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINYGPT_NOTEBOOK_SCALE", scale)
    monkeypatch.setenv("TINYGPT_CACHE", str(cache))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = read(ROOT / "notebooks" / f"{name}.ipynb")
    before = [cell.source for cell in notebook.cells]
    place = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=place).execute()
    assert figures(notebook) == FIGURES[name]
    assert [cell.source for cell in notebook.cells] == before
