"""Killed at any moment, a command started again ends as if nothing had been."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import signal
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import tiny
from tests.faults.conftest import Injected, succeeded
from tests.faults.warm import Command, Strike, Warm
from tests.test_bad_input import content
from tests.test_resume import outcome
from tests.test_sweeping import comparable
from tests.warm import Within
from tinygpt.data import shards, writing
from tinygpt.fileio import replacing_folder
from tinygpt.runs.rundir import MetricsFile, read_config

SHORT = ("train.steps=4", "train.sample_tokens=2", "logger=csv", "study=s")
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


@dataclass
class Work:
    """A command, the folder that it fills and what counts in there."""

    warm: Warm
    words: tuple[str, ...]  # the command first
    folder: Path
    result: Callable[[Path], Any]
    cache: Path | None = None
    struck: str = ""  # the files that are, by a part of their name; the others are there before
    watched: Path | None = None  # where else it changes files
    within: Within | None = None
    undisturbed: Any = field(init=False)

    def __post_init__(self) -> None:
        strike = Strike(self.watched or self.folder, path=self.struck)
        ended = succeeded(self._command(strike).ended())
        self.changes, self.seconds = ended.changes, ended.seconds
        self.undisturbed = self.result(self.folder)
        self.clear()

    def clear(self) -> None:
        for path in self.folder.glob(f"{self.struck}*") if self.struck else ():
            path.unlink()
        if not self.struck:
            shutil.rmtree(self.folder)

    def _command(self, strike: Strike | None = None) -> Command:
        return self.warm.start(*self.words, strike=strike, cache=self.cache, within=self.within)

    def kill(self, chance: random.Random, number: int) -> bool:
        """Before a change to a file or at some other moment; whether it was soon enough."""
        strike = None
        if chance.random() < 0.5:
            at = chance.randint(1, self.changes)
            strike = Strike(self.watched or self.folder, at, number, self.struck)
        command = self._command(strike)
        if strike is None:
            time.sleep(chance.uniform(0.0, self.seconds))
            command.send_signal(number)
        ended = command.ended()
        # as the system says it; as a shell says it; an interrupt
        assert ended.code in (0, -number, 128 + number, 130), ended.err
        # Python itself passes over an interrupt that comes within a destructor, and says so
        assert "Traceback" not in ended.err or "Exception ignored in" in ended.err
        return ended.code != 0

    def survives(self, kills: int, injected: Injected) -> None:
        chance = random.Random(f"{self.words[0]} {kills}")
        while kills > 0:
            for _ in range(chance.randint(1, 4)):  # in a row, before it is let through
                number = chance.choice(SIGNALS)
                if self.kill(chance, number):
                    injected(f"{signal.Signals(number).name} in {self.words[0]}")
                    kills -= 1
                nothing_torn(self.folder)
            succeeded(self._command().ended())
            assert self.result(self.folder) == self.undisturbed
            assert not list(self.folder.rglob("*.tmp"))
            self.clear()


def nothing_torn(folder: Path) -> None:
    """Whatever has its name is whole; what is being written has another, with a dot before it."""
    for path in folder.rglob("*"):
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".ckpt":
            with zipfile.ZipFile(path) as file:
                assert file.testzip() is None
        elif path.name == "config.yaml":
            read_config(path)
        elif path.name == "metrics.csv":
            MetricsFile(path).read()
        elif path.parent.name == "data" and path.is_dir():
            assert shards.load_index(path) is not None


def test_a_run(warm: Warm, words: list[str], injected: Injected) -> None:
    Work(warm, ("run", *words), warm.folder / "outputs/s/r", outcome).survives(40, injected)


def test_a_run_on_another_file_system(
    elsewhere: Warm, words: list[str], injected: Injected
) -> None:
    folder = elsewhere.folder / "outputs/s/r"
    Work(elsewhere, ("run", *words), folder, outcome).survives(20, injected)


def test_data_preparation(warm: Warm, corpus: Path, injected: Injected) -> None:
    """All of it, a tokenizer's training too; of the run there is a plan alone."""
    cache = warm.folder / "cache"
    words = tiny(corpus, "tokenizer=bpe", "tokenizer.vocab_size=300", "plan=true", "study=s")
    Work(warm, ("run", *words), cache, files, cache).survives(25, injected)


def test_data_preparation_in_many_shards(warm: Warm, corpus: Path, injected: Injected) -> None:
    """Which goes on from those that are whole."""
    cache = warm.folder / "cache"
    words = ("run", *tiny(corpus, "plan=true", "study=s"))
    work = Work(warm, words, cache, files, cache, within=small_shards)
    assert work.changes > 20
    work.survives(25, injected)


def small_shards() -> None:
    writing.SHARD_TOKENS, writing.BATCH_CHARACTERS = 6000, 1000


@pytest.fixture
def study(warm: Warm, corpus: Path) -> tuple[str, ...]:
    return ("run", *tiny(corpus, "--multirun", "model.d_model=8,16,32", "seed=1,2", *SHORT))


def test_a_sweep_with_its_law(warm: Warm, study: tuple[str, ...], injected: Injected) -> None:
    Work(warm, study, warm.folder / "outputs/s", study_and_law).survives(12, injected)


def test_the_summary_and_the_law_alone(
    warm: Warm, study: tuple[str, ...], injected: Injected
) -> None:
    """The runs are there: what is struck is the summary, then ``fit``, then an export of one."""
    succeeded(warm(*study, "fit=false"))
    summary = Work(warm, (*study, "fit=false"), warm.folder / "outputs/s", files, struck="sweep_")
    summary.survives(12, injected)
    folder = warm.folder / "outputs/s"
    Work(warm, ("fit", "runs=outputs/s"), folder / "fit", law).survives(15, injected)
    run = next(folder.glob("*/results.json")).parent
    export = ("export", f"run={run}", "to=exported", "force=true")
    exported = Work(warm, export, warm.folder / "exported", files, watched=warm.folder)
    exported.survives(12, injected)


def test_an_export_in_the_place_of_another(
    warm: Warm, words: list[str], injected: Injected
) -> None:
    """At every change to a file there is one of the two, or the next command finds it."""
    succeeded(warm("run", *words))
    export, to = ("export", "run=outputs/s/r", "to=there", "force=true"), warm.folder / "there"
    succeeded(warm(*export, "checkpoint=best"))
    before = files(to)
    changes = succeeded(warm(*export, strike=Strike(warm.folder))).changes
    after = files(to)
    assert before != after
    for at in range(1, changes + 1):
        succeeded(warm(*export, "checkpoint=best"))
        assert warm(*export, strike=Strike(warm.folder, at)).code == -signal.SIGKILL
        injected("SIGKILL in export")
        if not to.exists():  # between two renames
            with contextlib.suppress(OSError), replacing_folder(to):
                raise OSError("the next one fails")
        assert files(to) in (before, after), at


def files(folder: Path) -> dict[str, bytes]:
    """All that has been written but for locks; event files tell of time and host."""
    found = content(folder)
    return {
        name: found[name] for name in found if not name.endswith(".lock") and "tfevents" not in name
    }


law = files


def study_and_law(study: Path) -> Any:
    runs = {path.parent.name: outcome(path.parent) for path in study.glob("*/results.json")}
    # a report has all of a run's measurements in it, of its speed too
    return comparable(study), runs, sorted(files(study / "fit"))
