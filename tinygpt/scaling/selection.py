"""Select a law by an information criterion, test its residuals, and choose the next run."""

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
    """Hold a law that was tried, and how well it did."""

    law: str
    fit: Fit | None
    reason: str  # why it could not be fitted
    aicc: float = float("inf")  # Akaike's criterion, corrected for few points; lower is better


def select(
    runs: pd.DataFrame,
    laws: Sequence[str],
    *,
    same: Sequence[str] = (),
    tokens: str | None = None,
    cluster: str | None = None,
    **settings: Any,
) -> list[Candidate]:
    """Fit every law to the same runs, and return them by AICc, the best first.

    Runs that agree in the law's variables and in the columns ``same`` are seeds.  Runs are weighted
    by the scatter of seeds at their ``tokens`` and by what the first law leaves unexplained.  Rows
    that share the ``cluster`` column are checkpoints of a run, and count for less the more their
    residuals agree.  ``settings`` are arguments of ``fit``.
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
    """Return the effective number of runs, settings with one estimator and limit for all laws, and
    the reason for that estimator, all from the residuals of the best law by least squares."""
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
    """Return the effective number of rows, by the correlation within clusters (one-way analysis of
    variance) and the design effect 1 + (m - 1) rho (Kish 1965, section 5.4)."""
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
    """Return the first law, in the order of LAWS, that is about as good as the best."""
    near = [c for c in candidates if c.fit and c.aicc - candidates[0].aicc < CLEAR]
    return min(near, key=lambda c: list(LAWS).index(c.law), default=candidates[0])


def aicc(fit: Fit, worth: float | None = None, factor: float = 1.0) -> float:
    """Return n log(2 objective / n) + 2 k n / (n - k - 1), where k counts the scale too.

    n is the number of runs, or of independent runs that these are ``worth``.  The likelihood is
    normal for least squares and Laplace's for ``likelihood``; for Huber it is a quasi-likelihood
    scaled by ``factor``.
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
    """Return the factor that scales differences of Huber's log objective to those of a normal
    likelihood, from the variance of its slope at the best fit (Ronchetti 1985)."""
    best = min(fits, key=lambda one: one.optimum.objective, default=None)
    if best is None or best.estimator != "huber" or best.optimum.objective < 1e-30:
        return 1.0
    inside = np.abs(best.weighted) <= best.optimum.threshold
    slope = np.clip(best.weighted, -best.optimum.threshold, best.optimum.threshold)
    return 2 * best.optimum.objective * float(inside.mean()) / float(np.sum(slope**2))


# --- residuals


def structure(fit: Fit) -> float | None:
    """Return the p-value of an F test for structure in the residuals, or None for too few points.

    It tests what second and third powers of the log variables explain beyond the law's own
    derivatives (Ramsey 1969, as a score test).
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


# --- the next run


@dataclass(frozen=True)
class NextRun:
    """Hold the affordable run that would narrow the interval of a prediction most."""

    place: dict[str, float]
    cost: float  # in the unit of the runs' compute, usually FLOPs
    width_now: float  # of the 95 % interval of the predicted loss, relative to that loss
    width_then: float


def next_run(fit: Fit, target: Target, places: dict[str, Array], costs: Array) -> NextRun | None:
    """Return the one of ``places`` where another run would narrow ``target`` most."""
    if fit.degrees < 1:
        return None
    theta, x = fit.optimum.theta, fit.points.at(places)
    _, error = new_runs(fit, x)
    _, gradient = target.at(theta)
    shared = covariance(fit) @ gradient
    now = float(gradient @ shared)
    then = now - (fit.optimum.law.derivatives(theta[None], x)[1][0] @ shared) ** 2 / error**2
    best = int(np.argmin(then))
    reach = 2 * quantile_of(fit)
    return NextRun(
        {name: float(values[best]) for name, values in places.items()},
        float(costs[best]),
        reach * float(np.sqrt(max(now, 0.0))),
        reach * float(np.sqrt(max(then[best], 0.0))),
    )
