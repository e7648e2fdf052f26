"""The studies in experiments/: their numbers come from their runs, their commands run."""

from __future__ import annotations

import csv
import importlib
import math
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.conftest import ROOT, Command
from tinygpt.config import RunError

STUDIES = sorted(path.parent.name for path in ROOT.glob("experiments/*/runs.csv"))
TABLES = sorted(path.parent.name for path in ROOT.glob("experiments/*/adaptation_summary.csv"))
# Their smoke scale does nothing that another study's does not: the plan will do.
ALIKE = ("context", "depth", "grid", "grid_books", "grid_stories")
LAWS = [name for name in STUDIES if (ROOT / "experiments" / name / "fit.json").exists()]


@pytest.fixture(scope="module")
def record() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(ROOT / "experiments" / "record.py")))


@pytest.mark.parametrize("name", LAWS)
def test_the_law_is_that_of_the_runs(name: str, record: SimpleNamespace) -> None:
    runs, facts = record.read(name)
    law = record.refit(record.used(name, runs, facts), facts)
    for parameter, told in facts["parameters"].items():
        assert law.parameters[parameter] == pytest.approx(told["estimate"], rel=1e-5), parameter


@pytest.mark.parametrize("name", STUDIES + TABLES)
def test_a_page_says_what_its_runs_say(name: str, record: SimpleNamespace) -> None:
    assert record.page(name) in (ROOT / "experiments" / name / "README.md").read_text()


def test_the_table_says_what_the_runs_say(record: SimpleNamespace) -> None:
    assert record.table(STUDIES) in (ROOT / "experiments" / "README.md").read_text()


@pytest.mark.parametrize("name", STUDIES)
def test_no_run_is_lost(name: str, record: SimpleNamespace) -> None:
    """All came to an end, of one version of the code, and each can be told from the others."""
    runs, _ = record.read(name)
    assert set(runs["status"]) <= {"finished", "diverged", "stopped_early"}
    assert runs["git_commit"].nunique() == 1
    assert runs["config_hash"].is_unique
    assert not runs["folder"].str.startswith("/").any()


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDIES)
def test_its_command(name: str, tinygpt: Command, tmp_path: Path, corpus: Path) -> None:
    """The first line of a page reproduces the study; here at smoke scale, on a small text."""
    folders = ("books/one.txt", "tinystories/train.txt", "tinystories/valid.txt")
    for text in (tmp_path / file for file in ("stories.txt", *folders)):
        text.parent.mkdir(exist_ok=True)
        text.write_text(corpus.read_text())
    page = (ROOT / "experiments" / name / "README.md").read_text()
    (line,) = re.findall(r"^python -m tinygpt\.run (.*)$", page, re.M)[:1]
    words = [word for word in shlex.split(line, comments=True) if not word.startswith("train.")]
    small = ["scale=smoke", "launcher=serial", "hardware.threads=1", "data.val_fraction=0.25"]
    small += ["data.eval_tokens=2_000"]
    if name in ALIKE:
        done = tinygpt("run", *words, *small, "plan=true")
        assert " to train: " in done.stdout
    else:
        done = tinygpt("run", *words, *small)
        assert " finished" in done.stdout
    assert done.returncode == 0, done.stderr
    assert "smoke: not a result" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLES)
def test_its_bases_adapt(name: str, tinygpt: Command) -> None:
    """Both lines of the page, at less than smoke scale and with a narrower largest base: to look
    for the likeliest answer of a model that has learned nothing takes long."""
    page = (ROOT / "experiments" / name / "README.md").read_text().replace("128", "16")
    lines = re.findall(r"^python -m tinygpt\.(run|adapt) (.*)$", page, re.M)
    assert [command for command, _ in lines] == ["run", "adapt"]
    small = {
        "run": ["train.tokens=20_000", "data.max_tokens=100_000", "data.eval_tokens=2_000"],
        "adapt": [
            *("scale=smoke", "seed=1", "inner.inner_steps=[2]", "policy.max_edit_tokens=16"),
            *("documents.train=1", "documents.test=1", "documents.forgetting_tokens=300"),
        ],
    }
    for command, line in lines:
        words = [word for word in shlex.split(line, comments=True) if "documents." not in word]
        words += ["documents.task=new_facts"] if command == "adapt" else []
        here = ["launcher=serial", "hardware.threads=1"]
        done = tinygpt(command, *words, *small[command], *here)
        assert done.returncode == 0, done.stderr


def test_another_work_is_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "experiments" / "speed")
    compare = importlib.import_module("compare")
    ours = {"parameters": 100, "loss": 4.0, "isa": "AVX2"}
    compare.check_same_work({"tinygpt": ours, "plain": {**ours, "loss": 4.00001}})
    for other in ({"parameters": 101}, {"loss": 4.001}, {"loss": math.nan}, {"isa": "AVX512"}):
        with pytest.raises(RunError, match="plain does not do the same work"):
            compare.check_same_work({"tinygpt": ours, "plain": {**ours, **other}})


@pytest.mark.slow
def test_the_programs_are_compared(tmp_path: Path) -> None:
    """They agree on the loss of a batch, or there would be no table."""
    words = ["rounds=1", "steps=1", "batch_size=2", "vocab_size=100", f"output_dir={tmp_path}"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "experiments" / "speed" / "compare.py"), *words],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    with (tmp_path / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["rival"] for row in rows[::2]] == ["plain", "transformers"]
    assert all(math.isfinite(float(row["ratio"])) for row in rows)
