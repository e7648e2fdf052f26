"""Test comparisons of recipes: ratios against known truths, checks, the command."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import optimize

from tests.conftest import Command
from tinygpt import fileio
from tinygpt.config import ConfigError
from tinygpt.runs import rundir
from tinygpt.scaling import compare, versus
from tinygpt.scaling.columns import Columns
from tinygpt.scaling.elsewhere import Table
from tinygpt.scaling.noise import Seeds

SIZES = np.array([6_600.0, 25_500.0, 57_000.0, 100_000.0])
LENGTHS = np.array([5e5, 1e6, 2e6, 4e6])
VARIABLES = {"N": "N", "D": "D"}


def loss_at(n: Any, d: Any) -> Any:
    return 1.7 + 1.1 * (5e4 / n) ** 0.35 + 0.9 * (1e6 / d) ** 0.4


def runs(size: float = 1.0, tokens: float = 1.0, noise: float = 0.0, seed: int = 0) -> pd.DataFrame:
    """Return runs of a recipe whose size and tokens count ``size`` and ``tokens`` times."""
    random = np.random.default_rng(seed)
    n, d = (axis.ravel() for axis in np.meshgrid(SIZES, LENGTHS))
    loss = loss_at(n * size, d * tokens) * np.exp(noise * random.standard_normal(len(n)))
    return pd.DataFrame({"N": n, "D": d, "loss": loss})


@pytest.mark.parametrize(
    ("gain", "ratio"),
    [({"tokens": 1.5}, 1.5), ({"size": 0.7}, 0.7), ({"size": 1.2, "tokens": 1.5}, 1.8)],
)
def test_a_known_ratio_is_found(gain: Mapping[str, float], ratio: float) -> None:
    """Check that gains in size and tokens multiply."""
    found = compare.ratio_of(runs(noise=1e-5), runs(**gain, noise=1e-5, seed=1), VARIABLES, "loss")
    assert found.at(found.best_known).estimate == pytest.approx(ratio, rel=2e-3)
    assert found.exponents().estimate == pytest.approx(1.0, abs=2e-3)
    assert (found.places, found.pairs) == (16, 16)


def test_a_ratio_that_falls_with_compute_is_found() -> None:
    n, d = runs()["N"], runs()["D"]
    gain = 1.5 * (6 * n * d / 1e11) ** -0.1
    other = pd.DataFrame({"N": n, "D": d, "loss": loss_at(n, d * gain)})
    found = compare.ratio_of(runs(noise=1e-5), other, VARIABLES, "loss")
    for flops in (3e10, 1e12):
        expected = 1.5 * (flops / 1e11) ** -0.1
        assert found.at(flops).estimate == pytest.approx(expected, rel=0.01)
    assert found.exponents().high < 1
    assert found.drifts


def test_an_estimate_is_that_of_scipy() -> None:
    """Compare with least squares of Chinchilla's form through both recipes, without weights."""
    first, other = runs(noise=0.003), runs(tokens=1.3, noise=0.003, seed=1)
    found = compare.ratio_of(first, other, VARIABLES, "loss")
    (model,) = (m for m in found.models if (m.base.name, m.gain) == ("chinchilla", "tokens"))
    both = pd.concat([first, other])
    n, d, y = (np.log(both[name].to_numpy()) for name in ("N", "D", "loss"))
    is_other = np.repeat([0.0, 1.0], len(first))
    scale = n + d - np.mean(n + d)

    def left(p: Any) -> Any:
        gain = is_other * (p[5] + p[6] * scale)
        terms = [p[0] + 0 * n, p[1] - p[3] * (n - n.mean()), p[2] - p[4] * (d - d.mean() + gain)]
        return np.logaddexp.reduce(terms) - y

    plain = optimize.least_squares(left, [0.5, 0, 0, 0.3, 0.4, 0, 0], xtol=1e-12, ftol=1e-12)
    assert model.theta[-2:] == pytest.approx(plain.x[-2:], abs=0.02)


def test_the_error_is_that_of_refits_without_a_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Seeds, "of", lambda *_: None)  # the weights stay the same
    first, other = runs(noise=0.003), runs(tokens=1.3, noise=0.003, seed=1)
    whole = compare.ratio_of(first, other, VARIABLES, "loss")

    def of(ratio: compare.Ratio) -> tuple[float, float, float]:
        (one,) = (m for m in ratio.models if (m.base.name, m.gain) == ("chinchilla", "tokens"))
        scale = np.log(whole.best_known) - ratio.centres["scale"]
        return one.estimate(1.0, float(scale))

    left = [
        of(compare.ratio_of(first.drop(i), other.drop(i), VARIABLES, "loss"))[0]
        for i in first.index
    ]
    count = len(left)
    by_refits = np.sqrt((count - 1) / count * np.sum((np.array(left) - of(whole)[0]) ** 2))
    assert of(whole)[1] == pytest.approx(by_refits, rel=0.15)


def test_tokens_at_equal_size_are_where_the_losses_meet() -> None:
    found = compare.ratio_of(
        runs(noise=1e-5), runs(size=1.3, noise=1e-5, seed=1), VARIABLES, "loss"
    )
    assert found.place is not None
    assert found.tokens is not None
    n, d = found.place["N"], found.place["D"]
    needed = optimize.brentq(lambda t: loss_at(n, t) - loss_at(1.3 * n, d), d, 100 * d)
    assert found.tokens.estimate == pytest.approx(needed / d, rel=0.01)


def test_recipes_that_were_trained_elsewhere_are_compared() -> None:
    other = runs(tokens=1.5)
    other = other.assign(N=1.3 * other["N"], D=0.8 * other["D"])
    other["loss"] = loss_at(other["N"], 1.5 * other["D"])
    found = compare.ratio_of(runs(noise=1e-5), other, VARIABLES, "loss")
    assert found.pairs == 0
    assert found.at(found.best_known).estimate == pytest.approx(1.5, rel=0.01)


def test_a_dearer_token_counts() -> None:
    """Check that tokens that cost 10 % more reduce the ratio by that."""
    first, other = runs(noise=1e-5), runs(tokens=1.5, noise=1e-5, seed=1)
    first, other = (t.assign(C=k * 6 * t["N"] * t["D"]) for t, k in ((first, 1.0), (other, 1.1)))
    found = compare.ratio_of(first, other, VARIABLES, "loss", "C")
    assert found.at(found.best_known).estimate == pytest.approx(1.5 / 1.1, rel=5e-3)


def test_one_variable_is_enough() -> None:
    first, other = (t[t["N"] == SIZES[0]] for t in (runs(), runs(tokens=1.4)))
    first, other = (pd.concat([t, t.assign(D=2 * t["D"] + 1)]) for t in (first, other))
    for table, gain in ((first, 1.0), (other, 1.4)):
        table["loss"] = loss_at(table["N"], gain * table["D"])
    found = compare.ratio_of(first, other, {"x": "D"}, "loss")
    assert found.at(found.best_known).estimate == pytest.approx(1.4, rel=0.01)
    assert found.tokens is None


def test_no_difference_is_not_claimed_and_a_large_one_is() -> None:
    same = compare.ratio_of(runs(noise=0.004), runs(noise=0.004, seed=1), VARIABLES, "loss")
    better = runs(tokens=2.0, noise=0.004, seed=1)
    other = compare.ratio_of(runs(noise=0.004), better, VARIABLES, "loss")
    assert not same.differs
    assert other.differs
    assert 1 < same.detectable < 1.5


def test_two_floors_are_told_apart() -> None:
    first, other = runs(noise=0.001), runs(noise=0.001, seed=1)
    same = compare.ratio_of(first, other, VARIABLES, "loss")
    apart = compare.ratio_of(first, other.assign(loss=other["loss"] + 0.3), VARIABLES, "loss")
    assert same.floor[1] > 0.05 > apart.floor[1]
    assert apart.floor[0] > 0


def test_too_few_runs_are_refused() -> None:
    few = runs().iloc[:3]
    with pytest.raises(ConfigError, match="too few"):
        compare.ratio_of(few, few, VARIABLES, "loss")


def test_a_plan_promises_more_of_more_seeds() -> None:
    n, d = (np.tile(runs()[name].to_numpy(), 4) for name in ("N", "D"))
    one = compare.plan(n[:16], d[:16], 0.005)
    four = compare.plan(n, d, 0.005)
    assert np.log(one) / np.log(four) == pytest.approx(2.0, rel=0.01)
    with pytest.raises(ConfigError, match="too few"):
        compare.plan(n[:2], d[:2], 0.005)


# --- the checks


def side(rates: Mapping[float, float], others: tuple[float, ...] = (0.01,)) -> Table:
    """Return runs of one place at several rates, each with a factor of the loss, and others,
    whose first rate is the best."""
    rows = [
        {**row, "learning_rate": rate, "loss": row["loss"] * factor}
        for k, row in enumerate(runs().to_dict("records"))
        for rate, factor in (rates.items() if k == 0 else zip(others, (1.0, 1.1), strict=False))
    ]
    table = pd.DataFrame(rows)
    best = table.groupby(["N", "D"])["loss"].transform("min") == table["loss"]
    left = table[~best].assign(reason="learning_rate 0.01 is better there")
    return Table(table[best], left, Columns(n="N", d="D", c=None, loss="loss"), [])


@pytest.mark.parametrize(
    ("rates", "others", "passed", "said"),
    [
        ({0.005: 1.1, 0.01: 1.0, 0.02: 1.1}, (0.01,), True, ""),
        ({0.005: 1.1, 0.01: 1.05, 0.02: 1.0}, (0.02,), False, "optim.learning_rate=0.04 too"),
        ({0.005: 1.1, 0.01: 1.05, 0.02: 1.0}, (0.02, 0.04), True, ""),  # beyond it, elsewhere
        ({0.01: 1.0}, (0.01,), False, "optim.learning_rate=0.005,0.01,0.02 at one place"),
        ({0.005: 1.1, 0.01: 1.0, 0.02: 1.1}, (0.03,), False, "optim.learning_rate=0.01 everywhere"),
    ],
)
def test_a_rate_is_fair(
    rates: Mapping[float, float], others: tuple[float, ...], passed: bool, said: str
) -> None:
    found = versus.check_rate("muon", side(rates, others), ["N", "D"], "optim.kind")
    assert found.passed is passed
    assert said in found.advice
    assert not said or found.advice.startswith("Run optim.kind=muon ")


def test_a_recipe_is_one_recipe() -> None:
    """Runs of two optimizers, say, beside the key that is compared."""
    read = side({0.01: 1.0})
    assert versus.check_alone("rope", read, ["N", "D"]).passed
    read.runs["optimizer"] = ["adamw", "muon"] * (len(read.runs) // 2)
    found = versus.check_alone("rope", read, ["N", "D"])
    assert found.passed is False
    assert "`optimizer` adamw (" in found.figure


def test_losses_are_those_that_compare() -> None:
    """Check that different tokenizers give bits per byte, and different texts an error."""

    def parts(tokenizers: str, texts: str) -> dict[str, pd.DataFrame]:
        names = ("tokenizer_fingerprint", "validation_fingerprint")
        rows = zip("ab", tokenizers, texts, strict=True)
        return {side: pd.DataFrame(dict(zip(names, row, strict=True)), [0]) for side, *row in rows}

    notes: list[str] = []
    assert versus.loss_of(parts("tu", "vw"), "final_val_loss", notes) == "final_val_bits_per_byte"
    assert "bits per byte" in notes[0]
    with pytest.raises(ConfigError, match=r"data\.val_file"):
        versus.loss_of(parts("tt", "vw"), "final_val_loss", [])


# --- the command


def study(folder: Path, recipes: Mapping[str, float]) -> Path:
    """Write finished runs of recipes, each at one rate, and at three at one place."""
    same = {"schema_version": 1, "status": "finished", "seed": 1, "tokenizer": "bpe"}
    same |= {"tokenizer_fingerprint": "t", "dataset": "books", "validation_fingerprint": "v"}
    for k, (name, tokens) in enumerate(recipes.items()):
        for i, row in enumerate(runs(tokens=tokens, noise=0.003, seed=k).to_dict("records")):
            for rate in (0.005, 0.01, 0.02) if i == 5 else (0.01,):
                identity = f"{name}-{i}-{rate}"
                run = rundir.RunDir(folder / identity)
                fileio.write_json(run.environment, {"config_hash": identity})
                found = {
                    **same,
                    "config_hash": identity,
                    "optimizer": name,
                    "learning_rate": rate,
                    "parameters_non_embedding": int(row["N"]),
                    "train_tokens": int(row["D"]),
                    "flops_exact": 6.0 * row["N"] * row["D"],
                    "final_val_loss": row["loss"] * (1.0 if rate == 0.01 else 1.05),
                }
                fileio.write_json(run.results, found)
    return folder


def test_the_command_compares_the_values_of_a_key(tinygpt: Command, tmp_path: Path) -> None:
    folder = study(tmp_path / "study", {"adamw": 1.0, "muon": 1.5})
    done = tinygpt("fit", f"runs={folder}", "compare=optim.kind", "reference=adamw")
    assert done.returncode == 0, done.stderr
    made = tmp_path / "study" / "compare-optim.kind"
    facts = json.loads((made / "compare.json").read_text())
    ratio = facts["ratios"]["muon"]["ratio"]
    assert ratio["low"] < 1.5 < ratio["high"]
    assert [one["id"] for one in facts["checks"] if one["passed"] is False] == []
    assert "Muon reaches the loss of adamw with 1/1." in done.stdout
    assert "compare.png" in (made / "report.md").read_text()
    assert (made / "report.html").stat().st_size > 10_000
    assert set(pd.read_csv(made / "runs.csv")["recipe"]) == {"adamw", "muon"}


def test_the_command_compares_two_studies(tinygpt: Command, tmp_path: Path) -> None:
    a, b = (study(tmp_path / name, {name: gain}) for name, gain in (("a", 1.0), ("b", 1.5)))
    done = tinygpt("fit", f"compare=[{a},{b}]")
    assert done.returncode == 0, done.stderr
    assert "B reaches the loss of a with 1/1." in done.stdout
    assert "reference= names another" in done.stdout
    assert (tmp_path / "compare-a-b" / "report.html").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["compare=optim.kind", "reference=lion"], "reference=lion: must be one of adamw, muon"),
        (["compare=optim.knd"], "compare=optim.knd: the runs have no such key"),
        (["compare=dataset"], "compare=dataset: is books in every run; needs at least two values"),
        (["reference=adamw"], "reference: for compare= only"),
        (["compare=optim.kind", "budgets=1e15"], "budgets: not for compare="),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], said: str, tinygpt: Command, tmp_path: Path
) -> None:
    folder = study(tmp_path / "study", {"adamw": 1.0, "muon": 1.5})
    done = tinygpt("fit", f"runs={folder}", *words)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_command_compares_the_rows_of_a_table(tinygpt: Command, tmp_path: Path) -> None:
    both = [runs(noise=0.003).assign(optimizer="adamw"), runs(tokens=1.5).assign(optimizer="muon")]
    pd.concat(both).to_csv(tmp_path / "all.csv", index=False)
    columns = ["columns.n=N", "columns.d=D", "columns.loss=loss"]
    done = tinygpt("fit", "table=all.csv", "compare=optimizer", *columns, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    facts = json.loads(
        (tmp_path / "outputs" / "compare-all-optimizer" / "compare.json").read_text()
    )
    assert facts["reference"] == "adamw"
    assert facts["ratios"]["muon"]["ratio"]["low"] < 1.5 < facts["ratios"]["muon"]["ratio"]["high"]
