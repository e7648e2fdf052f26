"""Find a law within a budget: choose runs one after the other, then put a prediction to the test.

It is a study like any other, of ordinary run folders, by any launcher.  What is decided is written
to ``design.jsonl`` before it is done, so that a study that was killed takes the same decisions.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console

from tinygpt import fileio, signals
from tinygpt.config import RunError
from tinygpt.runs import rundir
from tinygpt.scaling.design import Design
from tinygpt.scaling.split import flops_per_token
from tinygpt.sweeping import recipe as rules
from tinygpt.sweeping.engines import Engine, Outcome, Share, check_engine, ready
from tinygpt.sweeping.jobs import Job, compose_jobs
from tinygpt.sweeping.kinds import TRAINING, stable_steps_of
from tinygpt.sweeping.recipe import Asked, Recipe
from tinygpt.sweeping.study import write_summary
from tinygpt.sweeping.view import say
from tinygpt.training.console import clock, short

LAWS = ("chinchilla", "chinchilla_tied", "coupled", "kaplan_constant")
REPEATED = ("data_constrained",)
FURTHER = 10.0  # the target: the best split of so many times the compute of a test run
BALANCED = 20.0  # tokens per parameter of the target before a law is known (Hoffmann et al. 2022)
OVERHEAD, SLOWER = 2.0, 1.2  # seconds of a run beside its steps, and a factor: before any ended
TRUST = (1.0, 0.3)  # standard deviations of these two guesses
SEED_NOISE, SHORT = 0.002, 1000.0  # scatter of log L between seeds, of many steps; rises below
RATES = (1e-3, 2e-3, 4e-3, 8e-3)  # of learning, at the width that µP begins from
TEST_SEED = 101  # the first: no run before has it
SHRINK = 5.0  # seconds of runs of a width that count as much as those of all others
SAFE = 1.1  # of the time that a test run may take
TOUCH = 2.0  # seconds between marks of the time that has passed
SLACK = 0.97  # of the budget: the rest is for a run that takes longer than it should


class LawStudy:
    """One study: its recipe, the runs it can make, and what was decided and found so far."""

    recipe: Recipe
    table: pd.DataFrame  # a row for each run that can be chosen
    jobs: list[Job]  # in the same order
    design: Design

    def __init__(self, asked: Asked, share: Share, folder: Path, console: Console) -> None:
        self.asked, self.share, self.folder, self.console = asked, share, folder, console
        self.events, self.prediction = folder / "design.jsonl", folder / "prediction.json"
        self.start = time.monotonic()
        self.lines = self._record()
        self.begun: dict[int, float] = {}  # row -> when it began, of runs that have not ended
        self.failed: list[int] = []  # rows that are not chosen again
        self.resumed: set[int] = set()  # rows of runs that an earlier start began
        self.spent = 0.0  # FLOPs
        self.took: list[tuple[int, float, float]] = []  # width, seconds as estimated, as they were
        self.half: float | None = None  # of the interval at the target

    # --- the time and the record

    def _record(self) -> list[dict[str, Any]]:
        """Return what an earlier start wrote, and go on from its time; a torn line is dropped."""
        self.before = 0.0
        if not self.events.exists():
            return []
        lines = self.events.read_bytes().split(b"\n")
        found: list[dict[str, Any]] = [json.loads(line) for line in lines[:-1]]
        touched = self.events.stat().st_mtime
        if lines[-1]:
            fileio.write_text(self.events, "".join(line.decode() + "\n" for line in lines[:-1]))
        if found:
            self.before = found[-1]["at"] + max(0.0, touched - found[-1]["written"])
        return found

    def elapsed(self) -> float:
        """Return the seconds that this study has worked, over all the times it was started."""
        return self.before + time.monotonic() - self.start

    def note(self, event: str, **facts: Any) -> dict[str, Any]:
        """Append what was decided or found to the record; it is on disk before work goes on."""
        line = {"event": event, "at": round(self.elapsed(), 2), "written": time.time(), **facts}
        fileio.append(self.events, (json.dumps(line) + "\n").encode(), sync=True)
        self.lines.append(line)
        return line

    def find(self, event: str) -> dict[str, Any] | None:
        return next((line for line in self.lines if line["event"] == event), None)

    @contextlib.contextmanager
    def marking_time(self) -> Iterator[None]:
        """Mark the record every few seconds: a study that is killed then knows how long it was."""
        over = threading.Event()

        def mark() -> None:
            while not over.wait(TOUCH):
                with contextlib.suppress(OSError):
                    os.utime(self.events)

        thread = threading.Thread(target=mark, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    # --- the runs there can be

    def open(self) -> None:
        """Make the list of runs that can be chosen."""
        recipe = self.recipe
        rows = [
            {"width": width, "tokens": tokens, "seed": seed}
            for seed in range(1, rules.SEEDS + 1)
            for width in recipe.widths
            for tokens in recipe.lengths
            if recipe.cost(width, tokens / recipe.batch_tokens) <= rules.DEAREST * recipe.test_cost
        ]
        self.table = pd.DataFrame(rows)
        self.table["N"] = self.table["width"].map(recipe.parameters).astype(float)
        self.table["D"] = self.table["tokens"].astype(float)
        self.table["U"] = self.table["D"].clip(upper=recipe.one_pass)
        self.jobs = compose_jobs(
            [recipe.run(row["width"], row["tokens"], row["seed"]) for row in rows], TRAINING
        )
        TRAINING.prepare(self.jobs, (), self.console)
        for job in self.jobs:
            job.keep_at = [stable_steps_of(job)]
        steps = self.table["D"].to_numpy() / recipe.batch_tokens
        names = ["N", "D", "U"] if recipe.repeats else ["N", "D"]
        self.design = Design(
            self.table[names],
            pd.DataFrame([self.target()])[names],
            np.ones(len(self.table)),
            np.array([job.row["flops_exact"] for job in self.jobs]),
            REPEATED if recipe.repeats else LAWS,
            SEED_NOISE * np.hypot(1.0, SHORT / steps),
        )

    def per_token(self, n: Any) -> Any:
        """Return the FLOPs of training on a token, by parameters without embeddings."""
        widths = self.recipe.widths
        sizes = np.array([float(self.recipe.parameters[w]) for w in widths])
        each = np.array([self.recipe.flops_per_token[w] for w in widths])
        return flops_per_token(sizes, np.ones(len(sizes)), each)(n)

    def target(self) -> dict[str, float]:
        """Return the best split of the target's compute: by the forecast, once there is one."""
        recipe = self.recipe
        tests = [recipe.flops_per_token[w] * recipe.longest(w) for w in recipe.widths]
        flops = self.asked.target_flops or FURTHER * max(tests)
        sizes = recipe.parameters.values()
        n = np.geomspace(min(sizes), 30 * max(sizes), 200)
        d = flops / self.per_token(n)
        made = getattr(self, "design", None) and self.design.forecast
        if made:
            loss, _ = made.at({"N": n, "D": d, "U": d}, np.full(len(n), flops))
        else:
            loss = np.abs(np.log(d / n / BALANCED))
        best = int(np.argmin(loss))
        return {"N": float(n[best]), "D": float(d[best]), "U": float(d[best])}

    # --- what a run costs

    def slower(self) -> tuple[dict[int, float], float]:
        """Return by what factor runs of each width are slower than was timed, and the seconds that
        a run needs beside: the first guesses, drawn to how long the runs took."""
        rows = [[1 / TRUST[0], 0.0], [0.0, 1 / TRUST[1]]]
        right = [OVERHEAD / TRUST[0], SLOWER / TRUST[1]]
        for _, estimated, took in self.took:
            spread = 0.2 * estimated + 0.5
            rows.append([1 / spread, estimated / spread])
            right.append(took / spread)
        beside, factor = np.linalg.lstsq(np.array(rows), np.array(right), rcond=None)[0]
        beside, factor = max(0.2, float(beside)), max(0.5, float(factor))
        each = {}
        for width in self.recipe.widths:
            own = [(e, t - beside) for w, e, t in self.took if w == width]
            timed, took = (
                sum(column) for column in zip((SHRINK, SHRINK * factor), *own, strict=True)
            )
            each[width] = max(0.5, took / timed)
        return each, beside

    def costs(self) -> Any:
        """Return what each run would cost now, (n,): where another one of its size and seed has
        left its state at the constant rate, only the steps from there."""
        for job in self.jobs:
            job.trunk, job.branch_step = None, 0
        ended = [self.jobs[row] for row in self.design.losses]
        families: dict[Any, list[Job]] = {}
        for job in ended:
            families.setdefault((job.config.model.d_model, job.config.seed), []).append(job)
        own = np.empty(len(self.jobs))
        factors, beside = self.slower()
        factor = self.table["width"].map(factors).to_numpy()
        for i, job in enumerate(self.jobs):
            own_stable = stable_steps_of(job)
            for other in families.get((job.config.model.d_model, job.config.seed), []):
                step = other.keep_at[0]
                if other is not job and job.branch_step < step <= own_stable:
                    job.trunk, job.branch_step = other.run, step
            own[i] = self.estimated(job)
        return own if self.asked.flops is not None else factor * own + beside

    def estimated(self, job: Job) -> float:
        return self.recipe.cost(job.config.model.d_model, job.steps)

    # --- choosing

    def chosen(self) -> Iterator[Job]:
        """Yield the runs to make: those that were decided before, then the best of the rest."""
        yield from [self.jobs[row] for row in self.begun]
        while (row := self.choose()) is not None:
            yield self.jobs[row]

    def choose(self) -> int | None:
        """Choose the next run by what has ended, and record it; None: no more."""
        if self.asked.error is not None and self.half is not None and self.half <= self.asked.error:
            return None
        self.design.cost = costs = self.costs()
        pending = list(self.begun)
        if self.asked.flops is not None:
            running = sum(float(costs[row]) for row in pending)
            left = (1 - rules.TEST) * self.asked.budget - self.spent - running
        else:
            left = SLACK * (1 - rules.TEST) * self.asked.budget - self.elapsed()
        affordable = (costs <= left) & ~self.table.index.isin(self.failed)
        found = self.design.next(affordable, pending)
        if found is None:
            return None
        row, part = found
        job = self.jobs[row]
        self.begun[row] = time.monotonic()
        trunk = job.trunk.path.name if job.trunk else None
        facts = {"cost": float(costs[row]), "trunk": trunk, "branch_step": job.branch_step}
        self.note("choose", row=row, run=job.run.path.name, **facts, expected=part, half=self.half)
        return row

    def ended(self, job: Job, outcome: Outcome) -> None:
        """Record how a chosen run ended, and say what is known now."""
        row = self.jobs.index(job)
        seconds = time.monotonic() - self.begun.pop(row)
        if outcome.metric is None:
            self.failed.append(row)
        elif row not in self.resumed:
            self.took.append((job.config.model.d_model, self.estimated(job), seconds))
        facts = {"status": outcome.status, "loss": outcome.metric, "seconds": round(seconds, 2)}
        self.learn(row, outcome.metric, job.flops)
        self.note("end", row=row, **facts, half=self.half, reason=outcome.reason)
        words = (
            f"loss {outcome.metric:.4f}" if outcome.metric else f"{outcome.status} {outcome.reason}"
        )
        known = f"; target ±{self.half:.1%}" if self.half is not None else ""
        say(self.console, f"{self.clock()}  {job.label}  {words}{known}")

    def learn(self, row: int, loss: float | None, flops: float) -> None:
        """Take a loss into the design, and find how well the target is known with it."""
        self.spent += flops
        if loss is None:
            return
        self.design.tell(row, loss)
        if (made := self.design.fit()) is not None:
            names = list(self.design.target.columns)
            self.design.target = pd.DataFrame([self.target()])[names]
            place = {name: self.design.target[name].to_numpy() for name in names}
            _, half = made.at(place, place["D"] * self.per_token(place["N"]))
            self.half = float(np.sinh(half[0]))

    def clock(self) -> str:
        if self.asked.flops is not None:
            return f"{self.spent:.1e} of {self.asked.flops:.1e} FLOPs"
        return f"{clock(self.elapsed())} of {clock(self.asked.budget)}"

    def replay(self) -> None:
        """Take over the decisions and the losses that are recorded."""
        for line in self.lines:
            if line["event"] == "choose":
                job = self.jobs[line["row"]]
                trunk = line["trunk"]
                job.trunk = rundir.RunDir(self.folder / trunk) if trunk else None
                job.branch_step = line["branch_step"]
                self.begun[line["row"]] = time.monotonic()
            elif line["event"] == "end":
                job = self.jobs[line["row"]]
                self.begun.pop(line["row"], None)
                if line["loss"] is None:
                    self.failed.append(line["row"])
                self.learn(line["row"], line["loss"], job.flops)

    # --- the stages

    def sweep_rates(self, engine: Engine) -> None:
        """Find the learning rate by a short sweep at a small size; under µP it serves all."""
        if any(word.startswith("optim.learning_rate=") for word in self.asked.overrides):
            return
        recipe, line = self.recipe, self.find("rate")
        if line is None:
            width, tokens = recipe.widths[1], recipe.lengths[len(recipe.lengths) // 2]
            words = [*recipe.run(width, tokens, 1), f"study={self.asked.study}-rates"]
            jobs = compose_jobs([[*words, f"optim.learning_rate={r:g}"] for r in RATES], TRAINING)
            TRAINING.prepare(jobs, (), self.console)
            losses = {}
            for job, outcome in self.run(engine, jobs):
                if outcome.metric is not None:
                    losses[job.config.optim.learning_rate] = outcome.metric
            line = self.note("rate", rate=best_rate(losses), losses=losses, width=width)
        say(
            self.console,
            f"rate        {line['rate']:g}, the best of a sweep at d_model={line['width']}",
        )
        recipe.overrides.append(f"optim.learning_rate={line['rate']:g}")

    def run(self, engine: Engine, jobs: Iterable[Job]) -> Iterator[tuple[Job, Outcome]]:
        """Yield each job with its outcome.  Raises signals.Stopped where one was interrupted."""
        for job, outcome in engine(jobs, self.folder):
            if outcome.status == "interrupted":
                raise signals.Stopped(signals.received() or signal.SIGINT)
            yield job, outcome

    def explore(self, engine: Engine) -> None:
        """Make the runs that are worth most, until the part of the budget for them is spent."""
        self.replay()
        self.resumed = set(self.begun)
        while (first := next(jobs := self.chosen(), None)) is not None:
            for job, outcome in self.run(engine, itertools.chain([first], jobs)):
                self.ended(job, outcome)

    def predict(self) -> dict[str, Any]:
        """Predict the loss of the most expensive runs before they begin, and write it down.

        Of each size as long a run as a quarter of the budget pays for, that of the lowest loss is
        the test.  Raises RunError where too few runs have ended.
        """
        if self.prediction.exists():
            return fileio.read_json(self.prediction)
        made, recipe = self.design.fit(), self.recipe
        if made is None:
            raise RunError(f"{len(self.design.losses)} runs have a loss, too few for any law")
        factors = self.slower()[0] if self.asked.flops is None else {}
        tokens = {w: recipe.longest(w, SAFE * factors.get(w, 1 / SAFE)) for w in recipe.widths}
        able = [w for w in recipe.widths if tokens[w] >= rules.FEWEST_STEPS * recipe.batch_tokens]
        n = np.array([float(recipe.parameters[w]) for w in able])
        d = np.array([float(tokens[w]) for w in able])
        flops = d * np.array([recipe.flops_per_token[w] for w in able])
        log_loss, half = made.at({"N": n, "D": d, "U": np.minimum(d, recipe.one_pass)}, flops)
        best = int(np.argmin(log_loss))
        ends = np.exp(log_loss[best] + half[best] * np.array([0.0, -1.0, 1.0]))
        names = [self.jobs[row].run.path for row in self.design.losses]
        prediction = {
            "made": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "seconds": round(self.elapsed(), 1),
            **dict(zip(("predicted", "low", "high"), ends.tolist(), strict=True)),
            "d_model": able[best],
            "tokens": tokens[able[best]],
            "parameters_non_embedding": n[best],
            "flops": flops[best],
            "seeds": [TEST_SEED + i for i in range(min(self.share.at_once, rules.SEEDS))],
            "forecast": made.by_law,
            "from_runs": {path.name: fileio.sha256(path / "results.json") for path in names},
        }
        fileio.write_json(self.prediction, prediction)
        return prediction

    def test(self, engine: Engine) -> dict[str, Any]:
        """Train the runs that were predicted, and score the prediction."""
        said = self.predict()
        low, high = said["low"], said["high"]
        words = f"d_model={said['d_model']} tokens={short(said['tokens'])}"
        say(
            self.console,
            f"{self.clock()}  predicted for {words}: {said['predicted']:.4f} "
            f"({low:.4f} to {high:.4f}), written to {self.prediction}",
        )
        if (scored := self.find("score")) is None:
            runs = [self.recipe.run(said["d_model"], said["tokens"], s) for s in said["seeds"]]
            known = [list(job.overrides) for job in self.jobs]
            jobs = compose_jobs([*known, *runs], TRAINING)[len(known) :]
            TRAINING.prepare(jobs, (), self.console)
            ended = list(self.run(engine, jobs))
            losses = {job.config.seed: one.metric for job, one in ended if one.metric is not None}
            if not losses:
                raise RunError(f"the test failed: {ended[0][1].reason or ended[0][1].status}")
            mean = float(np.mean(list(losses.values())))
            error, inside = (
                said["predicted"] / mean - 1,
                [low <= x <= high for x in losses.values()],
            )
            scored = self.note("score", losses=losses, loss=mean, error=error, inside=inside)
        where = "inside" if all(scored["inside"]) else "outside"
        say(
            self.console,
            f"{self.clock()}  measured {scored['loss']:.4f}: off by "
            f"{abs(scored['error']):.2%}, {where} the interval",
        )
        return scored


def best_rate(losses: Mapping[float, float]) -> float:
    """Return the learning rate of least loss, by a parabola in its logarithm through the best of
    a sweep and its neighbours.  Raises RunError where no run of the sweep ended."""
    if not losses:
        raise RunError("no run of the sweep of learning rates has a loss")
    rates = sorted(losses)
    best = min(range(len(rates)), key=lambda i: losses[rates[i]])
    if 0 < best < len(rates) - 1:
        near = rates[best - 1 : best + 2]
        a, b, _ = np.polyfit(np.log(near), [losses[rate] for rate in near], 2)
        if a > 0:
            return float(f"{np.exp(np.clip(-b / (2 * a), *np.log(near)[[0, 2]])):.2g}")
    return rates[best]


def find_law(asked: Asked, output_dir: str, console: Console) -> None:
    """Find the law that ``asked`` asks for, or resume the study that looks for it.

    Raises ConfigError before anything is trained where text or budget are too small.
    """
    rules.check(asked.overrides)
    folder = Path(output_dir, asked.study)
    words = [*asked.overrides, *rules.shape(rules.WIDTHS[0]), f"study={asked.study}"]
    (first,) = compose_jobs([words], TRAINING)
    check_engine(first.config.launcher)
    with contextlib.ExitStack() as held:
        share, engine = held.enter_context(ready([first] * rules.SIZES, rules.SIZES))
        held.enter_context(fileio.locked(folder, folder.parent, "study"))
        study = LawStudy(asked, share, folder, console)
        begin = study.find("begin")
        if begin is None:
            recipe = rules.make(asked, share, console)
            begin = study.note("begin", asked=dataclasses.asdict(asked), recipe=recipe.facts())
        study.recipe = Recipe.read(begin["recipe"])
        held.enter_context(study.marking_time())
        for line in rules.describe(study.recipe, asked, share):
            say(console, line)
        study.sweep_rates(engine)
        study.open()
        study.explore(engine)
        study.test(engine)
    write_summary(folder, TRAINING)
    TRAINING.fit(folder, console)
