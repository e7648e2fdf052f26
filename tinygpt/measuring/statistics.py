"""Medians of rounds, and how far they may be trusted."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
LEVEL = 0.95


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, lower and upper quartile."""
    low, median, high = np.percentile(values, (25, 50, 75))
    return float(median), float(low), float(high)


def median_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The median and its 95 % bootstrap interval (percentile method)."""
    low, high = np.percentile(_medians(values), _TAILS)
    return float(np.median(values)), float(low), float(high)


def ratio_interval(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """The ratio of two medians that were measured apart, and its 95 % bootstrap interval."""
    low, high = np.percentile(_medians(ours) / _medians(theirs, seed=1), _TAILS)
    return float(np.median(ours) / np.median(theirs)), float(low), float(high)


_TAILS = (50 * (1 - LEVEL), 50 * (1 + LEVEL))


def _medians(values: Sequence[float], seed: int = 0) -> NDArray[np.float64]:
    random = np.random.default_rng(seed)
    drawn = random.choice(np.asarray(values, dtype=float), (RESAMPLES, len(values)))
    medians: NDArray[np.float64] = np.median(drawn, axis=1)
    return medians
