"""What a study came to: ``sweep_summary.csv`` and ``.json`` from its folders, a table on screen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tinygpt import fileio
from tinygpt.sweeping.engines import Outcome
from tinygpt.sweeping.jobs import StudyJob, flops_of


def write(folder: Path, kind: type[StudyJob]) -> None:
    """Writes both files anew from the folders of that kind in ``folder``: a row a run."""
    fileio.remove_torn(folder)
    rows = kind.rows(folder)
    for row in rows:
        row["folder"] = Path(row["folder"]).name  # the study may be moved
    fileio.write_csv(folder / "sweep_summary.csv", rows, list(rows[0]) if rows else [])
    fileio.write_json(folder / "sweep_summary.json", {"study": folder.name, "runs": rows})


SHOWN = 40  # rows; of a longer study the table shows what did not end well


def print_table(
    jobs: Sequence[StudyJob], outcomes: Mapping[StudyJob, Outcome], console: Console
) -> None:
    """Every run with what it came to or its reason, then the counts and where the files are.

    Of a single run, as a sweeper that optimises asks for them, all has been said.
    """
    if len(jobs) == 1:
        return
    said = {job: _status(outcomes.get(job)) for job in jobs}
    shown = [job for job in jobs if len(jobs) <= SHOWN or not said[job].startswith("finished")]
    table = Table(box=None, pad_edge=False, header_style="bold")
    measure = jobs[0].measure[1]
    for name in ("run", "status", measure, ""):
        table.add_column(name, justify="right" if name == measure else "left", overflow="fold")
    for job in shown:
        outcome = outcomes.get(job, Outcome("not begun"))
        table.add_row(job.label, said[job], outcome.shown, outcome.reason)
    console.print()
    if shown:
        console.print(table, highlight=False, markup=False)
    counts = ", ".join(f"{count} {status}" for status, count in Counter(said.values()).items())
    console.print(f"{len(jobs)} runs: {counts}", highlight=False)
    done = [job for job in jobs if job in outcomes and job.row]
    if any(job.steps < job.row["total_steps"] for job in done):
        console.print(f"trained    {flops_of(done)}", highlight=False, soft_wrap=True)
    for folder in dict.fromkeys(job.run.path.parent for job in jobs):
        console.print(f"summary    {folder / 'sweep_summary.csv'}", highlight=False, soft_wrap=True)


def _status(outcome: Outcome | None) -> str:
    if outcome is None:
        return "not begun"
    status = outcome.status.replace("_", " ")
    return status if outcome.is_new else f"{status} before"
