"""``python -m tinygpt.fit`` on a study of adaptation, and its statistics against known answers."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from tests.adapting import record
from tests.conftest import Command
from tinygpt import fileio
from tinygpt.adaptation import analysis, report
from tinygpt.adaptation.analysis import Adaptation, analyse_adaptation
from tinygpt.adaptation.analysis import load_records as load
from tinygpt.adaptation.records import FIELDS
from tinygpt.config import ConfigError
from tinygpt.runs import rundir
from tinygpt.scaling import document
from tinygpt.scaling.laws import Array

STEPS = (1, 3, 10, 30)
# Of each method: what it adds to the reward at k = 1, its exponent, and its forgetting at k = 30.
EFFECTS = {
    "lora_doc": (0.05, 0.6, 0.31),
    "lora_edit": (-0.06, 0.5, 0.45),
    "lora_doc+edit": (0.05, 0.6, 0.30),
    "restem_it0": (0.03, 0.5, 0.34),
    "restem_it1": (0.06, 0.62, 0.32),
    "oracle": (0.08, 0.6, 0.20),
    "full_ft_doc": (0.07, 0.6, 0.62),
}


def study(
    sizes: tuple[int, ...] = (182_272,),
    documents: int = 9,
    ranks: tuple[int, ...] = (4, 8),
    task: str = "new_facts",
    gain: float = 0.0,
) -> list[dict[str, Any]]:
    """Records of all methods; by ``gain`` more ReST-EM's last policy is better at each size.

    Documents differ in how much they can be learned, for all methods alike.
    """
    random, rows = np.random.default_rng(5), []
    tested: list[dict[str, Any]] = [
        {"method": method, "lora_rank": rank}
        for method in EFFECTS
        for rank in ((None,) if method == "full_ft_doc" else ranks)
    ]
    others: list[dict[str, Any]] = [
        {"method": "lora_doc", "split": "tune", "lr": lr, "lora_rank": rank}
        for rank in ranks
        for lr in (1e-3, 3e-3)
    ]
    for rank, number, edit in itertools.product(ranks, (0, 1), range(4)):
        place = {"method": f"restem_it{number}", "split": "train", "lora_rank": rank}
        others.append({**place, "edit_id": str(edit), "accepted": edit == 0})
    nothing: dict[str, Any] = {"method": "none", "lora_rank": None, "inner_steps": 0}
    nothing |= {"reward": 0.0, "forgetting": 0.0, "accuracy_after": 0.0}
    for number, size in enumerate(sizes):
        base = {"task": task, "base_parameters": size}
        for doc, ease in enumerate(np.exp(0.3 * random.standard_normal(documents))):
            rows.append(record(**base, **nothing, doc_sha256=f"test-{doc}"))
            for place in [*tested, *(others if doc < documents // 2 else ())]:
                sha = f"{place.get('split', 'test')}-{doc}"
                rows += steps(random, ease, gain * number, **base, **place, doc_sha256=sha)
    return rows


def steps(
    random: np.random.Generator, ease: float, more: float, **place: Any
) -> list[dict[str, Any]]:
    """The snapshots of one inner run: they share its luck."""
    method, facts = str(place["method"]), place["task"] == "new_facts"
    start, power, lost = EFFECTS[method]
    start *= 1.15 if place["lora_rank"] == 8 else 1.0
    shift, luck = more * (method == "restem_it1"), 0.02 * random.standard_normal()
    text = method not in ("lora_doc", "oracle", "full_ft_doc")
    rows = []
    for k in STEPS:
        reward = ease * (start * k**power + shift) + luck
        forgetting = lost * (k / 30) ** 0.7 + 0.01 * random.standard_normal()
        accuracy = {"accuracy_before": 0.0, "accuracy_after": float(reward > 0.2)}
        rows.append(
            record(
                **place,
                **(accuracy if facts else dict.fromkeys(accuracy)),
                iteration=int(method[-1]) if method.startswith("restem") else None,
                inner_steps=k,
                reward=reward,
                forgetting=forgetting,
                policy_tokens=128 * text,
                policy_prompt_tokens=200 * text,
            )
        )
    return rows


def written(rows: list[dict[str, Any]], folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapt.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def analysed(rows: list[dict[str, Any]], folder: Path) -> Adaptation:
    return analyse_adaptation(load(written(rows, folder)))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Adaptation:
    """Two sizes; ReST-EM wins on the larger one alone."""
    return analysed(study((182_272, 1_050_624), gain=0.1), tmp_path_factory.mktemp("study"))


# --- statistics


def differences() -> tuple[Array, Array]:
    random = np.random.default_rng(3)
    raw = random.normal(0.4, 0.3, 14)
    return raw, raw + random.normal(0.05, 0.08, 14)


def test_a_paired_difference_is_that_of_scipy(tmp_path: Path) -> None:
    raw, edit = differences()
    rows = [
        record(method=method, doc_sha256=str(doc), reward=value)
        for method, values in (("lora_doc", raw), ("lora_edit", edit))
        for doc, value in enumerate(values)
    ]
    rows.append(record(doc_sha256="alone", reward=5.0))  # no partner: in no difference
    rows.append(record(method="lora_edit", doc_sha256="0", reward=9.0, inner_steps=3))
    rows.append(record(method="lora_edit", doc_sha256="1", reward=9.0, seed=7))
    found = analysed(rows, tmp_path).paired
    assert len(found) == 1
    row, expected = found.iloc[0], stats.ttest_rel(edit, raw)
    interval = expected.confidence_interval(0.95)
    assert row["documents"] == 14
    assert row["difference"] == pytest.approx(np.mean(edit - raw))
    assert (row["low"], row["high"]) == pytest.approx((interval.low, interval.high))
    assert row["p"] == pytest.approx(expected.pvalue)
    assert row["wilcoxon_p"] == pytest.approx(stats.wilcoxon(edit, raw).pvalue)
    assert row["holm_p"] == row["p"]


def test_seeds_are_averaged_before_documents_are_compared(tmp_path: Path) -> None:
    rewards = {("lora_doc", "a"): (1, 3), ("lora_doc", "b"): (2, 2)}
    rewards |= {("oracle", "a"): (4, 4), ("oracle", "b"): (2, 4), ("full_ft_doc", "a"): (9, 9)}
    rows = [
        record(
            method=method,
            doc_sha256=doc,
            seed=seed,
            reward=reward,
            lora_rank=None if method == "full_ft_doc" else 8,
        )
        for (method, doc), values in rewards.items()
        for seed, reward in enumerate(values)
    ]
    found = analysed(rows, tmp_path).paired.set_index("method")
    assert found.loc["oracle", "documents"] == 2
    assert found.loc["oracle", "difference"] == pytest.approx(1.5)  # of 2 and 1
    assert found.loc["full_ft_doc", "lora_rank"] == 8  # beside the rank there is
    assert found.loc["full_ft_doc", "difference"] == pytest.approx(7.0)
    assert found.loc["full_ft_doc", "p"] == 1.0  # one document is no evidence


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_holm_is_closed_testing_by_bonferroni(p: list[float]) -> None:
    sets = [[i for i in range(len(p)) if mask >> i & 1] for mask in range(1, 2 ** len(p))]
    worth = [min(1.0, len(s) * min(p[i] for i in s)) for s in sets]
    expected = [max(w for s, w in zip(sets, worth, strict=True) if i in s) for i in range(len(p))]
    assert analysis.holm(np.array(p)) == pytest.approx(expected)


@pytest.mark.parametrize("documents", [4, 8, 20])
def test_the_bootstrap_covers(documents: int) -> None:
    """Three seeds a document, which share its luck: documents are what counts."""
    random = np.random.default_rng(documents)
    studies, covered = 1000, 0
    for _ in range(studies):
        luck = random.normal(0.3, 0.2, (documents, 1))
        means = (luck + random.normal(0, 0.1, (documents, 3))).mean(axis=1)
        covered += 0.3 in analysis.mean_interval(means)
    assert 0.93 <= covered / studies <= 0.97


def test_a_share_has_the_exact_interval() -> None:
    for hits in (0, 3, 12):
        found = analysis.share_interval(np.array([1.0] * hits + [0.0] * (12 - hits)))
        exact = stats.binomtest(hits, 12).proportion_ci(0.95, "exact")
        assert (found.low, found.high) == pytest.approx((exact.low, exact.high))


# --- laws


def test_a_known_power_law_is_recovered() -> None:
    random = np.random.default_rng(0)
    ease = np.exp(0.2 * random.standard_normal((24, 1)))
    exact = pd.DataFrame(ease / ease.mean() * 0.05 * np.array(STEPS) ** 0.6, columns=STEPS)
    found = analysis.power_law(exact)
    assert (found["c"], found["a"], found["left"]) == pytest.approx((0.05, 0.6, 0.0), abs=1e-6)
    noisy = exact + random.normal(0, 0.01, exact.shape)
    found = analysis.power_law(noisy)
    assert found["a_low"] < 0.6 < found["a_high"] < found["a_low"] + 0.2
    assert found["c_low"] < 0.05 < found["c_high"]


@pytest.mark.parametrize(
    ("rewards", "reason", "power"),
    [
        ({1: [0.1], 3: [0.2]}, "2 different k; a law needs 3", False),
        ({1: [-0.1], 3: [0.2], 10: [0.3]}, "the mean is not positive at k = 1", False),
        ({1: [0.1], 3: [0.3], 10: [0.2]}, "the mean does not rise from k = 3 to 10", False),
        (
            {1: [-1.0, 1.2], 3: [0.2, 0.3], 10: [1, 0]},
            "a mean may be zero or less: no interval",
            True,
        ),
    ],
)
def test_no_law_or_no_interval_and_why(rewards: Any, reason: str, power: bool) -> None:
    found = analysis.power_law(pd.DataFrame({k: values * 4 for k, values in rewards.items()}))
    assert found["reason"] == reason
    assert np.isfinite(found["a"]) == power
    assert np.isnan(found["a_low"])


# --- the summary


def test_the_summary_of_a_table_computed_by_hand(tmp_path: Path) -> None:
    rows = [
        record(doc_sha256="a", seed=0, reward=1.0, forgetting=0.1, accuracy_after=1.0),
        record(doc_sha256="a", seed=1, reward=3.0, forgetting=0.3, accuracy_after=0.0),
        record(doc_sha256="b", seed=0, reward=4.0, forgetting=-0.2, accuracy_after=1.0),
        record(doc_sha256="b", seed=1, reward=None, forgetting=None, error="diverged"),
        record(doc_sha256="t", split="tune", lr=1e-3, reward=1.0),
        record(doc_sha256="t", split="tune", lr=3e-3, reward=2.0),
        record(method="restem_it0", iteration=0, policy_tokens=60, policy_prompt_tokens=40),
        record(method="restem_it0", iteration=0, edit_id="f", accepted=True, split="train"),
        record(method="restem_it0", iteration=0, edit_id="g", accepted=False, split="train"),
    ]
    found = analysed(rows, tmp_path)
    table = found.summary.to_dict("records")
    (raw,) = (row for row in table if (row["split"], row["method"]) == ("test", "lora_doc"))
    assert raw["reward"] == pytest.approx(3.0)  # of 2 and 4
    assert raw["reward_sd"] == pytest.approx(2**0.5)
    assert raw["forgetting"] == pytest.approx(0.0)  # of 0.2 and -0.2: signed
    assert raw["accuracy_after"] == pytest.approx(0.75)
    assert raw["tokens_total"] == raw["tokens_processed"] == 2560
    assert [raw[name] for name in ("documents", "seeds", "records", "errors")] == [2, 2, 4, 1]
    tuned = {row["tuned_lr"]: row["reward"] for row in table if row["split"] == "tune"}
    assert tuned == {1e-3: 1.0, 3e-3: 2.0}
    edits, trained = (row for row in table if row["method"] == "restem_it0")
    assert (edits["policy_tokens"], edits["tokens_total"]) == (100, 2660)
    assert trained["accepted"] == 0.5
    assert "1 record of 9 without a result: diverged (`lora_doc`)" in found.notes


def test_a_skipped_document_of_an_earlier_version_is_counted(tmp_path: Path) -> None:
    nothing = dict.fromkeys(FIELDS) | {"run_id": "p", "error": "left out: too short"}
    rows = [record(method="restem_it0", iteration=0), nothing]
    found = analysed(rows, tmp_path)
    assert found.notes == ("1 record of 2 without a result: left out: too short",)
    assert len(found.summary) == len(found.restem) == 1


def test_the_best_edit_of_a_document_is_by_its_mean_over_seeds(tmp_path: Path) -> None:
    rewards = {("a", "x"): (0.0, 8.0), ("a", "y"): (5.0, 5.0), ("b", "z"): (1.0, 1.0)}
    rows = [
        record(method="restem_it0", iteration=0, doc_sha256=doc, edit_id=edit, seed=seed, reward=r)
        for (doc, edit), values in rewards.items()
        for seed, r in enumerate(values)
    ]
    often = [row | {"times_proposed": 3 if row["edit_id"] == "x" else 1} for row in rows]
    (found,) = analysed(often, tmp_path / "o").restem.to_dict("records")
    assert found["mean"] == pytest.approx(((3 * 4 + 5) / 4 + 1) / 2)
    assert found["edits"] == pytest.approx((4 + 1) / 2)
    (found,) = analysed(rows, tmp_path).restem.to_dict("records")
    assert found["mean"] == pytest.approx((4.5 + 1) / 2)
    assert found["best"] == pytest.approx((5 + 1) / 2)


# --- reading


def test_records_of_removed_methods_are_counted_and_left_out(tmp_path: Path) -> None:
    rows = [record(), record(method="restem_it0", iteration=0)]
    old = [record(method=f"{name}_directive") for name in ("uniform", "fixed_best")]
    found = analysed([*rows, *old], tmp_path)
    assert set(found.summary["method"]) == {"lora_doc", "restem_it0"}
    assert found.notes == (
        "2 records of the removed methods `uniform_directive` and `fixed_best_directive` left out",
    )


def test_a_torn_line_and_records_found_twice_are_counted(tmp_path: Path) -> None:
    rows = [record(doc_sha256=str(n), lora_rank=None, method="full_ft_doc") for n in range(3)]
    one, _ = written(rows, tmp_path / "one"), written(rows[:2], tmp_path / "two")
    with (one / "adapt.jsonl").open("a") as file:
        file.write(json.dumps(record())[:-30])
    table = load(tmp_path, one)
    assert len(table) == 3
    notes = analyse_adaptation(table).notes
    assert "1 torn last line left out: the study was killed there" in notes
    assert "2 records found in several runs and counted once" in notes


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "no record of an adaptation yet"),
        ('{"a": 1\n{"a": 1}\n', "line 1 is not JSON"),
        ("3\n", "line 1 is not JSON .not an object"),
        ('{"run_id": 1}\n', "line 1 has no task"),
        (
            "".join(json.dumps(record(run_id="x", reward=r)) + "\n" for r in (1, 2)),
            "run_id=x: reward 1 in ",
        ),
        (json.dumps(record(reward=None)) + "\n", "none of these 1 records has a reward"),
    ],
)
def test_a_file_that_cannot_be_used(tmp_path: Path, text: str, line: str) -> None:
    (tmp_path / "adapt.jsonl").write_text(text)
    with pytest.raises(ConfigError, match=line):
        analyse_adaptation(load(tmp_path))


# --- the answer


def first_words(adaptation: Adaptation) -> str:
    return document.markdown(report.answer(adaptation))


def test_a_win_is_said_with_its_size_and_what_it_costs(whole: Adaptation) -> None:
    said = first_words(whole)
    assert "1,050,624 parameters: yes, in " in said
    assert "most by `restem_it1`" in said
    assert "It is worse in" in said
    wins = whole.paired[(whole.paired["verdict"] == "better") & whole.paired["self_edit"]]
    assert (wins["base_parameters"] == 1_050_624).any()
    assert (wins["low"] > 0).all()
    assert not wins["method"].isin(["lora_edit", "restem_it0"]).any()


@pytest.mark.parametrize(
    ("better", "words"),
    [
        ((None, None), "no evidence at any of the 2 sizes of the base"),
        ((False, True, True), "it wins from 2,000 parameters on, not below"),
        ((True, True, True), "it wins somewhere at every size, from 1,000 parameters on"),
        ((True, False, True), "it wins at 1,000, 3,000 parameters, but not at every larger"),
    ],
)
def test_from_what_size_on(tmp_path: Path, better: tuple[bool | None, ...], words: str) -> None:
    raw, edit = differences()
    same = raw + np.random.default_rng(1).normal(0, 0.1, len(raw))
    edits = {True: edit + 0.3, False: edit - 0.3, None: same}
    rows = [
        record(method=method, doc_sha256=str(doc), reward=value, base_parameters=1000 * (n + 1))
        for n, wins in enumerate(better)
        for method, values in (("lora_doc", raw), ("lora_edit", edits[wins]))
        for doc, value in enumerate(values)
    ]
    said = first_words(analysed(rows, tmp_path))
    assert words in said
    told = "no evidence that it does, in any of 1 comparison at equal tokens"
    assert said.count(told) == sum(wins is not True for wins in better)


def test_only_train_documents_yet(tmp_path: Path) -> None:
    found = analysed([record(split="train")], tmp_path)
    assert "Not known: no test document has both" in first_words(found)
    files = report.write(found, tmp_path / "fit")
    assert not [path for path in files if path.suffix == ".png"]


# --- the command


def test_the_command_makes_all_files(tinygpt: Command, tmp_path: Path) -> None:
    written(study(documents=4), tmp_path / "s" / "facts")
    other = study(documents=3, ranks=(8,), task="domain_shift")
    written(other, tmp_path / "s" / "shift")
    done = tinygpt("fit", "runs=s", COLUMNS="200")
    assert (done.returncode, done.stderr) == (0, "")
    assert "Does self-editing beat the raw document?" in done.stdout
    assert "report: s/fit/report.html" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100
    folder = tmp_path / "s" / "fit"
    figures = ("adaptation_laws", "pareto_forgetting", "restem")
    for name in figures:
        assert (folder / f"{name}.png").stat().st_size > 10_000
    page = (folder / "report.md").read_text()
    assert all(f"![{name}]({name}.png)" in page for name in figures)
    assert "Against `lora_doc`" in page
    table = pd.read_csv(folder / "adaptation_summary.csv")
    assert set(table["split"]) == {"test", "tune", "train"}
    assert set(table["task"]) == {"new_facts", "domain_shift"}
    again = analyse_adaptation(load(tmp_path / "s"))
    for path in report.write(again, tmp_path / "again"):
        assert path.read_bytes() == (folder / path.name).read_bytes()


def test_figures_of_iterations_that_are_gone_go_too(tmp_path: Path) -> None:
    every, folder = study(documents=2, ranks=(8,)), tmp_path / "fit"
    rows = [row for row in every if row["method"] in ("lora_doc", "restem_it0", "restem_it1")]
    for kept in (rows, [row for row in rows if not row["method"].startswith("restem")]):
        found = analysed(kept, tmp_path)
        files = report.write(found, folder)
        assert all(path.exists() for path in files)
        assert (folder / "restem.svg").exists() == (kept is rows)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["runs=all/base,all/adapted"], "runs: all/base has trained models and all/adapted adapt"),
        (["runs=all/adapted", "law=power"], "law: not for runs that adapted a model; seed, out"),
    ],
)
def test_a_mistake_is_one_line(
    tinygpt: Command, tmp_path: Path, words: list[str], line: str
) -> None:
    written([record()], tmp_path / "all" / "adapted")
    base = rundir.RunDir(tmp_path / "all" / "base")
    fileio.write_json(base.environment, {"config_hash": "b"})
    fileio.write_text(base.metrics, "step\n0\n")
    done = tinygpt("fit", *words)
    assert done.stderr.startswith(f"error: {line}")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
