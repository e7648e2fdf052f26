"""A study from its jobs to its table: plan, check, skip, prepare, do, sum up."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from tinygpt import fileio, signals
from tinygpt.sweeping import summary
from tinygpt.sweeping.adaptations import AdaptationJob
from tinygpt.sweeping.engines import Engine, Outcome, make_engine, outcome_of
from tinygpt.sweeping.jobs import Job, StudyJob, compose_jobs
from tinygpt.sweeping.view import View

KINDS: dict[str, type[StudyJob]] = {kind.command.file: kind for kind in (Job, AdaptationJob)}


def run_study(job_overrides: Sequence[Sequence[str]], kind: type[StudyJob] = Job) -> list[Outcome]:
    """Does what is not finished of these jobs; the outcome of each, in their order.

    Raises ConfigError for a mistake in any job before one of them begins, Stopped where the study
    was interrupted.
    """
    console = Console(markup=False)
    jobs = compose_jobs(job_overrides, kind)
    settings = jobs[0].config
    outcomes: dict[StudyJob, Outcome] = {job: found for job in jobs if (found := _finished(job))}
    pending = [job for job in jobs if job not in outcomes]
    if settings.plan:
        kind.prepare(jobs, outcomes, console)
        kind.print_plan(jobs, outcomes, console)
        return [Outcome("planned")] * len(jobs)
    if pending:
        engine = make_engine(settings.launcher)
        kind.prepare(jobs if settings.sweep.share_trunk else pending, outcomes, console)
        if settings.launcher.kind != "serial":  # longest first: none is left alone at the end
            pending.sort(key=lambda job: -job.row["flops_exact"])
    folders = list(dict.fromkeys(job.run.path.parent for job in jobs))
    with contextlib.ExitStack() as alone:
        for folder in folders:
            alone.enter_context(fileio.locked(folder, folder.parent, "study"))
        if pending:
            _do(jobs, pending, outcomes, engine, console)
        for folder in folders:
            summary.write(folder, kind)
        summary.print_table(jobs, outcomes, console)
        if len(outcomes) < len(jobs) or _is_interrupted(outcomes):
            raise signals.Stopped(signals.received() or signal.SIGINT)
        if settings.fit and len(jobs) > 1:
            for folder in folders:
                made = not pending and _is_fitted(folder / "fit" / kind.report, folder)
                (kind.show_fit if made else kind.fit)(folder, console)
    return [outcomes[job] for job in jobs]


def _do(
    jobs: Sequence[StudyJob],
    pending: Sequence[StudyJob],
    outcomes: dict[StudyJob, Outcome],
    engine: Engine,
    console: Console,
) -> None:
    """Does ``pending``, of ``jobs``, and puts down how each ended in ``outcomes``."""
    folder = pending[0].run.path.parent
    with View(pending, len(jobs), console) as view:
        for stage in type(pending[0]).stages(pending):
            for job, outcome in engine(stage, folder):
                outcomes[job] = outcome
                if outcome.status == "killed" and job.run.environment.exists():
                    fileio.write_json(job.run.error, {"error": outcome.reason})
                view.ended(job, outcome)
            if _is_interrupted(outcomes):
                break


def _is_interrupted(outcomes: Mapping[StudyJob, Outcome]) -> bool:
    return any(outcome.status == "interrupted" for outcome in outcomes.values())


def _is_fitted(report: Path, folder: Path) -> bool:
    """Whether ``report``, the last file that is written, was once all runs had ended.

    Else a command was killed on its way there.
    """
    results = folder.glob("*/results.json")
    ended = max((path.stat().st_mtime for path in results), default=0.0)
    return report.exists() and report.stat().st_mtime >= ended


def _finished(job: StudyJob) -> Outcome | None:
    found = job.run.finished(job.hash)
    if found is None or job.config.force:
        return None
    return outcome_of(job, found, is_new=False)
