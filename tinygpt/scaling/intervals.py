"""Compute intervals by the delta method, profile likelihood and bootstrap.

Each interval is for a *target*: a parameter of the law (coefficients as logarithms) or the log
loss at some place.  All derive from the residuals, and assume normal noise only in Student's t.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from scipy import special

from tinygpt.config import ConfigError
from tinygpt.scaling.fitting import Fit
from tinygpt.scaling.laws import Array
from tinygpt.scaling.solver import LEAST, Hold, bounds, huber, solve, term_mask

LEVEL = 0.95
REPLICAS = 1000  # where the bootstrap replaces the profile
FAINT = float(np.log(1e-4))  # where the profile of a term at zero starts
FURTHEST = 30.0  # standard errors that a profile is followed for
STIFFNESS = 1e6  # of a held target, in units of the curvature of its profile


@dataclass(frozen=True)
class Interval:
    """Hold an interval; an end that the data do not determine is 0, -inf or inf."""

    estimate: float
    low: float
    high: float
    level: float
    method: str

    @property
    def identified(self) -> bool:
        """Return whether the data determine both ends."""
        return bool(np.isfinite(self.low) and np.isfinite(self.high) and self.low != 0.0)

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


@dataclass(frozen=True)
class Target:
    """Hold a function of the parameters; ``is_log`` means that its exponential is reported."""

    function: Callable[[Array], tuple[Array, Array]]  # (B, P) -> values (B,), gradients (B, P)
    is_log: bool

    def at(self, theta: Array) -> tuple[float, Array]:
        """Return the value and its gradient, (P,), at one vector of parameters."""
        value, gradient = self.function(theta[None])
        return float(value[0]), gradient[0]

    def report(self, value: float) -> float:
        return float(np.exp(value)) if self.is_log else float(value)


def of_parameter(fit: Fit, name: str) -> Target:
    """Return a parameter of the formula as a target.  Raises ConfigError if the law lacks it."""
    law = fit.optimum.law
    if name not in law.parameters:
        raise ConfigError(f"{name}: must be one of {', '.join(law.parameters)}")
    row = law.shift(fit.points.centres)[law.parameters.index(name)]
    return Target(
        lambda theta: (theta @ row[:-1] + row[-1], np.broadcast_to(row[:-1], theta.shape)),
        name in law.coefficients,
    )


def of_loss(fit: Fit, **values: float) -> Target:
    """Return the loss at one place, as ``N=..., D=...``, as a target."""
    law, x = fit.optimum.law, fit.at(values)

    def function(theta: Array) -> tuple[Array, Array]:
        value, gradient = law.derivatives(theta, x)
        return value[:, 0], gradient[:, 0]

    return Target(function, is_log=True)


# --- from the curvature at the optimum


def covariance(fit: Fit) -> Array:
    """Return the covariance of the parameters for centred variables, (P, P): s² (JᵀJ)⁻¹.

    s is the scale of the M-estimator (Huber & Ronchetti 2009, section 7.6), which for least squares
    is the standard error of the residuals.  A parameter at its bound has no variance.
    """
    law = fit.optimum.law
    free = [j for j, name in enumerate(law.parameters) if name not in fit.optimum.at_bound]
    jacobian = fit.points.jacobian(law, fit.optimum.theta)[:, free]
    found = np.zeros((len(law), len(law)))
    found[np.ix_(free, free)] = fit.scale**2 * np.linalg.pinv(jacobian.T @ jacobian)
    return found


def standard_error(fit: Fit, target: Target) -> float:
    """Return the standard error of the target by the delta method."""
    _, gradient = target.at(fit.optimum.theta)
    return float(np.sqrt(max(float(gradient @ covariance(fit) @ gradient), 0.0)))


def delta(fit: Fit, target: Target, level: float = LEVEL, new_run: bool = False) -> Interval:
    """Return the interval of the delta method; ``new_run`` adds the scatter of a single run."""
    value, _ = target.at(fit.optimum.theta)
    scatter = fit.relative(fit.scale, target.report(value)) if new_run else 0.0
    reach = quantile_of(fit, level) * float(np.hypot(standard_error(fit, target), scatter))
    low, high = target.report(value - reach), target.report(value + reach)
    return Interval(target.report(value), low, high, level, "delta")


def new_runs(fit: Fit, x: Mapping[str, Array], weights: Array | float = 1.0) -> tuple[Array, Array]:
    """Return the log loss at centred log variables, (n,), and the standard error of a new run there
    that has these weights in the fit, (n,)."""
    value, gradient = fit.optimum.law.derivatives(fit.optimum.theta[None], x)
    variance = np.einsum("np,pq,nq->n", gradient[0], covariance(fit), gradient[0])
    scatter = fit.relative(fit.scale, np.exp(value[0])) / weights
    return value[0], np.sqrt(variance + scatter**2)


def quantile_of(fit: Fit, level: float = LEVEL) -> float:
    """Return Student's quantile of a two-sided interval.

    Raises ConfigError without degrees of freedom.
    """
    if fit.degrees < 1:
        raise ConfigError(
            f"{fit.law.name}: {len(fit.points)} points leave nothing to judge "
            f"{len(fit.optimum.law)} parameters by; no interval without more runs"
        )
    return float(special.stdtrit(fit.degrees, 0.5 + level / 2))


# --- profile likelihood


def profile(fit: Fit, target: Target, level: float = LEVEL) -> Interval:
    """Return the values at which the target can be held without the refitted law being rejected.

    The objective may rise by t² times the variance of a residual, which is exact for a linear model
    (Bates & Watts 1988, section 6.1).  The target has no end on a side where the objective never
    rises so far.
    """
    theta, quantile = fit.optimum.theta, quantile_of(fit, level)
    value, gradient = target.at(theta)
    step = standard_error(fit, target)
    estimate, low, high = value, -np.inf, np.inf
    if step > 0.0:
        low, high = (_follow(fit, target, theta, sign * step, quantile) for sign in (-1.0, 1.0))
    elif (term_mask(fit.optimum.law) & (gradient != 0)).any():  # a term at zero can only grow
        start = theta + (FAINT - LEAST) * (gradient != 0)
        estimate, high = -np.inf, _follow(fit, target, start, 1.0, quantile)
    else:  # at a bound, so that the data determine the other end only
        step = standard_error(replace(fit, optimum=replace(fit.optimum, at_bound=())), target)
        if ((theta <= bounds(fit.optimum.law, fit.points)[0]) & (gradient != 0)).any():
            high = _follow(fit, target, theta, step, quantile)
        else:
            low = _follow(fit, target, theta, -step, quantile)
    low, high = target.report(low), target.report(high)
    return Interval(target.report(estimate), low, high, level, "profile")


def _follow(fit: Fit, target: Target, theta: Array, step: float, quantile: float) -> float:
    """Follow the profile from ``theta`` to where it has risen enough; return ±inf if it does not.

    ``step`` is one standard error in the direction to go.  The square root of the rise is nearly
    linear in the target, so Newton's method converges fast; its slope follows from the force that
    holds the target.
    """
    law, points, limit = fit.optimum.law, fit.points, fit.optimum.threshold
    slope, inside = np.clip(fit.weighted, -limit, limit), np.abs(fit.weighted) <= limit
    # the mean rise of the objective where a parameter is off by its standard error
    worth = 0.5 * float(np.sum(slope**2)) / fit.degrees / float(inside.mean())
    start, _ = target.at(theta)
    # target values: the furthest with too little rise, and one with too much
    near: float = start
    far: float | None = None
    wanted, stiffness = start + quantile * step, STIFFNESS * 2 * worth / step**2
    for _ in range(60):
        hold = Hold(target.function, wanted, stiffness)
        held = solve(law, points, theta[None], limit, hold=hold).theta[0]
        there, _ = target.at(held)
        rise = float(huber(points.residuals(law, held), limit).sum()) - fit.optimum.objective
        root = float(np.sqrt(max(rise, 0.0) / worth))
        off = root - quantile
        if abs(off) < 1e-7 * quantile or (far is not None and abs(far - near) < 1e-7 * abs(step)):
            return there
        if off > 0:
            far = there
        elif (there - near) * step <= 0 or abs(there - start) > FURTHEST * abs(step):
            return wanted if far is not None else float(np.copysign(np.inf, step))
        else:
            near = there
        theta = held if root < 2 * quantile else theta
        force = stiffness * (wanted - there)
        ahead = -off * 2 * root * worth / force if force * step > 0 else 0.0
        if far == near:  # the step is below the rounding of the target
            return near
        if far is None:  # aim beyond the end, to bracket it
            wanted = near + float(np.clip(ahead / (near - start), 0.02, 1.5)) * (near - start)
        else:
            part = (there + ahead - near) / (far - near)
            wanted = near + (part if 0.0 < part < 1.0 else 0.5) * (far - near)
    return near


# --- bootstrap


@dataclass(frozen=True)
class Bootstrap:
    """Hold the refits of a law to resampled runs that converged."""

    fit: Fit
    theta: Array  # (B, P)
    failed: int  # refits that did not converge

    @property
    def method(self) -> str:
        """Return the name of the method and how many refits failed."""
        lost = f"; {self.failed} of {self.failed + len(self.theta)} refits failed"
        return f"bootstrap (pairs{lost if self.failed else ''})"

    @cached_property
    def parameters(self) -> pd.DataFrame:
        """Return a table with a row per replica and a column per parameter of the formula."""
        law = self.fit.optimum.law
        plain = law.plain(self.theta, self.fit.points.centres)
        return pd.DataFrame(plain, columns=list(law.parameters))

    def predict(self, **values: Any) -> Array:
        """Return the loss that each replica predicts, (B, n)."""
        return np.exp(self.fit.optimum.law.log_loss(self.theta, self.fit.at(values)))

    def interval(self, name: str, level: float = LEVEL) -> Interval:
        """Return the percentile interval of a parameter."""
        return self._within(self.fit.parameters[name], self.parameters[name].to_numpy(), level)

    def of_loss(self, level: float = LEVEL, **place: float) -> Interval:
        """Return the percentile interval of the loss at one place."""
        return self._within(float(self.fit.predict(**place)[0]), self.predict(**place)[:, 0], level)

    def _within(self, estimate: float, values: Array, level: float) -> Interval:
        if not len(values):
            return Interval(estimate, np.nan, np.nan, level, "none")
        low, high = np.quantile(values, [0.5 - level / 2, 0.5 + level / 2])
        return Interval(estimate, float(low), float(high), level, self.method)


def bootstrap(fit: Fit, n: int = 4000, cluster: str | None = None, seed: int = 0) -> Bootstrap:
    """Refit the law ``n`` times to runs drawn with replacement, starting from the optimum.

    ``cluster`` names a column whose groups of rows are drawn whole, because checkpoints of one run
    are not independent; a single group gives no replicas.  Raises ConfigError for a missing
    column.
    """
    if cluster is not None and cluster not in fit.table:
        raise ConfigError(f"cluster={cluster}: no such column")
    groups = pd.factorize(fit.table[cluster])[0] if cluster else np.arange(len(fit.points))
    count = int(groups.max()) + 1
    if count < 2:
        return Bootstrap(fit, fit.optimum.theta[None][:0], 0)
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=n)
    start = np.repeat(fit.optimum.theta[None], n, axis=0)
    weights = drawn[:, groups].astype(float)
    found = solve(fit.optimum.law, fit.points, start, fit.optimum.threshold, weights)
    good = found.converged & np.isfinite(found.theta).all(axis=1)
    return Bootstrap(fit, found.theta[good], int((~good).sum()))


# --- defaults


def intervals(
    fit: Fit, names: Sequence[str] = (), level: float = LEVEL, seed: int = 0
) -> dict[str, Interval]:
    """Return the interval of each parameter: a profile for least squares and Huber.

    For ``likelihood`` it is a bootstrap over runs, because hardly any residual lies inside the
    threshold and the curvature means nothing.  An E of zero has an upper end.
    """
    whole = with_constant(fit)
    names = names or whole.optimum.law.parameters
    if fit.estimator != "likelihood":
        return {name: profile(whole, of_parameter(whole, name), level) for name in names}
    replicas = bootstrap(fit, REPLICAS, seed=seed)
    return {name: replicas.interval(name, level) for name in names}


Fit.intervals = intervals


def predict_interval(
    fit: Fit, level: float = LEVEL, new_run: bool = False, **place: float
) -> Interval:
    """Return the interval of the loss at one place, as ``N=..., D=...``, as ``intervals`` does.

    ``new_run`` adds the scatter of one more run there, in quadrature on the log scale.
    """
    whole = with_constant(fit)
    if fit.estimator != "likelihood":
        found = profile(whole, of_loss(whole, **place), level)
    else:
        found = bootstrap(fit, REPLICAS).of_loss(level, **place)
    if not new_run:
        return found
    scatter = quantile_of(fit, level) * fit.relative(fit.scale, found.estimate)
    with np.errstate(divide="ignore"):
        below, above = np.log([found.estimate, found.high]) - np.log([found.low, found.estimate])
    low = found.estimate * float(np.exp(-np.hypot(below, scatter)))
    high = found.estimate * float(np.exp(np.hypot(above, scatter)))
    return replace(found, low=low, high=high)


def with_constant(fit: Fit) -> Fit:
    """Return a fit whose E went to zero with E restored at its floor, and other fits unchanged.

    Intervals are those of the whole law, in which E may be above zero.
    """
    gone = [name for name in fit.optimum.at_bound if name not in fit.optimum.law.parameters]
    if gone != ["E"]:
        return fit
    place = fit.law.parameters.index("E")
    whole = np.insert(fit.optimum.theta, place, bounds(fit.law, fit.points)[0][place])
    return replace(fit, optimum=replace(fit.optimum, law=fit.law, theta=whole))
