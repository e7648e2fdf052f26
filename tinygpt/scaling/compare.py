"""Estimate what one recipe is worth against another: the compute that it saves at equal loss.

One law is fitted to the runs of both.  The other recipe does with its tokens, its parameters, or
both, what the reference does with m times as many, such as L(N, D) = L_ref(N, m D).  With
m = exp(u) C^v the reference needs m(C) times the compute to reach the loss that the other reaches
with C, each at its best split, and the exponents of their losses in compute have the ratio 1 + v.

Errors that the two share at a place, such as a misfit of the law, cancel in this ratio, so its
error comes from a jackknife that leaves out a place under both recipes.  Neither the form of the
law nor the place of the gain is known, so the ratio is an average over both by Akaike weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import optimize, special

from tinygpt.config import ConfigError
from tinygpt.scaling.fitting import ROUGH
from tinygpt.scaling.intervals import LEVEL, Interval
from tinygpt.scaling.laws import LAWS, Array, Law
from tinygpt.scaling.noise import Seeds
from tinygpt.scaling.points import Points
from tinygpt.scaling.solver import solve, starts_of

LAWS_TRIED = ("chinchilla", "coupled", "kaplan_constant")
OF_ONE = ("power_constant", "log_power")  # in one variable
GAINS = ("tokens", "size", "free")  # where the gain of a law in N and D lies; free means in both
STARTS = (-0.4, 0.4)  # of u
LEAST_LEFT = 0.05  # least value of 1 - leverage in the jackknife
STEP = 1e-5  # in a log variable, of a finite difference
FEWEST_LEFT = 3  # degrees of freedom
POWER = 0.8  # of the test that defines the smallest detectable ratio
FURTHEST = 12.0  # in log tokens: a loss that takes more is out of reach
MARGIN = 1.5  # in logs: simulated studies, with law and noise unknown, detected so much less
TYPICAL = (0.6, 0.2, 0.2, 0.35, 0.4)  # law of a plan: fractions of the loss E, A, B; exponents
Estimate = tuple[float, float, float]  # a value, its error, the degrees of freedom


def shifted(base: Law, gain: str) -> Law:
    """Return the law of both recipes: ``base`` with the gain of the other as parameters u and v.

    Its additional variables are ``other``, 1 for the other recipe and 0 for the reference, and
    ``scale``, the centred log compute.  A ``free`` gain has a parameter q, its part in N.
    """
    main = "N" if gain == "size" else base.variables[-1]
    own = ("q", "u", "v") if gain == "free" else ("u", "v")

    def slopes(p: Mapping[str, Any], x: Mapping[str, Array]) -> tuple[Any, dict[str, Any]]:
        theta = np.concatenate([p[name] for name in base.parameters], axis=-1)
        share = p["q"] if gain == "free" else 0.0
        at = {name: x[name] for name in base.variables}
        at[main] = at[main] + x["other"] * (p["u"] + p["v"] * x["scale"] - share)
        at |= {"N": at["N"] + x["other"] * share} if gain == "free" else {}

        def slope(name: str) -> Any:
            up, down = (base.log_loss(theta, {**at, name: at[name] + by}) for by in (STEP, -STEP))
            return x["other"] * (up - down) / (2 * STEP)

        value, gradient = base.derivatives(theta, at)
        found = {name: gradient[..., j] for j, name in enumerate(base.parameters)}
        by_u = slope(main)
        found |= {"u": by_u, "v": by_u * x["scale"]}
        return value, found | ({"q": slope("N") - by_u} if gain == "free" else {})

    return replace(
        base,
        variables=(*base.variables, "other", "scale"),
        exponents=(*base.exponents, *own),
        powers=None,
        slopes=slopes,
    )


@dataclass(frozen=True)
class Model:
    """Hold one form of the law, with one place of the gain, fitted to the runs of both recipes."""

    base: Law
    gain: str
    law: Law
    theta: Array  # (P,), u and v last
    residuals: Array  # weighted, (n,)
    jacobian: Array  # weighted, (n, P)
    groups: NDArray[np.intp]  # the place of each row, (n,)

    @cached_property
    def moves(self) -> Array:
        """Return how the parameters change, to first order, without each place, (G, P)."""
        size = np.sqrt(np.sum(self.jacobian**2, axis=0))
        size = np.where(size > 0, size, 1.0)
        unit = self.jacobian / size
        solve_for = np.linalg.pinv(unit)  # (P, n)
        found = []
        for group in range(int(self.groups.max()) + 1):
            rows = self.groups == group
            own, along = np.linalg.eigh(np.eye(int(rows.sum())) - unit[rows] @ solve_for[:, rows])
            left = along @ (along.T @ self.residuals[rows] / np.maximum(own, LEAST_LEFT))
            found.append(solve_for[:, rows] @ left / size)
        return np.array(found)

    @property
    def degrees(self) -> int:
        """Return the degrees of freedom, where a pair counts for its difference only."""
        n, places = len(self.residuals), int(self.groups.max()) + 1
        return n - len(self.theta) - max(0, n - places - len(self.base))

    def error(self, contrast: Array) -> float:
        """Return the standard error of a combination of parameters by a jackknife over places."""
        count = len(self.moves)
        return float(np.sqrt((count - 1) / count * np.sum((self.moves @ contrast) ** 2)))

    def fitted(self, x: Mapping[str, Array]) -> Array:
        """Predict the log loss at centred log variables, (n,)."""
        return np.asarray(self.law.log_loss(self.theta[None], x)[0])

    def estimate(self, u: float, v: float) -> Estimate:
        """Estimate a combination of the gain's parameters: (1, s) is the log ratio at a centred log
        compute of s, (0, 1) its slope."""
        contrast = np.r_[np.zeros(len(self.theta) - 2), u, v]
        return float(contrast @ self.theta), self.error(contrast), self.degrees

    def tokens(self, at: Mapping[str, float], scale: float) -> Estimate:
        """Estimate the log ratio of the tokens that the reference needs, at the same size, for the
        loss of the other at a place."""
        steps = np.vstack([np.zeros(len(self.theta)), 1e-4 * np.eye(len(self.theta))])
        theta = self.theta + steps
        place = {name: np.full((len(theta), 1), value) for name, value in at.items()}
        one, bare = np.ones((len(theta), 1)), theta[:, : len(self.base)]
        aim = self.law.log_loss(theta, {**place, "other": one, "scale": scale * one})
        low, high = -FURTHEST * one, FURTHEST * one
        for _ in range(50):
            middle = (low + high) / 2
            above = self.base.log_loss(bare, {**place, "D": place["D"] + middle}) > aim
            low, high = np.where(above, middle, low), np.where(above, high, middle)
        found = low[:, 0]
        return float(found[0]), self.error((found[1:] - found[0]) / 1e-4), self.degrees


@dataclass(frozen=True)
class Ratio:
    """Hold what one recipe is worth against the reference."""

    models: list[Model]
    weights: Array  # (models,), by Akaike
    centres: Mapping[str, float]  # of the log variables and of the scale
    best_known: float  # the compute (or x) at which the ratio is most certain
    ends: tuple[float, float]  # the smallest and largest compute (or x) of the other's runs
    flops: float  # FLOPs per token of the reference / those of the other, at equal size
    place: Mapping[str, float] | None  # N and D at which tokens are compared
    costs: tuple[Array, Array]  # log N, and log FLOPs per token there
    places: int
    pairs: int  # places that both have
    floor: tuple[float, float]  # log ratio of the other's E to the reference's; p of no difference

    def at(self, compute: float) -> Interval:
        """Return by what factor the reference needs more compute for the loss that the other
        reaches with this much."""
        scale = float(np.log(compute)) - self.centres["scale"]
        made = [one.estimate(1.0, scale) for one in self.models]
        return self._average(made, lambda log_ratio: self.flops * np.exp(log_ratio))

    @property
    def tokens(self) -> Interval | None:
        """Return by what factor the reference needs more tokens at equal size."""
        if self.place is None:
            return None
        at = {v: float(np.log(value)) - self.centres[v] for v, value in self.place.items()}
        scale = float(np.log(self.best_known)) - self.centres["scale"]
        return self._average([one.tokens(at, scale) for one in self.models], np.exp)

    def exponents(self, level: float = LEVEL) -> Interval:
        """Return the other's exponent of compute in the loss, relative to the reference's."""
        made = [one.estimate(0.0, 1.0) for one in self.models]
        return self._average(made, lambda change: 1 + change, level)

    def curve(self, compute: Array, other: bool) -> Array:
        """Return the lowest loss of one recipe at each compute (or x), within the sizes trained."""
        model = self.models[int(np.argmax(self.weights))]
        scale = np.log(compute) - self.centres["scale"]
        x = {"other": np.full(len(compute), float(other)), "scale": scale}
        if self.place is None:
            logs = np.log(compute)
            x |= {"x": logs - self.centres["x"], "log x": np.log(logs) - self.centres["log x"]}
            return np.exp(model.fitted(x))
        each = []
        for size in np.linspace(self.costs[0][0], self.costs[0][-1], 60):
            tokens = np.log(compute) - np.interp(size, *self.costs) - self.centres["D"]
            n = np.full(len(compute), size - self.centres["N"])
            each.append(model.fitted({**x, "N": n, "D": tokens}))
        return np.asarray(np.exp(np.min(each, axis=0)))

    @property
    def shared(self) -> float:
        """Return the correlation of the residuals of the two recipes at a place."""
        return _alike(self.models[int(np.argmax(self.weights))])

    @property
    def detectable(self) -> float:
        """Return the smallest ratio that these runs would tell from 1 four times in five."""
        found = self.at(self.best_known)
        half = np.log(found.high / found.low) / 2
        return float(np.exp(half * (1 + special.ndtri(POWER) / special.ndtri(0.5 + LEVEL / 2))))

    @property
    def differs(self) -> bool:
        """Return whether 1 lies outside the interval of the ratio."""
        return 1.0 not in self.at(self.best_known)

    @property
    def drifts(self) -> bool:
        """Return whether the ratio changes with scale; at 99 % if the ratio itself does not differ
        from 1, because that makes it a second test of recipes that may be equal."""
        return 1.0 not in self.exponents(LEVEL if self.differs else 0.99)

    def _average(
        self, made: Sequence[Estimate], report: Callable[[Array], Array], level: float = LEVEL
    ) -> Interval:
        """Average over the models, with the quantiles of a mixture of Student's t; ``report`` turns
        mean and ends into what is reported."""
        value, error, degrees = np.array(made).T
        error = np.maximum(error, 1e-12)

        def excess(z: float, part: float) -> float:
            return float(self.weights @ special.stdtr(degrees, (z - value) / error)) - part

        reach = np.abs(special.stdtrit(degrees, 0.25 - level / 4)) * error  # beyond either end
        span = float(np.min(value - 2 * reach)), float(np.max(value + 2 * reach))
        parts = 0.5 - level / 2, 0.5 + level / 2
        low, high = (optimize.brentq(excess, *span, args=(part,), xtol=1e-7) for part in parts)
        low, mean, high = report(np.array([low, self.weights @ value, high])).tolist()
        return Interval(mean, low, high, level, "average of laws")


def ratio_of(
    reference: pd.DataFrame,
    other: pd.DataFrame,
    variables: Mapping[str, str],
    loss: str,
    compute: str | None = None,
) -> Ratio:
    """Return what the runs of one recipe are worth against those of the reference.

    ``variables`` are the columns of N and D, or of the x of a law in one variable; ``compute`` is
    the column of FLOPs, by default 6 N D.  Runs that agree in the variables are seeds and are
    averaged.  Raises ConfigError for too few runs.
    """
    both, names = pd.concat({0.0: reference, 1.0: other}), list(variables)
    columns = {**variables, "y": loss, **({"C": compute} if compute else {})}
    runs = pd.DataFrame({name: both[column].to_numpy(float) for name, column in columns.items()})
    runs["other"] = both.index.get_level_values(0).to_numpy(float)
    runs["y"] = np.log(runs["y"])
    scale = "x" if "x" in variables else "C" if compute else None
    runs["scale"] = np.log(runs[scale] if scale else 6 * runs["N"] * runs["D"])
    means = {name: (name, "mean") for name in ("y", "scale")}
    settings = runs.groupby(["other", *names], as_index=False).agg(**means, count=("y", "size"))
    centres = {name: float(np.log(settings[name]).mean()) for name in names}
    centres["scale"] = float(settings["scale"].mean())
    if "x" in names:
        centres["log x"] = float(np.log(np.log(settings["x"])).mean())
    at, each = (_variables(table, centres) for table in (settings, runs))
    groups = np.asarray(settings.groupby(names).ngroup(), dtype=np.intp)
    count = np.sqrt(settings["count"].to_numpy(float))
    laws, gains = (OF_ONE, GAINS[:1]) if "x" in variables else (LAWS_TRIED, GAINS)
    points = Points(at, settings["y"].to_numpy(), {}, weights=count / np.sqrt(np.mean(count**2)))
    if rough := _models(points, groups, laws[:1], GAINS[:1]):
        left = runs["y"].to_numpy() - rough[0].fitted(each)
        words = {
            name: "D" if name == "x" else name for name in names
        }  # scatter depends on length, or on x
        seeds = Seeds.of({words[name]: runs[name].to_numpy() for name in names}, left)
        if seeds is not None:
            weights = count / seeds.at({words[name]: settings[name].to_numpy() for name in names})
            points = replace(points, weights=weights / np.sqrt(np.mean(weights**2)))
    models = _models(points, groups, laws, gains)
    if not models:
        raise ConfigError(
            f"compare: {len(settings)} different settings of both recipes are too few to fit a "
            "law: train each at four places and more"
        )
    weights = _akaike(models)
    top = models[int(np.argmax(weights))]
    is_other = settings["other"] == 1
    gain = top.jacobian[:, -2] ** 2
    middle = float(np.sum(gain * settings["scale"]) / np.sum(gain))
    low, high = settings["scale"][is_other].min(), settings["scale"][is_other].max()
    best_known = float(np.exp(np.clip(middle, low, high)))
    factor, place, costs = 1.0, None, (np.zeros(1), np.zeros(1))
    if "x" not in names:
        factor, costs = _costs(settings)
        size = np.log(settings["N"][is_other]).mean()
        tokens = best_known / np.exp(np.interp(size, *costs))
        place = {"N": float(np.exp(size)), "D": float(tokens)}
    ends = float(np.exp(low)), float(np.exp(high))
    pairs = len(groups) - int(groups.max()) - 1
    found = (models, weights, centres, best_known, ends, factor, place, costs)
    return Ratio(*found, int(is_other.sum()), pairs, _floor(top, at["other"]))


def _variables(table: pd.DataFrame, centres: Mapping[str, float]) -> dict[str, Array]:
    """Return the variables of a law of both recipes, (n,) each, from a table."""
    found = {k: np.log(table[k].to_numpy()) - centres[k] for k in ("N", "D", "x") if k in centres}
    if "x" in found:
        found["log x"] = np.log(np.log(table["x"].to_numpy())) - centres["log x"]
    found["other"] = table["other"].to_numpy()
    found["scale"] = table["scale"].to_numpy() - centres["scale"]
    return found


def _costs(settings: pd.DataFrame) -> tuple[float, tuple[Array, Array]]:
    """Return the ratio of FLOPs per token at equal size, the reference's to the other's, and the
    other's log FLOPs per token by log size."""
    size = np.log(settings["N"])
    per = settings["scale"] - np.log(settings["D"]) - size  # FLOPs of a parameter and token
    each = per.groupby([settings["other"], size]).mean()
    first, other = each[0.0], each[1.0]
    apart = np.interp(other.index, first.index, first) - other
    return float(np.exp(apart.mean())), (other.index.to_numpy(), (other + other.index).to_numpy())


def _models(
    points: Points, groups: NDArray[np.intp], laws: Sequence[str], gains: Sequence[str]
) -> list[Model]:
    """Fit every form with every place of the gain, except those with too many parameters."""
    found = []
    for name in laws:
        base = LAWS[name]
        own = replace(points, x={variable: points.x[variable] for variable in base.variables})
        starts = starts_of(base, replace(own, weights=None), 0)[:16]
        solved = solve(base, own, starts, **ROUGH)
        top = solved.theta[np.argsort(solved.objective)[:2]]
        for gain in gains:
            law = shifted(base, gain)
            if len(points) - len(law) < FEWEST_LEFT:
                continue
            more = np.zeros((len(STARTS), len(top), len(law) - len(base)))
            more[..., -2] = np.array(STARTS)[:, None]
            begin = np.vstack([np.hstack([top, one]) for one in more])
            both = solve(law, points, begin, **ROUGH)
            least = both.theta[[int(np.argmin(both.objective))]]
            theta = solve(law, points, least).theta[0]
            jacobian = points.jacobian(law, theta)
            if np.isfinite(theta).all() and np.abs(jacobian[:, -2:]).max(axis=0).all():
                left = points.residuals(law, theta)
                found.append(Model(base, gain, law, theta, left, jacobian, groups))
    return found


def _akaike(models: Sequence[Model]) -> Array:
    """Return the weights of the models by AICc, given that residuals correlate within pairs."""
    best = min(models, key=lambda one: float(one.residuals @ one.residuals))
    n, pairs = len(best.residuals), best.groups[:, None] == best.groups
    inverse = np.linalg.inv(np.where(pairs, _alike(best), 0.0) + (1 - _alike(best)) * np.eye(n))
    criteria = []
    for one in models:
        k = len(one.theta) + 1
        rest = max(float(one.residuals @ inverse @ one.residuals), 1e-300)
        criteria.append(n * np.log(rest / n) + 2 * k * n / max(n - k - 1, 1))
    weights = np.exp(-(np.array(criteria) - min(criteria)) / 2)
    return np.asarray(weights / weights.sum())


def _alike(model: Model) -> float:
    """Return the correlation of the residuals of the recipes at a place, clipped to ±0.9."""
    pairs = (model.groups[:, None] == model.groups) & ~np.eye(len(model.groups), dtype=bool)
    squares = max(float(model.residuals**2 @ pairs.sum(axis=1)), 1e-300)
    return float(np.clip(model.residuals @ pairs @ model.residuals / squares, -0.9, 0.9))


def _floor(model: Model, other: Array) -> tuple[float, float]:
    """Return the log ratio of the other's E to the reference's, if each had its own, to first
    order, and the p-value of no difference; nan for a law without E."""
    if "E" not in model.law.parameters:
        return np.nan, np.nan
    constant = model.jacobian[:, model.law.parameters.index("E")]
    jacobian = np.column_stack([model.jacobian, other * constant])
    size = np.sqrt(np.sum(jacobian**2, axis=0)) + 1e-300
    step = np.linalg.lstsq(jacobian / size, model.residuals, rcond=None)[0] / size
    own = replace(model, residuals=model.residuals - jacobian @ step, jacobian=jacobian)
    error = own.error(np.eye(len(step))[-1])
    p = 2 * special.stdtr(max(model.degrees - 1, 1), -abs(step[-1]) / max(error, 1e-12))
    return float(step[-1]), float(p)


def plan(n: Array, d: Array, noise: Array | float) -> float:
    """Return the smallest ratio that runs of two recipes, both at these sizes and tokens, would
    tell from 1 four times in five; ``noise`` is the scatter of log L between seeds.

    It assumes a typical law, and a gain in size or tokens.  Raises ConfigError for too few runs.
    """
    places = pd.DataFrame({"N": n, "D": d, "noise": noise}).groupby(["N", "D"], as_index=False)
    one = places.agg(noise=("noise", "mean"), count=("noise", "size"))
    both = pd.concat([one.assign(other=0.0), one.assign(other=1.0)])
    both["scale"] = np.log(both["N"] * both["D"])
    centres = {v: float(np.log(both[v]).mean()) for v in "ND"}
    centres["scale"] = float(both["scale"].mean())
    base = LAWS["chinchilla"]
    sizes, lengths = both["N"].nunique(), both["D"].nunique()
    gain = "free" if min(sizes, lengths) > 1 else "tokens" if lengths > 1 else "size"
    law = shifted(base, gain)
    theta = np.r_[np.log(TYPICAL[:3]), TYPICAL[3:], np.zeros(len(law) - len(base))]
    weights = np.sqrt(both["count"].to_numpy(float)) / both["noise"].to_numpy(float)
    points = Points(_variables(both, centres), np.zeros(len(both)), {}, weights=weights)
    if (degrees := len(both) - len(law)) < FEWEST_LEFT:
        raise ConfigError("too few different runs of each recipe")
    jacobian = points.jacobian(law, theta)
    covariance = np.linalg.pinv(jacobian.T @ jacobian)[-2:, -2:]
    error = np.sqrt(covariance[0, 0] - covariance[0, 1] ** 2 / covariance[1, 1])
    quantiles = special.stdtrit(degrees, [0.5 + LEVEL / 2, POWER])
    return float(np.exp(MARGIN * error * quantiles.sum()))
