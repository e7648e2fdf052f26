"""A global optimum and what certifies it.

A sum of powers is fitted by variable projection: on a grid of exponents the coefficients follow
in closed form, every local minimum of that surface is polished by a damped Newton method, and the
threshold of a robust estimator comes down step by step on the way.  Other laws are polished from
many starts instead.  All starts, and all refits of a bootstrap, go through one batched method.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import stats

from tinygpt.scaling.laws import Array, Law
from tinygpt.scaling.points import Points

NDBool = np.ndarray[Any, np.dtype[np.bool_]]
NDInt = np.ndarray[Any, np.dtype[np.intp]]

LEAST = np.log(1e-9)  # a coefficient below this part of the loss is zero
EXPONENTS = np.geomspace(0.015, 2.4, 34)
ROUNDING = 1e-15  # of a log loss
STEPS = 300
LEAST_FACTOR = 0.1  # by which a term falls in one step
FADING = 10.0  # in units of log: a term so near its floor that still falls is tried there
N_STARTS = 1024  # of a law that is no sum of powers; the best are polished
N_POLISHED = 32
# Where the starts of a law that is no sum of powers lie: exponents, logarithms of coefficients
# (of a term: relative to the least loss).
LIKELY = {
    "E": (-3.0, 0.0),
    "A": (-4.0, 1.0),
    "B": (-4.0, 1.0),
    "Nc": (-4.0, 1.0),
    "Dc": (-4.0, 1.0),
    "alpha": (0.03, 1.0),
    "beta": (0.03, 1.0),
    "gamma": (0.3, 2.0),
    "c": (-0.6, 0.9),
    "f": (-3.0, 1.0),
    "rn": (0.0, 4.0),
    "rd": (0.0, 4.0),
    "x1": (0.0, 1.0),
}


# --- the objective


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
    y = np.broadcast_to(points.y, (batch, len(points)))
    result = Polished(
        theta,
        np.empty(batch),
        np.empty((batch, size)),
        np.empty((batch, size, size)),
        np.zeros(batch, dtype=bool),
    )
    for chunk in np.array_split(np.arange(batch), max(1, batch // 64)):
        _polish_chunk(
            law,
            points.x,
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
        if name in ("E", "A", "B"):
            low[j] = points.y.min() + LEAST
        if name in law.bounds:
            ends = np.array(law.bounds[name])
            low[j], high[j] = np.log(ends) if name in law.coefficients else ends
        if name == "x1":
            low[j], high[j] = points.x["x"].min(), points.x["x"].max()  # elsewhere there is none
    return low, high


def _polish_chunk(
    law: Law,
    x: Mapping[str, Array],
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
    value, gradient, hessian = objective(law, x, y, theta, threshold, weights)
    damping = np.zeros(len(rows))
    live = np.arange(len(rows))
    terms = term_mask(law)
    rounding = y.shape[1] * ROUNDING**2  # no sum of squares is known better
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
                law, x, y[live], trial, threshold[live], None if weights is None else weights[live]
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
    x: Mapping[str, Array],
    y: Array,
    theta: Array,
    threshold: Array,
    weights: Array | None,
) -> tuple[Array, Array, Array]:
    """Value, gradient and Hessian, for each row of ``theta``."""
    found = law.derivatives(theta, x)
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


# --- starts


def grid_starts(law: Law, points: Points) -> Array:
    """The local minima of a sum of powers over a grid of its exponents, (B, P).

    At each node the coefficients that minimise the sum of squared relative errors, none of them
    negative, follow in closed form.
    """
    assert law.powers is not None
    loss = np.exp(points.y)
    columns, axes = [], []
    for powers in law.powers.values():
        if powers:
            ((variable, exponent),) = powers.items()
            columns.append(np.exp(-np.outer(EXPONENTS, points.x[variable])) / loss)
            axes.append(law.exponents.index(exponent))
        else:
            columns.append(1 / loss[None])
            axes.append(-1)
    shape = (len(EXPONENTS),) * len(law.exponents)
    kinds = len(columns)
    gram = np.empty((*shape, kinds, kinds))
    target = np.empty((*shape, kinds))
    for k, m in itertools.product(range(kinds), repeat=2):
        gram[..., k, m] = _on_mesh(columns[k], columns[m], axes[k], axes[m], len(shape))
    for k in range(kinds):
        target[..., k] = _on_mesh(columns[k], np.ones((1, len(points))), axes[k], -1, len(shape))
    best, coefficients = _non_negative(gram, target)
    nodes = np.argwhere(_local_minima(best))
    order = np.argsort(best[tuple(nodes.T)], kind="stable")[:8]
    starts = []
    for node in nodes[order]:
        found = np.maximum(coefficients[tuple(node)], 1e-6)
        starts.append(np.concatenate([np.log(found), EXPONENTS[node]]))
    return np.array(starts)


def _on_mesh(one: Array, other: Array, axis: int, other_axis: int, dimensions: int) -> Array:
    """Σ over the points of the products of two families of columns, on the mesh of exponents."""
    if axis == other_axis or axis < 0 or other_axis < 0:
        sums = np.einsum("gn,gn->g", *np.broadcast_arrays(one, other))
        shape = [1] * dimensions
        if max(axis, other_axis) >= 0:
            shape[max(axis, other_axis)] = len(sums)
        return np.asarray(sums.reshape(shape))
    products = one @ other.T
    return products if axis < other_axis else products.T


def _non_negative(gram: Array, target: Array) -> tuple[Array, Array]:
    """min over c >= 0 of cᵀGc - 2 tᵀc at every node, by trying each set of active terms."""
    kinds = target.shape[-1]
    best = np.full(target.shape[:-1], np.inf)
    coefficients = np.zeros(target.shape)
    for count in range(1, kinds + 1):
        for active in itertools.combinations(range(kinds), count):
            part = gram[..., active, :][..., active]
            part = part + 1e-13 * np.trace(part, axis1=-2, axis2=-1)[..., None, None] * np.eye(
                count
            )
            wanted = target[..., active]
            found = np.linalg.solve(part, wanted[..., None])[..., 0]
            value = -np.sum(found * wanted, axis=-1)
            take = (found >= 0).all(axis=-1) & (value < best)
            best[take] = value[take]
            filled = np.zeros(target.shape)
            filled[..., active] = found
            coefficients[take] = filled[take]
    return best, coefficients


def _local_minima(surface: Array) -> NDBool:
    from scipy.ndimage import minimum_filter

    return np.asarray(surface <= minimum_filter(surface, size=3, mode="nearest"))


def spread_starts(law: Law, points: Points, seed: int) -> Array:
    """Starts for any law: a Sobol sequence over what its parameters may reasonably be."""
    names = law.parameters
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # balance needs no power of two here
        unit = stats.qmc.Sobol(len(names), seed=seed).random(N_STARTS)
    ends = np.array([LIKELY[name] for name in names])
    starts = ends[:, 0] + unit * (ends[:, 1] - ends[:, 0])
    least = points.y.min()
    for j, name in enumerate(names):
        if name in ("E", "A", "B"):
            starts[:, j] += least
        if name in ("Nc", "Dc"):  # its power is what is about as large as the loss
            exponent = starts[:, names.index("alpha" if name == "Nc" else "beta")]
            starts[:, j] = (starts[:, j] + least) / exponent
        if name == "x1":
            starts[:, j] = np.quantile(points.x["x"], unit[:, j])
    starts = np.clip(starts, *bounds(law, points))
    with np.errstate(all="ignore"):
        found = np.sum((law.log_loss(starts, points.x) - points.y) ** 2, axis=1)
    best: Array = starts[np.argsort(np.where(np.isfinite(found), found, np.inf))[:N_POLISHED]]
    return best


def without_constant(law: Law, points: Points, starts: Array) -> Array:
    """The same starts with E at zero: a slope in E may lead away from a best that has none."""
    zero = starts[: N_POLISHED // 4].copy()
    j = law.parameters.index("E")
    zero[:, j] = bounds(law, points)[0][j]
    return zero


# --- the optimum


@dataclass(frozen=True)
class Optimum:
    """The best minimum found, and what certifies it."""

    law: Law  # without the terms that went to zero
    theta: Array  # (P,)
    threshold: float
    objective: float  # Σ huber(residual, threshold)
    gradient_norm: float
    smallest_eigenvalue: float  # of the Hessian, in the free parameters for centred variables
    converged: bool
    basins: tuple[float, ...]  # the objectives of the distinct minima, best first
    starts: int
    at_bound: tuple[str, ...]  # terms that went to zero, parameters at the end of their range


def find_optimum(law: Law, points: Points, threshold: float = np.inf, seed: int = 0) -> Optimum:
    """The least sum of Huber's losses of the log residuals.

    The threshold comes down from a sum of squares, a factor of √10 at a time: at each stage the
    minima of the last are the starts.
    """
    starts = grid_starts(law, points) if law.powers else spread_starts(law, points, seed)
    found = _distinct(polish(law, points, starts))
    if "E" in law.parameters and not (law.powers and found.converged[0]):
        both = np.vstack([found.theta, without_constant(law, points, found.theta)])
        found = _distinct(polish(law, points, both))
    if np.isfinite(threshold):
        residuals = law.log_loss(found.theta[:1], points.x)[0] - points.y
        for stage in stages(float(np.abs(residuals).max()), threshold):
            found = _distinct(polish(law, points, found.theta, stage))
    theta = found.theta[0]
    low, high = bounds(law, points)
    reach = np.where(term_mask(law), 0.5 * FADING, 0.0)  # a term so close to its floor is none
    at_end = (theta <= low + reach) | (theta >= high)
    gone = [name for name, end in zip(law.parameters, at_end, strict=True) if end]
    if gone and law.powers and len(law.powers) > 1:
        rest = find_optimum(law.without(gone[0]), points, threshold, seed)
        return replace(rest, at_bound=(gone[0], *rest.at_bound), starts=len(starts))
    free = ~at_end
    return Optimum(
        law,
        theta,
        threshold,
        float(found.objective[0]),
        float(np.linalg.norm(found.gradient[0, free])),
        float(np.linalg.eigvalsh(found.hessian[0][np.ix_(free, free)])[0]),
        bool(found.converged[0]),
        tuple(found.objective.tolist()),
        len(starts),
        tuple(gone),
    )


def stages(largest: float, threshold: float) -> Array:
    """Thresholds from the largest residual down, a factor of √10 at a time."""
    if not threshold < largest:
        return np.array([threshold])
    count = int(np.ceil(2 * np.log10(largest / threshold)))
    found: Array = threshold * 10.0 ** (np.arange(count - 1, -1, -1) / 2)
    return found


def _distinct(found: Polished) -> Polished:
    """Each minimum once, the best first."""
    order = np.lexsort((~found.converged, found.objective))
    best = found.objective[order[0]]
    kept: list[int] = []
    for i in order:
        if not np.isfinite(found.objective[i]) or (kept and not found.converged[i]):
            continue
        near = 1e-6 * abs(best) + 1e-300
        if all(
            abs(found.objective[i] - found.objective[k]) > near
            or np.abs(found.theta[i] - found.theta[k]).max() > 1e-3
            for k in kept
        ):
            kept.append(int(i))
    return Polished(
        found.theta[kept],
        found.objective[kept],
        found.gradient[kept],
        found.hessian[kept],
        found.converged[kept],
    )
