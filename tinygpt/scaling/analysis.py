"""Fit and judge a law: compute everything that a report shows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from tinygpt.config import ConfigError
from tinygpt.config.settings import SMOKE
from tinygpt.scaling.columns import (
    WORDS,
    Columns,
    choice,
    other_settings,
    places_of,
    question,
    varied,
)
from tinygpt.scaling.diagnostics import check_law, count_once, dependence, spread_of
from tinygpt.scaling.evidence import (
    FAIL,
    NOT_TESTED,
    Check,
    check,
    check_choice,
    check_design,
    check_finished,
    check_validation,
)
from tinygpt.scaling.fitting import Fit, fit
from tinygpt.scaling.forecast import Forecast, HeldOut, Sample, forecast, groups_of, hold_out
from tinygpt.scaling.frontier import Budget, Frontier, frontier, loss_at, predict
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
from tinygpt.scaling.noise import Noise, replicas, seed_noise
from tinygpt.scaling.runs import SETTINGS, left_out_lines
from tinygpt.scaling.selection import Candidate, NextRun, next_run, preferred, select, structure
from tinygpt.scaling.single import SingleRun, single_runs
from tinygpt.scaling.split import best_split, recorded
from tinygpt.scaling.wording import times

INSEPARABLE = 0.98  # correlation of log N and log D above which no law tells them apart
FURTHER = 10.0  # the default prediction is at this multiple of the largest compute, or x


@dataclass(frozen=True)
class Prediction:
    """Hold the predicted loss at a place where nothing was trained."""

    place: dict[str, float]  # variable -> value
    flops: float | None
    loss: Interval  # of the law there
    run: Interval  # of a single run there, by the forecast
    asked: bool = False  # requested by ``predict=``


@dataclass(frozen=True)
class Analysis:
    """Hold all that a report says and draws about a law."""

    question: str  # "How does the loss fall with ...?"
    chosen: Candidate  # the law of the report
    runs: pd.DataFrame  # the rows that were fitted
    curves: pd.DataFrame | None  # loss curves of these and other runs, where known
    left_out: pd.DataFrame  # the others, with a column ``reason``
    columns: Columns
    variables: dict[str, str]  # variable of the law -> column
    others: dict[str, dict[str, list[str]]]  # any other setting that differs -> value -> its runs
    words: dict[str, str]  # variable of the law -> its name, with its unit
    compute: Array  # FLOPs of each run, (n,)
    candidates: list[Candidate]  # the best first
    fit: Fit
    intervals: dict[str, Interval]
    in_total: Fit | None  # the same law with the embeddings counted in N
    total_intervals: dict[str, Interval]  # of that law
    forecast: Forecast | None  # None for too few runs
    held_out: HeldOut | None  # the forecast, tested on held-out runs
    noise: Noise | None
    structure: float | None  # p-value of the test for structure in the residuals
    checks: list[Check]
    single: list[SingleRun]  # each run left out in turn, the most influential first
    floor: float | None  # the entropy of the corpus if known exactly
    predictions: list[Prediction]
    unanswered: list[str]  # why a request has no answer
    budgets: list[Budget]  # the requested ones, at their best split
    frontier: Frontier | None
    next_run: NextRun | None
    seed: int  # of random starts
    notes: list[str]  # what was assumed and what was left out, a line each

    @property
    def is_evidence(self) -> bool | None:
        """Return whether no check failed and larger runs were predicted with skill, or None for
        runs at smoke scale, which only try a study out."""
        if "scale" in self.runs and (self.runs["scale"] == "smoke").any():
            return None
        passed = {check.id for check in self.checks if check.passed}
        return {"predicts", "skill"} <= passed and FAIL not in self.outcomes

    @property
    def outcomes(self) -> list[str]:
        """Return the outcomes of the checks."""
        return [check.outcome for check in self.checks]

    @property
    def verdict(self) -> str:
        """Say whether the law can be relied on, or why not, and how many checks were not tested."""
        failed, untested = map(self.outcomes.count, (FAIL, NOT_TESTED))
        if self.is_evidence is None:
            return SMOKE
        if self.is_evidence and untested:
            were = "was" if untested == 1 else "were"
            return f"no check fails, {untested} of {len(self.checks)} {were} not tested"
        if self.is_evidence:
            return "all applicable checks pass"
        reason = "a check fails" if failed == 1 else f"{failed} checks fail"
        return f"not evidence yet: {reason if failed else 'no larger run was predicted'}"


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
    """Fit every law that these runs allow, and judge the best one or the one requested.

    ``variable`` names the x of a law in one variable (N, D, U, T or C), by default whatever varies.
    ``objective`` takes residuals in log L (``log``) or L (``raw``).  The loss is predicted at
    ``budgets``, in FLOPs and split optimally between N and D, and at ``places``, such as
    ``{"N": 13e9, "D": 5e12}``.  ``isoflop`` is the curve through each budget, ``curves`` are the
    loss curves of the runs, for the frontier, ``condition`` is the ``where=`` that chose the runs,
    and ``notes`` say how they were read.  Raises ConfigError where nothing can be fitted.
    """
    where = columns.where(runs)
    differing = varied(runs, where)
    laws, variables, words = choice(law, variable, differing, where)
    asked, note = places_of(places, variables, where)
    if isoflop != "cubic" and "x" in variables:
        raise ConfigError(f"isoflop={isoflop}: needs a law in N and D")
    if columns.n != Columns.n:  # a table from elsewhere does not say which count it is
        words = {name: word.replace(WORDS["N"], "parameters") for name, word in words.items()}
    compute = columns.compute(runs)
    settings: dict[str, Any] = {"loss": columns.loss, "estimator": estimator, **variables}
    settings |= {"threshold": threshold, "objective": objective, "seed": seed}
    size, size_name = columns.size(runs, variables)
    cluster = columns.cluster(runs)  # rows that share a run are not independent
    settled, tokens = [*where.values(), *SETTINGS], where.get("D")
    candidates = select(runs, laws, same=settled, tokens=tokens, cluster=cluster, **settings)
    chosen = preferred(candidates) if law == "auto" else next(c for c in candidates if c.law == law)
    best = chosen.fit
    if best is None:
        raise ConfigError(chosen.reason)
    in_x = "x" in best.columns
    has_compute = not in_x or best.columns["x"] == columns.c
    wrong = "" if has_compute else "needs a law in N and D, or variable=C"
    if any(not 0 < flops < float("inf") for flops in budgets):
        wrong = "must be above zero"
    if budgets and wrong:
        raise ConfigError(f"budgets={','.join(f'{b:g}' for b in budgets)}: {wrong}")

    total = _in_total(runs, best, columns, settings)
    tried = list(laws) if law == "auto" else [law]
    groups = groups_of(columns.dependence(runs, variables.values()))
    sample = Sample(runs, tried, variables, columns.loss, size, groups, seed, columns.trunks(runs))
    ahead: Forecast | None = None
    with contextlib.suppress(ConfigError):
        ahead = forecast(sample)
    held = hold_out(sample)
    found, of_total = (_intervals(one, cluster, seed) for one in (best, total))
    drawn = bootstrap(best, REPLICAS, cluster=cluster, seed=seed) if cluster else REPLICAS
    noise = None if cluster else seed_noise(best, settled, tokens)
    shape = None if cluster else structure(best)
    floor = columns.floor(runs)
    inseparable = dependence(best) > INSEPARABLE
    unanswered = [note] if note else []
    if budgets and (inseparable or (in_x and best.degrees < 1)):
        reason = "D goes with N" if inseparable else "there are as many parameters as runs"
        unanswered.append(f"`budgets=` has no answer: {reason}.")

    per_token = None if in_x else recorded(best, compute)
    wanted = [] if inseparable else _places(best, variables, compute, per_token, budgets)
    predictions = [_predicted(best, ahead, place, flops, drawn) for place, flops in wanted]
    for place in asked:
        each = None if per_token is None else float(per_token(np.array([place["N"]]))[0])
        one = _predicted(best, ahead, place, each and each * place["D"], drawn)
        predictions.append(replace(one, asked=True))
    ways: Frontier | None = None
    split_budgets: list[Budget] = []
    if per_token is not None and not inseparable:
        split: dict[str, Any] = {"per_token": per_token, "replicas": drawn}
        ways = frontier(best, compute, curves=curves, method=isoflop, **split)
        split_budgets = [predict(best, flops, **split) for flops in budgets]

    largest = runs.iloc[int(np.argmax(size))]
    place = {name: float(largest[column]) for name, column in best.columns.items()}
    place = predictions[0].place if predictions else place
    single = [] if cluster else single_runs(best, place, replicas(runs, settled))
    others = other_settings(runs, columns, variables.values())
    error = columns.validation_error(runs)
    checks = list(_checks_of_runs(runs, left_out, columns, compute, condition, others, best))
    checks.append(check_validation(runs, error, spread_of(best)))
    if in_x:
        more = [where[v] for v in differing if where[v] != best.columns["x"] and v in "NDU"]
        detail = ", ".join(f"{name} takes {runs[name].nunique()} values" for name in more)
        checks.append(check("one_variable", not more, detail or "one variable was varied"))
    checks += check_law(
        best,
        held_out=held,
        size=size_name,
        intervals=found,
        noise=noise,
        structure=shape,
        floor=floor,
        rivals=candidates,
        single=single,
        names=[columns.name_of(runs, row) for row in range(len(runs))],
        error=error,
    )
    checks.append(_check_distance(best, compute, predictions, budgets))
    if ways is not None and len(ways.estimates) > 1:
        detail = "; ".join(ways.disagreements) or f"{len(ways.estimates)} ways"
        checks.append(check("splits_agree", not ways.disagreements, detail))
    return Analysis(
        question=question(words),
        chosen=chosen,
        runs=runs,
        curves=curves,
        left_out=left_out,
        columns=columns,
        variables=variables,
        others=others,
        words=words,
        compute=compute,
        candidates=candidates,
        fit=best,
        intervals=found,
        in_total=total,
        total_intervals=of_total,
        forecast=ahead,
        held_out=held,
        noise=noise,
        structure=shape,
        checks=count_once(checks),
        single=single,
        floor=floor,
        predictions=predictions,
        unanswered=unanswered,
        budgets=split_budgets,
        frontier=ways,
        next_run=_next(best, compute, predictions, per_token),
        seed=seed,
        notes=[*notes, *left_out_lines(left_out, len(runs) + len(left_out))],
    )


def _in_total(
    runs: pd.DataFrame, best: Fit, columns: Columns, settings: dict[str, Any]
) -> Fit | None:
    """Refit the law with the embeddings counted in N, if the table has both counts."""
    name = next((v for v, column in best.columns.items() if column == columns.n), None)
    if name is None or columns.n_total is None or columns.n_total not in runs:
        return None
    settings = {**settings, "estimator": best.estimator, name: columns.n_total}
    limit = best.optimum.threshold  # used by Huber only
    return fit(runs, best.law, **{**settings, "weights": best.points.weights, "limit": limit})


def _intervals(fit: Fit | None, cluster: str | None, seed: int) -> dict[str, Interval]:
    """Return the intervals of the parameters, by a bootstrap over runs where rows share a run."""
    if fit is None or fit.degrees < 1:
        return {}
    if cluster is None:
        return intervals(fit, seed=seed)
    replicas = bootstrap(fit, cluster=cluster, seed=seed)
    names = fit.optimum.law.parameters if len(replicas.theta) else ()
    return {name: replicas.interval(name) for name in names}


# --- predictions


def _places(
    best: Fit,
    variables: Mapping[str, str],
    compute: Array,
    per_token: Any,
    budgets: Sequence[float],
) -> list[tuple[dict[str, float], float | None]]:
    """Return places at ten times the largest compute or x, with their FLOPs; a law in C also gets
    each budget.  U is all of D."""
    if best.degrees < 1:
        return []
    if per_token is None:
        (column,) = best.columns.values()
        values = dict.fromkeys([FURTHER * float(best.table[column].max()), *budgets])
        return [({"x": value}, None) for value in values]
    flops = FURTHER * float(compute.max())
    try:
        n, d = best_split(best, flops, per_token)
    except ConfigError:  # the frontier says why
        return []
    place = {"N": n, "D": d, "U": d}
    return [({name: place[name] for name in variables}, flops)]


def _predicted(
    best: Fit,
    ahead: Forecast | None,
    place: dict[str, float],
    flops: float | None,
    drawn: Bootstrap | int,
) -> Prediction:
    """Predict the loss at a place by the law, and that of a single run by the forecast; where rows
    share a run, the law's interval is a bootstrap over runs."""
    if best.degrees < 1:
        law, run = loss_at(best, place)
    else:
        law = run = predict_interval(best, new_run=False, **place)
    if isinstance(drawn, Bootstrap):  # nan for a single run
        ends = drawn.of_loss(**place)
        law = replace(ends, estimate=law.estimate, method="bootstrap over runs")
    if ahead is None and best.degrees >= 1:
        run = predict_interval(best, new_run=True, **place)
        run = replace(run, low=min(law.low, run.low), high=max(law.high, run.high))
    elif ahead is not None:
        values = {name: np.array([value]) for name, value in place.items()}
        log_loss, half = ahead.at(values, np.array([place.get("x", flops)], dtype=float))
        middle, low, high = np.exp(log_loss[0] + half[0] * np.array([0.0, -1.0, 1.0])).tolist()
        run = Interval(middle, low, high, LEVEL, "forecast")
    return Prediction(place, flops, law, run)


def _next(
    best: Fit, compute: Array, predictions: Sequence[Prediction], per_token: Any
) -> NextRun | None:
    """Find the next run from the smallest size and length up, at most twice the largest cost."""
    if not predictions:
        return None
    columns = {name: best.table[column] for name, column in best.columns.items() if name != "U"}
    axes = [np.geomspace(v.min(), v.max() * 4, 33) for v in columns.values()]
    places = dict(zip(columns, map(np.ravel, np.meshgrid(*axes)), strict=True))
    if per_token is None:
        costs = float(compute.max()) * places["x"] / float(columns["x"].max())
    else:
        costs = per_token(places["N"]) * places["D"]
    if "U" in best.columns:
        places["U"] = places["D"]
    cheap = costs <= 2 * float(compute.max())
    target = of_loss(best, **predictions[0].place)
    return next_run(best, target, {k: v[cheap] for k, v in places.items()}, costs[cheap])


# --- the checklist


def _checks_of_runs(
    runs: pd.DataFrame,
    left_out: pd.DataFrame,
    columns: Columns,
    compute: Array,
    condition: str | None,
    others: Mapping[str, Mapping[str, Sequence[str]]],
    best: Fit,
) -> Iterator[Check]:
    named = columns.as_results(runs).assign(flops_exact=compute)  # of 6 N D, too
    law_of = [v for v, name in columns.where(runs).items() if name in best.columns.values()]
    yield from check_design(named, law_of)
    yield from check_finished(named, pd.concat([named, columns.as_results(left_out)]))
    if cluster := columns.cluster(runs):
        detail = f"{len(runs)} rows of {runs[cluster].nunique()} runs: checkpoints had not decayed"
        yield check("own_rows", False, detail)
    if condition is not None:
        yield check_choice(condition, columns.loss, left_out)
    task = {columns.t, "max_seq_len", "vocab_size", "tokenizer", "dataset", "init_from"}
    mixed = [f"{k} {', '.join(list(values)[:4])}" for k, values in others.items() if k in task]
    if task & set(runs):
        same = "the same in every run, apart from the variables of the law"
        yield check("same_task", not mixed, "; ".join(mixed) or same)
    else:
        yield check("same_task", NOT_TESTED, "the table does not say")


def _check_distance(
    best: Fit, compute: Array, predictions: Sequence[Prediction], budgets: Sequence[float]
) -> Check:
    """Compare how far predictions lie beyond the runs with what the runs span: by the x of a law in
    one variable or by compute, and for requested places by each variable too."""
    if not predictions:
        return check("distance", NOT_TESTED, "nothing can be predicted")
    runs = {name: best.table[column].to_numpy(float) for name, column in best.columns.items()}
    main = "x" if "x" in runs else "C"
    runs.setdefault(main, compute)
    places = [{main: flops} for flops in (FURTHER * float(runs[main].max()), *budgets)]
    asked = [one for one in predictions if one.asked]
    places += [one.place | ({"C": one.flops} if one.flops else {}) for one in asked]
    found = []
    for name, value in (pair for place in places for pair in place.items() if pair[0] in runs):
        low, high = float(runs[name].min()), float(runs[name].max())
        beyond, span = max(value / high, low / value, 1.0), high / low
        what = "" if name in (main, "C") else f"{name} = {value:.3g} is "
        found.append((beyond / span, beyond, span, what))
    _, beyond, span, what = max(found, key=lambda one: one[0])
    return check(
        "distance", beyond <= span, f"{what}{times(beyond)} beyond; the runs span {times(span)}"
    )
