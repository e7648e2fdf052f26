"""Who does the jobs of a study: this process, joblib's workers, Slurm or Ray.

Every engine takes jobs and yields each with its outcome as soon as it is known, in any order.  A
job that fails, diverges or is killed is an outcome like any other.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tinygpt import signals, streams
from tinygpt.config import (
    ConfigError,
    LauncherConfig,
    LocalLauncher,
    RayLauncher,
    RunError,
    Settings,
    SlurmLauncher,
    install,
)
from tinygpt.sweeping.jobs import StudyJob


@dataclass(frozen=True)
class Outcome:
    """How a job ended."""

    status: str  # as in results.json, or failed, killed, interrupted
    number: float | None = None  # the final validation loss; of an adaptation a reward
    method: str = ""  # whose reward it is
    reason: str = ""  # one line, for what did not end well
    is_new: bool = True  # False: an earlier command finished it

    @property
    def failed(self) -> bool:
        return self.status in ("failed", "killed", "interrupted")

    @property
    def value(self) -> float:
        """What a sweeper makes small; a diverged run is as bad as can be."""
        return math.inf if self.number is None else self.number

    @property
    def shown(self) -> str:
        if self.number is None:
            return ""
        return f"{self.method} {self.number:+.2f}" if self.method else f"{self.number:.4f}"


Results = Iterator[tuple[StudyJob, Outcome]]
Engine = Callable[[Sequence[StudyJob], Path], Results]


SHARED_MEMORY = "/dev/shm"


def make_engine(launcher: LauncherConfig) -> Engine:
    """The engine that ``launcher=`` names; it is given jobs and a folder for its own files.

    Raises ConfigError where what an engine needs is missing.
    """
    if isinstance(launcher, LocalLauncher):
        if sys.platform == "linux" and not os.access(SHARED_MEMORY, os.W_OK):
            raise ConfigError(
                f"launcher=local: its processes need {SHARED_MEMORY}, which is missing or cannot "
                "be written here; use launcher=serial"
            )
        return lambda jobs, folder: run_local(jobs, launcher, folder)
    if isinstance(launcher, SlurmLauncher):
        _require("submitit", "slurm")
        if shutil.which("srun") is None:
            raise ConfigError("launcher=slurm: no srun here; start it where Slurm takes jobs")
        return lambda jobs, folder: run_slurm(jobs, launcher, folder)
    if isinstance(launcher, RayLauncher):
        _require("ray", "ray")
        return lambda jobs, folder: run_ray(jobs, launcher)
    return lambda jobs, folder: run_serial(jobs)


def _require(module: str, extra: str) -> None:
    import importlib.util

    if importlib.util.find_spec(module) is None:
        raise ConfigError(f"launcher={extra}: needs {install(extra)}")


_interrupted: list[bool] = []  # a worker that was told to stop begins nothing more


def do_job(job: StudyJob) -> Outcome:
    """Do the job without a word to the terminal: its folder has a log of its own."""
    from rich.console import Console

    if _interrupted:
        return Outcome("interrupted", reason="not begun")
    streams.survive()
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        try:
            with signals.obeyed():
                return outcome_of(job, job.do(Console(file=nowhere, markup=False)))
        except (KeyboardInterrupt, SystemExit) as stop:
            _interrupted.append(True)
            number = stop.code if isinstance(stop, SystemExit) else 130
            return Outcome("interrupted", reason=f"stopped with exit code {number}")
        except Exception as error:
            return Outcome("failed", reason=_one_line(error))


def outcome_of(job: StudyJob, results: Mapping[str, Any], is_new: bool = True) -> Outcome:
    return Outcome(results["status"], *job.came_to(results), is_new=is_new)


def _one_line(error: BaseException) -> str:
    is_ours = isinstance(error, ConfigError | RunError)
    return " ".join((str(error) if is_ours else f"{type(error).__name__}: {error}").split())


def run_serial(jobs: Sequence[StudyJob]) -> Results:
    """Here, one after the other; an interrupt ends them all."""
    for job in jobs:
        outcome = do_job(job)
        yield job, outcome
        if outcome.status == "interrupted":
            return


class Share(NamedTuple):
    """What a run has of the machine that it trains on."""

    at_once: int  # runs
    threads: int | None  # CPU threads of each; None: torch's choice


def share_of(config: Settings, jobs: int) -> Share:
    """Return how many of ``jobs`` go at once and the threads of each, as given or as it pays."""
    launcher, asked = config.launcher, config.hardware.threads
    if isinstance(launcher, LocalLauncher):
        import joblib

        processes = launcher.n_jobs or _gpus(config) or joblib.cpu_count()
        at_once = max(1, min(processes, jobs))
        return Share(at_once, asked or max(1, joblib.cpu_count() // at_once))
    if isinstance(launcher, SlurmLauncher):
        return Share(max(1, min(launcher.n_jobs, jobs)), asked or launcher.cpus)
    if isinstance(launcher, RayLauncher):  # how many nodes there are is not known here
        return Share(1, asked or launcher.cpus)
    return Share(1, asked)


def run_local(jobs: Sequence[StudyJob], launcher: LocalLauncher, folder: Path) -> Results:
    """In processes that stay for the whole study, so that torch is imported once in each.

    The system may kill a process (for its memory, say).  That takes the others down; those that
    had begun then go on alone, one after the other, so that it is seen which one it was.
    """
    config = jobs[0].config
    gpus, n_jobs = _gpus(config), share_of(config, len(jobs)).at_once
    for job in jobs:
        job.config.hardware.threads = share_of(job.config, len(jobs)).threads
    waiting, suspects, interrupted = list(jobs), list[StudyJob](), False
    while waiting or suspects:
        batch = suspects[:1] or waiting
        dead: list[StudyJob] = []
        reason = ""
        for job, outcome in _in_pool(batch, 1 if suspects else n_jobs, gpus, folder):
            if outcome.status == "killed" and not suspects:
                dead.append(job)
                reason = outcome.reason
                continue
            yield job, outcome
            interrupted = interrupted or outcome.status == "interrupted"
        if interrupted:
            return
        if suspects:
            suspects = suspects[1:]
        else:
            suspects = [job for job in dead if job.run.log.exists()]
            waiting = [job for job in dead if job not in suspects]
            if dead and not suspects:
                raise RunError(f"launcher=local: its processes do not start ({reason})")


def _in_pool(jobs: Sequence[StudyJob], n_jobs: int, gpus: int, folder: Path) -> Results:
    """A signal reaches the workers as SIGTERM: they save and stop; what waits is not begun."""
    from concurrent.futures import CancelledError, as_completed
    from concurrent.futures.process import BrokenProcessPool

    from joblib.externals.loky import ProcessPoolExecutor

    pool = ProcessPoolExecutor(
        n_jobs, initializer=_begin_worker, initargs=(os.getpid(), gpus, folder)
    )
    futures = {pool.submit(do_job, job): job for job in jobs}
    stopped = []

    def stop(number: int) -> None:
        stopped.append(number)
        for future in futures:
            future.cancel()
        for process in list(pool._processes.values()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGTERM)

    try:
        with signals.handled(stop):
            for future in as_completed(futures):
                try:
                    outcome = future.result()
                except (BrokenProcessPool, CancelledError) as error:
                    outcome = Outcome("killed", reason=_killed(error))
                if stopped and outcome.failed:
                    outcome = Outcome("interrupted", reason=f"stopped by signal {stopped[0]}")
                yield futures[future], outcome
    finally:
        pool.shutdown(wait=True, kill_workers=True)


def _killed(error: BaseException) -> str:
    names = re.findall(r"SIG[A-Z]+", str(error))
    return f"its process was ended by {names[0]}" if names else "its process ended abruptly"


def _gpus(config: Settings) -> int:
    """How many CUDA devices the jobs may share out; 0 where they compute elsewhere."""
    if config.hardware.accelerator not in ("auto", "cuda"):
        return 0
    import torch

    return torch.cuda.device_count()


def _begin_worker(parent: int, gpus: int, folder: Path) -> None:
    _claim_gpu(gpus, folder)  # before torch is imported
    for number in signals.STOPPING:  # a terminal's reach the study too, which sends SIGTERM
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _WORKER.enter_context(signals.handled(lambda number: _interrupted.append(True)))

    from tinygpt.training.trainer import leave_with_parent

    leave_with_parent(parent)  # its runs would be locked for whoever takes the study up


def _claim_gpu(gpus: int, folder: Path) -> None:
    """Gives this process a GPU that no other worker has, for as long as it lives."""
    import filelock

    for number in range(gpus):
        lock = filelock.FileLock(folder / f".gpu-{number}.lock")
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            continue
        os.environ["CUDA_VISIBLE_DEVICES"] = str(number)
        _CLAIMED.append(lock)
        return


_CLAIMED: list[Any] = []  # a lock that is collected is released
_WORKER = contextlib.ExitStack()  # how a worker that waits for a job takes a signal


class _SlurmJob:
    """What submitit runs on a node; out of time or preempted, it is queued again as it is."""

    def __call__(self, job: StudyJob) -> Outcome:
        outcome = do_job(job)
        if outcome.status == "interrupted":
            raise SystemExit(143)  # no outcome: Slurm may have queued it again
        return outcome

    def checkpoint(self, job: StudyJob) -> Any:
        import submitit

        return submitit.helpers.DelayedSubmission(self, job)


def slurm_parameters(launcher: SlurmLauncher, study: str) -> dict[str, Any]:
    """What sbatch is asked for, in the words of submitit's SlurmExecutor."""
    asked = {
        "job_name": f"tinygpt-{study}",
        "partition": launcher.partition,
        "time": launcher.minutes,
        "cpus_per_task": launcher.cpus,
        "gres": f"gpu:{launcher.gpus}" if launcher.gpus else None,
        "mem": f"{launcher.memory_gb}GB" if launcher.memory_gb else None,
        "array_parallelism": launcher.n_jobs,
        "additional_parameters": launcher.sbatch,
    }
    return {name: value for name, value in asked.items() if value is not None}


def run_slurm(jobs: Sequence[StudyJob], launcher: SlurmLauncher, folder: Path) -> Results:
    """As a Slurm array, by submitit, whose files go to ``folder``/.slurm."""
    import submitit

    logging.getLogger("submitit").setLevel(logging.ERROR)  # a cluster without accounting is fine
    executor = submitit.SlurmExecutor(folder / ".slurm", max_num_timeout=launcher.requeues)
    executor.update_parameters(**slurm_parameters(launcher, folder.name))
    for job in jobs:
        job.config.hardware.threads = job.config.hardware.threads or launcher.cpus
    try:
        with executor.batch():
            submitted = [(executor.submit(_SlurmJob(), job), job) for job in jobs]
    except submitit.core.utils.FailedJobError as refusal:  # an unknown partition, say
        raise RunError(f"launcher=slurm: {str(refusal).strip().splitlines()[0]}") from refusal
    waiting = dict(submitted)
    try:
        for done in submitit.helpers.as_completed(list(waiting), poll_frequency=2):
            job, error = waiting.pop(done), done.exception()
            lines = (str(error).strip() or "lost").splitlines() if error else []
            killed = Outcome("killed", reason=f"slurm: {lines[0]}") if error else None
            yield job, killed or done.result()
    finally:
        for left in waiting:  # interrupted: what runs saves and stops
            left.cancel()


def ray_options(launcher: RayLauncher) -> dict[str, Any]:
    """What a run asks of the cluster; it is the study that tries again, not Ray."""
    return {"num_cpus": launcher.cpus, "num_gpus": launcher.gpus, "max_retries": 0}


def run_ray(jobs: Sequence[StudyJob], launcher: RayLauncher) -> Results:
    """As Ray tasks, on the cluster at ``address`` or on one of its own."""
    import ray

    try:
        ray.init(address=launcher.address, log_to_driver=False, configure_logging=False)
    except ConnectionError as error:
        raise RunError(f"launcher.address={launcher.address}: no Ray cluster there") from error
    try:
        task = ray.remote(**ray_options(launcher))(do_job)
        for job in jobs:
            job.config.hardware.threads = job.config.hardware.threads or launcher.cpus
        running = {task.remote(job): job for job in jobs}
        while running:
            for done in ray.wait(list(running))[0]:
                try:
                    outcome = ray.get(done)
                except ray.exceptions.RayError as error:
                    outcome = Outcome("killed", reason=_one_line(error)[:200])
                yield running.pop(done), outcome
    finally:
        ray.shutdown()
