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
REPLICAS = 1000  # of each interpolant
FEWEST_SEEDS = 5  # degrees of freedom from which on seeds tell the noise
Replicas = tuple[Array, str]  # logarithms at budgets, (..., budgets, B), nan: none; what they are


# --- power laws of compute


@dataclass(frozen=True)
class PowerLaw:
    """y = k · C^exponent: a regression of log y on log C.

    Its intervals are percentiles over replicas of the points, or by Student's t of their scatter;
    of two points, which leave none to judge by, the ends are infinite.
    """

    exponent: Interval
    log_k: float
    centre: float  # mean log C of the points
    spread: float  # Σ (log C - centre)²
    points: int
    error: float  # of log y about the line, times Student's quantile; inf with two points
    lines: Array | None = None  # (2, B): log k and exponent by each replica

    @classmethod
    def through(
        cls, flops: Array, y: Array, level: float = LEVEL, replicas: Replicas | None = None
    ) -> PowerLaw:
        """Return that of y at ``flops``, (n,) both; replicas are of log y, (n, B).  Raises
        ConfigError for fewer than two."""
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
        """Return y at a budget, with the interval of the line there."""
        slope, log_c = self.exponent, float(np.log(flops))
        estimate = float(np.exp(self.log_k + slope.estimate * log_c))
        if self.lines is not None:
            values = np.exp(self.lines[0] + self.lines[1] * log_c)
            return _percentiles(estimate, values, slope.level, slope.method)
        reach = self.error * np.sqrt(1 / self.points + (log_c - self.centre) ** 2 / self.spread)
        low, high = float(estimate * np.exp(-reach)), float(estimate * np.exp(reach))
        return Interval(estimate, low, high, slope.level, "regression")


def _lines(x: Array, y: Array) -> Array:
    """Return intercepts and slopes, (2, B), of y, (n, B), on x, (n,), where y has a number."""
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
    def through(
        cls, rows: Sequence[tuple[float, ...]], level: float, replicas: Replicas | None = None
    ) -> Minima:
        """Return those of rows of FLOPs, N, D and loss; replicas are of the last three."""
        flops, *columns = np.array(rows, dtype=float).T
        each = [replicas and (replicas[0][i], replicas[1]) for i in range(3)]
        laws = [PowerLaw.through(flops, columns[i], level, each[i]) for i in range(3)]
        return cls(flops, *columns, *laws)


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

    ``method``: ``cubic`` or ``parabola``, least squares through all rows, seeds among them, or
    ``akima`` (the modified one, which does not overshoot), through the means over seeds.  Three
    sizes carry a parabola only.  ``same_budget`` is the factor below which neighbours in compute
    are one budget; what its runs differ in compute is taken off their losses.  Interpolants of the
    same runs disagree by more than the noise (arXiv:2603.22339), so the intervals of the power
    laws are percentiles of replicas by all three; ``method`` gives the estimate alone.

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
    replicas = _replicas([profile for profile in profiles if profile.best])
    return IsoFlop(profiles, Minima.through(minima, level, replicas), "")


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
    found, reason = np.nan, ""
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
    """Return log D of a budget at some sizes, by the FLOPs per token of its runs."""
    return np.log(flops).mean() - np.interp(log_n, *by_size(n, np.log(flops / d)))


def by_size(n: Array, values: Array) -> tuple[Array, Array]:
    """Return log N of the distinct sizes in order, and the mean of ``values``, (n,) or (n, B)."""
    sizes, where, count = np.unique(n, return_inverse=True, return_counts=True)
    return np.log(sizes), (where == np.arange(len(sizes))[:, None]) / count[:, None] @ values


def _curve(n: Array, loss: Array, method: str) -> Any:
    """Return the curves of the losses, (n,) or (n, B), in log N: cubics between knots."""
    logs, means = by_size(n, loss)
    if method == "akima":
        return interpolate.Akima1DInterpolator(logs, means, method="makima")
    powers = np.vander(np.log(n) - logs[0], 4 if method == "cubic" else 3)
    return interpolate.PPoly(np.linalg.lstsq(powers, loss, rcond=None)[0][:, None], logs[[0, -1]])


def _minima(n: Array, loss: Array, method: str) -> tuple[Array, Array]:
    """Return log N and the loss at the least of each curve, (B,); log N is nan at an end."""
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
    """Return log N, log D and log L at the minima by every interpolant, were the noise another;
    None where nothing tells the noise."""
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
    """Return deviations of log losses, as of one run: by how much seeds scatter, or of too few what
    a smooth curve leaves of the means of settings; none where nothing tells."""
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
    """Hold the lower envelope of loss against compute, (G,) each, with the best size along it."""

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
    cubic in log C.  The lowest of several runs of a size counts, which favours what scatters:
    ``smooth`` takes the mean of so many neighbouring checkpoints of a run.

    Each size gives a point: the middle, in log C, of the stretch where it is best.  The first and
    the last size have none, nor has one whose stretch starts or ends because a curve does.  A loss
    halfway down a decaying schedule is above that of a run which ends there, so that this needs a
    constant rate, or schedules of several lengths a size.

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
        if taken_over and best[last + 1] > size and larger[last]:
            # where stretches fray, the cells that it has won weigh as much as a clean stretch
            middle = float(grid[cells].mean())
            at = [np.interp(middle, grid[cells], v[cells]) for v in (seen, least)]
            minima.append((np.exp(middle), size, *np.exp(at)))
    reason = ""
    if len(minima) < 2:
        reason = f"{len(minima)} sizes are best between a smaller and a larger one; it needs 2"
    through = None if reason else Minima.through(minima, level)
    return Envelope(np.exp(grid), best, np.exp(seen), np.exp(least), through, reason)
