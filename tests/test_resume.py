"""Kill runs at any moment: the same command resumes them to exactly the same bits."""

from __future__ import annotations

import csv
import functools
import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import Command, Starts, tiny

# What time and host decide; everything else must be equal to the last bit.
MEASURED = {"seconds", "tokens_per_second", "peak_memory_bytes", "seconds_training", "mfu"}


# The command, but it kills itself half way through writing its N-th checkpoint.
def die_in_checkpoint(left: int) -> None:
    """Have this process die half through its ``left``-th checkpoint."""
    from tinygpt.training.trainer import AtomicCheckpoints

    save = AtomicCheckpoints.save_checkpoint

    def save_or_die(self: Any, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            half = Path(path).with_name(f".{Path(path).name}.half.tmp")
            half.write_bytes(b"half a checkpoint")
            os.kill(os.getpid(), signal.SIGKILL)
        save(self, checkpoint, path, storage_options)

    AtomicCheckpoints.save_checkpoint = save_or_die  # type: ignore[method-assign]


def arguments(corpus: Path, *more: str) -> list[str]:
    """Dropout, accumulation and an uneven rhythm: what a careless resume would get wrong."""
    return tiny(
        corpus,
        "train.steps=60",
        "model.dropout=0.1",
        "hardware.micro_batch_size=4",
        "train.log_every=7",
        "train.eval_every=2560",  # 10 steps
        "train.checkpoint_every=1024",  # 4 steps
        "train.keep_every=5120",
        "study=s",
        "run_name=r",
        *more,
    )


def outcome(folder: Path) -> dict[str, Any]:
    """All that a run leaves, but for what time and host decide."""
    with (folder / "metrics.csv").open() as file:
        rows = [{k: v for k, v in r.items() if k not in MEASURED} for r in csv.DictReader(file)]
    results = json.loads((folder / "results.json").read_text())
    checkpoint = torch.load(folder / "checkpoints" / "final.ckpt", weights_only=True)
    moments = [
        tensor
        for state in checkpoint["optimizer_states"][0]["state"].values()
        for tensor in state.values()
    ]
    return {
        "rows": rows,
        "results": {k: v for k, v in results.items() if k not in MEASURED},
        "samples": (folder / "samples.txt").read_text(),
        "weights": {k: v.numpy().tobytes() for k, v in checkpoint["state_dict"].items()},
        "moments": [tensor.numpy().tobytes() for tensor in moments],
        "kept": sorted(p.name for p in (folder / "checkpoints").iterdir()),
    }


@pytest.mark.slow
def test_six_kills_change_nothing(
    tmp_path: Path, corpus: Path, tinygpt: Command, start: Starts
) -> None:
    words = arguments(corpus)
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    whole = tinygpt("run", *words, cwd=tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    run = tmp_path / "killed" / "outputs" / "s" / "r"
    chance = random.Random(0)
    kills = 0
    for attempt in range(40):
        if kills >= 6:
            break
        if attempt % 3 == 0:  # inside a checkpoint
            dies = functools.partial(die_in_checkpoint, chance.randint(2, 5))
            process = start("run", *words, cwd=tmp_path / "killed", within=dies)
        else:  # somewhere between its first sign of life and its end
            process = start("run", *words, cwd=tmp_path / "killed")
            before = _size(run / "run.log")
            while process.poll() is None and _size(run / "run.log") <= before:
                time.sleep(0.01)
            time.sleep(chance.uniform(0.0, 0.4))
            process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode in (-signal.SIGKILL, 0)
        kills += process.returncode != 0
        if (run / "results.json").exists():  # it was faster than we; begin again, kills counted
            for path in sorted(run.rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
    assert kills >= 6
    last = tinygpt("run", *words, cwd=tmp_path / "killed")
    assert last.returncode == 0, last.stderr
    assert outcome(run) == outcome(tmp_path / "whole" / "outputs" / "s" / "r")
    assert not list(run.rglob("*.tmp"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_and_says_how_to_go_on(
    tmp_path: Path, corpus: Path, start: Starts, number: signal.Signals
) -> None:
    words = arguments(corpus, "train.steps=4000", "train.checkpoint_every=100_000_000")
    process = start("run", *words)
    run = tmp_path / "outputs" / "s" / "r"
    while process.poll() is None and not _has_steps(run / "metrics.csv"):
        time.sleep(0.02)
    process.send_signal(number)
    _, said = process.communicate()
    assert process.returncode == 128 + number
    assert said.startswith(f"stopped by {number.name} at step ")
    assert said.count("\n") == 1
    assert "the same command resumes" in (run / "run.log").read_text()
    saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] > 0
    assert not (run / "results.json").exists()


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _has_steps(metrics: Path) -> bool:
    return metrics.exists() and metrics.read_text().count("\n") > 3
