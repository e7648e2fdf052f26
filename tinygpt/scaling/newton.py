"""The sum of Huber's losses of the residuals, and a batched method that makes it small.

All starts of a fit, and all refits of a bootstrap, go through ``polish`` together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from tinygpt.scaling.laws import Array, Law
from tinygpt.scaling.points import Points

NDBool = np.ndarray[Any, np.dtype[np.bool_]]
NDInt = np.ndarray[Any, np.dtype[np.intp]]

LEAST = np.log(1e-9)  # a coefficient below this part of the loss is zero
ROUNDING = 1e-15  # of a log loss
STEPS = 300
IN_CACHE = 8000  # points times rows of an expression that are evaluated at once
LEAST_FACTOR = 0.1  # by which a term falls in one step
FADING = 10.0  # in units of log: a term so near its floor that still falls is tried there


def huber(residuals: Array, threshold: Array | float) -> Array:
    """r²/2 up to the threshold, beyond it linear with the same slope.  Huber 1964."""
    size = np.abs(residuals)
    inside = np.minimum(size, threshold)
    # with an infinite threshold the second factor is zero everywhere
    found: Array = inside * (0.5 * inside + (size - inside))
    return found


@dataclass
class Polished:
    """Where the Newton method came to, for each of a batch of starts."""

    theta: Array  # (B, P)
    objective: Array  # (B,)
    gradient: Array  # (B, P)
    hessian: Array  # (B, P, P)
    converged: NDBool


def polish(
    law: Law,
    points: Points,
    theta: Array,
    threshold: Array | float = np.inf,
    weights: Array | None = None,
    most_steps: int = STEPS,
) -> Polished:
    """Minimises Σ weight · huber(residual) from every row of ``theta``, (B, P).

    Newton's method with the absolute eigenvalues of the Hessian, damped so that every step goes
    down.  It steps in the terms themselves, not in their logarithms: where a term and E can
    hardly be told apart the minimum lies in a valley that is straight in the terms and bent in
    their logarithms.  ``threshold`` is one number or one a row; ``weights`` are (B, n),
    ``points.y`` too if it differs by row.
    """
    theta = theta.copy()
    batch, size = theta.shape
    ends = bounds(law, points)
    threshold = np.broadcast_to(np.asarray(threshold, dtype=float), batch).copy()
    y = np.broadcast_to(points.response, (batch, len(points)))
    result = Polished(
        theta,
        np.empty(batch),
        np.empty((batch, size)),
        np.empty((batch, size, size)),
        np.zeros(batch, dtype=bool),
    )
    rows = 64 if law.powers else max(4, min(64, IN_CACHE // len(points)))
    for chunk in np.array_split(np.arange(batch), max(1, batch // rows)):
        _polish_chunk(
            law,
            points,
            y[chunk],
            threshold[chunk],
            None if weights is None else weights[chunk],
            ends,
            most_steps,
            chunk,
            result,
        )
    return result


def bounds(law: Law, points: Points) -> tuple[Array, Array]:
    """The least and the greatest each parameter can be, for centred variables."""
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


def _polish_chunk(
    law: Law,
    points: Points,
    y: Array,
    threshold: Array,
    weights: Array | None,
    ends: tuple[Array, Array],
    most_steps: int,
    rows: NDInt,
    result: Polished,
) -> None:
    """Fills ``rows`` of ``result``; those that have converged leave the batch."""
    theta = result.theta[rows]
    value, gradient, hessian = objective(law, points, y, theta, threshold, weights)
    damping = np.zeros(len(rows))
    live = np.arange(len(rows))
    terms = term_mask(law)
    unit = float(y.max()) if points.raw else 1.0
    rounding = y.shape[1] * (ROUNDING * unit) ** 2  # no sum of squares is known better
    for _ in range(most_steps):
        if not len(live):
            break
        bend = hessian[live] - gradient[live, :, None] * terms * np.eye(len(law))
        slope, bend = _inside(theta[live], gradient[live], bend, ends)
        eigenvalues, vectors = np.linalg.eigh(bend)
        size = np.abs(eigenvalues)
        largest = size.max(axis=1, keepdims=True) + 1e-300
        size = np.maximum(size, 1e-12 * largest + 1e-300)
        along = np.einsum("bqp,bq->bp", vectors, slope)
        moves = along / (size + damping[live, None] * largest)
        step = -np.einsum("bpq,bq->bp", vectors, moves)
        longest = np.abs(step).max(axis=1, keepdims=True)
        step *= np.minimum(1.0, 2.0 / np.maximum(longest, 1e-300))
        expected = 0.5 * np.sum(along * moves, axis=1)
        undamped = 0.5 * np.sum(along**2 / size, axis=1)  # what a full step would gain
        step = np.where(terms, np.log1p(np.maximum(step, LEAST_FACTOR - 1)), step)
        trial = np.clip(theta[live] + step, *ends)
        fading = terms & (trial < ends[0] + FADING) & (slope > 0) & (damping[live, None] == 0)
        trial = np.where(fading, ends[0], trial)
        with np.errstate(all="ignore"):
            new = objective(
                law,
                points,
                y[live],
                trial,
                threshold[live],
                None if weights is None else weights[live],
            )
        better = (new[0] <= value[live]) & np.isfinite(new[2]).all(axis=(1, 2))
        gained = value[live] - new[0]
        # within the rounding of the objective a step need not go down
        done = (undamped <= 1e-18 * value[live] + rounding) | (
            ~better & (undamped <= 1e-13 * value[live])
        )
        stuck = ~better & (damping[live] > 1e8)
        taken = live[better]
        theta[taken] = trial[better]
        value[taken], gradient[taken], hessian[taken] = (part[better] for part in new)
        weakest = np.maximum(size.min(axis=1) / largest[:, 0], 1e-8)
        damping[live] = _damped(damping[live], weakest, better, gained / (expected + 1e-300))
        result.converged[rows[live[done]]] = True
        live = live[~(done | stuck)]
    result.theta[rows], result.objective[rows] = theta, value
    result.gradient[rows], result.hessian[rows] = gradient, hessian


def term_mask(law: Law) -> NDBool:
    """Which parameters are logarithms of terms, which the loss is linear in."""
    return np.array([name in (law.powers or ("E",)) for name in law.parameters])


def _damped(damping: Array, weakest: Array, better: NDBool, ratio: Array) -> Array:
    """The next damping, after steps that gained ``ratio`` of what was expected.

    It is relative to the largest eigenvalue and begins at the smallest: less would change no
    step, more would stop all movement along a curved valley.
    """
    less = np.where(damping < 0.1 * weakest, 0.0, damping * 0.1)
    more = np.maximum(damping * 8, weakest)
    return np.where(better & (ratio > 0.25), np.where(ratio > 0.6, less, damping), more)


def _inside(
    theta: Array, gradient: Array, hessian: Array, ends: tuple[Array, Array]
) -> tuple[Array, Array]:
    """Without the parameters that are at a bound and would go beyond it."""
    held = ((theta <= ends[0]) & (gradient > 0)) | ((theta >= ends[1]) & (gradient < 0))
    if not held.any():
        return gradient, hessian
    free = ~held
    bend = hessian * (free[:, :, None] & free[:, None, :])
    trace = np.trace(bend, axis1=1, axis2=2)[:, None, None]
    return gradient * free, bend + held[:, :, None] * np.eye(theta.shape[1]) * trace


def objective(
    law: Law,
    points: Points,
    y: Array,
    theta: Array,
    threshold: Array,
    weights: Array | None,
) -> tuple[Array, Array, Array]:
    """Value, gradient and Hessian, for each row of ``theta``; ``y`` as ``points.response``."""
    found = points.derivatives(law, theta)
    residuals = found.value - y
    limit = threshold[:, None]
    slope = np.clip(residuals, -limit, limit)
    inside = (np.abs(residuals) <= limit).astype(float)
    counted = inside if weights is None else inside * (weights > 0)
    few = counted.sum(axis=1) < theta.shape[1]
    if few.any():  # the curvature of too few says nothing; Huber's own weights still lead down
        size = np.maximum(np.abs(residuals[few]), 1e-300)
        inside[few] = np.minimum(1.0, limit[few] / size)
    loss = huber(residuals, limit)
    if weights is not None:
        slope, inside, loss = slope * weights, inside * weights, loss * weights
    jacobian = found.gradient
    gradient = np.einsum("bn,bnp->bp", slope, jacobian)
    hessian = np.swapaxes(jacobian * inside[..., None], 1, 2) @ jacobian + found.curvature(slope)
    return loss.sum(axis=1), gradient, hessian
