"""Read the points that a law is fitted to from a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from tinygpt.config import ConfigError
from tinygpt.scaling.laws import Array, Law


@dataclass(frozen=True)
class Points:
    """Hold the centred log variables and the log losses that a law is fitted to."""

    x: dict[str, Array]  # by variable of the law, (n,)
    y: Array  # (n,)
    centres: dict[str, float]
    raw: bool = False  # take residuals of the loss itself, not of its logarithm
    weights: Array | None = None  # factors of the residuals, (n,): roots of relative precisions

    @property
    def response(self) -> Array:
        """Return the measured log losses, or losses if `raw`, (n,)."""
        return np.exp(self.y) if self.raw else self.y

    def residuals(self, law: Law, theta: Array) -> Array:
        """Return measured - fitted, weighted, (n,), for one parameter vector."""
        fitted = law.log_loss(theta[None], self.x)[0]
        residuals = np.asarray(self.response - (np.exp(fitted) if self.raw else fitted))
        return residuals if self.weights is None else residuals * self.weights

    def derivatives(self, law: Law, theta: Array) -> tuple[Array, Array]:
        """Return the fitted response, (B, n), and its gradient in the parameters, (B, n, P)."""
        value, gradient = law.derivatives(theta, self.x)
        if not self.raw:
            return value, gradient
        return np.exp(value), gradient * np.exp(value)[..., None]

    def jacobian(self, law: Law, theta: Array) -> Array:
        """Return the gradient of the fitted response at each point, weighted, (n, P)."""
        gradient = np.asarray(self.derivatives(law, theta[None])[1][0])
        return gradient if self.weights is None else gradient * self.weights[:, None]

    def rows(self, which: Any) -> Points:
        """Return the selected points, with the same centres."""
        weights = None if self.weights is None else self.weights[which]
        x = {name: logs[which] for name, logs in self.x.items()}
        return replace(self, x=x, y=self.y[which], weights=weights)

    def __len__(self) -> int:
        return int(self.y.shape[-1])

    @classmethod
    def read(
        cls,
        table: pd.DataFrame,
        law: Law,
        columns: Mapping[str, str],
        loss: str,
        raw: bool = False,
        weights: Array | None = None,
    ) -> Points:
        """Read the points of a law from a table.

        Raises ConfigError for an absent column, invalid values, or too few distinct points.
        """
        x, centres = {}, {}
        for variable in law.variables:
            name = columns[variable.removeprefix("log ")]
            values = positive(table, name)
            x[variable] = np.log(values)
            if variable.startswith("log "):
                if values.min() <= 1:
                    raise ConfigError(f"{law.name}: needs {name} above 1")
                x[variable] = np.log(x[variable])
            if np.ptp(x[variable]) == 0 and variable != "U":  # a corpus may be repeated
                raise ConfigError(f"{name}: is {values[0]:g} in every run; {law.name} varies it")
            centres[variable] = float(x[variable].mean())
        if "U" in centres:  # D and U share a unit
            centres["U"] = centres["D"]
        x = {name: logs - centres[name] for name, logs in x.items()}
        points = cls(x, np.log(positive(table, loss)), centres, raw, weights)
        distinct = len({tuple(row) for row in np.stack(list(x.values()), axis=1).round(12)})
        if distinct < len(law):
            raise ConfigError(
                f"{law.name}: {law.formula} has {len(law)} parameters and needs at least as many "
                f"different points; these {len(points)} runs are {distinct}"
            )
        return points

    def at(self, values: Mapping[str, Any]) -> dict[str, Array]:
        """Return values of the variables, (n,) or scalars, as the centred logs a law takes."""
        x = {}
        for name, centre in self.centres.items():
            logs = np.log(np.atleast_1d(np.asarray(values[name.removeprefix("log ")], dtype=float)))
            x[name] = (np.log(logs) if name.startswith("log ") else logs) - centre
        return dict(zip(x, np.broadcast_arrays(*x.values()), strict=True))


def positive(table: pd.DataFrame, column: str) -> Array:
    """Return a column as floats, (n,).  Raises ConfigError if it is absent or not all positive."""
    if column not in table:
        raise ConfigError(f"{column}: no such column; there are {', '.join(map(str, table))}")
    values = pd.to_numeric(table[column], errors="coerce").to_numpy(dtype=float)
    bad = ~(np.isfinite(values) & (values > 0))
    if bad.any():
        row = table.index[bad][0]
        raise ConfigError(
            f"{column}={table[column][row]}: row {row}: must be above zero; where= leaves rows out"
        )
    return values
