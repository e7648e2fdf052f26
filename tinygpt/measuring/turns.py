"""Processes that work in turns, so that all of them see the same conditions of the machine.

Each configuration has a process of its own: its threads, its allocator, its compiled code and its
peak of memory are its own, and what one leaves behind disturbs no other.  One of them works, the
others wait at a pipe; a round is one turn of each, and the order turns round with every round.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tinygpt.config import ConfigError, RunError


@dataclass(frozen=True)
class Lap:
    """What was done in one turn (tokens, steps, bytes, FLOPs) and the seconds it took."""

    amount: float
    wall: float
    cpu: float  # of the process, all its threads together


class Clock:
    """Wall and CPU seconds; ``wait`` is called before each reading, for a device to be done."""

    def __init__(self, wait: Callable[[], object] = lambda: None) -> None:
        self.wait = wait
        self.start()

    def start(self) -> None:
        self.wait()
        self._begun = self._now()

    def lap(self, amount: float) -> Lap:
        """Since the start, or the last lap."""
        self.wait()
        before, self._begun = self._begun, self._now()
        return Lap(amount, self._begun[0] - before[0], self._begun[1] - before[1])

    def _now(self) -> tuple[float, float]:
        return time.perf_counter(), time.process_time()


class Player:
    """The side of the process that works: it says a line, and waits for its next turn."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what a library prints is not for who reads the lines

    def say(self, **message: Any) -> None:
        print(json.dumps(message), file=self._out, flush=True)

    def turn(self) -> int:
        """How many steps to do now.  Where nobody asks any more, the process ends here."""
        line = sys.stdin.readline()
        if not line:
            os._exit(0)
        return int(line)

    def done(self, laps: Mapping[str, Lap], **more: Any) -> None:
        self.say(laps={n: [lap.amount, lap.wall, lap.cpu] for n, lap in laps.items()}, **more)

    def serve(self, facts: dict[str, Any], work: Callable[[int], Mapping[str, Lap]]) -> None:
        """Says that it is ready, then does ``work(steps)`` in every turn."""
        self.say(facts=facts)
        while True:
            self.done(work(self.turn()))

    @contextlib.contextmanager
    def failing_in_a_line(self) -> Iterator[None]:
        try:
            yield
        except (ConfigError, RunError) as error:
            self.say(error=str(error), of_config=isinstance(error, ConfigError))
            os._exit(0)


class Arm:
    """The side that gives turns: starts the process and keeps what it says."""

    def __init__(self, name: str, command: Sequence[str]) -> None:
        self.name, self.laps = name, list[dict[str, Lap]]()
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        begun = time.perf_counter()
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        try:
            self.last: dict[str, Any] = self._hear()
        except BaseException:
            self.close()
            raise
        self.facts: dict[str, Any] = self.last["facts"]
        self.seconds_to_ready = time.perf_counter() - begun

    def play(self, steps: int) -> None:
        """One turn of so many steps."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # what it died of comes below
            self._process.stdin.write(f"{steps}\n")
            self._process.stdin.flush()
        self.last = self._hear()
        self.laps.append({name: Lap(*values) for name, values in self.last["laps"].items()})

    def _hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            last = [text for text in self._errors.read().splitlines() if text.strip()][-1:]
            code = self._process.wait()
            raise RunError(f"{self.name}: {' '.join(last) or f'ended with exit code {code}'}")
        message: dict[str, Any] = json.loads(line)
        if "error" in message:
            raise (ConfigError if message["of_config"] else RunError)(message["error"])
        return message

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()  # it ends at this
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()


def in_turns(
    arms: Sequence[Arm], rounds: int, steps: int, said: Callable[[int], object] = lambda _: None
) -> None:
    """``rounds`` turns of ``steps`` steps for each arm, there and back through their order."""
    for number in range(rounds):
        for arm in arms if number % 2 == 0 else reversed(arms):
            arm.play(steps)
        said(number + 1)


@contextlib.contextmanager
def opened(commands: Mapping[str, Sequence[str]]) -> Iterator[list[Arm]]:
    """An arm for each name and command, one started after the other; all end with the block."""
    with contextlib.ExitStack() as stack:
        arms = []
        for name, command in commands.items():
            arm = Arm(name, command)
            stack.callback(arm.close)
            arms.append(arm)
        yield arms
