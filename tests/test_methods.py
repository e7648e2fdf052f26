"""What each method of an adaptation trains on, what is learned from, and that nothing is done
twice, with a policy whose edits are given; then ``tinygpt.adapt`` with a real model."""

from __future__ import annotations

import dataclasses
import json
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from tests.conftest import Command, Starts
from tests.test_adaptation import TIMES, base, run, timeless  # noqa: F401  fixtures
from tinygpt import cli
from tinygpt.adaptation.config import (
    AdaptConfig,
    DocumentsConfig,
    InnerConfig,
    OuterConfig,
    TuningConfig,
    count_records,
)
from tinygpt.adaptation.documents import Document, new_facts
from tinygpt.adaptation.edits import Proposal, SelfEdit
from tinygpt.adaptation.inner import Base
from tinygpt.adaptation.loop import Study, adapt, make_results, run_methods
from tinygpt.adaptation.policies import Examples, Writer
from tinygpt.adaptation.records import FIELDS, Record, read_lines, read_records
from tinygpt.config import LoraConfig
from tinygpt.fileio import sha256
from tinygpt.runs.load import TrainedRun

NOTHING = 1e-30  # a rate by which no weight moves
GOOD, BETTER = 3e-3, 1e-2


class Scripted(Writer):
    """Proposes directives of given rates, the same for every document; learns by taking the next
    list of them."""

    backend = "scripted"
    model = "none"
    parameters = 10

    def __init__(self, rates: Sequence[Sequence[float]], taught: list[Any] | None = None) -> None:
        self.rates = list(rates)
        self.taught: list[Any] = [] if taught is None else taught
        self.calls = 0

    def propose(self, document: Document, count: int, seed: int, explore: float) -> list[Proposal]:
        self.calls += 1
        rates = self.rates[0] if document.split == "train" else self.rates[0][:1]
        return [Proposal(SelfEdit(lr=rate), 7, 5) for rate in rates[:count]]

    def with_text(self, edit: SelfEdit, document: Document, *, seed: int) -> Proposal:
        self.calls += 1
        return Proposal(dataclasses.replace(edit, text=[document.context[::-1]] * edit.n), 3, 2)

    def sft(self, examples: Examples, config: OuterConfig, *, seed: int) -> Writer:
        self.taught.append([(document.doc_id, edit.lr) for document, edit in examples])
        new = Scripted(self.rates[1:], self.taught)
        new.sft_tokens = self.sft_tokens + 100
        return new

    def save(self, folder: Path) -> None:
        (folder / "rates.json").write_text(json.dumps([self.rates, self.sft_tokens]))

    def load(self, folder: Path) -> Writer:
        rates, tokens = json.loads((folder / "rates.json").read_text())
        new = Scripted(rates, self.taught)
        new.sft_tokens = tokens
        return new


def config_of(*names: str, **outer: Any) -> AdaptConfig:
    return AdaptConfig(
        run="base",
        methods=list(names),
        documents=DocumentsConfig("new_facts", train=2, tune=2, test=2),
        inner=InnerConfig(inner_steps=[1, 4], tokens_per_step=40, lora=LoraConfig(rank=4)),
        tuning=TuningConfig(learning_rates=[NOTHING, GOOD]),
        outer=OuterConfig(**outer),
        policy=None,  # type: ignore[arg-type]
        hardware=None,  # type: ignore[arg-type]
        launcher=None,  # type: ignore[arg-type]
        seed=3,
    )


@pytest.fixture
def study(base: Base, tmp_path: Path) -> Callable[..., Study]:  # noqa: F811
    def make(
        config: AdaptConfig, policy: Scripted | None = None, folder: Path = tmp_path, **more: Any
    ) -> Study:
        documents = new_facts(config.documents, base.run)
        return Study(config, base, documents, policy or Scripted([[GOOD]]), folder, **more)

    return make


def kept(study: Study) -> list[Record]:
    return read_records(study.records)[0]


def of(study: Study, method: str, split: str, *steps: int) -> list[Record]:
    """Return its records, after any number of steps or after some."""
    found = [r for r in kept(study) if (r["method"], r["split"]) == (method, split)]
    return [r for r in found if not steps or r["inner_steps"] in steps]


def test_the_rate_is_the_best_on_the_tune_documents(study: Callable[..., Study]) -> None:
    one = study(config_of("none", "lora_doc", "oracle", "full_ft_doc"))
    rewards = run_methods(one)
    for method in ("lora_doc", "oracle", "full_ft_doc"):
        means = {
            rate: np.mean(
                [r["reward"] for r in of(one, method, "tune", 4) if r["edit"]["lr"] == rate]
            )
            for rate in (NOTHING, GOOD)
        }
        best = max(means, key=lambda rate: means[rate])
        assert {r["edit"]["lr"] for r in of(one, method, "test")} == {best}
        assert abs(means[NOTHING]) < 1e-6
    assert {r["lr"] for r in of(one, "full_ft_doc", "test")} == {0.1 * GOOD}
    assert {r["lora_rank"] for r in of(one, "full_ft_doc", "test")} == {None}
    assert [r["inner_steps"] for r in of(one, "none", "test")] == [0, 0]
    assert {r["edit"]["source"] for r in of(one, "oracle", "test")} == {"both"}
    assert all(len(r["edit"]["text"]) >= 2 for r in of(one, "oracle", "test"))
    assert len(kept(one)) == count_records(one.config)
    results = make_results(one, "abc", rewards)
    last = [r["reward"] for r in of(one, "lora_doc", "test", 4)]
    assert (results["reward_lora_doc"], results["reward_none"]) == (np.mean(last), 0)
    assert (results["records"], results["errors"]) == (len(kept(one)), 0)


def test_what_is_forgotten_can_count(study: Callable[..., Study]) -> None:
    config = config_of("lora_doc")
    config.tuning = TuningConfig([NOTHING, 3e-2], forgetting_weight=1e6)
    one = study(config)
    run_methods(one)
    forgot = [r["forgetting"] for r in of(one, "lora_doc", "tune") if r["edit"]["lr"] == 3e-2]
    assert forgot[-1] > 0.01
    assert {r["edit"]["lr"] for r in of(one, "lora_doc", "test")} == {NOTHING}


def test_of_each_document_the_best_edit_is_learned_from_if_it_gains(
    study: Callable[..., Study],
) -> None:
    policy = Scripted([[NOTHING, GOOD, BETTER, 10.0], [GOOD, NOTHING], [BETTER]])
    one = study(config_of("restem", iterations=2, samples=4), policy)
    run_methods(one)
    assert len(of(one, "restem_it0", "train")) == 2 * 4 * 2
    for document in one.split("train"):
        last = [r for r in of(one, "restem_it0", "train", 4) if r["doc_id"] == document.doc_id]
        scores = [-np.inf if r["error"] else r["reward"] for r in last]
        assert [r["accepted"] for r in last] == [n == np.argmax(scores) for n in range(4)]
        best = last[int(np.argmax(scores))]["edit"]["lr"]
        assert (document.doc_id, best) in policy.taught[0]
    assert [len(taught) for taught in policy.taught] == [2, 2]
    tested = [of(one, f"restem_it{n}", "test") for n in range(3)]
    assert [{r["edit"]["lr"] for r in some} for some in tested] == [{NOTHING}, {GOOD}, {BETTER}]
    assert [{r["sft_tokens"] for r in some} for some in tested] == [{0}, {100}, {200}]
    assert {(r["policy_prompt_tokens"], r["policy_tokens"]) for r in tested[0]} == {(7, 5)}
    assert {r["accepted"] for some in tested for r in some} == {None}
    assert len(kept(one)) == count_records(one.config) - 2 * 2 * 2  # two, not four


def test_nothing_is_learned_from_edits_that_gain_nothing(study: Callable[..., Study]) -> None:
    policy = Scripted([[10.0], [GOOD]])  # a rate that breaks the model
    one = study(config_of("restem", iterations=1, samples=1), policy)
    run_methods(one)
    assert policy.taught == []
    assert {r["accepted"] for r in of(one, "restem_it0", "train")} == {False}
    assert {r["edit"]["lr"] for r in of(one, "restem_it1", "test")} == {10.0}


def test_several_trainings_of_an_edit_count_by_their_mean(study: Callable[..., Study]) -> None:
    one = study(
        config_of("restem", iterations=1, samples=2, inner_seeds=2),
        Scripted([[GOOD, BETTER], [GOOD]]),
    )
    run_methods(one)
    last = of(one, "restem_it0", "train", 4)
    assert [r["seed"] for r in last] == [3, 4] * 4
    for document in one.split("train"):
        mine = [r for r in last if r["doc_id"] == document.doc_id]
        means = {
            rate: np.mean([r["reward"] for r in mine if r["lr"] == rate]) for rate in (GOOD, BETTER)
        }
        best = max(means, key=lambda rate: means[rate])
        assert {r["lr"] for r in mine if r["accepted"]} == {best}


class Killed(BaseException):
    pass


def test_a_study_killed_anywhere_goes_on_as_if_nothing_had_been(
    study: Callable[..., Study], tmp_path: Path
) -> None:
    config = config_of("none", "lora_doc", "lora_edit", "restem", iterations=1)
    rates = [[NOTHING, GOOD], [GOOD]]
    whole = study(config, Scripted(rates), tmp_path / "whole")
    for name in ("whole", "torn"):
        (tmp_path / name).mkdir()
    rewards = run_methods(whole)
    rng, folder, taught = np.random.default_rng(0), tmp_path / "torn", list[Any]()
    for _ in range(100):
        left = int(rng.integers(1, 12))

        def advance(count: int) -> None:
            nonlocal left
            left -= count
            if left <= 0:
                raise Killed

        for name in ("adapt.jsonl", "edits.jsonl"):
            with (folder / name).open("ab") as file:
                file.write(b'{"run_id": "torn')
        again = study(config, Scripted(rates, taught), folder, advance=advance)
        try:
            assert run_methods(again) == rewards
            break
        except Killed:
            continue
    assert timeless(kept(again)) == timeless(kept(whole))
    assert read_lines(again.edits) == read_lines(whole.edits)
    assert len(taught) == 1  # a policy that was saved is not trained again
    before = again.records.read_bytes()
    last = study(config, Scripted(rates), folder)
    run_methods(last)
    assert last.policy.calls == 0  # type: ignore[attr-defined]
    assert last.records.read_bytes() == before


# --- the command with a real model

SMALL = (
    "documents.task=new_facts",
    "documents.train=1",
    "documents.tune=1",
    "documents.test=2",
    "documents.forgetting_tokens=300",
    "inner.inner_steps=[1,3]",
    "inner.tokens_per_step=40",
    "inner.lora.rank=4",
    "tuning.learning_rates=[3e-3]",
    "outer.iterations=1",
    "outer.samples=2",
    "outer.steps=3",
    "outer.tokens_per_step=64",
    "policy.max_edit_tokens=10",
    "hardware.threads=1",
    "fit=false",
)


def words_of(run: TrainedRun, cache: Path, folder: Path, *more: str) -> list[str]:  # noqa: F811
    return [f"run={run.path}", *SMALL, f"cache_dir={cache}", f"output_dir={folder}", *more]


def adapted(words: list[str]) -> dict[str, Any]:
    return adapt(cli.compose_for(cli.ADAPT, words), words, Console(quiet=True))


def records(folder: Path) -> list[dict[str, Any]]:
    (path,) = folder.rglob("adapt.jsonl")
    return timeless(read_records(path)[0])


def test_all_methods_leave_their_records_and_the_base_as_it_was(
    run: TrainedRun,  # noqa: F811
    cache: Path,
    tmp_path: Path,
) -> None:
    files = sorted(path for path in run.path.rglob("*") if path.is_file())
    before = [sha256(path) for path in files]
    results = adapted(words_of(run, cache, tmp_path))
    assert [sha256(path) for path in files] == before
    found = records(tmp_path)
    assert results["records"] == len(found)
    assert all(record.keys() == set(FIELDS) - set(TIMES) for record in found)
    assert {r["method"] for r in found} == {
        *("none", "lora_doc", "lora_edit", "lora_doc+edit", "oracle", "full_ft_doc"),
        *("restem_it0", "restem_it1"),
    }
    assert {r["split"] for r in found} == {"train", "tune", "test"}
    written = [json.loads(x) for x in next(tmp_path.rglob("edits.jsonl")).read_text().splitlines()]
    replayed = tmp_path / "replayed"
    path = next(tmp_path.rglob("edits.jsonl"))
    words = ["policy=file", f"policy.path={path}", "methods=[lora_edit]", "documents.train=0"]
    words += [w for w in words_of(run, cache, replayed) if not w.startswith("policy.")]
    adapted(words)
    texts = [line["edit"]["text"] for line in written]
    assert all(record["edit"]["text"] in texts for record in records(replayed))


@pytest.mark.slow
def test_a_killed_adaptation_goes_on_to_the_same_records(
    run: TrainedRun,  # noqa: F811
    cache: Path,
    tmp_path: Path,
    tinygpt: Command,
    start: Starts,
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    adapted(words_of(run, cache, whole))
    words = words_of(run, cache, killed)
    for wanted in (5, 20, 40):
        process = start("adapt", *words)
        while process.poll() is None:
            lines = sum(len(p.read_bytes().splitlines()) for p in killed.rglob("adapt.jsonl"))
            if lines >= wanted:
                process.send_signal(signal.SIGKILL)
            time.sleep(0.01)
        process.wait()
    done = tinygpt("adapt", *words)
    assert done.returncode == 0, done.stderr
    assert records(killed) == records(whole)
    again = tinygpt("adapt", *words)
    assert "already finished" in again.stdout


def test_forced_it_is_made_anew(run: TrainedRun, cache: Path, tmp_path: Path) -> None:  # noqa: F811
    words = words_of(run, cache, tmp_path, "methods=[none,lora_doc]", "run_name=x")
    adapted(words)
    folder = tmp_path / "adaptation" / "x"
    found, old = records(tmp_path), folder / "fit" / "report.html"
    old.parent.mkdir()
    old.write_text("of before")
    (folder / "environment.json").write_text(
        json.dumps({**json.loads((folder / "environment.json").read_text()), "python": "2"})
    )
    adapted([*words, "force=true"])
    assert records(tmp_path) == found
    assert json.loads((folder / "environment.json").read_text())["python"] != "2"
    assert not old.exists()
    assert (folder / "config.yaml").exists()
