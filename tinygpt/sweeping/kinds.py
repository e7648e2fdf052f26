"""Plan, run, follow and fit the two kinds of job: trainings and adaptations."""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import os
import time
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from tinygpt import cli, fileio
from tinygpt.adaptation import config as adapting
from tinygpt.adaptation.config import AdaptConfig, count_records, count_trials, methods_of
from tinygpt.config import Config, ConfigError, WsdSchedule
from tinygpt.config.counting import count_parameters
from tinygpt.runs import rundir
from tinygpt.sweeping.engines import Share, share_of
from tinygpt.sweeping.jobs import Job, Kind, flops_of
from tinygpt.sweeping.view import make_table, say, say_below
from tinygpt.training.console import clock, folded, short

# Torch, pandas and the data's libraries are imported where they are needed, so that mistakes are
# reported, and finished runs skipped, without them.

CALIBRATION = 15.0  # seconds, for all sizes together
LONG_STEP = 5.0  # seconds; longer steps are estimated from smaller models
IDLE = 0.5  # cores: less work of others is not worth mentioning
FINER = (1.1, 1.05, 1.02, 1.01)  # ratios of two recipes for which a plan names the cost
STATES = {"sgd": 1, "lion": 1, "muon": 1, "adafactor": 0}  # moments per weight; Adam has two


class Trainings(Kind):
    """Handle runs of ``tinygpt.run``."""

    command = cli.RUN
    study = "runs"
    outside = ("data", "tokenizer", "init_from")
    verb = "training"
    same = "train the same model"
    metric = ("val", "val loss")
    report = "fit.json"

    def find(self, folder: Path) -> list[Path]:
        return rundir.find_runs(folder)

    def contents(self, config: Config) -> dict[str, str]:
        from tinygpt.data import corpora
        from tinygpt.runs import pretrained

        return pretrained.contents(corpora.open_corpus(config.data), config)

    def config_hash(self, config: Config, content: dict[str, str]) -> str:
        return rundir.config_hash(config, content)

    def effective_hash(self, config: Config, content: dict[str, str]) -> str:
        return rundir.effective_hash(config, content)

    def prepare(self, jobs: Sequence[Job], done: Container[Job], console: Console) -> None:
        """Prepare each corpus once and plan every run."""
        with cli.importing(lean=not any(job.config.callbacks for job in jobs)):
            from tinygpt.data import corpora, shards
            from tinygpt.data.survey import Survey
            from tinygpt.training.console import preparing
            from tinygpt.training.results import planned
            from tinygpt.training.session import open_data, open_machine

        prepared: dict[str, shards.Prepared] = {}
        with preparing(console, jobs[0].config.data) as progress:
            for job in jobs:
                config, device = job.config, open_machine(job.config)
                source = f"{config.data} {config.tokenizer}"
                if source not in prepared:
                    corpus = corpora.open_corpus(config.data)
                    cache = shards.cache_root(config.cache_dir)
                    prepared[source] = shards.prepare(
                        corpus, config.data, config.tokenizer, cache, progress
                    )
                data = open_data(config, prepared[source], device)
                job.plan = data.plan
                job.row = planned(config, data, device)
                job.val_tokens = data.splits["val"].info["tokens"]
        surveys = [one.index["survey"] for one in prepared.values() if jobs[0].config.plan]
        for line in [line for found in surveys if found for line in Survey.read(found).lines()]:
            say(console, line)
        if jobs[0].config.sweep.share_trunk:
            share_trunks(jobs, done)

    def print_plan(self, jobs: Sequence[Job], done: Container[Job], console: Console) -> None:
        """Print the table of runs, their total cost, and what the design can show."""
        import pandas as pd

        from tinygpt.scaling.evidence import check_design, check_validation
        from tinygpt.training.session import open_machine

        todo = [job for job in jobs if job not in done]
        others = _others_at_work()  # before the timing adds to it
        share = share_of(todo or jobs, len(jobs))
        for job in jobs:
            job.config.hardware.threads = share.threads  # so that its step is timed with them
        with console.status("timing a few steps of each size"):
            seconds = estimate_seconds(todo)
        table = make_table("run", "params", "no emb.", "tokens", "FLOPs", "time", "MB")
        for job in jobs:
            sizes = ("model_parameters", "parameters_non_embedding", "train_tokens")
            table.add_row(
                job.label,
                *(short(job.row[name]) for name in sizes),
                f"{job.row['flops_exact']:.1e}",
                clock(seconds[job]) if job in seconds else "done",
                f"{disk_bytes(job) / 1e6:.3g}",
            )
        console.print(table, highlight=False, markup=False)
        say(console, f"\n{_sum_line(todo, seconds, share)}")
        on_cpu = bool(todo) and open_machine(todo[0].config).accelerator == "cpu"
        cores = os.cpu_count() or 1
        if on_cpu and others >= IDLE and others + share.at_once * (share.threads or cores) > cores:
            load = f"a load of {others:.1f} on {cores} cores"
            say(console, f"other work: {load}; the time is uncertain")
        if len(jobs) > 1:
            say(console, "\nwhat this design can show")
            rows = pd.DataFrame([job.row for job in jobs])
            for check in [*check_design(rows), check_validation(rows)]:
                mark = {True: "yes", False: "NO ", None: " - "}[check.passed]
                say(console, folded(f"  {mark}  {check.title}: {check.figure}", 7))
            for line in compared_lines(jobs, rows):
                say(console, line)

    def run(self, job: Job, console: Console) -> dict[str, Any]:
        from tinygpt.training.session import Branch, train

        try:
            branch = Branch(job.trunk, job.branch_step, tuple(job.keep_at))
            return train(job.config, list(job.overrides), console, branch)
        finally:
            gc.collect()  # a trainer is part of reference cycles that keep shards open

    def headline(self, results: Mapping[str, Any]) -> tuple[float | None, str]:
        return results["final_val_loss"], ""

    def progress(self, job: Job) -> tuple[float, str]:
        """Return the fraction done and the latest losses, from the end of metrics.csv."""
        try:
            with job.run.metrics.open("rb") as file:
                header = file.readline().decode().strip().split(",")
                file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
                lines = file.read().decode().split("\n")[1:-1]  # the complete ones
        except OSError:
            return 0.0, "starting"
        rows = [dict(zip(header, line.split(","), strict=False)) for line in lines]
        rows = [row for row in rows if len(row) == len(header) and row["step"].isdigit()]
        if not rows:
            return 0.0, "starting"
        names = ("train", "val")
        losses = {n: row[f"{n}_loss"] for row in rows for n in names if row[f"{n}_loss"]}
        words = "  ".join(f"{name} {float(value):.3f}" for name, value in losses.items())
        done = int(rows[-1]["step"]) - job.branch_step
        return max(0.0, done / max(1.0, job.steps)), words

    def fit(self, folder: Path, console: Console, anew: bool = True) -> None:
        """Fit a law and write its report, or print why there is none."""
        try:
            with cli.spinning("fitting"):
                from tinygpt.scaling import LAWS, Columns, analyse, load_runs, report, wording
                from tinygpt.scaling.runs import comparable, curves_of
                from tinygpt.scaling.story import Story

                if anew:
                    columns = Columns()
                    table = load_runs(folder)
                    used, left_out = comparable(table, columns.loss)
                    analysis = analyse(used, left_out, columns, curves=curves_of(table))
                    report.write(analysis, folder / "fit", Story.read(folder))
        except ConfigError as error:
            say_below(console, "law", f"none: {error}")
            return
        found = fileio.read_json(folder / "fit" / "fit.json")
        law = LAWS[found["law"]]
        values = {name: of["estimate"] for name, of in found["parameters"].items()}
        for name in law.coefficients:
            law = law.without(name) if values[name] == 0 else law  # a term that vanished
        words = wording.variables({name: of["meaning"] for name, of in found["variables"].items()})
        say_below(console, "law", f"{wording.equation(law, values)}, {words}")
        if "verdict" in found:  # an earlier version did not write it
            say_below(console, "", found["verdict"])
        say(console, f"report     {folder / 'fit' / 'report.html'}")


class Adaptations(Kind):
    """Handle runs of ``tinygpt.adapt``, each of which adapts one trained run."""

    command = cli.ADAPT
    study = "adaptation"
    outside = ("run", "checkpoint", "data", "policy")
    verb = "adapting"
    same = "do the same"
    metric = ("reward", "best reward")
    report = "report.html"

    def find(self, folder: Path) -> list[Path]:
        return rundir.find_adaptations(folder)

    def contents(self, config: AdaptConfig) -> dict[str, str]:
        return adapting.contents(config)

    def config_hash(self, config: AdaptConfig, content: dict[str, str]) -> str:
        return adapting.config_hash(config, content)

    effective_hash = config_hash

    def prepare(self, jobs: Sequence[Job], done: Container[Job], console: Console) -> None:
        """Count records and FLOPs before the jobs run.

        A token costs 2N forward and 2N backward in a step on adapters, and 2N when it is scored.
        """
        from tinygpt.data.tokenizers import load_tokenizer

        for accelerator in {job.config.hardware.accelerator for job in jobs} - {"auto", "cpu"}:
            from tinygpt.runs.load import usable_device

            usable_device(accelerator, "hardware.accelerator")
        for job in jobs:
            config: AdaptConfig = job.config
            base, documents = rundir.open_run(config.run), config.documents
            vocab_size = load_tokenizer(base.tokenizer).vocab_size
            n = count_parameters(rundir.read_config(base.config).model, vocab_size).total
            trials, records = count_trials(config), count_records(config)
            heldout = documents.heldout_tokens if documents.task == "domain_shift" else 0
            trained = trials * config.inner.inner_steps[-1] * config.inner.tokens_per_step
            scored = records * (heldout + documents.forgetting_tokens)
            flops = float(4 * n * trained + 2 * n * scored)
            job.row = {"base_parameters": n, "trials": trials}
            job.row |= {"total_steps": records, "flops_exact": flops}

    def print_plan(self, jobs: Sequence[Job], done: Container[Job], console: Console) -> None:
        names = ("run", "base", "parameters", "methods", "documents", "edits", "records", "FLOPs")
        table = make_table(*names, "", left=("run", "base"))
        for job in jobs:
            documents, row = job.config.documents, job.row
            table.add_row(
                job.label,
                Path(job.config.run).name,
                short(row["base_parameters"]),
                str(len(methods_of(job.config))),
                f"{documents.train}+{documents.tune}+{documents.test}",
                f"{row['trials']:,}",
                f"{row['total_steps']:,}",
                f"{job.flops:.2e}",
                "finished" if job in done else "",
            )
        console.print(table, highlight=False, markup=False)
        console.print("documents: train + tune + test", highlight=False)
        todo = [job for job in jobs if job not in done]
        records = sum(job.row["total_steps"] for job in todo)
        say(console, f"\n{len(todo)} to do: {records:,} records, {flops_of(todo)}")

    def run(self, job: Job, console: Console) -> dict[str, Any]:
        from tinygpt.adaptation.loop import adapt

        return adapt(job.config, list(job.overrides), console)

    def headline(self, results: Mapping[str, Any]) -> tuple[float | None, str]:
        """Return the best mean reward on test documents, and its method."""
        prefix = "reward_"
        rewards = {k: v for k, v in results.items() if k.startswith(prefix) and v is not None}
        best = max(rewards, key=rewards.__getitem__, default=None)
        return (rewards[best], best.removeprefix(prefix)) if best else (None, "")

    def progress(self, job: Job) -> tuple[float, str]:
        try:
            lines = job.run.records.read_bytes().split(b"\n")[:-1]
        except OSError:
            lines = []
        if not lines:
            return 0.0, "starting"
        last, total = json.loads(lines[-1]), job.row["total_steps"]
        gained = "" if last["reward"] is None else f" {last['reward']:+.2f}"
        words = f"{len(lines)}/{total} records  {last['method'] or 'passed over'}{gained}"
        return min(1.0, len(lines) / total), words

    def fit(self, folder: Path, console: Console, anew: bool = True) -> None:
        """Write the report, or print why there is none."""
        if not anew:
            say(console, f"report     {folder / 'fit' / self.report}")
            return
        try:
            with cli.spinning("drawing"):
                from tinygpt.adaptation import report

                made = report.make([folder], folder / "fit")
        except ConfigError as error:
            say_below(console, "report", f"none: {error}")
        else:
            report.show(made, folder / "fit")


TRAINING, ADAPTATION = Trainings(), Adaptations()
KINDS: dict[str, Kind] = {kind.command.file: kind for kind in (TRAINING, ADAPTATION)}


def share_trunks(jobs: Sequence[Job], done: Container[Job]) -> None:
    """Give runs that differ only in their length a trunk to branch off.

    The trunk is a longer run that is ``done`` and has kept the step, else the longest run to train.
    Raises ConfigError if the schedule does not allow it.
    """
    families: dict[str, list[Job]] = {}
    for job in jobs:
        any_length = dataclasses.replace(
            job.config.train, tokens=1, steps=None, epochs=None, tokens_per_param=None, flops=None
        )
        config = dataclasses.replace(job.config, train=any_length)
        families.setdefault(rundir.effective_hash(config, job.content), []).append(job)
    for family in families.values():
        ended = [job for job in family if job in done]
        branch_steps = {job: stable_steps_of(job) for job in family if job not in done}
        alone = []
        for job, step in branch_steps.items():
            longer = (one.run for one in ended if one.plan.total_steps > job.plan.total_steps)
            job.trunk = next((run for run in longer if run.step(step).exists()), None)
            if not job.trunk:
                alone.append(job)
        if alone:
            longest = max(alone, key=lambda job: job.plan.total_steps)
            alone.remove(longest)
            longest.keep_at += [branch_steps[job] for job in alone]
            for job in alone:
                job.trunk = longest.run
        for job, step in branch_steps.items():
            job.branch_step = step if job.trunk else 0


def stable_steps_of(job: Job) -> int:
    """Return the step at which the decay of the learning rate begins."""
    from tinygpt.training.optim import stable_steps

    schedule, plan = job.config.schedule, job.plan
    if not isinstance(schedule, WsdSchedule) or schedule.warmup_steps is None:
        raise ConfigError("sweep.share_trunk=true: needs schedule=wsd, schedule.warmup_steps")
    return stable_steps(schedule, total_steps=plan.total_steps, warmup_steps=plan.warmup_steps)


def compared_lines(jobs: Sequence[Job], rows: Any) -> Iterator[str]:
    """Yield, for each key with several values, the ratio that a comparison could tell from 1."""
    import pandas as pd

    from tinygpt.scaling.columns import Columns, other_settings
    from tinygpt.scaling.compare import plan
    from tinygpt.scaling.noise import guessed

    given = pd.DataFrame([dict(o.split("=", 1) for o in job.overrides) for job in jobs])
    rows = rows.join(
        given.drop(columns=["optim.learning_rate", "seed"], errors="ignore").add_prefix("config.")
    )
    place, seen = ["parameters_non_embedding", "train_tokens"], list[Any]()
    for name in reversed(other_settings(rows, Columns(), place)):
        parts = rows.groupby(name, dropna=False).ngroup()
        if any(parts.equals(other) for other in seen):
            continue
        seen.append(parts)
        each = [part.drop_duplicates([*place, "seed"]) for _, part in rows.groupby(name)]
        fewest = min(each, key=len)
        n, d = (fewest[column].to_numpy(dtype=float) for column in place)
        key = name.removeprefix("config.")
        try:
            ratio = plan(n, d, guessed(fewest["total_steps"].to_numpy(dtype=float)))
        except ConfigError as error:
            yield f"   -   compare={key}: {error}"
            continue
        finer = next((one for one in FINER if one < ratio), FINER[-1])
        more = math.ceil(len(n) * (math.log(ratio) / math.log(finer)) ** 2)
        least = f"a ratio of {ratio:.2f}" if ratio < 10 else "no ratio below 10"
        yield f"       compare={key}: {len(n)} runs of each can tell {least} in compute from 1;"
        yield f"       {finer:g} would take about {more:,} of each"


def _others_at_work() -> float:
    """Return how many cores other work kept busy during the last minute, 0 if unknown."""
    import torch

    if not hasattr(os, "getloadavg"):
        return 0.0
    ours = min(time.process_time() / 60, torch.get_num_threads())
    return max(0.0, os.getloadavg()[0] - ours)


def _sum_line(todo: Sequence[Job], seconds: Mapping[Job, float], share: Share) -> str:
    each = [seconds[job] for job in todo]
    total = clock(max([sum(each) / share.at_once, *each], default=0.0))
    disk = sum(map(disk_bytes, todo)) / 1e6
    return f"{len(todo)} to train: {total}, {share.words}; {disk:.3g} MB, {flops_of(todo)}"


def estimate_seconds(jobs: Sequence[Job]) -> dict[Job, float]:
    """Return each job's seconds of training and validation, by timing a few steps of its shape.

    Steps that would take too long are estimated from their FLOPs and the speed of smaller models.
    """
    from tinygpt.training.hardware import seconds_per_step
    from tinygpt.training.session import open_machine

    begun, seconds_per_flop = time.perf_counter(), math.inf
    timed: dict[str, float] = {}
    estimated = {}
    for job in sorted(jobs, key=lambda job: float(job.row["flops_per_token"])):
        plan, row = job.plan, job.row
        flops, vocab_size = row["flops_per_token"] * row["batch_tokens"], row["vocab_size"]
        device = open_machine(job.config)
        shape = f"{job.config.model} {vocab_size} {job.config.optim.kind} {plan.batch_size}"
        is_late = time.perf_counter() - begun > CALIBRATION
        is_long = is_late or flops * seconds_per_flop > LONG_STEP
        if shape not in timed and not (math.isfinite(seconds_per_flop) and is_long):
            timed[shape] = seconds_per_step(job.config, vocab_size, plan, device)
            seconds_per_flop = timed[shape] / flops
        step = timed.get(shape, flops * seconds_per_flop)
        between = (job.steps - 1) // plan.eval_steps / row["val_every"]
        forward = step / row["batch_tokens"] / 3  # a backward pass costs two forward passes
        estimated[job] = job.steps * step + (2 + between) * job.val_tokens * forward
    return estimated


def disk_bytes(job: Job) -> float:
    """Return the bytes of the checkpoints last, best, final and those that are kept."""
    keep_steps = job.plan.keep_steps
    kept = len(job.keep_at) + (job.plan.total_steps // keep_steps if keep_steps else 0)
    numbers = job.row["model_parameters"] * (1 + STATES.get(job.config.optim.kind, 2))
    return 4.0 * float(numbers) * (3 + kept)
