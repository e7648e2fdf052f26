"""Estimate the scatter between seeds, and test the lack of fit of a law against it.

Short runs scatter much more than long ones, so log variance is a line in log training tokens,
shrunk towards zero slope, and at each length towards what was measured there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tinygpt.scaling.fitting import Fit
from tinygpt.scaling.laws import Array

SLOPE = 1.0  # prior standard deviation of the slope of log variance in log tokens
CURVE = 8.0  # degrees of freedom that the line counts for against the seeds of one length
STUDIES = 2000  # simulated, for the p-value of lack of fit
LEAST, SHORT = 0.002, 4000.0  # guessed deviation of log L of long runs; steps where it grows


@dataclass(frozen=True)
class Noise:
    """Hold the scatter between seeds as standard deviations of the response, log L or L."""

    scale: float  # pooled over all settings
    degrees: int
    slope: float  # of log variance in log tokens
    each: Array  # of each run, by its tokens, (n,)
    between: float  # of settings about the law, beyond their seeds
    lack_of_fit: float | None  # p-value of no more misfit than this scatter
    weights: Array  # of the runs in a fit, (n,): roots of precisions with mean square 1


@dataclass(frozen=True)
class Seeds:
    """Hold the scatter between runs with equal variables, at each length."""

    lengths: Array  # log training tokens, ascending, (L,); a single 0 for laws without D
    log_variances: Array  # of log L, (L,)

    @classmethod
    def of(cls, values: Mapping[str, Array], log_loss: Array) -> Seeds | None:
        """Return the scatter of runs at given values of the variables; None for too few runs."""
        places = np.stack(list(values.values()), axis=1)
        _, first, labels = np.unique(places, axis=0, return_index=True, return_inverse=True)
        count, _, pure = _within(labels.ravel(), log_loss)
        degrees = count - 1
        if degrees.sum() < CURVE or pure.sum() == 0.0:
            return None
        logs = cls._length(values)[first]
        found = _variances(pure[None], degrees, logs - logs @ degrees / degrees.sum())[0][0]
        lengths, one = np.unique(logs, return_index=True)
        return cls(lengths, np.log(found[one]))

    def at(self, values: Mapping[str, Array]) -> Array:
        """Return the standard deviation of log L, (n,), constant beyond the known lengths."""
        return np.exp(np.interp(self._length(values), self.lengths, self.log_variances) / 2)

    @staticmethod
    def _length(values: Mapping[str, Array]) -> Array:
        return np.log(values["D"]) if "D" in values else 0.0 * next(iter(values.values()))


def guessed(steps: Any) -> Any:
    """Return a guess of the standard deviation of log L between seeds before it is measured."""
    return LEAST * np.hypot(1.0, SHORT / steps)


def replicas(table: pd.DataFrame, settings: Sequence[str]) -> NDArray[np.intp]:
    """Return a label per run, (n,), shared by runs that differ only in their seed."""
    same = [name for name in dict.fromkeys(settings) if name in table]
    return np.asarray(table.groupby(same, dropna=False).ngroup(), dtype=np.intp)


def seed_noise(fit: Fit, settings: Sequence[str] = (), tokens: str | None = None) -> Noise | None:
    """Return the scatter of runs that agree in the law and ``settings``; None without replicas.

    ``tokens`` names the column of training tokens.  Lack of fit compares the weighted misfit of
    the setting means with that of simulated studies with re-estimated variances (linearised law).
    """
    labels = replicas(fit.table, [*fit.columns.values(), *settings])
    first = np.unique(labels, return_index=True)[1]
    y = fit.points.response
    count, means, pure = _within(labels, y)
    degrees = count - 1
    if degrees.sum() == 0 or pure.sum() == 0.0:
        return None
    logs = np.zeros(len(first))
    if tokens is not None and tokens in fit.table:
        logs = np.log(fit.table[tokens].to_numpy(dtype=float)[first])
        logs = logs - float(logs @ degrees / degrees.sum())
    variances, slopes = _variances(pure[None], degrees, logs)
    variance = variances[0]
    law, theta = fit.optimum.law, fit.optimum.theta
    jacobian = replace(fit.points, weights=None).jacobian(law, theta)[first]
    left = means - (y - fit.residuals)[first]
    between, p = 0.0, None
    if (lacking := len(first) - len(law)) > 0:
        found = _misfit(left[None], count / variances, jacobian)[0]
        random = np.random.default_rng(0)
        spread = variance * random.chisquare(np.maximum(degrees, 1e-9), (STUDIES, len(first)))
        drawn = random.standard_normal((STUDIES, len(first))) * np.sqrt(variance / count)
        others = _variances(spread, degrees, logs)[0]
        as_much = np.sum(_misfit(drawn, count / others, jacobian) >= found)
        p = float(1 + as_much) / (1 + STUDIES)
        between = max(0.0, found - lacking) / float(np.sum(count / variance))
    weights = 1 / np.sqrt(variance + count * between)[labels]
    return Noise(
        scale=float(np.sqrt(pure.sum() / degrees.sum())),
        degrees=int(degrees.sum()),
        slope=float(slopes[0]),
        each=np.sqrt(variance)[labels],
        between=float(np.sqrt(between)),
        lack_of_fit=p,
        weights=weights / np.sqrt(np.mean(weights**2)),
    )


def weigh(
    fitted: Fit, settings: Sequence[str], tokens: str | None, refit: Callable[[Array], Fit]
) -> Array | None:
    """Return weights of runs by the scatter of their seeds and of the law, (n,).

    Returns None without replicas.  ``refit`` fits the law with given weights.
    """
    weights = None
    for _ in range(3):
        noise = seed_noise(fitted if weights is None else refit(weights), settings, tokens)
        if noise is None:
            break
        weights = noise.weights
    return weights


def _within(labels: NDArray[np.intp], y: Array) -> tuple[Array, Array, Array]:
    """Return each setting's number of runs, mean, and sum of squared deviations, (G,)."""
    count = np.bincount(labels).astype(np.float64)
    means = np.bincount(labels, y) / count
    return count, means, np.bincount(labels, (y - means[labels]) ** 2).astype(np.float64)


def _variances(pure: Array, degrees: Array, logs: Array) -> tuple[Array, Array]:
    """Return the variance of each setting, (B, G), and the slopes, (B,), from sums of squares.

    The line is the posterior mode under scaled chi squares and a normal prior of the slope.
    """
    level = np.log(pure.sum(axis=1) / degrees.sum())
    slope = np.zeros(len(pure))
    if np.ptp(logs) > 0:
        for _ in range(30):  # Newton's method with steps of at most one
            ratio = pure * np.exp(-level[:, None] - slope[:, None] * logs)
            up = 0.5 * (ratio - degrees)
            g, h = up.sum(axis=1), up @ logs - slope / SLOPE**2
            a, b, c = (0.5 * ratio @ logs**power for power in (0, 1, 2))
            c = c + 1 / SLOPE**2
            step = np.stack([c * g - b * h, a * h - b * g]) / (a * c - b**2)
            step /= np.maximum(1.0, np.abs(step).max(axis=0))
            level, slope = level + step[0], slope + step[1]
    line = np.exp(level[:, None] + slope[:, None] * logs)
    same = (logs[:, None] == logs).astype(float)
    ratio = (CURVE + (pure / line) @ same) / (CURVE + degrees @ same)
    return line * ratio, slope


def _misfit(left: Array, precision: Array, jacobian: Array) -> Array:
    """Return the weighted residual sums of squares of a linear law, (B,)."""
    root = np.sqrt(precision)
    own, rest = jacobian * root[..., None], left * root
    size = np.sqrt(np.sum(own**2, axis=1, keepdims=True)) + 1e-300
    own = own / size
    gram = np.swapaxes(own, 1, 2) @ own + 1e-12 * np.eye(own.shape[2])
    along = (rest[:, None] @ own)[:, 0]
    solved = np.linalg.solve(gram, along[..., None])[..., 0]
    return np.asarray(np.sum(rest**2, axis=1) - np.sum(along * solved, axis=1))
