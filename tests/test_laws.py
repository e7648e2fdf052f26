"""Test the laws: formulas, derivatives, units, and where one law becomes another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinygpt.scaling.laws import LAWS, Law

NAMES = tuple(LAWS)
STEP = 1e-200  # of the complex step: no digits are lost however small it is

# Likely values of the internal parameters: coefficients as logarithms.
RANGES = {
    "E": (-2.0, 1.0),
    "A": (-2.0, 1.0),
    "B": (-2.0, 1.0),
    "Nc": (-2.0, 2.0),
    "Dc": (-2.0, 2.0),
    "x1": (-1.5, 1.5),
    "f": (-1.5, 1.0),
    "rn": (0.0, 3.0),
    "rd": (0.0, 3.0),
    "alpha": (0.1, 1.2),
    "beta": (0.1, 1.2),
    "gamma": (0.3, 2.0),
    "c": (-0.5, 0.8),
}


def worth(x: Any, unique: Any, star: Any) -> Any:
    return unique * (1 + star * (1 - np.exp(-(x / unique - 1) / star)))


def data_constrained(p: dict[str, Any], N: Any, D: Any, U: Any) -> Any:
    """Compute the loss as the appendix of Muennighoff et al. does, with G, not the derivative."""
    alpha, beta = p["alpha"], p["beta"]
    U = np.minimum(U, D)
    G = (alpha * p["A"] / (beta * p["B"])) ** (1 / (alpha + beta))
    wanted = G * (U * G) ** (beta / alpha)
    unique = np.where(np.real(wanted) < N, wanted, N)
    size, data = worth(N, unique, p["rn"]), worth(D, U, p["rd"])
    return p["E"] + p["A"] / size**alpha + p["B"] / data**beta


# Each law once more, straight from its formula, for complex parameters.
PLAIN: dict[str, Callable[..., Any]] = {
    "power": lambda p, x: p["A"] / x ** p["alpha"],
    "power_constant": lambda p, x: p["E"] + p["A"] / x ** p["alpha"],
    "log_power": lambda p, **v: p["A"] / v["log x"] ** p["alpha"],
    "broken": lambda p, x: (
        p["E"]
        + p["A"] * x ** -p["alpha"] * (1 + (x / p["x1"]) ** (1 / p["f"])) ** (-p["c"] * p["f"])
    ),
    "chinchilla": lambda p, N, D: p["E"] + p["A"] / N ** p["alpha"] + p["B"] / D ** p["beta"],
    "chinchilla_tied": lambda p, N, D: p["E"] + p["A"] / N ** p["alpha"] + p["B"] / D ** p["alpha"],
    "chinchilla_zero": lambda p, N, D: p["A"] / N ** p["alpha"] + p["B"] / D ** p["beta"],
    "kaplan": lambda p, N, D: (
        ((p["Nc"] / N) ** (p["alpha"] / p["beta"]) + p["Dc"] / D) ** p["beta"]
    ),
    "kaplan_constant": lambda p, N, D: p["E"] + PLAIN["kaplan"](p, N, D),
    "coupled": lambda p, N, D: (
        p["E"] + (p["A"] / N ** p["alpha"] + p["B"] / D ** p["beta"]) ** p["gamma"]
    ),
    "data_constrained": data_constrained,
}


def plain(law: Law, theta: np.ndarray, x: dict[str, np.ndarray]) -> np.ndarray:
    """Return the log loss by the formula, (n,)."""
    values = list(theta)
    values[: len(law.coefficients)] = np.exp(theta[: len(law.coefficients)])
    parameters = dict(zip(law.parameters, values, strict=True))
    where = {name: np.exp(logs) for name, logs in x.items()}
    found: np.ndarray = np.log(PLAIN[law.name](parameters, **where))
    return found


def plain_gradient(law: Law, theta: np.ndarray, x: dict[str, np.ndarray]) -> np.ndarray:
    """Return the gradient by the complex step, (n, P), exact to rounding."""
    steps = theta + 1j * STEP * np.eye(len(law))
    return np.stack([plain(law, step, x).imag / STEP for step in steps], axis=1)


@st.composite
def cases(draw: st.DrawFn, name: str) -> tuple[Law, np.ndarray, dict[str, np.ndarray]]:
    law = LAWS[name]
    theta = np.array([draw(st.floats(*RANGES[parameter])) for parameter in law.parameters])
    seed = draw(st.integers(0, 2**16))
    random = np.random.default_rng(seed)
    x = {variable: random.uniform(-2, 2, 7) for variable in law.variables}
    if "U" in x:
        x["U"] = np.minimum(x["U"], x["D"] - 0.01)
    return law, theta, x


def each_law(test: Callable[..., None]) -> Callable[..., None]:
    found: Callable[..., None] = pytest.mark.parametrize("name", NAMES)(
        settings(max_examples=15)(test)
    )
    return found


@each_law
@given(data=st.data())
def test_value_and_gradient_are_those_of_the_formula(name: str, data: st.DataObject) -> None:
    law, theta, x = data.draw(cases(name))
    value, gradient = law.derivatives(theta[None], x)
    np.testing.assert_allclose(law.log_loss(theta[None], x)[0], plain(law, theta, x), atol=1e-10)
    np.testing.assert_allclose(value[0], plain(law, theta, x))
    np.testing.assert_allclose(gradient[0], plain_gradient(law, theta, x), rtol=1e-9, atol=1e-9)


@each_law
@given(data=st.data())
def test_batch_is_rows_one_by_one(name: str, data: st.DataObject) -> None:
    """Check rows with places of their own too, which the numeric split uses."""
    law, theta, x = data.draw(cases(name))
    batch = theta + np.array([[0.0], [0.01], [0.05]])
    own = {v: logs + np.array([[0.0], [0.3], [0.6]]) for v, logs in x.items()}
    together, apart = law.derivatives(batch, x), law.log_loss(batch, own)
    for i in range(3):
        one = law.derivatives(batch[i : i + 1], x)
        there = law.log_loss(batch[i : i + 1], {v: logs[i] for v, logs in own.items()})
        np.testing.assert_allclose(together[0][i], one[0][0], rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(together[1][i], one[1][0], rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(apart[i], there[0], rtol=1e-12, atol=1e-14)


@each_law
@given(data=st.data())
def test_centres_do_not_change_the_law(name: str, data: st.DataObject) -> None:
    """Check that natural parameters at plain variables give the same loss, and convert back."""
    law, theta, x = data.draw(cases(name))
    centres = dict(zip(law.variables, (3.0, 5.0, 5.0), strict=False))
    natural = law.natural(theta, centres)
    np.testing.assert_allclose(law.internal(natural, centres), theta, atol=1e-9)
    there = {v: np.exp(x[v] + centres[v]) for v in law.variables}
    np.testing.assert_allclose(
        np.log(PLAIN[name](natural, **there)), plain(law, theta, x), atol=1e-9
    )


@pytest.mark.parametrize(
    ("N", "D", "loss"),
    [(6.34e9, 242e9, 2.2256440889984477), (8.67e9, 178e9, 2.2269634075087867)],
)
def test_published_example_of_repeated_data(N: float, D: float, loss: float) -> None:
    """Compare with the two ways of spending one budget in Muennighoff et al. 2023."""
    law = LAWS["data_constrained"]
    published = {"E": 0.6254804, "A": 6.255414, "B": 7.3049974}
    natural = {name: float(np.exp(value)) for name, value in published.items()}
    natural |= {"rn": 5.309743, "rd": 15.387756, "alpha": 0.3526596, "beta": 0.3526596}
    theta = law.internal(natural, dict.fromkeys(law.variables, 0.0))
    x = {"N": np.log([N]), "D": np.log([D]), "U": np.log([25e9])}
    assert np.exp(law.log_loss(theta[None], x)[0]) == pytest.approx(loss, rel=1e-9)


def test_without_repetition_data_constrained_is_chinchilla() -> None:
    """Use one epoch, and R* so large that excess parameters are worth as much as others."""
    p = {"E": 1.8, "A": 0.7, "B": 0.4, "alpha": 0.3, "beta": 0.5, "rn": 1e9, "rd": 1e9}
    x = {"N": np.linspace(-2, 2, 9), "D": np.linspace(1, -3, 9), "U": np.linspace(1, -3, 9)}
    found = [
        law.log_loss(law.internal(p, dict.fromkeys(law.variables, 0.0))[None], x)
        for law in (LAWS["data_constrained"], LAWS["chinchilla"])
    ]
    np.testing.assert_allclose(found[0], found[1], rtol=1e-6)
