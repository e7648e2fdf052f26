"""A study from its jobs to its table: plan, check, skip, prepare, do, sum up."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from tinygpt import rundir
from tinygpt.config import ConfigError
from tinygpt.sweeping import summary
from tinygpt.sweeping.adaptations import AdaptationJob
from tinygpt.sweeping.engines import Outcome, make_engine, outcome_of
from tinygpt.sweeping.jobs import Job, StudyJob, compose_jobs
from tinygpt.sweeping.view import View

KINDS: dict[str, type[StudyJob]] = {kind.command.file: kind for kind in (Job, AdaptationJob)}


def run_study(job_overrides: Sequence[Sequence[str]], kind: type[StudyJob] = Job) -> list[Outcome]:
    """Does what is not finished of these jobs; the outcome of each, in their order.

    Raises ConfigError for a mistake in any job before one of them begins, SystemExit(130) where
    the study was interrupted.
    """
    console = Console()
    jobs = compose_jobs(job_overrides, kind)
    settings = jobs[0].config
    outcomes: dict[StudyJob, Outcome] = {job: found for job in jobs if (found := _finished(job))}
    pending = [job for job in jobs if job not in outcomes]
    if settings.plan:
        kind.prepare(jobs, console)
        kind.print_plan(jobs, outcomes, console)
        return [Outcome("planned")] * len(jobs)
    if pending:
        engine = make_engine(settings.launcher)
        kind.prepare(pending, console)
        if settings.launcher.kind != "serial":  # longest first: none is left alone at the end
            pending.sort(key=lambda job: -job.row["flops_exact"])
        folder = pending[0].run.path.parent
        _make(folder)

        def say(line: str) -> None:
            console.print(line, highlight=False, soft_wrap=True)

        stages = kind.stages(pending, say)
        with View(pending, len(jobs), console) as view:
            for groups in stages:
                for job, outcome in engine(groups, folder):
                    outcomes[job] = outcome
                    if outcome.status == "killed" and job.run.environment.exists():
                        rundir.write_json(job.run.error, {"error": outcome.reason})
                    view.ended(job, outcome)
                if any(outcome.status == "interrupted" for outcome in outcomes.values()):
                    break
    folders = list(dict.fromkeys(job.run.path.parent for job in jobs))
    for folder in folders:
        summary.write(folder, kind)
    summary.print_table(jobs, outcomes, console)
    if len(outcomes) < len(jobs) or any(o.status == "interrupted" for o in outcomes.values()):
        console.print("interrupted; the same command goes on from there", highlight=False)
        raise SystemExit(130)
    if settings.fit and pending and len(jobs) > 1:
        for folder in folders:
            kind.fit(folder, console)
    return [outcomes[job] for job in jobs]


def _finished(job: StudyJob) -> Outcome | None:
    found = job.run.finished(job.hash)
    if found is None or job.config.force:
        return None
    return outcome_of(job, found, is_new=False)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"output_dir={folder.parent}: cannot be written ({error.strerror})"
        ) from error
