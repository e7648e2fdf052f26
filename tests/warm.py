"""Commands forked from a process that has imported everything already, so that each starts at once.

Importing torch and Lightning takes ten seconds of CPU and the suite starts some hundred commands.
The parent is the fork server of ``multiprocessing``, which has no threads.  What the forked process
runs is what ``python -m tinygpt.<command>`` runs, in a session of its own, with files as terminal.
"""

from __future__ import annotations

import atexit
import importlib
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, here and in the server
os.environ["LOKY_MAX_CPU_COUNT"] = "1"  # a sweep begins no processes unless a test asks for them
AT_START = dict(os.environ)

IMPORTED = (
    *("tinygpt.run", "tinygpt.fit", "tinygpt.export", "tinygpt.sample", "tinygpt.evaluate"),
    *("tinygpt.adapt", "tinygpt.training.session", "tinygpt.sweeping.study"),
    *("tinygpt.scaling.report", "tinygpt.scaling.analysis"),
    *("tinygpt.data.huggingface", "tinygpt.model.huggingface", "torch.utils.tensorboard"),
    "safetensors.torch",
)
if "pytest" not in sys.modules:  # in the server; the tests need none of it themselves
    for name in IMPORTED:
        importlib.import_module(name)

Within = Callable[[], None]  # done in the forked process before the command begins


class Process:
    """A command under way; it has what the tests use of ``subprocess.Popen``."""

    def __init__(
        self,
        command: str,
        words: tuple[str, ...],
        folder: Path,
        said: Path,
        env: Mapping[str, str] | None = None,
        within: Within | None = None,
    ) -> None:
        self.said = said
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.warm"])
        arguments = (
            command,
            words,
            folder,
            said,
            {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
            within,
        )
        self._process = context.Process(target=_serve, args=arguments)
        self._process.start()
        self.pid: int = self._process.pid or 0

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        self._process.join(0)
        return self.returncode

    def wait(self, timeout: float = 600) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            self._process.kill()
            raise AssertionError(f"still there after {timeout} s: {self.read('err')}")
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def communicate(self) -> tuple[str, str]:
        self.wait()
        return self.read("out"), self.read("err")

    def completed(self) -> subprocess.CompletedProcess[str]:
        code = self.wait()
        return subprocess.CompletedProcess([], code, self.read("out"), self.read("err"))

    def wait_until(self, holds: Callable[[], Any], seconds: float = 300) -> None:
        end = time.monotonic() + seconds
        while not holds():
            assert self.poll() is None, self.read("err") or "it has ended before"
            assert time.monotonic() < end, "nothing happened"
            time.sleep(0.005)

    def read(self, name: str) -> str:
        path = self.said.with_suffix(f".{name}")
        return path.read_text(encoding="utf-8") if path.exists() else ""


# What modules read as they are imported; the rest of the environment is handed on.
READ_AT_IMPORT = ("CUDA_", "HF_", "HUGGINGFACE_", "LC_", "MPL", "PYTHON", "TRANSFORMERS_")


def is_as_at_start() -> bool:
    """Return whether what modules read of the environment is still that of the server."""
    changed = {k for k in {*AT_START, *os.environ} if AT_START.get(k) != os.environ.get(k)}
    return not any(name.startswith(READ_AT_IMPORT) for name in changed)


def _serve(
    command: str,
    words: tuple[str, ...],
    folder: Path,
    said: Path,
    env: dict[str, str],
    within: Within | None,
) -> None:
    assert "tinygpt.training.session" in sys.modules, "the parent is cold"
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(said.with_suffix(f".{name}"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    sys.argv = [f"tinygpt.{command}", *words]
    if within is not None:
        within()
    try:
        importlib.import_module(f"tinygpt.{command}").main()
    finally:
        atexit._run_exitfuncs()  # a forked process leaves without them
