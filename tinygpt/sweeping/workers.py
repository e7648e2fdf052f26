"""Run jobs on this machine: in this process, or in processes that stay for the whole study."""

from __future__ import annotations

import contextlib
import itertools
import math
import multiprocessing
import os
import re
import signal
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from tinygpt import cli, signals, streams
from tinygpt.config import ConfigError, RunError
from tinygpt.sweeping.jobs import Job


@dataclass(frozen=True)
class Outcome:
    """Describe how a job ended."""

    status: str  # as in results.json, or failed, killed, interrupted
    metric: float | None = None  # the headline metric: a validation loss, a reward
    method: str = ""  # that has this reward
    reason: str = ""  # one line, if it did not end well
    is_new: bool = True  # False: an earlier command finished it

    @property
    def failed(self) -> bool:
        return self.status in ("failed", "killed", "interrupted")

    @property
    def value(self) -> float:
        """Return what a sweeper minimizes: infinity for a diverged run."""
        return math.inf if self.metric is None else self.metric

    @property
    def shown(self) -> str:
        if self.metric is None:
            return ""
        return f"{self.method} {self.metric:+.2f}" if self.method else f"{self.metric:.4f}"


Results = Iterator[tuple[Job, Outcome]]


_interrupted: list[bool] = []  # not empty: this worker was told to stop, and begins no more jobs


def do_job(job: Job) -> Outcome:
    """Run the job without printing; its folder has a log."""
    if _interrupted:
        return Outcome("interrupted")
    streams.survive()
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        try:
            with signals.obeyed():
                return outcome_of(job, job.kind.run(job, Console(file=nowhere, markup=False)))
        except (KeyboardInterrupt, SystemExit):
            _interrupted.append(True)
            return Outcome("interrupted")
        except Exception as error:
            return Outcome("failed", reason=one_line(error))


def outcome_of(job: Job, results: Mapping[str, Any], is_new: bool = True) -> Outcome:
    return Outcome(results["status"], *job.kind.headline(results), is_new=is_new)


def one_line(error: BaseException) -> str:
    """Return the error in one line, with its type unless it is one of ours."""
    is_ours = isinstance(error, ConfigError | RunError)
    return " ".join((str(error) if is_ours else f"{type(error).__name__}: {error}").split())


def run_serial(jobs: Iterable[Job]) -> Results:
    """Run jobs in this process, one after the other; an interrupt ends them all."""
    for job in jobs:
        outcome = do_job(job)
        yield job, outcome
        if outcome.status == "interrupted":
            return


class Workers:
    """Hold processes of loky, which reports the signal that killed one.

    A signal reaches them as SIGTERM, upon which they save and stop.
    """

    def __init__(self, at_once: int, gpus: int = 0, lean: bool = False) -> None:
        self.at_once, self.gpus, self.lean = at_once, gpus, lean
        self._pool: Any = None

    def __enter__(self) -> Workers:
        self._folder = tempfile.TemporaryDirectory()
        self._start()
        return self

    def __exit__(self, *error: object) -> None:
        handed = (all(one.running() or one.done() for one in self._begun) for _ in range(200))
        while not next(handed, True):  # loky's thread fails if it is shut down earlier
            time.sleep(0.01)
        self._pool.shutdown(wait=True, kill_workers=True)
        self._folder.cleanup()

    def settle(self) -> None:
        """Wait until every process has imported what it needs."""
        for one in self._begun:
            one.exception()

    def _start(self) -> None:
        from joblib.externals.loky import ProcessPoolExecutor

        folder = Path(self._folder.name)
        begun_with = (os.getpid(), self.at_once, self.gpus, folder, self.lean)
        self._pool = ProcessPoolExecutor(
            self.at_once, initializer=_begin_worker, initargs=begun_with
        )
        with signals.not_for_children():
            self._begun = [self._pool.submit(os.getpid) for _ in range(self.at_once)]

    def do(self, jobs: Iterator[Job]) -> Results:
        """Run jobs; once a process is killed, which ends all of them, take no more jobs."""
        from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, wait
        from concurrent.futures.process import BrokenProcessPool

        if any(one.done() and one.exception() for one in self._begun):
            self._restart()
        futures, stopped, broken = dict[Future[Outcome], Job](), list[int](), False

        def fill() -> None:
            for job in itertools.islice(jobs, self.at_once - len(futures)):
                futures[self._pool.submit(do_job, job)] = job

        def stop(number: int) -> None:
            stopped.append(number)
            for future in futures:
                future.cancel()
            for process in multiprocessing.active_children():
                process.terminate()

        with signals.handled(stop):
            fill()
            while futures:
                for future in wait(futures, return_when=FIRST_COMPLETED).done:
                    try:
                        outcome = future.result()
                    except (BrokenProcessPool, CancelledError) as error:
                        broken = True
                        names = re.findall(r"SIG[A-Z]+", str(error))
                        how = f"was ended by {names[0]}" if names else "ended abruptly"
                        outcome = Outcome("killed", reason=f"its process {how}")
                    if stopped and outcome.failed:
                        outcome = Outcome("interrupted")
                    yield futures.pop(future), outcome
                if not (broken or stopped):
                    fill()
        if broken and not stopped:
            self._restart()

    def _restart(self) -> None:
        self._pool.shutdown(wait=True, kill_workers=True)
        self._start()


def run_local(jobs: Iterable[Job], workers: Workers) -> Results:
    """Run jobs in processes of this machine.

    If the system kills one, for its memory, say, the others end with it.  The jobs that had begun
    are then run one at a time, which shows which of them was killed.
    """
    waiting, interrupted = iter(jobs), False
    while not interrupted and (first := next(waiting, None)) is not None:
        lost, reason = list[Job](), ""
        for job, outcome in workers.do(itertools.chain([first], waiting)):
            if outcome.status == "killed":
                lost.append(job)
                reason = outcome.reason
            else:
                yield job, outcome
                interrupted = interrupted or outcome.status == "interrupted"
        suspects = [job for job in lost if job.run.log.exists()]
        if lost and not (suspects or interrupted):
            raise RunError(f"launcher=local: its processes do not start ({reason})")
        for suspect in suspects:
            if not interrupted:
                ((job, outcome),) = workers.do(iter([suspect]))
                yield job, outcome
                interrupted = outcome.status == "interrupted"
        waiting = itertools.chain([job for job in lost if job not in suspects], waiting)


_worker = contextlib.ExitStack()  # held for as long as a worker lives


def _begin_worker(parent: int, at_once: int, gpus: int, folder: Path, lean: bool) -> None:
    if gpus:
        _claim_gpu(at_once, gpus, folder)  # before torch is imported
    for number in signals.STOPPING:  # those of a terminal reach the study, which sends SIGTERM
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _worker.enter_context(signals.handled(lambda number: _interrupted.append(True)))

    with cli.quickly(lean=lean):
        from tinygpt.training.trainer import leave_with_parent
    leave_with_parent(parent)  # otherwise its runs would stay locked


def _claim_gpu(at_once: int, gpus: int, folder: Path) -> None:
    """Take one of ``at_once`` places on the GPUs for as long as this process lives."""
    import filelock

    for place in range(at_once):
        with contextlib.suppress(filelock.Timeout):
            lock = filelock.FileLock(folder / f"gpu-{place}.lock", timeout=0)
            _worker.enter_context(lock)
            os.environ["CUDA_VISIBLE_DEVICES"] = str(place % gpus)
            return
