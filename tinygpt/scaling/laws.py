"""Define the laws: a table of named forms, each a plain function with its formula and source.

A law gives the log loss (nats per token) of a batch of parameter vectors, (B, P), at n points.
A vector holds coefficients (E, A, B, ...) as logarithms and exponents as they are.  Variables are
divided by their geometric mean beforehand, which ``Law.natural`` undoes.
"""

from __future__ import annotations

import runpy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tinygpt.config import ConfigError, first_line

Array = NDArray[np.float64]
Slopes = tuple[Any, dict[str, Any]]  # a log loss, and its derivative by each named parameter
STEP = 1e-30  # of the complex step, which loses no digits however small it is
VARIABLES = (("x",), ("log x",), ("N", "D"), ("N", "D", "U"))


@dataclass(frozen=True)
class Law:
    """Define a form: a sum of powers, or a function of the parameters and log variables."""

    name: str
    formula: str
    source: str
    variables: tuple[str, ...]
    coefficients: tuple[str, ...]  # positive; the logarithm is the parameter
    exponents: tuple[str, ...]
    # coefficient -> the powers of variables in its unit; E has none
    units: Mapping[str, tuple[tuple[str, str | float], ...]]
    # a sum of powers: coefficient -> {variable: exponent}
    powers: Mapping[str, Mapping[str, str]] | None = None
    # any other law: (parameters, log variables) -> log loss, analytic in the parameters
    expression: Callable[[Mapping[str, Any], Mapping[str, Array]], Any] | None = None
    bounds: Mapping[str, tuple[float, float]] = field(default_factory=dict)  # of plain values
    # replaces the expression, and is several times faster than its complex step
    slopes: Callable[[Mapping[str, Any], Mapping[str, Array]], Slopes] | None = None

    @property
    def parameters(self) -> tuple[str, ...]:
        """Return the names of the coefficients, then those of the exponents."""
        return self.coefficients + self.exponents

    def __len__(self) -> int:
        return len(self.parameters)

    def log_loss(self, theta: Array, x: Mapping[str, Array]) -> Array:
        """Return the log loss, (B, n), at centred log variables ``x``, each (n,) or (B, n)."""
        if self.powers is not None:
            return _total(self.terms(theta, x))[0]
        named = self._named(theta)
        if self.slopes is not None:
            return np.asarray(self.slopes(named, x)[0])
        assert self.expression is not None
        shape = (len(theta), next(iter(x.values())).shape[-1])
        return np.asarray(np.broadcast_to(self.expression(named, x), shape), dtype=float)

    def derivatives(self, theta: Array, x: Mapping[str, Array]) -> tuple[Array, Array]:
        """Return the log loss, (B, n), and its gradient in the parameters, (B, n, P).

        An expression is differentiated by the complex step, which is exact to rounding.
        """
        place = {name: j for j, name in enumerate(self.parameters)}
        if self.slopes is not None:
            value, by_name = self.slopes(self._named(theta), x)
            gradient = np.empty((*value.shape, len(self)))
            for name, j in place.items():
                gradient[..., j] = by_name[name]
            return value, gradient
        if self.powers is None:
            assert self.expression is not None
            value = self.log_loss(theta, x)
            moved = self._named(theta + 1j * STEP * np.eye(len(self))[:, None])  # (P, B, P)
            slopes = np.broadcast_to(self.expression(moved, x), (len(self), *value.shape))
            return value, np.ascontiguousarray(np.moveaxis(slopes.imag / STEP, 0, -1))
        value, shares = _total(self.terms(theta, x))
        gradient = np.zeros((*value.shape, len(self)))
        for (coefficient, powers), share in zip(self.powers.items(), shares, strict=True):
            gradient[..., place[coefficient]] = share
            for variable, exponent in powers.items():
                gradient[..., place[exponent]] -= share * x[variable]
        return value, gradient

    def _named(self, theta: Any) -> dict[str, Any]:
        return {name: theta[..., j : j + 1] for j, name in enumerate(self.parameters)}

    def terms(self, theta: Array, x: Mapping[str, Array]) -> Array:
        """Return the logarithm of each term of a sum of powers, (K, B, n)."""
        assert self.powers is not None
        column = self._named(theta)
        terms = np.empty((len(self.powers), len(theta), next(iter(x.values())).shape[-1]))
        for term, (coefficient, powers) in zip(terms, self.powers.items(), strict=True):
            term[:] = column[coefficient]
            for variable, exponent in powers.items():
                term -= column[exponent] * x[variable]
        return terms

    def shift(self, centres: Mapping[str, float]) -> Array:
        """Return the affine map, (P, P + 1), from a vector for centred variables to a plain one."""
        affine = np.eye(len(self), len(self) + 1)
        for coefficient, unit in self.units.items():
            row = affine[self.parameters.index(coefficient)]
            for variable, power in unit:
                if isinstance(power, str):
                    row[self.parameters.index(power)] += centres[variable]
                else:
                    row[-1] += power * centres[variable]
        return affine

    def plain(self, theta: Array, centres: Mapping[str, float]) -> Array:
        """Return the parameters for plain variables, (..., P), coefficients not as logarithms."""
        affine = self.shift(centres)
        values: Array = theta @ affine[:, :-1].T + affine[:, -1]
        kinds = len(self.coefficients)
        values[..., :kinds] = np.exp(values[..., :kinds])
        return values

    def natural(self, theta: Array, centres: Mapping[str, float]) -> dict[str, float]:
        """Return what ``plain`` returns for one vector, by name."""
        return dict(zip(self.parameters, self.plain(theta, centres).tolist(), strict=True))

    def internal(self, natural: Mapping[str, float], centres: Mapping[str, float]) -> Array:
        """Return the vector of natural parameters, (P,); a coefficient of zero becomes -inf."""
        kinds = len(self.coefficients)
        theta = np.array([natural[name] for name in self.parameters], dtype=float)
        with np.errstate(divide="ignore"):
            theta[:kinds] = np.log(theta[:kinds])
        affine = self.shift(centres)[:kinds]
        theta[:kinds] -= affine[:, kinds:-1] @ theta[kinds:] + affine[:, -1]
        return theta

    def without(self, coefficient: str) -> Law:
        """Return this sum of powers without one term, which has gone to zero."""
        assert self.powers is not None
        powers = {name: p for name, p in self.powers.items() if name != coefficient}
        rest = sum_of_powers(self.name, self.formula, self.source, powers)
        exponents = tuple(name for name in self.exponents if name in rest.exponents)
        return replace(rest, variables=self.variables, exponents=exponents, bounds=self.bounds)


def _total(terms: Array) -> tuple[Array, Array]:
    """Return the log of a sum of terms, given their logs, (K, ...), and the share of each."""
    top = terms.max(axis=0)
    shares = np.exp(terms - top)
    total = shares.sum(axis=0)
    return np.asarray(top + np.log(total)), shares / total


def _pair(one: Any, other: Any) -> tuple[Any, Any, Any]:
    """Return the log of a sum of two terms, given their logs, and the share of each."""
    top = np.maximum(one, other)
    a, b = np.exp(one - top), np.exp(other - top)
    total = a + b
    return top + np.log(total), a / total, b / total


def logaddexp(one: Any, other: Any) -> Any:
    """Return log(exp(one) + exp(other)), also for complex numbers."""
    top = np.maximum(np.real(one), np.real(other))
    return top + np.log(np.exp(one - top) + np.exp(other - top))


def _above(p: Mapping[str, Any], value: Any, slopes: dict[str, Any]) -> Slopes:
    """Add the constant, if the law has one, to a log loss and its slopes."""
    if "E" not in p:
        return value, slopes
    whole, constant, rest = _pair(p["E"], value)
    return whole, {"E": constant, **{name: rest * slope for name, slope in slopes.items()}}


def _kaplan(p: Mapping[str, Any], x: Mapping[str, Array]) -> Slopes:
    away = p["Nc"] - x["N"]
    size = away * p["alpha"] / p["beta"]
    both, share, other = _pair(size, p["Dc"] - x["D"])
    slopes = {"Nc": p["alpha"] * share, "Dc": p["beta"] * other}
    slopes |= {"alpha": share * away, "beta": both - share * size}
    return _above(p, p["beta"] * both, slopes)


def _coupled(p: Mapping[str, Any], x: Mapping[str, Array]) -> Slopes:
    size, data = p["A"] - p["alpha"] * x["N"], p["B"] - p["beta"] * x["D"]
    both, share, other = _pair(size, data)
    share, other = p["gamma"] * share, p["gamma"] * other
    slopes = {"A": share, "B": other, "alpha": -share * x["N"], "beta": -other * x["D"]}
    return _above(p, p["gamma"] * both, {**slopes, "gamma": both})


def _broken(p: Mapping[str, Any], x: Mapping[str, Array]) -> Any:
    sharpness = np.exp(p["f"])
    beyond = logaddexp((x["x"] - p["x1"]) / sharpness, 0.0)
    return logaddexp(p["E"], p["A"] - p["alpha"] * x["x"] - p["c"] * sharpness * beyond)


def _data_constrained(p: Mapping[str, Any], x: Mapping[str, Array]) -> Slopes:
    alpha, beta = p["alpha"], p["beta"]
    fresh = np.minimum(x["U"], x["D"])  # within the first epoch all tokens are unique
    # the best size for so much unique data: where both terms shrink at the same cost
    wanted = (np.log(alpha) + p["A"] - np.log(beta) - p["B"] + beta * fresh) / alpha
    unique = np.minimum(x["N"], wanted)
    size, of_size, of_rn = _worth(x["N"] - unique, p["rn"])
    data, _, of_rd = _worth(x["D"] - fresh, p["rd"])
    size, data = unique + size, fresh + data
    both, a, b = _pair(p["A"] - alpha * size, p["B"] - beta * data)
    moved = np.where(x["N"] > wanted, -a * (1.0 - of_size), 0.0)  # alpha times the slope in unique
    slopes = {"A": a + moved, "B": b - moved, "rn": -a * alpha * of_rn, "rd": -b * beta * of_rd}
    slopes["alpha"] = moved * (1.0 / alpha - wanted) - a * size
    slopes["beta"] = moved * (fresh - 1.0 / beta) - b * data
    return _above(p, both, slopes)


def _worth(log_ratio: Any, log_star: Any) -> tuple[Any, Any, Any]:
    """Return log(1 + R* (1 - exp(-R / R*))) at R = exp(log_ratio) - 1 repetitions, and its slopes
    in both arguments."""
    star, ratio = np.exp(log_star), np.exp(log_ratio)
    left = np.exp((1.0 - ratio) / star)
    worth = star * (1.0 - left) + 1.0
    return np.log(worth), ratio * left / worth, (worth - 1.0 - left * (ratio - 1.0)) / worth


def sum_of_powers(
    name: str, formula: str, source: str, powers: Mapping[str, Mapping[str, str]]
) -> Law:
    """Return a law whose terms are coefficients divided by powers of variables."""
    variables = dict.fromkeys(v for term in powers.values() for v in term)
    exponents = dict.fromkeys(e for term in powers.values() for e in term.values())
    units = {name: tuple(term.items()) for name, term in powers.items() if term}
    names = tuple(variables), tuple(powers), tuple(exponents)
    return Law(name, formula, source, *names, units, powers)


_HESTNESS = "Hestness et al. 2017 (arXiv:1712.00409)"
_HOFFMANN = "Hoffmann et al. 2022, eq. 2 (arXiv:2203.15556)"
_KAPLAN = "Kaplan et al. 2020, eq. 1.5 (arXiv:2001.08361)"
_A_B = {"A": (("N", "alpha"),), "B": (("D", "beta"),)}
_ABOVE_ZERO = {"alpha": (1e-3, 10.0), "beta": (1e-3, 10.0)}
_KAPLAN_CONSTANT = Law(
    "kaplan_constant",
    "L = E + ((Nc/N)^(alpha/beta) + Dc/D)^beta",
    f"{_KAPLAN}, with a constant",
    ("N", "D"),
    ("E", "Nc", "Dc"),
    ("alpha", "beta"),
    {"Nc": (("N", 1.0),), "Dc": (("D", 1.0),)},
    slopes=_kaplan,
    bounds=_ABOVE_ZERO,
)

# In order of preference: of laws that describe the runs equally well, the first is reported.
# Laws with a constant come before laws without one, because text has an entropy.
LAWS: dict[str, Law] = {
    law.name: law
    for law in (
        sum_of_powers(
            "power_constant",
            "L = E + A / x^alpha",
            "Henighan et al. 2020, eq. 1.1 (arXiv:2010.14701)",
            {"E": {}, "A": {"x": "alpha"}},
        ),
        sum_of_powers("power", "L = A / x^alpha", _HESTNESS, {"A": {"x": "alpha"}}),
        sum_of_powers(
            "log_power",
            "L = A / (ln x)^alpha",
            "a power law in the logarithm, which falls more slowly than any power of x",
            {"A": {"log x": "alpha"}},
        ),
        Law(
            "broken",
            "L = E + A x^-alpha (1 + (x/x1)^(1/f))^(-c f)",
            "Caballero et al. 2023, eq. 1, one break (arXiv:2210.14891)",
            ("x",),
            ("E", "A", "x1", "f"),
            ("alpha", "c"),
            {"A": (("x", "alpha"),), "x1": (("x", 1.0),)},
            expression=_broken,
            bounds={"f": (1e-3, 100.0), "alpha": (0.0, 10.0), "c": (-100.0, 100.0)},
        ),
        sum_of_powers(
            "chinchilla",
            "L = E + A / N^alpha + B / D^beta",
            _HOFFMANN,
            {"E": {}, "A": {"N": "alpha"}, "B": {"D": "beta"}},
        ),
        sum_of_powers(
            "chinchilla_tied",
            "L = E + A / N^alpha + B / D^alpha",
            "Muennighoff et al. 2023, section 6 (arXiv:2305.16264)",
            {"E": {}, "A": {"N": "alpha"}, "B": {"D": "alpha"}},
        ),
        Law(
            "coupled",
            "L = E + (A / N^alpha + B / D^beta)^gamma",
            "the form between Hoffmann's (gamma = 1) and Kaplan's (beta = 1)",
            ("N", "D"),
            ("E", "A", "B"),
            ("alpha", "beta", "gamma"),
            _A_B,
            slopes=_coupled,
            bounds={"gamma": (0.05, 20.0)},
        ),
        _KAPLAN_CONSTANT,
        sum_of_powers(
            "chinchilla_zero",
            "L = A / N^alpha + B / D^beta",
            f"{_HOFFMANN} with E = 0",
            {"A": {"N": "alpha"}, "B": {"D": "beta"}},
        ),
        replace(
            _KAPLAN_CONSTANT,
            name="kaplan",
            formula="L = ((Nc/N)^(alpha/beta) + Dc/D)^beta",
            source=_KAPLAN,
            coefficients=("Nc", "Dc"),
        ),
        Law(
            "data_constrained",
            "L = E + A / N'^alpha + B / D'^beta,"
            " X' = X_u (1 + r (1 - exp(-R/r))), R = X/X_u - 1, for N and D",
            "Muennighoff et al. 2023, eq. 5 and 6 (arXiv:2305.16264)",
            ("N", "D", "U"),
            ("E", "A", "B", "rn", "rd"),
            ("alpha", "beta"),
            _A_B,
            slopes=_data_constrained,
            bounds={"rn": (1e-3, 1e4), "rd": (1e-3, 1e4), **_ABOVE_ZERO},
        ),
    )
}
BUILT_IN = frozenset(LAWS)


# --- a law of the user's own


def register(law: Law) -> Law:
    """Add a law of your own, as the last of those that are compared.

    Raises ConfigError for a law that cannot be fitted.
    """
    if law.name in BUILT_IN:
        raise ConfigError(f"law={law.name}: is one of tinygpt's own; choose another name")
    if law.variables not in VARIABLES:
        allowed = ", ".join(str(one) for one in VARIABLES)
        raise ConfigError(f"law={law.name}: variables={law.variables}: must be one of {allowed}")
    check(law)
    LAWS[law.name] = law
    return law


def load(place: str) -> str:
    """Register the law at ``place``, such as ``my_laws.py:shifted``, and return its name.

    Raises ConfigError where the file fails or defines no such law.
    """
    file, _, name = place.rpartition(":")
    try:
        found = runpy.run_path(file).get(name)
    except Exception as error:  # whatever the file does
        raise ConfigError(f"law={place}: {file}: {first_line(error)}") from error
    if not isinstance(found, Law):
        raise ConfigError(f"law={place}: {file} defines no Law called {name}")
    return register(found).name


def check(law: Law) -> None:
    """Raise ConfigError for a law that cannot be evaluated or differentiated."""
    if (law.powers is None) == (law.expression is None and law.slopes is None):
        raise ConfigError(f"law={law.name}: give it either powers or an expression")
    if law.powers is not None:
        return
    theta = np.linspace(0.3, 0.7, len(law))[None]
    x = {name: np.linspace(-0.5, 0.5, 3) + 0.1 * k for k, name in enumerate(law.variables)}
    step = 1e-6 * np.eye(len(law))
    try:
        _, gradient = law.derivatives(theta, x)
        slopes = (law.log_loss(theta + step, x) - law.log_loss(theta - step, x)) / 2e-6
    except Exception as error:  # whatever the expression does
        raise ConfigError(f"law={law.name}: expression: {first_line(error)}") from error
    if not np.allclose(gradient[0].T, slopes, rtol=1e-4, atol=1e-6, equal_nan=True):
        raise ConfigError(
            f"law={law.name}: expression: must be analytic in its parameters, without abs or "
            "maximum of them; logaddexp is in tinygpt.scaling"
        )
