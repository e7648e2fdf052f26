"""A command that is struck at a chosen change to a file, forked from a parent that is warm."""

from __future__ import annotations

import atexit
import functools
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.warm import Process, Within

# What changes a file, as Python tells an audit hook of it.
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link"}


@dataclass(frozen=True)
class Strike:
    """A signal to the process itself, or what ``does`` does to the folder, just before the
    ``at``-th change to a file in ``folder``."""

    folder: Path
    at: int = 0  # 0: never, but counted
    number: int = signal.SIGKILL
    path: str = ""  # only changes to a file that has this in its path
    does: Callable[[Path], None] | None = None


@dataclass
class Ended:
    code: int
    out: str
    err: str
    changes: int  # to files, where a Strike counted them
    seconds: float  # that the command took, its start from the warm parent not among them

    @property
    def line(self) -> str:
        """The one line of an error."""
        assert self.err.startswith("error: "), self.err
        assert self.err.count("\n") == 1, self.err
        return self.err.removeprefix("error: ").rstrip("\n")


class Command(Process):
    """A command on its way."""

    def ended(self, seconds: float = 600) -> Ended:
        code = self.wait(seconds)
        changes, took = (self.read("took") or "0 0").split()  # none where it was killed
        return Ended(code, self.read("out"), self.read("err"), int(changes), float(took))


class Warm:
    """Starts commands in ``folder``; what they say goes to a folder beside it."""

    def __init__(self, folder: Path, cache: Path) -> None:
        self.folder, self.cache = folder, cache
        self.said = folder.with_name(f"{folder.name}-said")
        self.folder.mkdir(exist_ok=True)
        self.said.mkdir()
        self._count = 0

    def start(
        self,
        command: str,
        *words: str,
        strike: Strike | None = None,
        within: Within | None = None,
        cache: Path | None = None,
    ) -> Command:
        self._count += 1
        said = self.said / f"{self._count}-{command}"
        words = (*words, f"cache_dir={cache or self.cache}") if command == "run" else words
        watched = functools.partial(_watch, said.with_suffix(".took"), strike, within)
        return Command(command, words, self.folder, said, within=watched)

    def __call__(self, command: str, *words: str, **more: Any) -> Ended:
        return self.start(command, *words, **more).ended()


def _watch(took: Path, strike: Strike | None, within: Within | None) -> None:
    if within is not None:
        within()
    count, begun = _audited(strike) if strike is not None else [0], time.perf_counter()
    atexit.register(lambda: took.write_text(f"{count[0]} {time.perf_counter() - begun}"))


def _audited(strike: Strike) -> list[int]:
    """Counts the changes to files, and strikes."""
    count, folder = [0], str(strike.folder)

    def hook(event: str, values: tuple[Any, ...]) -> None:
        writes = event == "open" and values[2] & (os.O_WRONLY | os.O_RDWR)
        path = os.path.abspath(str(values[0])) if writes or event in CHANGES else ""
        if path.startswith(folder) and strike.path in path:
            count[0] += 1
            if count[0] == strike.at and strike.does is None:
                os.kill(os.getpid(), strike.number)
            elif count[0] == strike.at and strike.does is not None:
                strike.does(strike.folder)

    sys.addaudithook(hook)
    return count
