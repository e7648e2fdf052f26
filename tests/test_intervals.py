"""Test intervals: closed forms, brute force, and coverage."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import optimize, stats

from tests.test_fitting import TRUTH, fitted, table, truth
from tinygpt.config import ConfigError
from tinygpt.scaling.fitting import Fit
from tinygpt.scaling.intervals import (
    Interval,
    bootstrap,
    delta,
    intervals,
    of_loss,
    of_parameter,
    predict_interval,
    profile,
)
from tinygpt.scaling.laws import LAWS

POWER, CHINCHILLA = LAWS["power"], LAWS["chinchilla"]


@pytest.fixture(scope="module")
def line() -> Fit:
    """Fit a power law: a line in logarithms, for which everything is known."""
    return fitted(table(POWER, truth(POWER), 0.03), "power")


@pytest.fixture(scope="module")
def surface() -> Fit:
    return fitted(table(CHINCHILLA, truth(CHINCHILLA), 0.01), "chinchilla")


def regression(fit: Fit) -> tuple[float, float, float]:
    """Return the slope of log loss in log x, its standard error and the t quantile by scipy."""
    found = stats.linregress(np.log(fit.table.x), np.log(fit.table.loss))
    return found.slope, found.stderr, float(stats.t.ppf(0.975, len(fit.points) - 2))


# --- closed forms


@pytest.mark.parametrize("method", [delta, profile])
def test_a_line_has_the_intervals_of_regression(line: Fit, method: Callable[..., Interval]) -> None:
    slope, error, t = regression(line)
    found = method(line, of_parameter(line, "alpha"))
    assert found.estimate == pytest.approx(-slope, rel=1e-9)
    assert found.low == pytest.approx(-slope - t * error, rel=1e-6)
    assert found.high == pytest.approx(-slope + t * error, rel=1e-6)
    line_of = stats.linregress(np.log(line.table.x), np.log(line.table.loss))
    found = method(line, of_parameter(line, "A"))
    for end, sign in ((found.low, -1), (found.high, 1)):
        reach = sign * t * line_of.intercept_stderr
        assert np.log(end) == pytest.approx(line_of.intercept + reach, rel=1e-6)


@pytest.mark.parametrize("new_run", [False, True])
def test_a_line_predicts_as_regression_does(line: Fit, new_run: bool) -> None:
    x, y = np.log(line.table.x.to_numpy()), np.log(line.table.loss.to_numpy())
    place = 1e12
    slope, _, t = regression(line)
    centre = y.mean() + slope * (np.log(place) - x.mean())
    s = np.sqrt(np.sum((y - y.mean() - slope * (x - x.mean())) ** 2) / (len(x) - 2))
    part = 1 / len(x) + (np.log(place) - x.mean()) ** 2 / np.sum((x - x.mean()) ** 2)
    reach = t * s * np.sqrt(part + new_run)
    for found in (
        predict_interval(line, new_run=new_run, x=place),
        delta(line, of_loss(line, x=place), new_run=new_run),
    ):
        assert np.log(found.low) == pytest.approx(centre - reach, rel=1e-6)
        assert np.log(found.high) == pytest.approx(centre + reach, rel=1e-6)


# --- brute force


@pytest.mark.parametrize("name", ["alpha", "beta", "E"])
def test_profile_against_brute_force(surface: Fit, name: str) -> None:
    """Check that the best law with either end as its value is worse by the allowed amount."""
    law, points = surface.optimum.law, surface.points
    found = profile(surface, of_parameter(surface, name))
    n, p = len(points), len(law)
    best = surface.optimum.objective
    expected = best * (1 + stats.t.ppf(0.975, n - p) ** 2 / (n - p))
    j = law.parameters.index(name)
    for end in (found.low, found.high):
        held = np.log(end) if name == "E" else end

        def residuals(free: np.ndarray, held: float = held) -> np.ndarray:
            theta = np.insert(free, j, held)
            return np.asarray(law.log_loss(theta[None], points.x)[0] - points.y)

        start = np.delete(surface.optimum.theta, j)
        solved = optimize.least_squares(residuals, start, xtol=1e-14, ftol=1e-14, gtol=1e-14)
        assert solved.cost == pytest.approx(expected, rel=1e-3)


# --- bootstrap


def test_bootstrap_of_a_line_is_near_regression(line: Fit) -> None:
    """Compare with White's standard error of the slope (HC3)."""
    x = np.log(line.table.x.to_numpy())
    x = x - x.mean()
    leverages = 1 / len(x) + x**2 / (x @ x)
    error = np.sqrt(np.sum((x * line.residuals / (1 - leverages)) ** 2)) / (x @ x)
    replicas = bootstrap(line, 2000)
    assert replicas.failed == 0
    assert replicas.parameters["alpha"].std() == pytest.approx(error, rel=0.2)
    assert line.parameters["alpha"] in replicas.interval("alpha")


def test_bootstrap_is_a_function_of_its_seed(surface: Fit) -> None:
    one, same, other = (bootstrap(surface, 50, seed=seed).theta for seed in (1, 1, 2))
    assert np.array_equal(one, same)
    assert not np.allclose(one, other)


def test_copies_of_runs_are_no_new_runs() -> None:
    """Copy each run four times: the interval stays if clustered, else it halves."""
    runs = table(POWER, truth(POWER), 0.03).assign(run=range(30))
    alone = bootstrap(fitted(runs, "power"), 1000).parameters["alpha"].std()
    copies = fitted(pd.concat([runs] * 4, ignore_index=True), "power", estimator="least_squares")
    naive = bootstrap(copies, 1000).parameters["alpha"].std()
    clustered = bootstrap(copies, 1000, cluster="run").parameters["alpha"].std()
    assert naive == pytest.approx(alone / 2, rel=0.15)
    assert clustered == pytest.approx(alone, rel=0.15)


def test_replicas_that_came_to_no_minimum_are_counted(surface: Fit) -> None:
    """Check that an interval of the others says how many refits failed."""
    replicas = bootstrap(surface, 50)
    assert replicas.interval("E").method == "bootstrap (pairs)"
    some = dataclasses.replace(replicas, theta=replicas.theta[3:], failed=3)
    assert some.interval("E").method == "bootstrap (pairs; 3 of 50 refits failed)"


def test_errors_are_one_line(surface: Fit) -> None:
    with pytest.raises(ConfigError, match="cluster=seed: no such column"):
        bootstrap(surface, 10, cluster="seed")
    with pytest.raises(ConfigError, match="gamma: must be one of"):
        of_parameter(surface, "gamma")
    runs = table(CHINCHILLA, truth(CHINCHILLA), 0.01).iloc[[0, 8, 16, 23, 31]]
    with pytest.raises(ConfigError, match="no interval without more runs"):
        intervals(fitted(runs, "chinchilla"))


# --- what the data do not say


def short(seed: int, constant: float) -> pd.DataFrame:
    """Return runs over one order of magnitude with 2 % noise, which cannot tell E from zero."""
    n, d = np.meshgrid(np.geomspace(3e7, 3e8, 4), np.geomspace(6e8, 6e9, 4))
    noise = 0.02 * np.random.default_rng(seed).standard_normal(n.shape)
    loss = surface_at(n, d, constant) * np.exp(noise)
    return pd.DataFrame({"N": n.ravel(), "D": d.ravel(), "loss": loss.ravel()})


def test_an_unidentified_constant_is_said() -> None:
    for seed in range(4):
        found = intervals(fitted(short(seed, 0.3), "chinchilla"), ["E"])["E"]
        assert found.low == 0.0
        assert not found.identified


def test_a_constant_of_zero_has_an_upper_end() -> None:
    fits = [fitted(short(seed, 0.3), "chinchilla") for seed in range(8)]
    at_zero = [fit for fit in fits if fit.optimum.at_bound == ("E",)]
    assert at_zero
    for fit in at_zero[:2]:
        found = intervals(fit)
        assert set(found) == set(fit.law.parameters)
        assert found["E"].estimate == found["E"].low == 0.0
        assert 0.0 < found["E"].high < fit.table.loss.min() * 1.1
        reduced = profile(fit, of_parameter(fit, "alpha"))  # as if E were known to be zero
        assert found["alpha"].high > reduced.high


def test_identified_parameters_are_said_so(surface: Fit) -> None:
    found = intervals(surface)
    assert list(found) == ["E", "A", "B", "alpha", "beta"]
    assert all(one.identified for one in found.values())
    assert all(one.low < one.estimate < one.high for one in found.values())


@pytest.mark.parametrize("estimator", ["huber", "likelihood"])
def test_other_estimators_have_intervals(estimator: str) -> None:
    fit = fitted(table(POWER, truth(POWER), 0.03), "power", estimator=estimator)
    found = intervals(fit)["alpha"]
    slope, error, _ = regression(fit)
    assert -slope - 4 * error < found.low < found.high < -slope + 4 * error
    place = predict_interval(fit, x=1e9, new_run=True)
    assert place.low < place.estimate < place.high


# --- coverage

# compute-optimal at ten times the largest compute
PLACE: dict[str, Any] = {"N": 6.17e9, "D": 3.24e10}


def surface_at(n: Any, d: Any, constant: float = TRUTH["E"]) -> Any:
    return constant + TRUTH["A"] / n ** TRUTH["alpha"] + TRUTH["B"] / d ** TRUTH["beta"]


def coverage(size: int, noise: float, worlds: int) -> Counter[str]:
    """Count how often default intervals hold the truth in ``worlds`` of size² runs."""
    axes = np.geomspace(1e7, 1e9, size), np.geomspace(2e8, 2e10, size)
    n, d = (axis.ravel() for axis in np.meshgrid(*axes))
    found: Counter[str] = Counter()
    for world in range(worlds):
        random = np.random.default_rng([size, round(1e4 * noise), world])
        loss = surface_at(n, d) * np.exp(noise * random.standard_normal(len(n)))
        fit = fitted(pd.DataFrame({"N": n, "D": d, "loss": loss}), "chinchilla")
        for name, one in intervals(fit, ["alpha", "beta", "E"]).items():
            found[name] += TRUTH[name] in one
        found["prediction"] += surface_at(PLACE["N"], PLACE["D"]) in predict_interval(fit, **PLACE)
    return found


DESIGNS = [(size, noise) for size in (4, 8) for noise in (0.005, 0.02)]


@pytest.mark.slow
@pytest.mark.parametrize(("size", "noise"), DESIGNS)
def test_coverage(size: int, noise: float) -> None:
    """Check that 95 % intervals hold the truth in 90 to 99 % of 300 worlds per design."""
    found = coverage(size, noise, 300)
    print(f"\n{size}x{size}, {noise:.1%} noise:", dict(found))
    for name in ("alpha", "beta", "prediction"):
        assert 270 <= found[name] <= 297, name


def test_coverage_in_few_worlds() -> None:
    """Check 60 worlds, of which a 95 % interval holds fewer than 50 once in 10,000 times."""
    found = coverage(4, 0.01, 60)
    for name in ("alpha", "beta", "prediction", "E"):
        assert found[name] >= 50, name
