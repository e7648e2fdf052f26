"""The points that a law is fitted to, read from a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from tinygpt.config import ConfigError
from tinygpt.scaling.laws import Array, Derivatives, Law, Rows


@dataclass(frozen=True)
class Points:
    """What a law is fitted to: log variables about their centres, log losses."""

    x: dict[str, Array]  # by variable of the law, (n,)
    y: Array  # (n,), or (B, n) for a batch of different losses
    centres: dict[str, float]
    raw: bool = False  # whether residuals are those of the loss itself, not of its logarithm

    @property
    def response(self) -> Array:
        """What residuals are differences of, shaped as ``y``: log losses, or losses."""
        return np.exp(self.y) if self.raw else self.y

    def residuals(self, law: Law, theta: Array) -> Array:
        """Return measured - fitted, (n,), for one parameter vector."""
        fitted = law.log_loss(theta[None], self.x)[0]
        found: Array = self.response - (np.exp(fitted) if self.raw else fitted)
        return found

    def derivatives(self, law: Law, theta: Array) -> Derivatives:
        """Return those of the fitted response at these points, for (B, P) parameters."""
        found = law.derivatives(theta, self.x, self.places)
        if not self.raw:
            return found
        value, slope = np.exp(found.value), found.gradient

        def curvature(weights: Array) -> Array:
            outer = np.swapaxes(slope * (weights * value)[..., None], 1, 2) @ slope
            return found.curvature(weights * value) + outer

        return Derivatives(value, slope * value[..., None], curvature)

    @cached_property
    def places(self) -> tuple[Rows, Rows]:
        """The first row at each distinct place, (m,), and which of these each row is at, (n,)."""
        every = np.stack(list(self.x.values()), axis=1)
        _, first, which = np.unique(every, axis=0, return_index=True, return_inverse=True)
        return first, which.reshape(-1)

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
    ) -> Points:
        """Raises ConfigError for a column that is absent, values no law can take, too few rows."""
        x, centres = {}, {}
        for variable in law.variables:
            values = positive(table, columns[variable.removeprefix("log ")])
            logs = np.log(values)
            if variable.startswith("log "):
                if values.min() <= 1:
                    raise ConfigError(f"{law.name}: needs {columns[variable[4:]]} above 1")
                logs = np.log(logs)
            if np.ptp(logs) == 0:
                name = columns[variable.removeprefix("log ")]
                raise ConfigError(f"{name}: is {values[0]:g} in every run; {law.name} varies it")
            centres[variable] = float(logs.mean())
            x[variable] = logs
        shared = centres["D"] if "U" in centres else 0.0
        if "U" in centres:  # unique and all tokens are counted in one unit
            centres["U"] = shared
        x = {name: logs - centres[name] for name, logs in x.items()}
        points = cls(x, np.log(positive(table, loss)), centres, raw)
        distinct = len({tuple(row) for row in np.stack(list(x.values()), axis=1).round(12)})
        if distinct < len(law):
            raise ConfigError(
                f"{law.name}: {law.formula} has {len(law)} parameters and needs at least as many "
                f"different points; these {len(points)} runs are {distinct}"
            )
        return points

    def with_losses(self, y: Array) -> Points:
        """Other log losses, (B, n), at the same places."""
        return replace(self, y=y)

    def at(self, values: Mapping[str, Any]) -> dict[str, Array]:
        """New values of the variables, as the law wants them."""
        found = {}
        for name, centre in self.centres.items():
            logs = np.log(np.atleast_1d(np.asarray(values[name.removeprefix("log ")], dtype=float)))
            found[name] = (np.log(logs) if name.startswith("log ") else logs) - centre
        size = max(len(logs) for logs in found.values())
        return {name: np.broadcast_to(logs, size) for name, logs in found.items()}


def positive(table: pd.DataFrame, column: str) -> Array:
    """A column as numbers, (n,).  Raises ConfigError where it is absent or a value is not."""
    if column not in table:
        raise ConfigError(f"{column}: no such column; there are {', '.join(map(str, table))}")
    values = pd.to_numeric(table[column], errors="coerce").to_numpy(dtype=float)
    bad = ~(np.isfinite(values) & (values > 0))
    if bad.any():
        where = table.index[bad][0]
        raise ConfigError(
            f"{column}={table[column][where]}: row {where}: must be above zero; "
            "where= leaves rows out"
        )
    return values
