"""Sweep: what is trained and where, and what is refused, skipped, resumed and printed."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import os
import re
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from rich.console import Console

from tests.conftest import ROOT, Command, Starts, tiny
from tinygpt import cli
from tinygpt.config import ConfigError, RunError
from tinygpt.fileio import read_yaml
from tinygpt.runs import rundir
from tinygpt.scaling.runs import load_runs
from tinygpt.sweeping import study as studies
from tinygpt.sweeping.engines import Share
from tinygpt.sweeping.jobs import Job, compose_jobs, expand, flops_of
from tinygpt.sweeping.kinds import TRAINING
from tinygpt.sweeping.search import search as optuna_search
from tinygpt.sweeping.view import View, Work, seconds_left
from tinygpt.sweeping.workers import Outcome

EXPERIMENTS = sorted(
    path.stem
    for path in (ROOT / "conf/experiment").glob("*.yaml")
    if "MULTIRUN" in path.read_text() and path.stem != "adaptation"  # of another command
)
# What two runs of the same configuration may differ in.
NOT_COMPARED = re.compile(
    "tokens_per_second|seconds_training|peak_memory_bytes|git_commit|folder|^study$"
)


def sweep(*words: str, params: dict[str, Any] | None = None) -> list[Job]:
    return compose_jobs(expand(params or {}, words), TRAINING)


# --- what a sweep comes to


def test_every_combination_the_last_key_fastest() -> None:
    jobs = sweep("model.d_model=16,32", "seed=1,2", "train.steps=3")
    found = [(j.config.model.d_model, j.config.seed, j.config.train.steps) for j in jobs]
    assert found == [(16, 1, 3), (16, 2, 3), (32, 1, 3), (32, 2, 3)]
    assert [job.label for job in jobs[:2]] == ["d_model=16 seed=1", "d_model=16 seed=2"]


def test_texts_and_whole_numbers_of_a_sweep_stay_apart() -> None:
    named = expand({}, ["run_name=1.10,1.1,007", "study=1e5"])
    words = [[*job, f"seed={seed}"] for seed, job in enumerate(named)]
    jobs = compose_jobs(words, TRAINING)
    assert [job.run.path.name for job in jobs] == ["1.10", "1.1", "007"]
    assert {job.run.path.parent.name for job in jobs} == {"1e5"}
    assert jobs[0].label == "run_name=1.10 seed=0"
    lengths = sweep("train.tokens=1e6,2_000_000")
    assert [job.config.train.tokens for job in lengths] == [1_000_000, 2_000_000]
    assert lengths[0].run.path.name.startswith("tokens-1000000-")


def test_tables_of_keys_that_go_together() -> None:
    rows = [{"model.d_model": 16, "model.n_heads": 1}, {"model.d_model": [32, 64]}]
    jobs = sweep(params={"seed": [1, 2], "together": rows, "train.steps": 3})
    found = [(j.config.seed, j.config.model.d_model, j.config.model.n_heads) for j in jobs]
    assert found == [(1, 16, 1), (2, 16, 1), (1, 32, 4), (1, 64, 4), (2, 32, 4), (2, 64, 4)]


def test_the_command_line_takes_the_place_of_a_key() -> None:
    params = {"seed": [1, 2], "together": [{"model.d_model": 16}, {"model.d_model": 32}]}
    assert expand(params, ["seed=7"]) == [
        ["seed=7", "model.d_model=16"],
        ["seed=7", "model.d_model=32"],
    ]
    assert expand(params, ["model.d_model=8,24", "seed=7"]) == [
        ["seed=7", "model.d_model=8"],
        ["seed=7", "model.d_model=24"],
    ]
    assert expand({"train.tokens": [5, 6]}, ["train.steps=3"]) == [["train.steps=3"]]


def test_keys_that_go_together_are_given_together() -> None:
    rows = [{"model.d_model": n, "model.n_heads": n // 16, "train.flops": n} for n in (16, 32)]
    rows = [{**row, "model.n_layers": 1} for row in rows]
    params = {"together": rows}
    with pytest.raises(ConfigError) as error:
        expand(params, ["model.d_model=32,64"])
    assert str(error.value) == (
        "model.d_model: the experiment changes it together with model.n_heads; "
        "give all of them (every combination is trained), or none"
    )
    given = ["model.d_model=32,64", "model.n_heads=2"]
    assert len(expand(params, given)) == 4
    assert len(expand(params, ["model.n_layers=2,3"])) == 4  # the same in all of them
    assert len(expand(params, ["train.tokens=1000"])) == 2  # the length is that of every run


def test_a_large_number_is_short_in_the_name_of_its_run() -> None:
    given = [3e12, 1.5e15, 2e6, 1234567.5, 40_000, 3e-4]
    written = [job[0].partition("=")[2] for job in expand({"train.flops": given}, [])]
    assert written == ["3e12", "1.5e15", "2e6", "1234567.5", "40000", "0.0003"]


YAML_VALUES = st.one_of(
    st.integers(-(10**9), 10**9),
    st.floats(allow_nan=False, allow_infinity=False),
    st.booleans(),
    st.none(),
    st.lists(st.floats(0, 1), max_size=3),
)


@given(st.dictionaries(st.sampled_from(["a", "b.c", "d"]), YAML_VALUES, min_size=1))
def test_values_of_an_experiment_survive_being_written_out(values: dict[str, Any]) -> None:
    (job,) = expand({key: [value] for key, value in values.items()}, [])
    (again,) = expand({}, job)
    assert again == job or [word.split("=")[0] for word in again] == list(values)
    from hydra.core.override_parser.overrides_parser import OverridesParser

    read = {o.key_or_group: o.value() for o in OverridesParser.create().parse_overrides(job)}
    assert read == values


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["hardware.threads=1,2"], "hardware.threads=1 and hardware.threads=2: both train the sam"),
        (["model.d_ff=null,256"], "model.d_ff=null and model.d_ff=256: both train the same model"),
        (["model.rope_theta=1e4,1e5"], "model.rope_theta=10000.0 and model.rope_theta=100000.0:"),
        (["model.mup_base_width=32,64"], "model.mup_base_width=32 and model.mup_base_width=64: bo"),
        (["model.n_kv_heads=null,4"], "model.n_kv_heads=null and model.n_kv_heads=4: both train"),
        (["train.log_every=1,2"], "train.log_every=1 and train.log_every=2: both train the same"),
        (["seed=1,2", "run_name=x"], "seed=1 and seed=2: both would write outputs/runs/x"),
        (["seed=interval(1,2)"], "seed=interval(1,2): needs hydra/sweeper=optuna"),
        (["model.d_model=16,32,abc"], "model.d_model=abc: must be an integer"),
    ],
)
def test_jobs_that_would_be_the_same_are_refused(words: list[str], line: str) -> None:
    with pytest.raises(ConfigError) as error:
        sweep(*words)
    assert str(error.value).startswith(line)


def test_what_has_an_effect_is_not_refused() -> None:
    assert len(sweep("model.rope_theta=1e4,1e5", "model.position=rope")) == 2
    assert len(sweep("model.mup_base_width=32,64", "model.parametrization=mup")) == 2
    assert len(sweep("train.eval_every=20_000,40_000", "train.early_stopping_patience=2")) == 2


# --- the experiments that ship


@pytest.mark.parametrize("scale", ["smoke", "laptop", "gpu"])
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_at_every_scale(name: str, scale: str) -> None:
    words = [f"experiment={name}", f"scale={scale}"]
    params = getattr(cli.compose_config(words).sweep, scale)
    jobs = sweep(*words, params=params)
    assert {job.config.study for job in jobs} == {f"{name}-{scale}"}
    assert len({job.run.path for job in jobs}) == len(jobs) > 1
    if scale != "smoke":
        seeds: dict[str, set[int]] = {}
        for job in jobs:
            unseeded = dataclasses.replace(job.config, seed=0)
            setting = rundir.config_hash(unseeded, job.content)
            seeds.setdefault(setting, set()).add(job.config.seed)
        assert min(map(len, seeds.values())) >= 2


def test_the_names_of_all_experiments_are_listed() -> None:
    wanted = "width depth heads context data params optimizer learning_rate batch_size tokenizer"
    assert set(EXPERIMENTS) >= {*wanted.split(), "seeds", "isoflop", "grid", "cooldown"}
    help_text = (ROOT / "conf/hydra/help/run.yaml").read_text()
    assert [name for name in EXPERIMENTS if name not in help_text] == []


# --- sweeps as users run them


def read_summary(folder: Path) -> list[dict[str, str]]:
    with (folder / "sweep_summary.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def comparable(folder: Path) -> list[dict[str, str]]:
    rows = read_summary(folder)
    return [{k: v for k, v in row.items() if not NOT_COMPARED.search(k)} for row in rows]


def test_a_sweep_and_the_same_again(tinygpt: Command, corpus: Path, tmp_path: Path) -> None:
    words = tiny(corpus, "--multirun", "model.d_model=8,16", "seed=1,2")
    done = tinygpt("run", *words)
    assert done.returncode == 0, done.stderr
    assert "4 runs: 4 finished" in done.stdout
    study = tmp_path / "outputs/sweep-d_model-seed"
    rows = read_summary(study)
    results = [json.loads((study / row["folder"] / "results.json").read_text()) for row in rows]
    assert len(rows) == len(results) == 4
    for row, result in zip(rows, results, strict=True):
        said = {name: "" if value is None else str(value) for name, value in result.items()}
        assert {name: row[name] for name in said} == said
    assert len({result["model_parameters"] for result in results}) == 2
    assert sorted(path.name for path in (tmp_path / "outputs").iterdir()) == [study.name]
    names = [f"d_model-{d_model}_seed-{seed}" for d_model in (8, 16) for seed in (1, 2)]
    assert [row["run_name"][:-7] for row in rows] == names
    before = {path: path.stat().st_mtime_ns for path in study.glob("*/*")}
    (study / "sweep_summary.csv").unlink()

    again = tinygpt("run", *words, PYTHONPROFILEIMPORTTIME="1")
    assert again.returncode == 0, again.stderr
    assert "4 runs: 4 finished before" in again.stdout
    loaded = {line.rsplit("|", 1)[-1].strip() for line in again.stderr.splitlines()}
    assert "pandas" in loaded
    assert "torch" not in loaded  # what is finished is skipped without it
    assert {path: path.stat().st_mtime_ns for path in study.glob("*/*")} == before
    assert read_summary(study) == rows
    assert list(load_runs(study)["d_model"]) == [8, 8, 16, 16]
    # beside others and under another name, a run is still the same
    beside = [*words[:-2], "model.d_model=16", "seed=2,3", f"study={study.name}"]
    more = tinygpt("run", *beside)
    assert "2 runs: 1 finished before, 1 finished" in more.stdout


def test_a_plan_trains_nothing(tinygpt: Command, corpus: Path, tmp_path: Path) -> None:
    done = tinygpt("run", *tiny(corpus, "--multirun", "model.d_model=8,16,64", "plan=true"))
    assert done.returncode == 0, done.stderr
    assert "3 to train" in done.stdout
    assert "NO   at least two seeds of every setting: 1" in done.stdout
    assert "yes  equal training tokens for all sizes" in done.stdout
    assert not (tmp_path / "outputs").exists()
    alone = tinygpt("run", *tiny(corpus, "plan=true"))
    assert alone.returncode == 0, alone.stderr
    assert "1 to train" in alone.stdout
    assert not (tmp_path / "outputs").exists()


def planned_in(
    monkeypatch: pytest.MonkeyPatch, cache: Path, load: float, *words: str
) -> tuple[str, list[int]]:
    """What a plan says on a machine of 8 cores where a step takes a second, and the threads that
    it was timed with."""
    import joblib
    import torch

    from tinygpt.training import hardware

    threads = []

    def seconds_per_step(*of: Any) -> float:
        threads.append(torch.get_num_threads())
        return 1.0

    monkeypatch.setattr(hardware, "seconds_per_step", seconds_per_step)
    monkeypatch.setattr(joblib, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(time, "process_time", lambda: 0.0)
    jobs = sweep(*words, f"cache_dir={cache}")
    TRAINING.prepare(jobs, (), Console(quiet=True))
    said = io.StringIO()
    TRAINING.print_plan(jobs, jobs[:1], Console(file=said, width=80))
    return said.getvalue(), threads


def test_a_plan_times_what_a_run_will_have_of_the_machine(
    monkeypatch: pytest.MonkeyPatch, corpus: Path, cache: Path
) -> None:
    def seconds(said: str, how: str) -> int:
        found = re.search(rf"^4 to train: (\d+):(\d\d), {how}; ", said, re.M)
        assert found, said
        return 60 * int(found[1]) + int(found[2])

    words = tiny(corpus, "seed=1,2,3,4,5", "hardware.threads=null")
    local = ["launcher=local", "launcher.n_jobs=2"]
    said, threads = planned_in(monkeypatch, cache, 0.2, *words, *local)
    assert threads == [4]
    at_once = seconds(said, "2 at once, 4 threads each")
    assert "uncertain" not in said
    said, threads = planned_in(monkeypatch, cache, 3.2, *words, *local, "hardware.threads=1")
    assert threads == [1]
    assert "1 thread each" in said
    assert "uncertain" not in said  # three busy, two wanted, eight there
    alone = ["launcher=serial", "hardware.threads=1"]
    said, _ = planned_in(monkeypatch, cache, 7.1, *words, *alone)
    assert abs(seconds(said, "one after the other, 1 thread each") - 2 * at_once) <= 1
    assert "other work: a load of 7.1 on 8 cores; the time is uncertain" in said


def test_a_row_of_a_plan_is_a_line(
    monkeypatch: pytest.MonkeyPatch, corpus: Path, cache: Path
) -> None:
    words = tiny(corpus, "seed=1,2", "model.d_model=128,256", "model.n_heads=8,16")
    said, _ = planned_in(monkeypatch, cache, 0.0, *words)
    rows = said.split("\n\n")[0].splitlines()
    assert len(rows) == 1 + 8
    assert "done" in rows[1]


def test_one_that_fails_and_one_that_diverges_hide_no_other(
    tinygpt: Command, corpus: Path, tmp_path: Path
) -> None:
    words = tiny(corpus, "--multirun", "optim=sgd", "train.grad_clip_norm=null")
    study = tmp_path / "outputs/sweep-learning_rate"
    words.append("optim.learning_rate=1e-3,1e12,2e-3")
    blocked = sweep(*[word for word in words if word != "--multirun"])[2]
    folder = study / blocked.run.path.name
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints").rmdir()
    (folder / "checkpoints").write_text("in the way")  # makes this job raise
    (folder / "environment.json").write_text(json.dumps({"config_hash": blocked.hash}))
    done = tinygpt("run", *words)
    assert done.returncode == 1, done.stderr
    assert "3 runs: 1 finished, 1 diverged, 1 failed" in done.stdout
    assert "FileExistsError" in done.stdout
    rows = {row["run_name"]: row for row in read_summary(study)}
    assert sorted(row["status"] for row in rows.values()) == ["diverged", "failed", "finished"]
    assert "FileExistsError" in rows[folder.name]["error"]
    assert "Traceback" in (folder / "run.log").read_text()

    (folder / "checkpoints").unlink()  # what was in the way is gone: only that job is trained
    again = tinygpt("run", *words)
    assert again.returncode == 0, again.stderr
    assert "3 runs: 1 finished before, 1 diverged before, 1 finished" in again.stdout


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["scale=smoke"], "scale=smoke: needs an experiment that has scales"),
        (["launcher=local"], "launcher=local: needs --multirun, or an experiment"),
        (["experiment=width", "scale=huge"], "scale=huge: must be one of smoke, laptop, gpu"),
        (["experiment=width", "model.d_modle=3"], "model.d_modle: no such key"),
        (["--multirun", "seed=1,2", "hardware=cuda"], "hardware.accelerator=cuda: this"),
        (["--multirun", "seed=1,2", "data=custom", "data.path=no"], "data.path=no: "),
        (["-m", "train.steps=9,19", "sweep.share_trunk=true"], "sweep.share_trunk=true:"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    tinygpt: Command, tmp_path: Path, words: Sequence[str], line: str
) -> None:
    done = tinygpt("run", *words)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {line}")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


# --- runs that share a trunk


def test_a_branch_ends_as_if_trained_from_the_start(
    tinygpt: Command, corpus: Path, tmp_path: Path
) -> None:
    words = tiny(corpus, "--multirun", "schedule=wsd", "schedule.warmup_steps=2")
    words += ["train.steps=null", "train.tokens=2560,5120,7680"]  # 10, 20, 30 steps
    words += ["train.eval_every=512", "train.log_every=2", "model.dropout=0.1"]
    alone = tinygpt("run", *words, "study=alone")
    shared = tinygpt("run", *words, "study=shared", "sweep.share_trunk=true")
    assert alone.returncode == shared.returncode == 0, alone.stderr + shared.stderr
    assert re.search(r"trained .* 4\d% saved by sharing trunks", shared.stdout)
    assert "saved" not in alone.stdout
    one, other = tmp_path / "outputs/alone", tmp_path / "outputs/shared"
    rows = [comparable(folder) for folder in (one, other)]
    begun = [[row.pop("branched_at_step") for row in some] for some in rows]
    assert begun == [["", "", ""], ["8", "16", ""]]
    parents = [row.pop("branched_from") for some in rows for row in some]
    assert parents[-3:-1] == [rows[1][2]["run_name"]] * 2
    assert rows[0] == rows[1]
    import torch  # here: the other tests need none

    finals = [next(f.glob("tokens-2560*/checkpoints/final.ckpt")) for f in (one, other)]
    weights = [torch.load(path, weights_only=True)["state_dict"] for path in finals]
    assert all(bool((weights[0][key] == weights[1][key]).all()) for key in weights[0])
    # what was measured before the branch came along
    files = [next(f.glob("tokens-5120*")) / "metrics.csv" for f in (one, other)]
    steps = [[line.split(",")[0] for line in file.read_text().split()] for file in files]
    assert steps[0] == steps[1]
    assert len(steps[0]) > 8
    # one that is to be trained again, or a new one, finds the trunk that ended before
    shutil.rmtree(next(other.glob("tokens-5120*")))
    assert "saved" in tinygpt("run", *words, "study=shared", "sweep.share_trunk=true").stdout
    again = comparable(other)
    assert [row.pop("branched_at_step") for row in again] == begun[1]
    assert [row.pop("branched_from") for row in again][:2] == [rows[1][2]["run_name"]] * 2
    assert again == rows[1]


def sized(width: int, *, steps: int = 1000, branch_step: int = 0) -> Job:
    """Return a job of a width sweep as the view sees it: its step costs width² FLOPs."""
    row = {"total_steps": steps, "flops_exact": 1e6 * width**2 * steps}
    config, run = cli.compose_config([]), rundir.RunDir(Path("none"))
    return Job(
        TRAINING, (), config, f"d_model={width}", {}, "", run, row=row, branch_step=branch_step
    )


def test_what_trunks_save_is_said() -> None:
    trunk, branch = sized(10), sized(10, steps=500, branch_step=400)
    assert flops_of([trunk, branch]) == "1.10e+11 FLOPs, 27% saved by sharing trunks"
    assert flops_of([trunk, sized(10, steps=500)]) == "1.50e+11 FLOPs"


# --- how long it still takes


def pace(width: int) -> float:
    """Seconds a step as measured on a CPU: small models have a tenth of the speed of large ones."""
    flops = 1e6 * width**2
    return 0.004 + flops / 4e10 * (1 + 1e9 / (flops + 1e9))


@pytest.mark.parametrize("widths", [(32, 64, 128, 256), (256, 128, 64, 32)])
@pytest.mark.parametrize("at_once", [1, 2])
def test_the_time_left_is_right_or_not_shown(widths: tuple[int, ...], at_once: int) -> None:
    works = [Work(1000, 1e6 * width**2, 1000 * pace(width)) for width in widths]
    shown = []
    for done in range(1, 4):
        todo = [work._replace(seconds=0.0) for work in works[done:]]
        true = sum(work.seconds for work in works[done:]) / at_once
        true = max(true, *(work.seconds for work in works[done:]))
        left = seconds_left(works[:done], todo, at_once)
        shown.append(left is not None)
        if left is not None:
            assert true / 1.5 < left < 1.5 * true
    assert shown[2]  # when one size is to come, it is known
    assert not (shown[0] and widths[0] == 32)  # the smallest alone says nothing


def test_runs_of_one_size_are_timed_by_each_other() -> None:
    done, todo = Work(100, 1e9, 50.0), Work(100, 1e9)
    assert seconds_left([done], [todo] * 3) == pytest.approx(150)
    assert seconds_left([done], [todo] * 4, at_once=2) == pytest.approx(100)
    assert seconds_left([done], [todo, Work(10, 1e9)], at_once=2) == pytest.approx(50)
    assert seconds_left([], [todo]) is None
    assert seconds_left([done], []) is None


def test_the_view_times_what_ended_and_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [sized(32), sized(64), sized(64), sized(64)]
    view = View(jobs, 4, Console(file=io.StringIO()))
    now = view.start
    monkeypatch.setattr(time, "monotonic", lambda: now)
    assert view.left() == ""
    view.begun[jobs[0]], now = now, now + 100
    view.ended(jobs[0], Outcome("finished", 3.0))
    assert view.left() == ""  # of a step four times as large nothing is known
    view.begun[jobs[1]], now = now, now + 60
    view.progress[jobs[1]] = (0.2, "")
    assert view.left() == "16%  about 14:00 left"  # 300 seconds each, of 160 spent
    view.done_before[jobs[1]] = 0.05  # by an earlier start of the study: 400 seconds each
    assert view.left() == "12%  about 18:40 left"
    view.ended(jobs[1], Outcome("failed", reason="x"))  # what it was at goes with it
    assert view.left() == ""


# --- interrupted and taken up again


@pytest.mark.parametrize("launcher", ["serial", pytest.param("local", marks=pytest.mark.slow)])
def test_sigterm_saves_and_stops_a_study(
    tinygpt: Command, start: Starts, corpus: Path, tmp_path: Path, launcher: str
) -> None:
    words = tiny(corpus, "--multirun", "seed=1,2", "train.steps=300", f"launcher={launcher}")
    words += ["launcher.n_jobs=2"] if launcher == "local" else []
    process = start("run", *words)
    study = tmp_path / "outputs/sweep-seed"
    process.wait_until(lambda: list(study.glob("*/checkpoints/last.ckpt")))
    process.send_signal(signal.SIGTERM)
    code, (out, err) = process.wait(60), process.communicate()
    assert code == 143, out + err
    line = "stopped by SIGTERM: 0 of 2 runs done; the same command resumes"
    assert (out + err).count(line) == 1
    assert "1/2" not in out  # nothing is done
    begun = len(list(study.glob("*/run.log")))
    assert out.count("  interrupted at ") == begun
    done = tinygpt("run", *words)
    assert done.returncode == 0, done.stderr
    undisturbed = tinygpt("run", *words, "study=undisturbed")
    assert undisturbed.returncode == 0, undisturbed.stderr
    assert comparable(study) == comparable(study.with_name("undisturbed"))


def test_a_job_that_had_not_begun_hides_no_interrupted_one(tmp_path: Path) -> None:
    words = [[f"output_dir={tmp_path}", f"seed={seed}", "launcher=serial"] for seed in (1, 2)]
    jobs = compose_jobs(words, TRAINING)
    jobs[1].run.log.parent.mkdir(parents=True)
    jobs[1].run.log.touch()
    for job in jobs:
        job.row["flops_exact"] = 1.0
    said, outcomes = io.StringIO(), dict[Job, Outcome]()
    told = [(job, Outcome("interrupted")) for job in jobs]  # the one that had not begun first
    share = Share("local", 2, 1)
    studies._run(list(jobs), share, lambda *_: iter(told), 2, outcomes, Console(file=said))
    assert list(outcomes) == [jobs[1]]
    assert said.getvalue().count("seed=2  interrupted at 0%") == 1
    assert "seed=1" not in said.getvalue()


# --- a sweeper that optimises


def search(
    monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str, **settings: Any
) -> list[list[str]]:
    """Run Optuna on runs whose loss is |log10(rate / 0.01)|; return the jobs that were made."""
    made: list[list[str]] = []

    def run_study(jobs: Sequence[Sequence[str]], kind: Any) -> list[Outcome]:
        found = compose_jobs(jobs, kind)
        made.extend(map(list, jobs))
        rates = [job.config.optim.learning_rate for job in found]
        losses = [abs(math.log10(rate / 0.01)) for rate in rates]
        return [Outcome("finished", x) if x < 2 else Outcome("diverged") for x in losses]

    monkeypatch.setattr("tinygpt.sweeping.search.run_study", run_study)
    config = OmegaConf.create({"hydra": {"job": {"config_name": "config"}}, "plan": False})
    config.update({"output_dir": str(folder), "study": "tuned", "plan": "plan=true" in arguments})
    known = {"n_trials": 12, "n_jobs": 1, "direction": "minimize", "params": {}, "storage": None}
    known |= {"study_name": None, "sampler": {"_target_": "optuna.samplers.TPESampler", "seed": 0}}
    optuna_search(config, known | settings, [f"output_dir={folder}", "study=tuned", *arguments])
    return made


RATE = "optim.learning_rate=tag(log,interval(1e-4,1e-1))"


def test_an_impossible_trial_fails_alone_and_the_best_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = search(monkeypatch, tmp_path, RATE, "model.n_heads=choice(2,3,4)", n_jobs=2)
    lines = capsys.readouterr().out.splitlines()
    failed = [line for line in lines if line.startswith("failed")]
    assert set(failed) == {"failed     model.n_heads=3: must divide model.d_model=64"}
    assert len(made) + len(failed) == 12
    rates = {job[2].split("=")[1]: job for job in made}
    best = min(rates, key=lambda rate: abs(math.log10(float(rate) / 0.01)))
    loss = abs(math.log10(float(best) / 0.01))
    heads = rates[best][3]
    assert lines[-2] == f"best       optim.learning_rate={best} {heads}  {loss:.4f}"
    assert lines[-1].startswith(f"folder     {tmp_path}/tuned/")
    written = read_yaml(tmp_path / "tuned" / "optimization_results.yaml")
    assert written["best_params"]["optim.learning_rate"] == best
    again = search(monkeypatch, tmp_path, RATE, "model.n_heads=choice(2,3,4)", n_jobs=2)
    assert again == made  # so that the same command finds its finished runs


def test_the_search_converges_and_parameters_may_stand_in_the_settings(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    params = {"optim.learning_rate": "tag(log,interval(1e-4,1e-1))"}
    made = search(monkeypatch, tmp_path, params=params, n_trials=40)
    late = [abs(math.log10(float(job[-1].split("=")[1]) / 0.01)) for job in made[20:]]
    assert sorted(late)[10] < 0.5  # random choices would be 0.75 away


def test_a_database_counts_the_trials_of_earlier_commands(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    storage = f"sqlite:///{tmp_path}/x.db"
    first = search(monkeypatch, tmp_path, RATE, storage=storage, n_trials=5)
    assert search(monkeypatch, tmp_path, RATE, storage=storage, n_trials=5) == []
    more = search(monkeypatch, tmp_path, RATE, storage=storage, n_trials=8)
    assert (len(first), len(more)) == (5, 3)
    assert len({tuple(job) for job in first + more}) == 8
    out = capsys.readouterr().out.splitlines()
    counts = [line.partition(": ")[2] for line in out if line.startswith(storage)]
    assert counts == [f"{a} of {b} trials to make" for a, b in [(5, 5), (0, 5), (3, 8)]]


def test_a_plan_of_trials_writes_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(search(monkeypatch, tmp_path, RATE, "plan=true")) == 1
    assert capsys.readouterr().out == "12 trials, all like this one\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("trial", "why"),
    [
        ("model.n_heads=3", "model.n_heads=3: must divide model.d_model=64"),
        ("optim.learning_rate=5", "diverged"),
    ],
)
def test_no_trial_with_a_result_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, trial: str, why: str
) -> None:
    with pytest.raises(RunError, match=f"^no trial ended with a result: {re.escape(why)}$"):
        search(monkeypatch, tmp_path, trial, "model.n_layers=interval(1,3)", n_trials=2)


@pytest.mark.parametrize(
    ("argument", "settings", "line"),
    [
        (RATE, {"n_trials": "x"}, "hydra.sweeper.n_trials=x: must be an integer of at least 1"),
        (RATE, {"direction": "maximize"}, "hydra.sweeper.direction=maximize: must be minimize"),
        (RATE, {"storage": "nowhere"}, "hydra.sweeper.storage=nowhere: Could not parse"),
        ("optim.learning_rate=interval(2,1)", {}, "optim.learning_rate=interval(2,1): `low <="),
    ],
)
def test_a_search_that_cannot_be_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    argument: str,
    settings: dict[str, Any],
    line: str,
) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(line)}") as error:
        search(monkeypatch, tmp_path, argument, **settings)
    assert "\n" not in str(error.value)


def test_a_search_space_is_of_the_kind_of_its_key(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    space = ["model.n_layers=interval(1,3)", "model.d_model=range(64,257,64)", RATE]
    made = search(monkeypatch, tmp_path, *space, "optim.weight_decay=range(0,0.3,0.1)")
    values = {key: {job[2 + i].split("=")[1] for job in made} for i, key in enumerate("ndrw")}
    assert values["n"] == {"1", "2", "3"}
    assert values["d"] == {"64", "128", "192", "256"}
    assert {float(x) for x in values["w"]} == {0.0, 0.1, 0.2}
    assert all(len(rate.strip("0.")) <= 9 for rate in values["r"])  # they name folders
