"""A study from its jobs to its table: plan, check, skip, prepare, train, sum up."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from tinygpt import rundir
from tinygpt.config import Config, ConfigError, WsdSchedule
from tinygpt.sweeping import stacking
from tinygpt.sweeping.engines import Engine, Outcome, make_engine
from tinygpt.sweeping.jobs import Job, compose_jobs
from tinygpt.sweeping.view import View


def run_study(job_overrides: Sequence[Sequence[str]]) -> list[Outcome]:
    """Trains what is not finished of these jobs; the outcome of each, in their order.

    Raises ConfigError for a mistake in any job before one of them begins, SystemExit(130) where
    the study was interrupted.
    """
    console = Console()
    jobs = compose_jobs(job_overrides)

    from tinygpt.sweeping import summary  # pandas: after the mistakes are known

    settings = jobs[0].config
    outcomes: dict[Job, Outcome] = {job: found for job in jobs if (found := _finished(job))}
    pending = [job for job in jobs if job not in outcomes]
    if settings.plan:
        from tinygpt.sweeping.planning import print_plan

        _prepare(jobs, console)
        if settings.sweep.share_trunk:
            share_trunks(jobs)
        print_plan(jobs, outcomes, console)
        return [Outcome("planned")] * len(jobs)
    if pending:
        engine = make_engine(settings.launcher)
        _prepare(pending, console)
        if settings.sweep.share_trunk:
            share_trunks(pending)
        if settings.launcher.kind != "serial":  # longest first: none is left alone at the end
            pending.sort(key=lambda job: -job.row["flops_exact"])
    folders = list(dict.fromkeys(job.run.path.parent for job in jobs))
    with contextlib.ExitStack() as alone:
        for folder in folders:
            alone.enter_context(rundir.locked(folder, folder.parent, "study"))
        if pending:
            _train(jobs, pending, outcomes, engine, console)
        for folder in folders:
            summary.write(folder)
        summary.print_table(jobs, outcomes, console)
        if len(outcomes) < len(jobs) or _is_interrupted(outcomes):
            console.print("interrupted; the same command goes on from there", highlight=False)
            raise SystemExit(130)
        if settings.fit and len(jobs) > 1:
            for folder in folders:
                if pending or not _is_fitted(folder):
                    _fit(folder, console)
    return [outcomes[job] for job in jobs]


def _train(
    jobs: Sequence[Job],
    pending: Sequence[Job],
    outcomes: dict[Job, Outcome],
    engine: Engine,
    console: Console,
) -> None:
    """Trains ``pending``, of ``jobs``, and puts down how each ended in ``outcomes``."""
    folder = pending[0].run.path.parent
    stages = [job for job in pending if not job.trunk], [job for job in pending if job.trunk]

    def say(line: str) -> None:
        console.print(line, highlight=False, soft_wrap=True)

    units = [stacking.groups(stage, say) for stage in stages if stage]
    with View(pending, len(jobs), console) as view:
        for groups in units:
            for job, outcome in engine(groups, folder):
                outcomes[job] = outcome
                if outcome.status == "killed" and job.run.environment.exists():
                    rundir.write_json(job.run.error, {"error": outcome.reason})
                view.ended(job, outcome)
            if _is_interrupted(outcomes):
                break


def _is_interrupted(outcomes: Mapping[Job, Outcome]) -> bool:
    return any(outcome.status == "interrupted" for outcome in outcomes.values())


def _is_fitted(folder: Path) -> bool:
    """Whether fit.json, the last file of a report, was written once all runs had ended.

    Else a command was killed on its way there.
    """
    report, results = folder / "fit" / "fit.json", folder.glob("*/results.json")
    ended = max((path.stat().st_mtime for path in results), default=0.0)
    return report.exists() and report.stat().st_mtime >= ended


def _fit(folder: Path, console: Console) -> None:
    """The law of a study with its report, or one line that says why there is none."""
    from tinygpt.scaling import Columns, analyse, load_curves, load_runs, report, wording
    from tinygpt.scaling.runs import comparable

    columns = Columns()
    try:
        used, left_out = comparable(load_runs(folder), columns.loss)
        analysis = analyse(used, left_out, columns, curves=load_curves(folder))
    except ConfigError as error:
        console.print(f"law        none: {error}", highlight=False, soft_wrap=True)
        return
    report.write(analysis, folder / "fit")
    failed = sum(check.passed is False for check in analysis.checks)
    many = "a check fails" if failed == 1 else f"{failed} checks fail"
    verdict = f"not evidence yet: {many}" if failed else "every check that applies passed"
    law = f"{wording.equation(analysis.fit)}, {wording.variables(analysis.words)}"
    console.print(f"law        {law}  ({verdict})", highlight=False, soft_wrap=True)
    console.print(f"report     {folder / 'fit' / 'report.html'}", highlight=False, soft_wrap=True)


def _finished(job: Job) -> Outcome | None:
    found = job.run.finished(job.hash)
    if found is None or job.config.force:
        return None
    return Outcome(found["status"], found["final_val_loss"], is_new=False)


def _prepare(jobs: Sequence[Job], console: Console) -> None:
    """Checks machine and data of every job, prepares each corpus once and plans every run."""
    from tinygpt.data import corpora, shards
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


def share_trunks(jobs: Sequence[Job]) -> None:
    """Ties runs that differ in their length alone to the longest of them.

    Raises ConfigError where the schedule does not allow it.
    """
    from tinygpt.training.optim import stable_steps

    families: dict[str, list[Job]] = {}
    for job in jobs:
        families.setdefault(_without_length(job), []).append(job)
    for family in families.values():
        trunk = max(family, key=lambda job: job.row["total_steps"])
        for job in family:
            schedule, plan = job.config.schedule, job.plan
            if not isinstance(schedule, WsdSchedule) or schedule.warmup_steps is None:
                raise ConfigError(
                    "sweep.share_trunk=true: needs schedule=wsd, schedule.warmup_steps"
                )
            assert plan is not None
            if job is not trunk:
                job.trunk, job.branch_step = (
                    trunk.run,
                    stable_steps(
                        schedule, total_steps=plan.total_steps, warmup_steps=plan.warmup_steps
                    ),
                )
                trunk.keep_at.append(job.branch_step)


def _without_length(job: Job) -> str:
    train = dataclasses.replace(
        job.config.train, tokens=1, steps=None, epochs=None, tokens_per_param=None, flops=None
    )
    config: Config = dataclasses.replace(job.config, train=train)
    return rundir.effective_hash(config, job.content)
