"""The best split of a budget, against closed forms, scipy and published analyses."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize

from tinygpt.config import ConfigError
from tinygpt.scaling import Columns, Envelope, IsoFlop, analyse
from tinygpt.scaling import fit as fit_law
from tinygpt.scaling.fitting import Fit
from tinygpt.scaling.frontier import CURVES, LAW, PROFILES, frontier, predict
from tinygpt.scaling.intervals import predict_interval
from tinygpt.scaling.isoflop import Minima, PowerLaw, budgets, envelope, isoflop
from tinygpt.scaling.runs import load_curves
from tinygpt.scaling.split import best_split, by_law, closed_form, flops_per_token, recorded

HOFFMANN = {"A": 406.4, "B": 410.7, "E": 1.69, "alpha": 0.3392, "beta": 0.2849}
EPOCH = {"A": 482.01, "B": 2085.43, "E": 1.8169, "alpha": 0.3478, "beta": 0.3658}
A_EXACT = HOFFMANN["beta"] / (HOFFMANN["alpha"] + HOFFMANN["beta"])
FACTORS = (0.25, 0.35, 0.5, 0.7, 1, 1.4, 2, 2.8, 4)
COLUMNS: dict[str, Any] = {"n": "n", "d": "d", "c": "c", "loss": "loss"}


def chinchilla(n, d, p=HOFFMANN):
    return p["E"] + p["A"] / n ** p["alpha"] + p["B"] / d ** p["beta"]


def best_n(flops, p=HOFFMANN):
    """By scipy, without any formula of ours."""

    def loss(log_n):
        return chinchilla(np.exp(log_n), flops / 6 / np.exp(log_n), p)

    middle = np.log(flops / 6) / 2
    found = optimize.minimize_scalar(
        loss, bounds=(middle - 12, middle + 12), method="bounded", options={"xatol": 1e-10}
    )
    return float(np.exp(found.x))


def profiles(p=HOFFMANN, noise=0.0, seed=0, factors=FACTORS):
    """Runs of five budgets, sizes about the best of each."""
    random = np.random.default_rng(seed)
    rows = []
    for flops in 10.0 ** np.arange(17, 22):
        for n in best_n(flops, p) * np.array(factors):
            d = flops / 6 / n
            rows.append((n, d, flops, chinchilla(n, d, p) * np.exp(noise * random.normal())))
    return pd.DataFrame(rows, columns=["n", "d", "c", "loss"])


def curves(p=HOFFMANN, low=1e6, high=1e11, sizes=21):
    """A curve a size, as if every checkpoint were the end of a run."""
    parts = []
    for i, n in enumerate(np.geomspace(low, high, sizes)):
        d = np.geomspace(1e7, 1e13, 150)
        columns = {"folder": f"run{i}", "n": n, "tokens": d, "flops_exact": 6 * n * d}
        parts.append(pd.DataFrame({**columns, "val_loss": chinchilla(n, d, p)}))
    return pd.concat(parts, ignore_index=True)


def fitted(table: pd.DataFrame, law: str = "chinchilla") -> Fit:
    return fit_law(table, law, N="n", D="d", loss="loss")


@pytest.fixture(scope="module")
def exact() -> Fit:
    return fitted(profiles())


def minima_of(found: IsoFlop | Envelope) -> Minima:
    assert found.minima is not None
    return found.minima


def with_parameters(fit: Fit, **natural: float) -> Fit:
    theta = fit.optimum.law.internal(natural, fit.points.centres)
    return dataclasses.replace(fit, optimum=dataclasses.replace(fit.optimum, theta=theta))


# --- the three ways


def test_three_ways_recover_a_surface_without_noise(exact: Fit) -> None:
    found = frontier(exact, profiles()["c"].to_numpy(), curves=curves(), replicas=20)
    assert [one.way for one in found.estimates] == [LAW, PROFILES, CURVES]
    truth = best_n(found.budget)
    for one, within in zip(found.estimates, (1e-5, 5e-3, 5e-3), strict=True):
        assert one.a.estimate == pytest.approx(A_EXACT, abs=1e-3)
        assert one.b.estimate == pytest.approx(1 - A_EXACT, abs=1e-3)
        assert one.n.estimate == pytest.approx(truth, rel=within)
        assert one.d.estimate == pytest.approx(found.budget / 6 / truth, rel=within)
    assert found.missing == {}
    assert found.disagreements == ()
    assert list(found.table()["way"]) == [LAW, PROFILES, CURVES]


def test_the_law_goes_to_ten_times_the_largest_budget(exact: Fit) -> None:
    found = frontier(exact, profiles()["c"].to_numpy(), replicas=0)
    law = found.law
    assert law is not None
    assert law.flops[[0, -1]] == pytest.approx([1e17, 1e22])
    n, d = law.n.estimate, law.d.estimate
    assert n == pytest.approx([best_n(c) for c in law.flops], rel=1e-4)
    assert d == pytest.approx(law.flops / 6 / n)
    assert law.loss.estimate == pytest.approx(chinchilla(n, d), rel=1e-6)
    assert set(found.missing) == {CURVES}


def test_bands_cover_the_truth() -> None:
    """Of twenty noisy tables the 95 % intervals of both ways miss the exponent in few."""
    hits = {LAW: 0, PROFILES: 0}
    for seed in range(20):
        table = profiles(noise=0.002, seed=seed)
        found = frontier(fitted(table), table["c"].to_numpy(), replicas=200)
        for one in found.estimates:
            hits[one.way] += A_EXACT in one.a
        assert found.law is not None
        assert (found.law.loss.low <= found.law.loss.estimate).all()
    assert min(hits.values()) >= 16


def test_ways_that_differ_are_named(exact: Fit) -> None:
    compute = profiles()["c"].to_numpy()
    found = frontier(exact, compute, curves=curves(EPOCH), replicas=20)
    words = " ".join(found.disagreements)
    assert len(found.disagreements) == 4  # exponent and size, of the curves with both others
    assert CURVES in words
    assert "the exponent of N" in words
    assert "the best N at 1.00e21 FLOPs" in words


# --- IsoFLOP profiles


@pytest.mark.parametrize(
    ("method", "within"), [("cubic", 5e-3), ("akima", 5e-3), ("parabola", 0.05)]
)
def test_minima_of_profiles(method: str, within: float) -> None:
    found = isoflop(profiles(), **COLUMNS, method=method)
    minima = minima_of(found)
    assert minima.n == pytest.approx([best_n(c) for c in minima.flops], rel=within)
    assert minima.n_law.exponent.estimate == pytest.approx(A_EXACT, abs=1e-4)
    for profile in found.profiles:
        assert profile.best is not None
        assert profile.curve(np.array([profile.best[1]])) == pytest.approx(profile.best[3])


@pytest.mark.parametrize(
    ("factors", "end"), [((1.5, 2, 4, 8), "smallest"), ((0.1, 0.2, 0.4, 0.6), "largest")]
)
def test_a_minimum_at_the_edge_is_none(factors: tuple[float, ...], end: str) -> None:
    found = isoflop(profiles(factors=factors), **COLUMNS)
    assert found.minima is None
    assert "0 of 5 budgets" in found.reason
    for profile in found.profiles:
        assert profile.best is None
        assert f"least at the {end} size" in profile.reason


def test_few_sizes_and_few_budgets() -> None:
    two = isoflop(profiles(factors=(0.5, 1)), **COLUMNS)
    assert all("2 sizes; a minimum needs 3" in p.reason for p in two.profiles)
    three = isoflop(profiles(factors=(0.5, 1, 2)), **COLUMNS)
    assert {p.method for p in three.profiles} == {"parabola"}
    assert all(p.best is not None for p in three.profiles)
    of_two = minima_of(isoflop(profiles().query("c < 1e19"), **COLUMNS)).n_law
    assert not of_two.exponent.identified
    assert not of_two.at(1e20).identified


def test_every_seed_is_a_row_of_the_polynomial() -> None:
    """Sizes with more seeds weigh more: the minimum is that of numpy's cubic through all rows."""
    table = profiles(noise=0.005, factors=(0.25, 0.5, 0.7, 1, 1.5, 2.5, 4))
    again = profiles(noise=0.005, seed=1, factors=(0.25, 0.5, 0.7, 1, 1.5, 2.5, 4))
    table = pd.concat([table, again[again["n"] < again["n"].median()]], ignore_index=True)
    found = isoflop(table, **COLUMNS)
    for profile in found.profiles:
        rows = table[table["c"] == profile.flops[0]]
        assert len(profile.n) == len(rows)
        if profile.best is not None:
            x = np.log(rows["n"] / rows["n"].mean())
            roots = np.polynomial.Polynomial(np.polyfit(x, rows["loss"], 3)[::-1]).deriv().roots()
            at = np.log(profile.best[1] / rows["n"].mean())
            assert np.abs(roots - at).min() < 1e-6


@settings(max_examples=60)
@given(
    st.lists(st.floats(1.5, 10), min_size=1, max_size=6),
    st.lists(st.integers(1, 5), min_size=7, max_size=7),
    st.integers(0, 1000),
)
def test_budgets_are_found_though_their_runs_differ(steps, counts, seed) -> None:
    random = np.random.default_rng(seed)
    centres = 1e15 * np.cumprod([1.0, *steps])
    label = np.repeat(np.arange(len(centres)), counts[: len(centres)])
    random.shuffle(label)
    flops = centres[label] * np.exp(random.uniform(-0.04, 0.04, len(label)))
    found = budgets(flops)
    assert [set(label[rows]) for rows in found] == [{i} for i in range(len(centres))]


def test_compute_that_goes_with_the_size_does_not_move_the_minimum() -> None:
    """Within a budget the larger models have spent a few per cent more."""
    table = profiles()
    table["d"] *= (table["n"] / table.groupby("c")["n"].transform("median")) ** 0.02
    table["c"] = 6 * table["n"] * table["d"]
    table["loss"] = chinchilla(table["n"], table["d"])
    assert np.ptp(table["c"].iloc[:9]) / table["c"].iloc[0] > 0.05
    found = minima_of(isoflop(table, **COLUMNS))
    assert found.n == pytest.approx([best_n(c) for c in found.flops], rel=0.015)
    assert found.d == pytest.approx(found.flops / 6 / found.n)


def test_a_chain_of_runs_is_no_budget() -> None:
    n = np.geomspace(1e6, 1e8, 20)
    c = np.geomspace(1e17, 1e18, 20)
    table = pd.DataFrame({"n": n, "d": c / 6 / n, "c": c, "loss": chinchilla(n, c / 6 / n)})
    (profile,) = isoflop(table, **COLUMNS).profiles
    assert "they are not one budget" in profile.reason


def study(seed: int) -> tuple[pd.DataFrame, float]:
    """Four budgets of two seeds by a law of random exponents, the sizes tried off the best by a
    factor that changes with the budget, and the exponent of N."""
    random = np.random.default_rng(seed)
    alpha, beta = random.uniform(0.25, 0.6, 2)
    p = {"A": 400.0, "B": 400.0, "E": 1.7, "alpha": alpha, "beta": beta}
    rows, (first, last) = [], random.uniform(-0.7, 0.7, 2)
    for flops, off in zip(10.0 ** np.arange(17, 21), np.linspace(first, last, 4), strict=True):
        n = np.repeat(best_n(flops, p) * np.exp(off) * np.geomspace(0.15, 7, 7), 2)
        loss = chinchilla(n, flops / 6 / n, p) * np.exp(0.003 * random.normal(size=len(n)))
        rows.append(pd.DataFrame({"n": n, "d": flops / 6 / n, "c": flops, "loss": loss}))
    return pd.concat(rows, ignore_index=True), beta / (alpha + beta)


def test_the_interval_of_profiles_covers_interpolants_and_seeds() -> None:
    """In 60 worlds; a regression through the minima of one interpolant misses more often."""
    hits = alone = 0
    for seed in range(60):
        table, exponent = study(seed)
        minima = minima_of(isoflop(table, **COLUMNS))
        found = minima.n_law.exponent
        assert found.method.startswith("bootstrap over interpolants and seeds")
        hits += exponent in found
        alone += exponent in PowerLaw.through(minima.flops, minima.n).exponent
    assert alone < hits
    assert hits >= 54


def test_an_interpolant_without_minima_is_named() -> None:
    """Of three sizes there is no cubic."""
    table = pd.concat([profiles(factors=(0.3, 1, 3), noise=1e-3, seed=seed) for seed in (0, 1)])
    found = minima_of(isoflop(table, **COLUMNS)).n_law.exponent
    by_two = "bootstrap over interpolants and seeds (minima by the akima and the"
    assert found.method.startswith(by_two)
    assert A_EXACT in found
    plain = minima_of(isoflop(profiles(factors=(0.3, 1, 3)), **COLUMNS))  # nothing tells the noise
    assert plain.n_law.exponent.method == "regression"


def test_isoflop_says_what_is_wrong() -> None:
    with pytest.raises(ConfigError, match="method=spline: must be one of cubic"):
        isoflop(profiles(), **COLUMNS, method="spline")
    with pytest.raises(ConfigError, match="same_budget=1: must be above 1"):
        isoflop(profiles(), **COLUMNS, same_budget=1.0)
    with pytest.raises(ConfigError, match="size: no such column"):
        isoflop(profiles(), n="size", d="d", c="c", loss="loss")


def test_the_interval_of_a_power_law_is_that_of_a_regression() -> None:
    from scipy import stats

    random = np.random.default_rng(0)
    x = np.linspace(0, 5, 8)
    y = 0.5 * x + 1 + 0.1 * random.normal(size=8)
    found = PowerLaw.through(np.exp(x), np.exp(y))
    line = stats.linregress(x, y)
    reach = stats.t.ppf(0.975, 6) * line.stderr
    assert found.exponent.estimate == pytest.approx(line.slope)
    assert found.exponent.high == pytest.approx(line.slope + reach)
    at = found.at(1.0)  # log C = 0: the intercept
    reach = stats.t.ppf(0.975, 6) * line.intercept_stderr
    assert np.log(at.high) == pytest.approx(line.intercept + reach)


# --- training curves


def test_a_stretch_that_ends_with_a_curve_does_not_count() -> None:
    table = curves(sizes=9)
    full, sizes = minima_of(envelope(table, n="n")), np.unique(table["n"])
    assert full.n == pytest.approx(sizes[1:-1])
    cut = table[(table["n"] != sizes[4]) | (table["flops_exact"] < full.flops[3])]
    # the size itself still ends in a run of another size that loses there, but its neighbours
    # are not moved
    found = minima_of(envelope(cut, n="n"))
    assert set(np.round(found.n)) >= set(np.round(sizes[[1, 2, 6, 7]]))


def test_envelope_leaves_out_what_was_not_measured() -> None:
    table = curves(sizes=9)
    holes = table.copy()
    holes.loc[holes.index % 3 != 0, "val_loss"] = np.nan
    start = table.groupby("folder").head(1).assign(tokens=0.0, flops_exact=0.0, val_loss=11.0)
    one, other = (minima_of(envelope(t, n="n")) for t in (table, pd.concat([start, holes])))
    assert other.flops == pytest.approx(one.flops, rel=0.03)
    with pytest.raises(ConfigError, match="no run has 2 checkpoints"):
        envelope(table.groupby("folder").head(1), n="n")
    with pytest.raises(ConfigError, match="size: no such column"):
        envelope(table, n="size")
    two = envelope(curves(sizes=2), n="n")
    assert two.minima is None
    assert "0 sizes are best between" in two.reason


def test_smoothing_takes_off_what_scatter_does_to_the_stairs() -> None:
    random = np.random.default_rng(0)
    found = []
    for smooth in (1, 11):
        bias = []
        for _ in range(10):
            table = curves(low=1e7, high=1e10)
            table["val_loss"] *= np.exp(0.003 * random.normal(size=len(table)))
            minima = minima_of(envelope(table, n="n", smooth=smooth))
            bias.append(minima.n_law.exponent.estimate - A_EXACT)
        found.append(abs(np.mean(bias)))
    assert found[1] < found[0] / 3
    with pytest.raises(ConfigError, match="smooth=0: must be 1 or more"):
        envelope(curves(), n="n", smooth=0)


# --- Pearce & Song 2024 (arXiv:2406.12907): counting without embeddings


OMEGA = 47491.0  # N_total = N + omega N^(1/3)


def total(n):
    return n + OMEGA * np.cbrt(n)


@pytest.mark.parametrize(("p", "exponent"), [(HOFFMANN, 0.74), (EPOCH, 0.78)])
def test_the_envelope_of_twenty_sizes_gives_their_figures(
    p: dict[str, float], exponent: float
) -> None:
    """From simulated curves, as they did it: a regression on the stairs themselves.  The law counts
    all parameters, the budget is 6·N·D without embeddings."""
    parts = []
    for n in np.logspace(2.9, 9.2, 20):
        d = np.logspace(6, 25, 1000)
        columns = {"folder": n, "n": n, "tokens": d, "flops_exact": 6 * n * d}
        parts.append(pd.DataFrame({**columns, "val_loss": chinchilla(total(n), d, p)}))
    found = envelope(pd.concat(parts), n="n")
    theirs = (found.flops > 10**12.95) & (found.flops < 10**20.7)
    stairs = np.polyfit(np.log(found.flops[theirs]), np.log(found.n[theirs]), 1)[0]
    assert stairs == pytest.approx(exponent, abs=5e-3)
    assert exponent in minima_of(found).n_law.exponent  # the middles of the stretches agree


# --- the law


BOUNDS = {
    "A": st.floats(100, 1e4),
    "B": st.floats(100, 1e4),
    "E": st.floats(0.1, 3),
    "alpha": st.floats(0.1, 0.5),
    "beta": st.floats(0.1, 0.5),
}


@settings(max_examples=40)
@given(p=st.fixed_dictionaries(BOUNDS), flops=st.floats(1e17, 1e21))
def test_closed_form_and_numeric_agree(exact: Fit, p: dict[str, float], flops: float) -> None:
    law = with_parameters(exact, **p)
    n, d = best_split(law, flops)
    assert 6 * n * d == pytest.approx(flops)
    by_formula = closed_form(p["A"], p["B"], p["alpha"], p["beta"], flops)
    assert (n, d) == pytest.approx(tuple(map(float, by_formula)), rel=1e-6)
    if 1e6 < n < 1e12:  # the numeric way stays about the sizes that were run
        assert best_split(law, flops, lambda n: 6 * n)[0] == pytest.approx(n, rel=1e-4)
    for other in (n / 1.1, n * 1.1):
        assert chinchilla(other, flops / 6 / other, p) >= chinchilla(n, d, p)


def test_kaplans_law_has_a_closed_form_too(exact: Fit) -> None:
    """(Nc/N)^(alpha/beta) + Dc/D is least where N ~ C^(beta/(alpha+beta))."""
    law = fitted(profiles(noise=0.01), "kaplan")
    p = law.parameters
    power = p["alpha"] / p["beta"]
    n, d = closed_form(p["Nc"] ** power, p["Dc"], power, 1.0, 1e20)
    assert best_split(law, 1e20) == pytest.approx((float(n), float(d)), rel=1e-4)
    found = by_law(law, profiles()["c"].to_numpy(), replicas=0)
    assert found.a.estimate == pytest.approx(1 / (1 + power), abs=1e-4)


def test_repeated_tokens_ask_for_more_epochs_rather_than_parameters() -> None:
    """Where repeating decays more slowly (rd > rn), as Muennighoff et al. 2023 found."""
    p = {"A": 400.0, "B": 400.0, "E": 1.7, "alpha": 0.3, "beta": 0.3, "rn": 5.0, "rd": 15.0}
    grid = np.meshgrid(np.geomspace(1e7, 1e10, 6), np.geomspace(1e9, 1e11, 5), [1, 4, 16])
    n, d, times = (axis.reshape(-1) for axis in grid)
    table = pd.DataFrame({"n": n, "d": d, "u": d / times, "loss": chinchilla(n, d)})
    law = fit_law(table, "data_constrained", N="n", D="d", U="u", loss="loss")
    law = with_parameters(law, **p)
    free = best_split(law, 1e21)
    assert free == pytest.approx(
        tuple(map(float, closed_form(400.0, 400.0, 0.3, 0.3, 1e21))), rel=1e-3
    )

    def loss(log_n):
        n = float(np.exp(log_n))
        return float(law.predict(N=n, D=1e21 / 6 / n, U=min(1e21 / 6 / n, 1e9))[0])

    scarce = best_split(law, 1e21, unique=1e9)
    places = np.linspace(np.log(1e7), np.log(1e12), 2001)
    assert loss(np.log(scarce[0])) <= min(map(loss, places)) + 1e-9
    assert scarce[0] < free[0]


def test_a_law_without_a_term_has_no_best_split() -> None:
    table = profiles()
    table["loss"] = 1.7 + 400 / table["n"] ** 0.3
    law = fitted(table)
    with pytest.raises(ConfigError, match="and so no best split"):
        best_split(law, 1e20)
    found = frontier(law, table["c"].to_numpy(), replicas=0)
    assert "no best split" in found.missing[LAW]
    assert found.law is None


def test_without_degrees_of_freedom_there_are_no_bands() -> None:
    law = fitted(profiles().iloc[[0, 8, 13, 30, 44]])
    assert law.degrees == 0
    found = predict(law, 1e20)
    assert np.isnan(found.n.low)
    assert np.isnan(found.loss.low)


# --- FLOPs as recorded


def test_flops_per_token_follow_the_runs() -> None:
    n = np.array([1e5, 1e6, 1e6, 1e7])
    cost = flops_per_token(n, np.ones(4), 30 * n**0.9)
    assert cost(np.array([1e4, 1e5, 3e5, 1e8])) == pytest.approx(
        30 * np.array([1e4, 1e5, 3e5, 1e8]) ** 0.9
    )
    assert flops_per_token(n, 2 * n, 12 * n**2)(np.array([7.0])) == pytest.approx([42.0])


def test_beyond_the_recorded_sizes() -> None:
    """As the rule of thumb for one size; the slope is not that of two that lie close."""
    cost = flops_per_token(np.array([1e6]), np.array([1.0]), np.array([9e6]))
    assert cost(np.array([1e5, 1e6, 1e7])) == pytest.approx([9e5, 9e6, 9e7])
    n = np.array([1e6, 1e7, 1.01e7])
    flops = 6 * n * np.array([1.2, 1.2, 1.3])
    beyond = flops_per_token(n, np.ones(3), flops)(np.array([1e8]))
    assert float(beyond[0]) == pytest.approx(6e8 * 1.3, rel=0.1)


def test_the_split_of_recorded_flops() -> None:
    """Cost of 6·N + k a token: scipy finds the same size."""
    table = profiles()
    table["c"] = (6 * table["n"] + 2e8) * table["d"]
    law = fitted(table)
    cost = recorded(law, table["c"].to_numpy())

    def loss(log_n):
        n = float(np.exp(log_n))
        return chinchilla(n, 1e20 / (6 * n + 2e8))

    found = optimize.minimize_scalar(loss, bounds=(14, 24), method="bounded")
    n, d = best_split(law, 1e20, cost)
    assert n == pytest.approx(np.exp(found.x), rel=5e-3)
    assert d * float(cost(np.array([n]))[0]) == pytest.approx(1e20)


def test_an_analysis_counts_its_prediction_as_its_runs_do() -> None:
    table = profiles(noise=0.002)
    table["c"] = (6 * table["n"] + 2e8) * table["d"]
    columns = Columns(n="n", d="d", c="c", loss="loss", n_total=None, u=None, t=None, run=None)
    found = analyse(table, table.iloc[:0].assign(reason=""), columns, law="chinchilla")
    place = found.predictions[0].place
    cost = (6 * place["N"] + 2e8) * place["D"]
    assert cost == pytest.approx(10 * table["c"].max(), rel=1e-3)
    assert found.frontier is not None
    assert found.frontier.law is not None
    assert found.frontier.law.n.estimate[-1] == pytest.approx(place["N"], rel=1e-6)


# --- a budget


def test_predict(exact: Fit) -> None:
    found = predict(exact, 1e23, replicas=20)
    n = best_n(1e23)
    assert found.n.estimate == pytest.approx(n, rel=1e-4)
    least = chinchilla(n, 1e23 / 6 / n)
    assert found.loss.estimate == pytest.approx(least)
    off = chinchilla(2 * n, 1e23 / 12 / n)
    assert found.twice_too_large.loss == pytest.approx(off / least - 1, rel=1e-3)

    def optimal(log_c):
        n = best_n(np.exp(log_c))
        return chinchilla(n, np.exp(log_c) / 6 / n) - off

    needed = np.exp(optimize.brentq(optimal, np.log(1e20), np.log(1e23)))
    assert found.twice_too_large.compute == pytest.approx(1 - needed / 1e23, abs=1e-3)
    assert str(found).startswith("with 1.00e23 FLOPs: N = ")
    assert "a model twice too large or too small costs +0.3" in str(found)
    with pytest.raises(ConfigError, match="flops=0: must be above zero"):
        predict(exact, 0.0)


def test_predict_at_a_place(exact: Fit) -> None:
    """Of a law in one variable, too, which splits no budget."""
    both = predict(exact, N=1e9, D=1e11)
    assert both.loss.estimate == pytest.approx(chinchilla(1e9, 1e11))
    random, n = np.random.default_rng(0), np.geomspace(1e5, 1e8, 20)
    scatter = np.exp(0.01 * random.normal(size=20))
    table = pd.DataFrame({"parameters_non_embedding": n, "loss": (1.5 + 300 / n**0.4) * scatter})
    law = fit_law(table, "power_constant", loss="loss")
    found = predict(law, N=1e9)
    assert found.loss == predict_interval(law, x=1e9)
    assert found.run.low < found.loss.low < 1.5 + 300 / 1e9**0.4 < found.loss.high < found.run.high
    assert re.fullmatch(
        r"at N = 1\.00e9: L = 1\.\d+ \(1\.\d+ to 1\.\d+\), a single run 1\.\d+ to 1\.\d+",
        str(found),
    )
    with pytest.raises(ConfigError, match=r"a law in N alone splits no budget; predict\(law, N="):
        predict(law, 1e14)
    with pytest.raises(ConfigError, match="predict: the law does not go by D"):
        predict(law, N=1e9, D=1e9)
    with pytest.raises(ConfigError, match="predict: D is missing: the law goes by N and D"):
        predict(exact, N=1e9)


def test_intervals_of_a_budget_hold_the_estimate() -> None:
    table = profiles(noise=0.002)
    found = predict(fitted(table), 1e22, replicas=300)
    for interval in (found.n, found.d, found.loss, found.run):
        assert interval.low < interval.estimate < interval.high
    assert found.run.high > found.loss.high
    assert best_n(1e22) in found.n


# --- curves of run folders


def test_load_curves(tmp_path: Path) -> None:
    for i, n in enumerate((100, 200)):
        folder = tmp_path / "study" / f"run{i}"
        folder.mkdir(parents=True)
        (folder / "environment.json").write_text(json.dumps({"config_hash": f"{i}"}))
        (folder / "metrics.csv").write_text("step,tokens,val_loss\n0,0,5.0\n1,10,\n2,20,4.0\n")
        outcome = {
            "parameters_non_embedding": n,
            "model_parameters": 2 * n,
            "train_tokens": 20,
            "flops_6nd": 240.0 * n,
            "flops_exact": 300.0 * n,
            "seed": i,
            "status": "finished",
        }
        (folder / "results.json").write_text(json.dumps(outcome))
    begun = tmp_path / "study" / "begun"
    begun.mkdir()
    (begun / "environment.json").write_text(json.dumps({"config_hash": "x"}))
    found = load_curves(tmp_path)
    assert len(found) == 6
    assert list(found["flops_exact"]) == [0, 15e3, 30e3, 0, 30e3, 60e3]
    assert list(found["flops_6nd"])[-1] == 48e3
    assert list(found["parameters_non_embedding"]) == [100] * 3 + [200] * 3
    assert found["val_loss"].isna().sum() == 2
    assert load_curves(begun).empty
