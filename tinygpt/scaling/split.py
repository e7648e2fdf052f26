"""The best split of a budget between size and data by a law of the loss.

In closed form where the law is a sum of powers and C = 6·N·D, else numerically: another law, or
FLOPs per token as the runs recorded them.  Sizes N are parameters, tokens D, budgets C FLOPs.
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
FURTHER = 10.0  # times the largest budget that was run: so far the bands go
REACH = np.log(1e4)  # the best size is looked for within this factor of those that were run
PLACES = (32, 9, 9)  # in log N that are tried, each time about the best before
ROUNDS = 6  # of a parabola through three places, each time closer together
AT_ONCE = 30_000  # places that are tried together: what a cache holds


def six_n(n: Array) -> Array:
    """Return 6 FLOPs a parameter and token: the rule of thumb."""
    return 6.0 * n


def flops_per_token(n: Array, d: Array, flops: Array) -> FlopsPerToken:
    """Return FLOPs per token by size, from runs of N, D and FLOPs, (n,) each: log means at a size.

    Between sizes a monotone cubic in logarithms (corners would draw the best size to them),
    beyond them the slope over the last factor of 2 in N.  Runs that say 6·N give the rule of
    thumb itself, and with it the closed forms.
    """
    per_token = flops / d
    if np.allclose(per_token, 6.0 * n, rtol=1e-9, atol=0.0):
        return six_n
    sizes, logs = by_size(n, np.log(per_token))
    inner = PchipInterpolator(sizes, logs) if len(sizes) > 1 else lambda x: logs[0] + 0.0 * x
    slopes = [1.0, 1.0]  # of one size, as in 6·N
    # else from each end to the next size that is a factor of 2 away, or to the last
    for side, (x, y) in enumerate(((sizes, logs), (sizes[::-1], logs[::-1]))):
        if len(x) > 1:
            far = np.flatnonzero(np.abs(x - x[0]) >= np.log(2) * (1 - 1e-9))
            other = far[0] if len(far) else -1
            slopes[side] = float((y[other] - y[0]) / (x[other] - x[0]))

    def at(size: Array) -> Array:
        x = np.log(size)
        inside = np.clip(x, sizes[0], sizes[-1])
        beyond = np.where(x < inside, *slopes) * (x - inside)
        return np.asarray(np.exp(inner(inside) + beyond))

    return at


def recorded(fit: Fit, compute: Array) -> FlopsPerToken:
    """Return the FLOPs per token of the runs of a fit, whose compute is ``compute``, (n,)."""
    n, d = (fit.table[fit.columns[name]].to_numpy(dtype=float) for name in "ND")
    return flops_per_token(n, d, compute)


# --- the best split by a law


def closed_form(a: Any, b: Any, alpha: Any, beta: Any, flops: Any) -> tuple[Array, Array]:
    """Return N and D that make A/N^alpha + B/D^beta least with 6·N·D = ``flops``; arrays broadcast.

    Hoffmann et al. 2022, eq. 4: N = G (C/6)^(beta/(alpha+beta)), D = C/(6 N),
    G = (alpha A / (beta B))^(1/(alpha+beta)).
    """
    g = (np.log(alpha * a) - np.log(beta * b)) / (alpha + beta)
    n = np.exp(g + beta / (alpha + beta) * np.log(np.asarray(flops) / 6))
    return n, flops / 6 / n


def best_split(
    fit: Fit, flops: float, per_token: FlopsPerToken = six_n, unique: float = np.inf
) -> tuple[float, float]:
    """Return N and D of the least loss for ``flops``.

    ``per_token`` says what a token costs at a size; ``unique`` how many tokens there are before
    they repeat, for a law that knows of it.  Raises ConfigError where the law has no best split.
    """
    n, d, _ = best_splits(fit, np.array([flops]), per_token, unique)
    return float(n[0]), float(d[0])


def best_splits(
    fit: Fit, flops: Array, per_token: FlopsPerToken, unique: float
) -> tuple[Array, Array, Array]:
    """Return N, D and L of the fitted law, (G,) each.  Raises ConfigError where it has no best
    split."""
    law = fit.optimum.law
    left = set(law.variables) if law.powers is None else set[str]().union(*law.powers.values())
    if missing := {"N", "D"} - left:
        gone = " and ".join(sorted(missing))
        raise ConfigError(f"law={fit.law.name}: as fitted it has no {gone}, and so no best split")
    n, d, loss = splits(fit, fit.optimum.theta[None], flops, per_token, unique)
    if np.isnan(n).any():
        raise ConfigError(
            f"law={fit.law.name}: as fitted the loss has no minimum in N about the sizes that were "
            "run, and so no best split"
        )
    return n[0], d[0], loss[0]


def splits(
    fit: Fit, theta: Array, flops: Array, per_token: FlopsPerToken, unique: float
) -> tuple[Array, Array, Array]:
    """Return N, D and L for parameter vectors (B, P) at budgets (G,), each (B, G); nan: no
    minimum."""
    law = fit.optimum.law
    powers = {name: of for name, of in (law.powers or {}).items() if of}
    with np.errstate(invalid="ignore"):  # exponents below zero: no minimum
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
    """Return the variables as the law wants them, (B, n) each."""
    logs = {"N": log_n, "D": log_d, "U": np.minimum(log_d, np.log(unique))}
    return {name: logs[name] - centre for name, centre in fit.points.centres.items()}


def _best_size(
    fit: Fit, theta: Array, flops: Array, per_token: FlopsPerToken, unique: float
) -> Array:
    """Return log N of the least loss, (B, G): by ever finer grids, then by parabolas."""
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
    """A quantity along the budgets, (G,) each; the ends are nan where nothing sets them."""

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
    """The best split by the law, with percentiles over the replicas of a bootstrap over runs.

    The exponents are slopes of log N, log D and log L against log C over the budgets that were
    run: under C = 6·N·D those of N and D are beta/(alpha+beta) and alpha/(alpha+beta) everywhere.
    """

    flops: Array  # (G,)
    n: Band
    d: Band
    loss: Band
    a: Interval  # N ~ C^a
    b: Interval  # D ~ C^b
    c: Interval  # L ~ C^c, with the irreducible loss in L
    undefined: float  # share of the replicas whose law has no best split at some budget
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

    ``compute`` is that of each run of the fit, (n,); ``per_token`` by default as they recorded
    it.  A fit without degrees of freedom gets no bands.  Raises ConfigError as ``best_split``.
    """
    per_token = per_token or recorded(fit, compute)
    inside = np.geomspace(compute.min(), compute.max(), 33 if np.ptp(compute) > 0 else 1)
    flops = np.append(inside, compute.max() * np.geomspace(1.0, FURTHER, 12)[1:])
    theta, method = parameter_vectors(fit, replicas)
    one = best_splits(fit, flops, per_token, unique)
    many = splits(fit, theta, flops, per_token, unique)
    span = slice(len(inside)) if len(inside) > 1 else slice(None)
    away = np.log(flops[span]) - np.log(flops[span]).mean()
    bands, exponents = [], []
    for best, values in zip(one, many, strict=True):
        bands.append(band(best, values, level, method))
        slopes = [np.log(v[:, span]) @ away / (away @ away) for v in (best[None], values)]
        exponents.append(band(slopes[0], slopes[1][:, None], level, method).at(0))
    undefined = float(np.isnan(many[0]).any(axis=1).mean()) if len(theta) else 0.0
    n, d, loss = bands
    a, b, c = exponents
    return LawSplit(flops, n, d, loss, a, b, c, undefined, len(inside) - 1)


def parameter_vectors(fit: Fit, replicas: int | Bootstrap) -> tuple[Array, str]:
    """Return those of a bootstrap over runs, (B, P), and its name; none without degrees of
    freedom."""
    if isinstance(replicas, int):
        if fit.degrees < 1 or replicas < 1:
            return np.empty((0, len(fit.optimum.law))), "none"
        replicas = bootstrap(fit, replicas)
    return replicas.theta, replicas.method


def band(estimate: Array, values: Array, level: float, method: str) -> Band:
    """Return percentiles of the rows of ``values``, (B, G), that have a number."""
    good = values[np.isfinite(values).all(axis=1)]
    if not len(good):
        none = np.full(np.shape(estimate), np.nan)
        return Band(estimate, none, none, level, "none")
    low, high = np.quantile(good, [0.5 - level / 2, 0.5 + level / 2], axis=0)
    return Band(estimate, low, high, level, method)
