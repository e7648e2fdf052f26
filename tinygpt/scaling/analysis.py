"""From runs to a law and what is to be thought of it: everything that a report says, as numbers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from tinygpt.config import ConfigError
from tinygpt.scaling.columns import (
    WORDS,
    Columns,
    choice,
    other_settings,
    places_of,
    question,
    varied,
)
from tinygpt.scaling.evidence import (
    Check,
    Distance,
    check_design,
    check_finished,
    check_fit,
    correlation,
)
from tinygpt.scaling.fitting import Fit, fit
from tinygpt.scaling.frontier import Budget, Frontier, frontier, predict
from tinygpt.scaling.intervals import (
    LEVEL,
    REPLICAS,
    Bootstrap,
    Interval,
    bootstrap,
    intervals,
    of_loss,
    predict_interval,
)
from tinygpt.scaling.laws import Array
from tinygpt.scaling.runs import SETTINGS, left_out_lines
from tinygpt.scaling.selection import (
    Candidate,
    NextRun,
    Noise,
    next_run,
    preferred,
    replicas,
    seed_noise,
    select,
    structure,
)
from tinygpt.scaling.single import SingleRun, no_single_run, single_runs
from tinygpt.scaling.split import best_split, recorded

# Columns that a training ends with; the loss before it and the entropy of the corpus are none.
_OUTCOME = re.compile(
    r"^(?!initial|(\w+_)?irreducible).*(loss|perplexity|ppl|accuracy|bits_per|bpb|bpc|nll)", re.I
)
INSEPARABLE = 0.98  # a correlation of log N and log D from which on no law tells them apart
FURTHER = 10.0  # the prediction asked for lies at so many times the largest compute, or x


@dataclass(frozen=True)
class Prediction:
    """The loss at a place where nothing was trained."""

    place: dict[str, float]  # variable -> value
    flops: float | None
    loss: Interval  # of the law there
    run: Interval  # of a single run there
    asked: bool = False  # for with ``predict=``


@dataclass(frozen=True)
class Analysis:
    """What ``report`` writes and ``plots`` draw."""

    question: str  # "How does the loss fall with ...?"
    chosen: Candidate  # the law of the report
    runs: pd.DataFrame  # the rows that were fitted
    curves: pd.DataFrame | None  # of these and others, where they are known
    left_out: pd.DataFrame  # the others, with a column ``reason``
    columns: Columns
    variables: dict[str, str]  # variable of the law -> column
    others: dict[str, dict[str, list[str]]]  # setting that differs besides -> value -> its runs
    words: dict[str, str]  # variable of the law -> what it is called, with its unit
    compute: Array  # FLOPs of each run, (n,)
    candidates: list[Candidate]  # the best first
    fit: Fit
    intervals: dict[str, Interval]
    in_total: Fit | None  # the same law where N counts the embeddings too
    total_intervals: dict[str, Interval]  # of that law
    noise: Noise | None
    structure: float | None  # p-value of there being none in the residuals
    checks: list[Check]
    single: list[SingleRun]  # every run left out in turn, what moves the prediction most first
    floor: float | None  # the entropy of the corpus where it is known exactly
    predictions: list[Prediction]
    unanswered: list[str]  # why what was asked for has no answer
    budgets: list[Budget]  # those that were asked for, at their best split
    frontier: Frontier | None
    next_run: NextRun | None
    seed: int  # of random starts
    notes: list[str]  # what was assumed, and what was left out, a line each

    @property
    def is_evidence(self) -> bool:
        """Whether nothing on the checklist failed."""
        return all(check.passed is not False for check in self.checks)


def analyse(
    runs: pd.DataFrame,
    left_out: pd.DataFrame,
    columns: Columns,
    *,
    law: str = "auto",
    estimator: str = "auto",
    threshold: float | None = None,
    variable: str = "auto",
    objective: str = "log",
    budgets: Sequence[float] = (),
    places: Sequence[Mapping[str, float]] = (),
    isoflop: str = "cubic",
    seed: int = 0,
    curves: pd.DataFrame | None = None,
    condition: str | None = None,
    notes: Sequence[str] = (),
) -> Analysis:
    """Fits every law that the runs can tell of, and judges the best, or the one asked for.

    ``variable`` names the x of a law in one variable (N, D, U, T or C); by default whatever
    varies.  ``objective`` says whether residuals are those of log L or of L (``raw``).
    ``budgets`` are FLOPs to predict the loss at, split between N and D in the best way, ``places``
    values to predict it at, by letter (``{"N": 13e9, "D": 5e12}``); ``isoflop`` is the curve
    through each budget;
    ``curves`` are those of the runs, for the frontier; ``condition`` is that of ``where=``, by
    which the runs were chosen; ``notes`` say how they were read.  Raises ConfigError where
    nothing can be fitted.
    """
    where = columns.where(runs)
    differing = varied(runs, where)
    laws, variables, words = choice(law, variable, differing, where)
    asked, note = places_of(places, variables, where)
    if isoflop != "cubic" and "x" in variables:
        raise ConfigError(f"isoflop={isoflop}: needs a law in N and D")
    if columns.n != Columns.n:  # of a table from elsewhere nobody says which count it is
        words = {name: word.replace(WORDS["N"], "parameters") for name, word in words.items()}
    compute = columns.compute(runs)
    settings: dict[str, str | float | int | None] = {
        "loss": columns.loss,
        "estimator": estimator,
        "threshold": threshold,
        "objective": objective,
        "seed": seed,
        **variables,
    }
    size, size_name = columns.size(runs, variables)
    candidates = select(runs, laws, size, **settings)
    chosen = preferred(candidates) if law == "auto" else next(c for c in candidates if c.law == law)
    best = chosen.fit
    if best is None:
        raise ConfigError(chosen.reason)
    cluster = columns.cluster(runs)
    drawn = bootstrap(best, REPLICAS, cluster=cluster, seed=seed) if cluster else REPLICAS
    found = _intervals(best, cluster, seed)
    settled = [*where.values(), *SETTINGS]
    noise = seed_noise(best, settled)
    shape = None if cluster else structure(best)
    floor = columns.floor(runs)
    joint = {"N", "D"} <= set(best.columns) and not _collinear(best)
    predictions = _predictions(best, compute, _budgets(best, columns, budgets))
    predictions += [_asked(best, compute, one) for one in asked]
    if cluster:
        predictions = [_of_replicas(one, drawn) for one in predictions]
    place = predictions[0].place if predictions else _largest(best, size)
    single = [] if cluster else single_runs(best, place, replicas(best, settled))
    ways = None
    if joint:
        per_token = recorded(best, compute)
        ways = frontier(
            best, compute, curves=curves, method=isoflop, per_token=per_token, replicas=drawn
        )
    named = columns.as_results(runs).assign(flops_exact=compute)  # of 6 N D, too
    others = other_settings(runs, columns, variables.values())
    settings |= {"estimator": best.estimator}
    if best.estimator == "huber":
        settings |= {"limit": best.optimum.threshold}
    total = _in_total(runs, best, columns, settings)
    checks = [
        *check_design(named),
        *check_finished(named, pd.concat([named, columns.as_results(left_out)])),
        *_own_rows(runs, cluster),
        *_nothing_else(best, differing, where),
        _one_task(runs, others, columns),
        *_unchosen(condition, columns.loss, left_out),
        no_single_run(single, [columns.name_of(runs, row) for row in range(len(runs))]),
        *check_fit(
            best,
            chosen.held_out,
            size_name,
            found,
            noise,
            shape,
            floor,
            _distance(best, compute, predictions, budgets),
            candidates,
        ),
        *_ways_agree(ways),
    ]
    return Analysis(
        question(words),
        chosen,
        runs,
        curves,
        left_out,
        columns,
        variables,
        others,
        words,
        compute,
        candidates,
        best,
        found,
        total,
        _intervals(total, cluster, seed) if total else {},
        noise,
        shape,
        checks,
        single,
        floor,
        predictions,
        [one for one in (note, _unanswered(best, budgets)) if one],
        [predict(best, flops, per_token=per_token, replicas=drawn) for flops in budgets if joint],
        ways,
        _next(best, compute, predictions),
        seed,
        [*notes, *left_out_lines(left_out, len(runs) + len(left_out))],
    )


def _largest(fit: Fit, size: Array) -> dict[str, float]:
    """Where the largest run lies."""
    row = int(np.argmax(size))
    return {name: float(fit.table[column].iloc[row]) for name, column in fit.columns.items()}


def _collinear(fit: Fit) -> bool:
    """Whether D goes so with N that no law can tell the two apart."""
    return (correlation(fit) or 0.0) > INSEPARABLE


def _of_replicas(one: Prediction, replicas: Bootstrap | int) -> Prediction:
    """The same prediction with the interval of replicas that drew whole runs."""
    assert isinstance(replicas, Bootstrap)
    found, estimate = replicas.of_loss(**one.place), one.loss.estimate
    law = replace(found, estimate=estimate, method="bootstrap over runs")
    wide = replace(law, low=min(law.low, one.run.low), high=max(law.high, one.run.high))
    return replace(one, loss=law, run=wide)


def _own_rows(runs: pd.DataFrame, cluster: str | None) -> Iterator[Check]:
    if cluster:
        detail = f"{len(runs)} rows of {runs[cluster].nunique()} runs: checkpoints had not decayed"
        yield Check("every row is a run of its own", False, detail)


def _unchosen(condition: str | None, loss: str, left_out: pd.DataFrame) -> Iterator[Check]:
    """Whether a ``where=`` read what the runs came to: runs picked by their result fit any law."""
    if condition is None:
        return
    words = re.sub(r"'[^']*'|\"[^\"]*\"", " ", condition)
    names = re.findall(r"`([^`]+)`", words) + re.findall(
        r"[^\W\d]\w*", re.sub("`[^`]+`", " ", words)
    )
    read = [name for name in dict.fromkeys(names) if name == loss or _OUTCOME.search(name)]
    gone = int((left_out["reason"] == f"not {condition}").sum())
    detail = f"where={condition}: {gone} left out"
    detail += f" by {', '.join(read)}, what they came to" if read and gone else ""
    yield Check("runs were not chosen by their loss", not (read and gone), detail)


def _nothing_else(fit: Fit, varied: Sequence[str], where: dict[str, str]) -> Iterator[Check]:
    """A law in one variable wants the other sizes held fixed."""
    if set(fit.columns) == {"x"}:
        others = [v for v in varied if where[v] != fit.columns["x"] and v in "NDU"]
        counts = {where[v]: fit.table[where[v]].nunique() for v in others}
        detail = ", ".join(f"{name} takes {count} values" for name, count in counts.items())
        yield Check(
            "nothing but its variable differs between the runs",
            not others,
            detail or "one variable was varied",
        )


def _one_task(
    runs: pd.DataFrame, others: Mapping[str, Mapping[str, Sequence[str]]], columns: Columns
) -> Check:
    """What the recipe does not say and no law corrects for: as of an older run in the folder."""
    name = "one vocabulary, context and text"
    task = [columns.t, "max_seq_len", "vocab_size", "tokenizer", "dataset", "init_from"]
    if not set(task) & set(runs):
        return Check(name, None, "the table does not say")
    mixed = [setting for setting in others if setting in task]
    kinds = "; ".join(f"{setting} {', '.join(list(others[setting])[:4])}" for setting in mixed)
    return Check(name, not mixed, kinds or "the same in every run, but for what the law has")


def _ways_agree(ways: Frontier | None) -> Iterator[Check]:
    if ways is not None and len(ways.estimates) > 1:
        detail = "; ".join(ways.disagreements) or f"{len(ways.estimates)} ways"
        yield Check("the ways to split a budget agree", not ways.disagreements, detail)


def _intervals(fit: Fit, cluster: str | None, seed: int) -> dict[str, Interval]:
    """Rows that share a run are no independent points: then whole runs are drawn anew."""
    if fit.degrees < 1:
        return {}
    if cluster is None:
        return intervals(fit, seed=seed)
    replicas = bootstrap(fit, cluster=cluster, seed=seed)
    return {name: replicas.interval(name) for name in fit.optimum.law.parameters}


def _in_total(
    runs: pd.DataFrame,
    best: Fit,
    columns: Columns,
    settings: dict[str, str | float | int | None],
) -> Fit | None:
    """The law with the embeddings counted in N, where the table has both counts."""
    name = next((v for v, column in best.columns.items() if column == columns.n), None)
    if name is None or columns.n_total is None or columns.n_total not in runs:
        return None
    return fit(runs, best.law, **{**settings, name: columns.n_total})  # type: ignore[arg-type]


def _budgets(best: Fit, columns: Columns, budgets: Sequence[float]) -> Sequence[float]:
    """Raises ConfigError where the law says nothing of FLOPs."""
    if any(not 0 < flops < float("inf") for flops in budgets):
        raise ConfigError(f"budgets={','.join(f'{b:g}' for b in budgets)}: must be above zero")
    by_compute = columns.c is not None and best.columns.get("x") == columns.c
    if budgets and not by_compute and not {"N", "D"} <= set(best.columns):
        raise ConfigError(
            f"budgets={','.join(f'{b:g}' for b in budgets)}: needs a law in N and D, or variable=C"
        )
    return budgets


def _unanswered(best: Fit, budgets: Sequence[float]) -> str:
    """Why there is nothing to say of ``budgets``; empty if there is."""
    if not budgets or not (_collinear(best) or ("x" in best.columns and best.degrees < 1)):
        return ""
    reason = "D goes with N" if _collinear(best) else "there are as many parameters as runs"
    return f"`budgets=` has no answer: {reason}."


def _predictions(best: Fit, compute: Array, budgets: Sequence[float]) -> list[Prediction]:
    """At ten times the largest compute, or the largest x; of a law of C also for each budget."""
    if best.degrees < 1 or _collinear(best):
        return []
    if {"N", "D"} <= set(best.columns):
        per_token = recorded(best, compute)
        flops = FURTHER * float(compute.max())
        try:
            n, d = best_split(best, flops, per_token)
        except ConfigError:  # the frontier says why
            return []
        place = {"N": n, "D": d, **({"U": d} if "U" in best.columns else {})}
        return [_predicted(best, place, flops)]
    (name,) = best.columns
    values = dict.fromkeys([FURTHER * float(best.table[best.columns[name]].max()), *budgets])
    return [_predicted(best, {name: value}, None) for value in values]


def _asked(best: Fit, compute: Array, place: dict[str, float]) -> Prediction:
    """At a place that was asked for; without degrees of freedom no interval is known."""
    flops = None
    if {"N", "D"} <= set(place):
        flops = float(recorded(best, compute)(np.array([place["N"]]))[0]) * place["D"]
    if best.degrees < 1:
        nan = float("nan")
        none = Interval(float(best.predict(**place)[0]), nan, nan, LEVEL, "none")
        return Prediction(place, flops, none, none, asked=True)
    return replace(_predicted(best, place, flops), asked=True)


def _predicted(best: Fit, place: dict[str, float], flops: float | None) -> Prediction:
    law, run = (predict_interval(best, new_run=new_run, **place) for new_run in (False, True))
    return Prediction(place, flops, law, run)


def _distance(
    best: Fit, compute: Array, predictions: Sequence[Prediction], budgets: Sequence[float]
) -> Distance | None:
    """The furthest of what is predicted, measured by what the runs span: of the x of a law in one
    variable, else of the compute, and of a place that was asked for also of each variable."""
    if not predictions:
        return None
    names = dict(best.columns)
    ranges = {name: best.table[column].to_numpy(dtype=float) for name, column in names.items()}
    x = "x" if "x" in names else "C"
    ranges.setdefault(x, compute)
    places = [{x: FURTHER * ranges[x].max()}, *({x: flops} for flops in budgets)]
    for one in predictions:
        if one.asked:
            places.append(one.place | ({"C": one.flops} if one.flops else {}))
    found = []
    for place in places:
        for name, value in place.items():
            low, high = float(ranges[name].min()), float(ranges[name].max())
            word = "" if name in ("x", "C") else f"{name} = {value:.3g} is "
            found.append(Distance(max(value / high, low / value, 1.0), high / low, word))
    return max(found, key=lambda one: one.beyond / one.span)


def _next(best: Fit, compute: Array, predictions: Sequence[Prediction]) -> NextRun | None:
    """Among sizes and lengths from the smallest run on, at up to twice the cost of the largest."""
    if not predictions:
        return None
    target = of_loss(best, **predictions[0].place)
    columns = {name: best.table[column] for name, column in best.columns.items() if name != "U"}
    axes = [np.geomspace(v.min(), v.max() * 4, 33) for v in columns.values()]
    mesh = [axis.reshape(-1) for axis in np.meshgrid(*axes)]
    places = dict(zip(columns, mesh, strict=True))
    if "U" in best.columns:
        places["U"] = places["D"]
    largest = float(compute.max())
    if {"N", "D"} <= set(places):
        costs = recorded(best, compute)(places["N"]) * places["D"]
    else:
        (x,) = columns.values()
        costs = largest * places["x"] / float(x.max())
    cheap = costs <= 2 * largest
    return next_run(best, target, {k: v[cheap] for k, v in places.items()}, costs[cheap])
