"""How to split a budget between size and data: the compute-optimal frontier of a law."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import optimize

from tinygpt.scaling.fitting import Fit
from tinygpt.scaling.laws import Array


@dataclass(frozen=True)
class Frontier:
    """The best size and data of each budget, by the law, C = 6·N·D."""

    flops: Array  # (n,)
    n: Array  # (n,)
    d: Array  # (n,)
    loss: Array  # (n,)


def best_split(fit: Fit, flops: float) -> tuple[float, float]:
    """N and D of the least loss with 6·N·D = ``flops``."""
    low, high = np.log(1.0), np.log(flops / 6)

    def loss(log_n: float) -> float:
        n = np.exp(log_n)
        place = {"N": n, "D": flops / 6 / n}
        return float(fit.predict(**place, U=place["D"])[0])

    grid = np.linspace(low, high, 200)
    at = grid[int(np.argmin([loss(value) for value in grid]))]
    step = grid[1] - grid[0]
    found = optimize.minimize_scalar(loss, bounds=(at - step, at + step), method="bounded")
    n = float(np.exp(found.x))
    return n, flops / 6 / n


def frontier(fit: Fit, compute: Array) -> Frontier:
    """From the smallest budget that was run to ten times the largest."""
    flops = np.geomspace(compute.min(), 10 * compute.max(), 50)
    n, d = np.array([best_split(fit, c) for c in flops]).T
    return Frontier(flops, n, d, fit.predict(N=n, D=d, U=d))
