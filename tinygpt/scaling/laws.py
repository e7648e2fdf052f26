"""The laws: a small table of named forms, each with its formula, its derivatives and its source.

A law gives the logarithm of the loss (nats per token).  It is evaluated for a batch of parameter
vectors at once, shape (B, P), at n points, with the first and second derivatives in the
parameters.  Coefficients (E, A, B, ...) stand in a vector as logarithms, exponents as they are;
the variables are divided by their geometric mean beforehand, which ``Law.natural`` undoes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Rows = NDArray[np.intp]


@dataclass(frozen=True)
class Derivatives:
    """Of the log loss, at (B, n)."""

    value: Array  # (B, n)
    gradient: Array  # (B, n, P)
    curvature: Callable[
        [Array], Array
    ]  # weights (B, n) -> sum over n of weight · Hessian, (B, P, P)


@dataclass(frozen=True)
class Law:
    """One form.  ``terms`` makes the log loss from the parameters and the log variables."""

    name: str
    formula: str
    source: str
    variables: tuple[str, ...]
    coefficients: tuple[str, ...]  # positive; the logarithm is the parameter
    exponents: tuple[str, ...]
    # for each coefficient but E: by which power of which variable its unit goes
    units: Mapping[str, tuple[tuple[str, str | float], ...]]
    # sums of powers: coefficient -> {variable: exponent}; other laws have an expression
    powers: Mapping[str, Mapping[str, str]] | None = None
    expression: Callable[[Mapping[str, Jet], Mapping[str, Array]], Jet] | None = None
    bounds: Mapping[str, tuple[float, float]] = field(default_factory=dict)  # of a plain value

    @property
    def parameters(self) -> tuple[str, ...]:
        return self.coefficients + self.exponents

    def __len__(self) -> int:
        return len(self.parameters)

    def derivatives(
        self, theta: Array, x: Mapping[str, Array], places: tuple[Rows, Rows] | None = None
    ) -> Derivatives:
        """At the log variables ``x``, n each, relative to their centres.

        ``places``: one point for each distinct one, (m,), and which of these each is, (n,); an
        expression, which costs more than copies of what came out, is evaluated at those alone.
        """
        if self.powers is not None:
            return _log_of_sum(self.design(x), theta)
        assert self.expression is not None
        count = len(next(iter(x.values())))
        first, which = places or (slice(None), slice(None))
        jet = self.expression(
            _jets(self.parameters, theta), {name: logs[first] for name, logs in x.items()}
        )
        shape, size = (len(theta), count if places is None else len(places[0])), len(self)
        value = np.broadcast_to(jet.value, shape)[:, which]
        gradient = np.broadcast_to(_parameters_last(jet.gradient, 1), (*shape, size))[:, which]
        last = _parameters_last(jet.hessian, 2)
        hessian = np.broadcast_to(last, (*shape, size, size))[:, which]
        return Derivatives(value, gradient, lambda w: np.einsum("bn,bnpq->bpq", w, hessian))

    def log_loss(self, theta: Array, x: Mapping[str, Array]) -> Array:
        """The value alone, (B, n); ``x`` may differ by row of ``theta``: (n,) or (B, n) each."""
        columns = {name: theta[:, j : j + 1] for j, name in enumerate(self.parameters)}
        if self.powers is None:
            assert self.expression is not None
            none = np.zeros((0, 1, 1))  # derivatives in no parameter at all cost nothing
            jets = {name: Jet(c, none, none[None]) for name, c in columns.items()}
            value = self.expression(jets, x).value
        else:
            value = np.full((1, 1), -np.inf)
            for name, powers in self.powers.items():
                term = columns[name]
                for variable, exponent in powers.items():
                    term = term - columns[exponent] * x[variable]
                value = np.logaddexp(value, term)
        n = next(iter(x.values())).shape[-1]
        return np.asarray(np.broadcast_to(value, (len(theta), n)), dtype=float)

    def design(self, x: Mapping[str, Array]) -> Array:
        """Of a sum of powers: the logarithm of each term is linear in the parameters; (K, n, P)."""
        assert self.powers is not None
        n = len(next(iter(x.values())))
        terms = np.zeros((len(self.powers), n, len(self)))
        for k, (coefficient, powers) in enumerate(self.powers.items()):
            terms[k, :, self.parameters.index(coefficient)] = 1.0
            for variable, exponent in powers.items():
                terms[k, :, self.parameters.index(exponent)] -= x[variable]
        return terms

    def shift(self, centres: Mapping[str, float]) -> Array:
        """The affine map from a vector for centred variables to one for plain ones: (P, P + 1)."""
        size = len(self)
        affine = np.hstack([np.eye(size), np.zeros((size, 1))])
        for coefficient, unit in self.units.items():
            row = self.parameters.index(coefficient)
            for variable, power in unit:
                column = self.parameters.index(power) if isinstance(power, str) else size
                factor = 1.0 if isinstance(power, str) else power
                affine[row, column] += factor * centres[variable]
        return affine

    def natural(self, theta: Array, centres: Mapping[str, float]) -> dict[str, float]:
        """The parameters by name, for plain variables, coefficients as such."""
        plain = self.shift(centres) @ np.append(theta, 1.0)
        plain[: len(self.coefficients)] = np.exp(plain[: len(self.coefficients)])
        return dict(zip(self.parameters, plain.tolist(), strict=True))

    def internal(self, natural: Mapping[str, float], centres: Mapping[str, float]) -> Array:
        """The other way round; a coefficient of zero is -inf."""
        kinds = len(self.coefficients)
        theta = np.array([natural[name] for name in self.parameters], dtype=float)
        with np.errstate(divide="ignore"):
            theta[:kinds] = np.log(theta[:kinds])
        affine = self.shift(centres)[:kinds]
        theta[:kinds] -= affine[:, kinds:-1] @ theta[kinds:] + affine[:, -1]
        return theta

    def without(self, coefficient: str) -> Law:
        """A sum of powers without one of its terms: where that term has gone to zero."""
        assert self.powers is not None
        powers = {name: p for name, p in self.powers.items() if name != coefficient}
        used = {exponent for term in powers.values() for exponent in term.values()}
        return Law(
            self.name,
            self.formula,
            self.source,
            self.variables,
            tuple(name for name in self.coefficients if name != coefficient),
            tuple(name for name in self.exponents if name in used),
            {name: unit for name, unit in self.units.items() if name != coefficient},
            powers,
        )


def _log_of_sum(terms: Array, theta: Array) -> Derivatives:
    """log Σ exp(term), where the terms (K, n, P) are linear in the parameters."""
    kinds, n, size = terms.shape
    batch = len(theta)
    logs = np.stack([theta @ terms[k].T for k in range(kinds)])  # (K, B, n)
    top = logs.max(axis=0)
    shares = np.exp(logs - top)
    total = shares.sum(axis=0)
    shares /= total
    value = top + np.log(total)
    gradient = np.zeros((batch, n, size))
    for k in range(kinds):
        for p in np.flatnonzero(np.any(terms[k] != 0, axis=0)):
            gradient[..., p] += shares[k] * terms[k, :, p]

    def curvature(weights: Array) -> Array:
        found = np.zeros((batch, size * size))
        for k in range(kinds):
            squares = (terms[k, :, :, None] * terms[k, :, None, :]).reshape(n, size * size)
            found += (weights * shares[k]) @ squares
        products = np.swapaxes(gradient * weights[..., None], 1, 2) @ gradient
        return found.reshape(batch, size, size) - products

    return Derivatives(value, gradient, curvature)


class Jet:
    """A value with its first and second derivatives in the P parameters (forward mode).

    Shapes (B, n), (P, B, n) and (P, P, B, n), or whatever broadcasts to them: the parameters come
    first, as numpy is fast where the last axis is long.
    """

    def __init__(self, value: Array, gradient: Array, hessian: Array) -> None:
        self.value, self.gradient, self.hessian = value, gradient, hessian

    def __add__(self, other: Jet | Array | float) -> Jet:
        if isinstance(other, Jet):
            return Jet(
                self.value + other.value,
                self.gradient + other.gradient,
                self.hessian + other.hessian,
            )
        return Jet(self.value + other, self.gradient, self.hessian)

    def __neg__(self) -> Jet:
        return self * -1.0

    def __sub__(self, other: Jet | Array | float) -> Jet:
        return self + (-other)

    def __rsub__(self, other: Array | float) -> Jet:
        return -self + other

    def __mul__(self, other: Jet | Array | float) -> Jet:
        if not isinstance(other, Jet):
            factor = np.asarray(other, dtype=float)
            return Jet(self.value * factor, self.gradient * factor, self.hessian * factor)
        cross = self.gradient[:, None] * other.gradient
        return Jet(
            self.value * other.value,
            self.gradient * other.value + other.gradient * self.value,
            self.hessian * other.value
            + other.hessian * self.value
            + cross
            + np.swapaxes(cross, 0, 1),
        )

    __radd__ = __add__
    __rmul__ = __mul__
    __array_ufunc__ = None  # numpy leaves array · jet to the jet

    def apply(self, value: Array, first: Array, second: Array) -> Jet:
        """f of this, given f, f' and f'' there."""
        outer = self.gradient[:, None] * self.gradient
        return Jet(value, self.gradient * first, self.hessian * first + outer * second)

    def exp(self) -> Jet:
        value = np.exp(self.value)
        return self.apply(value, value, value)

    def log(self) -> Jet:
        return self.apply(np.log(self.value), 1 / self.value, -1 / self.value**2)

    def __truediv__(self, other: Jet) -> Jet:
        inverse = 1 / other.value
        return self * other.apply(inverse, -(inverse**2), 2 * inverse**3)


def _jets(names: tuple[str, ...], theta: Array) -> dict[str, Jet]:
    size = len(names)
    zero = np.zeros((size, size, 1, 1))
    unit = np.eye(size)
    return {
        name: Jet(theta[:, j : j + 1], unit[j].reshape(size, 1, 1), zero)
        for j, name in enumerate(names)
    }


def _parameters_last(derivatives: Array, order: int) -> Array:
    """(P, B, n) to (B, n, P), (P, P, B, n) to (B, n, P, P)."""
    found: Array = np.ascontiguousarray(np.moveaxis(derivatives, range(order), range(-order, 0)))
    return found


def _where(condition: NDArray[np.bool_], one: Jet, other: Jet) -> Jet:
    return Jet(
        np.where(condition, one.value, other.value),
        np.where(condition, one.gradient, other.gradient),
        np.where(condition, one.hessian, other.hessian),
    )


def logaddexp(one: Jet, other: Jet | Array) -> Jet:
    """log(exp(one) + exp(other)) = other + softplus(one - other)."""
    difference = one - other
    share = 0.5 * (1 + np.tanh(difference.value / 2))
    return difference.apply(np.logaddexp(0.0, difference.value), share, share * (1 - share)) + other


def _kaplan(p: Mapping[str, Jet], x: Mapping[str, Array]) -> Jet:
    size = (p["Nc"] - x["N"]) * p["alpha"] / p["beta"]
    return p["beta"] * logaddexp(size, p["Dc"] - x["D"])


def _coupled(p: Mapping[str, Jet], x: Mapping[str, Array]) -> Jet:
    size, data = p["A"] - p["alpha"] * x["N"], p["B"] - p["beta"] * x["D"]
    return logaddexp(p["E"], p["gamma"] * logaddexp(size, data))


def _broken(p: Mapping[str, Jet], x: Mapping[str, Array]) -> Jet:
    sharpness = p["f"].exp()
    bend = logaddexp((x["x"] - p["x1"]) / sharpness, p["E"] * 0.0)
    return logaddexp(p["E"], p["A"] - p["alpha"] * x["x"] - p["c"] * sharpness * bend)


def _data_constrained(p: Mapping[str, Jet], x: Mapping[str, Array]) -> Jet:
    alpha, beta = p["alpha"], p["beta"]
    fresh = np.minimum(x["U"], x["D"])  # of less than one epoch all tokens are unique
    # the size that so much unique data pays for: where both terms shrink at the same cost
    wanted = (alpha.log() + p["A"] - beta.log() - p["B"] + beta * fresh) / alpha
    excess = (x["N"] - wanted).value > 0
    unique = _where(excess, wanted, p["E"] * 0.0 + x["N"])
    size = unique + _worth(x["N"] - unique, p["rn"])
    data = fresh + _worth(p["E"] * 0.0 + (x["D"] - fresh), p["rd"])
    return logaddexp(p["E"], logaddexp(p["A"] - alpha * size, p["B"] - beta * data))


def _worth(log_ratio: Jet, log_star: Jet) -> Jet:
    """log(1 + R* (1 - exp(-R / R*))), where R = exp(log_ratio) - 1 repetitions."""
    repeats = log_ratio.exp() - 1.0
    star = log_star.exp()
    return (star * (1.0 - (-(repeats / star)).exp()) + 1.0).log()


_HOFFMANN = "Hoffmann et al. 2022, eq. 2 (arXiv:2203.15556)"
_KAPLAN = "Kaplan et al. 2020, eq. 1.5 (arXiv:2001.08361)"
_A_B = {"A": (("N", "alpha"),), "B": (("D", "beta"),)}


def sum_of_powers(
    name: str,
    formula: str,
    source: str,
    powers: Mapping[str, Mapping[str, str]],
) -> Law:
    """Return a law that is a sum of terms, each a coefficient over powers of variables."""
    variables = dict.fromkeys(v for term in powers.values() for v in term)
    exponents = dict.fromkeys(e for term in powers.values() for e in term.values())
    return Law(
        name,
        formula,
        source,
        tuple(variables),
        tuple(powers),
        tuple(exponents),
        {name: tuple(term.items()) for name, term in powers.items() if term},
        powers,
    )


# Those to prefer come first: of laws that describe the runs equally well, the first is told.  One
# with a constant goes before one without: a text has an entropy.
LAWS: dict[str, Law] = {
    law.name: law
    for law in (
        sum_of_powers(
            "power_constant",
            "L = E + A / x^alpha",
            "Henighan et al. 2020, eq. 1.1 (arXiv:2010.14701)",
            {"E": {}, "A": {"x": "alpha"}},
        ),
        sum_of_powers(
            "power",
            "L = A / x^alpha",
            "Hestness et al. 2017 (arXiv:1712.00409)",
            {"A": {"x": "alpha"}},
        ),
        sum_of_powers(
            "log_power",
            "L = A / (ln x)^alpha",
            "a power law in the logarithm; falls more slowly than any power of x",
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
            expression=_coupled,
            bounds={"gamma": (0.05, 20.0)},
        ),
        Law(
            "kaplan_constant",
            "L = E + ((Nc/N)^(alpha/beta) + Dc/D)^beta",
            f"{_KAPLAN}, with a constant",
            ("N", "D"),
            ("E", "Nc", "Dc"),
            ("alpha", "beta"),
            {"Nc": (("N", 1.0),), "Dc": (("D", 1.0),)},
            expression=lambda p, x: logaddexp(p["E"], _kaplan(p, x)),
            bounds={"alpha": (1e-3, 10.0), "beta": (1e-3, 10.0)},
        ),
        sum_of_powers(
            "chinchilla_zero",
            "L = A / N^alpha + B / D^beta",
            f"{_HOFFMANN} with E = 0",
            {"A": {"N": "alpha"}, "B": {"D": "beta"}},
        ),
        Law(
            "kaplan",
            "L = ((Nc/N)^(alpha/beta) + Dc/D)^beta",
            _KAPLAN,
            ("N", "D"),
            ("Nc", "Dc"),
            ("alpha", "beta"),
            {"Nc": (("N", 1.0),), "Dc": (("D", 1.0),)},
            expression=_kaplan,
            bounds={"alpha": (1e-3, 10.0), "beta": (1e-3, 10.0)},
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
            expression=_data_constrained,
            bounds={"rn": (1e-3, 1e4), "rd": (1e-3, 1e4), "alpha": (1e-3, 10), "beta": (1e-3, 10)},
        ),
    )
}
