"""Which law: information criterion and residuals; and what to run next."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import special

from tinygpt.config import ConfigError
from tinygpt.scaling.evidence import CLEAR
from tinygpt.scaling.fitting import EFFICIENT, Fit, fit, judge, robust_scale
from tinygpt.scaling.intervals import Target, covariance, new_runs, quantile_of
from tinygpt.scaling.laws import LAWS, Array

Settings = dict[str, Any]  # arguments of ``fit``


@dataclass(frozen=True)
class Candidate:
    """A law that was tried."""

    law: str
    formula: str
    fit: Fit | None
    reason: str  # why it could not be fitted
    aicc: float = float("inf")  # Akaike's criterion, corrected for few points; the least is best


def select(runs: pd.DataFrame, laws: Sequence[str], **settings: Any) -> list[Candidate]:
    """Return every law fitted to the same runs, the best first: by AICc.

    ``settings`` are those of ``fit``.
    """
    settings, reason, squares = _one_estimator(runs, laws, settings)
    fitted = squares if settings["estimator"] == "least_squares" else {}
    found = []
    for law in laws:
        try:
            one = replace(fitted.get(law) or fit(runs, law, **settings), reason=reason)
        except ConfigError as error:
            found.append(Candidate(law, "", None, str(error)))
            continue
        found.append(Candidate(law, one.law.formula, one, "", aicc(one)))
    return sorted(found, key=lambda one: (one.aicc, one.fit is None))


def _one_estimator(
    runs: pd.DataFrame, laws: Sequence[str], settings: Settings
) -> tuple[Settings, str, dict[str, Fit]]:
    """Return the settings with one estimator and one limit, so that the laws can be compared.

    Both follow from the residuals of least squares about the law that these describe best; the
    fits by those come along, if they were needed.
    """
    asked, reason = settings["estimator"], "asked for"
    if asked not in ("auto", "huber"):
        return settings, reason, {}
    squares = {}
    plain = {**settings, "estimator": "least_squares"}
    for law in laws:
        with contextlib.suppress(ConfigError):
            squares[law] = fit(runs, law, **plain)
    if not squares:
        return plain, reason, {}
    best = min(squares.values(), key=aicc)
    if asked == "auto":
        asked, reason = judge(best.residuals)
    if asked == "least_squares":
        return plain, reason, squares
    noise = robust_scale(best.points, best.optimum)
    limit = float(settings.get("threshold") or EFFICIENT) * noise
    return {**settings, "estimator": asked, "limit": limit}, reason, squares


def preferred(candidates: Sequence[Candidate]) -> Candidate:
    """Return the law that stands first in LAWS, of those hardly worse than the best."""
    near = [c for c in candidates if c.fit and c.aicc - candidates[0].aicc < CLEAR]
    order = list(LAWS)
    return min(near, key=lambda c: order.index(c.law)) if near else candidates[0]


def aicc(fit: Fit) -> float:
    """Return n log(2 objective / n) + 2 k n / (n - k - 1), where k counts the scale too.

    Of least squares the likelihood is that of a normal, of ``likelihood`` Laplace's; of Huber
    this is the quasi-likelihood.
    """
    n, k = len(fit.points), len(fit.optimum.law) + 1
    if n - k - 1 <= 0:
        return float("inf")
    if fit.estimator == "likelihood":
        misfit = 2 * n * float(np.log(max(float(np.abs(fit.residuals).mean()), 1e-300)))
    else:
        misfit = n * float(np.log(2 * max(fit.optimum.objective, 1e-300) / n))
    return misfit + 2 * k * n / (n - k - 1)


# --- what the residuals say


@dataclass(frozen=True)
class Noise:
    """The scatter of runs that differ in their seed alone: a standard deviation of log L, or L."""

    scale: float
    degrees: int
    lack_of_fit: float | None  # p-value: the law leaves no more than this scatter


def replicas(fit: Fit, columns: Sequence[str]) -> NDArray[np.intp]:
    """Return a number for each run, (n,): the same for those that differ in their seed alone."""
    same = [*fit.columns.values(), *(name for name in columns if name in fit.table)]
    groups = fit.table.groupby(list(dict.fromkeys(same)), dropna=False)
    return np.asarray(groups.ngroup(), dtype=np.intp)


def seed_noise(fit: Fit, columns: Sequence[str] = ()) -> Noise | None:
    """Return that of runs that agree in the law's variables and in ``columns``; None without any.

    The F test of lack of fit (Draper & Smith 1998, section 2.1) sets what the law leaves beside
    what the seeds scatter.
    """
    labels = replicas(fit, columns)
    count = np.bincount(labels)
    y = fit.points.response
    pure = float(np.sum((y - (np.bincount(labels, y) / count)[labels]) ** 2))
    degrees = int(np.sum(count - 1))
    if degrees == 0 or pure == 0.0:
        return None
    lacking = len(count) - len(fit.optimum.law)
    p = None
    if lacking > 0:
        rest = max(0.0, float(np.sum(fit.residuals**2)) - pure)
        p = float(special.fdtrc(lacking, degrees, rest / lacking / (pure / degrees)))
    return Noise(float(np.sqrt(pure / degrees)), degrees, p)


def structure(fit: Fit) -> float | None:
    """Return the p-value of no structure in the residuals; None where too few points tell.

    An F test of what second and third powers of the log variables explain of them beyond the
    law's own derivatives (Ramsey 1969, as a score test).
    """
    own = fit.points.jacobian(fit.optimum.law, fit.optimum.theta)
    logs = list(fit.points.x.values())
    extra = [a * b for i, a in enumerate(logs) for b in logs[i:]]
    n, residuals = len(fit.points), fit.residuals
    if n >= 4 * (len(extra) + own.shape[1]):
        extra += [a**3 for a in logs]
    both = np.column_stack([own, *extra])
    rank = int(np.linalg.matrix_rank(both))
    gained = rank - int(np.linalg.matrix_rank(own))
    if n - rank < 3 or gained == 0:
        return None
    before, left = (
        float(np.sum((residuals - m @ np.linalg.lstsq(m, residuals, rcond=None)[0]) ** 2))
        for m in (own, both)
    )
    if left <= 1e-20:
        return None
    return float(special.fdtrc(gained, n - rank, (before - left) / gained / (left / (n - rank))))


# --- what to run next


@dataclass(frozen=True)
class NextRun:
    """The affordable run that would most shrink the interval of the prediction asked for."""

    place: dict[str, float]
    cost: float  # FLOPs, or whatever the compute of the runs is counted in
    width_now: float  # of the 95 % interval of the predicted loss, relative to it
    width_then: float


def next_run(fit: Fit, target: Target, places: dict[str, Array], costs: Array) -> NextRun | None:
    """Return the one of ``places`` where one more run would narrow ``target`` most."""
    if fit.degrees < 1:
        return None
    theta, x = fit.optimum.theta, fit.points.at(places)
    _, error = new_runs(fit, x)
    shared = covariance(fit) @ target.at(theta)[1]
    now = float(target.at(theta)[1] @ shared)
    then = now - (fit.optimum.law.derivatives(theta[None], x)[1][0] @ shared) ** 2 / error**2
    best = int(np.argmin(then))
    reach = 2 * quantile_of(fit)
    return NextRun(
        {name: float(values[best]) for name, values in places.items()},
        float(costs[best]),
        reach * float(np.sqrt(max(now, 0.0))),
        reach * float(np.sqrt(max(then[best], 0.0))),
    )
