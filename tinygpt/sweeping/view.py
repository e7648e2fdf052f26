"""Show how a study is going: a line per running job on a terminal, a line per event elsewhere.

All of it is read from the run folders, so it works with every engine.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Container, Sequence
from typing import NamedTuple

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tinygpt.data.survey import many
from tinygpt.sweeping.jobs import Job
from tinygpt.sweeping.workers import Outcome
from tinygpt.training.console import clock, folded, short

EVERY = 1.0  # seconds between looks at the folders
ENOUGH = 0.05  # fraction of a run after which its steps are timed
REACH = 5.0  # times the FLOPs of a timed step up to which another step is estimated
TRUSTED = 1.5  # factor by which a time left that is shown may be wrong


def say(console: Console, line: str) -> None:
    """Print a line without wrapping or colours."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def say_below(console: Console, name: str, text: str) -> None:
    """Print a named text, wrapped at 80 columns and indented."""
    say(console, folded(f"{name:<10} {text}", 11))


def make_table(*columns: str, left: Container[str] = ("run",)) -> Table:
    """Return a borderless table whose columns are right-aligned, except those in ``left``."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in columns:
        table.add_column(name, justify="left" if name in left else "right", overflow="fold")
    return table


class Work(NamedTuple):
    """Hold steps of a run, done in ``seconds`` or still to do."""

    steps: float
    flops: float  # per step
    seconds: float = 0.0


def seconds_left(timed: Sequence[Work], todo: Sequence[Work], at_once: float = 1.0) -> float | None:
    """Return the seconds until ``todo`` is done, or None if they cannot be estimated.

    A step takes ``a + b·FLOPs`` seconds.  Steps of one size cannot separate the two terms: the
    truth then lies between only ``a`` and only ``b``.
    """
    if not timed or not todo:
        return None
    import numpy as np  # here, as the mistakes of a sweep are reported without it

    flops = np.array([work.flops for work in timed])
    pace = np.array([work.seconds / work.steps for work in timed])

    def total(a: float, b: float) -> float:
        each = [work.steps * (a + b * work.flops) for work in todo]
        return max(sum(each) / at_once, *each)

    one, each = 1 / pace, flops / pace  # errors relative to the time
    all_a, all_b = total(one.sum() / (one @ one), 0.0), total(0.0, each.sum() / (each @ each))
    if flops.max() < 1.5 * flops.min():
        low, high = sorted([all_a, all_b])
        return math.sqrt(low * high) if high <= TRUSTED**2 * low else None
    if max(work.flops for work in todo) > REACH * flops.max():
        return None
    a, b = np.linalg.lstsq(np.stack([one, each / flops.max()], 1), np.ones(len(pace)))[0]
    if min(a, b) >= 0:
        return total(float(a), float(b / flops.max()))
    return all_b if a < 0 else all_a


class View:
    """Follow ``pending``, of ``total`` jobs, in a thread while the engine works."""

    def __init__(self, pending: Sequence[Job], total: int, console: Console) -> None:
        self.pending, self.total, self.console = list(pending), total, console
        self.begun: dict[Job, float] = {}  # when it was first seen to run
        self.took: dict[Job, float] = {}  # seconds, of those that ended
        self.progress: dict[Job, tuple[float, str]] = {}  # fraction done, latest numbers
        self.done_before: dict[Job, float] = {}  # fraction done when the study was resumed
        self.outcomes: dict[Job, Outcome] = {}
        self.start, self._since = time.monotonic(), time.time()  # to compare with files' times
        self._stop, self._lock = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._live = Live(console=console, auto_refresh=False, transient=True)

    def __enter__(self) -> View:
        first, skipped = self.pending[0], self.total - len(self.pending)
        before = f", {skipped} finished before" if skipped else ""
        runs = many(len(self.pending), "run")
        say(self.console, f"{first.kind.verb} {runs}{before}; folder {first.run.path.parent}")
        if not first.config.force:
            self.done_before = {job: job.kind.progress(job)[0] for job in self.pending}
        if self.console.is_terminal:
            self._live.start()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        self._live.stop()

    def ended(self, job: Job, outcome: Outcome) -> None:
        """Print how the job ended and how long the others will take."""
        now = time.monotonic()
        with self._lock:
            part, _ = self.progress.pop(job, (0.0, ""))
            self.outcomes[job] = outcome
            if job in self.begun:
                self.took[job] = now - self.begun[job]
        if outcome.status == "interrupted":
            say(self.console, f"{job.label}  interrupted at {part:.0%}")
            return
        parts = [
            f"{self._done()}/{self.total}",
            job.label,
            "" if outcome.status == "finished" else outcome.status.replace("_", " "),
            f"{job.kind.metric[0]} {outcome.shown}" if outcome.shown else "",
            clock(now - self.begun.get(job, self.start)),
            outcome.reason,
            "" if self.console.is_terminal else self.left(),  # a terminal's last line has it
        ]
        say(self.console, "  ".join(filter(None, parts)))

    def _done(self) -> int:
        over = sum(outcome.status != "interrupted" for outcome in self.outcomes.values())
        return self.total - len(self.pending) + over

    def _follow(self) -> None:
        while not self._stop.wait(EVERY):
            self._look()
            if self.console.is_terminal:
                self._live.update(self._drawn(), refresh=True)

    def _look(self) -> None:
        for job in self.pending:
            if job in self.outcomes or not self._is_alive(job):
                continue
            if job not in self.begun:
                self.begun[job] = time.monotonic()
                if not self.console.is_terminal:
                    say(self.console, f"begun  {job.label}")
            with self._lock:
                if job not in self.outcomes:
                    self.progress[job] = job.kind.progress(job)

    def _is_alive(self, job: Job) -> bool:
        try:
            return job.run.log.stat().st_mtime >= self._since
        except OSError:
            return False

    def left(self) -> str:
        """Return the share done, the speed and the time left, as far as known."""
        now, timed, todo, busy, tokens = time.monotonic(), [], [], 0.0, 0.0
        running = dict(self.progress)
        for job in self.pending:
            steps, flops = job.steps, job.flops / job.steps
            part, before = running.get(job, (0.0, ""))[0], self.done_before.get(job, 0.0)
            seconds = self.took.get(job, now - self.begun.get(job, now))
            busy += seconds
            if job in self.outcomes:
                part = 0.0 if self.outcomes[job].failed else 1.0
            else:
                todo.append(Work(steps * (1 - max(part, before)), flops))
            tokens += steps * max(0.0, part - before) * job.row.get("batch_tokens", 0)
            if seconds > 0 and part - before >= ENOUGH:
                timed.append(Work(steps * (part - before), flops, seconds))
        since = max(now - min(self.begun.values(), default=now), EVERY)
        seconds_to_go = seconds_left(timed, todo, max(1.0, busy / since))
        known = tokens and self.console.is_terminal  # elsewhere it makes the lines too long
        parts = [f"{short(tokens / since)} tokens/s"] if known else []
        if seconds_to_go is not None:
            share = since / (since + seconds_to_go)
            parts = [f"{share:.0%}", *parts, f"about {clock(seconds_to_go)} left"]
        return "  ".join(parts)

    def _drawn(self) -> Group:
        table = Table.grid(padding=(0, 2))
        room = max(12, self.console.width - 50)  # beside the bar, the percentage and two losses
        table.add_column(no_wrap=True, overflow="ellipsis", max_width=room)
        with self._lock:
            running = list(self.progress.items())
        for job, (part, words) in running:
            table.add_row(job.label, ProgressBar(1.0, part, width=16), f"{part:4.0%}", words)
        failed = sum(outcome.status in ("failed", "killed") for outcome in self.outcomes.values())
        line = f"{self._done()}/{self.total} runs" + (f", {failed} failed" if failed else "")
        return Group(table, Text(f"{line}  {self.left()}"))
