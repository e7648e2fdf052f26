"""One law through the points of a table: where a search starts, the best minimum, estimators.

A sum of powers is fitted by variable projection: on a grid of exponents the coefficients follow
in closed form, and every local minimum of that surface is polished.  Other laws are polished from
many starts instead.  The threshold of a robust estimator comes down step by step on the way.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from scipy import optimize, special

from tinygpt.config import REMOVED, ConfigError
from tinygpt.config.checks import did_you_mean
from tinygpt.scaling.laws import LAWS, Array, Law, check
from tinygpt.scaling.points import Points
from tinygpt.scaling.solver import FADING, NDBool, Solved, bounds, objective, solve, term_mask

ESTIMATORS = ("auto", "least_squares", "huber", "likelihood")
OBJECTIVES = ("log", "raw")
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
FEWEST_TO_JUDGE = 20  # residuals; the distribution of fewer cannot be judged

# --- where a search starts

EXPONENTS = np.geomspace(0.015, 2.4, 34)
MOST_ON_GRID = 1000  # points that the surface of the grid is drawn from
N_STARTS = 1024  # of a law that is no sum of powers; the best are polished
N_POLISHED = 32
N_FINISHED = 8  # of those, the best after a rough search
ROUGH: dict[str, Any] = {"most_steps": 50, "gain": 1e-6}
# Where the starts of a law that is no sum of powers lie: exponents, logarithms of coefficients
# (of a term: relative to the least loss).
LIKELY = {
    "E": (-3.0, 0.0),
    **dict.fromkeys(("A", "B", "Nc", "Dc"), (-4.0, 1.0)),
    **dict.fromkeys(("alpha", "beta"), (0.03, 1.0)),
    **dict.fromkeys(("rn", "rd"), (0.0, 4.0)),
    "gamma": (0.3, 2.0),
    "c": (-3.0, 5.0),
    "f": (-3.0, 1.0),
    "x1": (0.0, 1.0),
}


def grid_starts(law: Law, points: Points) -> Array:
    """Return the local minima of a sum of powers over a grid of its exponents, (B, P).

    At each node the coefficients that minimise the sum of squared relative errors, none of them
    negative, follow in closed form, by trying each set of active terms.
    """
    from scipy.ndimage import minimum_filter  # slow to import

    points = points.rows(slice(None, None, 1 + len(points) // MOST_ON_GRID))
    kinds, dimensions = len(law.coefficients), len(law.exponents)
    grid = np.array(list(itertools.product(EXPONENTS, repeat=dimensions)))
    theta = np.hstack([np.zeros((len(grid), kinds)), grid])
    terms = np.moveaxis(np.exp(law.terms(theta, points.x) - points.y), 0, 1)  # (G, K, n)
    gram, target = terms @ np.swapaxes(terms, 1, 2), terms.sum(axis=2)
    least = np.full(len(grid), np.inf)
    coefficients = np.zeros((len(grid), kinds))
    for count in range(1, kinds + 1):
        for active in itertools.combinations(range(kinds), count):
            part = gram[:, active, :][:, :, active]
            ridge = 1e-13 * np.trace(part, axis1=1, axis2=2)[:, None, None] * np.eye(count)
            found = np.linalg.solve(part + ridge, target[:, active, None])[..., 0]
            value = -np.sum(found * target[:, active], axis=1)
            take = (found >= 0).all(axis=1) & (value < least)
            least[take], coefficients[take] = value[take], 0.0
            coefficients[np.ix_(take, active)] = found[take]
    theta[:, :kinds] = np.log(np.maximum(coefficients, 1e-6))
    surface = least.reshape((len(EXPONENTS),) * dimensions)
    lowest = np.flatnonzero(surface <= minimum_filter(surface, size=3, mode="nearest"))
    starts: Array = theta[lowest[np.argsort(least[lowest], kind="stable")[:8]]]
    return starts


def spread_starts(law: Law, points: Points, seed: int) -> Array:
    """Return starts for any law, (B, P): a Latin hypercube over what its parameters may be."""
    names, random = law.parameters, np.random.default_rng(seed)
    ranks = random.permuted(np.tile(np.arange(N_STARTS), (len(names), 1)), axis=1).T
    unit = (ranks + random.random(ranks.shape)) / N_STARTS
    ends = np.array([LIKELY.get(name) or _likely(law, name) for name in names])
    starts = ends[:, 0] + unit * (ends[:, 1] - ends[:, 0])
    least = points.y.min()
    for j, name in enumerate(names):
        if name in (law.powers or ("E", "A", "B")):
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


_starts: dict[Any, Array] = {}  # by law and points: fits that differ in weights share them


def starts_of(law: Law, points: Points, seed: int) -> Array:
    """Return where the search for a law's minima begins, (B, P)."""
    arrays = [points.y, *points.x.values()]
    key = (law.name, law.formula, law.parameters, seed, *(array.tobytes() for array in arrays))
    if key not in _starts:
        plain = law.powers and max(map(len, law.powers.values())) == 1 and len(law.exponents) <= 2
        found = grid_starts(law, points) if plain else spread_starts(law, points, seed)
        if len(_starts) > 100:
            _starts.clear()
        _starts[key] = found
    return _starts[key]


def _likely(law: Law, name: str) -> tuple[float, float]:
    """Return where to look for a parameter of a law of the user's: within its bounds, if any."""
    if name in law.bounds:
        ends = np.array(law.bounds[name], dtype=float)
        with np.errstate(divide="ignore"):
            low, high = np.log(ends) if name in law.coefficients else ends
        return max(low, -10.0), min(high, 10.0)
    return (-4.0, 2.0) if name in law.coefficients else (0.03, 1.0)


# --- the best minimum


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
    """Return the least sum of Huber's losses of the residuals.

    The threshold comes down from the largest residual, a factor of √10 at a time: at each stage
    the minima of the last are the starts.
    """
    starts = starts_of(law, points, seed)
    if len(starts) > N_FINISHED:
        rough = solve(law, points, starts, **ROUGH)
        starts = rough.theta[np.argsort(rough.objective, kind="stable")[:N_FINISHED]]
    found = _distinct(solve(law, points, starts))
    low, high = bounds(law, points)
    if "E" in law.parameters and not (law.powers and found.converged[0]):
        zero = found.theta[: N_POLISHED // 4].copy()  # a slope in E may lead away from E = 0
        zero[:, law.parameters.index("E")] = low[law.parameters.index("E")]
        found = _distinct(solve(law, points, np.vstack([found.theta, zero])))
    if np.isfinite(threshold):
        largest = float(np.abs(points.residuals(law, found.theta[0])).max())
        count = max(1, int(np.ceil(2 * np.log10(max(largest, 1e-300) / threshold))))
        for stage in threshold * 10.0 ** (np.arange(count - 1, -1, -1) / 2):
            found = _distinct(solve(law, points, found.theta, stage))
    theta = found.theta[0]
    reach = np.where(term_mask(law), 0.5 * FADING, 0.0)  # a term so close to its floor is none
    free = ~((theta <= low + reach) | (theta >= high))
    gone = [name for name, stays in zip(law.parameters, free, strict=True) if not stays]
    if gone and law.powers and len(law.powers) > 1:
        rest = find_optimum(law.without(gone[0]), points, threshold, seed)
        return replace(rest, at_bound=(gone[0], *rest.at_bound), starts=len(starts))
    return Optimum(
        law,
        theta,
        threshold,
        float(found.objective[0]),
        float(np.linalg.norm(found.gradient[0, free])),
        _smallest_eigenvalue(law, points, theta, threshold, free),
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


def _smallest_eigenvalue(
    law: Law, points: Points, theta: Array, threshold: float, free: NDBool
) -> float:
    """Return that of the whole Hessian of the objective, by differences of its gradient."""
    steps = 1e-5 * np.eye(len(law))[free]
    with np.errstate(all="ignore"):
        _, up, _ = objective(law, points, theta + steps, threshold)
        _, down, _ = objective(law, points, theta - steps, threshold)
    hessian = ((up - down) / 2e-5)[:, free]
    return float(np.linalg.eigvalsh((hessian + hessian.T) / 2)[0])


# --- a fit


@dataclass(frozen=True)
class Fit:
    """Hold a law with its estimates and how they were found.

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
        """Return estimates by name; a term at zero has coefficient 0 and no exponent (nan)."""
        found = self.optimum.law.natural(self.optimum.theta, self.points.centres)
        missing = dict.fromkeys(self.law.coefficients, 0.0)
        missing |= dict.fromkeys(self.law.exponents, float("nan"))
        return {name: found.get(name, missing[name]) for name in self.law.parameters}

    @cached_property
    def residuals(self) -> Array:
        """Return measured - fitted, (n,): log losses, or losses if ``objective`` was ``raw``."""
        plain = replace(self.points, weights=None)
        return plain.residuals(self.optimum.law, self.optimum.theta)

    @cached_property
    def weighted(self) -> Array:
        """Return residuals times the weights of the runs, (n,)."""
        return self.points.residuals(self.optimum.law, self.optimum.theta)

    @property
    def unit(self) -> str:
        """Return what the residuals are of."""
        return "L" if self.points.raw else "log L"

    def relative(self, spread: Any, loss: Any = None) -> Any:
        """Return a spread of residuals as a part of ``loss``, by default the mean of the runs."""
        if not self.points.raw:
            return spread
        return spread / (np.exp(self.points.y.mean()) if loss is None else loss)

    @property
    def bounds_met(self) -> dict[str, str]:
        """Return what to say of each parameter at a bound, by its name."""
        found = self.optimum
        low = dict(zip(found.law.parameters, bounds(found.law, self.points)[0], strict=True))
        theta = dict(zip(found.law.parameters, found.theta, strict=True))
        met = {}
        for name in found.at_bound:
            least = name in theta and theta[name] <= low[name]
            if name not in theta or (name in ("E", "A", "B") and name not in self.law.bounds):
                words = "went to zero, its natural bound: these data do not show that term"
            elif name == "x1":
                end = "smallest" if least else "largest"
                words = f"is the {end} x of the runs, its natural bound: they show no break"
            elif least and self.law.bounds[name][0] == 0:
                words = "is at its natural bound: below zero the loss would rise"
            else:
                end = f"{'lower' if least else 'upper'} bound"
                words = f"is at its {end}: its value comes from the bound, not from the runs"
            met[name] = f"{name} = {self.parameters[name]:.4g} {words}"
        return met

    @property
    def degrees(self) -> int:
        """Return the degrees of freedom: points less parameters."""
        return len(self.points) - len(self.optimum.law)

    @property
    def r_squared(self) -> float:
        """Return the share of the variance of log L, or of L, that the law explains."""
        y = self.points.response
        return 1.0 - float(np.sum(self.residuals**2)) / float(np.sum((y - y.mean()) ** 2))

    def predict(self, **values: Any) -> Array:
        """Return the loss at new values of the law's variables, as ``N=..., D=...``."""
        x = self.points.at(values)
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
    """Fit ``law`` to a table, a row a run.

    ``columns`` say where the variables of the law stand, as ``N="params"``; ``loss`` names that
    of the loss.  ``estimator``: ``least_squares`` (of log L), ``huber`` (with ``threshold`` in
    units of the noise, by default 1.345; or with a ``limit`` in log L itself, as the 1e-3 of
    Hoffmann et al. 2022), ``likelihood`` (Huber's density with its scale as a parameter,
    ``threshold`` in units of it: Besiroglu et al. 2024), or ``auto``: least squares unless the
    residuals speak against it.  ``objective`` says whether residuals are those of log L
    (``log``) or of L (``raw``).  ``weights``, (n,), multiply residuals.  ``seed`` is that of the
    starts, where there are random ones.

    Raises ConfigError, one line, where the table cannot carry the law.
    """
    form = _named(law)
    if removed := REMOVED.get(f"estimator={estimator}"):
        raise ConfigError(f"estimator={estimator}: removed; {removed}")
    if estimator not in ESTIMATORS:
        raise ConfigError(f"estimator={estimator}: must be one of {', '.join(ESTIMATORS)}")
    if objective not in OBJECTIVES:
        raise ConfigError(f"objective={objective}: must be one of {', '.join(OBJECTIVES)}")
    if threshold is not None and not threshold > 0:
        raise ConfigError(f"threshold={threshold:g}: must be above zero")
    where = {name.removeprefix("log "): "" for name in form.variables}
    where = {name: {**COLUMNS, **columns}[name] for name in where}
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


def _named(law: str | Law) -> Law:
    if isinstance(law, Law):
        check(law)
        return law
    if law not in LAWS:
        nearest = did_you_mean(law, list(LAWS))
        raise ConfigError(f"law={law}: must be one of {', '.join(LAWS)}{nearest}")
    return LAWS[law]


def judge(residuals: Array) -> tuple[str, str]:
    """Return the estimator that residuals of least squares ask for, and why."""
    n = len(residuals)
    if n < FEWEST_TO_JUDGE:
        return "least_squares", f"{n} residuals are too few to judge their distribution"
    if np.ptp(residuals) < 1e-9:
        return "least_squares", "the law goes through the points"
    apart = residuals - residuals.mean()
    excess = float(np.mean(apart**4) / np.mean(apart**2) ** 2 - 3)
    p = 1.0
    if excess > np.sqrt(24 / n):  # its standard error; slow to import
        from scipy import stats

        p = float(stats.kurtosistest(residuals).pvalue)
    if p < 0.01:
        words = f"the residuals have heavy tails (excess kurtosis {excess:.1f}, p = {p:.1g})"
        return "huber", words
    return "least_squares", f"the residuals have no heavy tails (excess kurtosis {excess:.1f})"


def robust_scale(points: Points, optimum: Optimum) -> float:
    """Return the median absolute residual as a standard deviation, corrected for the fitted
    parameters; never zero."""
    residuals = np.abs(points.residuals(optimum.law, optimum.theta))
    degrees = max(1, len(points) - len(optimum.law))
    scale = float(np.median(residuals) / special.ndtri(0.75) * np.sqrt(len(points) / degrees))
    return max(scale, 1e-12)


def residual_scale(points: Points, optimum: Optimum) -> float:
    """Return the standard deviation that an M-estimator implies; of least squares the usual one.

    Where the threshold leaves hardly a residual inside, the estimator is the median's: its error
    is that of a mean times √(π/2).
    """
    residuals = points.residuals(optimum.law, optimum.theta)
    inside = int(np.sum(np.abs(residuals) <= optimum.threshold))
    if inside < 2 * len(optimum.law):
        return robust_scale(points, optimum) * float(np.sqrt(np.pi / 2))
    slope = np.clip(residuals, -optimum.threshold, optimum.threshold)
    degrees = max(1, len(points) - len(optimum.law))
    return float(np.sqrt(np.sum(slope**2) / degrees) / inside * len(points))


def _likelihood(law: Law, points: Points, squares: Optimum, unit: float, seed: int) -> Optimum:
    """Alternate the law, given the scale, and the scale, given the law, until both stand."""
    optimum = squares
    for _ in range(100):
        sizes = np.abs(points.residuals(optimum.law, optimum.theta))
        new = unit * _density_scale(sizes, unit)
        if np.isfinite(optimum.threshold) and abs(new / optimum.threshold - 1) < 1e-6:
            break
        optimum = find_optimum(law, points, new, seed)
    return optimum


def _density_scale(sizes: Array, unit: float) -> float:
    """Return where n·log σ + Σ huber(r/σ) is least."""

    def slope(log_scale: float) -> float:
        ratio = sizes / np.exp(log_scale)
        return float(np.sum(np.minimum(ratio, unit) * ratio) - len(sizes))

    middle = np.log(max(float(sizes.mean()), 1e-12))
    return float(np.exp(optimize.brentq(slope, middle + np.log(unit) - 30, middle + 30)))
