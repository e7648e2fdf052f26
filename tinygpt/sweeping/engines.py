"""Who trains the jobs of a study: this process, joblib's workers, Slurm or Ray.

Every engine takes jobs and yields each with its outcome as soon as it is known, in any order.  A
job that fails, diverges or is killed is an outcome like any other.
"""

from __future__ import annotations

import logging
import math
import os
import re
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinygpt.config import (
    Config,
    ConfigError,
    LauncherConfig,
    LocalLauncher,
    RayLauncher,
    RunError,
    SlurmLauncher,
)
from tinygpt.sweeping.jobs import Job


@dataclass(frozen=True)
class Outcome:
    """How a job ended."""

    status: str  # as in results.json, or failed, killed, interrupted
    val_loss: float | None = None
    reason: str = ""  # one line, for what did not end well
    is_new: bool = True  # False: an earlier command finished it

    @property
    def failed(self) -> bool:
        return self.status in ("failed", "killed", "interrupted")

    @property
    def value(self) -> float:
        """What a sweeper makes small; a diverged run is as bad as can be."""
        return math.inf if self.val_loss is None else self.val_loss


Results = Iterator[tuple[Job, Outcome]]


def make_engine(launcher: LauncherConfig) -> Callable[[Sequence[Job], Path], Results]:
    """The engine that ``launcher=`` names; it is given jobs and a folder for its own files.

    Raises ConfigError where the library of an engine is missing.
    """
    if isinstance(launcher, LocalLauncher):
        return lambda jobs, folder: run_local(jobs, launcher, folder)
    if isinstance(launcher, SlurmLauncher):
        _require("submitit", "slurm")
        return lambda jobs, folder: run_slurm(jobs, launcher, folder)
    if isinstance(launcher, RayLauncher):
        _require("ray", "ray")
        return lambda jobs, folder: run_ray(jobs, launcher)
    return lambda jobs, folder: run_serial(jobs)


def _require(module: str, extra: str) -> None:
    import importlib.util

    if importlib.util.find_spec(module) is None:
        raise ConfigError(f"launcher={extra}: needs `pip install 'tinygpt[{extra}]'`")


_interrupted: list[bool] = []  # a worker that was told to stop begins nothing more


def train_job(job: Job) -> Outcome:
    """Trains one run without a word to the terminal: its folder has a log of its own."""
    from rich.console import Console

    from tinygpt.training.branching import Branch
    from tinygpt.training.session import train

    if _interrupted:
        return Outcome("interrupted", reason="not begun")
    branch = Branch(job.trunk, job.branch_step, tuple(job.keep_at))
    with open(os.devnull, "w") as nowhere:
        try:
            results = train(job.config, list(job.overrides), Console(file=nowhere), branch)
        except (KeyboardInterrupt, SystemExit) as stop:
            _interrupted.append(True)
            number = stop.code if isinstance(stop, SystemExit) else 130
            return Outcome("interrupted", reason=f"stopped with exit code {number}")
        except Exception as error:
            return Outcome("failed", reason=_one_line(error))
    return Outcome(results["status"], results["final_val_loss"])


def _one_line(error: BaseException) -> str:
    is_ours = isinstance(error, ConfigError | RunError)
    return " ".join((str(error) if is_ours else f"{type(error).__name__}: {error}").split())


def run_serial(jobs: Sequence[Job]) -> Results:
    """Here, one after the other; an interrupt ends them all."""
    for job in jobs:
        outcome = train_job(job)
        yield job, outcome
        if outcome.status == "interrupted":
            return


def run_local(jobs: Sequence[Job], launcher: LocalLauncher, folder: Path) -> Results:
    """In processes that stay for the whole study, so that torch is imported once in each.

    The system may kill a process (for its memory, say).  That takes the others down; those that
    had begun then go on alone, one after the other, so that it is seen which one it was.
    """
    import joblib

    gpus = _gpus(jobs[0].config)
    n_jobs = min(launcher.n_jobs or gpus or joblib.cpu_count(), len(jobs))
    for job in jobs:
        if job.config.hardware.threads is None:
            job.config.hardware.threads = max(1, joblib.cpu_count() // n_jobs)
    waiting, suspects, interrupted = list(jobs), list[Job](), False
    while waiting or suspects:
        batch = suspects[:1] or waiting
        lost: list[Job] = []
        reason = ""
        for job, outcome in _in_pool(batch, 1 if suspects else n_jobs, gpus, folder):
            if outcome.status == "killed":
                lost.append(job)
                reason = outcome.reason
                continue
            yield job, outcome
            interrupted = interrupted or outcome.status == "interrupted"
        if interrupted:
            return
        if suspects:
            suspects = suspects[1:]
            if lost:
                yield lost[0], Outcome("killed", reason=reason)
        else:
            suspects = [job for job in lost if job.run.log.exists()]
            waiting = [job for job in lost if job not in suspects]
            if lost and not suspects:
                raise RunError(f"launcher=local: its processes do not start ({reason})")


def _in_pool(jobs: Sequence[Job], n_jobs: int, gpus: int, folder: Path) -> Results:
    """SIGTERM and SIGINT reach the workers, which save and stop; what waits is not begun."""
    from concurrent.futures import CancelledError, as_completed
    from concurrent.futures.process import BrokenProcessPool

    from joblib.externals.loky import ProcessPoolExecutor

    pool = ProcessPoolExecutor(n_jobs, initializer=_claim_gpu, initargs=(gpus, folder))
    futures = {pool.submit(train_job, job): job for job in jobs}
    stopped = []

    def stop(number: int, frame: Any) -> None:
        stopped.append(number)
        for future in futures:
            future.cancel()
        for process in list(pool._processes.values()):
            os.kill(process.pid, signal.SIGTERM)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        for future in as_completed(futures):
            try:
                outcome = future.result()
            except (BrokenProcessPool, CancelledError) as error:
                outcome = Outcome("killed", reason=_killed(error))
            if stopped and outcome.failed:
                outcome = Outcome("interrupted", reason=f"stopped by signal {stopped[0]}")
            yield futures[future], outcome
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        pool.shutdown(wait=True, kill_workers=True)


def _killed(error: BaseException) -> str:
    names = re.findall(r"SIG[A-Z]+", str(error))
    return f"its process was ended by {names[0]}" if names else "its process ended abruptly"


def _gpus(config: Config) -> int:
    """How many CUDA devices the jobs may share out; 0 where they compute elsewhere."""
    if config.hardware.accelerator not in ("auto", "cuda"):
        return 0
    import torch

    return torch.cuda.device_count()


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


class _SlurmJob:
    """What submitit runs on a node; out of time or preempted, it is queued again as it is."""

    def __call__(self, job: Job) -> Outcome:
        outcome = train_job(job)
        if outcome.status == "interrupted":  # no outcome: Slurm may have queued it again
            raise SystemExit(143)
        return outcome

    def checkpoint(self, job: Job) -> Any:
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


def run_slurm(jobs: Sequence[Job], launcher: SlurmLauncher, folder: Path) -> Results:
    """As a Slurm array, by submitit, whose files go to ``folder``/.slurm."""
    import submitit

    logging.getLogger("submitit").setLevel(logging.ERROR)  # a cluster without accounting is fine
    executor = submitit.SlurmExecutor(folder / ".slurm", max_num_timeout=launcher.requeues)
    executor.update_parameters(**slurm_parameters(launcher, folder.name))
    for job in jobs:
        job.config.hardware.threads = job.config.hardware.threads or launcher.cpus
    with executor.batch():
        submitted = [(executor.submit(_SlurmJob(), job), job) for job in jobs]
    waiting = dict(submitted)
    try:
        for done in submitit.helpers.as_completed(list(waiting), poll_frequency=2):
            error = done.exception()
            lines = (str(error).strip() or "lost").splitlines() if error else []
            outcome = Outcome("killed", reason=f"slurm: {lines[0]}") if error else done.result()
            yield waiting.pop(done), outcome
    finally:
        for left in waiting:  # interrupted: what runs saves and stops
            left.cancel()


def ray_options(launcher: RayLauncher) -> dict[str, Any]:
    """What a run asks of the cluster; it is the study that tries again, not Ray."""
    return {"num_cpus": launcher.cpus, "num_gpus": launcher.gpus, "max_retries": 0}


def run_ray(jobs: Sequence[Job], launcher: RayLauncher) -> Results:
    """As Ray tasks, on the cluster at ``address`` or on one of its own."""
    import ray

    ray.init(address=launcher.address, log_to_driver=False, configure_logging=False)
    try:
        task = ray.remote(**ray_options(launcher))(train_job)
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
