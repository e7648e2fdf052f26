"""``plan=true``: what a study would train, what it costs, what it can show.  Trains nothing."""

from __future__ import annotations

import math
import time
from collections.abc import Container, Sequence

import pandas as pd
from rich.console import Console
from rich.table import Table

from tinygpt.horizon import Plan
from tinygpt.scaling.evidence import check_design
from tinygpt.sweeping.jobs import Job, flops_of
from tinygpt.sweeping.stacking import could_stack
from tinygpt.training.calibration import seconds_per_step
from tinygpt.training.console import clock, short
from tinygpt.training.session import open_machine

CALIBRATION = 15.0  # seconds, for all sizes together
LONG_STEP = 5.0  # a step that takes longer is estimated from smaller models
STATES = {"sgd": 1, "lion": 1, "muon": 1, "adafactor": 0}  # moments a weight; Adam has two


def print_plan(jobs: Sequence[Job], finished: Container[Job], console: Console) -> None:
    """The table of runs, the sums, and the checklist of the design."""
    with console.status("timing a few steps of each size"):
        seconds = estimate_seconds(jobs)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("run", overflow="fold")
    for name in ("parameters", "no embed.", "tokens", "FLOPs", "time", "disk", ""):
        table.add_column(name, justify="right")
    todo = [job for job in jobs if job not in finished]
    for job in jobs:
        row = job.row
        table.add_row(
            job.label,
            short(row["model_parameters"]),
            short(row["parameters_non_embedding"]),
            short(row["train_tokens"]),
            f"{row['flops_exact']:.2e}",
            clock(seconds[job]),
            f"{disk_bytes(job) / 1e6:.3g} MB",
            "" if job in todo else "finished",
        )
    console.print(table, highlight=False, markup=False)
    total = clock(sum(seconds[job] for job in todo))
    disk = sum(map(disk_bytes, todo)) / 1e6
    say = f"{len(todo)} to train: {total} one after the other, {disk:.3g} MB, {flops_of(todo)}"
    console.print(f"\n{say}", highlight=False, soft_wrap=True)
    stackable = could_stack(todo) if todo and todo[0].config.sweep.stack == "off" else 0
    if stackable:
        console.print(f"{stackable} of them could train as one: sweep.stack=auto", highlight=False)
    if len(jobs) > 1:
        console.print("\nwhat this design can show", highlight=False)
        for check in check_design(pd.DataFrame([job.row for job in jobs])):
            mark = {True: "yes", False: "NO ", None: " - "}[check.passed]
            console.print(f"  {mark}  {check.name}: {check.detail}", highlight=False)


def estimate_seconds(jobs: Sequence[Job]) -> dict[Job, float]:
    """Seconds of training and validation on this machine: timed a little, else by the FLOPs."""
    begun, speed = time.perf_counter(), math.inf  # seconds a FLOP
    known: dict[str, float] = {}
    estimated = {}
    for job in sorted(jobs, key=lambda job: float(job.row["flops_per_token"])):
        plan, row = _plan(job), job.row
        flops = row["flops_per_token"] * row["batch_tokens"]
        device = open_machine(job.config)
        shape = f"{job.config.model} {row['vocab_size']} {job.config.optim.kind} {plan.batch_size}"
        late = time.perf_counter() - begun > CALIBRATION
        if shape not in known and not (
            math.isfinite(speed) and (late or flops * speed > LONG_STEP)
        ):
            known[shape] = seconds_per_step(job.config, row["vocab_size"], plan, device)
            speed = known[shape] / flops
        step = known.get(shape, flops * speed)
        steps = plan.total_steps - job.branch_step
        evaluations = 1 + math.ceil(steps / plan.eval_steps)
        forward = step / row["batch_tokens"] / 3  # a backward pass costs two forward ones
        estimated[job] = steps * step + evaluations * job.val_tokens * forward
    return estimated


def disk_bytes(job: Job) -> float:
    """Of the checkpoints: last, best, final and those that are kept."""
    plan = _plan(job)
    kept = len(job.keep_at) + (plan.total_steps // plan.keep_steps if plan.keep_steps else 0)
    numbers = job.row["model_parameters"] * (1 + STATES.get(job.config.optim.kind, 2))
    return 4.0 * float(numbers) * (3 + kept)


def _plan(job: Job) -> Plan:
    assert job.plan is not None
    return job.plan
