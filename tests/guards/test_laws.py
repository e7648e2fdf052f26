"""The laws of the committed studies come out of their committed runs again."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import ROOT
from tests.guards.commands import assert_same_fit, succeed

pytestmark = pytest.mark.filterwarnings("default")

STUDIES = sorted(path.parent.name for path in ROOT.glob("experiments/*/fit.json"))
QUICK = ("data",)  # the quickest of those whose runs a condition chooses
# The condition that a study was fitted under, as experiments/record.py has it.
WHERE = {"data": ["where=train_tokens <= unique_train_tokens"]}


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in STUDIES],
)
def test_the_command_gives_the_recorded_fit(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``python -m tinygpt.fit table=`` gives the law, its intervals and every AICc."""
    monkeypatch.chdir(tmp_path)
    folder = ROOT / "experiments" / name
    succeed("fit", f"table={folder / 'runs.csv'}", "output_dir=made", *WHERE.get(name, []))
    made = json.loads(Path(f"made/fit-{name}-runs/fit.json").read_text())
    recorded = json.loads((folder / "fit.json").read_text())
    assert_same_fit(made, recorded)


@pytest.mark.parametrize("name", STUDIES)
def test_a_notebook_gives_the_recorded_fit(name: str) -> None:
    """``read_table``, ``fit`` and ``intervals`` give the same parameters and intervals, by the
    weights and Huber's threshold that the report used.
    """
    from tinygpt.scaling import fit, intervals, read_table

    recorded = json.loads((ROOT / "experiments" / name / "fit.json").read_text())
    runs = read_table(ROOT / "experiments" / name / "runs.csv")
    for condition in WHERE.get(name, []):
        runs = runs.query(condition.removeprefix("where="))
    assert len(runs) == recorded["runs"]
    columns = {variable: one["column"] for variable, one in recorded["variables"].items()}
    weights = np.array(recorded["method"]["weights"])
    how = {"weights": weights, "limit": recorded["method"]["threshold"]}
    law = fit(runs, recorded["law"], loss=recorded["loss"], **how, **columns)
    assert law.estimator == recorded["method"]["estimator"]
    found = intervals(law)
    for parameter, one in recorded["parameters"].items():
        assert law.parameters[parameter] == pytest.approx(one["estimate"], rel=1e-4), parameter
        for end in ("low", "high"):
            limit = one["interval"][end]
            if limit is not None:  # None where the data set no limit
                assert getattr(found[parameter], end) == pytest.approx(limit, rel=1e-2), parameter
