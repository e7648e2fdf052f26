"""Trainings as jobs of a study: prepared, done, followed, and their law at the end."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from tinygpt import fileio, rundir
from tinygpt.config import Config, ConfigError, WsdSchedule
from tinygpt.sweeping.jobs import Job


def prepare(jobs: Sequence[Job], console: Console) -> None:
    """Checks machine and data of every job, prepares each corpus once and plans every run."""
    from tinygpt.data import corpora, shards
    from tinygpt.data.survey import Survey
    from tinygpt.training.console import preparing
    from tinygpt.training.results import planned
    from tinygpt.training.session import open_data, open_machine

    prepared: dict[str, shards.Prepared] = {}
    with preparing(console) as progress:
        for job in jobs:
            config = job.config
            device = open_machine(config)
            source = f"{config.data} {config.tokenizer}"
            if source not in prepared:
                corpus, cache = (
                    corpora.open_corpus(config.data),
                    shards.cache_root(config.cache_dir),
                )
                prepared[source] = shards.prepare(
                    corpus, config.data, config.tokenizer, cache, progress
                )
            data = open_data(config, prepared[source], device)
            assert data.plan is not None
            job.plan = data.plan
            job.row = planned(config, data, device)
            job.val_tokens = data.splits["val"].info["tokens"]
    surveys = [one.index["survey"] for one in prepared.values() if jobs[0].config.plan]
    for line in [line for found in surveys if found for line in Survey.read(found).lines()]:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def share_trunks(jobs: Sequence[Job], done: Container[Job]) -> None:
    """Ties runs that differ in their length alone to one that has, or will leave, their state.

    That is a longer one among those ``done``, where it has kept the step, else the longest that
    is to be trained.  Raises ConfigError where the schedule does not allow it.
    """
    families: dict[str, list[Job]] = {}
    for job in jobs:
        families.setdefault(_without_length(job), []).append(job)
    for family in families.values():
        ended = [job for job in family if job in done]
        branch_steps = {job: _stable_steps(job) for job in family if job not in done}
        alone = []
        for job, step in branch_steps.items():
            kept = (one.run for one in ended if _length(one) > _length(job))
            job.trunk = next((run for run in kept if run.step(step).exists()), None)
            if not job.trunk:
                alone.append(job)
        if alone:
            trunk = alone.pop(alone.index(max(alone, key=_length)))
            trunk.keep_at += [branch_steps[job] for job in alone]
            for job in alone:
                job.trunk = trunk.run
        for job, step in branch_steps.items():
            job.branch_step = step if job.trunk else 0


def _length(job: Job) -> int:
    return int(job.row["total_steps"])


def _stable_steps(job: Job) -> int:
    """Where its decay begins."""
    from tinygpt.training.optim import stable_steps

    schedule, plan = job.config.schedule, job.plan
    if not isinstance(schedule, WsdSchedule) or schedule.warmup_steps is None:
        raise ConfigError("sweep.share_trunk=true: needs schedule=wsd, schedule.warmup_steps")
    assert plan is not None
    return stable_steps(schedule, total_steps=plan.total_steps, warmup_steps=plan.warmup_steps)


def _without_length(job: Job) -> str:
    train = dataclasses.replace(
        job.config.train, tokens=1, steps=None, epochs=None, tokens_per_param=None, flops=None
    )
    config: Config = dataclasses.replace(job.config, train=train)
    return rundir.effective_hash(config, job.content)


def train(job: Job, console: Console) -> dict[str, Any]:
    """Train a run and return its results."""
    from tinygpt.training.branching import Branch
    from tinygpt.training.session import train

    try:
        branch = Branch(job.trunk, job.branch_step, tuple(job.keep_at))
        return train(job.config, list(job.overrides), console, branch)
    finally:
        gc.collect()  # a trainer and its callbacks go in circles, with every shard open


def progress(job: Job) -> tuple[float, str]:
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


def fit(folder: Path, console: Console) -> None:
    """The law of a study with its report, or one line that says why there is none."""
    from tinygpt.scaling import Columns, analyse, load_runs, report
    from tinygpt.scaling.runs import comparable, curves_of

    columns = Columns()
    try:
        table = load_runs(folder)
        used, left_out = comparable(table, columns.loss)
        analysis = analyse(used, left_out, columns, curves=curves_of(table))
    except ConfigError as error:
        console.print(f"law        none: {error}", highlight=False, soft_wrap=True)
        return
    report.write(analysis, folder / "fit")
    show_fit(folder, console)


def show_fit(folder: Path, console: Console) -> None:
    """The law that ``fit/`` holds, whether it can be relied on, and where its report lies."""
    from tinygpt.scaling import wording
    from tinygpt.scaling.laws import LAWS

    found = fileio.read_json(folder / "fit" / "fit.json")
    law, values = LAWS[found["law"]], {k: of["estimate"] for k, of in found["parameters"].items()}
    for name in law.coefficients:
        law = law.without(name) if values[name] == 0 else law  # a term that went to zero
    failed = sum(check["passed"] is False for check in found["checks"])
    many = "a check fails" if failed == 1 else f"{failed} checks fail"
    verdict = f"not evidence yet: {many}" if failed else "every check that applies passed"
    words = wording.variables({name: of["meaning"] for name, of in found["variables"].items()})
    line = f"law        {wording.equation(law, values)}, {words}  ({verdict})"
    console.print(line, highlight=False, soft_wrap=True)
    report = folder / "fit" / "report.html"
    console.print(f"report     {report}", highlight=False, soft_wrap=True)
