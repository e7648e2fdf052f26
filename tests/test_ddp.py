"""Several processes learn what one learns; they write once, and they stop together."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only

from tests.conftest import Command, tiny
from tests.test_resume import outcome
from tests.test_training import Trained
from tinygpt import cli
from tinygpt.config import ConfigError, HardwareConfig
from tinygpt.sweeping.jobs import compose_jobs, expand
from tinygpt.sweeping.kinds import TRAINING
from tinygpt.training.callbacks import Interrupts
from tinygpt.training.hardware import Device, resolve_device, set_up

TWO = ["hardware.devices=2", "hardware.strategy=ddp"]
TOLERANCE = 1e-9

# What each launcher puts around the process of a rank.
LAUNCHED = {
    "srun": {
        "SLURM_JOB_ID": "4321",
        "SLURM_JOB_NAME": "train",
        "SLURM_NODELIST": "127.0.0.1",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_NODEID": "0",
        "SLURM_PROCID": "RANK",
        "SLURM_LOCALID": "RANK",
    },
    "torchrun": {
        "TORCHELASTIC_RUN_ID": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29871",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "0",
        "RANK": "RANK",
        "LOCAL_RANK": "RANK",
    },
}

# The command, with something wrong in one of its two processes.
SABOTAGED = """
import os
from tinygpt import run
from tinygpt.training.module import LanguageModel

rank, what = os.environ["SABOTAGE"].split(":")
step = LanguageModel.training_step

def fail(self, batch, batch_idx):
    if batch_idx == 8 and os.environ["LOCAL_RANK"] == rank:
        if what == "raise":
            raise OSError(28, "No space left on device", "somewhere")
        os.kill(os.getpid(), 9)
    return step(self, batch, batch_idx)

LanguageModel.training_step = fail
run.main()
"""


# The command, slow enough to be interrupted.
SLOWED = """
import time
from tinygpt import run
from tinygpt.training.module import LanguageModel

step = LanguageModel.training_step

def slow(self, batch, batch_idx):
    time.sleep(0.01)
    return step(self, batch, batch_idx)

LanguageModel.training_step = slow
"""


def words(corpus: Path, precision: str = "64", *more: str) -> list[str]:
    """Accumulation on one device and on two, and steps enough to be interrupted between them."""
    return tiny(
        corpus,
        f"train.precision={precision}",
        "train.steps=160",
        "train.log_every=7",
        "train.eval_every=12800",  # 50 steps
        "train.checkpoint_every=5120",  # 20 steps
        "train.keep_every=20480",  # 80 steps
        "hardware.micro_batch_size=2",
        "study=s",
        "run_name=r",
        *more,
    )


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def assert_learned_the_same(one: Path, other: Path, tolerance: float) -> None:
    """Row by row and score by score, but for what is measured."""
    assert [row["step"] for row in rows(one)] == [row["step"] for row in rows(other)]
    for column in ("train_loss", "grad_norm", "learning_rate", "val_loss", "val_accuracy"):
        values = [[float(r[column] or 0) for r in rows(run)] for run in (one, other)]
        assert values[0] == pytest.approx(values[1], rel=tolerance), column
    results = [json.loads((run / "results.json").read_text()) for run in (one, other)]
    assert results[0].keys() == results[1].keys()
    names = ["final_val_loss", "test_loss", "final_train_loss", "best_val_loss"]
    for name in (*names, "final_val_loss_standard_error", "test_loss_standard_error"):
        assert results[0][name] == pytest.approx(results[1][name], rel=tolerance), name
    for name in ("config_hash", "train_tokens", "best_val_step", "total_steps"):
        assert results[0][name] == results[1][name]


def start(folder: Path, cache: Path, words: list[str], program: list[str]) -> subprocess.Popen[str]:
    """A command that Lightning starts again for its second process."""
    return subprocess.Popen(
        [sys.executable, *program, *words],
        cwd=folder,
        env={**os.environ, "TINYGPT_CACHE": str(cache), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, corpus: Path, cache: Path) -> Path:
    """The run in one process."""
    torch.set_num_threads(1)
    return Trained(tmp_path_factory.mktemp("alone"), cache, words(corpus)).go().path


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory, corpus: Path, cache: Path) -> Path:
    """The same run in two processes, never interrupted."""
    folder = tmp_path_factory.mktemp("together")
    process = start(folder, cache, words(corpus, "64", *TWO), ["-m", "tinygpt.run"])
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert said == ""
    return folder / "outputs" / "s" / "r"


def test_two_processes_learn_what_one_learns(alone: Path, together: Path) -> None:
    assert_learned_the_same(alone, together, TOLERANCE)


def test_one_process_writes(alone: Path, together: Path) -> None:
    names = [sorted(p.name for p in run.iterdir()) for run in (alone, together)]
    (events,) = (path.name for path in together.glob("events*"))
    assert names[1] == sorted({*names[0], events})
    kept = {path.name for path in (together / "checkpoints").iterdir()}
    assert kept == {"last.ckpt", "best.ckpt", "final.ckpt", "step_80.ckpt", "step_160.ckpt"}
    steps = [int(row["step"]) for row in rows(together)]
    assert steps == sorted(set(steps))
    lines = (together / "run.log").read_text().splitlines()
    assert sum("step 160/160" in line for line in lines) == 1
    assert sum("on 2 devices" in line for line in lines) == 1
    assert (together / "samples.txt").read_text().count("--- step") == 3
    for name, devices in (("results", 2), ("environment", 2)):
        assert json.loads((together / f"{name}.json").read_text())["devices"] == devices
    assert json.loads((alone / "results.json").read_text())["devices"] == 1


def stop(
    folder: Path,
    cache: Path,
    arguments: list[str],
    number: int,
    group: bool,
    program: str = "run.main()",
) -> Path:
    """Starts the run and, when it has trained a little, signals it; two processes, or one of them.

    It must leave as if it were one, with nothing of it still running.
    """
    path = folder / "slowed.py"
    path.write_text(f"{SLOWED}\n{program}\n")
    process = start(folder, cache, arguments, [str(path)])
    run = folder / "outputs" / "s" / "r"
    while process.poll() is None and not trained_a_little(run):
        time.sleep(0.01)
    launched = psutil.Process(process.pid).children()
    for one in [process.pid, *([child.pid for child in launched] if group else [])]:
        os.kill(one, number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number, said
    assert said.count("\n") == 1, said
    assert said.startswith(f"stopped by {signal.Signals(number).name} at step ")
    assert not any(child.is_running() for child in launched)
    assert "the same command resumes" in (run / "run.log").read_text()
    assert not (run / "results.json").exists()
    assert not (run / "error.json").exists()
    return run


def trained_a_little(run: Path) -> bool:
    metrics = run / "metrics.csv"
    return metrics.exists() and metrics.read_text().count("\n") > 4


def test_stopped_and_gone_on_with_it_ends_with_the_same_bits(
    tmp_path: Path, corpus: Path, cache: Path, together: Path, tinygpt: Command
) -> None:
    arguments = words(corpus, "64", *TWO)
    run = stop(tmp_path, cache, arguments, signal.SIGTERM, group=True)
    done = tinygpt("run", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert outcome(run) == outcome(together)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_one_process_stops_both(
    tmp_path: Path, corpus: Path, cache: Path, number: signal.Signals
) -> None:
    arguments = words(corpus, "32", *TWO, "train.steps=4000")
    run = stop(tmp_path, cache, arguments, number, group=False)
    saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] % 7 == 0 or saved["global_step"] % 10 == 0  # at a rest


def test_a_signal_that_comes_while_they_agree_is_not_forgotten() -> None:
    interrupts = Interrupts(*[None] * 3)  # type: ignore[arg-type]

    def reduce(number: torch.Tensor, reduce_op: str) -> torch.Tensor:
        interrupts.received = interrupts.received or 15
        return number

    strategy = SimpleNamespace(root_device="cpu", reduce=reduce)
    trainer: Any = SimpleNamespace(world_size=2, strategy=strategy)
    assert not interrupts.agreed(trainer)  # the other process could not know
    assert interrupts.received == 15
    assert interrupts.agreed(trainer)


@pytest.mark.slow
@pytest.mark.parametrize("fewer_first", [True, False])
def test_a_run_goes_on_with_another_number_of_devices(
    tmp_path: Path, corpus: Path, cache: Path, alone: Path, tinygpt: Command, fewer_first: bool
) -> None:
    one, two = words(corpus), words(corpus, "64", *TWO)
    first, then = (one, two) if fewer_first else (two, one)
    run = stop(tmp_path, cache, first, signal.SIGTERM, group=False)
    done = tinygpt("run", *then, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "note: begun with devices" in (run / "run.log").read_text()
    assert_learned_the_same(alone, run, 1e-8)


@pytest.mark.slow
def test_dropout_resumes_exactly_and_a_diverged_run_ends_in_both(
    tmp_path: Path, corpus: Path, cache: Path, tinygpt: Command
) -> None:
    arguments = words(corpus, "32", *TWO, "model.dropout=0.1")
    run = stop(tmp_path, cache, arguments, signal.SIGTERM, group=True)
    assert tinygpt("run", *arguments, cwd=tmp_path).returncode == 0
    resumed = outcome(run)
    assert tinygpt("run", *arguments, "force=true", cwd=tmp_path).returncode == 0
    assert outcome(run) == resumed
    wild = ["optim=sgd", "optim.learning_rate=1e6", "train.grad_clip_norm=null", "run_name=wild"]
    done = tinygpt("run", *words(corpus, "32", *TWO), *wild, cwd=tmp_path)
    assert done.returncode == 1
    results = json.loads((run.parent / "wild" / "results.json").read_text())
    assert results["status"] == "diverged"


def assert_nothing_is_left(program: str, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        left = [p for p in psutil.process_iter(["cmdline"]) if program in str(p.info["cmdline"])]
        if not left:
            return
        time.sleep(0.1)
    pytest.fail(f"still running: {left}")


@pytest.mark.parametrize(
    ("what", "code", "error"),
    [
        ("1:raise", 1, "RunError: another process of this run failed, as said above"),
        pytest.param("0:raise", 1, "OSError: [Errno 28] No space left", marks=pytest.mark.slow),
        pytest.param("0:kill", -signal.SIGKILL, "", marks=pytest.mark.slow),
        pytest.param("1:kill", 1, "RunError: another process", marks=pytest.mark.slow),
    ],
)
def test_where_one_process_fails_the_other_ends(
    tmp_path: Path,
    corpus: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    what: str,
    code: int,
    error: str,
) -> None:
    program = tmp_path / "sabotaged.py"
    program.write_text(SABOTAGED)
    monkeypatch.setenv("SABOTAGE", what)
    process = start(tmp_path, cache, words(corpus, "32", *TWO), [str(program)])
    run = tmp_path / "outputs" / "s" / "r"
    _, said = process.communicate(timeout=90)
    assert process.returncode == code, said
    assert_nothing_is_left(str(program))
    assert not (run / "results.json").exists()
    if error:
        assert json.loads((run / "error.json").read_text())["error"].startswith(error)
        assert said.splitlines()[-1].startswith("error: ")
        assert said.count("error: ") == (2 if what == "1:raise" else 1)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["srun", "torchrun"])
def test_launched_by_others_they_start_at_once(
    tmp_path: Path, corpus: Path, alone: Path, launcher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With no cache yet: both prepare the data, behind one lock."""
    processes = []
    for rank in ("0", "1"):
        with monkeypatch.context() as patch:
            for name, value in LAUNCHED[launcher].items():
                patch.setenv(name, value.replace("RANK", rank))
            program = ["-m", "tinygpt.run"]
            processes.append(
                start(tmp_path, tmp_path / "cache", words(corpus, "64", *TWO), program)
            )
    for process in processes:
        _, said = process.communicate(timeout=300)
        assert (process.returncode, said) == (0, "")
    assert_learned_the_same(alone, tmp_path / "outputs" / "s" / "r", TOLERANCE)


# What cannot be had: one line, before there is a folder


@pytest.mark.parametrize(
    ("asked", "line"),
    [
        ("hardware.devices=3", "hardware.devices=3: 3 devices cannot share the batch of 8 seq"),
        ("hardware.devices=16", "hardware.devices=16: 16 devices cannot share the batch of 8 "),
        ("hardware.devices=-1", "hardware.devices=-1: on cpu say how many"),
        ("hardware.devices=1 hardware.num_nodes=3", "hardware.devices=1: 3 devices cannot share"),
        ("hardware.devices=2 hardware.micro_batch_size=8", "hardware.micro_batch_size=8: must div"),
    ],
)
def test_what_cannot_be_had_is_told(
    tmp_path: Path,
    corpus: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    asked: str,
    line: str,
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with pytest.raises(ConfigError) as caught:
        Trained(tmp_path, cache, tiny(corpus, *asked.split())).go()
    assert str(caught.value).startswith(line)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="has CUDA")
def test_no_cuda_for_cuda_ddp(tmp_path: Path, corpus: Path, cache: Path) -> None:
    small = [word for word in tiny(corpus) if not word.startswith("hardware")]
    with pytest.raises(ConfigError, match=r"^hardware\.accelerator=cuda: this machine or this bui"):
        Trained(tmp_path, cache, [*small, "hardware=cuda_ddp"]).go()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("key", ["devices", "num_nodes"])
def test_a_sweep_runs_jobs_of_one_device(corpus: Path, key: str) -> None:
    with pytest.raises(ConfigError, match=rf"hardware\.{key}=2: a sweep runs jobs of one device"):
        compose_jobs(expand({}, [*tiny(corpus), f"hardware.{key}=2", "seed=1,2"]), TRAINING)


# Which process, and its share of the machine


def resolved(*more: str) -> Device:
    config = cli.compose_config([*tiny(Path("x")), *more])
    return resolve_device(config.hardware, "32")


def test_srun_and_torchrun_say_which_process_this_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 0, raising=False)  # Lightning notes it there
    assert resolved(*TWO).rank == 0
    srun, torchrun = (
        {name: value.replace("RANK", "1") for name, value in LAUNCHED[launcher].items()}
        for launcher in ("srun", "torchrun")
    )
    for there in (srun, torchrun, {"LOCAL_RANK": "1"}):
        with monkeypatch.context() as patch:
            for name, value in there.items():
                patch.setenv(name, value)
            assert resolved(*TWO).rank == 1
            assert resolved().rank == 0  # one device is one process, whatever is around it
    with monkeypatch.context() as patch:
        for name, value in srun.items():
            patch.setenv(name, value)
        with pytest.raises(ConfigError, match=r"hardware\.devices=4: .*--ntasks-per-node=2"):
            resolved("hardware.devices=4")


@pytest.mark.parametrize(("asked", "threads"), [(None, 2), (5, 5)])
def test_processes_share_the_cores(
    monkeypatch: pytest.MonkeyPatch, asked: int | None, threads: int
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    monkeypatch.setenv("OMP_NUM_THREADS", "6")
    torch.set_num_threads(6)
    set_up(HardwareConfig(threads=asked), Device("cpu", "32", devices=3, strategy="ddp"))
    assert torch.get_num_threads() == threads
    assert os.environ["OMP_NUM_THREADS"] == str(
        threads
    )  # what Lightning would set, and others inherit
