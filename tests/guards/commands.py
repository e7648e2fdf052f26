"""Run the commands inside this process, and read what they leave behind."""

from __future__ import annotations

import contextlib
import csv
import importlib
import io
import json
import platform
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.conftest import ROOT

OLD = ROOT / "tests" / "fixtures" / "ff2412f"
# What the clock and the machine decide; everything else in a run folder is the experiment.
MEASURED = {"seconds", "tokens_per_second", "peak_memory_bytes", "seconds_training", "mfu"}


class Done(NamedTuple):
    """What a command left: its exit code and what it said."""

    code: int
    out: str
    err: str


def call(command: str, *words: str) -> Done:
    """Run ``python -m tinygpt.<command> <words>`` in this process."""
    module = importlib.import_module(f"tinygpt.{command}")
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [command, *words])
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                module.main()
            except SystemExit as left:
                code = left.code if isinstance(left.code, int) else int(left.code is not None)
    return Done(code, out.getvalue(), err.getvalue())


def succeed(command: str, *words: str) -> Done:
    """Run a command that must end with exit code 0."""
    done = call(command, *words)
    assert done.code == 0, f"{command} {' '.join(words)}\n{done.out}\n{done.err}"
    return done


def read_results(folder: Path) -> dict[str, Any]:
    """Return ``results.json`` without what was measured and who made it."""
    results = json.loads((folder / "results.json").read_text())
    names = MEASURED | {"git_commit"}
    return {name: value for name, value in results.items() if name not in names}


def read_metrics(folder: Path) -> list[dict[str, str]]:
    """Return the rows of ``metrics.csv`` without what was measured."""
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if k not in MEASURED} for row in rows]


def column(rows: list[dict[str, str]], name: str) -> list[float]:
    """Return a column of ``metrics.csv``, of the rows that have it."""
    return [float(row[name]) for row in rows if row[name]]


def read_weights(checkpoint: Path) -> dict[str, bytes]:
    """Return the bits of every weight in a checkpoint."""
    import torch

    content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    return {name: weight.numpy().tobytes() for name, weight in content["state_dict"].items()}


def is_made_here() -> bool:
    """Return whether the fixtures come from a machine of this kind, where bits can be compared."""
    import torch

    made_on = json.loads((OLD / "losses.json").read_text())["made_on"]
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return False
    found = re.findall(r"^(model name|cpu family|model|flags)\s*: (.*)$", cpuinfo.read_text(), re.M)
    kind = dict(found)
    here = {
        "machine": platform.machine(),
        "cpu": [kind.get(name) for name in ("model name", "cpu family", "model")],
        "avx512": "avx512f" in kind.get("flags", ""),
        "torch": torch.__version__,
    }
    return bool(made_on == here)


def assert_same_fit(
    made: dict[str, Any], recorded: dict[str, Any], aicc: Mapping[str, float] | None = None
) -> None:
    """Compare two fit.json: parameters to 4 digits, AICc to 0.01, intervals to 2 digits.

    ``aicc`` has the values of laws whose AICc changed on purpose since.
    """
    for name in ("law", "loss", "runs", "left_out", "is_evidence"):
        assert made[name] == recorded[name], name
    assert list(made["parameters"]) == list(recorded["parameters"])
    for name, then in recorded["parameters"].items():
        now = made["parameters"][name]
        assert now["estimate"] == pytest.approx(then["estimate"], rel=1e-4), name
        for end in ("low", "high"):
            limit = then["interval"][end]  # None where the data set none
            expected = None if limit is None else pytest.approx(limit, rel=1e-2)
            assert now["interval"][end] == expected, f"{name} {end}"
    criteria = {one["law"]: one["aicc"] for one in made["selection"]}
    for one in recorded["selection"]:
        told = (aicc or {}).get(one["law"], one["aicc"])
        expected = None if told is None else pytest.approx(told, abs=0.01)
        assert criteria[one["law"]] == expected, one["law"]
