"""Predict losses beyond the runs by an average of laws, weighted by how well each predicted.

A member of the average is a law fitted with one tilt: weights that rise with the size of a run, or
with its tokens, because small and short runs often follow another law than large ones.  Each
member is refitted below several cuts in size and predicts the runs above.  Those errors weight
the members and say how fast the error of their average grows with distance.  No step, including
the choice of the law, sees a run that is to be predicted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import special

from tinygpt.config import ConfigError
from tinygpt.scaling.fitting import EFFICIENT, ROUGH
from tinygpt.scaling.laws import BUILT_IN, LAWS, Array
from tinygpt.scaling.noise import Seeds
from tinygpt.scaling.points import Points
from tinygpt.scaling.solver import NDBool, solve, starts_of

HELD_OUT = 0.2  # least fraction of the groups, the largest first
# Laws without a constant, or with too much freedom, predict only where no other law can.
LAST = ("power", "log_power", "broken", "chinchilla_zero", "kaplan")
TILTS = ((0.0, 0.0), (0.5, 0.0), (1.0, 0.0), (0.0, 1.0), (0.5, 1.0), (1.0, 1.0))  # of size, tokens
CUTS = (0.3, 0.7, 1.1, 1.6, 2.2, 3.0)  # in log size, below the largest run
STARTS, PASSES = 16, 3  # of the search; each pass sets Huber's limit for the next
SAME = 1e-3  # minima whose objectives differ relatively by less are one
SHARPNESS = 8.0  # a member's weight is its inner error to the power of minus this, at most
# The power is proportionally less where the inner cuts predict fewer runs than this, because few
# errors say little about which member is best; a likelihood behaves the same.
ENOUGH = 36
SHRINKAGE = 10.0  # runs; shrinks the inner error of a member towards the median
NEAR = 0.3  # in log size: at distances below this, errors no longer shrink
# Calibrated on 10 public tables (experiments/bank): beyond the scatter of runs, the half-width of
# a 95 % interval is QUANTILE times ``expected``.  SHAPE has the least error per unit of distance,
# and the factor and maximum of the rate, which saturates because high rates are of small runs.
SHAPE = (0.00107, 2.69, 0.00847)
QUANTILE = 1.12
NORMAL = 1.96  # 95 % of the runs lie within so many standard deviations of their scatter
FEWEST_TRUNKS = 3  # of fewer, leaving out one says nothing
LEAST, TYPICAL = 2e-4, 0.01  # rates: the least, and that of a table too small to be cut


@dataclass(frozen=True)
class Sample:
    """Hold the runs that a forecast is made from, and how to read them."""

    table: pd.DataFrame
    laws: Sequence[str]
    columns: Mapping[str, str]  # variable of the laws -> column
    loss: str  # column
    size: Array  # what orders the runs, usually their FLOPs, (n,)
    groups: NDArray[Any]  # rows of a group stay on the same side of every cut, (n,)
    seed: int = 0  # of random starts
    trunks: NDArray[Any] | None = None  # runs of a trunk share its luck, (n,)

    def rows(self, which: NDBool) -> Sample:
        """Return a sample of these rows only."""
        trunks = None if self.trunks is None else self.trunks[which]
        table, size, groups = self.table[which], self.size[which], self.groups[which]
        return replace(self, table=table, size=size, groups=groups, trunks=trunks)

    @property
    def values(self) -> dict[str, Array]:
        """Return each variable, (n,)."""
        return {v: self.table[column].to_numpy(dtype=float) for v, column in self.columns.items()}

    @property
    def measured(self) -> Array:
        """Return the log losses, (n,)."""
        return np.asarray(np.log(self.table[self.loss].to_numpy(dtype=float)))


@dataclass(frozen=True)
class Member:
    """Hold one law fitted with one tilt."""

    law: str
    tilt: tuple[float, float]
    points: Points
    theta: Array  # (P,)
    scale: float  # of its residuals, weighted as the fit is

    def log_loss(self, values: Mapping[str, Array]) -> Array:
        """Predict the log loss, (n,), at values of the law's variables."""
        return np.asarray(LAWS[self.law].log_loss(self.theta[None], self.points.at(values))[0])

    @property
    def rises(self) -> bool:
        """Return whether a built-in law says that the loss rises with parameters or tokens."""
        exponents = dict(zip(LAWS[self.law].parameters, self.theta, strict=True))
        least = min(exponents.get(name, 0.0) for name in ("alpha", "beta"))
        return self.law in BUILT_IN and least < 0


@dataclass(frozen=True)
class Forecast:
    """Hold the members with their weights, and the error of their average."""

    members: list[Member]
    weights: Array  # (members,)
    largest: float  # size of the largest run
    ranges: dict[str, tuple[float, float]]  # of each variable over the runs
    rate: float  # error of log L beyond the scatter per unit of log distance, by the inner cuts
    seeds: Seeds | None
    without: list[list[Member]]  # of each member, the same without each trunk; [] of too few

    def at(self, values: Mapping[str, Array], size: Array) -> tuple[Array, Array]:
        """Predict the log loss, (n,), and the half-width of the 95 % interval of a single run."""
        log_loss, between = self.mean(values)
        beyond = expected(self.rate, between, self.distance(values, size))
        chance = NORMAL * np.hypot(self.scatter(values), self.luck(values))
        return log_loss, np.hypot(chance, QUANTILE * beyond)

    def mean(self, values: Mapping[str, Array]) -> tuple[Array, Array]:
        """Return the weighted mean of the members, (n,), and their standard deviation."""
        each = np.stack([member.log_loss(values) for member in self.members])
        mean = self.weights @ each
        return mean, np.sqrt(self.weights @ (each - mean) ** 2)

    def luck(self, values: Mapping[str, Array]) -> Array:
        """Return the standard error, (n,), that comes from the luck of the trunks: the jackknife
        over them.  One unlucky trunk can tilt the law, and its runs agree with each other."""
        if not self.without:
            return np.zeros(len(next(iter(values.values()))))
        left = [np.stack([one.log_loss(values) for one in same]) for same in self.without]
        each = np.tensordot(self.weights, np.stack(left), axes=1)  # (trunks, n)
        return np.asarray(np.sqrt((len(each) - 1) * np.var(each, axis=0)))

    def scatter(self, values: Mapping[str, Array]) -> Array:
        """Return the standard deviation of single runs, (n,): about the members, or between seeds
        of that length if less, because outlying short runs say nothing about long ones."""
        scale = float(self.weights @ [member.scale for member in self.members])
        each = np.full(len(next(iter(values.values()))), scale)
        return each if self.seeds is None else np.minimum(each, self.seeds.at(values))

    def distance(self, values: Mapping[str, Array], size: Array) -> Array:
        """Return how far a place lies beyond the runs, (n,): the largest log ratio of the size or
        of a variable; 0 among the runs."""
        beyond = [np.zeros(len(size)), np.log(size / self.largest)]
        for name, (low, high) in self.ranges.items():
            beyond += [np.log(values[name] / high), np.log(low / values[name])]
        return np.asarray(np.max(beyond, axis=0))

    @property
    def by_law(self) -> dict[str, float]:
        """Return the total weight of each law, the largest first."""
        each = pd.Series(self.weights, [member.law for member in self.members])
        total = each.groupby(level=0, sort=False).sum()
        return dict(total.sort_values(ascending=False, kind="stable"))

    @property
    def main(self) -> Member:
        """Return the member with the largest weight."""
        return self.members[int(np.argmax(self.weights))]


def expected(rate: float, between: Array, distance: Array, shape: Sequence[float] = SHAPE) -> Array:
    """Return the expected error of log L beyond the scatter of runs, (n,): the distance times the
    geometric mean of ``rate`` and the members' disagreement per unit of distance."""
    least, factor, most = shape
    reach = distance + NEAR
    middle = np.sqrt(rate * between / reach)
    return np.asarray(reach * np.hypot(least, factor * middle / (1 + middle / most)))


def forecast(sample: Sample) -> Forecast:
    """Fit the members to a sample.  Raises ConfigError where no law can be fitted."""
    cuts = inner_cuts(sample.size, sample.groups)
    parts = [np.ones(len(sample.size), dtype=bool), *(below for below, _ in cuts)]
    members: list[Member] = []
    for last in (False, True):
        if not members:
            laws = [law for law in sample.laws if (law in LAST) == last]
            members, *inner = fit_members(replace(sample, laws=laws), parts)
    if not members:
        raise ConfigError(f"too few runs to predict others: {len(sample.table)}")
    # with few runs, a law that rises may predict anything
    count = len(members)
    used = [i for i, one in enumerate(members) if not one.rises] or range(count)
    found, seeds = [], Seeds.of(sample.values, sample.measured)
    for (below, above), fitted in zip(cuts, inner, strict=True):
        if len(fitted) < count:
            continue
        fitted = [fitted[i] for i in used]
        test = sample.rows(above)
        distance = np.log(test.size / sample.size[below].max())
        errors = np.stack([member.log_loss(test.values) - test.measured for member in fitted])
        scatter = np.array([[member.scale] for member in fitted])
        scatter = np.broadcast_to(scatter if seeds is None else seeds.at(test.values), errors.shape)
        found.append((distance, errors, scatter))
    members = [members[i] for i in used]
    weights, rate = _weigh(found, len(members))
    ends = {name: (float(v.min()), float(v.max())) for name, v in sample.values.items()}
    return Forecast(
        members, weights, float(sample.size.max()), ends, rate, seeds, without_each(sample, members)
    )


def _weigh(cuts: Sequence[tuple[Array, Array, Array]], count: int) -> tuple[Array, float]:
    """Return the weights of the members, and the rate of the errors of their average.

    A cut holds, for the runs above it, the log distance, (n,), the errors of each member and the
    scatter of runs, (members, n) both.
    """
    if not cuts:
        return np.full(count, 1.0 / count), TYPICAL
    scaled = [errors / np.hypot(distance, NEAR) for distance, errors, _ in cuts]
    square = np.mean([np.mean(each**2, axis=1) for each in scaled], axis=0) + 1e-16
    runs = max(each.shape[1] for each in scaled)
    square = (runs * square + SHRINKAGE * np.median(square)) / (runs + SHRINKAGE)
    sharpness = SHARPNESS * min(1.0, runs / ENOUGH)
    weights = (square / square.min()) ** (-sharpness / 2)
    weights /= weights.sum()
    rates = []
    for distance, errors, scatter in cuts:  # the scatter of runs does not grow with distance
        beyond = np.maximum((weights @ errors) ** 2 - (weights @ scatter) ** 2, 0.0)
        rates.append(np.sqrt(np.mean(beyond / (distance**2 + NEAR**2))))
    return weights, float(np.exp(np.mean(np.log(np.maximum(rates, LEAST)))))


def inner_cuts(size: Array, groups: NDArray[Any]) -> list[tuple[NDBool, NDBool]]:
    """Return pairs of masks, (n,): the runs to fit, and those above a cut to predict."""
    top = largest_of(size, groups)
    found: list[tuple[NDBool, NDBool]] = []
    for distance in CUTS:
        below = top <= top.max() * np.exp(-distance)
        if below.sum() < max(8, len(size) // 4):
            break
        above = ~below & (size > size[below].max() * (1 + 1e-9))
        if above.any() and not any(np.array_equal(below, other) for other, _ in found):
            found.append((below, above))
    return found


def fit_members(sample: Sample, parts: Sequence[NDBool]) -> list[list[Member]]:
    """Fit each law with each tilt to each part of a sample that is large enough, by Huber's loss.
    All parts are solved together, with zero weight for rows outside a part."""
    found: list[list[Member]] = [[] for _ in parts]
    values, size = sample.values, sample.size
    for name in sample.laws:
        law = LAWS[name]
        own = {variable.removeprefix("log ") for variable in law.variables}
        try:
            where = {variable: sample.columns[variable] for variable in own}
            points = Points.read(sample.table, law, where, sample.loss)
        except ConfigError:
            continue
        # a law that fits every point exactly extrapolates wildly
        each = np.stack([logs for v, logs in points.x.items() if v != "U"]).round(12)
        able = [i for i, part in enumerate(parts) if _carries(each[:, part], len(law))]
        if not able:
            continue
        starts = [starts_of(law, points.rows(parts[i]), sample.seed)[:STARTS] for i in able]
        of_part = np.repeat(able, [len(each) for each in starts])
        plain = np.array(parts, dtype=float)[of_part]
        first = solve(law, points, np.concatenate(starts), weights=plain, **ROUGH)
        tokens = values["D"] if "D" in own else np.ones_like(size)
        begin, weights, fits = [], [], []  # for each search: its start, weights, part and tilt
        for i in able:
            part, rows = parts[i], np.flatnonzero(of_part == i)
            rows = rows[np.argsort(first.objective[rows], kind="stable")[:3]]
            apart = np.diff(first.objective[rows], prepend=0.0) > SAME * first.objective[rows]
            apart[0] = True
            for a, b in (tilt for tilt in TILTS if "D" in own or tilt[1] == 0.0):
                for row in rows[apart]:  # distinct minima
                    begin.append(first.theta[row])
                    weights.append(_tilted((a, b), size, tokens, part))
                    fits.append((i, (a, b)))
        theta, weighted = np.array(begin), np.array(weights)
        limit = np.full((len(theta), 1), np.inf)  # Huber's
        for _ in range(PASSES):
            solved = solve(law, points, theta, limit, weighted, **ROUGH)
            theta = solved.theta
            residuals = points.y - law.log_loss(theta, points.x)
            limit = EFFICIENT * _weighted_scale(residuals, weighted, len(law))
        order = np.argsort(solved.objective, kind="stable")[::-1]
        best = {fits[row]: int(row) for row in order}  # of each part and tilt
        for i, tilt in dict.fromkeys(fits):
            row = best[i, tilt]
            if np.isfinite(theta[row]).all():
                scale = float(limit[row, 0] / EFFICIENT)
                found[i].append(Member(name, tilt, points, theta[row], scale))
    return found


def without_each(sample: Sample, members: Sequence[Member]) -> list[list[Member]]:
    """Return each member fitted again without each trunk, from where it is; [] of too few."""
    trunks: Sequence[Any] = () if sample.trunks is None else list(np.unique(sample.trunks))
    if len(trunks) < FEWEST_TRUNKS:
        return []
    found, tokens = [], sample.values.get("D", np.ones_like(sample.size))
    parts = [sample.trunks != one for one in trunks]
    for one in members:
        weights = np.stack([_tilted(one.tilt, sample.size, tokens, part) for part in parts])
        theta, limit = np.tile(one.theta, (len(parts), 1)), EFFICIENT * one.scale
        limits = np.full((len(parts), 1), limit)
        solved = solve(LAWS[one.law], one.points, theta, limits, weights, **ROUGH)
        found.append([replace(one, theta=each) for each in solved.theta])
    return found


def _tilted(tilt: tuple[float, float], size: Array, tokens: Array, part: NDBool) -> Array:
    """Return the weights of the runs in ``part``, (n,), which sum to their number."""
    a, b = tilt
    weights = (size / size[part].max()) ** a * (tokens / tokens[part].max()) ** b * part
    return np.asarray(weights * (part.sum() / weights.sum()))


def _carries(x: Array, parameters: int) -> bool:
    """Return whether there are more distinct points, (variables, n), than parameters, and each
    variable varies."""
    return bool(x.shape[1] and np.ptp(x, axis=1).all()) and len(np.unique(x.T, axis=0)) > parameters


def _weighted_scale(residuals: Array, weights: Array, parameters: int) -> Array:
    """Return the standard deviation that the weighted median absolute residual implies, (B, 1),
    corrected for the fitted parameters by the effective number of runs."""
    size = np.abs(residuals)
    order = np.argsort(size, axis=1)
    mass = np.cumsum(np.take_along_axis(weights, order, axis=1), axis=1)
    middle = np.argmax(mass >= 0.5 * mass[:, -1:], axis=1)[:, None]
    median = np.take_along_axis(np.take_along_axis(size, order, axis=1), middle, axis=1)
    worth = weights.sum(axis=1, keepdims=True) ** 2 / np.sum(weights**2, axis=1, keepdims=True)
    spread = median / special.ndtri(0.75) * np.sqrt(worth / np.maximum(1.0, worth - parameters))
    return np.asarray(np.maximum(spread, 1e-6))


# --- the forecast, tested on held-out runs


@dataclass(frozen=True)
class HeldOut:
    """Hold how well a forecast from the runs below a cut in size predicts the rest."""

    error: float  # mean |predicted - measured| / measured
    worst: float
    within: float  # fraction of the runs within their 95 % interval
    half_width: float  # mean of those intervals, relative to the predicted loss
    runs: int
    groups: int  # independent runs among them
    cut: float  # the largest size that was fitted
    distance: float  # largest size / cut
    best_cheaper: float  # the error of predicting the best loss below the cut
    plane: float  # the error of a plane through the logarithms of the larger half below the cut
    by_law: dict[str, float]  # the error of each law alone, fitted below the cut
    largest: dict[str, float]  # mean loss of the largest runs: predicted, low, high, measured
    below: Forecast
    above: NDBool  # which runs were predicted, (n,)

    @property
    def has_skill(self) -> bool:
        """Return whether the forecast beats both simple predictions."""
        return self.error < min(self.best_cheaper, self.plane)


def groups_of(keys: Sequence[pd.Series]) -> NDArray[Any]:
    """Label rows, (n,): those that agree in any key, such as their run, its trunk or their place,
    are not independent and share a label."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    count = first = len(keys[0])
    rows, labels = [], []
    for key in keys:
        codes = pd.factorize(key)[0]
        rows.append(np.flatnonzero(codes >= 0))
        labels.append(first + codes[rows[-1]])
        first += int(codes.max(initial=-1)) + 1
    edges = (np.concatenate(rows), np.concatenate(labels))
    graph = coo_matrix((np.ones(len(edges[0])), edges), shape=(first, first))
    return np.asarray(connected_components(graph, directed=False)[1][:count])


def largest_of(size: Array, groups: NDArray[Any]) -> Array:
    """Return the largest size in the group of each row, (n,)."""
    return pd.Series(size).groupby(groups).transform("max").to_numpy()


def split_by_size(groups: NDArray[Any], size: Array, least: int) -> NDBool | None:
    """Return which rows to hold out, (n,): those of at least a fifth of the groups, the largest.

    Groups and budgets stay whole.  Returns None where fewer than ``least`` groups would be left.
    """
    top = largest_of(size, groups)
    order = sorted(set(zip(top, groups, strict=True)), reverse=True)
    fifth = held = max(1, int(np.ceil(HELD_OUT * len(order))))
    while held < len(order) and order[held][0] > 0.87 * order[held - 1][0]:
        held += 1
    if order[fifth - 1][0] > 1.5 * order[held - 1][0]:  # sizes form a chain, not budgets
        held = fifth
    rows = np.isin(groups, [group for _, group in order[:held]])
    return rows if len(order) - held >= least else None


def hold_out(sample: Sample, held: NDBool | None = None) -> HeldOut | None:
    """Predict the larger runs from the others; return None for too few runs.

    ``held`` marks the rows that the forecast never sees, (n,), by default ``split_by_size``.
    """
    if held is None and (held := split_by_size(sample.groups, sample.size, 2)) is None:
        return None
    below = sample.rows(~held)
    try:
        made = forecast(below)
    except ConfigError:
        return None
    above = held & (sample.size > made.largest * (1 + 1e-9))
    if not above.any():
        return None
    test = sample.rows(above)
    there, measured = test.values, np.exp(test.measured)
    log_loss, reach = made.at(there, test.size)

    def off(log_loss: Array) -> Array:
        return np.abs(np.exp(log_loss) / measured - 1)

    def design(part: Sample) -> Array:
        logs = [np.log(value) for value in part.values.values()]
        return np.column_stack([np.ones(len(part.table)), *logs])

    half = below.rows(below.size >= np.median(below.size))
    plane = np.linalg.lstsq(design(half), half.measured, rcond=None)[0]
    laws = {one.law: one.log_loss(there) for one in made.members if one.tilt == TILTS[0]}
    last = test.size >= test.size.max() * (1 - 1e-9)
    ends = [log_loss, log_loss - reach, log_loss + reach, test.measured]
    top = [float(np.exp(end[last]).mean()) for end in ends]
    return HeldOut(
        error=float(off(log_loss).mean()),
        worst=float(off(log_loss).max()),
        within=float(np.mean(np.abs(test.measured - log_loss) <= reach)),
        half_width=float(np.sinh(reach).mean()),
        runs=int(above.sum()),
        groups=len(np.unique(test.groups)),
        cut=made.largest,
        distance=float(sample.size.max()) / made.largest,
        best_cheaper=float(off(below.measured.min()).mean()),
        plane=float(off(design(test) @ plane).mean()),
        by_law={law: float(off(one).mean()) for law, one in laws.items()},
        largest=dict(zip(("predicted", "low", "high", "measured"), top, strict=True)),
        below=made,
        above=above,
    )
