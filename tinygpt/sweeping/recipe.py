"""Choose what the runs of a law within a budget have in common, by the sizes of text and budget.

Every rule of ``tinygpt.law`` that chooses a key is here; docs/laws.md lists them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console

from tinygpt import cli
from tinygpt.config import ConfigError
from tinygpt.scaling import noise
from tinygpt.scaling.design import Design
from tinygpt.scaling.forecast import Forecast
from tinygpt.scaling.laws import Array
from tinygpt.scaling.split import flops_per_token
from tinygpt.sweeping.engines import Share
from tinygpt.sweeping.jobs import Job, compose_jobs
from tinygpt.sweeping.kinds import TRAINING
from tinygpt.sweeping.view import make_table, say
from tinygpt.training.console import clock, short

WIDTHS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
HEAD = 16  # the width of a head
SIZES, LENGTHS, SEEDS = 7, 6, 3  # at most; each length is half of the next
BYTES = 4_000_000  # of training text: with less, a token is a byte
SMALL_TEXT = ("data.max_tokens=null", "tokenizer=byte", "data.val_fraction=0.1")
# With learned positions, seeds of short runs scatter three times as much, and losses are higher.
POSITION = "model.position=rope"
FIRST_TOKENS = 1_000_000  # of a larger text: enough to time its runs
BATCHES = (256, 32_768)  # tokens
STEPS = 8000  # of the longest run, as far as powers of two allow
FEWEST_STEPS = 250  # with less the seeds scatter by several per cent
ABLE = 2  # times so many steps: what the test's cost must pay for, of a size worth having
PER_PARAMETER = 10.0  # tokens of a test run of the middle size
FEWEST = 3  # sizes and lengths: less identify no law
PASSES = 8  # at most, over a text that is too small for one
TEST = 0.25  # of the budget of all workers: the test, whose loss is predicted before it begins
LONGEST = 0.5  # of the minutes, at most, that a run of the test may take
COSTLIEST = 0.75  # of a test run's cost, and of its FLOPs, that any other run may take
LAWS = ("chinchilla", "chinchilla_tied", "coupled", "kaplan_constant")
REPEATED = "data_constrained"  # is one of the laws too where tokens are read more than once
FURTHER = 10.0  # the target: the best split of so many times the compute of a test run
BALANCED = 20.0  # tokens per parameter of the target before a law is known (Hoffmann et al. 2022)
UNBALANCED = 10.0  # by which factor a law may move them: early ones would put the target anywhere
OVERHEAD, SLOWER = 1.0, 1.2  # seconds of a run beside its steps, and a factor: before any ended
# Half-widths at the target in simulated studies, as a part of what is expected without a loss.
PLANNED = 0.22
CLEAR = 0.01  # scatter of a run that hides little of what a plan asks


@dataclass(frozen=True)
class Asked:
    """Holds what the command asks for: a law of a text within so many minutes, or FLOPs."""

    overrides: list[str]  # of all runs: the text, and what is not to be chosen
    study: str
    minutes: float | None
    flops: float | None
    error: float | None = None  # half-width at the target, as a part of the loss, to stop at
    target_flops: float | None = None
    plan: bool = False
    seed: int = 1  # the first of the seeds of the runs

    @property
    def budget(self) -> float:
        """Return the seconds that all runs may take together, or their FLOPs."""
        return self.flops if self.flops is not None else 60 * (self.minutes or 0.0)

    def at_once(self, share: Share) -> int:
        """Return how many runs spend the budget at once: of FLOPs, each spends its own."""
        return 1 if self.flops is not None else share.at_once

    def test_cost(self, share: Share) -> float:
        """Return what one run of the test may cost: seconds, or FLOPs."""
        return self.budget * min(TEST * self.at_once(share), LONGEST)

    def tests(self, share: Share, cost: float) -> int:
        """Return how many runs of this cost the test has: a few long ones rather than one for each
        worker, because a law is best near its largest runs."""
        workers = self.at_once(share)
        return max(1, min(int(TEST * workers * self.budget / cost), workers, SEEDS))


@dataclass
class Recipe:
    """The ladder of sizes and lengths, what runs of them cost, and all other keys."""

    overrides: list[str]
    widths: list[int]
    lengths: list[int]  # tokens, the shortest first
    batch_tokens: int
    one_pass: int  # training tokens of the text
    bytes_per_token: float
    repeats: bool  # the text is too small for one pass
    step_costs: dict[int, float]  # by width: seconds, or FLOPs
    extra_steps: float  # that the last evaluation of a run costs
    parameters: dict[int, int]  # by width, without embeddings
    flops_per_token: dict[int, float]  # by width
    test_cost: float  # of one test run, seconds or FLOPs
    seed: int = 1  # the first of the seeds

    def run(self, width: int, tokens: int, seed: int) -> list[str]:
        """Return the overrides of one run."""
        return [*self.overrides, *shape(width), f"train.tokens={tokens}", f"seed={seed}"]

    def cost(self, width: int, steps: float) -> float:
        """Return what so many steps and the evaluation of a run are thought to cost."""
        return self.step_costs[width] * (steps + self.extra_steps)

    def longest(self, width: int, slower: float = 1.0) -> int:
        """Return the tokens of a test run of this width: what its cost and the text allow."""
        steps = self.test_cost / (self.step_costs[width] * slower) - self.extra_steps
        return min(int(steps), self.most() // self.batch_tokens) * self.batch_tokens

    def most(self) -> int:
        """Return the tokens of the longest run that the text allows."""
        return self.one_pass * (PASSES if self.repeats else 1)

    def table(self) -> pd.DataFrame:
        """Return a row for each run that can be chosen: its shape, and the variables of the law."""
        cost = COSTLIEST * self.test_cost
        flops = COSTLIEST * max(self.flops_per_token[w] * self.longest(w) for w in self.widths)
        rows = [
            {"width": width, "tokens": tokens, "seed": seed}
            for seed in range(self.seed, self.seed + SEEDS)
            for width in self.widths
            for tokens in self.lengths
            if self.cost(width, tokens / self.batch_tokens) <= cost
            and self.flops_per_token[width] * tokens <= flops
        ]
        return self.placed(rows)

    def placed(self, rows: Sequence[Mapping[str, int]]) -> pd.DataFrame:
        """Return a table of runs, with the variables of the law."""
        table = pd.DataFrame(rows)
        return table.assign(**self.places(table["width"].map(self.parameters), table["tokens"]))

    def places(self, n: Any, d: Any) -> dict[str, Array]:
        """Return the variables of the law at parameters and tokens, (n,) each; the unique tokens
        are one of them where the text is read more than once."""
        found = {"N": np.asarray(n, dtype=float), "D": np.asarray(d, dtype=float)}
        return {**found, "U": np.minimum(found["D"], self.one_pass)} if self.repeats else found

    def design(self, table: pd.DataFrame, target: Mapping[str, float]) -> Design:
        """Return the design that chooses among the rows of ``table``."""
        steps = table["D"].to_numpy() / self.batch_tokens
        return Design(
            table[list(target)],
            pd.DataFrame([target]),
            np.ones(len(table)),
            table["D"].to_numpy() * table["width"].map(self.flops_per_token).to_numpy(),
            (*LAWS, REPEATED) if self.repeats else LAWS,
            noise.guessed(steps),
            trunks=table.groupby(["width", "seed"]).ngroup().to_numpy(),
        )

    def flops_of(self, n: Any, d: Any) -> Any:
        """Return the FLOPs of training, by parameters without embeddings and tokens."""
        sizes = np.array([float(self.parameters[w]) for w in self.widths])
        each = np.array([self.flops_per_token[w] for w in self.widths])
        return flops_per_token(sizes, np.ones(len(sizes)), each)(n) * d

    def target(self, flops: float | None, made: Forecast | None) -> dict[str, float]:
        """Return the best split of ``flops``, by default ten times those of the largest test run:
        by the forecast, once there is one."""
        tests = [self.flops_per_token[w] * self.longest(w) for w in self.widths]
        flops = flops or FURTHER * max(tests)
        sizes = self.parameters.values()
        n = np.geomspace(min(sizes), 30 * max(sizes), 200)
        d = flops / self.flops_of(n, 1.0)
        places, away = self.places(n, d), np.abs(np.log(d / n / BALANCED))
        if made is None:
            best = int(np.argmin(away))
        else:
            loss, _ = made.at(places, np.full(len(n), flops))
            near = away <= max(np.log(UNBALANCED), away.min())
            best = int(np.argmin(np.where(near, loss, np.inf)))
        return {name: float(values[best]) for name, values in places.items()}

    def facts(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def read(cls, facts: Mapping[str, Any]) -> Recipe:
        """Return the recipe that ``facts`` came from; JSON's keys are texts."""
        by_width = ("step_costs", "parameters", "flops_per_token")
        more = {name: {int(w): v for w, v in facts[name].items()} for name in by_width}
        return cls(**{**facts, **more})


def shape(width: int) -> list[str]:
    return [f"model.d_model={width}", f"model.n_heads={width // HEAD}"]


def make(asked: Asked, share: Share, console: Console) -> Recipe:
    """Read the text, time a few steps of each size, and return what the runs have in common.

    Raises ConfigError where the text or the budget is too small for any law.
    """
    given = {item.partition("=")[0] for item in asked.overrides}
    fixed = ["model.parametrization=mup", "schedule=wsd", "schedule.min_ratio=0"]
    # of each run only the last validation loss counts; the others would cost as much as a short run
    fixed += [f"train.eval_every={10**15}", "train.eval_on_start=false"]
    fixed += ["trainer.limit_test_batches=0"]
    fixed += ["train.sample_tokens=0", f"study={asked.study}"]
    is_small = _is_small(asked)
    common = [*asked.overrides, *fixed]
    chosen = [POSITION, *(SMALL_TEXT if is_small else ())]
    common += [word for word in chosen if word.partition("=")[0] not in given]
    has_batch, has_limit = "train.batch_tokens" in given, is_small or "data.max_tokens" in given
    first = common if has_batch else [*common, f"train.batch_tokens={2 * BATCHES[0]}"]
    few = [] if has_limit else [f"data.max_tokens={FIRST_TOKENS}"]
    probe = _probe([*first, *few], WIDTHS[0], share, console)
    with cli.spinning("starting workers"):
        share.settle()  # so that what is timed has a core to itself
    batch, test_cost = probe.config.train.batch_tokens, asked.test_cost(share)
    top = test_cost / step_cost(asked, probe) * batch
    if not has_limit:  # of a large text no more is read than the longest run can use
        common.append(f"data.max_tokens={max(FIRST_TOKENS, int(top))}")
        probe = _probe([*first, common[-1]], WIDTHS[0], share, console)
    one_pass, bytes_per_token = _size(probe)
    top = min(float(one_pass), top)
    if not has_batch:
        batch = min(max(2 ** int(math.log2(max(1.0, top / STEPS))), BATCHES[0]), BATCHES[1])
        common.append(f"train.batch_tokens={batch}")
    least = FEWEST_STEPS * batch
    if one_pass < least:
        raise ConfigError(
            f"the text has {short(one_pass)} training tokens; a law needs at least {short(least)}: "
            f"{FEWEST_STEPS} steps of {batch}"
        )
    repeats = one_pass < 2 ** (FEWEST - 1) * least
    top = float(one_pass * PASSES) if repeats else top
    lengths = [int(top / 2**k) // batch * batch for k in range(LENGTHS)]
    lengths = sorted(tokens for tokens in lengths if tokens >= least)
    if "schedule.warmup_steps" not in given:
        common.append(f"schedule.warmup_steps={FEWEST_STEPS // 5}")
    costs, rows, extra = dict[int, float](), dict[int, dict[str, Any]](), 0.0
    with console.status("timing models of several sizes"):
        for width in WIDTHS:
            probe = _probe(common, width, share, console)
            costs[width], rows[width] = step_cost(asked, probe), probe.row
            extra = probe.val_tokens / batch / 3  # as a forward pass is a third of a step
            if len(costs) >= FEWEST and costs[width] * (ABLE * FEWEST_STEPS + extra) > test_cost:
                break
    able = [w for w in costs if costs[w] * (ABLE * FEWEST_STEPS + extra) <= test_cost]
    if min(len(able), len(lengths)) < FEWEST:
        needed = costs[WIDTHS[FEWEST - 1]] * (ABLE * FEWEST_STEPS + extra)
        needed *= asked.budget / test_cost
        raise _too_small(asked, needed)
    _check_pays(asked, share, costs, lengths, extra, batch)
    sizes = [rows[w]["parameters_non_embedding"] for w in able]
    tokens = [min(lengths[-1], (test_cost / costs[w] - extra) * batch) for w in able]
    widths = _amid(able, [n / d for n, d in zip(sizes, tokens, strict=True)])
    return Recipe(
        overrides=common,
        widths=widths,
        lengths=lengths,
        batch_tokens=batch,
        one_pass=one_pass,
        bytes_per_token=bytes_per_token,
        repeats=repeats,
        step_costs={w: costs[w] for w in widths},
        extra_steps=extra,
        parameters={w: rows[w]["parameters_non_embedding"] for w in widths},
        flops_per_token={w: rows[w]["flops_per_token"] for w in widths},
        test_cost=test_cost,
        seed=asked.seed,
    )


def _check_pays(
    asked: Asked,
    share: Share,
    costs: Mapping[int, float],
    lengths: Sequence[int],
    extra: float,
    batch: int,
) -> None:
    """Raise ConfigError where the budget does not pay for a sweep of rates and the cheapest runs
    that a law needs."""
    shortest = list(costs.values())[:FEWEST]
    pilot = sum(cost * (tokens / batch + extra) for cost in shortest for tokens in lengths[:FEWEST])
    pilot += 4 * shortest[1] * (lengths[len(lengths) // 2] / batch + extra)  # the rates
    needed = pilot / (1 - asked.test_cost(share) / asked.budget) / asked.at_once(share)
    if needed > asked.budget:
        raise _too_small(asked, needed)


def _too_small(asked: Asked, needed: float) -> ConfigError:
    enough = (
        f"flops={1.1 * needed:.2g}" if asked.flops else f"minutes={max(1, math.ceil(needed / 60))}"
    )
    return ConfigError(f"the budget is too small for a law of this text; it takes {enough}")


def _amid(widths: list[int], per_token: list[float]) -> list[int]:
    """Return the neighbouring widths about the one whose test run would see the tokens that suit
    it: of much larger sizes the loss does not depend on the size, and short runs say little.

    ``per_token`` are the parameters of each width per token of its longest run.
    """
    ends = range(min(SIZES, len(widths)), len(widths) + 1)

    def away(end: int) -> float:
        logs = [math.log(PER_PARAMETER * one) for one in per_token[max(0, end - SIZES) : end]]
        return abs(sum(logs) / len(logs))

    best = min(ends, key=away)
    return widths[max(0, best - SIZES) : best]


def _probe(common: Sequence[str], width: int, share: Share, console: Console) -> Job:
    """Return a prepared job of this width, which is not to be run."""
    (job,) = compose_jobs([[*common, *shape(width), f"train.steps={FEWEST_STEPS}"]], TRAINING)
    job.config.hardware.threads = share.threads
    TRAINING.prepare([job], (), console)
    return job


def _size(job: Job) -> tuple[int, float]:
    """Return the training tokens of the text that windows use, and the bytes of a token."""
    from tinygpt.data import corpora, shards
    from tinygpt.training.session import open_data, open_machine

    config = job.config
    cache = shards.cache_root(config.cache_dir)
    corpus = corpora.open_corpus(config.data)
    prepared = shards.prepare(corpus, config.data, config.tokenizer, cache)
    info = prepared.split("train").info
    used = open_data(config, prepared, open_machine(config)).windows.used_tokens
    return used, info["bytes"] / info["tokens"]


def step_cost(asked: Asked, job: Job) -> float:
    """Return the seconds of an optimizer step, timed here, or its FLOPs."""
    from tinygpt.training.hardware import seconds_per_step
    from tinygpt.training.session import open_machine

    row, config = job.row, job.config
    if asked.flops is not None:
        return float(row["flops_per_token"] * row["batch_tokens"])
    device = open_machine(config)
    return seconds_per_step(config, row["vocab_size"], job.plan, device)


def _is_small(asked: Asked) -> bool:
    """Return whether the training text is too small for tokens of several bytes."""
    from tinygpt.data import corpora

    config, size = cli.compose_config(asked.overrides), 0
    for split, document in corpora.split_documents(corpora.open_corpus(config.data), config.data):
        size += len(document.text.encode()) if split == "train" else 0
        if size > BYTES:
            return False
    return True


def describe(recipe: Recipe, asked: Asked, share: Share) -> list[str]:
    """Return what was chosen, a line each."""
    chosen = dict(word.split("=", 1) for word in recipe.overrides)
    widths = ", ".join(map(str, recipe.widths))
    spans = f"{short(recipe.lengths[0])} to {short(recipe.lengths[-1])}"
    passes = f", up to {PASSES} passes: it is small" if recipe.repeats else ", each read once"
    budget = f"{asked.flops:.1e} FLOPs" if asked.flops else f"{asked.minutes:g} minutes"
    return [
        f"text        {short(recipe.one_pass)} training tokens{passes}",
        f"tokenizer   {chosen.get('tokenizer', 'bpe')}; batches of {recipe.batch_tokens:,} tokens",
        f"sizes       d_model {widths}; µP, {chosen.get('model.position', 'learned')} positions",
        f"            {short(min(recipe.parameters.values()))} to "
        f"{short(max(recipe.parameters.values()))} parameters without embeddings",
        f"lengths     {spans} tokens, branches of one trunk for each size and seed",
        f"budget      {budget}, up to a quarter for the test; {share.words}",
    ]


def expected(recipe: Recipe, asked: Asked, share: Share) -> tuple[int, float]:
    """Return how many runs the budget pays for, and about how well the target will be known."""
    table = recipe.table()
    design = recipe.design(table, recipe.target(asked.target_flops, None))
    pairs = zip(table["width"], table["tokens"], strict=True)
    costs = np.array([recipe.cost(w, d / recipe.batch_tokens) for w, d in pairs])
    design.cost = costs if asked.flops is not None else SLOWER * costs + OVERHEAD
    left = (1 - TEST) * asked.budget * asked.at_once(share)
    made: list[int] = []
    while (found := design.next(design.cost <= left, made)) is not None:
        made.append(found[0])
        left -= float(design.cost[found[0]])
    return len(made), PLANNED * 1.96 * float(np.sqrt(design.expect(made)[1]))


def print_plan(recipe: Recipe, asked: Asked, share: Share, console: Console) -> None:
    """Print what each size costs, and what the budget and the text can and cannot answer."""
    table = make_table(
        "d_model", "parameters", "longest run", "time" if not asked.flops else "FLOPs"
    )
    for width in recipe.widths:
        tokens = recipe.longest(width)
        cost = recipe.cost(width, tokens / recipe.batch_tokens)
        shown = clock(cost) if not asked.flops else f"{cost:.1e}"
        table.add_row(str(width), short(recipe.parameters[width]), short(tokens), shown)
    console.print(table)
    count, half = expected(recipe, asked, share)
    words = f"about {count} runs, and the test; the loss at the target to about ±{half:.1%}"
    say(console, f"\n{words}")
    steps = recipe.longest(recipe.widths[0]) / recipe.batch_tokens
    scatter = 1.96 * float(noise.guessed(steps))
    say(console, f"the loss of a run of {steps:,.0f} steps varies between seeds by ±{scatter:.1%}")
    if scatter > CLEAR:
        needed = noise.SHORT / np.sqrt((CLEAR / 1.96 / noise.LEAST) ** 2 - 1)
        size = 1e-6 * needed * recipe.batch_tokens * recipe.bytes_per_token
        say(console, f"±{CLEAR:.0%} takes {needed:,.0f} steps: {size:.2g} MB of text, read once")
