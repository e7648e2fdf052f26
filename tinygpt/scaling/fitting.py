"""One law through the points of a table: estimators by name, and the fit as an object."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from scipy import optimize, special

from tinygpt.checks import did_you_mean
from tinygpt.config import ConfigError
from tinygpt.scaling.laws import LAWS, Array, Law
from tinygpt.scaling.newton import bounds
from tinygpt.scaling.optimum import Optimum, find_optimum
from tinygpt.scaling.points import Points

ESTIMATORS = ("auto", "least_squares", "huber", "absolute", "likelihood")
OBJECTIVES = ("log", "raw")
UNITS = ("noise", "absolute")  # of Huber's threshold
# Which column is which variable, unless the caller says otherwise.
COLUMNS = {
    "N": "parameters_non_embedding",
    "D": "train_tokens",
    "U": "unique_train_tokens",
    "x": "parameters_non_embedding",
}
LOSS = "final_val_loss"
EFFICIENT = 1.345  # Huber's threshold in units of the noise: 95 % efficient under a normal
HUBER_DENSITY = 1e-3  # threshold of the likelihood in units of its scale
ABSOLUTE = 1e-7  # Huber's threshold in units of the noise, where he is as good as absolute
FEWEST_TO_JUDGE = 20  # residuals; the distribution of fewer cannot be judged


@dataclass(frozen=True)
class Fit:
    """A law with its estimates and all that says how they were found.

    ``parameters`` are those of the formula; losses are in the unit of the loss column, nats per
    token as a rule.
    """

    law: Law
    optimum: Optimum
    points: Points
    table: pd.DataFrame  # the rows that were fitted
    columns: dict[str, str]  # variable -> column
    loss: str  # column
    estimator: str
    reason: str  # why this estimator
    scale: float  # of the residuals: a standard deviation, by the estimator's own measure

    @cached_property
    def parameters(self) -> dict[str, float]:
        """By name; a term that went to zero has coefficient 0 and no exponent (nan)."""
        found = self.optimum.law.natural(self.optimum.theta, self.points.centres)
        missing = dict.fromkeys(self.law.coefficients, 0.0)
        missing |= {name: float("nan") for name in self.law.exponents}
        return {name: found.get(name, missing[name]) for name in self.law.parameters}

    @cached_property
    def residuals(self) -> Array:
        """Measured - fitted, (n,): log losses, or losses if ``objective`` was ``raw``."""
        return self.points.residuals(self.optimum.law, self.optimum.theta)

    @property
    def unit(self) -> str:
        """What the residuals are of."""
        return "L" if self.points.raw else "log L"

    def relative(self, spread: float, loss: Any = None) -> Any:
        """A spread of residuals as a part of ``loss``, by default of the mean of the runs."""
        if not self.points.raw:
            return spread
        return spread / (np.exp(self.points.y.mean()) if loss is None else loss)

    @property
    def bounds_met(self) -> dict[str, str]:
        """What is to be said of each parameter that lies at a bound, by its name."""
        found = self.optimum
        low = dict(zip(found.law.parameters, bounds(found.law, self.points)[0], strict=True))
        theta = dict(zip(found.law.parameters, found.theta, strict=True))
        met = {}
        for name in found.at_bound:
            least = name in theta and theta[name] <= low[name]
            if name not in theta or (name in ("E", "A", "B") and name not in self.law.bounds):
                met[name] = "went to zero, its natural bound: these data do not show that term"
            elif name == "x1":
                end = "smallest" if least else "largest"
                met[name] = f"is the {end} x of the runs, its natural bound: they show no break"
            elif least and self.law.bounds[name][0] == 0:
                met[name] = "is at its natural bound: below zero the loss would rise"
            else:
                end = f"{'lower' if least else 'upper'} bound"
                met[name] = f"is at its {end}: its value comes from the bound, not from the runs"
        values = {name: f"{name} = {self.parameters[name]:.4g}" for name in met}
        return {name: f"{values[name]} {words}" for name, words in met.items()}

    @property
    def degrees(self) -> int:
        """Of freedom: points less parameters."""
        return len(self.points) - len(self.optimum.law)

    @property
    def r_squared(self) -> float:
        """The share of the variance of log L, or of L, that the law explains."""
        y = self.points.response
        total = float(np.sum((y - y.mean()) ** 2))
        return 1.0 - float(np.sum(self.residuals**2)) / total

    def predict(self, **values: Any) -> Array:
        """The loss at new values of the law's variables, as ``N=..., D=...``."""
        x = self.points.at(values)
        found: Array = np.exp(self.optimum.law.log_loss(self.optimum.theta[None], x)[0])
        return found


def fit(
    table: pd.DataFrame,
    law: str | Law = "chinchilla",
    *,
    loss: str = LOSS,
    estimator: str = "auto",
    threshold: float | None = None,
    threshold_unit: str = "noise",
    objective: str = "log",
    seed: int = 0,
    **columns: str,
) -> Fit:
    """Fits ``law`` to a table, a row a run.

    ``columns`` say where the variables of the law stand, as ``N="params"``; ``loss`` names that
    of the loss.  ``estimator``: ``least_squares`` (of log L), ``huber`` (with ``threshold``, by
    default 1.345 times the noise; ``threshold_unit="absolute"`` for one in log L, as the 1e-3 of
    Hoffmann et al. 2022), ``absolute`` (least absolute deviations), ``likelihood`` (Huber's
    density with its scale as a parameter, ``threshold`` in units of it: Besiroglu et al. 2024),
    or ``auto``: least squares unless the residuals speak against it.  ``objective`` says whether
    residuals are those of log L (``log``) or of L (``raw``).  ``seed`` is that of the starts, where
    there are random ones.

    Raises ConfigError, one line, where the table cannot carry the law.
    """
    form = _named(law)
    if estimator not in ESTIMATORS:
        raise ConfigError(f"estimator={estimator}: must be one of {', '.join(ESTIMATORS)}")
    if threshold_unit not in UNITS:
        raise ConfigError(f"threshold_unit={threshold_unit}: must be one of {', '.join(UNITS)}")
    if objective not in OBJECTIVES:
        raise ConfigError(f"objective={objective}: must be one of {', '.join(OBJECTIVES)}")
    if threshold is not None and not threshold > 0:
        raise ConfigError(f"threshold={threshold:g}: must be above zero")
    where = {name: {**COLUMNS, **columns}[name] for name in _plain(form)}
    points = Points.read(table, form, where, loss, raw=objective == "raw")
    reason = "asked for"
    squares = find_optimum(form, points, seed=seed)
    if estimator == "auto":
        estimator, reason = judge(points.residuals(squares.law, squares.theta))
    optimum = squares
    if estimator == "huber":
        limit = EFFICIENT if threshold is None else threshold
        if threshold_unit == "noise":
            limit *= max(robust_scale(points, squares), 1e-12)
        optimum = find_optimum(form, points, limit, seed)
    elif estimator == "absolute":
        optimum = _absolute(form, points, squares, seed)
    elif estimator == "likelihood":
        optimum = _likelihood(form, points, squares, threshold or HUBER_DENSITY, seed)
    return Fit(
        form,
        optimum,
        points,
        table,
        where,
        loss,
        estimator,
        reason,
        residual_scale(points, optimum),
    )


def _named(law: str | Law) -> Law:
    if isinstance(law, Law):
        return law
    if law not in LAWS:
        nearest = did_you_mean(law, list(LAWS))
        raise ConfigError(f"law={law}: must be one of {', '.join(LAWS)}{nearest}")
    return LAWS[law]


def _plain(law: Law) -> list[str]:
    return [name.removeprefix("log ") for name in law.variables]


def judge(residuals: Array) -> tuple[str, str]:
    """The estimator that residuals of least squares ask for, and why."""
    n = len(residuals)
    if n < FEWEST_TO_JUDGE:
        return "least_squares", f"{n} residuals are too few to judge their distribution"
    if np.ptp(residuals) < 1e-9:
        return "least_squares", "the law goes through the points"
    from scipy import stats  # slow to import, and rarely needed

    excess = float(stats.kurtosis(residuals))
    p = float(stats.kurtosistest(residuals).pvalue)
    if excess > 0 and p < 0.01:
        return (
            "huber",
            f"the residuals have heavy tails (excess kurtosis {excess:.1f}, p = {p:.1g})",
        )
    return "least_squares", f"the residuals have no heavy tails (excess kurtosis {excess:.1f})"


def robust_scale(points: Points, optimum: Optimum) -> float:
    """From the median absolute residual, corrected for the fitted parameters."""
    residuals = np.abs(points.residuals(optimum.law, optimum.theta))
    degrees = max(1, len(points) - len(optimum.law))
    return float(np.median(residuals) / special.ndtri(0.75) * np.sqrt(len(points) / degrees))


def residual_scale(points: Points, optimum: Optimum) -> float:
    """The standard deviation that an M-estimator implies; of least squares the usual one.

    Where the threshold leaves hardly a residual inside, the estimator is the median's: its error
    is that of a mean times √(π/2).
    """
    residuals = points.residuals(optimum.law, optimum.theta)
    if np.sum(np.abs(residuals) <= optimum.threshold) < 2 * len(optimum.law):
        return robust_scale(points, optimum) * float(np.sqrt(np.pi / 2))
    slope = np.clip(residuals, -optimum.threshold, optimum.threshold)
    inside = max(np.mean(np.abs(residuals) <= optimum.threshold), 1 / len(points))
    degrees = max(1, len(points) - len(optimum.law))
    return float(np.sqrt(np.sum(slope**2) / degrees) / inside)


def _absolute(law: Law, points: Points, squares: Optimum, seed: int) -> Optimum:
    noise = max(robust_scale(points, squares), 1e-9)
    return find_optimum(law, points, ABSOLUTE * noise, seed)


def _likelihood(law: Law, points: Points, squares: Optimum, unit: float, seed: int) -> Optimum:
    """Alternates the law, given the scale, and the scale, given the law, until both stand."""
    optimum, threshold = squares, np.inf
    for _ in range(100):
        residuals = np.abs(points.residuals(optimum.law, optimum.theta))
        new = unit * _density_scale(residuals, unit)
        if np.isfinite(threshold) and abs(new / threshold - 1) < 1e-6:
            break
        threshold = new
        optimum = find_optimum(law, points, threshold, seed)
    return optimum


def _density_scale(sizes: Array, unit: float) -> float:
    """Where n·log σ + Σ huber(r/σ) is least."""

    def slope(log_scale: float) -> float:
        ratio = sizes / np.exp(log_scale)
        return float(np.sum(np.minimum(ratio, unit) * ratio) - len(sizes))

    middle = np.log(max(float(sizes.mean()), 1e-12))
    return float(np.exp(optimize.brentq(slope, middle + np.log(unit) - 30, middle + 30)))
