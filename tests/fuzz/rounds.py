"""What the rounds of fuzzing come to, a line a harness: ``python -m tests.fuzz.rounds``."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import NamedTuple

OUTPUT = Path("outputs", "fuzz")
ROUNDS = OUTPUT / "rounds.csv"


class Round(NamedTuple):
    """``quiet``: seconds since its last finding, all of them where there was none."""

    harness: str
    when: str  # it ended, UTC
    seconds: int
    executions: int
    kept: int  # inputs that cover something new
    findings: int
    quiet: int
    slowest: float  # seconds for one input
    megabytes: int  # of memory, at its peak


class Total(NamedTuple):
    executions: int
    minutes: float
    quiet: float  # minutes since the last finding
    kept: int
    findings: int

    def __str__(self) -> str:
        return (
            f"{self.executions:,} executions in {self.minutes:.0f} min, {self.kept:,} inputs kept, "
            f"{self.findings} findings, quiet for {self.quiet:.0f} min"
        )


def record(one: Round) -> None:
    new = not ROUNDS.exists()
    with ROUNDS.open("a", newline="") as file:
        csv.writer(file).writerows([Round._fields] * new + [one])


def total(harness: str) -> Total:
    found = [one for one in _rounds() if one["harness"] == harness]
    quiet = 0
    for one in found:
        quiet = int(one["quiet"]) + (0 if int(one["findings"]) else quiet)
    sums = {
        name: sum(int(one[name]) for one in found)
        for name in ("executions", "seconds", "kept", "findings")
    }
    minutes = sums.pop("seconds") / 60
    return Total(minutes=minutes, quiet=quiet / 60, **sums)


def _rounds() -> list[dict[str, str]]:
    if not ROUNDS.exists():
        return []
    with ROUNDS.open(newline="") as file:
        return list(csv.DictReader(file))


def main() -> None:
    for harness in sys.argv[1:] or sorted({one["harness"] for one in _rounds()}):
        print(f"{harness}: {total(harness)}")


if __name__ == "__main__":
    main()
