"""``plan=true``: what a study would train, what it costs, what it can show.  Trains nothing."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Container, Mapping, Sequence

import pandas as pd
import torch
from rich.console import Console
from rich.table import Table

from tinygpt.horizon import Plan
from tinygpt.scaling.evidence import check_design
from tinygpt.sweeping.engines import Share, share_of
from tinygpt.sweeping.jobs import Job, flops_of
from tinygpt.training.calibration import seconds_per_step
from tinygpt.training.console import clock, short
from tinygpt.training.hardware import choose_threads
from tinygpt.training.session import open_machine

CALIBRATION = 15.0  # seconds, for all sizes together
LONG_STEP = 5.0  # a step that takes longer is estimated from smaller models
IDLE = 0.5  # cores: a machine where others have no more has no other work to speak of
STATES = {"sgd": 1, "lion": 1, "muon": 1, "adafactor": 0}  # moments a weight; Adam has two


def print_plan(jobs: Sequence[Job], finished: Container[Job], console: Console) -> None:
    """The table of runs, the sums, and the checklist of the design."""
    todo = [job for job in jobs if job not in finished]
    others = others_at_work()  # before the timing adds to it
    share = share_of(jobs[0].config, len(todo))
    for job in jobs:
        job.config.hardware.threads = share.threads  # so that its step is timed as it will train
    with console.status("timing a few steps of each size"):
        seconds = estimate_seconds(todo)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("run", overflow="fold")
    for name in ("params", "no emb.", "tokens", "FLOPs", "time", "MB"):
        table.add_column(name, justify="right")
    for job in jobs:
        row = job.row
        table.add_row(
            job.label,
            short(row["model_parameters"]),
            short(row["parameters_non_embedding"]),
            short(row["train_tokens"]),
            f"{row['flops_exact']:.1e}",
            clock(seconds[job]) if job in seconds else "done",
            f"{disk_bytes(job) / 1e6:.3g}",
        )
    console.print(table, highlight=False, markup=False)
    console.print(f"\n{_sum_line(todo, seconds, share)}", highlight=False, soft_wrap=True)
    if todo and _is_busy(todo[0], share, others):
        line = (
            f"other work: a load of {others:.1f} on {os.cpu_count()} cores; the time is uncertain"
        )
        console.print(line, highlight=False, soft_wrap=True)
    if len(jobs) > 1:
        console.print("\nwhat this design can show", highlight=False)
        for check in check_design(pd.DataFrame([job.row for job in jobs])):
            mark = {True: "yes", False: "NO ", None: " - "}[check.passed]
            console.print(f"  {mark}  {check.name}: {check.detail}", highlight=False)


def _sum_line(todo: Sequence[Job], seconds: Mapping[Job, float], share: Share) -> str:
    each = [seconds[job] for job in todo]
    total = clock(max([sum(each) / share.at_once, *each], default=0.0))
    how = "one after the other" if share.at_once == 1 else f"{share.at_once} at once"
    count = share.threads or torch.get_num_threads()
    threads = f"{count} thread{'' if count == 1 else 's'} each"
    disk = sum(map(disk_bytes, todo)) / 1e6
    return f"{len(todo)} to train: {total}, {how}, {threads}; {disk:.3g} MB, {flops_of(todo)}"


def others_at_work() -> float:
    """How many cores the work of others has kept busy this last minute, as far as is known."""
    if not hasattr(os, "getloadavg"):
        return 0.0
    ours = min(time.process_time() / 60, torch.get_num_threads())
    return max(0.0, os.getloadavg()[0] - ours)


def _is_busy(job: Job, share: Share, others: float) -> bool:
    """Whether others at work leave these runs less than the cores they ask for."""
    if open_machine(job.config).accelerator != "cpu" or others < IDLE:
        return False
    wanted = share.at_once * (share.threads or torch.get_num_threads())
    return others + wanted > (os.cpu_count() or 1)


def estimate_seconds(jobs: Sequence[Job]) -> dict[Job, float]:
    """Seconds of training and validation on this machine: timed a little, else by the FLOPs."""
    begun, speed = time.perf_counter(), math.inf  # seconds a FLOP
    known: dict[str, float] = {}
    estimated = {}
    for job in sorted(jobs, key=lambda job: float(job.row["flops_per_token"])):
        plan, row = _plan(job), job.row
        flops = row["flops_per_token"] * row["batch_tokens"]
        device = open_machine(job.config)
        choose_threads(job.config, row["vocab_size"], plan, device, {})
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
