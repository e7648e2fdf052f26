"""Split a budget between size and data by a law of the loss.

The split is closed form for sums of powers under C = 6·N·D, else numerical (other laws, recorded
FLOPs per token).  N are parameters, D tokens, and C FLOPs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.interpolate import PchipInterpolator

from tinygpt.config import ConfigError
from tinygpt.scaling.fitting import Fit
from tinygpt.scaling.intervals import LEVEL, Bootstrap, Interval, bootstrap
from tinygpt.scaling.isoflop import by_size
from tinygpt.scaling.laws import Array

FlopsPerToken = Callable[[Array], Array]  # N -> FLOPs of training on one token

REPLICAS = 1000
FURTHER = 10.0  # bands extend to this multiple of the largest budget that was run
REACH = np.log(1e4)  # the best size is searched within this factor of the sizes that were run
PLACES = (32, 9, 9)  # points of successive grids in log N, each around the best of the last
ROUNDS = 6  # of parabolas through three ever closer points
AT_ONCE = 30_000  # points that are evaluated together: they fit in a cache


def six_n(n: Array) -> Array:
    """Return FLOPs per token by the rule of thumb: 6 per parameter."""
    return 6.0 * n


def flops_per_token(n: Array, d: Array, flops: Array) -> FlopsPerToken:
    """Return FLOPs per token as a function of size, from N, D and FLOPs of runs, (n,) each.

    Log means at each size are joined by a monotone cubic in logarithms (corners would attract the
    best size); beyond them the slope over the last factor of 2 in N continues.  Runs with 6·N give
    ``six_n``, and with it closed forms.
    """
    per_token = flops / d
    if np.allclose(per_token, 6.0 * n, rtol=1e-9, atol=0.0):
        return six_n
    sizes, logs = by_size(n, np.log(per_token))
    if len(sizes) == 1:
        return lambda size: np.asarray(np.exp(logs[0] + (np.log(size) - sizes[0])))
    inner, slopes = PchipInterpolator(sizes, logs), []
    for x, y in ((sizes, logs), (sizes[::-1], logs[::-1])):
        far = np.flatnonzero(np.abs(x - x[0]) >= np.log(2) * (1 - 1e-9))
        other = far[0] if len(far) else -1
        slopes.append(float((y[other] - y[0]) / (x[other] - x[0])))

    def at(size: Array) -> Array:
        x = np.log(size)
        inside = np.clip(x, sizes[0], sizes[-1])
        beyond = np.where(x < inside, *slopes) * (x - inside)
        return np.asarray(np.exp(inner(inside) + beyond))

    return at


def recorded(fit: Fit, compute: Array) -> FlopsPerToken:
    """Return FLOPs per token by size for the runs of a fit with FLOPs ``compute``, (n,)."""
    n, d = (fit.table[fit.columns[name]].to_numpy(dtype=float) for name in "ND")
    return flops_per_token(n, d, compute)


# --- the best split by a law


def closed_form(a: Any, b: Any, alpha: Any, beta: Any, flops: Any) -> tuple[Array, Array]:
    """Return N and D that minimise A/N^alpha + B/D^beta at 6·N·D = ``flops``; arrays broadcast.

    Hoffmann et al. 2022, eq. 4: N = G (C/6)^(beta/(alpha+beta)), D = C/(6 N),
    G = (alpha A / (beta B))^(1/(alpha+beta)).
    """
    g = (np.log(alpha * a) - np.log(beta * b)) / (alpha + beta)
    n = np.exp(g + beta / (alpha + beta) * np.log(np.asarray(flops) / 6))
    return n, flops / 6 / n


def best_split(
    fit: Fit, flops: float, per_token: FlopsPerToken = six_n, unique: float = np.inf
) -> tuple[float, float]:
    """Return N and D of the least loss at ``flops``.

    ``per_token`` gives FLOPs per token by size; ``unique`` tokens exist before they repeat, for
    laws in U.  Raises ConfigError if the law has no best split.
    """
    n, d, _ = best_splits(fit, np.array([flops]), per_token, unique)
    return float(n[0]), float(d[0])


def best_splits(
    fit: Fit, flops: Array, per_token: FlopsPerToken, unique: float
) -> tuple[Array, Array, Array]:
    """Return N, D and L of the best splits at budgets ``flops``, (G,) each.

    Raises ConfigError if the fitted law has none.
    """
    law = fit.optimum.law
    left = set(law.variables) if law.powers is None else set[str]().union(*law.powers.values())
    if missing := {"N", "D"} - left:
        gone = " and ".join(sorted(missing))
        raise ConfigError(f"law={fit.law.name}: as fitted it has no {gone}, and so no best split")
    n, d, loss = splits(fit, fit.optimum.theta[None], flops, per_token, unique)
    if np.isnan(n).any():
        raise ConfigError(
            f"law={fit.law.name}: as fitted the loss has no minimum in N near the sizes that were "
            "run, and so no best split"
        )
    return n[0], d[0], loss[0]


def splits(
    fit: Fit, theta: Array, flops: Array, per_token: FlopsPerToken, unique: float
) -> tuple[Array, Array, Array]:
    """Return N, D and L, (B, G), for parameters (B, P) at budgets (G,); nan without a minimum."""
    law = fit.optimum.law
    powers = {name: of for name, of in (law.powers or {}).items() if of}
    with np.errstate(invalid="ignore"):  # of negative exponents
        variables = {name: {*of} for name, of in powers.items()}
        if per_token is six_n and variables == {"A": {"N"}, "B": {"D"}}:
            plain = law.plain(theta, fit.points.centres)
            value = {name: plain[:, j : j + 1] for j, name in enumerate(law.parameters)}
            alpha, beta = value[powers["A"]["N"]], value[powers["B"]["D"]]
            n, _ = closed_form(value["A"], value["B"], alpha, beta, flops)
            log_n = np.log(np.where((alpha > 0) & (beta > 0), n, np.nan))
        else:
            parts = np.array_split(theta, -(-len(theta) * len(flops) * PLACES[0] // AT_ONCE) or 1)
            log_n = np.vstack([_best_size(fit, one, flops, per_token, unique) for one in parts])
        log_d = np.log(flops) - np.log(per_token(np.exp(log_n)))
        log_loss = law.log_loss(theta, _at(fit, log_n, log_d, unique))
    return np.exp(log_n), np.exp(log_d), np.exp(log_loss)


def _at(fit: Fit, log_n: Array, log_d: Array, unique: float) -> dict[str, Array]:
    """Return the centred log variables, (B, n) each."""
    logs = {"N": log_n, "D": log_d, "U": np.minimum(log_d, np.log(unique))}
    return {name: logs[name] - centre for name, centre in fit.points.centres.items()}


def _best_size(
    fit: Fit, theta: Array, flops: Array, per_token: FlopsPerToken, unique: float
) -> Array:
    """Return log N of the least loss, (B, G), by ever finer grids and then parabolas."""
    log_c = np.log(flops)[:, None]
    sizes, tokens = (np.log(fit.table[fit.columns[v]].to_numpy(dtype=float)) for v in "ND")
    runs = np.log(per_token(np.exp(sizes))) + tokens
    reach = REACH + np.maximum(log_c - runs.max(), 0) + np.maximum(runs.min() - log_c, 0)
    low, high = sizes.min() - reach, sizes.max() + reach  # (G, 1)

    def loss_at(log_n: Array) -> Array:  # (B or 1, G, places)
        log_d = log_c - np.log(per_token(np.exp(log_n)))
        flat = (len(log_n), len(flops) * log_n.shape[-1])
        x = _at(fit, log_n.reshape(flat), log_d.reshape(flat), unique)
        return fit.optimum.law.log_loss(theta, x).reshape(len(theta), *log_n.shape[1:])

    left, right = low[None], high[None]
    for count in PLACES:
        log_n = left + np.linspace(0.0, 1.0, count) * (right - left)
        best = np.argmin(loss_at(log_n), axis=-1)[..., None]
        log_n = np.broadcast_to(log_n, (len(theta), *log_n.shape[1:]))
        left, middle, right = (
            np.take_along_axis(log_n, np.clip(best + by, 0, count - 1), axis=-1)
            for by in (-1, 0, 1)
        )
    half = 0.5 * (right - left)
    for _ in range(ROUNDS):
        below, here, above = np.moveaxis(loss_at(middle + half * np.array([-1.0, 0, 1])), -1, 0)
        bend = np.maximum(below - 2 * here + above, 1e-300)
        middle = middle + half * np.clip(0.5 * (below - above) / bend, -1, 1)[..., None]
        half = 0.2 * half
    edge = (middle - low < 1e-3) | (high - middle < 1e-3)
    return np.asarray(np.where(edge, np.nan, middle)[..., 0])


# --- bands of the law


@dataclass(frozen=True)
class Band:
    """Hold a quantity along the budgets, (G,) each; unknown ends are nan."""

    estimate: Array
    low: Array
    high: Array
    level: float
    method: str

    def at(self, i: int) -> Interval:
        ends = float(self.low[i]), float(self.high[i])
        return Interval(float(self.estimate[i]), *ends, self.level, self.method)


@dataclass(frozen=True)
class LawSplit:
    """Hold the best split by the law, with percentiles of a bootstrap over runs.

    The exponents are slopes of log N, log D and log L against log C over the budgets that were
    run: under C = 6·N·D, beta/(alpha+beta) for N and alpha/(alpha+beta) for D.
    """

    flops: Array  # (G,)
    n: Band
    d: Band
    loss: Band
    a: Interval  # N ~ C^a
    b: Interval  # D ~ C^b
    c: Interval  # L ~ C^c, with the irreducible loss in L
    undefined: float  # share of replicas without a best split at some budget
    largest: int  # index of the largest budget that was run


def by_law(
    fit: Fit,
    compute: Array,
    *,
    per_token: FlopsPerToken | None = None,
    unique: float = np.inf,
    replicas: int | Bootstrap = REPLICAS,
    level: float = LEVEL,
) -> LawSplit:
    """Return the best split from the smallest budget of the runs to ten times the largest.

    ``compute`` has the FLOPs of each run, (n,), from which ``per_token`` follows by default.  A fit
    without degrees of freedom gets no bands.  Raises ConfigError as ``best_split``.
    """
    per_token = per_token or recorded(fit, compute)
    inside = np.geomspace(compute.min(), compute.max(), 33 if np.ptp(compute) > 0 else 1)
    flops = np.append(inside, compute.max() * np.geomspace(1.0, FURTHER, 12)[1:])
    theta, method = parameter_vectors(fit, replicas)
    estimates = best_splits(fit, flops, per_token, unique)
    drawn = splits(fit, theta, flops, per_token, unique)
    span = slice(len(inside)) if len(inside) > 1 else slice(None)
    away = np.log(flops[span]) - np.log(flops[span]).mean()
    bands, exponents = [], []
    for best, values in zip(estimates, drawn, strict=True):
        bands.append(band(best, values, level, method))
        slopes = [np.log(v[:, span]) @ away / (away @ away) for v in (best[None], values)]
        exponents.append(band(slopes[0], slopes[1][:, None], level, method).at(0))
    undefined = float(np.isnan(drawn[0]).any(axis=1).mean()) if len(theta) else 0.0
    n, d, loss = bands
    a, b, c = exponents
    return LawSplit(flops, n, d, loss, a, b, c, undefined, len(inside) - 1)


def parameter_vectors(fit: Fit, replicas: int | Bootstrap) -> tuple[Array, str]:
    """Return bootstrap parameters, (B, P), and the method; none without degrees of freedom."""
    if isinstance(replicas, int):
        if fit.degrees < 1 or replicas < 1:
            return np.empty((0, len(fit.optimum.law))), "none"
        replicas = bootstrap(fit, replicas)
    return replicas.theta, replicas.method


def band(estimate: Array, values: Array, level: float, method: str) -> Band:
    """Return percentiles over the finite rows of ``values``, (B, G)."""
    good = values[np.isfinite(values).all(axis=1)]
    if not len(good):
        none = np.full(np.shape(estimate), np.nan)
        return Band(estimate, none, none, level, "none")
    low, high = np.quantile(good, [0.5 - level / 2, 0.5 + level / 2], axis=0)
    return Band(estimate, low, high, level, method)
