"""Test ``python -m tinygpt.fit``: on a table, on run folders, with mistakes."""

from __future__ import annotations

import io
import json
import re
import runpy
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from tests.conftest import Command, tiny
from tinygpt import fileio, fit, scaling
from tinygpt.runs import rundir
from tinygpt.scaling import plots
from tinygpt.scaling.intervals import predict_interval
from tinygpt.scaling.laws import BUILT_IN, LAWS
from tinygpt.scaling.runs import curves_of, load_runs
from tinygpt.sweeping.kinds import TRAINING

FLOOR, AMOUNT, ALPHA = 0.9, 60.0, 0.4


def table(sizes: int = 6, seeds: int = 2) -> pd.DataFrame:
    """Return runs of one number of tokens that follow a law with a little noise."""
    random = np.random.default_rng(1)
    rows: list[dict[str, Any]] = []
    for width in (32 * 2**i for i in range(sizes)):
        n = 24 * width**2
        for seed in range(seeds):
            noise = np.exp(0.003 * random.standard_normal())
            loss = (FLOOR + AMOUNT / n**ALPHA) * noise
            rows.append({"params": n, "tokens": 2_000_000, "seed": seed, "loss": loss})
    return pd.DataFrame(rows)


def test_the_help_names_every_law() -> None:
    assert set(BUILT_IN) <= set(fit.USAGE.split())


def results(row: dict[str, Any], width: int) -> dict[str, Any]:
    """Return what a finished run of this size would have written."""
    return {
        "schema_version": 1,
        "config_hash": f"{width}-{row['seed']}",
        "status": "finished",
        "seed": int(row["seed"]),
        "final_val_loss": float(row["loss"]),
        "irreducible_loss_exact": FLOOR,
        "parameters_non_embedding": int(row["params"]),
        "model_parameters": int(row["params"]) + 1000 * width,
        "train_tokens": int(row["tokens"]),
        "unique_train_tokens": int(row["tokens"]),
        "flops_exact": 6.5 * row["params"] * row["tokens"],
        "d_model": width,
        "max_seq_len": 128,
        "schedule": "cosine",
        "learning_rate": 1e-3,
        "optimizer": "adamw",
        "parametrization": "mup",
        "precision_resolved": "32",
        "git_commit": "abc",
        "validation_fingerprint": "v",
        "tokenizer": "bpe",
        "tokenizer_fingerprint": "t",
        "dataset": "synthetic",
    }


def run_folders(study: Path) -> Path:
    """Write finished runs with their curves, and one that has only begun."""
    for row in table().to_dict("records"):
        width = round((row["params"] / 24) ** 0.5)
        run = rundir.RunDir(study / f"d_model-{width}_seed-{row['seed']}")
        fileio.write_json(run.environment, {"config_hash": f"{width}-{row['seed']}"})
        metrics = rundir.MetricsFile(run.metrics)
        metrics.keep_until(0)
        for step in range(9):
            loss = row["loss"] * (1 + 2 / (1 + step))
            values = {"step": step, "tokens": step * 250_000, "val_loss": loss}
            metrics.append(values)
        fileio.write_json(run.results, results({str(k): v for k, v in row.items()}, width))
    begun = rundir.RunDir(study / "d_model-4096_seed-0")
    fileio.write_json(begun.environment, {"config_hash": "begun"})
    return study


def test_every_run_is_read_once(tmp_path: Path) -> None:
    """No file of a run is read twice for a report."""
    run_folders(tmp_path / "width")
    reads: Counter[str] = Counter()

    def counted(read: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def reading(of: Any) -> Any:
            path = of if isinstance(of, Path) else of.path
            reads[str(path.relative_to(tmp_path))] += 1
            return read(of)

        return reading

    with (
        mock.patch.object(sys, "argv", ["fit", f"runs={tmp_path / 'width'}"]),
        mock.patch.object(fileio, "read_json", counted(fileio.read_json)),
        mock.patch.object(fileio, "read_yaml", counted(fileio.read_yaml)),
        mock.patch.object(rundir.MetricsFile, "columns", counted(rundir.MetricsFile.columns)),
        mock.patch.object(rundir, "read_config", side_effect=AssertionError("80 ms a run")),
    ):
        fit.main()
    assert set(reads.values()) == {1}
    assert sum(name.endswith("metrics.csv") for name in reads) > 1


def test_curves_are_what_pandas_reads(tmp_path: Path) -> None:
    run_folders(tmp_path / "width")
    runs = load_runs(tmp_path)
    found = curves_of(runs)
    folders = [folder for folder in runs["folder"] if Path(folder, "metrics.csv").exists()]
    plain = [pd.read_csv(Path(folder, "metrics.csv")).assign(folder=folder) for folder in folders]
    expected = pd.concat(plain, ignore_index=True)[["folder", *rundir.METRICS]]
    pd.testing.assert_frame_equal(found[list(expected)], expected, check_dtype=False)


def test_a_table(tinygpt: Command, tmp_path: Path) -> None:
    table().to_csv(tmp_path / "mine.csv", index=False)
    names = ("columns.n=params", "columns.d=tokens", "columns.loss=loss", "columns.seed=seed")
    done = tinygpt("fit", "table=mine.csv", *names)
    assert (done.returncode, done.stderr) == (0, "")
    folder = tmp_path / "outputs" / "fit-mine"
    found = json.loads((folder / "fit.json").read_text())
    assert found["law"] == "power_constant"
    interval = found["parameters"]["alpha"]["interval"]
    assert interval["low"] < ALPHA < interval["high"]
    assert found["variables"]["x"] == {"column": "params", "meaning": "parameters"}
    assert "outputs/fit-mine/report.html" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100
    assert not (folder / "left_out.csv").exists()
    pd.testing.assert_frame_equal(pd.read_csv(folder / "runs.csv"), table())


def test_run_folders(tinygpt: Command, tmp_path: Path) -> None:
    run_folders(tmp_path / "outputs" / "width")
    done = tinygpt("fit", "runs=outputs/width", COLUMNS="200")
    assert (done.returncode, done.stderr) == (0, "")
    assert max(map(len, done.stdout.splitlines())) <= 100
    folder = tmp_path / "outputs" / "width" / "fit"
    left = pd.read_csv(folder / "left_out.csv")
    assert list(left["reason"]) == ["unfinished"]
    assert "outputs/width/d_model-32_seed-0" in list(pd.read_csv(folder / "runs.csv")["folder"])
    found = json.loads((folder / "fit.json").read_text())
    assert found["in_total"]["column"] == "model_parameters"
    assert found["floor"] == FLOOR
    assert (folder / "curves.svg").exists()
    again = tinygpt("fit", "runs=outputs/width", "output_dir=else")  # the report is no run
    assert again.returncode == 0
    other = tmp_path / "else" / "fit-width"
    found["source"] = ["../../outputs/width"]
    assert json.loads((other / "fit.json").read_text()) == found


def test_a_fit_replaces_no_other(tinygpt: Command, tmp_path: Path) -> None:
    for name in ("a", "b", "c/a"):
        (tmp_path / name).mkdir(parents=True)
        table().to_csv(tmp_path / name / "runs.csv", index=False)

    def fitted(place: str, *words: str) -> subprocess.CompletedProcess[str]:
        return tinygpt("fit", f"table={place}/runs.csv", "law=power_constant", "variable=N", *words)

    assert "report: outputs/fit-a-runs/report.html" in fitted("a").stdout
    written = (tmp_path / "outputs/fit-a-runs/fit.json").read_bytes()
    assert "report: outputs/fit-b-runs/report.html" in fitted("b").stdout
    refused = fitted("c/a")
    assert (refused.returncode, refused.stdout) == (2, "")
    line = "outputs/fit-a-runs: holds the fit of a/runs.csv; force=true replaces it"
    assert refused.stderr == f"error: {line}\n"
    again = fitted("a")
    assert again.stdout.startswith("note: replacing the fit in outputs/fit-a-runs\n")
    assert (tmp_path / "outputs/fit-a-runs/fit.json").read_bytes() == written
    assert fitted("c/a", "force=true").returncode == 0
    assert fitted("a").returncode == 2


def test_runs_at_smoke_scale_are_no_result(tinygpt: Command, tmp_path: Path) -> None:
    """One of them is enough; the study says so at its end, also if nothing was left to do."""
    study = run_folders(tmp_path / "outputs" / "width")
    (study / "d_model-32_seed-0" / "config.yaml").write_text("scale: smoke\n")
    done = tinygpt("fit", "runs=outputs/width")
    assert (done.returncode, done.stderr) == (0, "")
    assert "smoke: not a result" in done.stdout
    assert not re.search("(?i)evidence|checks? pass", done.stdout)
    assert json.loads((study / "fit" / "fit.json").read_text())["is_evidence"] is None
    console = Console(file=io.StringIO(), width=200)
    TRAINING.fit(study, console, anew=False)
    assert isinstance(console.file, io.StringIO)
    assert "smoke: not a result" in console.file.getvalue()


def test_an_older_run_in_the_folder_is_named(tinygpt: Command, tmp_path: Path) -> None:
    """This holds also for a size that no run of the study has."""
    study = run_folders(tmp_path / "outputs" / "width")
    width = 48
    loss = FLOOR + AMOUNT / (24 * width**2) ** ALPHA
    old = {"params": 24 * width**2, "tokens": 2_000_000, "seed": 0, "loss": loss}
    run = rundir.RunDir(study / "old")
    fileio.write_json(run.environment, {"config_hash": "48-0"})
    fileio.write_json(run.results, {**results(old, width), "max_seq_len": 64})
    done = tinygpt("fit", "runs=outputs/width", "where=final_val_loss < 1.8", COLUMNS="200")
    assert (done.returncode, done.stderr) == (0, "")
    said = " ".join(done.stdout.split())
    assert "not evidence yet" in said
    assert "max_seq_len 128 (10 runs), 64 (1 run: outputs/width/old)" in said
    assert "FAIL: runs were not chosen by their loss" in said
    found = json.loads((study / "fit" / "fit.json").read_text())
    failed = {check["name"] for check in found["checks"] if check["passed"] is False}
    assert {"one vocabulary, context and text", "runs were not chosen by their loss"} <= failed
    assert found["other_settings"] == {"max_seq_len": {"128": 10, "64": 1}}


ALONE = ("table=t.csv", "loss=loss", "columns.n=params")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "runs: give runs=FOLDER, or table=FILE"),
        (["runs=a", "table=b.csv"], "runs: give runs=FOLDER, or table=FILE"),
        (["runs=nowhere"], "runs=nowhere: no such folder"),
        (["runs=."], "runs=.: no runs in there"),
        (["table=absent.csv"], "table=absent.csv: cannot be read (No such file or directory)"),
        (["table=t.csv", "columns.n=size"], "columns.n=size: no such column; there are params, "),
        (["table=t.csv", "columns.m=size"], "columns.m: no such key"),
        (["table=t.csv", "loss=nll"], "loss=nll: no such column; there are params, tokens"),
        (["run=a"], "run: no such key; did you mean runs or columns.run?"),
        (["table=t.csv", "loss=loss", "columns.n=tokens"], "table=t.csv: params differs"),
        ([*ALONE, "law=cubic"], "law=cubic: must be one"),
        ([*ALONE, "budgets=1e15"], "budgets=1e+15: needs a law in N and D, or variable=C"),
        ([*ALONE, "predict=13e9"], "predict=13e9: must be as [{n: 13e9, d: 5e12}]"),
        ([*ALONE, "predict=[{d: 5e12}]"], "predict: n is missing: the law goes by n"),
        ([*ALONE, "objective=nats"], "objective=nats: must be one of log, raw"),
        ([*ALONE, "isoflop=spline"], "isoflop=spline: must be one of cubic, akima, parabola"),
        ([*ALONE, "isoflop=akima"], "isoflop=akima: needs a law in N and D"),
        ([*ALONE, "estimator=absolute"], "estimator=absolute: removed; estimator=likelihood"),
        ([*ALONE, "threshold_unit=noise"], "threshold_unit: removed; threshold= is in units of"),
        ([*ALONE, "law=none.py:mine"], "law=none.py:mine: none.py: [Errno 2] No such file"),
        ([*ALONE, "law=laws.py:mine"], "law=laws.py:mine: laws.py defines no Law called mine"),
        ([*ALONE, "law=bad.py:mine"], "law=bad.py:mine: bad.py: boom"),
        ([*ALONE, "law=chinchila"], "law=chinchila: |; did you mean chinchilla?"),
        ([*ALONE, "where=paramz > 1"], "where=paramz > 1: |; did you mean params"),
        ([*ALONE, "loss=los"], "loss=los: |; did you mean loss"),
        ([*ALONE, "columns.n=param"], "columns.n=param: |; did you mean params"),
    ],
)
def test_a_mistake_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    words: list[str],
    line: str,
) -> None:
    table().to_csv(tmp_path / "t.csv", index=False)
    (tmp_path / "laws.py").write_text("mine = 1\n")
    (tmp_path / "bad.py").write_text("raise ValueError('boom')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["fit", *words])
    with pytest.raises(SystemExit) as left:
        fit.main()
    said = capsys.readouterr()
    begins, _, nearest = line.partition("|")
    assert said.err.startswith(f"error: {begins}")
    assert nearest in said.err
    assert (left.value.code, said.err.count("\n")) == (2, 1)
    assert said.out in ("", "loading …\n", "loading …\nfitting 12 runs …\n")
    assert {path.name for path in tmp_path.iterdir()} - {"__pycache__"} == {
        "t.csv",
        "laws.py",
        "bad.py",
    }


def test_predicted_from_the_command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The numbers are the library's, with the law of the example in docs/laws.md."""
    page = (Path(__file__).parents[1] / "docs" / "laws.md").read_text()
    (example,) = re.findall(
        r"^```python\n(from tinygpt.scaling import Law.*?)^```", page, re.S | re.M
    )
    (tmp_path / "my_laws.py").write_text(example)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plots, "draw", lambda *_: [])
    x = np.geomspace(1e5, 1e8, 24)
    noise = 0.01 * np.random.default_rng(0).standard_normal(24)
    runs = pd.DataFrame({"tokens": x, "loss": 1.2 + 40 / (x + 2e6) ** 0.3 + noise})
    runs.to_csv("mine.csv", index=False)
    words = ["table=mine.csv", "columns.d=tokens", "loss=loss", "objective=raw"]
    words += ["law=my_laws.py:shifted", "predict=[{d: 1e9}, {d: 5e12}]"]
    before = dict(LAWS)
    try:
        monkeypatch.setattr(sys, "argv", ["fit", *words])
        fit.main()
    finally:
        LAWS.clear()
        LAWS.update(before)
    said = " ".join(capsys.readouterr().out.split())
    found = json.loads((tmp_path / "outputs/fit-mine/fit.json").read_text())
    assert (found["law"], found["method"]["residuals"]) == ("shifted", "L")
    mine = runpy.run_path("my_laws.py")["shifted"]
    kind = {"objective": "raw", "estimator": found["method"]["estimator"]}
    alone = scaling.fit(runs, mine, loss="loss", x="tokens", **kind)
    asked = [one for one in found["predictions"] if one["asked"]]
    assert [one["place"] for one in asked] == [{"x": 1e9}, {"x": 5e12}]
    for one in asked:
        interval = predict_interval(alone, **one["place"])
        assert one["loss"] == pytest.approx(interval.estimate, rel=1e-6)
        ends = (one["interval"]["low"], one["interval"]["high"])
        assert ends == pytest.approx((interval.low, interval.high), rel=1e-4)
        assert one["interval_of_a_run"]["low"] < one["loss_of_a_run"]
    assert f"5.00e12 {asked[1]['loss_of_a_run']:.2f}" in said
    distance = next(c for c in found["checks"] if "no further beyond" in c["name"])
    assert (distance["outcome"], distance["figure"][:8]) == ("fail", "×50,000 ")
    assert "×50,000 beyond; the runs span ×1,000" in said


def test_tokens_from_the_compute(tinygpt: Command, tmp_path: Path) -> None:
    runs = table().assign(flops=lambda t: 6 * t["params"] * t["tokens"]).drop(columns="tokens")
    runs.to_csv(tmp_path / "runs.csv", index=False)
    words = ["columns.n=params", "columns.c=flops", "columns.loss=loss", "columns.seed=seed"]
    done = tinygpt("fit", "table=runs.csv", *words)
    assert done.returncode == 0, done.stderr
    found = pd.read_csv(tmp_path / "outputs/fit-runs/runs.csv")
    assert np.allclose(found["flops / (6 params)"], 2_000_000)


# --- at the end of a sweep


def test_a_study_ends_with_its_law(tinygpt: Command, corpus: Path, tmp_path: Path) -> None:
    words = tiny(corpus, "--multirun", "model.d_model=8,16,32", "seed=1,2", "study=s")
    done = tinygpt("run", *words)
    assert done.returncode == 0, done.stderr
    assert "law        L = " in done.stdout
    assert "report     outputs/s/fit/report.html" in done.stdout
    folder = tmp_path / "outputs/s/fit"
    written = (folder / "fit.json").read_bytes()
    closing = done.stdout.splitlines()[-3:]
    assert [line.split(" ")[0] for line in closing] == ["law", "", "report"]
    finished = tinygpt("run", *words)  # all is skipped, and what it came to is said again
    assert finished.stdout.splitlines()[-3:] == closing
    assert len(pd.read_csv(folder / "runs.csv")) == 6
    again = tinygpt("fit", "runs=outputs/s")
    assert again.returncode == 0, again.stderr
    assert (folder / "fit.json").read_bytes() == written


def test_a_study_without_a_law_says_why(tinygpt: Command, corpus: Path, tmp_path: Path) -> None:
    words = tiny(corpus, "--multirun", "seed=1,2", "train.steps=5")
    done = tinygpt("run", *words, "study=s")
    assert done.returncode == 0, done.stderr
    assert "law        none: these runs have one size, one number of tokens" in done.stdout
    off = tinygpt("run", *words, "study=t", "fit=false")
    assert "law" not in off.stdout
    assert not (tmp_path / "outputs/t/fit").exists()
