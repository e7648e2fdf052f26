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
from numpy.typing import NDArray
from scipy import interpolate, special

from tinygpt.config import ConfigError
from tinygpt.scaling.intervals import LEVEL, Interval
from tinygpt.scaling.laws import Array
from tinygpt.scaling.points import positive

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
    scale: float  # standard deviation of log y about the line; inf with two points
    points: int
    spread: float  # Σ (log C - centre)²

    @classmethod
    def through(cls, flops: Array, y: Array, level: float = LEVEL) -> PowerLaw:
        """Return that of y at ``flops``, (n,) both.  Raises ConfigError for fewer than two."""
        x, logs, n = np.log(flops), np.log(y), len(flops)
        if n < 2 or np.ptp(x) == 0:
            raise ConfigError(f"power law of compute: needs 2 budgets or more, there are {n}")
        centre, spread = float(x.mean()), float(np.sum((x - x.mean()) ** 2))
        slope = float((x - centre) @ logs / spread)
        left = logs - logs.mean() - slope * (x - centre)
        scale = float(np.sqrt(left @ left / (n - 2))) if n > 2 else np.inf
        reach = _t(level, n) * scale / np.sqrt(spread)
        exponent = Interval(slope, float(slope - reach), float(slope + reach), level, "regression")
        return cls(exponent, float(logs.mean()) - slope * centre, centre, scale, n, spread)

    def __call__(self, flops: Any) -> Array:
        return np.asarray(np.exp(self.log_k + self.exponent.estimate * np.log(flops)))

    def at(self, flops: float) -> Interval:
        """Return y at a budget, with the interval of the line there."""
        estimate, level = float(self(flops)), self.exponent.level
        away = (np.log(flops) - self.centre) ** 2 / self.spread
        reach = _t(level, self.points) * self.scale * np.sqrt(1 / self.points + away)
        low, high = float(estimate * np.exp(-reach)), float(estimate * np.exp(reach))
        return Interval(estimate, low, high, level, "regression")


def _t(level: float, points: int) -> float:
    return float(special.stdtrit(max(points - 2, 1), 0.5 + level / 2))


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
        """Return those of rows of FLOPs, N, D and loss."""
        flops, n, d, loss = np.array(rows, dtype=float).T
        laws = (PowerLaw.through(flops, y, level) for y in (n, d, loss))
        return cls(flops, n, d, loss, *laws)


# --- IsoFLOP profiles


@dataclass(frozen=True)
class Profile:
    """The runs of one budget, and the size at which their loss is least.

    ``loss`` is that at the budget itself, where the compute of the runs differs a little.
    ``best`` is (C, N, D, L) at the minimum; None with a ``reason`` where there is none.
    """

    flops: Array  # of each run, (n,)
    n: Array
    d: Array
    loss: Array
    method: str
    best: tuple[float, float, float, float] | None = None
    parabola: float | None = None  # N at the minimum of a parabola through the same runs
    reason: str = ""

    @property
    def budget(self) -> float:
        """The geometric mean of the compute of the runs."""
        return float(np.exp(np.log(self.flops).mean()))

    def curve(self, n: Array) -> Array:
        """Return the loss by the interpolation, at sizes within those that were run."""
        return np.asarray(_curve(self.n, self.loss, self.method)[0](np.log(n)))


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
    """Return the minimum of the loss over log N in each budget (approach 2 of Hoffmann et al.).

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
    profiles = tuple(
        _profile(flops[rows], sizes[rows], tokens[rows], losses[rows], method) for rows in groups
    )
    minima = [profile.best for profile in profiles if profile.best]
    if len(minima) < 2:
        reason = f"{len(minima)} of {len(profiles)} budgets have a minimum; a power law needs 2"
        return IsoFlop(profiles, None, reason)
    return IsoFlop(profiles, Minima.through(minima, level), "")


def budgets(flops: Array, same: float = SAME_BUDGET) -> list[NDArray[np.intp]]:
    """Return the rows of each budget, the smallest first: cut where log C jumps by log ``same``."""
    order = np.argsort(flops, kind="stable")
    jumps = np.flatnonzero(np.diff(np.log(flops[order])) > np.log(same))
    return list(np.split(order, jumps + 1))


def _at_one_compute(flops: Array, losses: Array, groups: list[NDArray[np.intp]]) -> Array:
    """Return the losses as if every run of a budget had spent its geometric mean, (n,).

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
    method = "parabola" if method == "cubic" and len(logs) == 3 else method
    best = int(np.argmin(mean))
    found, reason = None, ""
    if len(logs) < 3:
        reason = f"{len(logs)} size{'s' * (len(logs) != 1)}; a minimum needs 3"
    elif flops.max() > WIDEST_BUDGET * flops.min():
        reason = (
            f"the compute of these runs goes from {flops.min():.3g} to {flops.max():.3g} FLOPs "
            "without a gap: they are no one budget"
        )
    elif best in (0, len(mean) - 1):
        end, wanted = ("smallest", "smaller") if best == 0 else ("largest", "larger")
        reason = (
            f"the loss is least at the {end} size, N = {np.exp(logs[best]):.3g}: "
            f"the minimum needs {wanted} ones"
        )
    else:
        found = _minimum(n, loss, method)
        reason = "" if found else f"the {method} has no minimum between the sizes that were run"
    if found is None:
        return Profile(flops, n, d, loss, method, reason=reason)
    at, least = found
    budget = float(np.log(flops).mean())
    per_token = float(np.interp(at, logs, by_size(n, np.log(flops / d))[1]))
    values = (float(np.exp(budget)), float(np.exp(at)), float(np.exp(budget - per_token)), least)
    parabola = _minimum(n, loss, "parabola")
    by_parabola = float(np.exp(parabola[0])) if parabola else None
    return Profile(flops, n, d, loss, method, values, by_parabola)


def by_size(n: Array, values: Array) -> tuple[Array, Array]:
    """Return log N of the distinct sizes in order, and the mean of ``values`` at each."""
    sizes, where = np.unique(n, return_inverse=True)
    return np.log(sizes), np.bincount(where, values) / np.bincount(where)


def _curve(n: Array, loss: Array, method: str) -> tuple[Any, Array]:
    """Return the curve of the loss in log N, and where it is flat."""
    if method == "akima":
        curve: Any = interpolate.Akima1DInterpolator(*by_size(n, loss), method="makima")
        flat = curve.derivative().roots(extrapolate=False)
        return curve, flat[np.isfinite(flat)]
    curve = np.polynomial.Polynomial.fit(np.log(n), loss, 3 if method == "cubic" else 2)
    flat = curve.deriv().roots()
    return curve, flat[np.isreal(flat)].real


def _minimum(n: Array, loss: Array, method: str) -> tuple[float, float] | None:
    """Return log N and the loss at the least of the curve; None if that is at an end."""
    logs, _ = by_size(n, loss)
    curve, flat = _curve(n, loss, method)
    places = np.concatenate([flat[(flat > logs[0]) & (flat < logs[-1])], logs])
    values = curve(places)
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
    """Return which size has the least loss at each budget (approach 1 of Hoffmann et al. 2022).

    ``curves`` has a row a checkpoint: the run, its N, tokens seen, FLOPs spent, the loss.  Rows
    without a loss or before the first step are left out; between checkpoints log L is a monotone
    cubic in log C.  Where a size has several runs, seeds or schedules, the lowest is what counts,
    which favours what scatters: ``smooth`` takes the mean of so many neighbouring checkpoints of
    a run, of log C, log D and log L alike.

    The steps of the envelope give a point for each size: the middle, in log C, of the stretch
    where it is best.  The first and the last size have no such stretch, nor has one that starts
    or ends because a curve does.  The intervals are those of the regression through these points.
    A loss halfway down a decaying schedule is above that of a run which ends there, so that this
    needs a constant rate, or schedules of several lengths a size.

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
    grid = np.log(np.geomspace(rows[c].min(), rows[c].max(), BUDGETS))
    sizes, along = [], []
    for _, part in rows.groupby(run):
        logs = np.log(np.column_stack([positive(part, name) for name in (c, loss, d)]))
        logs = np.lib.stride_tricks.sliding_window_view(logs, smooth, axis=0).mean(axis=-1)
        sizes.append(float(part[n].iloc[0]))
        between = interpolate.PchipInterpolator(logs[:, 0], logs[:, 1:], extrapolate=False)
        along.append(between(grid))  # nan beyond the ends
    losses, tokens = np.moveaxis(np.array(along), -1, 0)
    return _envelope(grid, np.array(sizes), losses, tokens, level)


def _envelope(grid: Array, sizes: Array, losses: Array, tokens: Array, level: float) -> Envelope:
    """Return that of N of each run, (R,), and its log L and log D along log C, (R, G)."""
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
    reason = ""
    if len(minima) < 2:
        reason = f"{len(minima)} sizes are best between a smaller and a larger one; it needs 2"
    through = None if reason else Minima.through(minima, level)
    return Envelope(np.exp(grid), best, np.exp(seen), np.exp(least), through, reason)
