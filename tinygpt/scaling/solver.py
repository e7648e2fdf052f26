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
    threshold = np.broadcast_to(threshold, (len(theta), 1))
    fitted, jacobian = points.derivatives(law, theta)
    residuals = fitted - points.response
    if points.weights is not None:
        residuals, jacobian = residuals * points.weights, jacobian * points.weights[:, None]
    slope = np.clip(residuals, -threshold, threshold)
    inside = (np.abs(residuals) <= threshold).astype(float)
    few = (inside if weights is None else inside * (weights > 0)).sum(axis=1) < theta.shape[1]
    # the curvature of too few says nothing; Huber's own weights still lead down
    inside[few] = np.minimum(1.0, threshold[few] / np.maximum(np.abs(residuals[few]), 1e-300))
    loss = huber(residuals, threshold)
    if weights is not None:
        slope, inside, loss = slope * weights, inside * weights, loss * weights
    value, gradient = loss.sum(axis=1), (slope[:, None] @ jacobian)[:, 0]
    hessian = np.swapaxes(jacobian * inside[..., None], 1, 2) @ jacobian
    if hold is not None:
        held, normal = hold.function(theta)
        pull = hold.stiffness * (held - hold.value)
        value = value + 0.5 * pull * (held - hold.value)
        gradient = gradient + pull[:, None] * normal
        hessian = hessian + hold.stiffness * normal[:, :, None] * normal[:, None]
    return value, gradient, hessian


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

    The threshold is one for all rows, or one for each, (B, 1).  It ends where a step would lower
    the sum by less than ``gain``, as a part of it.

    Levenberg and Marquardt's method within bounds.  It steps in the terms themselves, not in
    their logarithms: where a term and E can hardly be told apart the minimum lies in a valley that
    is straight in the terms and bent in their logarithms.  ``weights`` are (B, n).
    """
    rows = max(4, min(64, IN_CACHE // len(points)))
    limits = np.broadcast_to(threshold, (len(theta), 1))
    parts = []
    for chunk in np.array_split(np.arange(len(theta)), max(1, len(theta) // rows)):
        own = None if weights is None else weights[chunk]
        with np.errstate(all="ignore"):
            parts.append(
                _solve(law, points, theta[chunk], limits[chunk], own, hold, most_steps, gain)
            )
    names = vars(parts[0])
    return Solved(*(np.concatenate([vars(part)[name] for part in parts]) for name in names))


def _solve(
    law: Law,
    points: Points,
    theta: Array,
    threshold: Array,
    weights: Array | None,
    hold: Hold | None,
    most_steps: int,
    gain: float,
) -> Solved:
    def evaluate(theta: Array, rows: Any) -> tuple[Array, Array, Array]:
        own = None if weights is None else weights[rows]
        return objective(law, points, theta, threshold[rows], own, hold)

    theta = theta.copy()
    live = np.arange(len(theta))
    value, gradient, hessian = evaluate(theta, live)
    damping = np.zeros(len(theta))
    converged = np.zeros(len(theta), dtype=bool)
    low, high = bounds(law, points)
    terms, unit = term_mask(law), np.eye(len(law))
    # no sum of squares is known better
    rounding = len(points) * (ROUNDING * (points.response.max() if points.raw else 1.0)) ** 2
    for _ in range(most_steps):
        if not len(live):
            break
        here, slope, bend = theta[live], gradient[live], hessian[live]
        free = ~(((here <= low) & (slope > 0)) | ((here >= high) & (slope < 0)))
        slope = slope * free
        size = np.einsum("bpp->bp", bend)
        scale = np.where(free, np.sqrt(size + 1e-300), 1.0)  # to a Hessian with a diagonal of ones
        bend = bend * free[:, :, None] * free[:, None, :] / (scale[:, :, None] * scale[:, None, :])
        bend += (1e-13 + ~free)[..., None] * unit
        scaled = (slope / scale)[..., None]
        damped = damping[live] > 0
        step = -np.linalg.solve(bend + damping[live, None, None] * unit, scaled)
        expected = -0.5 * (scaled * step).sum(axis=(1, 2))
        full = expected.copy()  # what a step without damping would gain
        if damped.any():
            undamped = np.linalg.solve(bend[damped], scaled[damped])
            full[damped] = 0.5 * (scaled[damped] * undamped).sum(axis=(1, 2))
        step = step[..., 0] / scale
        step *= np.minimum(1.0, 2.0 / np.maximum(np.abs(step).max(axis=1, keepdims=True), 1e-300))
        step = np.where(terms, np.log1p(np.maximum(step, -0.9)), step)
        trial = np.clip(here + step, low, high)
        fading = terms & (trial < low + FADING) & (slope > 0) & ~damped[:, None]
        trial = np.where(fading, low, trial)
        new = evaluate(trial, live)
        better = (new[0] <= value[live]) & np.isfinite(new[2]).all(axis=(1, 2))
        gained = value[live] - new[0]
        # within the rounding of the objective the last step need not go down
        last = ~better & (full <= 1e-13 * value[live])
        done = last | (full <= gain * value[live] + rounding)
        better |= last & np.isfinite(new[2]).all(axis=(1, 2))
        stuck = ~better & (damping[live] > 1e8)
        taken = live[better]
        theta[taken] = trial[better]
        value[taken], gradient[taken], hessian[taken] = (part[better] for part in new)
        less = np.where(damping[live] < 1e-6, 0.0, damping[live] * 0.1)
        good = better & (gained > 0.25 * expected)
        keep = np.where(gained > 0.6 * expected, less, damping[live])
        damping[live] = np.where(good, keep, np.maximum(damping[live] * 8, 1e-6))
        converged[live[done]] = True
        live = live[~(done | stuck)]
    return Solved(theta, value, gradient, converged)
