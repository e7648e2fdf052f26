"""A global optimum and what certifies it.

A sum of powers is fitted by variable projection: on a grid of exponents the coefficients follow
in closed form, every local minimum of that surface is polished by a damped Newton method, and the
threshold of a robust estimator comes down step by step on the way.  Other laws are polished from
many starts instead.  All starts, and all refits of a bootstrap, go through one batched method.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from tinygpt.scaling.laws import Array, Law
from tinygpt.scaling.newton import FADING, Polished, bounds, polish, term_mask
from tinygpt.scaling.points import Points
from tinygpt.scaling.starts import grid_starts, spread_starts, without_constant


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
    """The least sum of Huber's losses of the residuals.

    The threshold comes down from a sum of squares, a factor of √10 at a time: at each stage the
    minima of the last are the starts.
    """
    grid = law.powers and max(map(len, law.powers.values())) == 1 and len(law.exponents) <= 3
    starts = grid_starts(law, points) if grid else spread_starts(law, points, seed)
    found = _distinct(polish(law, points, starts))
    if "E" in law.parameters and not (law.powers and found.converged[0]):
        both = np.vstack([found.theta, without_constant(law, points, found.theta)])
        found = _distinct(polish(law, points, both))
    if np.isfinite(threshold):
        residuals = points.residuals(law, found.theta[0])
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
