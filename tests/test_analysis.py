"""Test the judgement of a law: which is best, what fails, what is left out, what to run next."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from tinygpt.config import ConfigError
from tinygpt.scaling import (
    LAWS,
    Analysis,
    Columns,
    Law,
    analyse,
    best_split,
    fit,
    logaddexp,
    register,
    sum_of_powers,
)
from tinygpt.scaling.columns import places_of, read_places
from tinygpt.scaling.diagnostics import check_exponent, count_once, holm
from tinygpt.scaling.evidence import (
    FAIL,
    NOT_APPLICABLE,
    NOT_TESTED,
    PASS,
    Check,
    check,
    check_choice,
    check_design,
    check_finished,
    check_validation,
)
from tinygpt.scaling.forecast import split_by_size
from tinygpt.scaling.intervals import Interval, predict_interval
from tinygpt.scaling.noise import replicas
from tinygpt.scaling.runs import SETTINGS, comparable
from tinygpt.scaling.single import single_runs

TABLE = Columns(n="N", n_total=None, d="D", u=None, t=None, c=None, loss="loss", run=None)


def chinchilla(n: Any, d: Any) -> Any:
    return 1.8 + 480.0 / n**0.35 + 2100.0 / d**0.37


def in_one_variable(constant: float) -> pd.DataFrame:
    """Return two runs of each of seven sizes, with a little noise."""
    sizes = np.repeat(np.geomspace(1e4, 1e7, 7), 2)
    noise = np.exp(0.002 * np.random.default_rng(1).normal(size=len(sizes)))
    loss = (constant + 30 / sizes**0.3) * noise
    return pd.DataFrame({"N": sizes, "D": 1e6, "loss": loss, "seed": [0, 1] * 7})


def memoriser(n: float, d: float) -> float:
    """Return the loss of a learner that keeps the n / 200 commonest of Zipf's facts it has seen.

    The loss is an integral over the facts, of which no sum of powers is a limit.
    """
    rank = np.arange(1, 16385)
    p = rank**-1.2 / np.sum(rank**-1.2)
    known = (rank <= n / 200) * (1 - (1 - p) ** (d / 500))
    return float(1.0 + 3.0 * np.sum(p * (1 - known)))


def table(
    surface: Any, noise: float, seeds: int = 2, points: int = 6, world: int = 0
) -> pd.DataFrame:
    random = np.random.default_rng(world)
    rows = [
        {"N": n, "D": d, "seed": seed, "loss": surface(n, d) * np.exp(noise * random.normal())}
        for n in np.geomspace(1e4, 3e6, points)
        for d in np.geomspace(1e5, 3e7, points)
        for seed in range(seeds)
    ]
    return pd.DataFrame(rows)


def analysed(runs: pd.DataFrame, columns: Columns = TABLE, **settings: Any) -> Analysis:
    return analyse(*comparable(runs, columns.loss), columns, **settings)


def failing(analysis: Analysis) -> list[str]:
    return [check.id for check in analysis.checks if check.passed is False]


def line(checks: Iterable[Check], id: str) -> Check:
    (found,) = [check for check in checks if check.id == id]
    return found


def test_a_chinchilla_surface_is_recognised() -> None:
    found = analysed(table(chinchilla, 0.003))
    assert found.fit.law.name in ("chinchilla", "chinchilla_tied")
    held = found.held_out
    assert held is not None
    assert held.error < 0.008
    assert 0.005 < held.half_width < 0.025
    assert held.has_skill
    detail = line(found.checks, "predicts").figure
    assert re.search(r"95 % interval \(±[12]\.\d% on average\)", detail)
    assert failing(found) == []
    assert found.is_evidence
    place = found.predictions[0].place
    assert chinchilla(place["N"], place["D"]) in found.predictions[0].loss


@pytest.mark.parametrize(("noise", "seeds"), [(0.0, 1), (0.001, 2)])
def test_a_memoriser_is_not_called_chinchilla(noise: float, seeds: int) -> None:
    """Check automatic and requested laws, the reasons given, and what seeds tell."""
    runs = table(memoriser, noise, seeds)
    assert not analysed(runs).fit.law.name.startswith("chinchilla")
    asked = analysed(runs, law="chinchilla")
    assert asked.fit.law.name == "chinchilla"
    assert not asked.is_evidence
    assert "best_law" in failing(asked)
    assert "structure" in failing(asked)
    better = line(asked.checks, "best_law")
    assert "is better: AICc by" in better.figure
    if noise:
        assert asked.noise is not None
        assert asked.noise.scale == pytest.approx(noise, rel=0.3)
        assert asked.noise.degrees == 36
        assert "lack_of_fit" in failing(asked)


def test_one_variable() -> None:
    found = analysed(in_one_variable(1.5))
    assert found.variables == {"x": "N"}
    assert found.question == "How does the loss fall with parameters?"
    assert found.fit.law.name == "power_constant"
    assert found.frontier is None
    assert found.predictions[0].place == {"x": pytest.approx(1e8)}
    assert 1.5 in found.intervals["E"]


def outlying(row: int, factor: float, seeds: int = 2, points: int = 6) -> pd.DataFrame:
    """Return runs of one length that follow a law to 1 %, except one that is off by ``factor``."""
    sizes = np.repeat(np.geomspace(6e3, 1.6e6, points), seeds)
    noise = 0.01 * np.random.default_rng(4).normal(size=len(sizes))
    runs = pd.DataFrame({"N": sizes, "D": 1e6, "loss": (1.2 + 35 / sizes**0.58) * np.exp(noise)})
    runs["seed"] = np.tile(np.arange(seeds), points)
    return runs.assign(loss=runs["loss"].where(runs.index != row, factor * runs["loss"]))


@pytest.mark.parametrize(
    ("row", "factor"),
    [(0, 0.85), (11, 0.85), pytest.param(11, 1.2, marks=pytest.mark.slow), (10, 1.5)],
)
def test_an_outlier_that_sets_the_law_is_named(row: int, factor: float) -> None:
    """Include outliers that move E or a whole term to zero; the sibling is not blamed."""
    found = analysed(outlying(row, factor))
    (one,) = (one for one in found.single if one.sets_law)
    assert one.row == row
    assert one.off == pytest.approx(factor - 1, abs=0.07)
    assert one.off_siblings == pytest.approx(factor - 1, abs=0.07)
    check = line(found.checks, "single_run")
    assert check.passed is False
    assert check.figure.startswith(f"row {row} (")


def test_an_outlier_among_many_is_named_though_it_sets_nothing() -> None:
    found = analysed(outlying(20, 1.1, seeds=4, points=10))
    assert [one.row for one in found.single if one.is_outlier] == [20]
    check = line(found.checks, "single_run")
    assert check.passed is True
    assert "row 20" in check.figure


def test_without_a_run_the_prediction_is_that_of_a_fit_without_it() -> None:
    runs = outlying(0, 1.0)
    found = analysed(runs)
    place = found.predictions[0].place
    for one in found.single[:3]:
        less = fit(runs.drop(index=one.row), found.fit.law, loss="loss", x="N")
        assert one.without == pytest.approx(float(less.predict(**place)[0]), rel=1e-6)
        assert not one.is_outlier


def test_runs_without_scatter_have_no_outlier() -> None:
    found = analysed(table(chinchilla, 0.0, seeds=1, points=4), law="chinchilla")
    assert len(found.single) == 16
    assert not any(one.is_outlier for one in found.single)


def test_r_squared_is_judged_by_what_the_seeds_allow() -> None:
    """Fit the true law to runs whose seeds scatter more and more."""

    def explained(noise: float, law: str = "power_constant") -> dict[str, Check]:
        sizes = np.repeat(np.geomspace(1e4, 1e7, 6), 8)
        scatter = noise * np.random.default_rng(1).normal(size=len(sizes))
        losses = (3.0 + 30 / sizes**0.4) * np.exp(scatter)
        found = analysed(pd.DataFrame({"N": sizes, "D": 1e6, "loss": losses}), law=law)
        return {check.id: check for check in found.checks}

    checks = explained(0.03)
    assert checks["explains"].outcome == checks["spread"].outcome == PASS
    assert 0.5 < float(checks["explains"].figure.split()[4].rstrip(",")) < 0.9
    checks = explained(0.3)
    assert checks["spread"].outcome == FAIL  # counted once
    assert checks["explains"].outcome != FAIL
    assert explained(0.003, law="log_power")["spread"].outcome == PASS


def test_runs_chosen_by_their_loss_are_no_evidence() -> None:
    runs = table(chinchilla, 0.003).assign(final_val_perplexity=lambda t: np.exp(t["loss"]))

    def verdict(condition: str) -> Check:
        return check_choice(condition, "loss", comparable(runs, "loss", condition)[1])

    assert verdict("loss < 20").passed is False
    assert "left out by loss, an outcome of training" in verdict("loss < 20").figure
    assert verdict("`final_val_perplexity` < 1e300").passed is True  # leaves nothing out
    assert verdict("`final_val_perplexity` < 1e5").passed is False
    assert verdict("N > 2e4 and seed in [0, 1]").passed is True
    assert "unchosen" not in [c.id for c in analysed(runs, law="power", variable="N").checks]


@pytest.mark.parametrize("study", ["width", "grid_books"])
def test_no_single_run_sets_the_law_of_a_study(study: str) -> None:
    source = Path(__file__).parents[1] / "experiments" / study / "runs.csv"
    runs, _ = comparable(pd.read_csv(source), "final_val_loss")
    joint = study == "grid_books"
    found = (
        fit(runs, "coupled", estimator="huber", D="train_tokens")
        if joint
        else fit(runs, "power_constant")
    )
    place = {name: 10 * float(runs[column].max()) for name, column in found.columns.items()}
    single = single_runs(found, place, replicas(runs, ["N", "D", *SETTINGS]))
    assert not any(one.sets_law for one in single)
    odd = [one for one in single if one.is_outlier]
    assert len(odd) == (2 if joint else 0)  # two seeds 5 % off theirs, at the shortest lengths
    for one in odd:
        assert one.off_siblings == pytest.approx(0.055, abs=0.005)


def test_the_next_run_narrows_the_prediction() -> None:
    """Use recorded costs of 9 N D, as attention and head make them at small sizes."""
    runs = table(chinchilla, 0.003, seeds=1, points=4).assign(flops=lambda t: 9 * t["N"] * t["D"])
    columns = dataclasses.replace(TABLE, c="flops")
    best = analysed(runs, columns, law="chinchilla").next_run
    assert best is not None
    assert best.width_then < best.width_now
    n, d = best.place["N"], best.place["D"]
    assert best.cost == pytest.approx(9 * n * d)
    assert best.cost <= 2 * runs["flops"].max()
    runs.loc[len(runs)] = {"N": n, "D": d, "loss": chinchilla(n, d), "seed": 0, "flops": 9 * n * d}
    again = analysed(runs, columns, law="chinchilla").next_run
    assert again is not None
    assert again.width_now < best.width_now


def test_the_largest_compute_is_held_out_by_whole_budgets() -> None:
    compute = np.repeat([1e9, 1e10, 1e11], 5) * np.tile([1.0, 1.01, 0.99, 1.02, 0.98], 3)
    held = split_by_size(np.arange(15), compute, 5)
    assert held is not None
    assert held.tolist() == [False] * 10 + [True] * 5
    assert split_by_size(np.arange(15), compute, 11) is None
    chain = split_by_size(np.arange(200), np.geomspace(1e9, 1e12, 200), 5)
    assert chain is not None
    assert chain.sum() == 40


# --- what stands in one law


def runs_of(**columns: Any) -> pd.DataFrame:
    """Return finished runs with columns of ``results.json``: three sizes × two seeds."""
    sizes = np.repeat([1e4, 1e5, 1e6], 2)
    base: dict[str, Any] = {
        "config_hash": [f"{i:064x}" for i in range(6)],
        "folder": [f"outputs/s/r{i}" for i in range(6)],
        "status": "finished",
        "seed": [1, 2] * 3,
        "parameters_non_embedding": sizes,
        "d_model": sizes,
        "train_tokens": 1_000_000,
        "learning_rate": 0.003,
        "optimizer": "adamw",
        "tokenizer": "bpe",
        "tokenizer_fingerprint": "t",
        "dataset": "synthetic",
        "final_val_loss": 1.0 + 30 / sizes**0.3,
        "final_val_bits_per_byte": 0.5 + 10 / sizes**0.3,
    }
    return pd.DataFrame({**base, **columns})


def test_a_condition_leaves_out_and_says_so() -> None:
    used, left = comparable(runs_of(), "final_val_loss", "d_model > 2e4 and seed == 1")
    assert len(used) == 2
    assert set(left["reason"]) == {"not d_model > 2e4 and seed == 1"}


@pytest.mark.parametrize("where", ["params > 1", "d_model", "d_model >", "1", "d_model.foo()"])
def test_a_condition_that_is_none(where: str) -> None:
    with pytest.raises(ConfigError, match=f"^where={re.escape(where)}: "):
        comparable(runs_of(), "final_val_loss", where)


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"tokenizer_fingerprint": list("ttttuu"), "tokenizer": ["bpe"] * 4 + ["char"] * 2},
         "runs: several tokenizers (bpe, char): nats per token do not compare"),
        ({"dataset": ["a"] * 5 + ["b"]}, "runs: several datasets (a, b): nats per token do"),
        ({"config_hash": ["same"] * 6}, "runs: outputs/s/r0 and outputs/s/r1 are the same run"),
        ({"status": "diverged"}, "none of these 6 runs has a final loss"),
    ],
)  # fmt: skip
def test_what_does_not_compare_is_refused(changed: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError, match="^" + line.replace("(", r"\(").replace(")", r"\)")):
        comparable(runs_of(**changed), "final_val_loss")


def test_bits_per_byte_compare_across_tokenizers() -> None:
    runs = runs_of(tokenizer_fingerprint=list("ttttuu"))
    assert len(comparable(runs, "final_val_bits_per_byte")[0]) == 6


def test_tokens_that_differ_by_a_rounding_were_not_varied() -> None:
    runs = table(chinchilla, 0.01, points=1)
    runs = pd.concat([runs, runs.assign(D=1.01 * runs["D"], seed=[2, 3])], ignore_index=True)
    with pytest.raises(ConfigError, match="there is no law to fit"):
        analysed(runs)


# --- the checklist


def verdict(runs: pd.DataFrame, name: str) -> bool | None:
    return line(check_design(runs), name).passed


def test_what_a_table_does_not_say_was_not_tested() -> None:
    """Check that this is neither a pass nor the same as not applicable."""
    checks = check_design(runs_of().drop(columns="d_model"))
    for id in ("fair_rate", "validation_set", "steps"):
        assert line(checks, id).outcome == NOT_TESTED
        assert line(checks, id).passed is None
    assert check_validation(runs_of()).outcome == NOT_TESTED
    one_width = check_design(runs_of(d_model=64, parametrization="standard"))
    assert line(one_width, "fair_rate").outcome == NOT_APPLICABLE


def test_the_design() -> None:
    runs = runs_of()
    assert verdict(runs, "wide_range") is True
    assert verdict(runs, "equal_tokens") is True
    assert verdict(runs, "seeds") is True
    assert verdict(runs[:5], "seeds") is False
    assert verdict(runs_of(seed=[1, 2, 3, 4, 5, 6])[::2], "seeds") is False  # one of each size
    unequal = runs_of(train_tokens=[1, 1, 1, 1, 2, 2])
    assert line(check_design(unequal, "N"), "equal_tokens").outcome == FAIL
    assert line(check_design(unequal, "N"), "collinear").outcome == NOT_APPLICABLE
    assert line(check_design(unequal), "equal_tokens").outcome == NOT_APPLICABLE  # of both
    along = runs_of(train_tokens=20 * runs["parameters_non_embedding"])
    assert line(check_design(along), "collinear").outcome == FAIL


@pytest.mark.parametrize(
    ("documents", "error", "outcome"),
    [
        (6, 0.001, FAIL),
        (6, None, FAIL),
        (24, 0.001, PASS),
        (24, 0.05, FAIL),  # of a loss that spreads by 0.3
        (24, None, NOT_TESTED),  # before training
        (None, 0.001, PASS),  # a stream has no documents
        (None, 0.05, FAIL),
    ],
)
def test_the_validation_set(documents: int | None, error: float | None, outcome: str) -> None:
    runs = runs_of(val_tokens=60_000, val_documents=documents)
    found = check_validation(runs, error, 0.3 if error else None)
    assert found.outcome == outcome
    assert ("one stream" in found.figure) == (documents is None)


def test_a_study_is_judged_by_the_columns_of_its_validation() -> None:
    runs = table(chinchilla, 0.003).rename(columns={"loss": "final_val_loss"})
    columns = dataclasses.replace(TABLE, loss="final_val_loss")
    for part, outcome in ((1e-4, PASS), (0.5, FAIL)):
        error = part * runs["final_val_loss"]
        scored = runs.assign(val_documents=20, final_val_loss_standard_error=error)
        found = analysed(scored, columns, law="chinchilla")
        assert line(found.checks, "validation").outcome == outcome
        assert line(found.checks, "spread").outcome == PASS  # not for the same reason
        assert found.is_evidence is (outcome == PASS)


def test_an_exponent_without_an_upper_end_is_not_known() -> None:
    for low, high, outcome in ((0.19, np.inf, FAIL), (0.19, 0.5, FAIL), (0.19, 0.4, PASS)):
        found = check_exponent("alpha", Interval(0.3, low, high, 0.95, "profile"))
        assert found.outcome == outcome
    assert check_exponent("alpha", None).outcome == NOT_TESTED


@pytest.mark.parametrize("law", ["power", "log_power"])
def test_a_law_without_a_constant_is_no_evidence(law: str) -> None:
    found = analysed(in_one_variable(0.0), law=law)
    assert line(found.checks, "constant").figure.startswith("the law has no E")
    assert "constant" in failing(found)
    assert not found.is_evidence


def test_the_tests_of_a_checklist_are_held_at_five_per_cent_together() -> None:
    """Compare the least p-value with 5 % over all tests, the next with 5 % over the rest (Holm)."""
    assert holm([0.02, 0.5, 0.9]) == pytest.approx(0.05 / 3)  # alone it would be significant
    assert holm([0.01, 0.02, 0.9]) == pytest.approx(0.05)
    assert holm([0.01, 0.03, 0.04]) == pytest.approx(0.025)
    assert holm([]) == holm([0.04]) == 0.05
    random = np.random.default_rng(0).uniform(size=(4000, 4))
    rejected = np.mean([row.min() <= holm(row.tolist()) for row in random])
    assert 0.04 < rejected < 0.06
    found = analysed(table(memoriser, 0.001), law="chinchilla")
    tested = [c for c in found.checks if c.id in ("structure", "lack_of_fit", "single_run")]
    for one in tested:
        p = float(re.findall(r"p = ([-.e\d]+)", one.figure)[-1])
        limit = float(re.findall(r"p above ([.\d]+): 5 % for 4 tests", one.threshold)[0])
        assert (one.outcome == PASS) == (p > limit)
    assert {one.outcome for one in tested} == {PASS, FAIL}


def test_a_fact_is_counted_once() -> None:
    checks = [check("alpha", False, "0.3"), check("collinear", False, "1.00")]
    found = count_once(checks)
    assert [(one.id, one.outcome) for one in found] == [("collinear", FAIL), ("alpha", NOT_TESTED)]
    assert "follows from" in found[1].figure
    assert count_once(checks[:1]) == checks[:1]


def test_runs_at_smoke_scale_give_no_verdict() -> None:
    found = analysed(table(chinchilla, 0.003).assign(scale="laptop"), law="chinchilla")
    failed = dataclasses.replace(found, checks=[*found.checks, check("seeds", False, "1")])
    assert (found.is_evidence, failed.is_evidence) == (True, False)
    for one in (found, failed):
        smoke = dataclasses.replace(one, runs=found.runs.assign(scale="smoke"))
        assert (smoke.is_evidence, smoke.verdict) == (None, "smoke: not a result")


def test_checkpoints_of_a_run_are_no_independent_points() -> None:
    runs = table(chinchilla, 0.01, seeds=1)
    runs["run"] = runs["N"].rank(method="dense").astype(str)  # all tokens of a size are one run
    columns = dataclasses.replace(TABLE, run="run")
    found = analysed(runs, columns, law="chinchilla")
    assert {one.method for one in found.intervals.values()} == {"bootstrap (pairs)"}
    alone = analysed(runs, law="chinchilla")
    assert {one.method for one in alone.intervals.values()} == {"profile"}


def test_training_sets() -> None:
    def one(**columns: Any) -> bool | None:
        runs = runs_of(unique_train_tokens=[1, 1, 2, 2, 3, 3], **columns)
        return line(check_finished(runs, runs), "training_set").passed

    assert one(data_fingerprint="a") is True
    assert one(data_fingerprint=list("aabbcc")) is None
    assert one(data_fingerprint=list("ababab")) is False


def test_the_limit_of_one_variable_is_not_the_floor() -> None:
    sizes = np.repeat(np.geomspace(1e4, 1e7, 6), 2)
    noise = np.exp(0.002 * np.random.default_rng(2).normal(size=12))
    for limit, verdict in ((1.2, None), (0.8, False)):
        loss = (limit + 40 / sizes**0.6) * noise
        runs = pd.DataFrame({"parameters_non_embedding": sizes, "train_tokens": 1e6})
        runs = runs.assign(final_val_loss=loss, irreducible_loss_exact=0.9676)
        found = analysed(runs, Columns(u=None, t=None, c=None))
        assert line(found.checks, "floor").passed is verdict


# --- what must not pass for evidence


def test_one_estimator_compares_all_laws() -> None:
    random = np.random.default_rng(17)
    runs = table(chinchilla, 0.0)
    runs["loss"] *= np.exp(0.003 * random.standard_t(2, size=len(runs)))
    found = analysed(runs)
    fits = [c.fit for c in found.candidates if c.fit]
    limits = {(one.estimator, one.optimum.threshold) for one in fits}
    assert limits == {("huber", found.fit.optimum.threshold)}
    assert "heavy tails" in found.fit.reason


def test_the_scatter_does_not_vanish_where_hardly_a_residual_is_inside() -> None:
    runs = table(chinchilla, 0.01, seeds=1, points=5)
    found = analysed(runs, law="power", variable="D", estimator="likelihood")
    squares = analysed(runs, law="power", variable="D", estimator="least_squares")
    assert found.fit.scale == pytest.approx(squares.fit.scale, rel=1.0)


def test_a_law_through_every_run_is_no_evidence() -> None:
    runs = table(chinchilla, 0.003, seeds=1, points=3)[:5]
    found = analysed(runs, law="chinchilla")
    assert "enough_runs" in failing(found)
    assert not {"alpha", "beta", "constant", "best_law", "certified"} & set(failing(found))
    assert line(found.checks, "predicts").outcome == NOT_TESTED
    assert (found.predictions, found.single) == ([], [])
    assert line(found.checks, "single_run").passed is None


def test_collinear_sizes_and_tokens_predict_nothing() -> None:
    sizes = np.geomspace(1e6, 1e10, 8)
    random = np.random.default_rng(0)
    loss = chinchilla(sizes, 20 * sizes) * np.exp(0.003 * random.normal(size=8))
    found = analysed(pd.DataFrame({"N": sizes, "D": 20 * sizes, "loss": loss}), law="chinchilla")
    assert "collinear" in failing(found)
    assert not {"alpha", "beta", "equal_tokens"} & set(failing(found))
    assert (found.predictions, found.frontier) == ([], None)


def test_what_else_was_varied_is_said() -> None:
    found = analysed(table(chinchilla, 0.003), variable="N")
    assert "one_variable" in failing(found)
    assert found.noise is not None
    assert found.noise.scale == pytest.approx(0.003, rel=0.3)  # not what the tokens make of it


@pytest.mark.parametrize(
    ("tokens", "words"), [(50, "0.5 epochs"), (100, "1 epoch"), (200, "2 epochs")]
)
def test_epochs_are_counted_in_words(tokens: int, words: str) -> None:
    runs = pd.DataFrame({"train_tokens": [10, tokens], "unique_train_tokens": [100, 100]})
    details = [check.figure for check in check_design(runs)]
    assert f"up to {words}" in details


# --- one variable, roles of columns, distance


@pytest.mark.parametrize("letter", ["n", "d", "u", "t", "c"])
def test_runs_of_the_largest_x_are_held_out(letter: str) -> None:
    """Check each variable that a table may have."""
    x = np.repeat(np.geomspace(1e5, 1e9, 10), 2)
    noise = 0.002 * np.random.default_rng(5).normal(size=20)
    losses = (1.5 + 40 / x**0.3) * np.exp(noise)
    runs = pd.DataFrame({"mine": x, "loss": losses, "seed": [1, 2] * 10})
    columns = dataclasses.replace(TABLE, **{"n": "no n", "d": "no d", letter: "mine"})
    found = analysed(runs, columns, variable=letter.upper())
    held = found.held_out
    assert held is not None
    assert held.above.tolist() == [False] * 16 + [True] * 4
    assert held.cut == pytest.approx(x[15])
    assert held.error < 0.01
    check = line(found.checks, "predicts")
    assert check.passed is True
    assert ("in mine: off by" in check.figure) == (letter != "c")


def isoflop_runs() -> pd.DataFrame:
    random = np.random.default_rng(2)
    rows = [
        {"N": n, "D": c / 6 / n, "seed": seed, "flops_exact": c, "learning_rate": rate,
         "loss": chinchilla(n, c / 6 / n) * np.exp(0.003 * random.normal())}
        for c in np.geomspace(1e13, 1e17, 5)
        for n in np.sqrt(c / 120) * np.geomspace(0.25, 4, 5)
        for seed, rate in ((1, 0.1), (2, 0.1))
    ]  # fmt: skip
    return pd.DataFrame(rows)


def test_a_verdict_hangs_on_no_name() -> None:
    """Rename compute, loss and size, which ``columns`` identifies."""
    runs = isoflop_runs()

    def checks(**names: str) -> list[tuple[str, bool | None, str]]:
        renamed = runs.rename(columns=names)
        c, loss, n = (names.get(name, name) for name in ("flops_exact", "loss", "N"))
        columns = dataclasses.replace(TABLE, c=c, loss=loss, n=n)
        found = analysed(renamed, columns, law="chinchilla")
        return [(one.id, one.passed, one.figure) for one in found.checks]

    one = checks()
    assert one == checks(flops_exact="flops") == checks(flops_exact="C (FLOPs)")
    assert one == checks(loss="final_val_loss") == checks(N="parameters_non_embedding")
    verdicts = {name: (passed, detail) for name, passed, detail in one}
    assert verdicts["equal_tokens"] == (None, "not a law of size alone")
    assert verdicts["seeds"] == (True, "2")
    assert verdicts["rate_inside"][0] is None


def test_a_swept_rate_needs_no_other_column() -> None:
    runs = pd.DataFrame({"learning_rate": [0.1, 0.2, 0.4], "final_val_loss": [3.0, 2.0, 1.0]})
    check = line(check_finished(runs, runs), "rate_inside")
    assert (check.passed, check.figure) == (False, "the best is at the edge for 1 of 1 settings")


@pytest.mark.parametrize(
    ("asked", "passed", "detail"),
    [
        ({"budgets": [1e18]}, True, "×10 beyond; the runs span ×10,000"),
        ({"budgets": [1e18, 1e25]}, False, "×100,000,000 beyond; the runs span ×10,000"),
        ({"places": [{"N": 1e9, "D": 1e10}]}, True, "beyond; the runs span"),
        ({"places": [{"N": 1e18, "D": 1e3}]}, False, "N = 1e+18 is ×"),
        ({"places": [{"N": 1e6, "D": 1e-3}]}, False, "D = 0.001 is ×"),
        ({"places": [{"N": 1e12, "D": 1e13}]}, False, "beyond; the runs span"),
    ],
)
def test_what_is_asked_for_counts_for_the_distance(
    asked: dict[str, Any], passed: bool, detail: str
) -> None:
    columns = dataclasses.replace(TABLE, c="flops_exact")
    found = analysed(isoflop_runs(), columns, law="chinchilla", **asked)
    check = line(found.checks, "distance")
    assert check.passed is passed
    assert detail in check.figure


# --- places that are asked for


@pytest.mark.parametrize(
    "text",
    [
        "[{n: 13e9, d: 5e12}]",
        "{n:13e9,d:5e12}",
        "[{N: 13_000_000_000, D: 5.0e12}]",
        "n=13e9,d=5e12",
    ],
)
def test_places_are_read_as_people_write_them(text: str) -> None:
    assert read_places(text) == [{"N": 13e9, "D": 5e12}]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "must be as [{n: 13e9, d: 5e12}]"),
        ("13e9", "must be as [{n: 13e9, d: 5e12}]"),
        ("[13e9, 5e12]", "must be as [{n: 13e9, d: 5e12}]"),
        ("[{n: 13e9, d: 5e12]", "must be as [{n: 13e9, d: 5e12}]"),
        ("{k: 1}", "k: must be one of n, d, u, t, c"),
        ("{n: many}", "n=many: must be a number above zero"),
        ("{n: -1}", "n=-1: must be a number above zero"),
        ("{n: .inf}", "n=inf: must be a number above zero"),
        ("{n: true}", "n=True: must be a number above zero"),
    ],
)
def test_places_that_are_none(text: str, line: str) -> None:
    with pytest.raises(ConfigError) as raised:
        read_places(text)
    assert str(raised.value) == f"predict={text}: {line}"


def test_a_place_is_predicted_as_the_library_does() -> None:
    runs = table(chinchilla, 0.003)
    place = {"N": 13e6, "D": 5e8}
    found = analysed(runs, law="chinchilla", places=[place])
    (one,) = [p for p in found.predictions if p.asked]
    assert one.place == place
    assert one.flops == pytest.approx(6 * 13e6 * 5e8)
    where: dict[str, Any] = {"loss": "loss", "N": "N", "D": "D", "estimator": "least_squares"}
    law = fit(runs, "chinchilla", weights=found.fit.points.weights, **where)
    assert one.loss.estimate == pytest.approx(float(law.predict(**place)[0]), rel=1e-9)
    alone = predict_interval(law, N=13e6, D=5e8)
    assert (one.loss.low, one.loss.high) == pytest.approx((alone.low, alone.high), rel=1e-6)
    assert chinchilla(n=13e6, d=5e8) in one.loss
    for wrong, line in (
        ({"N": 1e9}, "predict: d is missing: the law goes by n and d"),
        ({"N": 1e9, "D": 1e9, "T": 8}, "predict: t is not a variable: the law goes by n and d"),
    ):
        with pytest.raises(ConfigError, match=f"^{line}$"):
            analysed(runs, law="chinchilla", places=[wrong])


def test_a_law_in_one_variable_takes_its_own() -> None:
    tokens = np.geomspace(1e5, 1e9, 12)
    runs = pd.DataFrame({"N": 1e5, "D": tokens, "loss": 1.5 + 40 / tokens**0.3})
    found = analysed(runs, places=[{"N": 7e9, "D": 1e10}])
    (one,) = [p for p in found.predictions if p.asked]
    assert one.place == {"x": 1e10}
    assert one.loss.estimate == pytest.approx(1.5 + 40 / 1e10**0.3, rel=1e-4)
    assert found.unanswered == ["The law does not use n of `predict=`."]
    with pytest.raises(ConfigError, match=r"^predict: d is missing: the law goes by d$"):
        analysed(runs, places=[{"N": 7e9}])


def test_unique_tokens_are_all_where_none_are_given() -> None:
    places, note = places_of([{"N": 1e9, "D": 1e10}], {v: v for v in "NDU"}, {})
    assert (places, note) == ([{"N": 1e9, "D": 1e10, "U": 1e10}], "")


def test_what_has_no_answer_is_said() -> None:
    sizes = np.geomspace(1e6, 1e10, 8)
    losses = chinchilla(sizes, 20 * sizes)
    runs = pd.DataFrame({"N": sizes, "D": 20 * sizes, "loss": losses})
    found = analysed(runs, law="chinchilla", budgets=[1e20])
    assert found.unanswered == ["`budgets=` has no answer: D goes with N."]
    with pytest.raises(ConfigError, match=r"^variable=N: law=chinchilla goes by N and D$"):
        analysed(runs, law="chinchilla", variable="N")
    with pytest.raises(ConfigError, match=r"^law=chinchilla: goes by D; name columns\.d=$"):
        analysed(runs.drop(columns="D"), law="chinchilla")
    with pytest.raises(ConfigError, match=r"^isoflop=akima: needs a law in N and D$"):
        analysed(runs, law="power", variable="N", isoflop="akima")


def test_the_curve_through_a_budget_is_the_one_asked_for() -> None:
    columns = dataclasses.replace(TABLE, c="flops_exact")
    best = {}
    for method in ("cubic", "akima", "parabola"):
        found = analysed(isoflop_runs(), columns, law="chinchilla", isoflop=method)
        assert found.frontier is not None
        profiles = found.frontier.isoflop.profiles
        words = found.frontier.table()["interval"].tolist()
        assert words == ["bootstrap (pairs)", "bootstrap over interpolants and seeds"]
        assert {one.method for one in profiles} == {method}
        best[method] = [one.best[1] for one in profiles if one.best]
    assert best["parabola"] == [one.parabola for one in profiles]
    assert len({tuple(sizes) for sizes in best.values()}) == 3


def test_raw_losses_are_judged_as_such() -> None:
    random = np.random.default_rng(1)
    runs = table(chinchilla, 0.0)
    runs["loss"] += 0.02 * random.normal(size=len(runs))
    found = analysed(runs, law="chinchilla", objective="raw")
    assert found.fit.unit == "L"
    assert found.noise is not None
    assert found.noise.scale == pytest.approx(0.02, rel=0.25)  # of the loss itself, everywhere
    assert line(found.checks, "explains").figure.startswith("R² of L ")
    assert "lack_of_fit" not in failing(found)
    assert found.held_out is not None
    assert found.held_out.within > 0.8


# --- a law of one's own


def shifted(**change: Any) -> Law:
    law = Law(
        "shifted",
        "L = E + A / (x + x0)^alpha",
        "a power law with a head start",
        ("x",),
        ("E", "A", "x0"),
        ("alpha",),
        {"A": (("x", "alpha"),), "x0": (("x", 1.0),)},
        expression=lambda p, x: logaddexp(p["E"], p["A"] - p["alpha"] * logaddexp(p["x0"], x["x"])),
    )
    return dataclasses.replace(law, **change)


@pytest.fixture
def forget() -> Iterator[None]:
    before = dict(LAWS)
    yield
    LAWS.clear()
    LAWS.update(before)


def test_a_law_of_one_s_own_is_compared(forget: None) -> None:
    tokens = np.geomspace(1e5, 1e8, 12).repeat(2)
    noise = np.exp(0.002 * np.random.default_rng(0).standard_normal(24))
    runs = pd.DataFrame({"D": tokens, "loss": (1.2 + 40 / (tokens + 2e6) ** 0.3) * noise})
    columns = dataclasses.replace(TABLE, n="no n", seed=None)
    register(shifted())
    found = analysed(runs, columns, law="shifted", places=[{"D": 1e9}])
    assert found.candidates[0].law in ("broken", "shifted")
    assert 1.2 in found.intervals["E"]
    assert 2e6 in found.intervals["x0"]
    of_x = {name for name, law in LAWS.items() if len(law.variables) == 1}
    assert {c.law for c in found.candidates} == of_x
    assert 1.2 + 40 / (1e9 + 2e6) ** 0.3 in found.predictions[-1].loss
    own = shifted(bounds={"x0": (1e-3, 1e3)})
    alone = fit(runs, own, loss="loss", weights=found.fit.points.weights, x="D")
    assert alone.parameters == pytest.approx(found.fit.parameters, rel=1e-4)


def test_a_sum_of_powers_of_one_s_own_splits_a_budget(forget: None) -> None:
    """Use a term in both variables, for which the split has no closed form."""
    powers = {"E": {}, "K": {"N": "a"}, "M": {"D": "b"}, "P": {"N": "g", "D": "g"}}
    law = register(sum_of_powers("mixed", "L = E + K/N^a + M/D^b + P/(N D)^g", "mine", powers))
    runs = table(chinchilla, 0.0)
    runs["loss"] = chinchilla(runs["N"], runs["D"]) + 30 / (runs["N"] * runs["D"]) ** 0.15
    found = fit(runs, law, loss="loss", N="N", D="D")
    assert np.abs(found.residuals).max() < 1e-4
    n, d = best_split(found, 1e14)
    assert 6 * n * d == pytest.approx(1e14, rel=1e-6)
    sizes = np.geomspace(n / 3, n * 3, 201)
    losses = found.predict(N=sizes, D=1e14 / 6 / sizes)
    assert sizes[np.argmin(losses)] == pytest.approx(n, rel=0.02)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"name": "power"}, "law=power: is one of tinygpt's own; choose another name"),
        ({"variables": ("N", "T")}, "law=shifted: variables=('N', 'T'): must be one of ('x',), "),
        ({"expression": None}, "law=shifted: give it either powers or an expression"),
        ({"expression": lambda p, x: np.logaddexp(p["E"], p["A"])}, "law=shifted: expression: "),
        (
            {"expression": lambda p, x: np.abs(p["alpha"]) + p["A"] * x["x"]},
            "law=shifted: expression: must be analytic in its parameters",
        ),
    ],
)
def test_a_law_that_cannot_be_one(change: dict[str, Any], line: str, forget: None) -> None:
    with pytest.raises(ConfigError) as raised:
        register(shifted(**change))
    assert str(raised.value).startswith(line)
    assert "shifted" not in LAWS
