"""Who does the jobs of a study: this process, joblib's workers, Slurm or Ray.

Every engine takes jobs and yields each with its outcome as soon as it is known, in any order.  A
job that fails, diverges or is killed is an outcome like any other.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

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
from tinygpt.sweeping.jobs import Job

SHARED_MEMORY = "/dev/shm"


@dataclass(frozen=True)
class Outcome:
    """How a job ended."""

    status: str  # as in results.json, or failed, killed, interrupted
    metric: float | None = None  # the headline metric: a validation loss, a reward
    method: str = ""  # whose reward it is
    reason: str = ""  # one line, for what did not end well
    is_new: bool = True  # False: an earlier command finished it

    @property
    def failed(self) -> bool:
        return self.status in ("failed", "killed", "interrupted")

    @property
    def value(self) -> float:
        """Return what a sweeper minimizes; a diverged run is as bad as can be."""
        return math.inf if self.metric is None else self.metric

    @property
    def shown(self) -> str:
        if self.metric is None:
            return ""
        return f"{self.method} {self.metric:+.2f}" if self.method else f"{self.metric:.4f}"


Results = Iterator[tuple[Job, Outcome]]


def check_engine(launcher: LauncherConfig) -> None:
    """Raise ConfigError where what the engine named by ``launcher=`` needs is missing."""
    kind = launcher.kind
    if kind == "local" and sys.platform == "linux" and not os.access(SHARED_MEMORY, os.W_OK):
        raise ConfigError(
            f"launcher=local: its processes need {SHARED_MEMORY}, which is missing or cannot "
            "be written here; use launcher=serial"
        )
    module = {"slurm": "submitit", "ray": "ray"}.get(kind)
    if module and importlib.util.find_spec(module) is None:
        raise ConfigError(f"launcher={kind}: needs {install(kind)}")
    if kind == "slurm" and shutil.which("srun") is None:
        raise ConfigError("launcher=slurm: no srun here; start it where Slurm takes jobs")


def run_jobs(jobs: Sequence[Job], folder: Path) -> Results:
    """Do the jobs with the engine named by ``launcher=``, whose own files go to ``folder``."""
    for job in jobs:
        job.config.hardware.threads = share_of(job.config, len(jobs)).threads
    engines: dict[str, Callable[..., Results]] = {"serial": run_serial, "local": run_local}
    engines |= {"slurm": run_slurm, "ray": run_ray}
    launcher = jobs[0].config.launcher
    return engines[launcher.kind](jobs, launcher, folder)


class Share(NamedTuple):
    """What a run has of the machine that it trains on."""

    at_once: int  # runs
    threads: int | None  # CPU threads of each; None: torch's choice


def share_of(config: Settings, jobs: int) -> Share:
    """Return how many of ``jobs`` run at once and the threads of each, as given or as it pays."""
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


def _gpus(config: Settings) -> int:
    """Return how many CUDA devices the jobs may share out; 0 where they compute elsewhere."""
    if config.hardware.accelerator not in ("auto", "cuda"):
        return 0
    import torch

    return torch.cuda.device_count()


_interrupted: list[bool] = []  # a worker that was told to stop begins nothing more


def do_job(job: Job) -> Outcome:
    """Do the job without a word to the terminal: its folder has a log of its own."""
    if _interrupted:
        return Outcome("interrupted", reason="not begun")
    streams.survive()
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        try:
            with signals.obeyed():
                return outcome_of(job, job.kind.run(job, Console(file=nowhere, markup=False)))
        except (KeyboardInterrupt, SystemExit) as stop:
            _interrupted.append(True)
            code = stop.code if isinstance(stop, SystemExit) else 130
            return Outcome("interrupted", reason=f"stopped with exit code {code}")
        except Exception as error:
            return Outcome("failed", reason=_one_line(error))


def outcome_of(job: Job, results: Mapping[str, Any], is_new: bool = True) -> Outcome:
    return Outcome(results["status"], *job.kind.headline(results), is_new=is_new)


def _one_line(error: BaseException) -> str:
    is_ours = isinstance(error, ConfigError | RunError)
    return " ".join((str(error) if is_ours else f"{type(error).__name__}: {error}").split())


def run_serial(jobs: Sequence[Job], launcher: LauncherConfig, folder: Path) -> Results:
    """Do them here, one after the other; an interrupt ends them all."""
    for job in jobs:
        outcome = do_job(job)
        yield job, outcome
        if outcome.status == "interrupted":
            return


def run_local(jobs: Sequence[Job], launcher: LocalLauncher, folder: Path) -> Results:
    """Do them in processes that stay for the whole study, so that each imports torch once.

    The system may kill a process (for its memory, say).  That takes the others down; those that
    had begun are then done one at a time, so that it is seen which one it was.
    """
    gpus = _gpus(jobs[0].config)
    at_once = share_of(jobs[0].config, len(jobs)).at_once
    waiting, interrupted = list(jobs), False
    while waiting and not interrupted:
        lost, reason = list[Job](), ""
        for job, outcome in _in_pool(waiting, at_once, gpus, folder):
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
                ((job, outcome),) = _in_pool([suspect], 1, gpus, folder)
                yield job, outcome
                interrupted = outcome.status == "interrupted"
        waiting = [job for job in lost if job not in suspects]


def _in_pool(jobs: Sequence[Job], n_jobs: int, gpus: int, folder: Path) -> Results:
    """Do them in processes of loky, which name the signal that ended one.

    A signal reaches the workers as SIGTERM: they save and stop; what waits is not begun.
    """
    from concurrent.futures import CancelledError, as_completed
    from concurrent.futures.process import BrokenProcessPool

    from joblib.externals.loky import ProcessPoolExecutor

    begun_with = (os.getpid(), gpus, folder)
    pool = ProcessPoolExecutor(n_jobs, initializer=_begin_worker, initargs=begun_with)
    futures = {pool.submit(do_job, job): job for job in jobs}
    stopped = []

    def stop(number: int) -> None:
        stopped.append(number)
        for future in futures:
            future.cancel()
        for process in multiprocessing.active_children():
            process.terminate()

    try:
        with signals.handled(stop):
            for future in as_completed(futures):
                try:
                    outcome = future.result()
                except (BrokenProcessPool, CancelledError) as error:
                    names = re.findall(r"SIG[A-Z]+", str(error))
                    how = f"was ended by {names[0]}" if names else "ended abruptly"
                    outcome = Outcome("killed", reason=f"its process {how}")
                if stopped and outcome.failed:
                    outcome = Outcome("interrupted", reason=f"stopped by signal {stopped[0]}")
                yield futures[future], outcome
    finally:
        pool.shutdown(wait=True, kill_workers=True)


_worker = contextlib.ExitStack()  # what a worker holds for as long as it lives


def _begin_worker(parent: int, gpus: int, folder: Path) -> None:
    _claim_gpu(gpus, folder)  # before torch is imported
    for number in signals.STOPPING:  # a terminal's reach the study too, which sends SIGTERM
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _worker.enter_context(signals.handled(lambda number: _interrupted.append(True)))

    from tinygpt.training.trainer import leave_with_parent

    leave_with_parent(parent)  # its runs would be locked for whoever resumes the study


def _claim_gpu(gpus: int, folder: Path) -> None:
    """Give this process a GPU that no other worker has, for as long as it lives."""
    import filelock

    for number in range(gpus):
        with contextlib.suppress(filelock.Timeout):
            lock = filelock.FileLock(folder / f".gpu-{number}.lock", timeout=0)
            _worker.enter_context(lock)
            os.environ["CUDA_VISIBLE_DEVICES"] = str(number)
            return


class _SlurmJob:
    """What submitit runs on a node; out of time or preempted, it is queued again as it is."""

    def __call__(self, job: Job) -> Outcome:
        outcome = do_job(job)
        if outcome.status == "interrupted":
            raise SystemExit(143)  # no outcome: Slurm may have queued it again
        return outcome

    def checkpoint(self, job: Job) -> Any:
        import submitit

        return submitit.helpers.DelayedSubmission(self, job)


def slurm_parameters(launcher: SlurmLauncher, study: str) -> dict[str, Any]:
    """Return what sbatch is asked for, in the words of submitit's SlurmExecutor."""
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
    """Do them as a Slurm array, by submitit, whose files go to ``folder``/.slurm."""
    import submitit

    logging.getLogger("submitit").setLevel(logging.ERROR)  # a cluster without accounting is fine
    executor = submitit.SlurmExecutor(folder / ".slurm", max_num_timeout=launcher.requeues)
    executor.update_parameters(**slurm_parameters(launcher, folder.name))
    try:
        with executor.batch():
            submitted = [(executor.submit(_SlurmJob(), job), job) for job in jobs]
    except submitit.core.utils.FailedJobError as refusal:  # an unknown partition, say
        raise RunError(f"launcher=slurm: {str(refusal).strip().splitlines()[0]}") from refusal
    waiting = dict(submitted)
    try:
        for done in submitit.helpers.as_completed(list(waiting), poll_frequency=2):
            job, error = waiting.pop(done), done.exception()
            if error:
                line = (str(error).strip() or "lost").splitlines()[0]
                yield job, Outcome("killed", reason=f"slurm: {line}")
            else:
                yield job, done.result()
    finally:
        for left in waiting:  # interrupted: what runs saves and stops
            left.cancel()


def ray_options(launcher: RayLauncher) -> dict[str, Any]:
    """Return what a run asks of the cluster; it is the study that tries again, not Ray."""
    return {"num_cpus": launcher.cpus, "num_gpus": launcher.gpus, "max_retries": 0}


def run_ray(jobs: Sequence[Job], launcher: RayLauncher, folder: Path) -> Results:
    """Do them as Ray tasks, on the cluster at ``address`` or on one of its own."""
    import ray

    try:
        ray.init(address=launcher.address, log_to_driver=False, configure_logging=False)
    except ConnectionError as error:
        raise RunError(f"launcher.address={launcher.address}: no Ray cluster there") from error
    try:
        task = ray.remote(**ray_options(launcher))(do_job)
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
