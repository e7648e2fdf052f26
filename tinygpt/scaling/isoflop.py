"""The compute-optimal size without a law of the loss: IsoFLOP profiles and training curves.

These are approaches 2 and 1 of Hoffmann et al. 2022, section 3 (arXiv:2203.15556).  Sizes N are
parameters, tokens D, budgets C FLOPs, losses as a rule nats per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import interpolate, special

from tinygpt.config import ConfigError
from tinygpt.scaling.intervals import LEVEL, Interval
from tinygpt.scaling.laws import Array
from tinygpt.scaling.points import positive

Rows = np.ndarray[Any, np.dtype[np.intp]]

METHODS = ("cubic", "akima", "parabola")
# Runs whose compute differs by less than this factor share a budget; the rule that holds runs
# out by compute draws the same line.
SAME_BUDGET = 1.15
WIDEST_BUDGET = 1.5  # largest over smallest compute; what is wider is a chain, and no budget
BUDGETS = 1000  # that an envelope is looked at


# --- power laws of compute


@dataclass(frozen=True)
class PowerLaw:
    """y = k · C^exponent: a regression of log y on log C, with Student's t for its errors.

    Two points leave no scatter to judge by; the ends of every interval are then infinite.
    """

    exponent: Interval
    log_k: float
    centre: float  # mean log C of the points
    scale: float  # standard deviation of log y about the line; nan with two points
    points: int
    spread: float  # Σ (log C - centre)²

    @classmethod
    def through(cls, flops: Array, y: Array, level: float = LEVEL) -> PowerLaw:
        """Of y at ``flops``, (n,) both.  Raises ConfigError for fewer than two budgets."""
        x, logs = np.log(flops), np.log(y)
        if len(x) < 2 or np.ptp(x) == 0:
            raise ConfigError(f"power law of compute: needs 2 budgets or more, there are {len(x)}")
        centre, spread = float(x.mean()), float(np.sum((x - x.mean()) ** 2))
        slope = float((x - centre) @ logs / spread)
        left = logs - logs.mean() - slope * (x - centre)
        scale = float(np.sqrt(left @ left / (len(x) - 2))) if len(x) > 2 else float("nan")
        reach = _t(level, len(x)) * scale / np.sqrt(spread) if len(x) > 2 else np.inf
        exponent = Interval(slope, float(slope - reach), float(slope + reach), level, "regression")
        return cls(exponent, float(logs.mean()) - slope * centre, centre, scale, len(x), spread)

    def __call__(self, flops: Any) -> Array:
        found: Array = np.exp(self.log_k + self.exponent.estimate * np.log(flops))
        return found

    def at(self, flops: float) -> Interval:
        """y at a budget, with the interval of the line there."""
        level = self.exponent.level
        estimate = float(self(flops))
        if self.points < 3:
            return Interval(estimate, 0.0, float("inf"), level, "regression")
        away = (np.log(flops) - self.centre) ** 2 / self.spread
        reach = _t(level, self.points) * self.scale * np.sqrt(1 / self.points + away)
        low, high = estimate * np.exp(-reach), estimate * np.exp(reach)
        return Interval(estimate, float(low), float(high), level, "regression")


def _t(level: float, points: int) -> float:
    return float(special.stdtrit(points - 2, 0.5 + level / 2))


@dataclass(frozen=True)
class Minima:
    """The best N, D and L of some budgets and the power laws through them, (n,) each.

    L* includes the irreducible loss, so that its power law is a local one.
    """

    flops: Array
    n: Array
    d: Array
    loss: Array
    n_law: PowerLaw
    d_law: PowerLaw
    loss_law: PowerLaw

    @classmethod
    def through(cls, rows: Sequence[tuple[float, float, float, float]], level: float) -> Minima:
        """From rows of FLOPs, N, D and loss."""
        flops, n, d, loss = np.array(rows, dtype=float).reshape(-1, 4).T
        laws = (PowerLaw.through(flops, y, level) for y in (n, d, loss))
        return cls(flops, n, d, loss, *laws)


# --- IsoFLOP profiles


@dataclass(frozen=True)
class Profile:
    """The runs of one budget, and the size at which their loss is least.

    ``loss`` is that at the budget itself, where the compute of the runs differs a little.
    ``best`` is (C, N, D, L) at the minimum; None with a ``reason`` where it is not to be had.
    """

    flops: Array  # of each run, (n,)
    n: Array
    d: Array
    loss: Array
    method: str
    best: tuple[float, float, float, float] | None
    parabola: float | None  # N at the minimum of a parabola through the same runs
    reason: str

    @property
    def budget(self) -> float:
        """The geometric mean of the compute of the runs."""
        return float(np.exp(np.log(self.flops).mean()))

    def curve(self, n: Array) -> Array:
        """The loss by the interpolation, at sizes within those that were run."""
        logs, mean = by_size(self.n, self.loss)
        if self.method == "akima":
            found: Array = interpolate.Akima1DInterpolator(logs, mean, method="makima")(np.log(n))
            return found
        degree = _degree(self.method, len(logs))
        centre = float(logs.mean())
        return np.asarray(_polynomial(self.n, self.loss, degree, centre)(np.log(n) - centre))


@dataclass(frozen=True)
class IsoFlop:
    """A profile a budget, the smallest budget first; ``minima`` of those that have one."""

    profiles: tuple[Profile, ...]
    minima: Minima | None
    reason: str  # why there are no minima to draw a power law through


def isoflop(
    runs: pd.DataFrame,
    *,
    n: str = "parameters_non_embedding",
    d: str = "train_tokens",
    c: str = "flops_exact",
    loss: str = "final_val_loss",
    method: str = "cubic",
    same_budget: float = SAME_BUDGET,
    level: float = LEVEL,
) -> IsoFlop:
    """The minimum of the loss over log N in each budget (approach 2 of Hoffmann et al. 2022).

    ``method``: ``cubic`` or ``parabola``, least squares through all rows, seeds among them, or
    ``akima`` (the modified one, which does not overshoot), which needs one value a size and so
    goes through the means over seeds.  Three sizes carry a parabola only, and then get one.
    ``same_budget`` is the factor below which neighbours in compute are one budget; what its runs
    differ in compute is taken off their losses.  The intervals of the power laws are those of a
    regression through the minima.

    A minimum counts only where the sizes tried enclose it: where the best size on average is the
    smallest or the largest there is none.  Raises ConfigError for columns that are not there.
    """
    if method not in METHODS:
        raise ConfigError(f"method={method}: must be one of {', '.join(METHODS)}")
    if same_budget <= 1:
        raise ConfigError(f"same_budget={same_budget:g}: must be above 1, it is a factor")
    sizes, tokens, flops, losses = (positive(runs, column) for column in (n, d, c, loss))
    groups = budgets(flops, same_budget)
    losses = _at_one_compute(flops, losses, groups)
    profiles = [
        _profile(flops[rows], sizes[rows], tokens[rows], losses[rows], method) for rows in groups
    ]
    minima = [profile.best for profile in profiles if profile.best]
    if len(minima) < 2:
        reason = f"{len(minima)} of {len(profiles)} budgets have a minimum; a power law needs 2"
        return IsoFlop(tuple(profiles), None, reason)
    return IsoFlop(tuple(profiles), Minima.through(minima, level), "")


def budgets(flops: Array, same: float = SAME_BUDGET) -> list[Rows]:
    """The rows of each budget, the smallest first: cut where log C jumps by log ``same``."""
    order = np.argsort(flops, kind="stable")
    jumps = np.flatnonzero(np.diff(np.log(flops[order])) > np.log(same))
    return list(np.split(order, jumps + 1))


def _at_one_compute(flops: Array, losses: Array, groups: list[Rows]) -> Array:
    """The losses as if every run of a budget had spent its geometric mean, (n,).

    A few per cent of compute that go with the size would else move the minimum by as much as a
    tenth.  The slope is that of the least losses from budget to budget: at a minimum in N the loss
    falls with C as along the minima (the envelope theorem).
    """
    if len(groups) < 2:
        return losses
    logs = np.log(flops)
    means = np.array([logs[rows].mean() for rows in groups])
    least = np.array([np.log(losses[rows].min()) for rows in groups])
    slopes = np.gradient(least, means, edge_order=2 if len(groups) > 2 else 1)
    moved = losses.copy()
    for rows, mean, slope in zip(groups, means, slopes, strict=True):
        moved[rows] *= np.exp(slope * (mean - logs[rows]))
    return moved


def _profile(flops: Array, n: Array, d: Array, loss: Array, method: str) -> Profile:
    logs, mean = by_size(n, loss)
    if method == "cubic" and len(logs) == 3:
        method = "parabola"

    def without(reason: str) -> Profile:
        return Profile(flops, n, d, loss, method, None, None, reason)

    if len(logs) < 3:
        return without(f"{len(logs)} size{'s' * (len(logs) != 1)}; a minimum needs 3")
    if flops.max() > WIDEST_BUDGET * flops.min():
        return without(
            f"the compute of these runs goes from {flops.min():.3g} to {flops.max():.3g} FLOPs "
            "without a gap: they are no one budget"
        )
    best = int(np.argmin(mean))
    if best in (0, len(mean) - 1):
        end, wanted = ("smallest", "smaller") if best == 0 else ("largest", "larger")
        return without(
            f"the loss is least at the {end} size, N = {np.exp(logs[best]):.3g}: "
            f"the minimum needs {wanted} ones"
        )
    parabola = _minimum(n, loss, "parabola")
    found = _minimum(n, loss, method)
    if found is None:
        return without(f"the {method} has no minimum between the sizes that were run")
    at, least = found
    budget = np.log(flops).mean()
    per_token = np.interp(at, logs, by_size(n, np.log(flops / d))[1])
    best_n = None if parabola is None else float(np.exp(parabola[0]))
    values = (float(np.exp(budget)), float(np.exp(at)), float(np.exp(budget - per_token)), least)
    return Profile(flops, n, d, loss, method, values, best_n, "")


def by_size(n: Array, values: Array) -> tuple[Array, Array]:
    """log N of the distinct sizes in order, and the mean of ``values`` at each."""
    sizes, where = np.unique(n, return_inverse=True)
    return np.log(sizes), np.bincount(where, values) / np.bincount(where)


def _degree(method: str, sizes: int) -> int:
    return 3 if method == "cubic" and sizes > 3 else 2


def _polynomial(n: Array, loss: Array, degree: int, centre: float) -> np.polynomial.Polynomial:
    return np.polynomial.Polynomial.fit(np.log(n) - centre, loss, degree)


def _minimum(n: Array, loss: Array, method: str) -> tuple[float, float] | None:
    """log N and the loss at the least of the curve between the ends; None if it is at an end."""
    logs, mean = by_size(n, loss)
    if method == "akima":
        curve = interpolate.Akima1DInterpolator(logs, mean, method="makima")
        found = curve.derivative().roots(extrapolate=False)
        places = np.concatenate([found[np.isfinite(found)], logs])
        values = curve(places)
        centre = 0.0
    else:
        centre = float(logs.mean())
        polynomial = _polynomial(n, loss, _degree(method, len(logs)), centre)
        roots = polynomial.deriv().roots()
        places = np.concatenate([roots[np.isreal(roots)].real + centre, logs[[0, -1]]])
        places = places[(places >= logs[0]) & (places <= logs[-1])]
        values = polynomial(places - centre)
    least = int(np.argmin(values))
    if not logs[0] < places[least] < logs[-1]:
        return None
    return float(places[least]), float(values[least])


# --- the envelope of training curves


@dataclass(frozen=True)
class Envelope:
    """The lower envelope of loss against compute, (G,) each, and the best size along it."""

    flops: Array
    n: Array
    d: Array
    loss: Array
    minima: Minima | None  # one a size: the middle of the stretch of compute where it is best
    reason: str  # why there are none


def envelope(
    curves: pd.DataFrame,
    *,
    run: str = "folder",
    n: str = "parameters_non_embedding",
    d: str = "tokens",
    c: str = "flops_exact",
    loss: str = "val_loss",
    smooth: int = 1,
    level: float = LEVEL,
) -> Envelope:
    """Which size has the least loss at each budget (approach 1 of Hoffmann et al. 2022).

    ``curves`` has a row a checkpoint: the run, its N, tokens seen, FLOPs spent, the loss.  Rows
    without a loss or before the first step are left out; between checkpoints log L is a monotone
    cubic in log C.  Where a size has several runs, seeds or schedules, the lowest is what counts,
    which favours what scatters: ``smooth`` takes the mean of so many neighbouring checkpoints of
    a run, of log C, log D and log L alike.

    The stairs of the envelope give a point for each size: the middle, in log C, of the stretch
    where it is best.  The first and the last size have no such stretch, nor has one that starts
    or ends because a curve does.  The intervals are those of the regression through these points.
    A loss halfway down a decaying schedule is above that of a run which ends there, so that the
    way needs a constant rate, or schedules of several lengths a size.

    Raises ConfigError where columns are absent or no run has two checkpoints.
    """
    if smooth < 1:
        raise ConfigError(f"smooth={smooth}: must be 1 or more checkpoints")
    missing = [column for column in (run, n, d, c, loss) if column not in curves]
    if missing:
        raise ConfigError(f"{missing[0]}: no such column; there are {', '.join(map(str, curves))}")
    rows = curves[curves[loss].notna() & (curves[d] > 0) & (curves[c] > 0)]
    rows = rows.sort_values(c).drop_duplicates([run, c], keep="last")
    rows = rows[rows.groupby(run)[c].transform("size") > smooth]
    if rows.empty:
        raise ConfigError(
            f"{loss}: no run has {smooth + 1} checkpoints; an envelope needs training curves"
        )
    logs = pd.DataFrame({name: np.log(positive(rows, name)) for name in (c, d, loss)})
    runs = rows[run].to_numpy()
    if smooth > 1:
        logs = logs.groupby(runs).rolling(smooth).mean().droplevel(0).sort_index()
    there = logs[loss].notna().to_numpy()
    logs, runs, sizes = logs[there], runs[there], positive(rows, n)[there]
    grid = np.linspace(logs[c].min(), logs[c].max(), BUDGETS)
    every, plain = [], logs[[c, loss, d]].to_numpy(dtype=float)
    for part in pd.Series(range(len(runs))).groupby(runs).indices.values():
        x = plain[part, 0]
        every.append((sizes[part[0]], *_between(x, plain[part, 1:], grid).T))
    of_run, losses, tokens = (np.array(values) for values in zip(*every, strict=True))
    return _envelope(grid, of_run, losses, tokens, level)


def _between(x: Array, y: Array, grid: Array) -> Array:
    """The columns of ``y`` at ``grid``; nan beyond the ends of ``x``."""
    found: Array = interpolate.PchipInterpolator(x, y, extrapolate=False)(grid)
    return found


def _envelope(grid: Array, sizes: Array, losses: Array, tokens: Array, level: float) -> Envelope:
    """From N of each run, (R,), and its log L and log D along ``grid`` of log C, (R, G)."""
    there = ~np.isnan(losses)
    some = there.any(axis=0)
    grid, losses, tokens, there = grid[some], losses[:, some], tokens[:, some], there[:, some]
    winner = np.argmin(np.where(there, losses, np.inf), axis=0)
    along = np.arange(len(grid))
    best, least, seen = sizes[winner], losses[winner, along], tokens[winner, along]
    # a size has a stretch where a smaller one has lost at its start and a larger one at its end
    smaller = (there & (sizes[:, None] < best)).any(axis=0)
    larger = (there & (sizes[:, None] > best)).any(axis=0)
    minima = []
    for size in np.unique(best):
        cells = np.flatnonzero(best == size)
        first, last = cells[0], cells[-1]
        if first == 0 or last == len(grid) - 1:
            continue
        taken_over = best[first - 1] < size and smaller[first]
        given_over = best[last + 1] > size and larger[last]
        if taken_over and given_over:
            # where stretches fray, the cells that it has won weigh as much as a clean stretch
            middle = float(grid[cells].mean())
            d, loss = (np.interp(middle, grid[cells], v[cells]) for v in (seen, least))
            minima.append((np.exp(middle), size, np.exp(d), np.exp(loss)))
    flops, d, loss = np.exp(grid), np.exp(seen), np.exp(least)
    if len(minima) < 2:
        reason = f"{len(minima)} sizes are best between a smaller and a larger one; it needs 2"
        return Envelope(flops, best, d, loss, None, reason)
    return Envelope(flops, best, d, loss, Minima.through(minima, level), "")
