"""Which runs of a study train as one (``sweep.stack``)."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence

from tinygpt import rundir
from tinygpt.config import LocalLauncher
from tinygpt.sweeping.engines import processes
from tinygpt.sweeping.jobs import Job

Stack = tuple[Job, ...]

# Parameters times tokens of a pass above which a lone run keeps the device busy.  Measured on a
# CPU, one thread, 8 runs of the default model: x2.0 at 1e7, x1.6 at 2e7, x1.5 at 5e7, x1.1 at 1e8.
# That of a GPU is reckoned from the time of its launches, not measured.
WORK = {"cpu": 6e7, "cuda": 3e10}
MOST = {"cpu": 8, "cuda": 16}  # runs in a stack that was not given a number


def groups(jobs: Sequence[Job], say: Callable[[str], None]) -> list[Stack]:
    """The jobs in the groups to train them in; says in a line why some were not stacked."""
    asked = jobs[0].config.sweep.stack
    if asked == "off":
        return [(job,) for job in jobs]
    obstacles = {job: _obstacle(job) for job in jobs}
    families: dict[str, list[Job]] = {}
    for job in jobs:
        alone = obstacles[job] or (asked == "auto" and not _pays(job))
        families.setdefault(job.hash if alone else _family(job), []).append(job)
    found = []
    for family in families.values():
        most = _most(family[0], len(jobs)) if asked == "auto" else int(asked)
        found += _cut(family, most)
    if asked != "auto":
        reasons = Counter(
            obstacles[group[0]] or "no other run differs in seed or learning rate alone"
            for group in found
            if len(group) == 1
        )
        for reason, count in reasons.items():
            runs = "1 run trains" if count == 1 else f"{count} runs train"
            say(f"sweep.stack={asked}: {runs} alone: {reason}")
    return found


def could_stack(jobs: Sequence[Job]) -> int:
    """How many of these runs ``sweep.stack=auto`` would train as one with others."""
    families = Counter(_family(job) for job in jobs if _obstacle(job) is None and _pays(job))
    return sum(count for count in families.values() if count > 1)


def _cut(family: Sequence[Job], most: int) -> list[Stack]:
    """Into as few groups as can be, of about the same size."""
    count = math.ceil(len(family) / most)
    ends = [round(n * len(family) / count) for n in range(count + 1)]
    return [tuple(family[a:b]) for a, b in itertools.pairwise(ends)]


def _family(job: Job) -> str:
    """Equal for jobs that differ in seed, learning rate and names alone."""
    config = job.config
    optim = dataclasses.replace(config.optim, learning_rate=1.0)
    alike = dataclasses.replace(config, optim=optim, seed=0, study=None, run_name=None)
    places = [alike.hardware, alike.logger, alike.output_dir, alike.cache_dir, alike.force]
    return f"{rundir.config_hash(alike, job.content)} {places}"


def _obstacle(job: Job) -> str | None:
    """Why a job cannot be stacked."""
    config, kind = job.config, _device(job)
    obstacles = {
        f"optim={config.optim.kind}, not adamw": config.optim.kind != "adamw",
        f"model.dropout={config.model.dropout}, not 0": config.model.dropout > 0,
        f"optim.lora.rank={config.optim.lora.rank}": config.optim.lora.rank is not None,
        "model.gradient_checkpointing=true": config.model.gradient_checkpointing,
        f"hardware.compile={config.hardware.compile}": config.hardware.compile
        not in ("auto", "off"),
        f"hardware.accelerator={kind}, not cpu or cuda": kind not in MOST,
        "train.skip_nonfinite=true": config.train.skip_nonfinite,
        "train.precision=16-mixed": job.row["precision_resolved"] == "16-mixed",
        "sweep.share_trunk=true": job.trunk is not None or bool(job.keep_at),
    }
    return next((words for words, holds in obstacles.items() if holds), None)


def _pays(job: Job) -> bool:
    assert job.plan is not None
    tokens = job.plan.micro_batch_size * job.config.model.max_seq_len
    return float(tokens * job.row["model_parameters"]) <= WORK[_device(job)]


def _most(job: Job, total: int) -> int:
    """No more than leaves every process of the study a group of its own."""
    launcher = job.config.launcher
    at_once = processes(launcher, job.config) if isinstance(launcher, LocalLauncher) else 1
    return min(MOST[_device(job)], max(1, total // at_once)) if _device(job) in MOST else 1


def _device(job: Job) -> str:
    from tinygpt.training.trainer import resolve_device

    return resolve_device(job.config.hardware, job.config.train.precision).accelerator
