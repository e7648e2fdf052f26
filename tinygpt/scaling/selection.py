"""Which law: information criterion and residuals; and what to run next."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from scipy import special

from tinygpt.config import ConfigError
from tinygpt.scaling.evidence import CLEAR
from tinygpt.scaling.fitting import EFFICIENT, Fit, fit, judge, robust_scale
from tinygpt.scaling.intervals import Target, covariance, new_runs, quantile_of
from tinygpt.scaling.laws import LAWS, Array
from tinygpt.scaling.noise import weigh

Settings = dict[str, Any]  # arguments of ``fit``


@dataclass(frozen=True)
class Candidate:
    """Hold a law that was tried."""

    law: str
    fit: Fit | None
    reason: str  # why it could not be fitted
    aicc: float = float("inf")  # Akaike's criterion, corrected for few points; the least is best


def select(
    runs: pd.DataFrame,
    laws: Sequence[str],
    *,
    same: Sequence[str] = (),
    tokens: str | None = None,
    cluster: str | None = None,
    **settings: Any,
) -> list[Candidate]:
    """Return every law fitted to the same runs, the best first: by AICc.

    Runs that agree in the law's variables and in the columns ``same`` are seeds: runs are weighted
    by what those scatter at their ``tokens``, and by what the first law leaves beside it.  Rows
    that share the ``cluster`` column, checkpoints of a run, count as few as their residuals are
    worth.  ``settings`` are those of ``fit``.
    """
    reasons: dict[str, str] = {}  # why a law could not be fitted

    def fitted(laws: Iterable[str], **more: Any) -> dict[str, Fit]:
        found = {}
        for law in laws:
            try:
                found[law] = fit(runs, law, **{**settings, **more})
            except ConfigError as error:
                reasons[law] = str(error)
        return found

    plain = {"estimator": "least_squares"}
    fits = fitted(laws, **plain)
    if fits and cluster is None:
        law, first = next(iter(fits.items()))
        one = {**settings, **plain}
        weights = weigh(first, same, tokens, lambda each: fit(runs, law, weights=each, **one))
        if weights is not None:
            settings = {**settings, "weights": weights}
            fits = fitted(laws, **plain)
    worth, settings, reason = _one_estimator(fits, settings, cluster)
    if settings["estimator"] != "least_squares":
        fits = fitted(fits)
    factor = _quasi(fits.values())
    found = [
        Candidate(law, replace(one, reason=reason), "", aicc(one, worth, factor))
        for law, one in fits.items()
    ]
    found += [Candidate(law, None, reasons[law]) for law in laws if law not in fits]
    return sorted(found, key=lambda one: (one.aicc, one.fit is None))


def _one_estimator(
    squares: Mapping[str, Fit], settings: Settings, cluster: str | None
) -> tuple[float | None, Settings, str]:
    """Return how many independent runs the rows are worth, and one estimator with one limit for
    all laws, so that they can be compared: all by the residuals of the best least squares."""
    asked, reason = settings["estimator"], "asked for"
    if not squares:
        return None, settings, reason
    best = min(squares.values(), key=aicc)
    worth = None if cluster is None else independent(best.residuals, best.table[cluster])
    if asked == "auto":
        asked, reason = judge(best.weighted)
    settings = {**settings, "estimator": asked}
    if asked == "huber":
        noise = robust_scale(best.points, best.optimum)
        settings["limit"] = float(settings.get("threshold") or EFFICIENT) * noise
    return worth, settings, reason


def independent(residuals: Array, cluster: pd.Series) -> float:
    """Return how many independent rows n are worth, by the correlation within clusters (one-way
    analysis of variance) and the design effect 1 + (m - 1) rho (Kish 1965, section 5.4)."""
    labels = pd.factorize(cluster)[0]
    count = np.bincount(labels)
    n, groups = len(labels), len(count)
    if groups < 2 or groups == n:
        return float(n)
    means = np.bincount(labels, residuals) / count
    between = float(count @ (means - residuals.mean()) ** 2) / (groups - 1)
    within = float(np.sum((residuals - means[labels]) ** 2)) / (n - groups)
    size = (n - float(np.sum(count**2)) / n) / (groups - 1)
    rho = np.clip((between - within) / (between + (size - 1) * within + 1e-300), 0.0, 1.0)
    return n / (1 + (float(np.sum(count**2)) / n - 1) * float(rho))


def preferred(candidates: Sequence[Candidate]) -> Candidate:
    """Return the first in LAWS of the laws that are hardly worse than the best."""
    near = [c for c in candidates if c.fit and c.aicc - candidates[0].aicc < CLEAR]
    order = list(LAWS)
    return min(near, key=lambda c: order.index(c.law)) if near else candidates[0]


def aicc(fit: Fit, worth: float | None = None, factor: float = 1.0) -> float:
    """Return n log(2 objective / n) + 2 k n / (n - k - 1), where k counts the scale too.

    n is the number of runs, or how many independent ones these are ``worth``.  Of least squares
    the likelihood is that of a normal, of ``likelihood`` Laplace's; of Huber this is the
    quasi-likelihood, scaled by ``factor``.
    """
    rows, k = len(fit.points), len(fit.optimum.law) + 1
    n = rows if worth is None else worth
    if n - k - 1 <= 0:
        return float("inf")
    if fit.estimator == "likelihood":
        misfit = 2 * n * float(np.log(max(float(np.abs(fit.weighted).mean()), 1e-300)))
    else:
        misfit = n * float(np.log(2 * max(fit.optimum.objective, 1e-300) / rows))
    return factor * misfit + 2 * k * n / (n - k - 1)


def _quasi(fits: Iterable[Fit]) -> float:
    """Return the factor of differences of log objectives relative to a normal's, from the variance
    of the slope of Huber's objective at the best fit (Ronchetti 1985)."""
    best = min(fits, key=lambda one: one.optimum.objective, default=None)
    if best is None or best.estimator != "huber" or best.optimum.objective < 1e-30:
        return 1.0
    inside = np.abs(best.weighted) <= best.optimum.threshold
    slope = np.clip(best.weighted, -best.optimum.threshold, best.optimum.threshold)
    return 2 * best.optimum.objective * float(inside.mean()) / float(np.sum(slope**2))


# --- what the residuals say


def structure(fit: Fit) -> float | None:
    """Return the p-value of there being no structure in the residuals; None of too few points.

    An F test of what second and third powers of the log variables explain of them beyond the
    law's own derivatives (Ramsey 1969, as a score test).
    """
    own = fit.points.jacobian(fit.optimum.law, fit.optimum.theta)
    logs = list(fit.points.x.values())
    extra = [a * b for i, a in enumerate(logs) for b in logs[i:]]
    n, residuals = len(fit.points), fit.weighted
    if n >= 4 * (len(extra) + own.shape[1]):
        extra += [a**3 for a in logs]
    if fit.points.weights is not None:
        extra = [column * fit.points.weights for column in extra]
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
    """Hold the affordable run that would most shrink the interval of the prediction asked for."""

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
