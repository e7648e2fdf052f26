"""Run a study: compose, skip or plan its jobs, run them, and write the summary."""

from __future__ import annotations

import contextlib
import signal
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from tinygpt import cli, fileio, signals
from tinygpt.config.settings import SMOKE
from tinygpt.sweeping.engines import Engine, Share, check_engine, ready
from tinygpt.sweeping.jobs import Job, Kind, compose_jobs, flops_of
from tinygpt.sweeping.kinds import TRAINING
from tinygpt.sweeping.view import View, make_table, say
from tinygpt.sweeping.workers import Outcome, outcome_of

SHOWN = 40  # rows; the table of a longer study shows only what did not end well


def run_study(job_overrides: Sequence[Sequence[str]], kind: Kind = TRAINING) -> list[Outcome]:
    """Run the jobs that are not finished, and return the outcomes of all, in order.

    Raises ConfigError for a mistake in any job before the first begins, Stopped if the study is
    interrupted.
    """
    console = Console(markup=False)
    jobs = compose_jobs(job_overrides, kind)
    settings = jobs[0].config
    outcomes: dict[Job, Outcome] = {}
    for job in jobs:
        results = job.run.finished(job.hash, job.config.force)
        if results is not None:
            outcomes[job] = outcome_of(job, results, is_new=False)
    pending = [job for job in jobs if job not in outcomes]
    if settings.plan:
        kind.prepare(jobs, outcomes, console)
        kind.print_plan(jobs, outcomes, console)
        if settings.scale == "smoke":
            say(console, SMOKE)
        return [Outcome("planned")] * len(jobs)
    folders = list(dict.fromkeys(job.run.path.parent for job in jobs))
    with contextlib.ExitStack() as held:
        if pending:
            check_engine(settings.launcher)
            share, engine = held.enter_context(ready(pending, len(jobs)))
            cli.loaded()
            if len(pending) > 1:
                starting = f"starting {share.words.replace('at once', 'workers')} …"
                are_workers = share.engine == "local" and share.at_once > 1
                how = f"launcher {share.engine}: {share.words}"
                say(console, starting if are_workers else how)
            kind.prepare(jobs if settings.sweep.share_trunk else pending, outcomes, console)
        cli.loaded()
        for folder in folders:
            held.enter_context(fileio.locked(folder, folder.parent, "study"))
        if pending:
            _run(pending, share, engine, len(jobs), outcomes, console)
        for folder in folders:
            write_summary(folder, kind)
        if len(outcomes) < len(jobs) or _is_interrupted(outcomes):
            raise _stopped(jobs, outcomes)
        _print_summary(jobs, outcomes, console)
        if settings.fit and len(jobs) > 1:
            for folder in folders:
                made = not pending and _is_fitted(folder / "fit" / kind.report, folder)
                kind.fit(folder, console, anew=not made)
    return [outcomes[job] for job in jobs]


def _run(
    pending: list[Job],
    share: Share,
    engine: Engine,
    total: int,
    outcomes: dict[Job, Outcome],
    console: Console,
) -> None:
    """Run ``pending``, trunks before their branches, and add how each ended to ``outcomes``."""
    if share.engine != "serial":  # longest first, so that none is left alone at the end
        pending.sort(key=lambda job: -job.row["flops_exact"])
    stages = [job for job in pending if not job.trunk], [job for job in pending if job.trunk]
    is_stopped = False
    with View(pending, total, console) as view:
        for stage in filter(None, stages):
            for job, outcome in engine(stage, pending[0].run.path.parent):
                if outcome.status == "interrupted":
                    is_stopped = True
                    if not job.run.log.exists():
                        continue  # it had not begun
                outcomes[job] = outcome
                if outcome.status == "killed" and job.run.environment.exists():
                    fileio.write_json(job.run.error, {"error": outcome.reason})
                view.ended(job, outcome)
            if is_stopped:
                break


def _is_interrupted(outcomes: Mapping[Job, Outcome]) -> bool:
    return any(outcome.status == "interrupted" for outcome in outcomes.values())


def _stopped(jobs: Sequence[Job], outcomes: Mapping[Job, Outcome]) -> signals.Stopped:
    """Return the exception of an interrupted study, which says how to resume."""
    number = signals.received() or signal.SIGINT
    done = sum(not outcome.failed for outcome in outcomes.values())
    line = f"stopped by {signal.Signals(number).name}: {done} of {len(jobs)} runs done; "
    return signals.Stopped(number, f"{line}the same command resumes")


def _is_fitted(report: Path, folder: Path) -> bool:
    """Return whether ``report``, the last file of a fit, is newer than all results."""
    results = folder.glob("*/results.json")
    ended = max((path.stat().st_mtime for path in results), default=0.0)
    return report.exists() and report.stat().st_mtime >= ended


def write_summary(folder: Path, kind: Kind) -> None:
    """Write ``sweep_summary.csv`` and ``.json`` with a row for each run in ``folder``."""
    with cli.spinning("summary"):
        from tinygpt.scaling.runs import read_rows

    fileio.remove_torn(folder)
    rows = read_rows(folder, find=kind.find)
    for row in rows:
        row["folder"] = Path(row["folder"]).name  # relative, so that the study can be moved
    fileio.write_csv(folder / "sweep_summary.csv", rows, list(rows[0]) if rows else [])
    fileio.write_json(folder / "sweep_summary.json", {"study": folder.name, "runs": rows})


def _print_summary(jobs: Sequence[Job], outcomes: Mapping[Job, Outcome], console: Console) -> None:
    """Print every run with its metric or its error, the counts, and the summary's place."""
    if len(jobs) == 1:  # the trial of a search
        return
    statuses = {}
    table = make_table("run", "status", jobs[0].kind.metric[1], "", left=("run", "status", ""))
    for job in jobs:
        outcome = outcomes[job]
        statuses[job] = outcome.status.replace("_", " ") + ("" if outcome.is_new else " before")
        if len(jobs) <= SHOWN or not statuses[job].startswith("finished"):
            table.add_row(job.label, statuses[job], outcome.shown, outcome.reason)
    console.print()
    if table.row_count:
        console.print(table, highlight=False, markup=False)
    counts = ", ".join(f"{n} {status}" for status, n in Counter(statuses.values()).items())
    console.print(f"{len(jobs)} runs: {counts}", highlight=False)
    done = [job for job in jobs if job in outcomes and job.row]
    if any(job.branch_step for job in done):
        say(console, f"trained    {flops_of(done)}")
    for folder in dict.fromkeys(job.run.path.parent for job in jobs):
        say(console, f"summary    {folder / 'sweep_summary.csv'}")
    if jobs[0].config.scale == "smoke":
        say(console, SMOKE)
