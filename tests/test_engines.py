"""Run studies on the real engines: this process, joblib's processes, Slurm and Ray."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import Command, Starts, tiny
from tests.test_sweeping import comparable, read_summary, sweep
from tests.warm import Process
from tinygpt.config import (
    ConfigError,
    LauncherConfig,
    LocalLauncher,
    RayLauncher,
    SlurmLauncher,
)
from tinygpt.sweeping import engines, workers
from tinygpt.sweeping.jobs import Job


def there(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


needs_ray = pytest.mark.skipif(not there("ray"), reason="ray is missing")


def slurm_answers() -> bool:
    """Whether there is a controller, and not the commands alone."""
    if not shutil.which("scontrol"):
        return False
    ping = subprocess.run(["scontrol", "ping"], capture_output=True, timeout=30, check=False)
    return ping.returncode == 0


needs_slurm = pytest.mark.skipif(
    not (there("submitit") and slurm_answers()),
    reason="no Slurm here: tests/slurm.sh start; pip install -e '.[slurm]'",
)


def test_slurm_asks() -> None:
    launcher = SlurmLauncher(partition="short", minutes=7, cpus=3, gpus=2, memory_gb=5, n_jobs=9)
    launcher.sbatch = {"account": "mine"}
    assert engines.slurm_parameters(launcher, "width-laptop") == {
        "job_name": "tinygpt-width-laptop",
        "partition": "short",
        "time": 7,
        "cpus_per_task": 3,
        "gres": "gpu:2",
        "mem": "5GB",
        "array_parallelism": 9,
        "additional_parameters": {"account": "mine"},
    }
    assert not {"partition", "gres", "mem"} & set(engines.slurm_parameters(SlurmLauncher(), "x"))


def test_ray_asks() -> None:
    asked = engines.ray_options(RayLauncher(address="auto", cpus=3, gpus=0.5))
    assert asked == {"num_cpus": 3, "num_gpus": 0.5, "max_retries": 0}


@pytest.mark.parametrize("launcher", [SlurmLauncher(), RayLauncher()])
def test_a_missing_engine_is_one_line(
    launcher: LauncherConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    kind = launcher.kind
    with pytest.raises(ConfigError, match=rf"launcher={kind}: needs `pip install -e '\.\[{kind}"):
        engines.check_engine(launcher)


def test_a_machine_without_what_an_engine_needs_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match="launcher=slurm: no srun here"):
        engines.check_engine(SlurmLauncher())
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(engines, "SHARED_MEMORY", str(tmp_path / "shm"))
    with pytest.raises(ConfigError, match=r"^launcher=local: its processes need .*shm, which"):
        engines.check_engine(LocalLauncher())
    (tmp_path / "shm").mkdir()
    engines.check_engine(LocalLauncher())


@pytest.mark.parametrize(
    ("words", "line"),
    [
        pytest.param(
            "launcher=slurm launcher.cpus=1 launcher.partition=none",
            "error: launcher=slurm: sbatch: error: invalid partition specified: none",
            marks=[needs_slurm, pytest.mark.slow],
        ),
        pytest.param(
            "launcher=ray launcher.address=auto",
            "error: launcher.address=auto: no Ray cluster there",
            marks=[needs_ray, pytest.mark.slow],
        ),
    ],
    ids=["slurm", "ray"],
)
def test_what_an_engine_refuses_ends_in_one_line(
    tinygpt: Command, corpus: Path, words: str, line: str
) -> None:
    done = tinygpt("run", *tiny(corpus, "--multirun", "seed=1,2", "study=s", *words.split()))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr  # sbatch has its own word first
    assert done.stderr.splitlines()[-1] == line


def test_workers_share_out_the_gpus(tmp_path: Path) -> None:
    from joblib.externals.loky import ProcessPoolExecutor

    pool = ProcessPoolExecutor(4, initializer=workers._claim_gpu, initargs=(4, 2, tmp_path))
    try:
        futures = [pool.submit(visible_gpu, 1.0) for _ in range(4)]
        seen = Counter(future.result() for future in futures)
    finally:
        pool.shutdown(kill_workers=True)
    assert seen == {"0": 2, "1": 2}


@pytest.mark.parametrize(
    ("words", "cores", "cards", "expected"),
    [
        ("", 2, 0, ("local", 2, 1)),
        ("", 16, 0, ("local", 5, 3)),
        ("", 1, 0, ("serial", 1, 1)),
        ("launcher.n_jobs=1", 4, 0, ("serial", 1, 4)),
        ("launcher=serial", 4, 0, ("serial", 1, 1)),  # the threads of local, for the same losses
        ("launcher=serial", 16, 0, ("serial", 1, 3)),
        ("launcher=serial", 16, 1, ("serial", 1, None)),
        ("launcher=local", 1, 0, ("local", 1, 1)),
        ("hardware.threads=2", 4, 0, ("local", 4, 2)),
        ("", 16, 1, ("local", 4, 4)),  # small models, four on the card
        ("", 2, 1, ("local", 2, 1)),  # as there are cores for them
        ("model=large", 16, 1, ("serial", 1, None)),
        ("model=large", 16, 2, ("local", 2, 8)),
        ("model=large launcher.per_gpu=2", 16, 1, ("local", 2, 8)),
        ("hardware=cpu", 4, 1, ("local", 4, 1)),
    ],
)
def test_auto_trains_side_by_side_where_that_is_possible(
    monkeypatch: pytest.MonkeyPatch, words: str, cores: int, cards: int, expected: Any
) -> None:
    import joblib
    import torch

    monkeypatch.setattr(joblib, "cpu_count", lambda: cores)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cards > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)
    jobs = sweep("seed=1,2,3,4,5", *words.split())
    assert engines.share_of(jobs)[:3] == expected
    if "launcher" not in words:
        assert engines.share_of(jobs[:1]).engine == "serial"
    if not cards:  # what is left of a study trains as it would have
        assert engines.share_of(jobs[:1], study=5).threads == expected[2]


def test_a_run_resumes_with_the_threads_it_began_with(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(engines, "run_local", lambda jobs, workers: jobs)
    jobs = sweep("seed=1,2,3", f"output_dir={tmp_path}", "launcher.n_jobs=2", "hardware=cpu")
    for job, threads in zip(jobs[:2], (3, 5), strict=True):
        job.run.checkpoints.mkdir(parents=True)
        job.run.environment.write_text(json.dumps({"threads": threads}))
    jobs[0].run.last.touch()  # the second left no checkpoint: it begins anew
    share = engines.share_of(jobs).threads
    with engines.ready(jobs) as (_, engine):
        assert len(list(engine(jobs, tmp_path))) == 3
    assert [job.config.hardware.threads for job in jobs] == [3, share, share]


def test_auto_needs_no_shared_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(engines, "SHARED_MEMORY", str(tmp_path / "shm"))
    jobs = sweep("seed=1,2", "launcher.n_jobs=2", "hardware=cpu")
    assert engines.share_of(jobs).engine == "serial"


def visible_gpu(seconds: float) -> str:
    time.sleep(seconds)
    return os.environ["CUDA_VISIBLE_DEVICES"]


def study_of(tinygpt: Command, corpus: Path, folder: Path, name: str, *words: str) -> Any:
    words = (*tiny(corpus, "--multirun", "seed=1,2", "model.d_model=8,16"), *words)
    done = tinygpt("run", *words, f"study={name}")
    assert done.returncode == 0, done.stdout + done.stderr
    return comparable(folder / "outputs" / name)


@pytest.mark.parametrize(
    "words",
    [
        ["launcher=auto", "launcher.n_jobs=2"],
        pytest.param(["launcher=ray"], marks=[needs_ray, pytest.mark.slow]),
        pytest.param(
            ["launcher=slurm", "launcher.minutes=5", "launcher.cpus=1"],
            marks=[needs_slurm, pytest.mark.slow],
        ),
    ],
    ids=lambda words: words[0].split("=")[1],
)
def test_engines_agree(tinygpt: Command, corpus: Path, tmp_path: Path, words: list[str]) -> None:
    """To the last digit, as every engine gives a run one thread here."""
    serial = study_of(tinygpt, corpus, tmp_path, "serial")
    assert study_of(tinygpt, corpus, tmp_path, "other", *words) == serial


@needs_slurm
@pytest.mark.slow
def test_slurm_queues_a_run_again_and_it_goes_on(
    tinygpt: Command, start: Starts, corpus: Path, tmp_path: Path
) -> None:
    """It takes Slurm two minutes to begin a job again."""
    words = tiny(corpus, "--multirun", "seed=1,2", "train.steps=3000", "train.log_every=100")
    words += ["train.checkpoint_every=25_600"]
    slurm = ["launcher=slurm", "launcher.cpus=1", "study=requeued"]
    process = start("run", *words, *slurm)
    study = tmp_path / "outputs/requeued"
    process.wait_until(lambda: list(study.glob("seed-2*/checkpoints/last.ckpt")))
    (job,) = {path.name.split("_")[0] for path in (study / ".slurm").glob("*_submitted.pkl")}
    subprocess.run(["scontrol", "requeue", f"{job}_1"], check=True)
    assert process.wait(400) == 0, process.communicate()
    whole = tinygpt("run", *words, "study=whole")
    assert whole.returncode == 0, whole.stderr
    assert comparable(study) == comparable(study.with_name("whole"))
    assert "resuming" in next(study.glob("seed-2*/run.log")).read_text()


def test_a_killed_worker_hides_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is seen which job it was; the others end well."""
    jobs = sweep("seed=1,2,3,4,5", f"output_dir={tmp_path}", "hardware.accelerator=cpu")
    monkeypatch.setattr(workers, "do_job", dies_at_seed_3)
    with workers.Workers(2) as pool:
        found = {job.config.seed: outcome for job, outcome in workers.run_local(jobs, pool)}
    statuses = {seed: outcome.status for seed, outcome in found.items()}
    assert statuses == {**dict.fromkeys((1, 2, 4, 5), "finished"), 3: "killed"}
    assert "SIGKILL" in found[3].reason


def dies_at_seed_3(job: Job) -> workers.Outcome:
    job.run.path.mkdir(parents=True, exist_ok=True)
    job.run.log.touch()
    time.sleep(0.2)
    if job.config.seed == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return workers.Outcome("finished", 1.0)


@pytest.mark.slow
def test_one_raises_one_diverges_one_is_killed(
    tinygpt: Command, start: Starts, corpus: Path, tmp_path: Path
) -> None:
    """The fourth ends well, and it is said of each of the three what happened."""
    words = tiny(corpus, "optim=sgd", "train.grad_clip_norm=null", "train.steps=400")
    words += ["optim.learning_rate=1e-3,1e12,2e-3,3e-3", "study=s"]
    study = tmp_path / "outputs/s"
    jobs = sweep(*words)
    ends, diverges, raises, is_killed = [study / job.run.path.name for job in jobs]
    raises.mkdir(parents=True)
    (raises / "checkpoints").write_text("in the way")
    (raises / "environment.json").write_text(json.dumps({"config_hash": jobs[2].hash}))
    process = start("run", "--multirun", "launcher=local", "launcher.n_jobs=2", *words)
    while process.poll() is None:
        kill_who_trains(is_killed, process.pid)
        time.sleep(0.01)
    said = "".join(process.communicate())
    assert process.returncode == 1, said
    assert "4 runs: 1 finished, 1 diverged, 1 failed, 1 killed" in said
    assert "FileExistsError" in said
    assert "SIGKILL" in said
    found = {row["run_name"]: row for row in read_summary(study)}
    statuses = [found[path.name]["status"] for path in (ends, diverges, raises, is_killed)]
    assert statuses == ["finished", "diverged", "failed", "failed"]
    assert "SIGKILL" in found[is_killed.name]["error"]
    again = tinygpt("run", "--multirun", *words[:-2], "optim.learning_rate=3e-3,1e-3", "study=s")
    assert "2 runs: 1 finished, 1 finished before" in again.stdout, again.stderr


def kill_who_trains(run: Path, command: int) -> None:
    """As the system does where memory runs out: the process that has the run's files open."""
    if not (run / "metrics.csv").exists():
        return
    try:
        for child in psutil.Process(command).children(recursive=True):
            if any(Path(file.path).parent == run for file in child.open_files()):
                child.kill()
    except psutil.NoSuchProcess:
        pass


def kill_group(process: Process) -> None:
    """Everything that the command started, at once; loky's workers have sessions of their own."""
    try:
        children = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        children = []
    os.killpg(process.pid, signal.SIGKILL)
    for child in children:
        try:
            child.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait()


@pytest.mark.slow
def test_a_study_killed_three_times_ends_as_if_undisturbed(
    tinygpt: Command, start: Starts, corpus: Path, tmp_path: Path
) -> None:
    words = tiny(corpus, "--multirun", "model.d_model=8,16", "seed=1,2", "train.steps=400")
    words += ["train.checkpoint_every=2560", "train.eval_every=5120"]
    words += ["launcher=local", "launcher.n_jobs=2"]
    whole = tinygpt("run", *words, "study=whole")
    assert whole.returncode == 0, whole.stderr
    random_ = random.Random(0)
    killed = tmp_path / "outputs/killed"
    for _ in range(3):
        process = start("run", *words, "study=killed")
        before = len(list(killed.glob("*/results.json")))
        process.wait_until(lambda: any(killed.glob("*/metrics.csv")))
        time.sleep(random_.uniform(3, 8))
        kill_group(process)
        assert len(list(killed.glob("*/results.json"))) >= before
    done = tinygpt("run", *words, "study=killed")
    assert done.returncode == 0, done.stdout + done.stderr
    assert comparable(killed) == comparable(killed.with_name("whole"))
    assert len(comparable(killed)) == 4
    assert re.search(r"4 runs: .*finished", done.stdout)
