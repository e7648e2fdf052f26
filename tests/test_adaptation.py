"""Adaptation: documents, edits, the inner loop and the records of what came out."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from scipy import stats
from torch.nn import functional as F

from tests.conftest import tiny
from tinygpt import cli
from tinygpt.adaptation import documents, edits, inner, records
from tinygpt.adaptation.config import DocumentsConfig, InnerConfig
from tinygpt.adaptation.documents import Document, Heldout
from tinygpt.adaptation.edits import Proposal, Row, SelfEdit
from tinygpt.adaptation.inner import Base, Trial
from tinygpt.adaptation.policies import OwnPolicy
from tinygpt.adaptation.records import FIELDS, Record
from tinygpt.config import Config, ConfigError, CustomData, LoraConfig, ModelConfig, RunError
from tinygpt.data.datamodule import IGNORED
from tinygpt.data.synthetic import Grammar
from tinygpt.data.tokenizers import Bytes, Char, Tokenizer
from tinygpt.model.gpt import GPT
from tinygpt.model.search import likeliest
from tinygpt.runs.load import TrainedRun, load_run
from tinygpt.training.session import train

TIMES = ("wall_s", "cpu_s")  # of a record, that differ from one time to the next
FACTS = (
    "data=synthetic",
    "data.n_facts=200",
    "data.heldout_entities=6",
    "data.max_tokens=40000",
    "data.eval_tokens=4000",
    "tokenizer=bpe",
    "tokenizer.vocab_size=600",
    "tokenizer.train_bytes=200000",
    "model.max_seq_len=64",
    "train.steps=60",
    "optim.learning_rate=1e-2",
)
INNER = InnerConfig(inner_steps=[0, 1, 3], tokens_per_step=40, lora=LoraConfig(rank=4))
ALL_WEIGHTS = dataclasses.replace(INNER, lora=LoraConfig())
PLAIN = Proposal(SelfEdit())
FAST = Proposal(SelfEdit(lr=1e-2))


@pytest.fixture(scope="module")
def run(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    """A model that has begun to learn the embedded corpus."""
    folder = tmp_path_factory.mktemp("outputs")
    words = [word for word in tiny(Path()) if not word.startswith(("data", "tokenizer"))]
    words += [*FACTS, f"output_dir={folder}", f"cache_dir={cache}", "run_name=base"]
    train(cli.compose_config(words), words, Console(quiet=True))
    return load_run(folder / "runs" / "base")


@pytest.fixture(scope="module")
def base(run: TrainedRun, cache: Path) -> Base:
    return Base(run, documents.own_validation(run, 600, str(cache)))


@pytest.fixture(scope="module")
def facts(run: TrainedRun) -> list[Document]:
    return documents.new_facts(DocumentsConfig("new_facts", train=1, tune=1, test=2), run)


def timeless(records: list[Record]) -> list[Record]:
    """Without what differs from one time to the next."""
    return [{k: v for k, v in record.items() if k not in TIMES} for record in records]


def of_text(run: TrainedRun, text: str) -> Document:
    """A document whose context is all of ``text``; what is held out is the same."""
    ids = [run.tokenizer.eot_id, *run.tokenizer.encode(text)]
    heldout = Heldout(*documents.windows([ids[:60]]))
    return Document("text", "0" * 64, text, ids, heldout, "test")


# --- documents


@settings(max_examples=30)
@given(st.integers(1, 40), st.integers(1, 90), st.integers(2, 32), st.integers(0, 9))
def test_no_window_of_the_heldout_part_overlaps_the_context(
    context: int, heldout: int, length: int, more: int
) -> None:
    count = context + length + heldout + more
    text = "".join(map(chr, range(0x4E00, 0x4E00 + count)))  # no character comes twice
    tokenizer = Char("".join(sorted(text)))
    run = untrained(tokenizer, length)
    config = DocumentsConfig(
        train=0, tune=0, test=1, context_tokens=context, heldout_tokens=heldout
    )
    (document,), _ = documents.domain_shift(config, run, iter([text]))
    place = {token: n for n, token in enumerate(tokenizer.encode(text))}
    seen = [place[token] for token in document.context_ids[1:]]
    part = document.heldout
    scored = [place[int(token)] for token in part.targets[part.targets != IGNORED]]
    read = {place[int(t)] for t in part.inputs[part.targets != IGNORED]}
    assert seen == list(range(context))
    assert document.context == text[:context]
    assert scored == list(range(context + length, context + length + heldout))
    assert min(read) >= context + length - 1 > max(seen)
    assert part.inputs.shape[1] <= length
    assert part.tokens == heldout


def untrained(tokenizer: Tokenizer, length: int = 32) -> TrainedRun:
    """On text of the user's own, without a folder."""
    torch.manual_seed(0)
    model = GPT(ModelConfig(d_model=16, max_seq_len=length), tokenizer.vocab_size).eval()
    config = Config(model=model.config, data=CustomData(name="letters"))
    return TrainedRun(Path("nowhere"), "final", 0, config, tokenizer, model, None)


TEXTS = [f"Text {n}. " + "It goes on. " * (5 + n % 4 * 10) for n in range(24)]


def cut(texts: list[str], **values: int) -> tuple[list[Document], int]:
    sizes = {"train": 3, "tune": 2, "test": 4, "context_tokens": 50, "heldout_tokens": 60}
    config = DocumentsConfig(**{**sizes, **values})  # type: ignore[arg-type]
    return documents.domain_shift(config, untrained(Bytes()), iter(texts))


@settings(max_examples=10)
@given(st.permutations(TEXTS))
def test_the_split_is_by_the_text_and_the_short_are_counted(texts: list[str]) -> None:
    found, skipped = cut(TEXTS)
    assert cut([*texts, *texts[:3]])[1] == skipped > 0
    assert [d.sha256 for d in cut(texts)[0]] == [d.sha256 for d in found]
    assert [d.split for d in found] == ["test"] * 4 + ["tune"] * 2 + ["train"] * 3
    # the same test documents, however many there are to learn from
    assert [d.sha256 for d in cut(TEXTS, train=1)[0][:6]] == [d.sha256 for d in found[:6]]
    assert [d.sha256 for d in cut(TEXTS, seed=1)[0]] != [d.sha256 for d in found]


def test_too_few_documents_is_a_line_that_names_the_keys() -> None:
    line = (
        r"^documents.train=3, documents.tune=2, documents.test=4: only 0 documents of 24 are long "
        r"enough; lower these, documents.context_tokens=50 or documents.heldout_tokens=5000; or "
    )
    with pytest.raises(ConfigError, match=line):
        cut(TEXTS, heldout_tokens=5000)


def test_unknown_characters_are_counted() -> None:
    run, text = untrained(Char("ab")), "ab!" * 100
    config = DocumentsConfig(train=0, tune=0, test=1, context_tokens=10, heldout_tokens=20)
    (document,), _ = documents.domain_shift(config, run, iter([text]))
    assert document.unknown == text[:10].count("!") + text[42:62].count("!")
    assert document.context == text[:10]
    edit = Proposal(SelfEdit("edit", text=["a!b!", "b?"]))
    record = inner.run_trial(Base(run, document.heldout), Trial("x", document, edit, 0, INNER))[-1]
    assert (record["edit_unknown_tokens"], record["error"]) == (3, None)


def test_a_fact_is_stated_once_and_asked_in_other_words(
    run: TrainedRun, facts: list[Document]
) -> None:
    data: Any = run.config.data
    names = {entity.name for entity in Grammar(data).heldout}
    for document in facts:
        entity, relation = document.doc_id.split("-")
        value = next(e for e in Grammar(data).heldout if e.name == entity).attributes[relation]
        assert entity in names
        assert document.context.count(value) == 1
        assert len(document.oracle) == 2
        assert all(entity in text and value in text for text in document.oracle)
        for row, wanted in zip(document.heldout.inputs, document.heldout.targets, strict=True):
            text = run.tokenizer.decode(row[row > 0].tolist())
            answer = run.tokenizer.decode(wanted[wanted != IGNORED].tolist())
            assert answer == f" {value}."
            assert "?" in text
            assert entity in text
            assert document.context.split(". ")[1] not in text
    assert len({document.doc_id for document in facts}) == 4
    wanted = DocumentsConfig("new_facts", train=0, tune=0, test=24)
    assert len({d.doc_id for d in documents.new_facts(wanted, run)}) == 24


def test_facts_that_cannot_be_asked_are_refused(run: TrainedRun) -> None:
    with pytest.raises(ConfigError, match="test=25: 25 facts, but the run kept 6 entities"):
        documents.new_facts(DocumentsConfig("new_facts", 0, 0, 25), run)
    short = dataclasses.replace(run, model=untrained(run.tokenizer, 8).model)
    with pytest.raises(ConfigError, match=r"the context of the run is model.max_seq_len=8$"):
        documents.new_facts(DocumentsConfig("new_facts", 0, 0, 1), short)


def test_accuracy_is_by_the_likeliest_of_all_answers(
    run: TrainedRun, facts: list[Document]
) -> None:
    question, heldout = facts[0].heldout.questions[0], facts[0].heldout
    assert len(question.answers.whole) == 1024
    cpu = documents.FullPrecision(torch.device("cpu"))
    (best,) = likeliest(run.model, [question.prompt], [question.answers], cpu)
    for answer in [*sorted(question.answers.whole)[:3], best]:
        asked = question._replace(answer=answer)
        found = dataclasses.replace(heldout, questions=[asked]).accuracy(run.model)
        assert found == (answer == best)


def test_what_may_be_forgotten_is_the_validation_text_of_training(
    run: TrainedRun, base: Base, cache: Path
) -> None:
    assert run.results is not None
    everything = documents.own_validation(run, 10**9, str(cache))
    assert everything.loss(run.model) == pytest.approx(run.results["final_val_loss"], abs=1e-5)
    assert 300 < base.validation.tokens < 640
    rows = {tuple(row) for row in everything.inputs.tolist()}
    assert {tuple(row) for row in base.validation.inputs.tolist()} < rows


# --- edits


def drawing(logits: Any, ops: Any = edits.TEXT_OPS) -> OwnPolicy:
    """A policy of these logits."""
    policy = OwnPolicy.__new__(OwnPolicy)
    policy.ops, policy.logits = ops, logits  # type: ignore[method-assign]
    policy.encode = Bytes().encode  # type: ignore[method-assign]
    policy.set_slots([1e-3, 3e-3, 1e-2], None, "here")
    return policy


@settings(max_examples=100)
@given(st.data(), st.floats(0, 1), st.integers(0, 2**32), st.lists(st.text(), max_size=3))
def test_whatever_the_logits_an_edit_comes_out_and_can_be_read(
    data: st.DataObject, explore: float, seed: int, text: list[str]
) -> None:
    asked: list[tuple[list[int], int]] = []

    def logits(prefix: Any, allowed: Any) -> list[float]:
        asked.append((list(prefix), len(allowed)))
        finite = st.floats(-1e30, 1e30)
        return data.draw(st.lists(finite, min_size=len(allowed), max_size=len(allowed)))

    policy = drawing(logits)
    edit, drawn = policy.draw([1, 2], explore, np.random.default_rng(seed))
    edit = dataclasses.replace(edit, text=text)
    assert edits.read(json.loads(json.dumps(dataclasses.asdict(edit)))) == edit
    assert policy.directive(edit) == drawn
    assert [count for _, count in asked] == [3, 7, 3, 3, 3, 2]
    assert [prefix for prefix, _ in asked] == [[1, 2, *drawn[:n]] for n in range(6)]


@pytest.mark.parametrize("explore", [0.0, 0.5, 1.0])
def test_options_have_their_probabilities(explore: float) -> None:
    p = np.array([0.7, 0.2, 0.1])
    rng = np.random.default_rng(0)
    policy = drawing(lambda prefix, allowed: np.log(p)[: len(allowed)].tolist(), ["continue"])
    drawn = Counter(policy.draw([], explore, rng)[0].source for _ in range(3000))
    counts = [drawn[source] for source in edits.SOURCES]
    expected = 3000 * ((1 - explore) * p + explore / 3)
    assert stats.chisquare(counts, expected).pvalue > 1e-3


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ([], "must be an object of source, text_ops"),
        ({"sourse": "doc"}, "must be an object of"),
        ({"source": "book"}, "edit.source=book: must be one of doc, edit, both"),
        ({"text_ops": ["sing"]}, "edit.text_ops=sing: must be one of"),
        ({"n": True}, "edit.n=True: must be a int"),
        ({"lr": "x"}, "edit.lr='x': must be a float"),
        ({"text": "a line"}, "edit.text='a line': must be a list[str]"),
    ],
)
def test_what_is_no_edit_is_said_in_a_line(values: Any, line: str) -> None:
    if isinstance(values, dict):
        values = {**dataclasses.asdict(SelfEdit()), **values}
    with pytest.raises(ConfigError, match=rf"^[^\n]*{re.escape(line)}[^\n]*$"):
        edits.read(values)


a_directive = st.builds(
    SelfEdit,
    source=st.sampled_from(edits.SOURCES),
    n=st.sampled_from([1, 2, 4]),
    aug=st.sampled_from(edits.AUGMENTATIONS),
    mask=st.sampled_from(edits.MASKS),
    text=st.lists(st.text(st.sampled_from("ab. \n")), max_size=3),
)


@settings(max_examples=100)
@given(a_directive, st.integers(1, 20))
def test_rows_hold_every_piece_whole_and_the_context_last(edit: SelfEdit, length: int) -> None:
    document = of_text(untrained(Bytes()), "One is here. Two is there! Is it three?")
    rows = edits.materialise(edit, document, Bytes(), length)
    assert rows == edits.materialise(edit, document, Bytes(), length)
    pieces: list[list[int]] = []
    for row in rows:
        assert 1 <= row.targets <= length
        assert row.given == (row.targets // 2 if edit.mask == "continuation_only" else 0)
        if row.ids[0] == Bytes.eot_id:
            pieces.append([])
        else:
            assert row.ids[0] == pieces[-1][-1]  # goes on where the one before it ends
        pieces[-1] += row.ids[1:]
    lines = [line.strip() for text in edit.text for line in text.splitlines() if line.strip()]
    plain = [line.encode() for line in lines if edit.source != "doc"]
    plain += [document.context.encode()] if edit.source != "edit" else []
    given = [bytes(piece) for piece in pieces]
    assert given[len(given) - len(plain) :] == plain
    altered = given[: len(given) - len(plain)]
    assert len(altered) <= (edit.n * len(plain) if edit.aug != "none" else 0)
    if edit.aug == "shuffle_sentences":
        whole = Counter(tuple(sorted(text.split())) for text in plain for _ in range(edit.n))
        assert Counter(tuple(sorted(text.split())) for text in altered) == whole
    if edit.aug == "token_drop":
        assert all(any(is_within(text, other) for other in plain) for text in altered)


def is_within(some: bytes, whole: bytes) -> bool:
    """Its bytes in their order, others between them."""
    rest = iter(whole)
    return all(byte in rest for byte in some)


# --- the inner loop


def test_the_base_is_left_as_it_is(base: Base, facts: list[Document]) -> None:
    model = base.run.model
    before = copy.deepcopy(model.state_dict())
    for config in (INNER, ALL_WEIGHTS):
        inner.run_trial(base, Trial("x", facts[0], Proposal(SelfEdit(lr=0.1)), 0, config))
        tokens = torch.randint(500, (2, 30))
        assert torch.equal(inner.trainable_copy(model, config.lora, 0)(tokens), model(tokens))
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize("config", [INNER, ALL_WEIGHTS])
def test_fewer_steps_are_the_beginning_of_more(
    base: Base, facts: list[Document], config: InnerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tinygpt.fileio.digest", lambda what: "5" * 64)  # one seed for all
    names = ("heldout_after", "base_after", "train_loss_first", "train_loss_last")

    def after(steps: list[int]) -> list[list[float]]:
        trial = Trial("x", facts[0], FAST, 5, dataclasses.replace(config, inner_steps=steps))
        return [[record[name] for name in names] for record in inner.run_trial(base, trial)]

    assert [after([k])[0] for k in (1, 2, 4)] == after([1, 2, 4])


def test_no_steps_give_no_reward(base: Base, facts: list[Document]) -> None:
    none = inner.run_trial(base, Trial("none", facts[0], None, 0, INNER))
    assert [record["inner_steps"] for record in none] == [0]
    for config in (INNER, ALL_WEIGHTS):
        first = inner.run_trial(base, Trial("lora_doc", facts[0], PLAIN, 0, config))[0]
        for record in (*none, first):
            assert record["reward"] == record["forgetting"] == record["delta_val_loss"] == 0
            assert record["accuracy_after"] == record["accuracy_before"]
            assert record["tokens_processed"] == record["flops_est"] == 0
            assert record["heldout_after"] == record["heldout_before"] > 0


def test_forgetting_has_its_sign(base: Base) -> None:
    """On the base's own text it is below 0: the base has not learned all there is."""
    stories = base.validation.inputs[base.validation.targets != IGNORED].tolist()
    own = base.run.tokenizer.decode(stories).replace("<|endoftext|>", " ")
    config = dataclasses.replace(ALL_WEIGHTS, inner_steps=[10], tokens_per_step=256)
    trial = Trial("own", of_text(base.run, own), Proposal(SelfEdit(lr=3e-2)), 0, config)
    assert inner.run_trial(base, trial)[0]["forgetting"] < -0.01


def test_a_reward_by_hand(base: Base, facts: list[Document]) -> None:
    """One step of Adam on all weights, a third of the rate in the first of the warmup's steps."""
    document = facts[0]
    config = InnerConfig([1], len(document.context_ids) - 1, LoraConfig())
    (record,) = inner.run_trial(base, Trial("x", document, Proposal(SelfEdit(lr=0.3)), 0, config))
    model = copy.deepcopy(base.run.model)
    ids = torch.tensor(document.context_ids)
    F.cross_entropy(model(ids[None, :-1])[0], ids[1:]).backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                g = p.grad * min(1.0, 1 / float(norm))
                p.sub_(0.03 / 3 * g / (g.abs() + 1e-8))

    def nats(model: GPT, part: Heldout) -> float:
        total, count = 0.0, 0
        for inputs, targets in zip(part.inputs, part.targets, strict=True):
            logits = model(inputs[None])[0].double()
            total += float(F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum"))
            count += int((targets != IGNORED).sum())
        return total / count

    with torch.no_grad():
        by_hand = nats(base.run.model, document.heldout) - nats(model, document.heldout)
        forgotten = nats(model, base.validation) - nats(base.run.model, base.validation)
    assert record["lr"] == pytest.approx(0.03)
    assert abs(by_hand) > 0.01
    assert record["reward"] == pytest.approx(by_hand, abs=2e-5)
    assert record["forgetting"] == pytest.approx(forgotten, abs=2e-5)


@settings(max_examples=60)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=6), st.integers(12, 40), st.integers(0, 5))
def test_a_step_has_exactly_its_tokens_and_each_row_comes_whole(
    lengths: list[int], tokens: int, given_: int
) -> None:
    numbers = itertools.count(1)
    rows = [Row([next(numbers) for _ in range(n + 1)], min(given_, n - 1)) for n in lengths]
    stream = inner.batches(rows, tokens, np.random.default_rng(0))
    whole: Counter[int] = Counter()
    for step in range(1, 8):
        taken = 0
        for read, wanted in zip(*next(stream), strict=True):
            row = next(row for row in rows if row.ids[0] == read[0])
            length = int((read > 0).sum())
            assert read[:length].tolist() == row.ids[:length]
            scored = [IGNORED] * row.given + row.ids[row.given + 1 :]
            padding = [IGNORED] * (len(read) - length)
            assert wanted.tolist() == scored[:length] + padding
            whole[row.ids[0]] += length == row.targets
            taken += length
        assert taken == tokens
        assert sum(whole.values()) >= step
    counts = [whole[row.ids[0]] for row in rows]
    assert max(counts) - min(counts) <= 1


# --- outcomes


def test_a_record_says_what_was_done(base: Base, facts: list[Document]) -> None:
    policy: Any = SimpleNamespace(backend="self", model="run", parameters=100, sft_tokens=9)
    edit = SelfEdit(source="both", text=list(facts[0].oracle))
    trial = Trial("oracle", facts[0], Proposal(edit, 7, 5), 3, INNER, policy, iteration=1)
    found = inner.run_trial(base, trial)
    assert [record["inner_steps"] for record in found] == [0, 1, 3]
    last = found[-1]
    assert tuple(last) == FIELDS
    adapters = 4 * ((16 + 48) + (16 + 16) + (16 + 64) + (64 + 16))
    expected = {
        "seed": 3,
        "iteration": 1,
        "lora_alpha": 8,
        "lora_params": adapters,
        "lr": 3e-3,
        "tokens_processed": 120,
        "policy_tokens": 5,
        "sft_tokens": 9,
        "base_parameters": sum(p.numel() for p in base.run.model.parameters()),
        "flops_est": 2 * 100 * 12 + (4 * base.parameters + 6 * adapters) * 120,
        "edit_unknown_tokens": 0,
        "error": None,
    }
    assert {name: last[name] for name in expected} == expected
    texts = [facts[0].context, *facts[0].oracle]
    unique = sum(len(base.run.tokenizer.encode(text)) for text in texts)
    assert last["edit_train_tokens"] == unique
    assert edits.read(last["edit"]) == edit
    assert last["reward"] == -last["delta_val_loss"] > 0
    assert last["train_loss_last"] < last["train_loss_first"]


def test_an_edit_that_comes_out_empty_is_an_outcome(base: Base, facts: list[Document]) -> None:
    edit = Proposal(SelfEdit(source="edit", text=[" \n ", ""]))
    found = inner.run_trial(base, Trial("lora_edit", facts[0], edit, 0, INNER))
    assert [(record["error"], record["reward"]) for record in found] == [("empty edit", None)] * 3


def test_an_inner_loop_that_diverges_is_an_outcome(
    base: Base, facts: list[Document], tmp_path: Path
) -> None:
    config = dataclasses.replace(INNER, inner_steps=[0, 1, 30])
    trial = Trial("x", facts[0], Proposal(SelfEdit(lr=1e30)), 0, config)
    first, _, last = found = inner.run_trial(base, trial)
    assert (first["reward"], first["error"]) == (0, None)
    assert last["error"].startswith("diverged at step ")
    assert last["reward"] is None
    records.append(tmp_path / "adapt.jsonl", found)  # no NaN in them


def test_a_base_that_has_diverged_is_refused(base: Base, facts: list[Document]) -> None:
    model = copy.deepcopy(base.run.model)
    with torch.no_grad():
        model.token_embedding.weight.fill_(float("nan"))
    broken = Base(dataclasses.replace(base.run, model=model), base.validation)
    with pytest.raises(RunError, match="is not finite"):
        inner.run_trial(broken, Trial("none", facts[0], None, 0, INNER))


def test_run_ids_tell_apart_what_differs(base: Base, facts: list[Document]) -> None:
    trial = Trial("a", facts[0], PLAIN, 0, INNER)
    others = [
        dataclasses.replace(trial, method="b"),
        dataclasses.replace(trial, seed=1),
        dataclasses.replace(trial, document=facts[1]),
        dataclasses.replace(trial, proposal=FAST),
        dataclasses.replace(trial, proposal=None),
        dataclasses.replace(trial, inner=ALL_WEIGHTS),
        dataclasses.replace(trial, iteration=1),
        dataclasses.replace(trial, document=dataclasses.replace(facts[0], context_ids=[1, 2])),
    ]
    ids = [one.run_id(base, 0) for one in (trial, *others)]
    ids += [trial.run_id(base, steps) for steps in (1, 3)]
    assert len(set(ids)) == len(ids)
    assert trial.run_id(Base(base.run, base.validation), 0) == ids[0]
    nothing = dataclasses.replace(trial, proposal=None, inner=ALL_WEIGHTS)
    assert nothing.run_id(base, 0) == ids[5]  # the same whatever would train it


# --- the file

RECORDS = [dict.fromkeys(FIELDS) | {"run_id": f"id{n}", "doc_id": "é\u2028\n"} for n in range(4)]


@settings(max_examples=40)
@given(st.data())
def test_a_file_torn_anywhere_goes_on_with_whole_lines(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("records") / "adapt.jsonl"
    assert records.read_records(path) == ([], False)
    records.append(path, RECORDS[:1])
    records.append(path, RECORDS[1:3])
    content = path.read_bytes()
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    whole = path.read_bytes().count(b"\n")
    records.repair(path)
    assert records.read_records(path) == (RECORDS[:whole], False)
    records.append(path, RECORDS[3:])
    assert records.read_records(path) == ([*RECORDS[:whole], RECORDS[3]], False)


def test_a_number_that_json_lacks_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        records.append(tmp_path / "adapt.jsonl", [RECORDS[0] | {"reward": float("nan")}])
    assert not (tmp_path / "adapt.jsonl").exists()
