"""Find the compute-optimal frontier: how large a model, on how many tokens, for a budget.

It compares a law of the loss (``split``), IsoFLOP profiles and training curves (``isoflop``).
N are parameters, D tokens, and C FLOPs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, overload

import numpy as np
import pandas as pd

from tinygpt.config import ConfigError
from tinygpt.scaling.fitting import Fit
from tinygpt.scaling.intervals import LEVEL, Bootstrap, Interval, delta, of_loss, predict_interval
from tinygpt.scaling.isoflop import Envelope, IsoFlop, envelope, isoflop
from tinygpt.scaling.laws import Array
from tinygpt.scaling.split import (
    REPLICAS,
    FlopsPerToken,
    LawSplit,
    band,
    best_splits,
    by_law,
    parameter_vectors,
    six_n,
    splits,
)
from tinygpt.scaling.wording import number, reach, with_interval

# Thresholds of disagreement.  A cubic through a skewed profile and the steps of an envelope are
# biased by about 0.01 in the exponent and 5 % in N; a factor of 2 in N matters in any case.
EXPONENT_APART = 0.02
SIZE_APART = 1.1
SIZE_FAR_APART = 2.0

LAW, PROFILES, CURVES = "parametric law", "IsoFLOP profiles", "training curves"
CHEAPER = 1e-3  # smallest share of a budget considered for the cost of a wrong size


# --- the ways side by side


@dataclass(frozen=True)
class Estimate:
    """Hold one method's exponents, and N, D and L at the largest budget that was run.

    L of profiles and curves follows a pure power law, which underestimates a loss with an
    irreducible part at both ends.
    """

    way: str
    a: Interval  # N ~ C^a
    b: Interval  # D ~ C^b
    c: Interval  # L ~ C^c
    n: Interval
    d: Interval
    loss: Interval


@dataclass(frozen=True)
class Frontier:
    """Hold the compute-optimal split by up to three methods."""

    budget: float  # the largest that was run, FLOPs
    law: LawSplit | None
    isoflop: IsoFlop
    envelope: Envelope | None
    estimates: tuple[Estimate, ...]
    missing: dict[str, str]  # method -> why it has no result
    disagreements: tuple[str, ...]

    def table(self) -> pd.DataFrame:
        """Return a row per method: exponents, and N, D, L at the largest budget, with ends."""
        rows: list[dict[str, Any]] = []
        for one in self.estimates:
            row: dict[str, Any] = {"way": one.way}
            for name in ("a", "b", "c", "n", "d", "loss"):
                of: Interval = getattr(one, name)
                row |= {name: of.estimate, f"{name}_low": of.low, f"{name}_high": of.high}
            row["tokens_per_parameter"] = one.d.estimate / one.n.estimate
            row["interval"] = one.a.method
            rows.append(row)
        return pd.DataFrame(rows)


def frontier(
    fit: Fit,
    compute: Array,
    *,
    curves: pd.DataFrame | Envelope | None = None,
    method: str = "cubic",
    per_token: FlopsPerToken | None = None,
    replicas: int | Bootstrap = REPLICAS,
) -> Frontier:
    """Return the best split by the law, by IsoFLOP profiles of the runs, and by their ``curves``.

    ``compute`` has the FLOPs of each run, (n,); ``method`` is that of ``isoflop``; ``curves`` come
    from ``load_curves`` or are an ``Envelope``, with FLOPs counted as for the runs.  ``missing``
    gives the reason for a method without a result.
    """
    budget, n = float(compute.max()), fit.columns["N"]
    estimates: list[Estimate] = []
    missing: dict[str, str] = {}
    law, lower = None, None
    try:
        law = by_law(fit, compute, per_token=per_token, replicas=replicas)
        places = [band.at(law.largest) for band in (law.n, law.d, law.loss)]
        estimates.append(Estimate(LAW, law.a, law.b, law.c, *places))
    except ConfigError as error:
        missing[LAW] = str(error)
    runs = fit.table.assign(compute=compute)
    profiles = isoflop(runs, n=n, d=fit.columns["D"], c="compute", loss=fit.loss, method=method)
    try:
        if isinstance(curves, Envelope):
            lower = curves
        elif curves is None or curves.empty:
            raise ConfigError("no training curves were given")
        else:
            same = fit.loss.removeprefix("final_")
            lower = envelope(curves, n=n, loss=same if same in curves else "val_loss")
    except ConfigError as error:
        missing[CURVES] = str(error)
    for way, found in ((PROFILES, profiles), (CURVES, lower)):
        if found and found.minima:
            laws = (found.minima.n_law, found.minima.d_law, found.minima.loss_law)
            exponents, places = [one.exponent for one in laws], [one.at(budget) for one in laws]
            estimates.append(Estimate(way, *exponents, *places))
        elif found:
            missing[way] = found.reason
    apart = tuple(_disagreements(estimates, budget))
    return Frontier(budget, law, profiles, lower, tuple(estimates), missing, apart)


def _disagreements(estimates: Sequence[Estimate], budget: float) -> Iterator[str]:
    """Describe exponents and sizes that differ by more than their intervals and known biases."""
    best = f"the best N at {number(budget)} FLOPs"
    for one, other in combinations(estimates, 2):
        steps = abs(one.a.estimate - other.a.estimate)
        factor = float(np.exp(abs(np.log(one.n.estimate / other.n.estimate))))
        for what, first, second, is_apart, is_far in (
            ("the exponent of N", one.a, other.a, steps > EXPONENT_APART, False),
            (best, one.n, other.n, factor > SIZE_APART, factor > SIZE_FAR_APART),
        ):
            if is_far or (is_apart and (first.high < second.low or second.high < first.low)):
                words = [
                    f"{way} {number(of.estimate)} ({number(of.low)} to {number(of.high)})"
                    for way, of in ((one.way, first), (other.way, second))
                ]
                yield f"{what}: {', '.join(words)}"


# --- a budget


@dataclass(frozen=True)
class WrongSize:
    """Hold what a model of another size costs at the same budget."""

    loss: float  # relative increase of the loss
    compute: float  # share of the budget that the best size would save at that loss


@dataclass(frozen=True)
class Budget:
    """Hold the best split of ``flops`` by a law, and the loss to expect."""

    flops: float
    n: Interval
    d: Interval
    loss: Interval  # of the law at this N and D
    run: Interval  # of a single run there
    twice_too_large: WrongSize
    twice_too_small: WrongSize

    def __str__(self) -> str:
        n, d = self.n.estimate, self.d.estimate
        half = (self.loss.high - self.loss.low) / 2
        ends = f" ± {half:.3f}" if np.isfinite(half) else ""
        large, small = self.twice_too_large, self.twice_too_small
        return (
            f"with {number(self.flops)} FLOPs: N = {number(n)}, D = {number(d)} "
            f"({number(d / n)} tokens per parameter), L = {self.loss.estimate:.3f}{ends}; "
            "a model twice too large or too small costs "
            f"+{100 * large.loss:.2g} % or +{100 * small.loss:.2g} % in loss, "
            f"as if {100 * large.compute:.2g} % or {100 * small.compute:.2g} % "
            "of the compute were lost"
        )


@dataclass(frozen=True)
class Expected:
    """Hold the loss at a place by the law, and as a single run would measure it."""

    place: dict[str, float]  # values by the letters that were given
    loss: Interval
    run: Interval

    def __str__(self) -> str:
        where = ", ".join(f"{name} = {number(value)}" for name, value in self.place.items())
        law = with_interval(self.loss)
        return f"at {where}: L = {law}, a single run {reach(self.run)}"


@overload
def predict(  # type: ignore[overload-overlap]  # no variable is called flops
    fit: Fit,
    flops: float,
    *,
    per_token: FlopsPerToken = ...,
    unique: float = ...,
    replicas: int | Bootstrap = ...,
) -> Budget: ...


@overload
def predict(fit: Fit, **place: float) -> Expected: ...


def predict(  # type: ignore[misc]
    fit: Fit,
    flops: float | None = None,
    *,
    per_token: FlopsPerToken = six_n,
    unique: float = np.inf,
    replicas: int | Bootstrap = REPLICAS,
    **place: float,
) -> Budget | Expected:
    """Return the best N and D for ``flops``, the loss there, and the cost of a factor of 2 in N;
    or the loss at a place, given as ``N=...``.

    ``per_token`` gives FLOPs per token by size (``recorded`` estimates it from runs); ``unique``
    tokens exist before they repeat.  Intervals of N and D are bootstrap percentiles, those of the
    loss come from the delta method at that N and D, and at a place from ``predict_interval``; nan
    without degrees of freedom.  Raises ConfigError if the law has no best split.
    """
    if flops is None:
        if more := [name for name in place if name not in (*fit.columns, fit.letter)]:
            raise ConfigError(f"predict: the law does not go by {' and '.join(more)}")
        if fit.degrees < 1:
            return Expected(place, *loss_at(fit, place))
        law, run = (predict_interval(fit, new_run=new, **place) for new in (False, True))
        return Expected(place, law, run)
    if place:
        raise ConfigError(f"predict: give flops or {' and '.join(place)}, not both")
    if not flops > 0:
        raise ConfigError(f"flops={flops:g}: must be above zero")
    if "x" in fit.columns:
        raise ConfigError(
            f"flops={flops:g}: a law in {fit.letter} alone splits no budget; "
            f"predict(law, {fit.letter}=...) gives the loss at one {fit.letter}"
        )
    budgets = np.append(flops * np.geomspace(CHEAPER, 1.0, 300)[:-1], flops)
    n, d, loss = best_splits(fit, budgets, per_token, unique)
    best = {"N": float(n[-1]), "D": float(d[-1])}
    if "U" in fit.columns:
        best["U"] = min(best["D"], unique)
    theta, kind = parameter_vectors(fit, replicas)
    drawn_n, drawn_d, _ = splits(fit, theta, budgets[-1:], per_token, unique)
    at_n = band(n[-1:], drawn_n, LEVEL, kind).at(0)
    at_d = band(d[-1:], drawn_d, LEVEL, kind).at(0)
    wrong = []
    for factor in (2.0, 0.5):
        size = np.array([factor * n[-1]])
        tokens = flops / per_token(size)
        off = float(fit.predict(N=size, D=tokens, U=np.minimum(tokens, unique))[0])
        saved = np.interp(off, loss[::-1], np.log(budgets)[::-1])
        wrong.append(WrongSize(off / float(loss[-1]) - 1, 1 - float(np.exp(saved)) / flops))
    return Budget(flops, at_n, at_d, *loss_at(fit, best, replicas), *wrong)


def loss_at(
    fit: Fit, place: dict[str, float], replicas: int | Bootstrap = REPLICAS
) -> tuple[Interval, Interval]:
    """Return the loss of the law and of a single run at ``place``.

    Their ends are nan without degrees of freedom, or if a bootstrap had a single run to draw.
    """
    if fit.degrees < 1 or (isinstance(replicas, Bootstrap) and not len(replicas.theta)):
        none = Interval(float(fit.predict(**place)[0]), np.nan, np.nan, LEVEL, "none")
        return none, none
    target = of_loss(fit, **place)
    return delta(fit, target), delta(fit, target, new_run=True)
