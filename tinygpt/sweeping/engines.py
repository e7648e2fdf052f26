"""Choose the engine that runs the jobs of a study: this machine, Slurm or Ray.

An engine takes jobs one by one and yields each with its outcome as soon as it ends, in any order.
A job that fails, diverges or is killed has an outcome like any other.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tinygpt import fileio
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
from tinygpt.data.survey import many
from tinygpt.sweeping.jobs import Job
from tinygpt.sweeping.workers import (
    Outcome,
    Results,
    Workers,
    do_job,
    one_line,
    run_local,
    run_serial,
)

SHARED_MEMORY = "/dev/shm"
SMALL = 20_000_000  # parameters without embeddings: below, a GPU trains several models at once
ON_A_GPU = 4
Engine = Callable[[Iterable[Job], Path], Results]  # the folder is for its own files


def check_engine(launcher: LauncherConfig) -> None:
    """Raise ConfigError if something that the engine needs is missing."""
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
    """Name the engine of a study, and the share of the machine that each run gets."""

    engine: str  # serial, local, slurm or ray
    at_once: int  # runs
    threads: int | None  # CPU threads of each; None: torch's choice
    gpus: int = 0  # that the local runs divide between them
    settle: Callable[[], object] = lambda: None  # waits until all processes have started

    @property
    def words(self) -> str:
        how = "one after the other" if self.at_once == 1 else f"{self.at_once} at once"
        return f"{how}, {many(self.threads, 'thread')} each" if self.threads else how


def share_of(jobs: Sequence[Job], study: int = 0) -> Share:
    """Return the engine, the number of runs at once and their threads, for a ``study`` of so many.

    ``launcher=auto`` means ``local`` where several can train at once, else ``serial``.  On a CPU
    all three give a run the same number of threads, however much of the study is left, because
    losses depend on it.
    """
    config, count = jobs[0].config, len(jobs)
    launcher, asked = config.launcher, config.hardware.threads
    if isinstance(launcher, SlurmLauncher):
        return Share("slurm", max(1, min(launcher.n_jobs, count)), asked or launcher.cpus)
    if isinstance(launcher, RayLauncher):  # the number of nodes is unknown here
        return Share("ray", 1, asked or launcher.cpus)
    if max(count, study) == 1 and launcher.kind != "local":
        return Share("serial", 1, asked)  # the run chooses its threads
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
    """Return the kind of device and the number of CUDA devices."""
    if config.hardware.accelerator == "cpu":
        return "cpu", 0
    import torch

    from tinygpt.runs.load import usable_device

    kind = usable_device(config.hardware.accelerator, "hardware.accelerator").type
    return kind, torch.cuda.device_count() if kind == "cuda" else 0


def _fit_on_a_gpu(jobs: Sequence[Job]) -> int:
    """Return how many runs one GPU trains at once: several if all models are small."""
    models = [job.config.model for job in jobs if isinstance(job.config, Config)]
    small = [count_parameters(model, 0).non_embedding < SMALL for model in models]
    return ON_A_GPU if len(small) == len(jobs) and all(small) else 1


@contextlib.contextmanager
def ready(jobs: Sequence[Job], study: int = 0) -> Iterator[tuple[Share, Engine]]:
    """Yield the share of each run and the engine for ``jobs``; see ``share_of``.

    Local processes start at once, to import torch while data is prepared, and stay to the end.
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
            lean = not any(getattr(job.config, "callbacks", None) for job in jobs)
            workers = stack.enter_context(Workers(share.at_once, share.gpus, lean))
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
    """Return the threads of a job: those it began with if it resumes, for the same bits."""
    config = job.config
    if config.hardware.threads is None and job.run.last.exists() and not config.force:
        begun: int | None = fileio.read_json(job.run.environment).get("threads")
        return begun or share.threads
    return share.threads


class _SlurmJob:
    """Run a job on a node; submitit queues it again when preempted or out of time."""

    def __call__(self, job: Job) -> Outcome:
        outcome = do_job(job)
        if outcome.status == "interrupted":
            raise SystemExit(143)  # no outcome: Slurm may have queued it again
        return outcome

    def checkpoint(self, job: Job) -> Any:
        import submitit

        return submitit.helpers.DelayedSubmission(self, job)


def slurm_parameters(launcher: SlurmLauncher, study: str) -> dict[str, Any]:
    """Return the parameters of submitit's SlurmExecutor."""
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
    """Run jobs as a Slurm array through submitit, whose files go to ``folder``/.slurm."""
    import submitit

    logging.getLogger("submitit").setLevel(logging.ERROR)  # a cluster without accounting is fine
    executor = submitit.SlurmExecutor(folder / ".slurm", max_num_timeout=launcher.requeues)
    executor.update_parameters(**slurm_parameters(launcher, folder.name))
    try:
        with executor.batch():
            submitted = [(executor.submit(_SlurmJob(), job), job) for job in jobs]
    except submitit.core.utils.FailedJobError as refusal:  # such as an unknown partition
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
        for left in waiting:  # interrupted: running jobs save and stop
            left.cancel()


def ray_options(launcher: RayLauncher) -> dict[str, Any]:
    """Return the resources of a run; the study retries runs, so Ray must not."""
    return {"num_cpus": launcher.cpus, "num_gpus": launcher.gpus, "max_retries": 0}


def run_ray(jobs: Iterable[Job], launcher: RayLauncher) -> Results:
    """Run jobs as Ray tasks, on the cluster at ``address`` or on a new local one."""
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
                    outcome = Outcome("killed", reason=one_line(error)[:200])
                yield running.pop(done), outcome
    finally:
        ray.shutdown()
