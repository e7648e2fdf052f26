"""The points that a law is fitted to, read from a table."""

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
    """Hold what a law is fitted to: log variables about their centres, log losses."""

    x: dict[str, Array]  # by variable of the law, (n,)
    y: Array  # (n,)
    centres: dict[str, float]
    raw: bool = False  # whether residuals are those of the loss itself, not of its logarithm
    weights: Array | None = None  # multiply residuals, (n,): roots of relative precisions

    @property
    def response(self) -> Array:
        """Return what residuals are differences of, (n,): log losses, or losses."""
        return np.exp(self.y) if self.raw else self.y

    def residuals(self, law: Law, theta: Array) -> Array:
        """Return measured - fitted, weighted, (n,), for one parameter vector."""
        fitted = law.log_loss(theta[None], self.x)[0]
        left = np.asarray(self.response - (np.exp(fitted) if self.raw else fitted))
        return left if self.weights is None else left * self.weights

    def derivatives(self, law: Law, theta: Array) -> tuple[Array, Array]:
        """Return the fitted response, (B, n), and its gradient in the parameters, (B, n, P)."""
        value, gradient = law.derivatives(theta, self.x)
        if not self.raw:
            return value, gradient
        loss: Array = np.exp(value)
        return loss, gradient * loss[..., None]

    def jacobian(self, law: Law, theta: Array) -> Array:
        """Return the gradient of the fitted response at each point, weighted, (n, P)."""
        found = np.asarray(self.derivatives(law, theta[None])[1][0])
        return found if self.weights is None else found * self.weights[:, None]

    def rows(self, which: Any) -> Points:
        """Return the points at some rows, with the same centres."""
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
        """Read the points of a law.

        Raises ConfigError for a column that is absent, values no law can take, too few rows.
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
            if np.ptp(x[variable]) == 0 and variable != "U":  # one text, read more or less often
                raise ConfigError(f"{name}: is {values[0]:g} in every run; {law.name} varies it")
            centres[variable] = float(x[variable].mean())
        if "U" in centres:  # unique and all tokens are counted in one unit
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
        """Return new values of the variables, (n,) or one for all, as the law wants them."""
        found = {}
        for name, centre in self.centres.items():
            logs = np.log(np.atleast_1d(np.asarray(values[name.removeprefix("log ")], dtype=float)))
            found[name] = (np.log(logs) if name.startswith("log ") else logs) - centre
        return dict(zip(found, np.broadcast_arrays(*found.values()), strict=True))


def positive(table: pd.DataFrame, column: str) -> Array:
    """Return a column as numbers, (n,).  Raises ConfigError where it is absent or a value is not
    above zero."""
    if column not in table:
        raise ConfigError(f"{column}: no such column; there are {', '.join(map(str, table))}")
    values = pd.to_numeric(table[column], errors="coerce").to_numpy(dtype=float)
    bad = ~(np.isfinite(values) & (values > 0))
    if bad.any():
        row = table.index[bad][0]
        value = f"{column}={table[column][row]}"
        raise ConfigError(f"{value}: row {row}: must be above zero; where= leaves rows out")
    return values
