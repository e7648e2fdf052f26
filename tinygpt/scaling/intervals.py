"""How far an estimate may be trusted: delta method, profile likelihood, bootstrap.

Each gives an interval for a *target*: a parameter of the law (coefficients by their logarithm) or
the log loss at some place.  All of them stand on the residuals; none assumes a normal law beyond
the quantiles of Student's t.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from scipy import optimize, special

from tinygpt.config import ConfigError
from tinygpt.scaling.fitting import Fit
from tinygpt.scaling.laws import Array
from tinygpt.scaling.newton import (
    FADING,
    LEAST,
    LEAST_FACTOR,
    NDBool,
    bounds,
    huber,
    objective,
    polish,
    term_mask,
)

LEVEL = 0.95
REPLICAS = 1000  # where the bootstrap stands in
FAINT = np.log(1e-4)  # of a term that is zero: from where its profile is followed
FURTHEST = 30.0  # standard errors that a profile is followed


@dataclass(frozen=True)
class Interval:
    """``low`` to ``high`` at ``level``; an end that the data do not set is 0, -inf or inf."""

    estimate: float
    low: float
    high: float
    level: float
    method: str

    @property
    def identified(self) -> bool:
        """Whether the data set both ends."""
        return bool(np.isfinite(self.low) and np.isfinite(self.high) and self.low != 0.0)

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


@dataclass(frozen=True)
class Target:
    """A function of the parameters; ``is_log``: what is reported is its exponential."""

    derivatives: Callable[[Array], tuple[float, Array, Array]]  # (P,) -> value, (P,), (P, P)
    is_log: bool

    def report(self, value: float) -> float:
        return float(np.exp(value)) if self.is_log else float(value)


def of_parameter(fit: Fit, name: str) -> Target:
    """A parameter of the formula.  Raises ConfigError for a name that the law has not."""
    law = fit.optimum.law
    if name not in law.parameters:
        raise ConfigError(f"{name}: must be one of {', '.join(law.parameters)}")
    row = law.shift(fit.points.centres)[law.parameters.index(name)]
    flat = np.zeros((len(law), len(law)))
    return Target(
        lambda theta: (float(row[:-1] @ theta + row[-1]), row[:-1], flat),
        name in law.coefficients,
    )


def of_loss(fit: Fit, **values: float) -> Target:
    """The loss at one place, as ``N=..., D=...``."""
    law, x = fit.optimum.law, fit.points.at(values)
    one = np.ones((1, 1))

    def derivatives(theta: Array) -> tuple[float, Array, Array]:
        found = law.derivatives(theta[None], x)
        return float(found.value[0, 0]), found.gradient[0, 0], found.curvature(one)[0]

    return Target(derivatives, is_log=True)


# --- from the curvature at the optimum


def covariance(fit: Fit) -> Array:
    """Of the parameters for centred variables, (P, P): s² (JᵀJ)⁻¹.

    s is the scale of an M-estimator (Huber & Ronchetti 2009, section 7.6); of least squares it is
    the standard error of the residuals.  A parameter at its bound does not vary.
    """
    law = fit.optimum.law
    jacobian = fit.points.derivatives(law, fit.optimum.theta[None]).gradient[0]
    free = np.array([name not in fit.optimum.at_bound for name in law.parameters])
    found = np.zeros((len(law), len(law)))
    found[np.ix_(free, free)] = fit.scale**2 * np.linalg.pinv(
        jacobian[:, free].T @ jacobian[:, free]
    )
    return found


def delta(fit: Fit, target: Target, level: float = LEVEL, new_run: bool = False) -> Interval:
    """The delta method with a t quantile; ``new_run`` adds the scatter of a single run."""
    value, gradient, _ = target.derivatives(fit.optimum.theta)
    variance = float(gradient @ covariance(fit) @ gradient)
    variance += fit.relative(fit.scale, target.report(value)) ** 2 if new_run else 0.0
    reach = _quantile(fit, level) * float(np.sqrt(max(variance, 0.0)))
    low, high = target.report(value - reach), target.report(value + reach)
    return Interval(target.report(value), low, high, level, "delta")


def _quantile(fit: Fit, level: float) -> float:
    if fit.degrees < 1:
        raise ConfigError(
            f"{fit.law.name}: {len(fit.points)} points leave nothing to judge "
            f"{len(fit.optimum.law)} parameters by; no interval without more runs"
        )
    return float(special.stdtrit(fit.degrees, 0.5 + level / 2))


# --- profile likelihood


def profile(fit: Fit, target: Target, level: float = LEVEL) -> Interval:
    """All values for which the law, refitted with the target held there, is not refuted.

    The objective may rise by t² times what one residual is worth: exact for least squares of a
    linear model (Bates & Watts 1988, section 6.1).  Where it never rises so far, the target is
    not identified on that side.
    """
    theta = fit.optimum.theta
    value, gradient, _ = target.derivatives(theta)
    step = float(np.sqrt(gradient @ covariance(fit) @ gradient))
    allowed = fit.optimum.objective + _quantile(fit, level) ** 2 * _worth(fit)
    if step == 0.0 and (term_mask(fit.optimum.law) & (gradient != 0)).any():
        start = theta + (FAINT - LEAST) * (gradient != 0)  # a term that is zero can only grow
        high = _follow(fit, target, start, value + FAINT - LEAST, 1.0, allowed)
        return Interval(0.0, 0.0, target.report(high), level, "profile")
    if step == 0.0:  # at a bound: only the other end is the data's
        free = replace(fit, optimum=replace(fit.optimum, at_bound=()))
        held = (theta <= bounds(fit.optimum.law, fit.points)[0]) & (gradient != 0)
        inward = 1.0 if held.any() else -1.0
        step = inward * float(np.sqrt(gradient @ covariance(free) @ gradient))
        start = theta + 1e-6 * step * (gradient != 0)  # else it would be held at its bound
        ends = sorted([-inward * np.inf, _follow(fit, target, start, value, step, allowed)])
        low, high = map(target.report, ends)
        return Interval(target.report(value), low, high, level, "profile")
    low, high = (
        target.report(_follow(fit, target, theta, value, sign * step, allowed))
        for sign in (-1.0, 1.0)
    )
    return Interval(target.report(value), low, high, level, "profile")


def _worth(fit: Fit) -> float:
    """By how much the objective rises, on average, where a parameter is off by its error."""
    limit = fit.optimum.threshold
    slope = np.clip(fit.residuals, -limit, limit)
    inside = float(np.mean(np.abs(fit.residuals) <= limit))
    return 0.5 * float(np.sum(slope**2)) / fit.degrees / inside


def _follow(
    fit: Fit, target: Target, theta: Array, value: float, step: float, allowed: float
) -> float:
    """Where the profile, followed from ``theta``, reaches ``allowed``; ±inf if it does not."""
    at, move = 0.0, 0.5
    while at < FURTHEST:
        found = _held(fit, target, theta, value + (at + move) * step)
        if found is None:
            move /= 2
            if move < 1e-3:
                break
            continue
        if found[1] >= allowed:
            return _crossing(fit, target, theta, value + at * step, found[0], move * step, allowed)
        theta, at, move = found[0], at + move, min(2 * move, 2.0)
    return float(np.copysign(np.inf, step))


def _crossing(
    fit: Fit, target: Target, theta: Array, at: float, beyond: Array, step: float, allowed: float
) -> float:
    """Between ``at`` and ``at + step``: Brent's method on the profile."""

    def excess(share: float) -> float:
        start = theta + share * (beyond - theta)
        found = _held(fit, target, start, at + share * step)
        return (found[1] if found else _value(fit, start)) - allowed

    if excess(0.0) >= 0.0:
        return at
    share = optimize.brentq(excess, 0.0, 1.0, xtol=1e-4)
    return float(at + share * step)


def _value(fit: Fit, theta: Array) -> float:
    found = fit.points.residuals(fit.optimum.law, theta)
    return float(huber(found, fit.optimum.threshold).sum())


def _held(fit: Fit, target: Target, theta: Array, value: float) -> tuple[Array, float] | None:
    """The best parameters with the target held at ``value``, and their objective.

    Newton's method on the Lagrangian, in the terms as ``polish`` does it, with the absolute
    eigenvalues of the Hessian along the constraint, and shortened where it does not go down.
    None where it finds no such minimum.
    """
    law, points = fit.optimum.law, fit.points
    limit = np.array([fit.optimum.threshold])
    ends = bounds(law, points)
    terms = term_mask(law)

    def at(theta: Array) -> tuple[Array, Array, Array, float, Array, Array]:
        found = objective(law, points, points.response[None], theta[None], limit, None)
        return (*(part[0] for part in found), *target.derivatives(theta))

    here, multiplier, price, length = at(theta), 0.0, 0.0, 1.0
    for _ in range(100):
        _, gradient, hessian, now, normal, bend = here
        slope = gradient - multiplier * normal
        bent = hessian - multiplier * bend - np.diag(slope * terms)
        free = ~((theta <= ends[0]) & (slope > 0)) & ~((theta >= ends[1]) & (slope < 0))
        if not normal[free].any():
            return None
        move = np.zeros(len(theta))
        move[free], multiplier = _constrained(
            bent[np.ix_(free, free)], gradient[free], normal[free], value - now
        )
        longest = float(np.abs(move).max())
        if longest < 1e-9:
            return theta, float(here[0])
        price = max(price, 2 * abs(multiplier))  # of missing the target, as the line is searched
        length = min(1.0, 2.0 / longest)
        while True:
            trial = _moved(theta, length * move, normal, terms, ends)
            there = at(trial)
            merit = float(here[0]) + price * abs(value - now)
            if float(there[0]) + price * abs(value - there[3]) <= merit * (1 + 1e-12):
                break
            length *= 0.5
            if length * longest < 1e-9:
                return (theta, float(here[0])) if abs(value - now) < 1e-9 else None
        theta, here = trial, there
    return None


def _moved(
    theta: Array, move: Array, normal: Array, terms: NDBool, ends: tuple[Array, Array]
) -> Array:
    """Within the bounds; a term that all but vanishes does so if the target hardly has it."""
    move = np.where(terms, np.log1p(np.maximum(move, LEAST_FACTOR - 1)), move)
    fading = terms & (theta + move < ends[0] + FADING) & (move < 0) & (np.abs(normal) < 1e-3)
    found: Array = np.where(fading, ends[0], np.clip(theta + move, *ends))
    return found


def _constrained(
    hessian: Array, gradient: Array, normal: Array, missing: float
) -> tuple[Array, float]:
    """A step down that meets a linear constraint, and the multiplier there."""
    across = normal / (normal @ normal)
    along = np.linalg.qr(np.column_stack([normal, np.eye(len(normal))]))[0][:, 1:]
    move = across * missing
    values, vectors = np.linalg.eigh(along.T @ hessian @ along)
    size = np.maximum(np.abs(values), 1e-12 * np.abs(values).max(initial=1e-300))
    slope = vectors.T @ (along.T @ (gradient + hessian @ move))
    move = move - along @ (vectors @ (slope / size))
    return move, float(across @ (gradient + hessian @ move))


# --- bootstrap


@dataclass(frozen=True)
class Bootstrap:
    """The law fitted anew to resampled runs; the replicas are those that converged."""

    fit: Fit
    theta: Array  # (B, P)
    failed: int  # replicas that came to no minimum
    kind: str

    @property
    def method(self) -> str:
        """What it is, and how many replicas it could not use."""
        lost = f"; {self.failed} of {self.failed + len(self.theta)} refits failed"
        return f"bootstrap ({self.kind}{lost if self.failed else ''})"

    @cached_property
    def parameters(self) -> pd.DataFrame:
        """A row a replica, by the names of the formula."""
        law = self.fit.optimum.law
        affine = law.shift(self.fit.points.centres)
        plain = self.theta @ affine[:, :-1].T + affine[:, -1]
        plain[:, : len(law.coefficients)] = np.exp(plain[:, : len(law.coefficients)])
        return pd.DataFrame(plain, columns=list(law.parameters))

    def predict(self, **values: Any) -> Array:
        """The loss by every replica, (B, n)."""
        x = self.fit.points.at(values)
        return np.exp(self.fit.optimum.law.log_loss(self.theta, x))

    def interval(self, name: str, level: float = LEVEL) -> Interval:
        """Percentiles over the replicas."""
        return self._within(self.fit.parameters[name], self.parameters[name].to_numpy(), level)

    def of_loss(self, level: float = LEVEL, **place: float) -> Interval:
        """Percentiles of the loss at one place."""
        return self._within(float(self.fit.predict(**place)[0]), self.predict(**place)[:, 0], level)

    def _within(self, estimate: float, values: Array, level: float) -> Interval:
        low, high = np.quantile(values, [0.5 - level / 2, 0.5 + level / 2])
        return Interval(estimate, float(low), float(high), level, self.method)


def bootstrap(
    fit: Fit,
    n: int = 4000,
    kind: str = "pairs",
    cluster: str | None = None,
    seed: int = 0,
) -> Bootstrap:
    """Refits the law ``n`` times, starting from the optimum.

    ``pairs`` draws runs with replacement, or whole groups of rows that agree in the column
    ``cluster`` (rows that are checkpoints of one run are no independent points).  ``wild`` keeps
    every run and turns the signs of the residuals at random (Wu 1986, with leverages corrected
    as by HC3); rows of a cluster turn together.  Raises ConfigError for another ``kind`` and for a
    column that is not there.
    """
    if kind not in ("pairs", "wild"):
        raise ConfigError(f"bootstrap={kind}: must be pairs or wild")
    random = np.random.default_rng(seed)
    groups = _groups(fit, cluster)
    law, points = fit.optimum.law, fit.points
    start = np.repeat(fit.optimum.theta[None], n, axis=0)
    weights: Array | None
    count = int(groups.max()) + 1
    if kind == "pairs":
        drawn = random.multinomial(count, np.full(count, 1 / count), size=n)
        weights = drawn[:, groups].astype(float)
    else:
        signs = random.choice([-1.0, 1.0], size=(n, count))[:, groups]
        fitted = points.response - fit.residuals
        lost = fitted + signs * fit.residuals / np.maximum(1 - _leverages(fit), 1e-3)
        lost = np.log(np.maximum(lost, 1e-3 * fitted)) if points.raw else lost
        points, weights = points.with_losses(lost), None
    found = polish(law, points, start, fit.optimum.threshold, weights)
    good = found.converged & np.isfinite(found.theta).all(axis=1)
    return Bootstrap(fit, found.theta[good], int((~good).sum()), kind)


def _groups(fit: Fit, cluster: str | None) -> np.ndarray[Any, np.dtype[np.intp]]:
    if cluster is None:
        return np.arange(len(fit.points))
    if cluster not in fit.table:
        raise ConfigError(f"cluster={cluster}: no such column")
    return np.asarray(pd.factorize(fit.table[cluster])[0], dtype=np.intp)


def _leverages(fit: Fit) -> Array:
    jacobian = fit.points.derivatives(fit.optimum.law, fit.optimum.theta[None]).gradient[0]
    basis, _ = np.linalg.qr(jacobian)
    found: Array = np.sum(basis**2, axis=1)
    return found


# --- what is used unless a caller says otherwise


def intervals(
    fit: Fit, names: Sequence[str] = (), level: float = LEVEL, seed: int = 0
) -> dict[str, Interval]:
    """The default interval of each parameter: profile likelihood for least squares and Huber.

    Where the threshold is so low that hardly a residual lies within it the curvature says
    nothing, and the bootstrap over runs stands in.  An E of zero has an upper end.
    """
    whole = with_constant(fit)
    names = names or whole.optimum.law.parameters
    if _has_curvature(fit):
        return {name: profile(whole, of_parameter(whole, name), level) for name in names}
    replicas = bootstrap(fit, REPLICAS, seed=seed)
    return {name: replicas.interval(name, level) for name in names}


def predict_interval(
    fit: Fit, level: float = LEVEL, new_run: bool = False, **place: float
) -> Interval:
    """The default interval of the loss at one place, as ``N=..., D=...``: by the profile.

    ``new_run`` is for the loss that one more run would measure there: its scatter is added in
    square, on the logarithmic scale.
    """
    whole = with_constant(fit)
    if _has_curvature(fit):
        found = profile(whole, of_loss(whole, **place), level)
    else:
        found = bootstrap(fit, REPLICAS).of_loss(level, **place)
    if not new_run:
        return found
    scatter = _quantile(fit, level) * fit.relative(fit.scale, found.estimate)
    with np.errstate(divide="ignore"):
        below, above = np.log([found.estimate, found.high]) - np.log([found.low, found.estimate])
    low = found.estimate * float(np.exp(-np.hypot(below, scatter)))
    high = found.estimate * float(np.exp(np.hypot(above, scatter)))
    return replace(found, low=low, high=high)


def _has_curvature(fit: Fit) -> bool:
    return fit.estimator in ("least_squares", "huber")


def with_constant(fit: Fit) -> Fit:
    """The same fit with E in its law again, at its floor, where E went to zero.

    Intervals are those of the whole law: E may be more than zero within them.
    """
    gone = [name for name in fit.optimum.at_bound if name not in fit.optimum.law.parameters]
    if gone != ["E"]:
        return fit
    law = fit.law
    theta = dict(zip(fit.optimum.law.parameters, fit.optimum.theta.tolist(), strict=True))
    floor = bounds(law, fit.points)[0][law.parameters.index("E")]
    whole = np.array([theta.get(name, floor) for name in law.parameters])
    return replace(fit, optimum=replace(fit.optimum, law=law, theta=whole))
