"""One solver for fits, profiles and refits: batched Gauss-Newton on a sum of Huber's losses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tinygpt.scaling.laws import Array, Law
from tinygpt.scaling.points import Points

NDBool = np.ndarray[Any, np.dtype[np.bool_]]

LEAST = float(np.log(1e-9))  # a coefficient below this part of the loss is zero
FADING = 10.0  # in units of log: a term so near its floor that still falls is tried there
STEPS = 300
GAIN = 1e-18
IN_CACHE = 8000  # points times rows that are evaluated at once
ROUNDING = 1e-15  # of a log loss


@dataclass(frozen=True)
class Hold:
    """A function of the parameters that is drawn to a value, as by one more measurement.

    Where the solver ends is the best of all laws that have the value which the function takes
    there, whatever the stiffness: a point of the profile.
    """

    function: Callable[[Array], tuple[Array, Array]]  # (B, P) -> values (B,), gradients (B, P)
    value: float
    stiffness: float


@dataclass(frozen=True)
class Solved:
    """Where the solver ended, for each of a batch of starts."""

    theta: Array  # (B, P)
    objective: Array  # (B,)
    gradient: Array  # (B, P)
    converged: NDBool

    def __getitem__(self, rows: Any) -> Solved:
        return Solved(*(part[rows] for part in vars(self).values()))


def huber(residuals: Array, threshold: Array | float) -> Array:
    """Return r²/2 up to the threshold, and a line with the same slope beyond it (Huber 1964)."""
    size = np.abs(residuals)
    inside = np.minimum(size, threshold)
    # with an infinite threshold the second factor is zero everywhere
    return np.asarray(inside * (0.5 * inside + (size - inside)))


def bounds(law: Law, points: Points) -> tuple[Array, Array]:
    """Return the least and the greatest each parameter can be, for centred variables."""
    low, high = np.full(len(law), -np.inf), np.full(len(law), np.inf)
    for j, name in enumerate(law.parameters):
        if name in (law.powers or ("E", "A", "B")):
            low[j] = points.y.min() + LEAST
        if name in law.bounds:
            ends = np.array(law.bounds[name])
            low[j], high[j] = np.log(ends) if name in law.coefficients else ends
        if name == "x1":
            low[j], high[j] = points.x["x"].min(), points.x["x"].max()  # elsewhere there is none
    return low, high


def term_mask(law: Law) -> NDBool:
    """Return which parameters are logarithms of terms, which the loss is linear in."""
    return np.array([name in (law.powers or ("E",)) for name in law.parameters])


def objective(
    law: Law,
    points: Points,
    theta: Array,
    threshold: Array | float,
    weights: Array | None = None,
    hold: Hold | None = None,
) -> tuple[Array, Array, Array]:
    """Return Σ weight · huber(residual), its gradient and its Gauss-Newton Hessian, by row."""
    fitted, jacobian = points.derivatives(law, theta)
    residuals = fitted - points.response
    if points.weights is not None:
        residuals, jacobian = residuals * points.weights, jacobian * points.weights[:, None]
    slope, loss, inside = residuals, 0.5 * residuals**2, weights
    if np.min(threshold) < np.inf:
        size = np.abs(residuals)
        slope = np.copysign(np.minimum(size, threshold), residuals)
        loss, inside = huber(residuals, threshold), (size <= threshold).astype(float)
        inside = inside if weights is None else inside * weights
        few = np.count_nonzero(inside, axis=1) < theta.shape[1]
        if few.any():  # their curvature says nothing; Huber's own weights still lead down
            share = np.minimum(1.0, threshold / np.maximum(size, 1e-300))
            share = share if weights is None else share * weights
            inside = np.where(few[:, None], share, inside)
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
    most_steps: int = STEPS,
    gain: float = GAIN,
) -> Solved:
    """Minimise Σ weight · huber(residual) from every row of ``theta``, (B, P).

    The threshold is one for all rows, or one for each, (B, 1).  A row ends where a step would
    lower its sum by less than ``gain``, as a part of it.

    Levenberg and Marquardt's method within bounds.  It steps in the terms themselves, not in
    their logarithms: where a term and E can hardly be told apart the minimum lies in a valley that
    is straight in the terms and bent in their logarithms.  ``weights`` are (B, n).
    """
    limits = np.broadcast_to(threshold, (len(theta), 1))
    size = max(4, IN_CACHE // len(points))

    def evaluate(theta: Array, rows: Any) -> tuple[Array, Array, Array]:
        parts = []
        for first in range(0, len(theta), size):
            part = rows[first : first + size]
            own = None if weights is None else weights[part]
            one = theta[first : first + size]
            parts.append(objective(law, points, one, limits[part], own, hold))
        if len(parts) == 1:
            return parts[0]
        value, gradient, hessian = map(np.concatenate, zip(*parts, strict=True))
        return value, gradient, hessian

    live, here, damping = np.arange(len(theta)), theta, np.zeros(len(theta))
    value, gradient, hessian = evaluate(here, live)
    found = Solved(theta.copy(), value.copy(), gradient.copy(), np.zeros(len(theta), dtype=bool))
    low, high = bounds(law, points)
    terms, diagonal = term_mask(law), np.arange(len(law))
    faint = np.where(terms, low + FADING, -np.inf)
    # no sum of squares is known better
    rounding = len(points) * (ROUNDING * (points.response.max() if points.raw else 1.0)) ** 2
    for _ in range(most_steps):
        if not len(live):
            break
        fixed = np.where(gradient > 0, here <= low, here >= high)
        share = 1.0 / np.sqrt(hessian[:, diagonal, diagonal] + 1e-300)
        if fixed.any():
            share[fixed] = 0.0
        scaled, damped = gradient * share, damping > 0
        bend = hessian * (share[:, :, None] * share[:, None])  # with a diagonal of ones
        bend[:, diagonal, diagonal] = (1 + 1e-13) + damping[:, None]
        step = np.linalg.solve(bend, scaled[..., None])[..., 0]
        expected = 0.5 * (scaled * step).sum(axis=1)
        full = expected  # what a step without damping would gain: more, and asked for near the end
        tiny = 1e-13 * value
        ending = damped & (expected <= np.maximum(tiny, gain * value) + rounding)
        if ending.any():
            bend[:, diagonal, diagonal] = 1 + 1e-13
            undamped = np.linalg.solve(bend[ending], scaled[ending, :, None])[..., 0]
            full = expected.copy()
            full[ending] = 0.5 * (scaled[ending] * undamped).sum(axis=1)
        step *= -share
        longest = np.abs(step).max(axis=1, keepdims=True)
        if not longest.max() <= 2.0:
            step *= np.minimum(1.0, 2.0 / np.maximum(longest, 1e-300))
        step = np.where(terms, np.log1p(np.maximum(step, -0.9)), step)
        trial = np.minimum(np.maximum(here + step, low), high)
        fading = trial < faint
        if fading.any():
            trial = np.where(fading & (gradient > 0) & ~damped[:, None], low, trial)
        new = evaluate(trial, live)
        finite = np.isfinite(new[2].sum(axis=(1, 2)))
        gained = value - new[0]
        better, done = (gained >= 0) & finite, full <= gain * value + rounding
        good = better & (gained > 0.25 * expected)
        if not better.all():  # within the rounding of the objective the last step need not go down
            last = ~better & (full <= tiny)
            done |= last
            better |= last & finite
        over = done | (~better & (damping > 1e8))
        if damped.any() or not good.all():
            less = np.where(damping < 1e-6, 0.0, damping * 0.1)
            keep = np.where(gained > 0.6 * expected, less, damping)
            damping = np.where(good, keep, np.maximum(damping * 8, 1e-6))
        if better.all():
            here, (value, gradient, hessian) = trial, new
        else:
            here = np.where(better[:, None], trial, here)
            value = np.where(better, new[0], value)
            gradient = np.where(better[:, None], new[1], gradient)
            hessian = np.where(better[:, None, None], new[2], hessian)
        if over.any():
            found.converged[live[done]] = True
            _store(found, live, here, value, gradient)
            stay = ~over
            live, here, damping = live[stay], here[stay], damping[stay]
            value, gradient, hessian = value[stay], gradient[stay], hessian[stay]
    _store(found, live, here, value, gradient)
    return found


def _store(found: Solved, rows: Any, theta: Array, value: Array, gradient: Array) -> None:
    found.theta[rows], found.objective[rows], found.gradient[rows] = theta, value, gradient
