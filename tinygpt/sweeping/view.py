"""How a study is going: a line a running job on a terminal, a line an event elsewhere.

Whatever the engine, a run tells of itself in its folder: what is shown is read from there.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tinygpt.sweeping.engines import Outcome
from tinygpt.sweeping.jobs import Job
from tinygpt.training.console import clock

EVERY = 1.0  # seconds between looks at the folders


class View:
    """Follows ``pending``, of ``total`` jobs, from its own thread while the engine works."""

    def __init__(self, pending: Sequence[Job], total: int, console: Console) -> None:
        self.pending, self.total, self.console = list(pending), total, console
        self.begun: dict[Job, float] = {}  # when it was first seen to run
        self.progress: dict[Job, tuple[float, str]] = {}  # fraction done, what to say
        self.ended_jobs: dict[Job, Outcome] = {}
        self._stop, self._lock = threading.Event(), threading.Lock()
        self._start = time.time()
        self._done_before = 0.0  # FLOPs that runs had behind them when the study was taken up
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._live = Live(console=console, auto_refresh=False, transient=True)

    def __enter__(self) -> View:
        skipped = self.total - len(self.pending)
        before = f", {skipped} finished before" if skipped else ""
        folder = self.pending[0].run.path.parent
        runs = "1 run" if len(self.pending) == 1 else f"{len(self.pending)} runs"
        self._say(f"training {runs}{before}; folder {folder}")
        anew = self.pending[0].config.force
        self._done_before = 0.0 if anew else sum(_read(job)[0] * job.flops for job in self.pending)
        if self.console.is_terminal:
            self._live.start()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        self._live.stop()

    def ended(self, job: Job, outcome: Outcome) -> None:
        with self._lock:
            self.ended_jobs[job] = outcome
            self.progress.pop(job, None)
        place = f"{self.total - len(self.pending) + len(self.ended_jobs)}/{self.total}"
        loss = "" if outcome.val_loss is None else f"  val {outcome.val_loss:.4f}"
        seconds = f"  {clock(time.time() - self.begun.get(job, self._start))}"
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
            if job in self.ended_jobs or not _is_alive(job.run.log, self._start):
                continue
            if job not in self.begun:
                self.begun[job] = time.time()
                if not self.console.is_terminal:
                    self._say(f"begun  {job.label}")
            with self._lock:
                if job not in self.ended_jobs:
                    self.progress[job] = _read(job)

    def _left(self) -> str:
        """From the FLOPs done since the start; what runs had done before does not count."""
        todo = sum(job.flops for job in self.pending)
        done = sum(job.flops for job in self.ended_jobs)
        done += sum(job.flops * part for job, (part, _) in list(self.progress.items()))
        gained = done - self._done_before
        if gained <= 0 or done >= todo:
            return ""
        return f"  about {clock((time.time() - self._start) * (todo - done) / gained)} left"

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


def _read(job: Job) -> tuple[float, str]:
    """The part done and the latest losses, from the last lines of metrics.csv."""
    try:
        with job.run.metrics.open("rb") as file:
            header = file.readline().decode().strip().split(",")
            file.seek(max(len(header), file.seek(0, 2) - 4096))
            lines = file.read().decode().split("\n")[1:-1]
    except OSError:
        return 0.0, "starting"
    rows = [dict(zip(header, line.split(","), strict=False)) for line in lines]
    rows = [row for row in rows if len(row) == len(header) and row["step"].isdigit()]
    if not rows:
        return 0.0, "starting"
    step, total = int(rows[-1]["step"]), job.row["total_steps"]
    names = ("train", "val")
    losses = {n: row[f"{n}_loss"] for row in rows for n in names if row[f"{n}_loss"]}
    words = "  ".join(f"{name} {float(value):.3f}" for name, value in losses.items())
    begun = job.branch_step
    return max(0.0, (step - begun) / max(1, total - begun)), words
