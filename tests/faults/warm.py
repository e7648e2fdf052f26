"""A parent that has imported everything: a command forked off it begins at once.

The parent is the fork server of ``multiprocessing``, which has no threads.  What the forked process
runs is what ``python -m tinygpt.<command>`` runs, with a terminal of its own: a file.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, here and in the server

IMPORTED = (
    *("tinygpt.run", "tinygpt.fit", "tinygpt.export", "tinygpt.training.session"),
    *("tinygpt.sweeping.study", "tinygpt.sweeping.summary"),
    *("tinygpt.scaling.report", "tinygpt.scaling.analysis", "tinygpt.data.huggingface"),
    *("tinygpt.model.huggingface", "torch.utils.tensorboard", "safetensors.torch"),
)
if "pytest" not in sys.modules:  # in the server; the tests need none of it themselves
    for name in IMPORTED:
        importlib.import_module(name)

# What changes a file, as Python tells an audit hook of it.
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link"}
Within = Callable[[], None]  # done in the forked process before the command begins


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


class Command:
    """A command on its way."""

    def __init__(self, process: BaseProcess, said: Path) -> None:
        self._process, self._said = process, said
        self.pid: int = process.pid or 0
        self.running = process.is_alive

    def send(self, number: int) -> None:
        if self.running():
            os.kill(self.pid, number)

    def wait(self, seconds: float = 600) -> Ended:
        self._process.join(seconds)
        if self._process.exitcode is None:
            self._process.kill()
            raise AssertionError(f"still there after {seconds} s: {self._read('err')}")
        code, said = self._process.exitcode, (self._read("out"), self._read("err"))
        changes, took = (self._read("took") or "0 0").split()  # none where it was killed
        return Ended(code, *said, int(changes), float(took))

    def wait_until(self, holds: Callable[[], Any], seconds: float = 300) -> None:
        end = time.monotonic() + seconds
        while not holds():
            assert self.running(), self._read("err") or "it has ended before"
            assert time.monotonic() < end, "nothing happened"
            time.sleep(0.005)

    def _read(self, name: str) -> str:
        path = self._said.with_suffix(f".{name}")
        return path.read_text() if path.exists() else ""


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
        arguments = (command, words, self.folder, said, strike, within)
        process = _context().Process(target=_serve, args=arguments)
        process.start()
        return Command(process, said)

    def __call__(self, command: str, *words: str, **more: Any) -> Ended:
        return self.start(command, *words, **more).wait()


def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.faults.warm"])
    return context


def _serve(
    command: str,
    words: Sequence[str],
    folder: Path,
    said: Path,
    strike: Strike | None,
    within: Within | None,
) -> None:
    assert "tinygpt.training.session" in sys.modules, "the parent is cold"
    os.chdir(folder)
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(said.with_suffix(f".{name}"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    sys.argv = [f"tinygpt.{command}", *words]
    if within is not None:
        within()
    count, begun = _audited(strike) if strike is not None else [0], time.perf_counter()
    try:
        importlib.import_module(f"tinygpt.{command}").main()
    finally:
        said.with_suffix(".took").write_text(f"{count[0]} {time.perf_counter() - begun}")


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
