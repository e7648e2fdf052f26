"""Check that ``hardware`` sets products, memory and compilation, and no part of the experiment."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.conftest import Command, tiny
from tests.test_training import Trained
from tinygpt import cli, fileio
from tinygpt.config import ConfigError, HardwareConfig
from tinygpt.config.horizon import Plan
from tinygpt.model import kernels
from tinygpt.model.gpt import GPT
from tinygpt.training import hardware
from tinygpt.training.hardware import Device

PLAN = Plan(100, 25_600, 5, 10, 10, None, 8, 8, 1)


@pytest.fixture(autouse=True)
def products_as_before() -> Iterator[None]:
    yield
    kernels.use_onednn(None)


def run(folder: Path, cache: Path, corpus: Path, *more: str) -> Trained:
    return Trained(folder, cache, tiny(corpus, *more)).go()


@pytest.mark.skipif(not kernels.onednn_is_there(), reason="this torch has no oneDNN")
def test_who_multiplies_changes_no_more_than_rounding_and_is_recorded(
    tmp_path: Path, corpus: Path, cache: Path
) -> None:
    losses = {}
    for name in ("torch", "onednn"):
        kernels.use_onednn(name == "onednn")
        trained = run(tmp_path / name, cache, corpus)
        losses[name] = trained.results["final_val_loss"]
        assert fileio.read_json(trained.path / "environment.json")["matmul"] == name
    assert losses["onednn"] == pytest.approx(losses["torch"], rel=1e-4)


def test_a_run_taken_up_with_other_products_says_so(
    tmp_path: Path, corpus: Path, cache: Path
) -> None:
    kernels.use_onednn(False)
    first = Trained(tmp_path, cache, tiny(corpus, "train.checkpoint_every=256")).go()
    first.path.joinpath("results.json").unlink()
    environment = fileio.read_json(first.path / "environment.json")
    fileio.write_json(first.path / "environment.json", {**environment, "matmul": "onednn"})
    first.go()
    assert "note: begun with matmul onednn, now torch" in first.said


def test_the_environment_switches_onednn_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINYGPT_MATMUL", "torch")
    kernels.onednn_is_faster.cache_clear()
    assert not kernels.onednn_is_used()
    assert not kernels.takes_onednn(torch.zeros(2, 2))
    kernels.onednn_is_faster.cache_clear()


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_kept_memory_is_not_asked_for_again() -> None:
    """Where malloc gives tensors back, pages have to be made anew at every step."""
    kept = page_faults('hardware.set_up(HardwareConfig(threads=1), Device("cpu", "32"))')
    assert kept < 100  # thousands without, as a rule


def page_faults(prepare: str) -> int:
    """Count those of five steps of a small model, after so many others that the heap has grown."""
    program = f"""
import resource, torch
from tinygpt.config import HardwareConfig, ModelConfig
from tinygpt.model.gpt import GPT
from tinygpt.training import hardware
from tinygpt.training.hardware import Device
{prepare}
model = GPT(ModelConfig(), 4096)
tokens = torch.randint(4096, (1, 257))
for step in range(35):
    if step == 30:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    model(tokens[:, :-1], tokens[:, 1:]).backward()
    model.zero_grad()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return int(run.stdout)


def test_what_a_device_cannot_compile_is_one_line() -> None:
    with pytest.raises(ConfigError, match=r"^hardware\.compile=on: on mps one of auto, off$"):
        hardware.set_up(HardwareConfig(compile="on"), Device("mps", "32"))


@pytest.mark.parametrize(
    ("how", "asked"),
    [
        ("off", []),
        ("auto", []),  # on the CPU
        ("on", [GPT]),
    ],
)
def test_what_is_compiled(
    tmp_path: Path,
    corpus: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    how: str,
    asked: list[type],
) -> None:
    """In place, so that no key of a checkpoint changes; compiling itself takes a minute."""
    found: list[type] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, *a, **k: found.append(type(self)))
    trained = run(tmp_path, cache, corpus, "train.steps=1", f"hardware.compile={how}")
    assert found == asked
    assert all(key.startswith("model.") and "_orig_mod" not in key for key in trained.weights())


@pytest.mark.parametrize(("seconds", "how"), [(2.9, "off"), (3.1, "on")])
def test_on_cuda_a_long_run_is_compiled(
    monkeypatch: pytest.MonkeyPatch, seconds: float, how: str
) -> None:
    """100 steps of so many seconds; and what a run was begun with stays."""
    monkeypatch.setattr(hardware, "seconds_per_step", lambda *of: seconds)
    config, cuda = cli.compose_config([]), Device("cuda", "bf16-mixed")
    assert hardware.numerics(config, 300, PLAN, cuda, {})["compile"] == how
    for begun in ("off", "on"):
        found = hardware.numerics(config, 300, PLAN, cuda, {"compile": begun})
        assert found["compile"] == begun
    assert hardware.numerics(config, 300, PLAN, Device("cpu", "32"), {})["compile"] == "off"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler for torch to use")
def test_a_compiled_run_is_the_same_within_rounding(
    tinygpt: Command, tmp_path: Path, corpus: Path
) -> None:
    losses = {}
    for how in ("off", "on"):
        words = tiny(corpus, f"hardware.compile={how}", f"run_name={how}", f"study={how}")
        done = tinygpt("run", *words)
        assert done.returncode == 0, done.stderr
        folder = tmp_path / "outputs" / how / how
        losses[how] = fileio.read_json(folder / "results.json")["final_val_loss"]
        assert fileio.read_json(folder / "environment.json")["compile"] == how
    assert losses["on"] == pytest.approx(losses["off"], rel=1e-4)


@pytest.mark.parametrize(
    ("words", "precision", "begun", "slices", "each"),
    [
        ([], "32", {}, 4, 1),  # of two sequences, which leaves two of six threads unused
        (["hardware.threads=3"], "32", {}, 3, 1),
        (["model.d_model=512"], "32", {}, 4, 1),
        (["model.d_model=512", "hardware.threads=16"], "32", {}, 8, 2),
        (["model.d_model=4096", "model.n_layers=12"], "32", {}, 1, 6),  # gradients of 10 GB
        ([], "bf16-mixed", {}, 1, 1),
        (["hardware.compile=on"], "32", {}, 1, 1),
        ([], "32", {"threads": 3}, 1, 3),  # begun by an earlier version
        ([], "32", {"threads": 4, "slices": 2}, 2, 2),
        (["hardware.threads=1"], "32", {"threads": 2, "slices": 2}, 2, 1),
    ],
)
def test_a_run_chooses_its_slices_by_itself(
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    precision: str,
    begun: dict[str, int],
    slices: int,
    each: int,
) -> None:
    """As many as there are threads; those it began with where it is resumed."""
    config, cpu = cli.compose_config(words), Device("cpu", precision)
    monkeypatch.setattr(hardware, "_default_threads", lambda: 6)
    assert hardware.choose_slices(config, 4096, PLAN, cpu, begun) == slices
    assert torch.get_num_threads() == each
    torch.set_num_threads(5)
    for other in (Device("cuda", precision), Device("cpu", precision, devices=2)):
        assert hardware.choose_slices(config, 4096, PLAN, other, begun) == 1
        assert torch.get_num_threads() == 5


def test_a_run_keeps_the_threads_it_began_with(
    tmp_path: Path, corpus: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says so and records them; threads that wait do not spin."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(hardware, "_default_threads", lambda: 2)
    words = ["train.checkpoint_every=256", "train.steps=1", "hardware.threads=null"]
    first = Trained(tmp_path, cache, tiny(corpus, *words)).go()
    assert "cpu, 1 thread, " in first.said  # it has one slice, as its batch is small
    assert first.results["threads"] == 1
    first.path.joinpath("results.json").unlink()
    environment = fileio.read_json(first.path / "environment.json")
    assert environment["threads"] == 1
    fileio.write_json(first.path / "environment.json", {**environment, "threads": 2})
    first.go()
    assert "cpu, 2 threads, " in first.said
    assert first.results["threads"] == 2
    for name in cli.WAITING:
        monkeypatch.delenv(name, raising=False)
    cli.one_line_errors(lambda: None)()
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    assert {name: os.environ[name] for name in cli.WAITING} == cli.WAITING
