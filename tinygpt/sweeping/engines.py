"""Who does the jobs of a study: this process, joblib's workers, Slurm or Ray.

Every engine takes groups of jobs, those that train as one, and yields each job with its outcome as
soon as it is known, in any order.  A job that fails, diverges or is killed is an outcome like any
other; a process that is killed takes its whole group with it.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
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
from tinygpt.sweeping.jobs import End, Group, StudyJob


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
Engine = Callable[[Sequence[Group], Path], Results]


SHARED_MEMORY = "/dev/shm"


def make_engine(launcher: LauncherConfig) -> Engine:
    """The engine that ``launcher=`` names; it is given groups and a folder for its own files.

    Raises ConfigError where what an engine needs is missing.
    """
    if isinstance(launcher, LocalLauncher):
        if sys.platform == "linux" and not os.access(SHARED_MEMORY, os.W_OK):
            raise ConfigError(
                f"launcher=local: its processes need {SHARED_MEMORY}, which is missing or cannot "
                "be written here; use launcher=serial"
            )
        return lambda groups, folder: run_local(groups, launcher, folder)
    if isinstance(launcher, SlurmLauncher):
        _require("submitit", "slurm")
        if shutil.which("srun") is None:
            raise ConfigError("launcher=slurm: no srun here; start it where Slurm takes jobs")
        return lambda groups, folder: run_slurm(groups, launcher, folder)
    if isinstance(launcher, RayLauncher):
        _require("ray", "ray")
        return lambda groups, folder: run_ray(groups, launcher)
    return lambda groups, folder: run_serial(groups)


def _require(module: str, extra: str) -> None:
    import importlib.util

    if importlib.util.find_spec(module) is None:
        raise ConfigError(f"launcher={extra}: needs {install(extra)}")


_interrupted: list[bool] = []  # a worker that was told to stop begins nothing more


def train_group(group: Group) -> list[Outcome]:
    """Does the jobs without a word to the terminal: each folder has a log of its own."""
    from rich.console import Console

    if _interrupted:
        return [Outcome("interrupted", reason="not begun")] * len(group)
    ends: list[End]
    streams.survive()
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        try:
            with signals.obeyed():
                ends = group[0].do(group, Console(file=nowhere, markup=False))
        except (KeyboardInterrupt, SystemExit) as stop:
            _interrupted.append(True)
            number = stop.code if isinstance(stop, SystemExit) else 130
            return lost(group, "interrupted", f"stopped with exit code {number}")
        except Exception as error:
            ends = [error] * len(group)
    return [outcome_of(job, end) for job, end in zip(group, ends, strict=True)]


def outcome_of(job: StudyJob, end: End, is_new: bool = True) -> Outcome:
    if isinstance(end, Exception):
        return Outcome("failed", reason=_one_line(end))
    return Outcome(end["status"], *job.came_to(end), is_new=is_new)


def lost(group: Group, status: str, reason: str) -> list[Outcome]:
    """How the jobs of a group ended whose process did not; some may have been finished."""
    outcomes = []
    for job in group:
        found = None if job.config.force or len(group) == 1 else job.run.finished(job.hash)
        outcomes.append(outcome_of(job, found) if found else Outcome(status, reason=reason))
    return outcomes


def _one_line(error: BaseException) -> str:
    is_ours = isinstance(error, ConfigError | RunError)
    return " ".join((str(error) if is_ours else f"{type(error).__name__}: {error}").split())


def run_serial(groups: Sequence[Group]) -> Results:
    """Here, one after the other; an interrupt ends them all."""
    for group in groups:
        outcomes = train_group(group)
        yield from zip(group, outcomes, strict=True)
        if any(outcome.status == "interrupted" for outcome in outcomes):
            return


def processes(launcher: LocalLauncher, config: Settings) -> int:
    """How many runs or stacks of them are trained at once."""
    import joblib

    return launcher.n_jobs or _gpus(config) or int(joblib.cpu_count())


class Share(NamedTuple):
    """What a run has of the machine that it trains on."""

    at_once: int  # runs, or stacks of them
    threads: int | None  # CPU threads of each; None: torch's choice


def share_of(config: Settings, groups: int) -> Share:
    """Of each of ``groups`` under its launcher; what ``hardware.threads`` says comes first."""
    launcher, asked = config.launcher, config.hardware.threads
    if isinstance(launcher, LocalLauncher):
        import joblib

        at_once = max(1, min(processes(launcher, config), groups))
        return Share(at_once, asked or max(1, joblib.cpu_count() // at_once))
    if isinstance(launcher, SlurmLauncher):
        return Share(max(1, min(launcher.n_jobs, groups)), asked or launcher.cpus)
    if isinstance(launcher, RayLauncher):  # how many nodes there are is not known here
        return Share(1, asked or launcher.cpus)
    return Share(1, asked)


def run_local(groups: Sequence[Group], launcher: LocalLauncher, folder: Path) -> Results:
    """In processes that stay for the whole study, so that torch is imported once in each.

    The system may kill a process (for its memory, say).  That takes the others down; those that
    had begun then go on alone, one after the other, so that it is seen which one it was.
    """
    config = groups[0][0].config
    gpus, n_jobs = _gpus(config), share_of(config, len(groups)).at_once
    for job in itertools.chain(*groups):
        job.config.hardware.threads = share_of(job.config, len(groups)).threads
    waiting, suspects, interrupted = list(groups), list[Group](), False
    while waiting or suspects:
        batch = suspects[:1] or waiting
        dead: list[Group] = []
        reason = ""
        for group, outcomes in _in_pool(batch, 1 if suspects else n_jobs, gpus, folder):
            killed = [outcome for outcome in outcomes if outcome.status == "killed"]
            if killed and not suspects:
                dead.append(group)
                reason = killed[0].reason
                continue
            yield from zip(group, outcomes, strict=True)
            interrupted = interrupted or any(o.status == "interrupted" for o in outcomes)
        if interrupted:
            return
        if suspects:
            suspects = suspects[1:]
        else:
            suspects = [group for group in dead if any(job.run.log.exists() for job in group)]
            waiting = [group for group in dead if group not in suspects]
            if dead and not suspects:
                raise RunError(f"launcher=local: its processes do not start ({reason})")


def _in_pool(
    groups: Sequence[Group], n_jobs: int, gpus: int, folder: Path
) -> Iterator[tuple[Group, list[Outcome]]]:
    """A signal reaches the workers as SIGTERM: they save and stop; what waits is not begun."""
    from concurrent.futures import CancelledError, as_completed
    from concurrent.futures.process import BrokenProcessPool

    from joblib.externals.loky import ProcessPoolExecutor

    pool = ProcessPoolExecutor(
        n_jobs, initializer=_begin_worker, initargs=(os.getpid(), gpus, folder)
    )
    futures = {pool.submit(train_group, group): group for group in groups}
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
                group = futures[future]
                try:
                    outcomes = future.result()
                except (BrokenProcessPool, CancelledError) as error:
                    outcomes = lost(group, "killed", _killed(error))
                if stopped:
                    told = Outcome("interrupted", reason=f"stopped by signal {stopped[0]}")
                    outcomes = [told if outcome.failed else outcome for outcome in outcomes]
                yield group, outcomes
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

    def __call__(self, group: Group) -> list[Outcome]:
        outcomes = train_group(group)
        if any(outcome.status == "interrupted" for outcome in outcomes):
            raise SystemExit(143)  # no outcome: Slurm may have queued it again
        return outcomes

    def checkpoint(self, group: Group) -> Any:
        import submitit

        return submitit.helpers.DelayedSubmission(self, group)


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


def run_slurm(groups: Sequence[Group], launcher: SlurmLauncher, folder: Path) -> Results:
    """As a Slurm array, by submitit, whose files go to ``folder``/.slurm."""
    import submitit

    logging.getLogger("submitit").setLevel(logging.ERROR)  # a cluster without accounting is fine
    executor = submitit.SlurmExecutor(folder / ".slurm", max_num_timeout=launcher.requeues)
    executor.update_parameters(**slurm_parameters(launcher, folder.name))
    for job in itertools.chain(*groups):
        job.config.hardware.threads = job.config.hardware.threads or launcher.cpus
    try:
        with executor.batch():
            submitted = [(executor.submit(_SlurmJob(), group), group) for group in groups]
    except submitit.core.utils.FailedJobError as refusal:  # an unknown partition, say
        raise RunError(f"launcher=slurm: {str(refusal).strip().splitlines()[0]}") from refusal
    waiting = dict(submitted)
    try:
        for done in submitit.helpers.as_completed(list(waiting), poll_frequency=2):
            group, error = waiting.pop(done), done.exception()
            lines = (str(error).strip() or "lost").splitlines() if error else []
            outcomes = lost(group, "killed", f"slurm: {lines[0]}") if error else done.result()
            yield from zip(group, outcomes, strict=True)
    finally:
        for left in waiting:  # interrupted: what runs saves and stops
            left.cancel()


def ray_options(launcher: RayLauncher) -> dict[str, Any]:
    """What a run asks of the cluster; it is the study that tries again, not Ray."""
    return {"num_cpus": launcher.cpus, "num_gpus": launcher.gpus, "max_retries": 0}


def run_ray(groups: Sequence[Group], launcher: RayLauncher) -> Results:
    """As Ray tasks, on the cluster at ``address`` or on one of its own."""
    import ray

    try:
        ray.init(address=launcher.address, log_to_driver=False, configure_logging=False)
    except ConnectionError as error:
        raise RunError(f"launcher.address={launcher.address}: no Ray cluster there") from error
    try:
        task = ray.remote(**ray_options(launcher))(train_group)
        for job in itertools.chain(*groups):
            job.config.hardware.threads = job.config.hardware.threads or launcher.cpus
        running = {task.remote(group): group for group in groups}
        while running:
            for done in ray.wait(list(running))[0]:
                group = running.pop(done)
                try:
                    outcomes = ray.get(done)
                except ray.exceptions.RayError as error:
                    outcomes = lost(group, "killed", _one_line(error)[:200])
                yield from zip(group, outcomes, strict=True)
    finally:
        ray.shutdown()
