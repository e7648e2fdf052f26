"""Choose runs one after the other, each for what it tells of a loss beyond them, per unit of cost.

Before any run, the log loss at a place is Gaussian: a law whose parameters are uncertain, several
laws where the runs cannot tell them apart, and what every law leaves, which is alike at places
that are near.  A run measures it with the noise of its seed.  How much a further run would narrow
the prediction at the target then follows in closed form, before its loss is known; so several can
be chosen at once (Li et al. 2026, arXiv:2604.22753, choose by the law's part of it alone).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tinygpt.config import ConfigError
from tinygpt.scaling.forecast import Forecast, Sample, forecast
from tinygpt.scaling.laws import BUILT_IN, LAWS, Array, Law, check

LAW_SPREAD = 0.5  # standard deviation of a law's parameters, logarithms and exponents, at first
LEFT = 0.1  # standard deviation of what a law leaves of log L far from any run
ALIKE = 1.5  # in the logarithm of each variable: so far apart, what is left has little in common
NOISE = 0.003  # standard deviation of log L between seeds, where nothing is known
FEWEST = 9  # runs, of the cheapest that tell most, before any law is fitted
OFTEN = 30  # up to so many runs each is followed by new fits; beyond, each 10 % more
KNOWN = 0.01  # weight from which a member counts
POWER = 0.5  # of the cost: an expensive run may pay by improving later choices


@dataclass
class Design:
    """Hold the runs that can be made, those that were, and what is to be predicted.

    ``candidates`` has a row for each run that can be made, a second seed included, and a column
    for each variable; ``target`` the same columns for the places to predict.  Of each candidate,
    (n,): ``cost``, which may change; ``size``, what orders the runs, as their FLOPs; ``noise``,
    the standard deviation of log L between seeds.
    ``laws`` are names in ``tinygpt.scaling.LAWS``, or laws of your own, of any variables.  Raises
    ConfigError for one of these that cannot be fitted.
    """

    candidates: pd.DataFrame
    target: pd.DataFrame
    cost: Array
    size: Array
    laws: Sequence[str | Law]
    noise: Array | float = NOISE
    seed: int = 0
    trunks: NDArray[Any] | None = None  # candidates of a trunk share its luck, (n,)
    losses: dict[int, float] = field(default_factory=dict)  # of the runs made, in their order
    forecast: Forecast | None = None  # by these runs, fitted when it pays
    names: list[str] = field(init=False)  # of the laws
    _fitted: int = 0
    _covariance: Array | None = None

    def __post_init__(self) -> None:
        self.names = [law if isinstance(law, str) else law.name for law in self.laws]
        for law in self.laws:
            if isinstance(law, Law) and LAWS.get(law.name) is not law:
                if law.name in BUILT_IN:
                    raise ConfigError(f"law {law.name}: is one of tinygpt's own; rename yours")
                check(law)
                LAWS[law.name] = law

    def tell(self, row: int, loss: float) -> None:
        """Note the loss of a candidate, nats or any other positive number."""
        self.losses[row] = loss

    def expect(self, pending: Sequence[int] = ()) -> tuple[Array, float]:
        """Return how much one more run of each candidate would take from the variance of the log
        loss at the target, (n,), and that variance; means over the target's places.

        ``pending`` runs count as made: what they tell, but for their losses, is known.
        """
        known = len(self.losses)
        if known > self._fitted and (known <= OFTEN or known > 1.1 * self._fitted):
            self.fit()
        everywhere, count = self._prior(), len(self.candidates)
        made = [*self.losses, *pending]
        noise = np.broadcast_to(np.asarray(self.noise, dtype=float), (count,)) ** 2
        seen = everywhere[np.ix_(made, made)] + np.diag(noise[made])
        along = everywhere[made]
        left = everywhere - along.T @ np.linalg.solve(seen, along)
        gain = np.mean(left[:count, count:] ** 2, axis=1)
        gain = gain / (np.maximum(np.diagonal(left)[:count], 0.0) + noise)
        gain[made] = 0.0
        return np.asarray(gain), float(np.mean(np.diagonal(left)[count:]))

    def next(
        self, affordable: NDArray[np.bool_], pending: Sequence[int] = ()
    ) -> tuple[int, float] | None:
        """Return the row of the affordable run that narrows the prediction most for its cost, and
        the part of the variance that it should take away; None where none is left."""
        gain, now = self.expect(pending)
        worth = np.where(affordable, gain / self.cost**POWER, 0.0)
        best = int(np.argmax(worth >= (1 - 1e-9) * worth.max()))  # the first of equal ones
        return (best, float(gain[best] / now)) if worth[best] > 0 else None

    def sample(self) -> Sample:
        """Return the runs made so far, for a forecast."""
        rows = list(self.losses)
        table = self.candidates.iloc[rows].reset_index(drop=True)
        table["loss"] = list(self.losses.values())
        columns = {name: name for name in self.target.columns}
        groups = table.groupby(list(columns)).ngroup().to_numpy()
        trunks = None if self.trunks is None else self.trunks[rows]
        size = self.size[rows]
        return Sample(table, self.names, columns, "loss", size, groups, self.seed, trunks)

    def fit(self) -> Forecast | None:
        """Fit the forecast to the runs made so far and return it; None of too few."""
        self._fitted, self._covariance = len(self.losses), None
        if len(self.losses) >= FEWEST:
            try:
                self.forecast = forecast(self.sample())
            except ConfigError:
                self.forecast = None
        return self.forecast

    def _prior(self) -> Array:
        """Return the covariance of the log loss at the candidates, then the targets."""
        if self._covariance is None:
            places = pd.concat([self.candidates[self.target.columns], self.target])
            logs = np.log(places.to_numpy(dtype=float)) / ALIKE
            apart = np.sum((logs[:, None] - logs[None]) ** 2, axis=2)
            self._covariance = LEFT**2 * np.exp(-apart / 2)
            values = {str(name): places[name].to_numpy(dtype=float) for name in places}
            for weight, value, slopes in self._laws(values):
                spread = LAW_SPREAD * slopes
                self._covariance += weight * (spread @ spread.T + np.outer(value, value))
        return self._covariance

    def _laws(self, values: Mapping[str, Array]) -> Iterator[tuple[float, Array, Array]]:
        """Yield the weight of each law, by how much it differs from their mean, and its slopes."""
        if self.forecast is None:
            for name in self.names:
                slopes = _usual(LAWS[name], values)
                yield 1 / len(self.names), np.zeros(len(slopes)), slopes
            return
        pairs = zip(self.forecast.weights, self.forecast.members, strict=True)
        members = [(weight, member) for weight, member in pairs if weight > KNOWN]
        total = sum(weight for weight, _ in members)
        each = [member.log_loss(values) for _, member in members]
        mean = sum(w / total * value for (w, _), value in zip(members, each, strict=True))
        for (weight, member), value in zip(members, each, strict=True):
            x = member.points.at(values)
            slopes = LAWS[member.law].derivatives(member.theta[None], x)[1][0]
            yield weight / total, value - mean, slopes


def _usual(law: Law, values: Mapping[str, Array]) -> Array:
    """Return the slopes of a law with usual parameters, (n, P), where none is known yet: terms of
    equal size amid the places, exponents of a third."""
    logs = {name: np.log(value) for name, value in values.items()}
    unit = {**logs, "U": logs["D"]} if "U" in logs else logs  # both kinds of tokens have one unit
    x = {name: value - unit[name].mean() for name, value in logs.items()}
    theta = np.array([0.0] * len(law.coefficients) + [1 / 3] * len(law.exponents))
    for name, (low, high) in law.bounds.items():
        if name in law.exponents:
            theta[law.parameters.index(name)] = np.clip(1.0, low, high)
    slopes: Array = law.derivatives(theta[None], x)[1][0]
    return slopes


@dataclass(frozen=True)
class Spent:
    """Hold the runs that were chosen within a budget, in their order, and what they predict."""

    rows: list[int]
    cost: float
    predicted: Array  # loss at each place of the target
    half_widths: Array  # of the 95 % intervals of its log


def spend(design: Design, budget: float, run: Callable[[int], float]) -> Spent:
    """Choose candidates one after the other until none fits in the budget, and predict the target.

    ``run`` is given the row of a candidate and returns its loss: it trains it, or looks it up.
    Raises ConfigError where the budget is too small for any law.
    """
    spent, rows = 0.0, list[int]()
    while (found := design.next(spent + design.cost <= budget)) is not None:
        row, _ = found
        design.tell(row, run(row))
        spent += design.cost[row]
        rows.append(row)
    made = design.fit()
    if made is None:
        raise ConfigError(f"a budget of {budget:.3g} pays for {len(rows)} runs, too few for a law")
    places = {str(name): design.target[name].to_numpy(dtype=float) for name in design.target}
    log_loss, half = made.at(places, np.full(len(design.target), design.size[rows].max()))
    return Spent(rows, spent, np.exp(log_loss), half)
