"""How a study is going: a line a running job on a terminal, a line an event elsewhere.

Whatever the engine, a run tells of itself in its folder: what is shown is read from there.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tinygpt.sweeping.engines import Outcome
from tinygpt.sweeping.jobs import StudyJob
from tinygpt.training.console import clock

EVERY = 1.0  # seconds between looks at the folders
ENOUGH = 0.05  # of a run, to time it by
REACH = 5.0  # how many times a timed step's FLOPs another step may have to be judged by it
TRUSTED = 1.5  # the factor by which a time left may be off and be shown


class Work(NamedTuple):
    """Steps of a run: done in so many seconds, or to be done."""

    steps: float
    flops: float  # a step
    seconds: float = 0.0


def seconds_left(timed: Sequence[Work], todo: Sequence[Work], at_once: float = 1.0) -> float | None:
    """Seconds until ``todo`` is done, as many runs ``at_once``; None where one cannot tell.

    A step takes ``a + b·FLOPs`` seconds: small models are far from the speed of large ones.  Steps
    of one size do not tell the two apart: then the truth is between all ``a`` and all ``b``.
    """
    if not timed or not todo:
        return None
    import numpy as np  # here: the mistakes of a sweep are told without it

    flops = np.array([work.flops for work in timed])
    pace = np.array([work.seconds / work.steps for work in timed])
    one, each = 1 / pace, flops / pace  # errors relative to the time
    flat, steep = (one.sum() / (one @ one), 0.0), (0.0, each.sum() / (each @ each))
    if flops.max() < 1.5 * flops.min():
        low, high = sorted([_span(todo, flat, at_once), _span(todo, steep, at_once)])
        return math.sqrt(low * high) if high <= TRUSTED**2 * low else None
    if max(work.flops for work in todo) > REACH * flops.max():
        return None
    a, b = np.linalg.lstsq(np.stack([one, each / flops.max()], 1), np.ones(len(pace)))[0]
    both = (float(a), float(b / flops.max()))
    return _span(todo, both if min(both) >= 0 else steep if a < 0 else flat, at_once)


def _span(todo: Sequence[Work], pace: tuple[float, float], at_once: float) -> float:
    each = [work.steps * (pace[0] + pace[1] * work.flops) for work in todo]
    return max(sum(each) / at_once, *each)


class View:
    """Follows ``pending``, of ``total`` jobs, from its own thread while the engine works."""

    def __init__(self, pending: Sequence[StudyJob], total: int, console: Console) -> None:
        self.pending, self.total, self.console = list(pending), total, console
        self.begun: dict[StudyJob, float] = {}  # when it was first seen to run
        self.progress: dict[StudyJob, tuple[float, str]] = {}  # fraction done, what to say
        self.ended_jobs: dict[StudyJob, Outcome] = {}
        self._stop, self._lock = threading.Event(), threading.Lock()
        self._start, self._since = time.monotonic(), time.time()  # the latter as files have it
        self._took: dict[StudyJob, float] = {}  # seconds, of those that ended
        self._done_before: dict[StudyJob, float] = {}  # fraction, when the study was taken up
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._live = Live(console=console, auto_refresh=False, transient=True)

    def __enter__(self) -> View:
        skipped = self.total - len(self.pending)
        before = f", {skipped} finished before" if skipped else ""
        folder = self.pending[0].run.path.parent
        runs = "1 run" if len(self.pending) == 1 else f"{len(self.pending)} runs"
        self._say(f"{self.pending[0].verb} {runs}{before}; folder {folder}")
        anew = self.pending[0].config.force
        self._done_before = {} if anew else {job: job.progress()[0] for job in self.pending}
        if self.console.is_terminal:
            self._live.start()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        self._live.stop()

    def ended(self, job: StudyJob, outcome: Outcome) -> None:
        with self._lock:
            self.ended_jobs[job] = outcome
            self.progress.pop(job, None)
            if job in self.begun:
                self._took[job] = time.monotonic() - self.begun[job]
        place = f"{self.total - len(self.pending) + len(self.ended_jobs)}/{self.total}"
        loss = f"  {job.measure[0]} {outcome.shown}" if outcome.shown else ""
        seconds = f"  {clock(time.monotonic() - self.begun.get(job, self._start))}"
        reason = f"  {outcome.reason}" if outcome.reason else ""
        status = outcome.status.replace("_", " ")
        self._say(f"{place}  {job.label}  {status}{loss}{seconds}{reason}{self._left()}")

    def _say(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _follow(self) -> None:
        while not self._stop.wait(EVERY):
            self._look()
            if self.console.is_terminal:
                self._live.update(self._drawn(), refresh=True)

    def _look(self) -> None:
        for job in self.pending:
            if job in self.ended_jobs or not _is_alive(job.run.log, self._since):
                continue
            if job not in self.begun:
                self.begun[job] = time.monotonic()
                if not self.console.is_terminal:
                    self._say(f"begun  {job.label}")
            with self._lock:
                if job not in self.ended_jobs:
                    self.progress[job] = job.progress()

    def _left(self) -> str:
        now, timed, todo, busy = time.monotonic(), [], [], 0.0
        running = dict(self.progress)
        for job in self.pending:
            steps = job.steps
            part, before = running.get(job, (0.0, ""))[0], self._done_before.get(job, 0.0)
            seconds = self._took.get(job, now - self.begun.get(job, now))
            busy += seconds
            if job in self.ended_jobs:
                part = 0.0 if self.ended_jobs[job].failed else 1.0
            else:
                todo.append(Work(steps * (1 - max(part, before)), job.flops / steps))
            if seconds > 0 and part - before >= ENOUGH:
                timed.append(Work(steps * (part - before), job.flops / steps, seconds))
        at_once = max(1.0, busy / max(now - min(self.begun.values(), default=now), EVERY))
        left = seconds_left(timed, todo, at_once)
        return "" if left is None else f"  about {clock(left)} left"

    def _drawn(self) -> Group:
        table = Table.grid(padding=(0, 2))
        with self._lock:
            running = list(self.progress.items())
        for job, (part, words) in running:
            table.add_row(job.label, ProgressBar(1.0, part, width=24), words)
        done = self.total - len(self.pending) + len(self.ended_jobs)
        failed = sum(outcome.failed for outcome in self.ended_jobs.values())
        line = f"{done}/{self.total} runs" + (f", {failed} failed" if failed else "")
        return Group(table, Text(f"{line}{self._left()}"))


def _is_alive(log: Path, since: float) -> bool:
    try:
        return log.stat().st_mtime >= since
    except OSError:
        return False
