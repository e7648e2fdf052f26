"""Leave out each run in turn: how far the prediction moves, and which runs are outliers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special

from tinygpt.scaling.evidence import SIGNIFICANT
from tinygpt.scaling.fitting import HUBER_DENSITY, Fit, find_optimum, residual_scale, robust_scale
from tinygpt.scaling.intervals import new_runs, of_loss, standard_error, with_constant
from tinygpt.scaling.laws import Array
from tinygpt.scaling.points import Points
from tinygpt.scaling.solver import solve

ROUNDING = 1e-9  # of a log loss: less is not scatter


@dataclass(frozen=True)
class SingleRun:
    """Compare a run with the law of all other runs, and with other seeds of its setting."""

    row: int  # of the fitted table
    without: float  # loss predicted by the law without it
    moved: float  # relative change of that prediction by the run
    p: float  # that a run lies so far off by chance (Bonferroni)
    moves: bool  # it moves the prediction by more than its standard error
    sets_law: bool  # it is an outlier and moves the prediction
    off: float  # measured / predicted without it - 1
    errors: float  # the same in standard errors
    off_siblings: float | None  # measured / mean of the other seeds of its setting - 1
    scatters: float | None  # the same in units of the scatter of the other seeds
    is_outlier: bool


def single_runs(
    fit: Fit, place: Mapping[str, float], replicas: NDArray[np.intp]
) -> list[SingleRun]:
    """Leave out each run in turn and sort by how far that moves the loss predicted at ``place``.

    A run is an outlier if its externally studentised residual, about the law or its sibling seeds,
    has a Bonferroni-corrected p-value below SIGNIFICANT (Cook & Weisberg 1982, section 2.2.2).
    Only the seed of a setting furthest from the law can be one: two seeds are equally far apart.

    An outlier sets the law if it moves the prediction by more than its standard error without the
    run (like DFFITS: Belsley, Kuh & Welsch 1980, section 2.1).  In simulated studies without an
    outlier that happens in one or two of a hundred.
    """
    n = len(fit.points)
    degrees = n - 1 - len(fit.law)
    if degrees < 1:
        return []
    now = float(np.log(fit.predict(**place)[0]))
    predicted, error, off, errors = _left_out(fit, place)
    apart, scatters, degrees_of_seeds = _beside_siblings(fit.points, replicas)
    known = np.isfinite(scatters)
    furthest = np.zeros(replicas.max() + 1)
    np.maximum.at(furthest, replicas, np.abs(errors))
    further = np.abs(errors) == furthest[replicas]
    p = 2 * n * special.stdtr(degrees, -np.abs(errors))
    if degrees_of_seeds > 0:
        beside = np.where(known, np.abs(scatters), 0.0)
        p = 2 * np.minimum(p, 2 * known.sum() * special.stdtr(degrees_of_seeds, -beside))
    p = np.where(further, np.minimum(p, 1.0), 1.0)
    outlier, moves = p < SIGNIFICANT, np.abs(now - predicted) > error
    none: Any = None
    columns: list[Any] = [np.exp(predicted), np.expm1(now - predicted), p, moves, outlier & moves]
    columns += [np.expm1(off), errors, np.where(known, np.expm1(apart), none)]
    columns += [np.where(known, scatters, none), outlier]
    rows = enumerate(zip(*(column.tolist() for column in columns), strict=True))
    found = [SingleRun(row, *values) for row, values in rows]
    return sorted(found, key=lambda one: (not one.sets_law, -abs(one.moved)))


def _left_out(fit: Fit, place: Mapping[str, float]) -> Array:
    """Return for the law without each run, (4, n): log loss at ``place``, its standard error, the
    residual of the run, and that in standard errors of a new run."""
    whole = _with_its_terms(fit)
    law, points, n = whole.optimum.law, fit.points, len(fit.points)
    limit = fit.optimum.threshold
    starts = [whole.optimum.theta]
    if "E" in law.parameters:  # one run may drive E to zero or to the lowest loss
        half = whole.optimum.theta.copy()
        half[law.parameters.index("E")] = points.y.min() + np.log(0.5)
        starts.append(half)
    ends = [solve(law, points, np.tile(one, (n, 1)), limit, 1.0 - np.eye(n)) for one in starts]
    best = np.argmin([end.objective for end in ends], axis=0)
    held = tuple(name for name in whole.optimum.at_bound if name in law.bounds)
    found = np.empty((4, n))
    for row in range(n):
        others = points.rows(np.arange(n) != row)
        theta = ends[best[row]].theta[row]
        optimum = replace(whole.optimum, theta=theta, threshold=limit, at_bound=held)
        less = replace(whole, points=others, optimum=optimum, scale=residual_scale(others, optimum))
        target = of_loss(less, **place)
        weight = 1.0 if points.weights is None else float(points.weights[row])
        here, error = new_runs(less, points.rows([row]).x, weight)
        off = float(points.y[row] - here[0])
        there = max(standard_error(less, target), ROUNDING)
        found[:, row] = target.at(theta)[0], there, off, off / max(error[0], ROUNDING)
    return found


def _with_its_terms(fit: Fit) -> Fit:
    """Return a robust fit where one run may have removed a term, as a start without that run."""
    if not fit.optimum.at_bound:
        return fit
    limit = HUBER_DENSITY * robust_scale(fit.points, fit.optimum)
    robust = find_optimum(fit.law, fit.points, limit)
    has_more = len(robust.law) > len(fit.optimum.law)
    return with_constant(replace(fit, optimum=robust) if has_more else fit)


def _beside_siblings(points: Points, replicas: NDArray[np.intp]) -> tuple[Array, Array, int]:
    """Return each run's distance from the mean of its siblings, (n,), the externally studentised
    residual, (n,), and its degrees of freedom; nan without siblings."""
    count = np.bincount(replicas)
    size = count[replicas].astype(float)
    means = np.bincount(replicas, points.y) / count
    apart = points.y - means[replicas]
    residual = apart if points.weights is None else apart * points.weights
    degrees = int(np.sum(count - 1)) - 1
    own = np.where(size > 1, size / np.maximum(size - 1, 1), np.nan)
    rest = np.sum(residual**2) - residual**2 * own
    scale = np.maximum(np.sqrt(np.maximum(rest, 0.0) / max(degrees, 1)), ROUNDING)
    scatters = residual * np.sqrt(own) / scale
    return apart * own, np.where(degrees > 0, scatters, np.nan), max(degrees, 0)
