"""Find the compute-optimal size without a law of the loss, by IsoFLOP profiles or training curves.

These are approaches 2 and 1 of Hoffmann et al. 2022, section 3 (arXiv:2203.15556).  N are
parameters, D tokens, and C FLOPs.
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
SAME_BUDGET = 1.15  # runs within this factor of compute share a budget, here and held out
WIDEST_BUDGET = 1.5  # largest / smallest compute; a wider group is a chain, not a budget
BUDGETS = 1000  # grid points of an envelope
REPLICAS = 1000  # of each interpolant
FEWEST_SEEDS = 5  # degrees of freedom that seeds need to estimate the noise
Replicas = tuple[Array, str]  # logarithms at budgets, (..., budgets, B), nan if absent; the method


# --- power laws of compute


@dataclass(frozen=True)
class PowerLaw:
    """Hold y = k · C^exponent, a regression of log y on log C.

    Intervals are percentiles over replicas of the points, or Student's t of their scatter.  Two
    points give infinite ends.
    """

    exponent: Interval
    log_k: float
    centre: float  # mean log C of the points
    spread: float  # Σ (log C - centre)²
    points: int
    error: float  # of log y about the line, times Student's quantile; inf for two points
    lines: Array | None = None  # (2, B): log k and exponent of each replica

    @classmethod
    def through(
        cls, flops: Array, y: Array, level: float = LEVEL, replicas: Replicas | None = None
    ) -> PowerLaw:
        """Fit y at ``flops``, (n,) both, with replicas of log y, (n, B).

        Raises ConfigError for fewer than two budgets.
        """
        x, logs, n = np.log(flops), np.log(y), len(flops)
        if n < 2 or np.ptp(x) == 0:
            raise ConfigError(f"power law of compute: needs 2 budgets or more, there are {n}")
        centre, spread = float(x.mean()), float(np.sum((x - x.mean()) ** 2))
        log_k, slope = _lines(x, logs[:, None])[:, 0].tolist()
        left, error = logs - log_k - slope * x, np.inf
        if n > 2:
            quantile = special.stdtrit(n - 2, 0.5 + level / 2)
            error = float(quantile * np.sqrt(left @ left / (n - 2)))
        reach, lines = error / np.sqrt(spread), None
        exponent = Interval(slope, float(slope - reach), float(slope + reach), level, "regression")
        if replicas is not None and n > 2:
            lines = _lines(x, replicas[0])
            exponent = _percentiles(slope, lines[1], level, replicas[1])
        return cls(exponent, log_k, centre, spread, n, error, lines)

    def at(self, flops: float) -> Interval:
        """Return y at a budget with its interval."""
        slope, log_c = self.exponent, float(np.log(flops))
        estimate = float(np.exp(self.log_k + slope.estimate * log_c))
        if self.lines is not None:
            values = np.exp(self.lines[0] + self.lines[1] * log_c)
            return _percentiles(estimate, values, slope.level, slope.method)
        reach = self.error * np.sqrt(1 / self.points + (log_c - self.centre) ** 2 / self.spread)
        low, high = float(estimate * np.exp(-reach)), float(estimate * np.exp(reach))
        return Interval(estimate, low, high, slope.level, "regression")


def _lines(x: Array, y: Array) -> Array:
    """Return intercepts and slopes, (2, B), of the finite y, (n, B), on x, (n,)."""
    there = np.isfinite(y)
    y, count = np.where(there, y, 0.0), there.sum(axis=0)
    middle = x @ there / count
    away = there * (x[:, None] - middle)
    slope = (away * y).sum(axis=0) / (away**2).sum(axis=0)
    return np.array([y.sum(axis=0) / count - slope * middle, slope])


def _percentiles(estimate: float, values: Array, level: float, method: str) -> Interval:
    low, high = np.quantile(values, [0.5 - level / 2, 0.5 + level / 2])
    return Interval(estimate, min(float(low), estimate), max(float(high), estimate), level, method)


@dataclass(frozen=True)
class Minima:
    """Hold the best N, D and L of each budget, (n,), and the power laws through them.

    L includes the irreducible loss, so that its power law holds only locally.
    """

    flops: Array
    n: Array
    d: Array
    loss: Array
    n_law: PowerLaw
    d_law: PowerLaw
    loss_law: PowerLaw

    @classmethod
    def through(
        cls, rows: Sequence[tuple[float, ...]], level: float, replicas: Replicas | None = None
    ) -> Minima:
        """Fit rows of FLOPs, N, D and loss; replicas are of the last three."""
        flops, *columns = np.array(rows, dtype=float).T
        each = [replicas and (replicas[0][i], replicas[1]) for i in range(3)]
        laws = [PowerLaw.through(flops, columns[i], level, each[i]) for i in range(3)]
        return cls(flops, *columns, *laws)


# --- IsoFLOP profiles


@dataclass(frozen=True)
class Profile:
    """Hold the runs of one budget and the size with the least loss.

    ``loss`` is corrected to the budget where the compute of the runs differs a little.  ``best``
    is (C, N, D, L) at the minimum, or None with a ``reason``.
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
        """Return the geometric mean of the FLOPs of the runs."""
        return float(np.exp(np.log(self.flops).mean()))

    def curve(self, n: Array) -> Array:
        """Return the loss by the interpolation, at sizes within those that were run."""
        return np.asarray(_curve(self.n, self.loss, self.method)(np.log(n)))


@dataclass(frozen=True)
class IsoFlop:
    """Hold a profile per budget, the smallest first; ``minima`` of those that have one."""

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

    ``method`` is ``cubic`` or ``parabola``, least squares through all rows, or ``akima`` (modified,
    without overshoot) through means over seeds; three sizes always get a parabola.  Neighbours
    within the factor ``same_budget`` in compute share a budget, and their losses are corrected for
    the rest.  Interpolants differ by more than the noise (arXiv:2603.22339), so the intervals of
    the power laws pool replicas of all three, while ``method`` sets the estimate.

    The smallest or largest size is never a minimum.  Raises ConfigError for absent columns.
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
    replicas = _replicas([profile for profile in profiles if profile.best])
    return IsoFlop(profiles, Minima.through(minima, level, replicas), "")


def budgets(flops: Array, same: float = SAME_BUDGET) -> list[NDArray[np.intp]]:
    """Return the rows of each budget in ascending order, split where C jumps by ``same``."""
    order = np.argsort(flops, kind="stable")
    jumps = np.flatnonzero(np.diff(np.log(flops[order])) > np.log(same))
    return list(np.split(order, jumps + 1))


def _at_one_compute(flops: Array, losses: Array, groups: list[NDArray[np.intp]]) -> Array:
    """Return the losses, (n,), as if every run had spent the geometric mean of its budget.

    A few per cent of compute that vary with size would move the minimum by up to a tenth.  By the
    envelope theorem the loss at a minimum falls with C as the least losses of the budgets do.
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
    found, reason = np.nan, ""
    if len(logs) < 3:
        reason = f"{len(logs)} size{'s' * (len(logs) != 1)}; a minimum needs 3"
    elif flops.max() > WIDEST_BUDGET * flops.min():
        reason = (
            f"the compute of these runs goes from {flops.min():.3g} to {flops.max():.3g} FLOPs "
            "without a gap: they are not one budget"
        )
    elif best in (0, len(mean) - 1):
        end, wanted = ("smallest", "smaller") if best == 0 else ("largest", "larger")
        reason = (
            f"the loss is least at the {end} size, N = {np.exp(logs[best]):.3g}: "
            f"the minimum needs {wanted} ones"
        )
    else:
        (found,), (least,) = _minima(n, loss[:, None], method)
        reason = f"the {method} has no minimum between the sizes that were run"
    if np.isnan(found):
        return Profile(flops, n, d, loss, method, reason=reason)
    logs = np.array([np.log(flops).mean(), found, _log_tokens(flops, n, d, found), np.log(least)])
    c, at, tokens, value = np.exp(logs).tolist()
    parabola = float(np.exp(_minima(n, loss[:, None], "parabola")[0][0]))
    by_parabola = None if np.isnan(parabola) else parabola
    return Profile(flops, n, d, loss, method, (c, at, tokens, value), by_parabola)


def _log_tokens(flops: Array, n: Array, d: Array, log_n: Any) -> Any:
    """Return log D of a budget at given sizes, by the FLOPs per token of its runs."""
    return np.log(flops).mean() - np.interp(log_n, *by_size(n, np.log(flops / d)))


def by_size(n: Array, values: Array) -> tuple[Array, Array]:
    """Return log N of the distinct sizes, ascending, and means of ``values``, (n,) or (n, B)."""
    sizes, where, count = np.unique(n, return_inverse=True, return_counts=True)
    return np.log(sizes), (where == np.arange(len(sizes))[:, None]) / count[:, None] @ values


def _curve(n: Array, loss: Array, method: str) -> Any:
    """Return piecewise cubics in log N through the losses, (n,) or (n, B)."""
    logs, means = by_size(n, loss)
    if method == "akima":
        return interpolate.Akima1DInterpolator(logs, means, method="makima")
    powers = np.vander(np.log(n) - logs[0], 4 if method == "cubic" else 3)
    return interpolate.PPoly(np.linalg.lstsq(powers, loss, rcond=None)[0][:, None], logs[[0, -1]])


def _minima(n: Array, loss: Array, method: str) -> tuple[Array, Array]:
    """Return log N and the loss at the minimum of each curve, (B,); log N is nan at an end."""
    curve = _curve(n, loss, method)
    knots = np.repeat(curve.x[:, None], loss.shape[1], axis=1)
    a, b, c, d = np.concatenate([np.zeros((4 - len(curve.c), *curve.c.shape[1:])), curve.c])
    with np.errstate(all="ignore"):
        root = np.sqrt(b**2 - 3 * a * c)
        flat = np.where(b >= 0, -c / (b + root), (root - b) / (3 * a))  # where the curve bends up
        inside = (flat > 0) & (flat < np.diff(knots, axis=0))
        values = np.where(inside, ((a * flat + b) * flat + c) * flat + d, np.inf)
    places, values = np.vstack([flat + knots[:-1], knots]), np.vstack([values, curve(curve.x)])
    least = np.argmin(values, axis=0), np.arange(loss.shape[1])
    place = places[least]
    return np.where((knots[0] < place) & (place < knots[-1]), place, np.nan), values[least]


def _replicas(profiles: Sequence[Profile]) -> Replicas | None:
    """Return log N, log D and log L at the minima of every interpolant with redrawn noise.

    Returns None if the noise is unknown.
    """
    noise, draw = _noise(profiles), np.random.default_rng(0)
    if not len(noise):
        return None
    found: dict[str, list[Array]] = {method: [] for method in METHODS}
    for one in profiles:
        _, where, count = np.unique(one.n, return_inverse=True, return_counts=True)
        moved = draw.choice(noise, (len(count), REPLICAS)) / np.sqrt(count)[:, None]
        losses = one.loss[:, None] * np.exp(moved[where])
        for method, parts in found.items():
            log_n, least = _minima(one.n, losses, method)
            if method == "cubic" and len(count) == 3:
                log_n[:] = np.nan
            log_d = _log_tokens(one.flops, one.n, one.d, log_n)
            parts.append(np.array([log_n, log_d, np.log(least) + 0 * log_n]))
    pooled = {}
    for method, parts in found.items():
        values = np.stack(parts, axis=1)  # (3, budgets, B)
        enough = np.isfinite(values[0]).sum(axis=0) > min(2, len(parts) - 1)
        if enough.mean() > 0.5:
            pooled[method] = values[..., enough]
    if not pooled:
        return None
    words = "over interpolants and seeds"
    if len(pooled) < len(METHODS):
        words += f" (minima by the {' and the '.join(pooled)} only)"
    return np.concatenate(list(pooled.values()), axis=2), f"bootstrap {words}"


def _noise(profiles: Sequence[Profile]) -> Array:
    """Return deviations of log losses of single runs: between seeds, or with too few seeds from a
    smooth curve; empty if neither is known."""
    left, apart, free, seeds = [], [], 0, 0
    for one in profiles:
        logs, means = by_size(one.n, np.log(one.loss))
        _, where, count = np.unique(one.n, return_inverse=True, return_counts=True)
        apart.append((np.log(one.loss) - means[where])[count[where] > 1])
        order = min(4, len(logs) - 1)  # of a cubic, or of a parabola
        smooth = _curve(one.n, np.log(one.loss), "cubic" if order == 4 else "parabola")
        left.append((means - smooth(logs)) * np.sqrt(count))
        free, seeds = free + len(logs) - max(order, 3), seeds + len(where) - len(count)
    parts, degrees = (apart, seeds) if seeds >= FEWEST_SEEDS or not free else (left, free)
    values = np.concatenate(parts)
    return values * np.sqrt(len(values) / degrees) if degrees else values[:0]


# --- the envelope of training curves


@dataclass(frozen=True)
class Envelope:
    """Hold the lower envelope of loss against compute, and the best size along it, (G,) each."""

    flops: Array
    n: Array
    d: Array
    loss: Array
    minima: Minima | None  # one per size: the middle of the range of compute where it is best
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

    ``curves`` has a row per checkpoint: the run, its N, tokens seen, FLOPs spent, and loss.  Rows
    without a loss or before the first step are left out; between checkpoints log L is a monotone
    cubic in log C.  The lowest run of a size counts, which favours noise: ``smooth`` averages that
    many neighbouring checkpoints.

    Each size gives a point, the middle in log C of the range where it is best, except the first,
    the last, and those whose range is cut short by the end of a curve.  Losses in the middle of a
    decaying schedule are too high, so this needs a constant rate or several lengths per size.

    Raises ConfigError if columns are absent or no run has two checkpoints.
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
    grid, along = np.log(np.geomspace(rows[c].min(), rows[c].max(), BUDGETS)), []
    for _, part in rows.groupby(run):
        logs = np.log(np.column_stack([positive(part, name) for name in (c, loss, d)]))
        logs = np.lib.stride_tricks.sliding_window_view(logs, smooth, axis=0).mean(axis=-1)
        between = interpolate.PchipInterpolator(logs[:, 0], logs[:, 1:], extrapolate=False)
        along.append(between(grid))  # nan beyond the ends
    sizes = rows.groupby(run)[n].first().to_numpy(float)
    some = np.isfinite(along).any(axis=(0, 2))
    grid = grid[some]
    losses, tokens = np.moveaxis(np.array(along)[:, some], -1, 0)  # (runs, budgets)
    there, winner, budget = np.isfinite(losses), np.nanargmin(losses, axis=0), np.arange(len(grid))
    best, least, seen = sizes[winner], losses[winner, budget], tokens[winner, budget]
    # a size counts if it beat a smaller one at the start of its range and lost to a larger one
    smaller = (there & (sizes[:, None] < best)).any(axis=0)
    larger = (there & (sizes[:, None] > best)).any(axis=0)
    minima = []
    for size in np.unique(best):
        cells = np.flatnonzero(best == size)
        first, last = cells[0], cells[-1]
        if first == 0 or last == len(grid) - 1:
            continue
        starts = best[first - 1] < size and smaller[first]
        if starts and best[last + 1] > size and larger[last]:
            # if noise splits the range, average the cells that the size has won
            middle = float(grid[cells].mean())
            at = [np.interp(middle, grid[cells], v[cells]) for v in (seen, least)]
            minima.append((np.exp(middle), size, *np.exp(at)))
    reason = ""
    if len(minima) < 2:
        reason = f"{len(minima)} sizes are best between a smaller and a larger one; it needs 2"
    through = None if reason else Minima.through(minima, level)
    return Envelope(np.exp(grid), best, np.exp(seen), np.exp(least), through, reason)
