"""Do the jobs of a study: in this process, in joblib's workers, on Slurm or Ray.

Every engine takes jobs and yields each with its outcome as soon as it is known, in any order.  A
job that fails, diverges or is killed is an outcome like any other.  Jobs are asked for one by one.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import logging
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from tinygpt import fileio, signals, streams
from tinygpt.config import (
    Config,
    ConfigError,
    LauncherConfig,
    RayLauncher,
    RunError,
    Settings,
    SlurmLauncher,
    install,
)
from tinygpt.config.counting import count_parameters
from tinygpt.sweeping.jobs import Job

SHARED_MEMORY = "/dev/shm"
SMALL = 20_000_000  # parameters without embeddings: of such models a GPU trains several at once
ON_A_GPU = 4


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
Engine = Callable[[Iterable[Job], Path], Results]  # given a folder for its own files


def check_engine(launcher: LauncherConfig) -> None:
    """Raise ConfigError where what the engine named by ``launcher=`` needs is missing."""
    kind = launcher.kind
    if kind == "local" and not _has_shared_memory():
        raise ConfigError(
            f"launcher=local: its processes need {SHARED_MEMORY}, which is missing or cannot "
            "be written here; use launcher=serial"
        )
    module = {"slurm": "submitit", "ray": "ray"}.get(kind)
    if module and importlib.util.find_spec(module) is None:
        raise ConfigError(f"launcher={kind}: needs {install(kind)}")
    if kind == "slurm" and shutil.which("srun") is None:
        raise ConfigError("launcher=slurm: no srun here; start it where Slurm takes jobs")


def _has_shared_memory() -> bool:
    return sys.platform != "linux" or os.access(SHARED_MEMORY, os.W_OK)


class Share(NamedTuple):
    """Says who does the jobs, and what a run has of the machine that it trains on."""

    engine: str  # serial, local, slurm or ray
    at_once: int  # runs
    threads: int | None  # CPU threads of each; None: torch's choice
    gpus: int = 0  # that the runs of this machine share out
    settle: Callable[[], object] = lambda: None  # waits until all processes have started

    @property
    def words(self) -> str:
        how = "one after the other" if self.at_once == 1 else f"{self.at_once} at once"
        if self.threads:
            how += f", {self.threads} thread{'' if self.threads == 1 else 's'} each"
        return how


def share_of(jobs: Sequence[Job], study: int = 0) -> Share:
    """Return who does the jobs, of so many in the ``study``, how many at once, and the threads of
    each: as asked, or as it pays.

    ``launcher=auto`` is ``local`` where several can train at once, else ``serial``.  On a CPU all
    three give a run the same threads, whatever is left of the study: losses hang on their number.
    """
    config, count = jobs[0].config, len(jobs)
    launcher, asked = config.launcher, config.hardware.threads
    if isinstance(launcher, SlurmLauncher):
        return Share("slurm", max(1, min(launcher.n_jobs, count)), asked or launcher.cpus)
    if isinstance(launcher, RayLauncher):  # how many nodes there are is not known here
        return Share("ray", 1, asked or launcher.cpus)
    if max(count, study) == 1 and launcher.kind != "local":
        return Share("serial", 1, asked)  # which chooses its threads
    import joblib

    (kind, gpus), cores = _device(config), joblib.cpu_count()
    n_jobs, per_gpu = (getattr(launcher, name, None) for name in ("n_jobs", "per_gpu"))
    most = n_jobs or cores
    if kind == "cuda" and not n_jobs:
        most = gpus * (per_gpu or max(1, min(_fit_on_a_gpu(jobs), cores // gpus)))
    at_once = max(1, min(most, count))
    threads = asked or max(1, cores // min(most, max(count, study)))
    can = at_once > 1 and kind != "mps" and _has_shared_memory()
    if launcher.kind == "local" or (launcher.kind == "auto" and can):
        return Share("local", at_once, threads, gpus)
    return Share("serial", 1, threads if kind == "cpu" else asked)


def _device(config: Settings) -> tuple[str, int]:
    """Return the kind of device that the jobs compute on, and how many CUDA devices there are."""
    if config.hardware.accelerator == "cpu":
        return "cpu", 0
    import torch

    from tinygpt.runs.load import usable_device

    kind = usable_device(config.hardware.accelerator, "hardware.accelerator").type
    return kind, torch.cuda.device_count() if kind == "cuda" else 0


def _fit_on_a_gpu(jobs: Sequence[Job]) -> int:
    """Return how many runs one GPU trains at once: several of small models, which leave it idle."""
    models = [job.config.model for job in jobs if isinstance(job.config, Config)]
    small = [count_parameters(model, 0).non_embedding < SMALL for model in models]
    return ON_A_GPU if len(small) == len(jobs) and all(small) else 1


@contextlib.contextmanager
def ready(jobs: Sequence[Job], study: int = 0) -> Iterator[tuple[Share, Engine]]:
    """Yield the share of each run and the engine, for ``jobs`` or some; arguments as ``share_of``.

    Processes of this machine start at once and import torch while data is prepared; they stay
    until the end, so that each imports it once.
    """
    share = share_of(jobs, study)
    launcher = jobs[0].config.launcher
    with contextlib.ExitStack() as stack:
        engines: dict[str, Engine] = {
            "serial": lambda jobs, folder: run_serial(jobs),
            "slurm": lambda jobs, folder: run_slurm(jobs, launcher, folder),
            "ray": lambda jobs, folder: run_ray(jobs, launcher),
        }
        if share.engine == "local":
            workers = stack.enter_context(Workers(share.at_once, share.gpus))
            engines["local"] = lambda jobs, folder: run_local(jobs, workers)
            share = share._replace(settle=workers.settle)

        def with_threads(jobs: Iterable[Job]) -> Iterator[Job]:
            for job in jobs:
                job.config.hardware.threads = _threads_of(job, share)
                yield job

        def run(jobs: Iterable[Job], folder: Path) -> Results:
            return engines[share.engine](with_threads(jobs), folder)

        yield share, run


def _threads_of(job: Job, share: Share) -> int | None:
    """Return the threads of a job: those it began with, so that it resumes with the same bits."""
    config = job.config
    if config.hardware.threads is None and job.run.last.exists() and not config.force:
        begun: int | None = fileio.read_json(job.run.environment).get("threads")
        return begun or share.threads
    return share.threads


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


def run_serial(jobs: Iterable[Job]) -> Results:
    """Do them here, one after the other; an interrupt ends them all."""
    for job in jobs:
        outcome = do_job(job)
        yield job, outcome
        if outcome.status == "interrupted":
            return


class Workers:
    """Holds processes of loky, which names the signal that ended one.

    A signal reaches them as SIGTERM: they save and stop; what waits is not begun.
    """

    def __init__(self, at_once: int, gpus: int = 0) -> None:
        self.at_once, self.gpus = at_once, gpus
        self._pool: Any = None

    def __enter__(self) -> Workers:
        self._folder = tempfile.TemporaryDirectory()
        self._start()
        return self

    def __exit__(self, *error: object) -> None:
        handed = (all(one.running() or one.done() for one in self._begun) for _ in range(200))
        while not next(handed, True):  # loky's thread fails if it is shut down before
            time.sleep(0.01)
        self._pool.shutdown(wait=True, kill_workers=True)
        self._folder.cleanup()

    def settle(self) -> None:
        """Wait until every process has imported what it needs."""
        for one in self._begun:
            one.exception()

    def _start(self) -> None:
        from joblib.externals.loky import ProcessPoolExecutor

        begun_with = (os.getpid(), self.at_once, self.gpus, Path(self._folder.name))
        self._pool = ProcessPoolExecutor(
            self.at_once, initializer=_begin_worker, initargs=begun_with
        )
        with signals.not_for_children():
            self._begun = [self._pool.submit(os.getpid) for _ in range(self.at_once)]

    def do(self, jobs: Iterator[Job]) -> Results:
        """Do the jobs; once a process was killed, which takes all down, no more are asked for."""
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
                        outcome = Outcome("interrupted", reason=f"stopped by signal {stopped[0]}")
                    yield futures.pop(future), outcome
                if not (broken or stopped):
                    fill()
        if broken and not stopped:
            self._restart()

    def _restart(self) -> None:
        self._pool.shutdown(wait=True, kill_workers=True)
        self._start()


def run_local(jobs: Iterable[Job], workers: Workers) -> Results:
    """Do them in processes of this machine.

    The system may kill a process (for its memory, say).  That takes the others down; those that
    had begun are then done one at a time, so that it is seen which one it was.
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


_worker = contextlib.ExitStack()  # what a worker holds for as long as it lives


def _begin_worker(parent: int, at_once: int, gpus: int, folder: Path) -> None:
    if gpus:
        _claim_gpu(at_once, gpus, folder)  # before torch is imported
    for number in signals.STOPPING:  # a terminal's reach the study too, which sends SIGTERM
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _worker.enter_context(signals.handled(lambda number: _interrupted.append(True)))

    from tinygpt.training.trainer import leave_with_parent

    leave_with_parent(parent)  # its runs would be locked for whoever resumes the study


def _claim_gpu(at_once: int, gpus: int, folder: Path) -> None:
    """Give this process one of ``at_once`` places on the GPUs, for as long as it lives."""
    import filelock

    for place in range(at_once):
        with contextlib.suppress(filelock.Timeout):
            lock = filelock.FileLock(folder / f"gpu-{place}.lock", timeout=0)
            _worker.enter_context(lock)
            os.environ["CUDA_VISIBLE_DEVICES"] = str(place % gpus)
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


def run_slurm(jobs: Iterable[Job], launcher: SlurmLauncher, folder: Path) -> Results:
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


def run_ray(jobs: Iterable[Job], launcher: RayLauncher) -> Results:
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
