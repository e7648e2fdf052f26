"""Killed at any moment, a command started again ends as if nothing had been."""

from __future__ import annotations

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
from tests.faults.warm import Strike, Warm
from tests.test_bad_input import content
from tests.test_resume import outcome
from tests.test_sweeping import comparable
from tinygpt.data import shards
from tinygpt.rundir import MetricsFile, read_config

SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


@dataclass
class Work:
    """A command, the folder that it fills and what counts in there."""

    warm: Warm
    words: tuple[str, ...]  # the command first
    folder: Path
    result: Callable[[Path], Any]
    cache: Path | None = None
    undisturbed: Any = field(init=False)

    def __post_init__(self) -> None:
        strike = Strike(self.folder)
        ended = succeeded(self.warm(*self.words, strike=strike, cache=self.cache))
        self.changes, self.seconds = ended.changes, ended.seconds
        self.undisturbed = self.result(self.folder)
        shutil.rmtree(self.folder)

    def kill(self, chance: random.Random, number: int) -> bool:
        """Before a change to a file or at some other moment; whether it was soon enough."""
        strike = None
        if chance.random() < 0.5:
            strike = Strike(self.folder, chance.randint(1, self.changes), number)
        command = self.warm.start(*self.words, strike=strike, cache=self.cache)
        if strike is None:
            time.sleep(chance.uniform(0.0, self.seconds))
            command.send(number)
        ended = command.wait()
        # as the system says it; as a shell says it; an interrupt
        assert ended.code in (0, -number, 128 + number, 130), ended.err
        assert "Traceback" not in ended.err
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
            succeeded(self.warm(*self.words, cache=self.cache))
            assert self.result(self.folder) == self.undisturbed
            assert not list(self.folder.rglob("*.tmp"))
            shutil.rmtree(self.folder)


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
