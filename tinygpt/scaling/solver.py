"""Solve fits, profiles and refits by batched Gauss-Newton on a sum of Huber's losses.

A sum of powers starts from variable projection: on a grid of exponents the coefficients have a
closed form, and each local minimum of that surface is a start.  Other laws start from many
random points.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tinygpt.scaling.laws import Array, Law
from tinygpt.scaling.points import Points

NDBool = np.ndarray[Any, np.dtype[np.bool_]]

LEAST = float(np.log(1e-9))  # a coefficient below this fraction of the loss is zero
FADING = 10.0  # in logs: a shrinking term this close to its floor is moved onto it
IN_CACHE = 8000  # points times rows evaluated at once
ROUNDING = 1e-15  # of a log loss


@dataclass(frozen=True)
class Hold:
    """Pull a function of the parameters towards a value, as one more measurement would.

    Whatever the stiffness, the solution lies on the profile: no law with the same value of the
    function fits better.
    """

    function: Callable[[Array], tuple[Array, Array]]  # (B, P) -> values (B,), gradients (B, P)
    value: float
    stiffness: float


@dataclass(frozen=True)
class Solved:
    """Hold where the solver ended for each start of a batch."""

    theta: Array  # (B, P)
    objective: Array  # (B,)
    gradient: Array  # (B, P)
    converged: NDBool

    def __getitem__(self, rows: Any) -> Solved:
        return Solved(*(part[rows] for part in vars(self).values()))


def huber(residuals: Array, threshold: Array | float) -> Array:
    """Return r²/2 up to the threshold and its tangent beyond it (Huber 1964)."""
    size = np.abs(residuals)
    inside = np.minimum(size, threshold)
    return np.asarray(inside * (0.5 * inside + (size - inside)))


def bounds(law: Law, points: Points) -> tuple[Array, Array]:
    """Return the lower and upper bound of each parameter for centred variables, (P,) each."""
    low, high = np.full(len(law), -np.inf), np.full(len(law), np.inf)
    for j, name in enumerate(law.parameters):
        if name in (law.powers or ("E", "A", "B")):
            low[j] = points.y.min() + LEAST
        if name in law.bounds:
            ends = np.array(law.bounds[name])
            low[j], high[j] = np.log(ends) if name in law.coefficients else ends
        if name == "x1":
            low[j], high[j] = points.x["x"].min(), points.x["x"].max()  # no break is seen elsewhere
    return low, high


def term_mask(law: Law) -> NDBool:
    """Return which parameters are logarithms of terms that the loss is linear in, (P,)."""
    return np.array([name in (law.powers or ("E",)) for name in law.parameters])


def objective(
    law: Law,
    points: Points,
    theta: Array,
    threshold: Array | float,
    weights: Array | None = None,
    hold: Hold | None = None,
) -> tuple[Array, Array, Array]:
    """Return Σ weight · huber(residual), its gradient and Gauss-Newton Hessian for each row."""
    fitted, jacobian = points.derivatives(law, theta)
    residuals = fitted - points.response
    if points.weights is not None:
        residuals, jacobian = residuals * points.weights, jacobian * points.weights[:, None]
    slope, loss, inside = residuals, 0.5 * residuals**2, weights
    if np.min(threshold) < np.inf:
        size = np.abs(residuals)
        slope = np.copysign(np.minimum(size, threshold), residuals)
        own = np.ones(1) if weights is None else weights
        loss = huber(residuals, threshold)
        inside = np.asarray((size <= threshold) * own, dtype=float)
        few = np.count_nonzero(inside, axis=1) < theta.shape[1]
        if few.any():  # too few for a curvature; Huber's weights still lead downhill
            share = np.minimum(1.0, threshold / np.maximum(size, 1e-300))
            inside = np.where(few[:, None], share * own, inside)
    if weights is not None:
        slope, loss = slope * weights, loss * weights
    value, gradient = loss.sum(axis=1), (slope[:, None] @ jacobian)[:, 0]
    bent = jacobian if inside is None else jacobian * inside[..., None]
    hessian = bent.transpose(0, 2, 1) @ jacobian
    if hold is not None:
        held, normal = hold.function(theta)
        pull = hold.stiffness * (held - hold.value)
        value = value + 0.5 * pull * (held - hold.value)
        gradient = gradient + pull[:, None] * normal
        hessian = hessian + hold.stiffness * normal[:, :, None] * normal[:, None]
    return value, gradient, hessian


@np.errstate(all="ignore")
def solve(
    law: Law,
    points: Points,
    theta: Array,
    threshold: Array | float = np.inf,
    weights: Array | None = None,
    hold: Hold | None = None,
    most_steps: int = 300,
    gain: float = 1e-18,
) -> Solved:
    """Minimise Σ weight · huber(residual) from each row of ``theta``, (B, P), within bounds.

    ``threshold`` is a number or (B, 1), ``weights`` are (B, n).  A row ends where a step would
    lower its sum by less than ``gain`` times that sum.

    The method is Levenberg-Marquardt.  It steps in the terms, not in their logarithms: where a
    term and E can hardly be told apart, the minimum lies in a valley that is straight in the terms
    and curved in their logarithms.
    """
    limits = np.broadcast_to(threshold, (len(theta), 1))
    size = max(4, IN_CACHE // len(points))

    def evaluate(theta: Array, rows: Any) -> tuple[Array, Array, Array]:
        parts = []
        for first in range(0, len(theta), size):
            part = rows[first : first + size]
            own, one = None if weights is None else weights[part], theta[first : first + size]
            parts.append(objective(law, points, one, limits[part], own, hold))
        value, gradient, hessian = map(np.concatenate, zip(*parts, strict=True))
        return value, gradient, hessian

    live, here, damping = np.arange(len(theta)), theta, np.zeros(len(theta))
    value, gradient, hessian = evaluate(here, live)
    found = Solved(theta.copy(), value.copy(), gradient.copy(), np.zeros(len(theta), dtype=bool))
    low, high = bounds(law, points)
    terms, diagonal = term_mask(law), np.arange(len(law))
    faint = np.where(terms, low + FADING, -np.inf)
    # a sum of squares is no more precise than this
    rounding = len(points) * (ROUNDING * (points.response.max() if points.raw else 1.0)) ** 2
    for _ in range(most_steps):
        if not len(live):
            break
        fixed = np.where(gradient > 0, here <= low, here >= high)
        share = np.where(fixed, 0.0, 1.0 / np.sqrt(hessian[:, diagonal, diagonal] + 1e-300))
        scaled, damped = gradient * share, damping > 0
        bend = hessian * (share[:, :, None] * share[:, None])  # with a diagonal of ones
        bend[:, diagonal, diagonal] = (1 + 1e-13) + damping[:, None]
        step = np.linalg.solve(bend, scaled[..., None])[..., 0]
        expected = 0.5 * (scaled * step).sum(axis=1)
        full = expected  # the gain of an undamped step, which is larger; computed near the end
        tiny = 1e-13 * value
        ending = damped & (expected <= np.maximum(tiny, gain * value) + rounding)
        if ending.any():
            bend[:, diagonal, diagonal] = 1 + 1e-13
            undamped = np.linalg.solve(bend[ending], scaled[ending, :, None])[..., 0]
            full = expected.copy()
            full[ending] = 0.5 * (scaled[ending] * undamped).sum(axis=1)
        step *= -share
        longest = np.abs(step).max(axis=1, keepdims=True)
        step *= np.minimum(1.0, 2.0 / np.maximum(longest, 1e-300))
        step = np.where(terms, np.log1p(np.maximum(step, -0.9)), step)
        trial = np.minimum(np.maximum(here + step, low), high)
        gone = (trial < faint) & (gradient > 0) & ~damped[:, None]
        trial = np.where(gone, low, trial)
        new = evaluate(trial, live)
        finite = np.isfinite(new[2].sum(axis=(1, 2)))
        gained = value - new[0]
        better, done = (gained >= 0) & finite, full <= gain * value + rounding
        good = better & (gained > 0.25 * expected)
        last = ~better & (full <= tiny)  # a gain this small is lost in rounding
        done |= last
        better |= last & finite
        over = done | (~better & (damping > 1e8))
        less = np.where(damping < 1e-6, 0.0, damping * 0.1)
        keep = np.where(gained > 0.6 * expected, less, damping)
        damping = np.where(good, keep, np.maximum(damping * 8, 1e-6))
        here, value = np.where(better[:, None], trial, here), np.where(better, new[0], value)
        gradient = np.where(better[:, None], new[1], gradient)
        hessian = np.where(better[:, None, None], new[2], hessian)
        if over.any():
            found.converged[live[done]] = True
            found.theta[live], found.objective[live], found.gradient[live] = here, value, gradient
            stay = ~over
            live, here, damping = live[stay], here[stay], damping[stay]
            value, gradient, hessian = value[stay], gradient[stay], hessian[stay]
    found.theta[live], found.objective[live], found.gradient[live] = here, value, gradient
    return found


# --- where a search starts

EXPONENTS = np.geomspace(0.015, 2.4, 34)
MOST_ON_GRID = 1000  # points used for the grid's surface
N_STARTS = 1024  # random starts, of which the best are solved
N_POLISHED = 32
# Ranges of random starts: of exponents, and of logarithms of coefficients (terms relative to the
# least loss).
LIKELY = {
    "E": (-3.0, 0.0),
    **dict.fromkeys(("A", "B", "Nc", "Dc"), (-4.0, 1.0)),
    **dict.fromkeys(("alpha", "beta"), (0.03, 1.0)),
    **dict.fromkeys(("rn", "rd"), (0.0, 4.0)),
    "gamma": (0.3, 2.0),
    "c": (-3.0, 5.0),
    "f": (-3.0, 1.0),
    "x1": (0.0, 1.0),
}


def grid_starts(law: Law, points: Points) -> Array:
    """Return the local minima of a sum of powers on a grid of its exponents, (B, P).

    At each node the non-negative coefficients with the least squared relative errors follow in
    closed form, by trying each set of active terms.
    """
    from scipy.ndimage import minimum_filter  # slow to import

    points = points.rows(slice(None, None, 1 + len(points) // MOST_ON_GRID))
    kinds, dimensions = len(law.coefficients), len(law.exponents)
    grid = np.array(list(itertools.product(EXPONENTS, repeat=dimensions)))
    theta = np.hstack([np.zeros((len(grid), kinds)), grid])
    terms = np.moveaxis(np.exp(law.terms(theta, points.x) - points.y), 0, 1)  # (G, K, n)
    gram, target = terms @ np.swapaxes(terms, 1, 2), terms.sum(axis=2)
    least = np.full(len(grid), np.inf)
    coefficients = np.zeros((len(grid), kinds))
    for count in range(1, kinds + 1):
        for active in itertools.combinations(range(kinds), count):
            part = gram[:, active, :][:, :, active]
            ridge = 1e-13 * np.trace(part, axis1=1, axis2=2)[:, None, None] * np.eye(count)
            found = np.linalg.solve(part + ridge, target[:, active, None])[..., 0]
            value = -np.sum(found * target[:, active], axis=1)
            take = (found >= 0).all(axis=1) & (value < least)
            least[take], coefficients[take] = value[take], 0.0
            coefficients[np.ix_(take, active)] = found[take]
    theta[:, :kinds] = np.log(np.maximum(coefficients, 1e-6))
    surface = least.reshape((len(EXPONENTS),) * dimensions)
    lowest = np.flatnonzero(surface <= minimum_filter(surface, size=3, mode="nearest"))
    return np.asarray(theta[lowest[np.argsort(least[lowest], kind="stable")[:8]]])


def spread_starts(law: Law, points: Points, seed: int) -> Array:
    """Return starts for any law, (B, P): the best of a Latin hypercube of its parameters."""
    names, random = law.parameters, np.random.default_rng(seed)
    ranks = random.permuted(np.tile(np.arange(N_STARTS), (len(names), 1)), axis=1).T
    unit = (ranks + random.random(ranks.shape)) / N_STARTS
    ends = np.array([LIKELY.get(name) or _likely(law, name) for name in names])
    starts = ends[:, 0] + unit * (ends[:, 1] - ends[:, 0])
    least = points.y.min()
    for j, name in enumerate(names):
        if name in (law.powers or ("E", "A", "B")):
            starts[:, j] += least
        if name in ("Nc", "Dc"):  # its power is about as large as the loss
            exponent = starts[:, names.index("alpha" if name == "Nc" else "beta")]
            starts[:, j] = (starts[:, j] + least) / exponent
        if name == "x1":
            starts[:, j] = np.quantile(points.x["x"], unit[:, j])
    starts = np.clip(starts, *bounds(law, points))
    with np.errstate(all="ignore"):
        found = np.sum((law.log_loss(starts, points.x) - points.y) ** 2, axis=1)
    best = np.argsort(np.where(np.isfinite(found), found, np.inf))[:N_POLISHED]
    return np.asarray(starts[best])


_starts: dict[Any, Array] = {}  # by law and points, so that fits with other weights share them


def starts_of(law: Law, points: Points, seed: int) -> Array:
    """Return the starts of a search for a law's minima, (B, P)."""
    arrays = [points.y, *points.x.values()]
    key = (law.name, law.formula, law.parameters, seed, *(array.tobytes() for array in arrays))
    if key not in _starts:
        plain = law.powers and max(map(len, law.powers.values())) == 1 and len(law.exponents) <= 2
        found = grid_starts(law, points) if plain else spread_starts(law, points, seed)
        if len(_starts) > 100:
            _starts.clear()
        _starts[key] = found
    return _starts[key]


def _likely(law: Law, name: str) -> tuple[float, float]:
    """Return the range of starts for a parameter of a user's law, within its bounds if any."""
    if name in law.bounds:
        ends = np.array(law.bounds[name], dtype=float)
        with np.errstate(divide="ignore"):
            low, high = np.log(ends) if name in law.coefficients else ends
        return max(low, -10.0), min(high, 10.0)
    return (-4.0, 2.0) if name in law.coefficients else (0.03, 1.0)
