"""Test fits: published numbers, other optimizers, exact surfaces, one-line errors."""

from __future__ import annotations

import dataclasses
import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, special

from tinygpt.config import ConfigError
from tinygpt.scaling.fitting import Fit, fit
from tinygpt.scaling.intervals import covariance, intervals, predict_interval
from tinygpt.scaling.laws import LAWS, Law
from tinygpt.scaling.solver import bounds

TRUTH = {"E": 1.8, "A": 480.0, "B": 2100.0, "alpha": 0.35, "beta": 0.37, "rn": 5.0, "rd": 15.0}
# for laws that the general values do not suit
SPECIAL: dict[str, dict[str, float]] = {
    "kaplan": {"Nc": 5e10, "Dc": 3e11, "alpha": 0.2, "beta": 0.25},
    "kaplan_constant": {"E": 1.5, "Nc": 2e8, "Dc": 6e9, "alpha": 0.3, "beta": 0.4},
    "broken": {"E": 0.5, "A": 60.0, "x1": 1e8, "f": 0.3, "alpha": 0.2, "c": 0.3},
    "log_power": {"A": 1e3, "alpha": 2.0},
    "coupled": {"E": 1.8, "A": 1500.0, "B": 9000.0, "alpha": 0.42, "beta": 0.45, "gamma": 0.8},
}
STARTS = 12  # of scipy, because noisy points may have several minima


def truth(law: Law) -> dict[str, float]:
    values = SPECIAL.get(law.name, TRUTH)
    return {name: values[name] for name in law.parameters}


def table(law: Law, natural: dict[str, float], noise: float = 0.0, seed: int = 0) -> pd.DataFrame:
    """Return runs on a grid with the loss of a law and noise on its logarithm."""
    if "N" in law.variables:
        n, d = np.meshgrid(np.geomspace(1e7, 1e9, 6), np.geomspace(2e8, 2e10, 6))
        runs = pd.DataFrame({"N": n.ravel(), "D": d.ravel()})
        if "U" in law.variables:
            unique = np.tile([4e8, 2e9, 1e10], 12)
            runs["U"] = np.minimum(unique, runs["D"])
    else:
        runs = pd.DataFrame({"x": np.geomspace(1e6, 1e10, 30)})
    centres = dict.fromkeys(law.variables, 0.0)
    logs = {v: np.log(runs[v.removeprefix("log ")].to_numpy()) for v in law.variables}
    logs = {v: np.log(x) if v.startswith("log ") else x for v, x in logs.items()}
    y = law.log_loss(law.internal(natural, centres)[None], logs)[0]
    random = np.random.default_rng(seed)
    runs["loss"] = np.exp(y + noise * random.standard_normal(len(runs)))
    return runs


def fitted(runs: pd.DataFrame, law: str, **settings: Any) -> Fit:
    columns = {v.removeprefix("log "): v.removeprefix("log ") for v in LAWS[law].variables}
    return fit(runs, law, loss="loss", **{**columns, **settings})


@pytest.fixture(scope="module")
def chinchilla_points(real_data: Path) -> pd.DataFrame:
    """Return the 240 runs that Besiroglu et al. 2024 read off Hoffmann's figure and kept."""
    path = real_data / "scaling" / "chinchilla_epoch" / "runs.csv"
    if not path.exists():
        pytest.skip("no published runs beside the project")
    runs = pd.read_csv(path)
    return runs[runs.outlier_excluded == 0]


# --- published runs


def test_published_huber(chinchilla_points: pd.DataFrame) -> None:
    found = fitted(chinchilla_points, "chinchilla", estimator="huber", limit=1e-3)
    assert len(found.points) == 240
    assert found.optimum.objective <= 1.0182740179e-3
    expected = {"A": 477.826, "B": 2143.42, "E": 1.81722, "alpha": 0.34731, "beta": 0.36717}
    assert found.parameters == pytest.approx(expected, rel=5e-6, abs=5e-6)


def test_published_likelihood(chinchilla_points: pd.DataFrame) -> None:
    """Compare with the digits printed by Besiroglu et al. 2024, which are partly truncated."""
    found = fitted(chinchilla_points, "chinchilla", estimator="likelihood").parameters
    assert found["A"] == pytest.approx(482.01, abs=0.0051)
    assert found["B"] == pytest.approx(2085.43, abs=0.0051)
    assert found["E"] == pytest.approx(1.8169, abs=0.00005)
    assert found["alpha"] == pytest.approx(0.3478, abs=0.00005)
    assert found["beta"] == pytest.approx(0.3658, abs=0.0001)


# --- against exact methods and other optimizers


@pytest.mark.parametrize("seed", range(5))
def test_the_likelihood_is_the_linear_programme(seed: int) -> None:
    """Use a threshold so low that the fit is one of least absolute deviations."""
    runs = table(LAWS["power"], truth(LAWS["power"]), 0.05, seed)
    found = fitted(runs, "power", estimator="likelihood", threshold=1e-7)
    n, x, y = len(runs), np.log(runs.x.to_numpy()), np.log(runs.loss.to_numpy())
    design = np.column_stack([np.ones(n), -x])
    solved = optimize.linprog(
        np.r_[0, 0, np.ones(2 * n)],
        A_eq=np.hstack([design, np.eye(n), -np.eye(n)]),
        b_eq=y,
        bounds=[(None, None)] * 2 + [(0, None)] * (2 * n),
    )
    assert solved.x is not None
    assert np.abs(found.residuals).sum() == pytest.approx(solved.fun, rel=1e-6)
    assert found.parameters["alpha"] == pytest.approx(solved.x[1], rel=1e-5)
    assert np.log(found.parameters["A"]) == pytest.approx(solved.x[0], rel=1e-5)


@pytest.mark.parametrize(("law", "seed"), list(itertools.product(LAWS, range(2))))
@np.errstate(over="ignore", invalid="ignore")  # scipy goes where the law overflows
def test_no_other_optimizer_does_better(law: str, seed: int) -> None:
    """Compare with scipy's least squares, from the truth and from other starts."""
    form = LAWS[law]
    squares = fitted(table(form, truth(form), 0.01, seed), law, estimator="least_squares")
    points, ends = squares.points, bounds(form, squares.points)
    random, size = np.random.default_rng(seed), len(form)
    middle = start = form.internal(truth(form), points.centres)
    exact: dict[str, Any] = {"xtol": 1e-15, "ftol": 1e-15, "gtol": 1e-15, "max_nfev": 200}

    def residuals(theta: np.ndarray) -> np.ndarray:
        return np.asarray(np.nan_to_num(form.log_loss(theta[None], points.x)[0] - points.y))

    def jacobian(theta: np.ndarray) -> np.ndarray:
        return np.asarray(np.nan_to_num(form.derivatives(theta[None], points.x)[1][0]))

    for _ in range(STARTS):
        solved = optimize.least_squares(
            residuals,
            np.clip(start, ends[0] + 1e-9, ends[1] - 1e-9),
            jac=jacobian,
            bounds=ends,
            **exact,
        )
        assert squares.optimum.objective <= solved.cost * (1 + 1e-9)
        start = middle * random.uniform(0.7, 1.4, size) + 0.2 * random.standard_normal(size)


# --- exact surfaces


EXACT = {
    "E": st.floats(0.5, 3.0),
    "A": st.floats(100.0, 1000.0),
    "B": st.floats(500.0, 3000.0),
    "alpha": st.floats(0.25, 0.5),
    "beta": st.floats(0.25, 0.5),
}


@pytest.mark.parametrize("law", [name for name, law in LAWS.items() if law.powers])
@settings(max_examples=25)
@given(data=st.data())
def test_exact_recovery(law: str, data: st.DataObject) -> None:
    form = LAWS[law]
    natural = {name: data.draw(EXACT[name], label=name) for name in form.parameters}
    found = fitted(table(form, natural), law)
    assert found.parameters == pytest.approx(natural, rel=1e-6)
    assert found.optimum.converged
    assert np.abs(found.residuals).max() < 1e-10


@pytest.mark.parametrize("law", [name for name, law in LAWS.items() if not law.powers])
def test_exact_recovery_of_laws_that_are_no_sums(law: str) -> None:
    form = LAWS[law]
    found = fitted(table(form, truth(form)), law)
    assert found.parameters == pytest.approx(truth(form), rel=1e-3)
    assert np.abs(found.residuals).max() < 1e-7


@pytest.mark.parametrize(
    ("law", "without"), [("chinchilla", "chinchilla_zero"), ("power_constant", "power")]
)
@pytest.mark.parametrize("seed", range(3))
def test_no_constant_in_the_data_is_said(law: str, without: str, seed: int) -> None:
    """Check that a fit with E at zero is that of the law without E."""
    form = LAWS[without]
    exact = fitted(table(form, truth(form)), law)
    assert exact.optimum.at_bound == ("E",)
    assert exact.parameters["E"] == 0.0
    runs = table(form, truth(form), 0.01, seed)
    whole, part = (fitted(runs, name, estimator="least_squares") for name in (law, without))
    if whole.optimum.at_bound:
        assert whole.parameters == pytest.approx({**part.parameters, "E": 0.0}, rel=1e-9)
    else:
        assert whole.optimum.objective < part.optimum.objective


def test_narrow_designs_reach_their_minimum() -> None:
    """Use a range so short that E and a power can hardly be told apart: the valley is long."""
    form = LAWS["chinchilla"]
    natural = {"E": 1.5, "A": 2.2, "B": 60.0, "alpha": 0.04, "beta": 0.3}
    for seed in range(10):
        runs = table(form, natural, 0.03, seed)
        found, zero = (
            fitted(runs, law, estimator="least_squares").optimum.objective
            for law in ("chinchilla", "chinchilla_zero")
        )
        assert found <= zero * (1 + 1e-12)


@pytest.mark.parametrize("estimator", ["least_squares", "huber", "likelihood"])
def test_units_and_order_do_not_matter(estimator: str) -> None:
    form = LAWS["chinchilla"]
    runs = table(form, truth(form), 0.01)
    one = fitted(runs, "chinchilla", estimator=estimator)
    mixed = runs.sample(frac=1, random_state=1).assign(N=lambda r: r.N / 1e6, D=lambda r: r.D / 1e9)
    other = fitted(mixed, "chinchilla", estimator=estimator)
    assert other.optimum.objective == pytest.approx(one.optimum.objective, rel=1e-8)
    for name in ("E", "alpha", "beta"):
        assert other.parameters[name] == pytest.approx(one.parameters[name], rel=1e-6)
    in_millions = one.parameters["A"] / 1e6 ** one.parameters["alpha"]
    assert other.parameters["A"] == pytest.approx(in_millions, rel=1e-5)


def test_certificate() -> None:
    form = LAWS["chinchilla"]
    found = fitted(table(form, truth(form), 0.01), "chinchilla").optimum
    assert found.converged
    assert found.gradient_norm < 1e-10
    assert found.smallest_eigenvalue > 0
    assert found.objective == min(found.basins)
    assert not found.at_bound


def test_heavy_tails_are_seen() -> None:
    form = LAWS["chinchilla"]
    runs = table(form, truth(form), 0.01)
    assert fitted(runs, "chinchilla").estimator == "least_squares"
    runs.loc[[3, 17], "loss"] *= 1.2
    robust = fitted(runs, "chinchilla")
    assert robust.estimator == "huber"
    assert "heavy tails" in robust.reason
    squares = fitted(runs, "chinchilla", estimator="least_squares")
    off, off_squares = (abs(k.parameters["alpha"] - TRUTH["alpha"]) for k in (robust, squares))
    assert off < off_squares


# --- bounds


def broken(noise: float, **natural: float) -> pd.DataFrame:
    return table(LAWS["broken"], natural, noise)


@pytest.mark.parametrize(("c", "alpha"), [(5.69, 0.05), (12.0, 0.01), (-4.5, 0.9)])
def test_a_sharp_break_is_found(c: float, alpha: float) -> None:
    """Fit slopes as steep as published ones; a bound of 3 on |c| was off by 10 %."""
    truth = {"E": 0.02 if c > 0 else 0.5, "A": 3.0 if c > 0 else 1e4, "x1": 1e8, "f": 0.3}
    truth |= {"alpha": alpha, "c": c}
    exact = fitted(broken(0.0, **truth), "broken", estimator="least_squares")
    assert exact.parameters == pytest.approx(truth, rel=1e-3)
    assert exact.bounds_met == {}
    noisy = fitted(broken(0.01, **truth), "broken", estimator="least_squares")
    assert np.sqrt(np.mean(noisy.residuals**2)) < 0.0105


BOUNDED = [(law, p) for law, form in LAWS.items() for p in form.bounds if p not in form.units]


@pytest.mark.parametrize("end", [0, 1])
@pytest.mark.parametrize(("law", "name"), BOUNDED)
def test_a_bound_that_binds_is_named(law: str, name: str, end: int) -> None:
    """Move each bound of each law to exclude the truth."""
    form, natural = LAWS[law], truth(LAWS[law])
    size = abs(natural[name])
    ends = (natural[name] + 0.3 * size, 1e5) if end == 0 else (-1e5, natural[name] - 0.3 * size)
    ends = ends if name in form.exponents else (max(ends[0], 1e-3), ends[1])
    tight = dataclasses.replace(form, bounds={**form.bounds, name: ends})
    runs = table(form, natural)
    settings: dict[str, Any] = {v: v for v in form.variables}
    found = fit(runs, tight, loss="loss", estimator="least_squares", **settings)
    line = found.bounds_met[name]
    assert line.startswith(f"{name} = {ends[end]:.4g} is at its {('lower', 'upper')[end]} bound: ")
    assert line.endswith("its value comes from the bound, not from the runs")
    one = intervals(found, [name])[name]
    assert not one.identified  # that end is not the data's
    assert one.estimate == pytest.approx(ends[end])
    assert (one.low in (0.0, -np.inf)) if end == 0 else one.high == np.inf


def test_a_natural_bound_is_said_to_be_one() -> None:
    flat = {"E": 1e-3, "A": 1.0, "x1": 3e8, "f": 1.2, "alpha": 0.0, "c": 5.69}
    found = fitted(broken(0.01, **flat), "broken")
    assert found.bounds_met == {
        "alpha": "alpha = 0 is at its natural bound: below zero the loss would rise"
    }
    one = intervals(found, ["alpha"])["alpha"]
    assert one.low == -np.inf
    assert 0 < one.high < 0.05
    smooth = {"E": 1e-4, "A": 60.0, "x1": 1e8, "f": 15.0, "alpha": 0.01, "c": 0.9}
    met = fitted(broken(0.01, **smooth), "broken").bounds_met
    end = "is the smallest x of the runs, its natural bound: they show no break"
    assert met == {"x1": f"x1 = 1e+06 {end}"}
    zero = table(LAWS["power"], truth(LAWS["power"]))
    gone = fitted(zero, "power_constant").bounds_met["E"]
    assert gone == "E = 0 went to zero, its natural bound: these data do not show that term"


# --- residuals of the loss itself


@pytest.mark.parametrize("law", ["power_constant", "chinchilla", "coupled"])
def test_raw_residuals_are_those_of_scipy(law: str) -> None:
    form = LAWS[law]
    runs = table(form, truth(form))
    runs["loss"] += 0.02 * np.random.default_rng(3).standard_normal(len(runs))
    found = fitted(runs, law, objective="raw", estimator="least_squares")
    logs = found.points.x

    def model(_: Any, *theta: float) -> np.ndarray:
        fitted: np.ndarray = np.exp(form.log_loss(np.array(theta)[None], logs)[0])
        return fitted

    start = form.internal(truth(form), found.points.centres)
    exact: dict[str, Any] = {"xtol": 1e-14, "ftol": 1e-14}
    y = runs["loss"].to_numpy()
    theta, spread = optimize.curve_fit(model, np.arange(len(y)), y, start, **exact)
    assert found.parameters == pytest.approx(form.natural(theta, found.points.centres), rel=1e-4)
    expected = runs["loss"].to_numpy() - model(None, *theta)
    np.testing.assert_allclose(found.residuals, expected, atol=1e-6)
    np.testing.assert_allclose(np.diag(covariance(found)), np.diag(spread), rtol=1e-3)
    assert found.unit == "L"
    assert found.scale == pytest.approx(np.sqrt(np.sum(expected**2) / found.degrees))
    logged = fitted(runs, law, estimator="least_squares")
    assert logged.unit == "log L"
    assert logged.parameters != pytest.approx(found.parameters, rel=1e-4)
    place = {v: float(runs[v].max()) for v in form.variables}
    one = predict_interval(found, new_run=True, **place)  # a run scatters by 0.02 everywhere
    reach = (one.high - one.low) / 2
    assert reach == pytest.approx(special.stdtrit(found.degrees, 0.975) * found.scale, rel=0.25)


# --- errors


@pytest.mark.parametrize(
    ("change", "arguments", "words"),
    [
        (lambda r: r.assign(N=1e8), {}, ["N: is 1e+08 in every run"]),
        (lambda r: r.iloc[[0, 7, 14, 22]], {}, ["has 5 parameters", "these 4 runs are 4"]),
        (lambda r: r.loc[[0, 7, 15] * 4], {}, ["has 5 parameters", "these 12 runs are 3"]),
        (lambda r: r.assign(loss=[np.nan, *r.loss[1:]]), {}, ["loss=nan", "row 0"]),
        (lambda r: r.assign(loss=[-1.0, *r.loss[1:]]), {}, ["loss=-1.0", "above zero"]),
        (lambda r: r.rename(columns={"D": "tokens"}), {}, ["D: no such column", "tokens"]),
        (lambda r: r, {"law": "chinchila"}, ["law=chinchila", "chinchilla_tied"]),
        (lambda r: r, {"estimator": "median"}, ["estimator=median", "likelihood"]),
        (lambda r: r, {"estimator": "absolute"}, ["absolute: removed; estimator=likelihood"]),
        (lambda r: r, {"estimator": "huber", "threshold": -1.0}, ["threshold=-1", "above zero"]),
        (lambda r: r, {"objective": "nats"}, ["objective=nats", "log, raw"]),
    ],
)
def test_errors_are_one_line(change: Any, arguments: dict[str, Any], words: list[str]) -> None:
    runs = change(table(LAWS["chinchilla"], truth(LAWS["chinchilla"])))
    with pytest.raises(ConfigError) as raised:
        fit(runs, **{"law": "chinchilla", "loss": "loss", "N": "N", "D": "D", **arguments})
    assert "\n" not in str(raised.value)
    for word in words:
        assert word in str(raised.value)


# --- what is printed


def one_variable(column: str, noise: float = 0.01) -> pd.DataFrame:
    """Return twelve runs about L = 2 + 300 / x^0.5."""
    x = np.geomspace(1e4, 1e7, 12)
    scatter = np.exp(noise * np.random.default_rng(0).normal(size=len(x)))
    return pd.DataFrame({column: x, "loss": (2 + 300 / x**0.5) * scatter})


@pytest.mark.parametrize(
    ("column", "letter", "end"),
    [
        ("parameters_non_embedding", "N", ""),
        ("train_tokens", "D", ""),
        ("flops_exact", "C", ""),
        ("width", "x", ", x: width"),
    ],
)
def test_a_law_is_printed_in_one_line(column: str, letter: str, end: str) -> None:
    law = fit(one_variable(column), "power_constant", loss="loss", x=column)
    alpha = intervals(law)["alpha"]
    found = re.fullmatch(
        rf"L = ([\d.]+) \+ ([\d.]+) / {letter}\^([\d.]+), alpha ([\d.]+) to ([\d.]+){end}", str(law)
    )
    assert found is not None, str(law)
    shown = [float(number) for number in found.groups()]
    expected = [*law.parameters.values(), alpha.low, alpha.high]
    assert shown == pytest.approx(expected, rel=0.02)
    at = {letter: 1e6}
    assert law.predict(**at) == law.predict(x=1e6) == pytest.approx(2.3, rel=0.02)
    page = law._repr_html_()
    assert str(law) in page
    assert "12 runs, least squares" in page


def test_a_law_without_degrees_of_freedom_is_printed_without_intervals() -> None:
    law = fit(one_variable("x").iloc[::5], "power_constant", loss="loss", x="x")
    assert str(law).endswith(", no intervals: as many parameters as runs, x: x")
