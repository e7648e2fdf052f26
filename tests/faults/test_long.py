"""Long and large: memory, files and descriptors are what the configuration says, however long."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import pytest
from scipy import stats

from tests.conftest import tiny

STEPS = 20_000
MB = 1e6


class Look(NamedTuple):
    """At a process from outside."""

    at: float  # steps, or runs, that are done
    memory: int  # bytes, its own
    descriptors: int
    threads: int
    logged: int  # bytes


def follow(
    folder: Path,
    cache: Path,
    words: list[str],
    done: Callable[[], float],
    log: Callable[[], int] = int,
) -> Iterator[Look]:
    """Looks at ``python -m tinygpt.run`` five times a second, until it has succeeded."""
    own = folder / "temporary"
    own.mkdir(parents=True)
    environment = {**os.environ, "TINYGPT_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tinygpt.run", *words]
    environment["TMPDIR"] = str(own)
    with (folder / "said").open("w") as said:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=said, stderr=said)
    seen = psutil.Process(process.pid)
    while process.poll() is None:
        try:
            memory = sum(one.memory_full_info().uss for one in (seen, *seen.children(True)))
            yield Look(done(), memory, seen.num_fds(), seen.num_threads(), log())
        except psutil.Error:  # between two looks it ended
            pass
        time.sleep(0.2)
    assert process.returncode == 0, (folder / "said").read_text()
    assert not [path for path in own.rglob("*") if path.is_file()]


def growth(looks: list[Look], of: str) -> float:
    """From the first to the last of them, by the median of the slopes of all pairs."""
    at = [look.at for look in looks]
    with np.errstate(invalid="ignore"):  # the slope's error where nothing changes
        slope = stats.theilslopes([getattr(look, of) for look in looks], at).slope
    return float(slope * (at[-1] - at[0]))


def test_a_long_run_grows_by_its_log_alone(tmp_path: Path, cache: Path, corpus: Path) -> None:
    """As many steps, lines, evaluations and checkpoints as a day of a larger model has."""
    run = tmp_path / "outputs/s/r"
    words = tiny(
        corpus,
        f"train.steps={STEPS}",
        "model.d_model=8",
        "model.n_heads=1",
        "model.max_seq_len=16",
        "train.batch_tokens=32",
        "train.log_every=10",
        f"train.eval_every={32 * 200}",
        f"train.checkpoint_every={32 * 200}",
        f"train.keep_every={32 * STEPS // 5}",
        "train.sample_tokens=4",
        "data.eval_tokens=500",
        "study=s",
        "run_name=r",
    )

    def step() -> float:
        if not (run / "metrics.csv").exists():
            return 0.0
        last = (run / "metrics.csv").read_bytes()[-2000:].rstrip(b"\n").split(b"\n")[-1]
        return float(last.split(b",")[0]) if last[:1].isdigit() else 0.0

    def logged() -> int:
        logs = [run / "metrics.csv", run / "run.log", *run.glob("events.*")]
        return sum(path.stat().st_size for path in logs if path.exists())

    looks = list(follow(tmp_path, cache, words, step, logged))
    steady = [look for look in looks if STEPS / 5 < look.at < STEPS]
    assert len(steady) > 50
    assert growth(steady, "memory") < 20 * MB * 4 / 5
    assert growth(steady, "threads") == growth(steady, "descriptors") == 0
    assert max(look.descriptors for look in steady) <= steady[0].descriptors + 2
    # as much for each step of the second half as of the first
    middle = min(steady, key=lambda look: abs(look.at - 0.5 * (steady[0].at + steady[-1].at)))
    first = (middle.logged - steady[0].logged) / (middle.at - steady[0].at)
    second = (steady[-1].logged - middle.logged) / (steady[-1].at - middle.at)
    assert second == pytest.approx(first, rel=0.15)
    assert len((run / "metrics.csv").read_text().splitlines()) == 2 + STEPS // 10
    kept = [f"step_{STEPS * n // 5}.ckpt" for n in range(1, 6)]
    checkpoints = sorted(path.name for path in run.glob("checkpoints/*"))
    assert checkpoints == sorted(["best.ckpt", "final.ckpt", "last.ckpt", *kept])
    assert len(list(run.glob("events.*"))) == 1


def test_a_long_sweep_in_one_process_does_not_grow(
    tmp_path: Path, cache: Path, corpus: Path
) -> None:
    """Each run gives back its memory and the shards that it had open."""
    seeds = ",".join(map(str, range(32)))
    more = ("study=s", "fit=false", f"seed={seeds}")
    words = tiny(corpus, "--multirun", "train.sample_tokens=4", *more)
    study = tmp_path / "outputs/s"
    looks = list(follow(tmp_path, cache, words, lambda: len(list(study.glob("*/results.json")))))
    steady = [look for look in looks if 5 <= look.at < 32]
    assert len(steady) > 20
    half = len(steady) // 2
    # the highest, as some 25 MB of free memory go back to the system or do not
    first, second = (max(look.memory for look in of) for of in (steady[:half], steady[half:]))
    assert second < first + 30 * MB
    assert growth(steady, "descriptors") <= 1


def test_a_corpus_is_tokenized_in_constant_memory(tmp_path: Path, cache: Path) -> None:
    peaks = []
    for megabytes in (6, 60):
        text = tmp_path / f"{megabytes}.txt"
        with text.open("w") as file:
            for n in range(megabytes * 10_000):
                file.write(f"Story {n}. {n * n} hens and {n % 97} cows sat on the hill.  " * 2)
                file.write("\n<|endoftext|>\n")
        size = text.stat().st_size
        assert size == pytest.approx(megabytes * 1.2e6, rel=0.2)
        words = ["data=custom", f"data.path={text}", "tokenizer.train_bytes=1_000_000", "plan=true"]
        looks = follow(tmp_path / str(megabytes), cache, words, float)
        peaks.append(max(look.memory for look in looks))
    assert peaks[1] < peaks[0] + 60 * MB
