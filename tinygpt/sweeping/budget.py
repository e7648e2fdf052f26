"""Find a law within a budget: choose runs one after the other, then put a prediction to the test.

It is a study like any other, of ordinary run folders, by any launcher.  What is decided is written
to ``design.jsonl`` before it is done, so that a study that was killed takes the same decisions.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import signal
import time
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console

from tinygpt import cli, fileio, signals
from tinygpt.config import ConfigError, RunError
from tinygpt.runs import rundir
from tinygpt.scaling.design import FEWEST, Design
from tinygpt.scaling.laws import LAWS
from tinygpt.scaling.wording import equation
from tinygpt.sweeping import recipe as rules
from tinygpt.sweeping.engines import Engine, Share, check_engine, ready
from tinygpt.sweeping.jobs import Job, compose_jobs
from tinygpt.sweeping.kinds import TRAINING, stable_steps_of
from tinygpt.sweeping.recipe import Asked, Recipe
from tinygpt.sweeping.record import Record
from tinygpt.sweeping.study import write_summary
from tinygpt.sweeping.view import say, say_below
from tinygpt.sweeping.workers import Outcome
from tinygpt.training.console import clock, short

TRUST = (1.0, 0.3)  # standard deviations of the guesses OVERHEAD and SLOWER
SHRINK = 5.0  # seconds of runs of a width that count as much as those of all others
SAFE = 1.1  # of the time that a test run may take
SLACK = 0.97  # of the budget: the rest is for runs that take longer than they should
RATES = (1e-3, 2e-3, 4e-3, 8e-3)  # of learning, at the width that µP begins from
TEST_SEED = 101  # the first: no run before has it
TELL = 0.1  # part of the budget between lines that say what the law is


@dataclasses.dataclass(frozen=True)
class TimeLeft:
    """Show on a terminal what is left of the budget, as it passes."""

    study: LawStudy

    def __rich__(self) -> str:
        return f"training, {self.study.left()}"


class LawStudy:
    """One study: its recipe, the runs it can make, and what was decided and found so far."""

    recipe: Recipe
    table: pd.DataFrame  # a row for each run that can be chosen
    jobs: list[Job]  # in the same order
    design: Design

    def __init__(self, asked: Asked, share: Share, folder: Path, console: Console) -> None:
        self.asked, self.share, self.folder, self.console = asked, share, folder, console
        self.record, self.prediction = Record(folder / "design.jsonl"), folder / "prediction.json"
        self.begun: dict[int, float] = {}  # row -> when it began, of runs that have not ended
        self.resumed: set[int] = set()  # rows of runs that an earlier start began
        self.failed: list[int] = []  # rows that are not chosen again
        self.spent = 0.0  # FLOPs
        self.took: list[tuple[int, float, float]] = []  # width, seconds as timed, as they were
        self.tests: list[int] = []  # rows of the runs that test the prediction, once it is made
        self.half: float | None = None  # of the interval at the target, as a part of the loss
        self.words = ""  # what is known now: the law that weighs most, and the target's loss
        self.said = 0.0  # part of the budget that was spent when these words were last printed

    def open(self) -> None:
        """Make the list of runs that can be chosen."""
        self.table = self.recipe.table()
        rows = self.table[["width", "tokens", "seed"]].to_numpy().tolist()
        self.jobs = compose_jobs([self.recipe.run(*row) for row in rows], TRAINING)
        TRAINING.prepare(self.jobs, (), self.console)
        stable = sorted(set(map(stable_steps_of, self.jobs)), reverse=True)
        for job in self.jobs:  # the step where its own decay begins, then those of shorter runs
            job.keep_at = [step for step in stable if step <= stable_steps_of(job)]
        target = self.recipe.target(self.asked.target_flops, None)
        self.design = self.recipe.design(self.table, target)
        if self.prediction.exists():
            self.add_tests(fileio.read_json(self.prediction))

    def add_tests(self, said: Mapping[str, Any]) -> None:
        """Add the runs whose loss was predicted to those that can be made."""
        width, tokens, seeds = said["d_model"], said["tokens"], said["seeds"]
        ends = [list(self.jobs[row].overrides) for row in (0, -1)]  # so that names say it all
        runs = [self.recipe.run(width, tokens, seed) for seed in seeds]
        jobs = compose_jobs([*ends, *runs], TRAINING)[2:]
        TRAINING.prepare(jobs, (), self.console)
        rows = [{"width": width, "tokens": tokens, "seed": seed} for seed in seeds]
        self.jobs += jobs
        self.tests = list(range(len(self.jobs) - len(jobs), len(self.jobs)))
        self.table = pd.concat([self.table, self.recipe.placed(rows)], ignore_index=True)
        known = self.design
        target = {str(name): float(value) for name, value in known.target.iloc[0].items()}
        self.design = self.recipe.design(self.table, target)
        self.design.losses = known.losses

    # --- what a run costs

    def slower(self) -> tuple[dict[int, float], float]:
        """Return by what factor runs of each width are slower than was timed, and the seconds that
        a run needs beside: the first guesses, drawn to how long the runs took."""
        rows = [[1 / TRUST[0], 0.0], [0.0, 1 / TRUST[1]]]
        right = [rules.OVERHEAD / TRUST[0], rules.SLOWER / TRUST[1]]
        for _, timed, took in self.took:
            spread = 0.2 * timed + 0.5
            rows.append([1 / spread, timed / spread])
            right.append(took / spread)
        beside, factor = np.linalg.lstsq(np.array(rows), np.array(right), rcond=None)[0]
        beside, factor = max(0.2, float(beside)), max(0.5, float(factor))
        each = {}
        for width in self.recipe.widths:
            own = [(one, took - beside) for w, one, took in self.took if w == width]
            timed, took = map(sum, zip((SHRINK, SHRINK * factor), *own, strict=True))
            each[width] = max(0.5, took / timed)
        return each, beside

    def timed(self, job: Job) -> float:
        """Return what the steps of a job cost by the timing before the first run."""
        return self.recipe.cost(job.config.model.d_model, job.steps)

    def longest(self) -> dict[int, tuple[int, float]]:
        """Return for each width the tokens and the highest cost of the longest run of a test."""
        recipe, found = self.recipe, dict[int, tuple[int, float]]()
        for width, factor in self.slower()[0].items():
            slower = SAFE * factor if self.asked.flops is None else 1.0
            tokens = recipe.longest(width, slower)
            found[width] = tokens, slower * recipe.cost(width, tokens / recipe.batch_tokens)
        return found

    def states(self, rows: Iterable[int]) -> dict[tuple[int, int, int], rundir.RunDir]:
        """Return what runs leave for others to start from, by width, seed and step."""
        found: dict[tuple[int, int, int], rundir.RunDir] = {}
        for job in (self.jobs[row] for row in rows):
            found |= {place: job.run for place in places(job) if place[2] > job.branch_step}
        return found

    def costs(self) -> Any:
        """Return what each run would cost now, (n,): where another one of its size and seed has
        left a state at the constant rate, only the steps from there."""
        there = self.states(self.design.losses)
        for row, job in enumerate(self.jobs):
            if row not in self.begun and row not in self.design.losses:
                first = next((place for place in places(job) if place in there), None)
                job.trunk, job.branch_step = (there[first], first[2]) if first else (None, 0)
        own = np.array([self.timed(job) for job in self.jobs])
        if self.asked.flops is not None:
            return own
        factors, beside = self.slower()
        return self.table["width"].map(factors).to_numpy() * own + beside

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
        if self.tests and not self.begun.keys() & set(self.tests):
            return None
        self.design.cost = costs = self.costs()
        pending = list(self.begun)
        of_test = 0.0 if self.tests else max(cost for _, cost in self.longest().values())
        if self.asked.flops is not None:
            running = sum(float(costs[row]) for row in pending)
            left = self.asked.budget - of_test - self.spent - running
        else:
            left = SLACK * self.asked.budget - of_test - self.record.elapsed()
        free = ~self.table.index.isin([*self.failed, *pending, *self.design.losses])
        more = FEWEST - len(self.design.losses) - len(pending) - 1  # runs that a law still needs
        kept = float(np.sort(costs[free])[: max(0, more)].sum())
        affordable = (costs <= left - kept / self.asked.at_once(self.share)) & free
        soon = self.states(pending)  # from which other runs will cost less
        waiting = np.array([bool(set(places(job)[:1]) & soon.keys()) for job in self.jobs])
        found = self.design.next(affordable & ~waiting, pending)
        found = found or self.design.next(affordable, pending)
        if found is None:
            return None
        row, part = found
        job = self.jobs[row]
        self.begun[row] = time.monotonic()
        trunk = job.trunk.path.name if job.trunk else None
        facts = {"cost": float(costs[row]), "trunk": trunk, "branch_step": job.branch_step}
        self.record.note("choose", row=row, run=job.run.path.name, **facts, expected=part)
        return row

    def ended(self, job: Job, outcome: Outcome) -> None:
        """Record how a run ended, and say what is known now."""
        row, loss = self.jobs.index(job), outcome.metric
        seconds = time.monotonic() - self.begun.pop(row)
        if loss is not None and row not in self.resumed:
            self.took.append((job.config.model.d_model, self.timed(job), seconds))
        self.learn(row, loss)
        self.judge()
        facts = {"status": outcome.status, "loss": loss, "seconds": round(seconds, 2)}
        facts |= {"half": self.half, "reason": outcome.reason}
        self.record.note("test" if row in self.tests else "end", row=row, **facts)
        words = f"{outcome.status} {outcome.reason}" if loss is None else f"loss {loss:.4f}"
        known = "" if self.half is None else f"; target ±{self.half:.1%}"
        length = short(job.plan.total_steps * self.recipe.batch_tokens)
        what = f"d_model={job.config.model.d_model} tokens={length} seed={job.config.seed}"
        say(self.console, f"{self.left()}  {what}  {words}{known}")
        if self.words and self.used() >= self.said + TELL:
            self.said = self.used()
            say_below(self.console, "law so far", self.words)

    def learn(self, row: int, loss: float | None) -> None:
        """Take a loss into the design."""
        job = self.jobs[row]
        if self.asked.flops is not None:
            self.spent += self.timed(job)
        if loss is None:
            self.failed.append(row)
        else:
            self.design.tell(row, loss)

    def judge(self) -> None:
        """Find by all losses how well the target is known."""
        if (made := self.design.fit()) is not None:
            target = self.recipe.target(self.asked.target_flops, made)
            self.design.target = pd.DataFrame([target])[list(self.design.target.columns)]
            place = {name: np.array([value]) for name, value in target.items()}
            log_loss, half = made.at(place, self.recipe.flops_of(place["N"], place["D"]))
            self.half = float(np.sinh(half[0]))
            law = LAWS[made.main.law]
            shown = equation(law, law.natural(made.main.theta, made.main.points.centres))
            where = f"N={short(target['N'])} D={short(target['D'])}"
            self.words = f"{shown}; at {where} {np.exp(log_loss[0]):.3f} ±{self.half:.1%}"

    def used(self) -> float:
        """Return the part of the budget that is spent."""
        return (self.spent if self.asked.flops else self.record.elapsed()) / self.asked.budget

    def left(self) -> str:
        """Return what is left of the budget, in words."""
        left = max(0.0, 1 - self.used()) * self.asked.budget
        return f"{clock(left) if self.asked.flops is None else f'{left:.1e} FLOPs'} left"

    def replay(self) -> None:
        """Take over the decisions and the losses that are recorded."""
        for line in self.record.lines:
            if line["event"] == "choose":
                job = self.jobs[line["row"]]
                trunk = line["trunk"]
                job.trunk = rundir.RunDir(self.folder / trunk) if trunk else None
                job.branch_step = line["branch_step"]
                self.begun[line["row"]] = time.monotonic()
            elif line["event"] in ("end", "test"):
                self.begun.pop(line["row"], None)
                self.learn(line["row"], line["loss"])
        ended = {*self.design.losses, *self.failed}
        if not self.record.find("score"):  # an earlier version has that of its tests alone
            self.begun |= {row: time.monotonic() for row in self.tests if row not in ended}
        self.judge()
        self.resumed = set(self.begun)

    # --- the stages

    def run(self, engine: Engine, jobs: Iterable[Job]) -> Iterator[tuple[Job, Outcome]]:
        """Yield each job with its outcome.  Raises signals.Stopped where one was interrupted."""
        with self.console.status(TimeLeft(self), refresh_per_second=4):
            for job, outcome in engine(jobs, self.folder):
                if outcome.status == "interrupted":
                    raise signals.Stopped(signals.received() or signal.SIGINT)
                yield job, outcome

    def sweep_rates(self, engine: Engine) -> None:
        """Find the learning rate by a short sweep at a small size; under µP it serves all."""
        if any(word.startswith("optim.learning_rate=") for word in self.asked.overrides):
            return
        recipe, line = self.recipe, self.record.find("rate")
        if line is None:
            width, tokens = recipe.widths[1], recipe.lengths[len(recipe.lengths) // 2]
            words = [*recipe.run(width, tokens, recipe.seed), f"study={self.asked.study}-rates"]
            jobs = compose_jobs([[*words, f"optim.learning_rate={r:g}"] for r in RATES], TRAINING)
            TRAINING.prepare(jobs, (), self.console)
            losses = {}
            for job, outcome in self.run(engine, jobs):
                if outcome.metric is not None:
                    losses[job.config.optim.learning_rate] = outcome.metric
            flops = sum(recipe.cost(width, job.steps) for job in jobs)
            facts = {"losses": losses, "width": width, "cost": flops}
            line = self.record.note("rate", rate=best_rate(losses), **facts)
        if self.asked.flops is not None:
            self.spent += line["cost"]
        rate = f"rate        {line['rate']:g}, the best of a sweep at d_model={line['width']}"
        say(self.console, rate)
        recipe.overrides.append(f"optim.learning_rate={line['rate']:g}")

    def train(self, engine: Engine) -> None:
        """Make runs as long as there are any to make."""
        is_here = self.share.engine in ("serial", "local")  # where each end is followed by a choice
        while (first := next(jobs := self.chosen(), None)) is not None:
            others = None if is_here else self.share.at_once - 1
            stage = itertools.chain([first], itertools.islice(jobs, others))
            for job, outcome in self.run(engine, stage):
                self.ended(job, outcome)

    def find(self, engine: Engine) -> None:
        """Make the runs that are worth most, then the test, and beside it what is still worth most.

        Raises RunError where too few runs have ended for a prediction, or none of the test.
        """
        self.replay()
        if not self.prediction.exists():
            self.train(engine)
            if (made := len(self.design.losses) + len(self.failed)) == len(self.table):
                words = f"all {made} runs of these sizes and lengths are made"
                say(self.console, f"{self.left()}  {words}")
            self.add_tests(self.predict())
            self.begun |= dict.fromkeys(self.tests, time.monotonic())
        said = fileio.read_json(self.prediction)
        words = f"d_model={said['d_model']} tokens={short(said['tokens'])}: {said['predicted']:.4f}"
        words += f" ({said['low']:.4f} to {said['high']:.4f})"
        say(self.console, f"{self.left()}  predicted for {words}")
        say(self.console, f"written to {self.prediction}, before it is tested")
        self.train(engine)
        scored = self.record.find("score") or self.score(said)
        where = "inside" if all(scored["inside"]) else "outside"
        words = f"measured {scored['loss']:.4f}: off by {abs(scored['error']):.2%}"
        say(self.console, f"{self.left()}  {words}, {where} the interval")

    def predict(self) -> dict[str, Any]:
        """Predict the loss of the most expensive runs before they begin, and write it down.

        Of the longest runs that take more FLOPs than any before, that of the lowest loss is the
        test.  Raises RunError where too few runs have ended.
        """
        made, recipe = self.design.fit(), self.recipe
        if made is None:
            raise RunError(f"{len(self.design.losses)} runs have a loss, too few for any law")
        longest = self.longest()
        able = [w for w in longest if longest[w][0] >= rules.FEWEST_STEPS * recipe.batch_tokens]
        n = np.array([float(recipe.parameters[w]) for w in able])
        d = np.array([float(longest[w][0]) for w in able])
        places = recipe.places(n, d)
        flops = d * np.array([recipe.flops_per_token[w] for w in able])
        log_loss, half = made.at(places, flops)
        most = max(self.design.size[row] for row in self.design.losses)
        dearer = flops > most if (flops > most).any() else flops == flops.max()
        best = int(np.argmin(np.where(dearer, log_loss, np.inf)))
        ends = np.exp(log_loss[best] + half[best] * np.array([0.0, -1.0, 1.0]))
        used = (self.jobs[row].run for row in self.design.losses)
        tokens, cost = longest[able[best]]
        seed = TEST_SEED + recipe.seed - 1
        said = {
            "made": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "seconds": round(self.record.elapsed(), 1),
            **dict(zip(("predicted", "low", "high"), ends.tolist(), strict=True)),
            "level": 0.95,
            "d_model": able[best],
            "tokens": tokens,
            "parameters_non_embedding": int(n[best]),
            "flops": float(flops[best]),
            "seeds": [seed + i for i in range(self.asked.tests(self.share, cost))],
            "laws": made.by_law,
            "from_runs": {run.path.name: fileio.sha256(run.results) for run in used},
        }
        fileio.write_json(self.prediction, said)
        return said

    def score(self, said: Mapping[str, Any]) -> dict[str, Any]:
        """Compare the prediction with the losses of the test, and record it.  Raises RunError where
        no run of the test has a loss."""
        found = self.design.losses
        losses = {self.jobs[row].config.seed: found[row] for row in self.tests if row in found}
        if not losses:
            line = self.record.find("test") or {}
            raise RunError(f"the test failed: {line.get('reason') or line.get('status')}")
        mean = float(np.mean(list(losses.values())))
        inside = [said["low"] <= loss <= said["high"] for loss in losses.values()]
        facts = {"losses": losses, "loss": mean, "error": said["predicted"] / mean - 1}
        return self.record.note("score", **facts, inside=inside)


def places(job: Job) -> list[tuple[int, int, int]]:
    """Return where a run leaves its state, last first: width, seed and step."""
    return [(job.config.model.d_model, job.config.seed, step) for step in job.keep_at]


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
    folder = Path(output_dir, asked.study)
    words = [*asked.overrides, *rules.shape(rules.WIDTHS[0]), f"study={asked.study}"]
    (first,) = compose_jobs([words], TRAINING)
    check_engine(first.config.launcher)
    with contextlib.ExitStack() as held:
        share, engine = held.enter_context(ready([first] * rules.SIZES, rules.SIZES))
        if asked.plan:
            recipe = rules.make(asked, share, console)
            for line in rules.describe(recipe, asked, share):
                say(console, line)
            rules.print_plan(recipe, asked, share, console)
            return
        # a study that cannot begin leaves no folder; of one that has, the record is read locked
        new = None if folder.exists() else rules.make(asked, share, console)
        held.enter_context(fileio.locked(folder, folder.parent, "study"))
        study = LawStudy(asked, share, folder, console)
        begin = study.record.find("begin")
        recipe = Recipe.read(begin["recipe"]) if begin else new or rules.make(asked, share, console)
        if begin is None:
            study.record.note("begin", asked=dataclasses.asdict(asked), recipe=recipe.facts())
        elif (begin["asked"]["overrides"], recipe.seed) != (asked.overrides, asked.seed):
            raise ConfigError(f"study={asked.study}: begun with other keys; give another study=")
        study.recipe = recipe
        cli.loaded()
        study.record.start = time.monotonic()  # the budget is for training and evaluation
        held.enter_context(study.record.marking_time())
        for line in rules.describe(recipe, asked, share):
            say(console, line)
        study.sweep_rates(engine)
        study.open()
        study.find(engine)
    write_summary(folder, TRAINING)
    TRAINING.fit(folder, console)
