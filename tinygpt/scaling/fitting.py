"""Fit one law to a table: find the best minimum, choose the estimator, and hold the result."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import pandas as pd
from scipy import optimize, special

from tinygpt.config import REMOVED, ConfigError
from tinygpt.config.checks import did_you_mean
from tinygpt.scaling.laws import LAWS, Array, Law, check
from tinygpt.scaling.points import Points
from tinygpt.scaling.solver import FADING, Solved, bounds, objective, solve, starts_of, term_mask
from tinygpt.scaling.wording import Interval, count, equation, estimate, percent, reach

ESTIMATORS = ("auto", "least_squares", "huber", "likelihood")
OBJECTIVES = ("log", "raw")
# The column of each variable, unless the caller names another.
COLUMNS = {
    "N": "parameters_non_embedding",
    "D": "train_tokens",
    "U": "unique_train_tokens",
    "T": "max_seq_len",
    "C": "flops_exact",
    "x": "parameters_non_embedding",
}
LOSS = "final_val_loss"
EFFICIENT = 1.345  # Huber's threshold in units of the noise: 95 % efficient under a normal
HUBER_DENSITY = 1e-3  # threshold of the likelihood in units of its scale
FEWEST_TO_JUDGE = 20  # residuals; the distribution of fewer cannot be judged
N_FINISHED = 8  # starts that are solved to the end: the best after a rough search
ROUGH: dict[str, Any] = {"most_steps": 50, "gain": 1e-6}

# --- the best minimum


@dataclass(frozen=True)
class Optimum:
    """Hold the best minimum found, and the evidence that it is one."""

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
    """Minimise the sum of Huber's losses of the residuals.

    The threshold falls from the largest residual by factors of √10; each stage starts from the
    minima of the one before.
    """
    starts = starts_of(law, points, seed)
    if len(starts) > N_FINISHED:
        rough = solve(law, points, starts, **ROUGH)
        starts = rough.theta[np.argsort(rough.objective, kind="stable")[:N_FINISHED]]
    found = _distinct(solve(law, points, starts))
    low, high = bounds(law, points)
    if "E" in law.parameters and not (law.powers and found.converged[0]):
        zero = found.theta.copy()  # a slope in E may lead away from E = 0
        zero[:, law.parameters.index("E")] = low[law.parameters.index("E")]
        found = _distinct(solve(law, points, np.vstack([found.theta, zero])))
    if np.isfinite(threshold):
        largest = float(np.abs(points.residuals(law, found.theta[0])).max())
        count = max(1, int(np.ceil(2 * np.log10(max(largest, 1e-300) / threshold))))
        for stage in threshold * 10.0 ** (np.arange(count - 1, -1, -1) / 2):
            found = _distinct(solve(law, points, found.theta, stage))
    theta = found.theta[0]
    reach = np.where(term_mask(law), 0.5 * FADING, 0.0)  # a term this close to its floor is gone
    free = ~((theta <= low + reach) | (theta >= high))
    gone = [name for name, stays in zip(law.parameters, free, strict=True) if not stays]
    if gone and law.powers and len(law.powers) > 1:
        rest = find_optimum(law.without(gone[0]), points, threshold, seed)
        return replace(rest, at_bound=(gone[0], *rest.at_bound), starts=len(starts))
    steps = 1e-5 * np.eye(len(law))[free]
    with np.errstate(all="ignore"):
        up, down = (objective(law, points, theta + by, threshold)[1] for by in (steps, -steps))
    hessian = ((up - down) / 2e-5)[:, free]
    return Optimum(
        law,
        theta,
        threshold,
        float(found.objective[0]),
        float(np.linalg.norm(found.gradient[0, free])),
        float(np.linalg.eigvalsh((hessian + hessian.T) / 2)[0]),
        bool(found.converged[0]),
        tuple(found.objective.tolist()),
        len(starts),
        tuple(gone),
    )


def _distinct(found: Solved) -> Solved:
    """Return each minimum once, the best first."""
    order = np.lexsort((~found.converged, found.objective))
    near = 1e-6 * abs(found.objective[order[0]]) + 1e-300
    kept: list[int] = []
    for i in order:
        if not np.isfinite(found.objective[i]) or (kept and not found.converged[i]):
            continue
        if all(
            abs(found.objective[i] - found.objective[k]) > near
            or np.abs(found.theta[i] - found.theta[k]).max() > 1e-3
            for k in kept
        ):
            kept.append(int(i))
    return found[kept]


# --- a fit


@dataclass(frozen=True, repr=False)
class Fit:
    """Hold a fitted law and how it was fitted; ``print`` shows it in one line.

    ``parameters`` are those of the formula; losses are in the unit of the loss column, usually
    nats per token.
    """

    law: Law
    optimum: Optimum
    points: Points
    table: pd.DataFrame  # the rows that were fitted
    columns: dict[str, str]  # variable -> column
    loss: str  # column
    estimator: str
    reason: str  # why this estimator
    scale: float  # standard deviation of the residuals, as the estimator measures it
    # set by intervals.py, which imports this module
    intervals: ClassVar[Callable[[Fit], Mapping[str, Interval]]]

    def __repr__(self) -> str:
        """Return the equation and the interval of each exponent."""
        text = re.sub(r"\bx\b", self.letter, equation(self.optimum.law, self.parameters))
        known = [f"{n} {reach(self._known[n])}" for n in self.law.exponents if n in self._known]
        known += ["no intervals: as many parameters as runs"] if self.degrees < 1 else []
        where = [f"x: {self.columns['x']}"] if self.letter in self.columns else []
        return ", ".join([text, *known, *where])

    def _repr_html_(self) -> str:
        rows = [
            [name, estimate(value, self._known.get(name)), reach(self._known.get(name))]
            for name, value in self.parameters.items()
        ]
        table = pd.DataFrame(rows, columns=["", "estimate", "95 % interval"])
        about = (
            f"{count(len(self.points), 'run')}, {self.estimator.replace('_', ' ')}; "
            f"a run scatters by {percent(self.relative(self.scale))} about the law"
        )
        return f"<p>{html.escape(str(self))}</p>{table.to_html(index=False)}<p>{about}</p>"

    @cached_property
    def _known(self) -> Mapping[str, Interval]:
        return self.intervals() if self.degrees > 0 else {}

    @property
    def letter(self) -> str:
        """Return the letter of the variable that x stands for, or x if it has none."""
        column = self.columns.get("x")
        return next((letter for letter, usual in COLUMNS.items() if usual == column), "x")

    @cached_property
    def parameters(self) -> dict[str, float]:
        """Return the estimates by name; a term at zero has coefficient 0 and exponent nan."""
        zero = dict.fromkeys(self.law.coefficients, 0.0)
        none = dict.fromkeys(self.law.exponents, float("nan"))
        return {**zero, **none, **self.optimum.law.natural(self.optimum.theta, self.points.centres)}

    @cached_property
    def residuals(self) -> Array:
        """Return measured - fitted, (n,), in log loss, or in loss if ``objective`` was ``raw``."""
        plain = replace(self.points, weights=None)
        return plain.residuals(self.optimum.law, self.optimum.theta)

    @cached_property
    def weighted(self) -> Array:
        """Return the residuals times the weights of the runs, (n,)."""
        return self.points.residuals(self.optimum.law, self.optimum.theta)

    @property
    def unit(self) -> str:
        """Return the quantity that the residuals are differences of: L or log L."""
        return "L" if self.points.raw else "log L"

    def relative(self, spread: Any, loss: Any = None) -> Any:
        """Return a spread of residuals relative to ``loss``, by default the mean of the runs."""
        if not self.points.raw:
            return spread
        return spread / (np.exp(self.points.y.mean()) if loss is None else loss)

    @property
    def bounds_met(self) -> dict[str, str]:
        """Return a message for each parameter at a bound, by name."""
        law, met = self.optimum.law, {}
        at_low = self.optimum.theta <= bounds(law, self.points)[0]
        least = dict(zip(law.parameters, at_low, strict=True))  # lacks terms that went to zero
        for name in self.optimum.at_bound:
            if name not in least or (name in ("E", "A", "B") and name not in self.law.bounds):
                words = "went to zero, its natural bound: these data do not show that term"
            elif name == "x1":
                end = "smallest" if least[name] else "largest"
                words = f"is the {end} x of the runs, its natural bound: they show no break"
            elif least[name] and self.law.bounds[name][0] == 0:
                words = "is at its natural bound: below zero the loss would rise"
            else:
                end = "lower" if least[name] else "upper"
                words = f"is at its {end} bound: its value comes from the bound, not from the runs"
            met[name] = f"{name} = {self.parameters[name]:.4g} {words}"
        return met

    @property
    def degrees(self) -> int:
        """Return the degrees of freedom: points minus parameters."""
        return len(self.points) - len(self.optimum.law)

    @property
    def r_squared(self) -> float:
        """Return the share of the variance of log L (or L) that the law explains."""
        y = self.points.response
        return 1.0 - float(np.sum(self.residuals**2)) / float(np.sum((y - y.mean()) ** 2))

    def at(self, values: Mapping[str, Any]) -> dict[str, Array]:
        """Return new values as centred log variables; x may also be given by its letter.

        Raises ConfigError where a variable is missing.
        """
        given = {"x" if name == self.letter else name: value for name, value in values.items()}
        wanted = {self.letter if name == "x" else name: name for name in self.columns}
        if missing := [letter for letter, name in wanted.items() if name not in given]:
            names = " and ".join(wanted)
            raise ConfigError(f"predict: {missing[0]} is missing: the law goes by {names}")
        return self.points.at(given)

    def predict(self, **values: Any) -> Array:
        """Return the loss at new values of the law's variables, as ``N=..., D=...``."""
        x = self.at(values)
        return np.asarray(np.exp(self.optimum.law.log_loss(self.optimum.theta[None], x)[0]))


def fit(
    table: pd.DataFrame,
    law: str | Law = "chinchilla",
    *,
    loss: str = LOSS,
    estimator: str = "auto",
    threshold: float | None = None,
    limit: float | None = None,
    objective: str = "log",
    weights: Array | None = None,
    seed: int = 0,
    **columns: str,
) -> Fit:
    """Fit ``law`` to a table that has one row per run.

    ``columns`` name the columns of the law's variables, as in ``N="params"``, and ``loss`` that of
    the loss.  ``estimator`` is ``least_squares``, ``huber`` (with ``threshold`` in units of the
    noise, by default 1.345, or with ``limit`` in log L, such as 1e-3 in Hoffmann et al. 2022),
    ``likelihood`` (Huber's density with its scale as a parameter and ``threshold`` in units of
    it, as in Besiroglu et al. 2024), or ``auto``: least squares unless the residuals have heavy
    tails.  ``objective`` takes residuals in log L (``log``) or L (``raw``).  ``weights``, (n,),
    multiply the residuals.  ``seed`` sets the random starts that some laws need.

    Raises ConfigError where an argument is wrong or the table does not determine the law.
    """
    if isinstance(law, Law):
        check(form := law)
    elif law in LAWS:
        form = LAWS[law]
    else:
        nearest = did_you_mean(law, list(LAWS))
        raise ConfigError(f"law={law}: must be one of {', '.join(LAWS)}{nearest}")
    if removed := REMOVED.get(f"estimator={estimator}"):
        raise ConfigError(f"estimator={estimator}: removed; {removed}")
    if estimator not in ESTIMATORS:
        raise ConfigError(f"estimator={estimator}: must be one of {', '.join(ESTIMATORS)}")
    if objective not in OBJECTIVES:
        raise ConfigError(f"objective={objective}: must be one of {', '.join(OBJECTIVES)}")
    if threshold is not None and not threshold > 0:
        raise ConfigError(f"threshold={threshold:g}: must be above zero")
    names = [variable.removeprefix("log ") for variable in form.variables]
    where = {name: {**COLUMNS, **columns}[name] for name in names}
    points = Points.read(table, form, where, loss, objective == "raw", weights)
    reason = "asked for"
    given = limit if estimator == "huber" and limit else np.inf
    optimum = find_optimum(form, points, given, seed)
    if estimator == "auto":
        estimator, reason = judge(points.residuals(optimum.law, optimum.theta))
    if estimator == "huber" and given == np.inf:
        limit = limit or (threshold or EFFICIENT) * robust_scale(points, optimum)
        optimum = find_optimum(form, points, limit, seed)
    elif estimator == "likelihood":
        optimum = _likelihood(form, points, optimum, threshold or HUBER_DENSITY, seed)
    scale = residual_scale(points, optimum)
    return Fit(form, optimum, points, table, where, loss, estimator, reason, scale)


def judge(residuals: Array) -> tuple[str, str]:
    """Choose an estimator from the residuals of least squares; return it and the reason."""
    n = len(residuals)
    if n < FEWEST_TO_JUDGE:
        return "least_squares", f"{n} residuals are too few to judge their distribution"
    if np.ptp(residuals) < 1e-9:
        return "least_squares", "the law goes through the points"
    apart = residuals - residuals.mean()
    excess = float(np.mean(apart**4) / np.mean(apart**2) ** 2 - 3)
    p = 1.0
    if excess > np.sqrt(24 / n):  # its standard error
        from scipy import stats  # slow to import

        p = float(stats.kurtosistest(residuals).pvalue)
    kurtosis = f"heavy tails (excess kurtosis {excess:.1f}"
    if p < 0.01:
        return "huber", f"the residuals have {kurtosis}, p = {p:.1g})"
    return "least_squares", f"the residuals have no {kurtosis})"


def robust_scale(points: Points, optimum: Optimum) -> float:
    """Return the standard deviation that the median absolute residual implies, corrected for the
    fitted parameters; never zero."""
    residuals = np.abs(points.residuals(optimum.law, optimum.theta))
    degrees = max(1, len(points) - len(optimum.law))
    scale = float(np.median(residuals) / special.ndtri(0.75) * np.sqrt(len(points) / degrees))
    return max(scale, 1e-12)


def residual_scale(points: Points, optimum: Optimum) -> float:
    """Return the residual standard deviation that an M-estimator implies.

    For least squares it is the usual one.  Where hardly any residual lies inside the threshold,
    the estimator acts like a median, whose error is √(π/2) times that of a mean.
    """
    residuals = points.residuals(optimum.law, optimum.theta)
    inside = int(np.sum(np.abs(residuals) <= optimum.threshold))
    if inside < 2 * len(optimum.law):
        return robust_scale(points, optimum) * float(np.sqrt(np.pi / 2))
    slope = np.clip(residuals, -optimum.threshold, optimum.threshold)
    degrees = max(1, len(points) - len(optimum.law))
    return float(np.sqrt(np.sum(slope**2) / degrees) / inside * len(points))


def _likelihood(law: Law, points: Points, squares: Optimum, unit: float, seed: int) -> Optimum:
    """Alternate between fitting the law and its scale until neither changes."""
    optimum = squares
    for _ in range(100):
        sizes = np.abs(points.residuals(optimum.law, optimum.theta))
        new = unit * _density_scale(sizes, unit)
        if np.isfinite(optimum.threshold) and abs(new / optimum.threshold - 1) < 1e-6:
            break
        optimum = find_optimum(law, points, new, seed)
    return optimum


def _density_scale(sizes: Array, unit: float) -> float:
    """Return the σ that minimises n·log σ + Σ huber(r/σ)."""

    def slope(log_scale: float) -> float:
        ratio = sizes / np.exp(log_scale)
        return float(np.sum(np.minimum(ratio, unit) * ratio) - len(sizes))

    middle = np.log(max(float(sizes.mean()), 1e-12))
    return float(np.exp(optimize.brentq(slope, middle + np.log(unit) - 30, middle + 30)))
