"""Who proposes edits: each kind of policy, its training, and what it says when it cannot."""

from __future__ import annotations

import copy
import dataclasses
import json
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from tests.conftest import tiny
from tinygpt import cli
from tinygpt.adaptation import documents, edits
from tinygpt.adaptation.config import (
    LEARN,
    AdaptConfig,
    DocumentsConfig,
    FilePolicy,
    ModelPolicy,
    OuterConfig,
    PolicyConfig,
    SelfPolicy,
    TuningConfig,
)
from tinygpt.adaptation.documents import Document
from tinygpt.adaptation.edits import Policy, Proposal, SelfEdit
from tinygpt.adaptation.inner import seed_of
from tinygpt.adaptation.loop import make_policy
from tinygpt.adaptation.policies import OwnPolicy, ReplayPolicy, Writer, learned_rows
from tinygpt.adaptation.prompted import HuggingFacePolicy
from tinygpt.config import ConfigError, LoraConfig, ModelConfig, RunError
from tinygpt.model.gpt import GPT
from tinygpt.runs.load import TrainedRun, load_run
from tinygpt.training.session import train

transformers = pytest.importorskip("transformers")

RATES = [1e-3, 3e-3, 1e-2]
OUTER = OuterConfig(steps=40, tokens_per_step=128, learning_rate=1e-2, lora=LoraConfig(rank=4))
TEXTS = [
    f"Chapter {n}. " + " ".join(f"On day {k} the crew of ship {n} saw land." for k in range(n, 40))
    for n in range(6)
]


@pytest.fixture(scope="module")
def run(corpus: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    """A model of 64 bytes of context that has begun to learn the small corpus."""
    folder = tmp_path_factory.mktemp("outputs")
    more = ("model.max_seq_len=64", "train.steps=40", "optim.learning_rate=1e-2")
    words = tiny(corpus, *more, f"output_dir={folder}", f"cache_dir={cache}", "run_name=base")
    train(cli.compose_config(words), words, Console(quiet=True))
    return load_run(folder / "runs" / "base")


@pytest.fixture(scope="module")
def books(run: TrainedRun) -> list[Document]:
    config = DocumentsConfig(train=2, tune=1, test=1, context_tokens=150, heldout_tokens=200)
    return documents.domain_shift(config, run, iter(TEXTS))[0]


def made(run: TrainedRun, policy: PolicyConfig, *documents: Document) -> Any:
    config = AdaptConfig(policy=policy, tuning=TuningConfig(learning_rates=RATES))
    return make_policy(config, run, documents)


@pytest.fixture(scope="module")
def own(run: TrainedRun) -> OwnPolicy:
    found: OwnPolicy = made(run, SelfPolicy(max_edit_tokens=12))
    return found


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 with random weights and a small tokenizer, as transformers saves them."""
    folder = tmp_path_factory.mktemp("gpt2")
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = tokenizers.decoders.ByteLevel()
    letters = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    end = "<|endoftext|>"
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320, special_tokens=[end], initial_alphabet=letters, show_progress=False
    )
    trained.train_from_iterator(TEXTS, trainer)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=trained, eos_token=end, bos_token=end
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=trained.get_vocab_size(),
        n_positions=1024,
        n_embd=32,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def hf(run: TrainedRun, gpt2: Path) -> HuggingFacePolicy:
    found: HuggingFacePolicy = made(run, ModelPolicy(path=str(gpt2), max_edit_tokens=12))
    return found


@pytest.fixture(params=["self", "hf", "file"])
def policy(
    request: pytest.FixtureRequest, run: TrainedRun, books: list[Document], tmp_path: Path
) -> Policy:
    own = request.getfixturevalue("own")
    if request.param == "file":
        path = tmp_path / "edits.jsonl"
        proposals = own.propose(books[0], 5, seed=0, explore=1.0)
        path.write_text("".join(line(books[0], proposal) for proposal in proposals))
        return ReplayPolicy(str(path))
    if request.param == "hf":
        found: Policy = request.getfixturevalue("hf")
        return found
    assert isinstance(own, OwnPolicy)
    return own


def line(document: Document, proposal: Proposal, **more: Any) -> str:
    values = {
        "doc_id": document.doc_id,
        "doc_sha256": document.sha256,
        "edit": dataclasses.asdict(proposal.edit),
        "prompt_tokens": proposal.prompt_tokens,
        "tokens": proposal.tokens,
        "method": "restem",
    }
    return json.dumps(values | more) + "\n"


def weights(model: Any) -> dict[str, bytes]:
    return {name: w.numpy().tobytes() for name, w in model.state_dict().items()}


def prefix(policy: Writer, document: Document) -> list[int]:
    """The tokens behind which a directive is drawn."""
    return policy.behind("directive", document, 1)[0]


def log_probability(policy: Writer, document: Document, edit: SelfEdit) -> float:
    """Of a directive, among the options of its slots, in nats."""
    total, ids = 0.0, prefix(policy, document)
    for options, token in zip(policy.slots.values(), policy.directive(edit), strict=True):
        allowed = policy.tokens[: len(options)]
        logits = torch.tensor(policy.logits(ids, allowed)).double()
        total += float(logits.log_softmax(0)[allowed.index(token)])
        ids = [*ids, token]
    return total


# --- what all of them hold to


def test_every_proposal_can_be_read_and_trained_on_and_comes_again(
    policy: Policy, run: TrainedRun, books: list[Document]
) -> None:
    found = policy.propose(books[0], 5, seed=3, explore=0.5)
    torch.manual_seed(9)
    assert policy.propose(books[0], 5, seed=3, explore=0.5) == found
    assert policy.propose(books[0], 5, seed=4, explore=0.5) != found
    assert len(found) == 5
    for proposal in found:
        edit = proposal.edit
        assert edits.read(dataclasses.asdict(edit)) == edit
        assert edit.lr in RATES
        wanted = 0 if edit.source == "doc" else edit.n * len(edit.text_ops)
        assert len(edit.text) == wanted
        assert (proposal.tokens > 0) or (wanted == 0)
        rows = edits.materialise(edit, books[0], run.tokenizer, 64)
        for row in rows:
            assert len(row.ids) <= 65
            assert max(row.ids) < run.tokenizer.vocab_size
        assert rows or not "".join(edit.text).strip()


def test_text_for_a_directive_is_written_where_its_source_needs_any(
    policy: Policy, books: list[Document]
) -> None:
    plain = policy.with_text(SelfEdit(text=["old"]), books[0], seed=1)
    assert plain == Proposal(SelfEdit())
    edit = SelfEdit(source="both", n=2, lr=1e-2)
    found = policy.with_text(edit, books[0], seed=1)
    assert dataclasses.replace(found.edit, text=[]) == edit
    assert found.edit.text
    assert found == policy.with_text(edit, books[0], seed=1)
    assert found.prompt_tokens > 0
    assert found.tokens > 0


@pytest.mark.parametrize("policy", ["self", "hf"], indirect=True)
def test_training_makes_what_paid_likelier_and_leaves_the_policy_as_it_was(
    policy: Any, books: list[Document], tmp_path: Path
) -> None:
    before = weights(policy.lm)
    edit = policy.with_text(SelfEdit(source="both", lr=1e-2, n=2), books[0], seed=0).edit
    later = policy.sft([(books[0], edit)], OUTER, seed=0)
    for document in books[:2]:
        rise = log_probability(later, document, edit) - log_probability(policy, document, edit)
        assert rise > 0.5
    assert weights(policy.lm) == before
    assert list(map(type, later.lm.modules())) == list(map(type, policy.lm.modules()))  # merged
    assert (policy.sft_tokens, later.sft_tokens) == (0, 40 * 128)
    changed = weights(later.lm)
    assert changed.keys() == before.keys()
    names = {name for name in changed if changed[name] != before[name]}
    assert names
    assert not [name for name in names if "embedding" in name or "wte" in name or "head" in name]
    assert weights(policy.sft([(books[0], edit)], OUTER, seed=0).lm) == changed
    later.save(tmp_path)
    again = policy.load(tmp_path)
    assert weights(again.lm) == changed
    assert (again.model, again.sft_tokens) == (later.model, 40 * 128)
    assert again.sft([(books[0], edit)], OUTER, seed=0).sft_tokens == 2 * 40 * 128
    proposed = again.propose(books[0], 4, seed=0, explore=0.0)
    assert later.propose(books[0], 4, seed=0, explore=0.0) == proposed


@pytest.mark.parametrize("policy", ["self", "hf"], indirect=True)
def test_all_weights_can_be_trained_too(policy: Any, books: list[Document]) -> None:
    config = dataclasses.replace(OUTER, lora=LoraConfig(), learning_rate=1e-3)
    later, edit = policy.sft([(books[0], SelfEdit())], config, seed=0), SelfEdit()
    assert log_probability(later, books[0], edit) > log_probability(policy, books[0], edit)


@settings(max_examples=60)
@given(
    st.lists(st.integers(0, 99), min_size=1, max_size=20),
    st.lists(st.integers(100, 199), max_size=30),
    st.integers(1, 20),
)
def test_each_token_that_was_written_counts_once_and_no_other(
    given_: list[int], written: list[int], length: int
) -> None:
    rows = list(learned_rows(given_, written, length))
    whole = [*given_, *written]
    learned = []
    for row in rows:
        assert 1 <= row.targets <= length
        learned += row.ids[row.given + 1 :]
        end = len(given_) + len(learned)
        assert row.ids == whole[end - len(row.ids) : end]  # behind what it was written behind
        assert row.targets == min(length, end - 1)
    assert learned == written


# --- the base itself


def test_texts_are_continuations_of_chunks_and_are_counted(
    own: OwnPolicy, run: TrainedRun, books: list[Document]
) -> None:
    document, edit = books[0], SelfEdit(source="edit", n=4)
    prompts = own.prompts(edit, document)
    ids = document.context_ids
    assert [len(prompt) for prompt in prompts] == [32] * 4
    assert prompts[0] == ids[-32:]
    assert prompts[-1] == ids[:32]
    assert len({tuple(prompt) for prompt in prompts}) == 4
    found = own.with_text(edit, document, seed=5)
    assert found.prompt_tokens == 128
    assert found.tokens <= 4 * 12
    assert found.tokens == sum(len(run.tokenizer.encode(text)) for text in found.edit.text)
    # as the model itself continues one of them
    steps = run.stream([prompts[2]], [seed_of(5, 2)], 12, own.sampling)
    alone = run.tokenizer.decode([int(step.tokens) for step in steps])
    assert alone.startswith(found.edit.text[2])
    proposals = own.propose(document, 6, seed=0, explore=1.0)
    for proposal in proposals:
        chunks = own.prompts(proposal.edit, document)
        assert proposal.prompt_tokens == 59 + 32 * len(chunks)


@pytest.mark.parametrize("policy", ["self", "hf"], indirect=True)
def test_a_policy_that_has_diverged_proposes_nothing(policy: Any, books: list[Document]) -> None:
    broken = policy.with_model(copy.deepcopy(policy.lm), 0)
    with torch.no_grad():
        next(broken.lm.parameters()).fill_(float("nan"))
    with pytest.raises(RunError, match="it has diverged"):
        broken.propose(books[0], 1, seed=0, explore=1.0)
    with pytest.raises(RunError, match="it has diverged"):
        broken.with_text(SelfEdit(source="edit"), books[0], seed=0)
    with pytest.raises(RunError, match=r"outer.learning_rate=0.01: the policy's training div"):
        broken.sft([(books[0], SelfEdit())], OUTER, seed=0)


# --- a model of transformers


def test_a_directive_is_asked_for_behind_the_text_and_its_questions(
    hf: HuggingFacePolicy, books: list[Document]
) -> None:
    read = hf.tokenizer.decode(prefix(hf, books[0]))
    assert read.startswith("<|endoftext|>Text:\n" + books[0].context)
    assert [hf.tokenizer.decode([token]) for token in hf.tokens] == list("abcdefg")
    assert "Learning rate: a = 0.001, b = 0.003, c = 0.01\n" in read
    assert "g = continue+restate+qa\n" in read
    assert read.endswith("in this order: ")
    for op in edits.TEXT_OPS:
        (prompt,) = hf.prompts(SelfEdit(source="edit", text_ops=[op]), books[0])
        assert books[0].context in hf.tokenizer.decode(prompt)
    long = prefix(hf, dataclasses.replace(books[0], context="Sail on. " * 500))
    assert len(long) == 1024 - 6
    assert hf.tokenizer.decode(long).startswith("<|endoftext|>Text:\n")


@pytest.mark.parametrize("policy", ["self", "hf"], indirect=True)
def test_a_directive_is_drawn_by_the_logits_of_the_model(
    policy: Any, books: list[Document]
) -> None:
    ids = prefix(policy, books[0])
    with torch.no_grad():
        logits = policy.lm(torch.tensor([ids]))
    expected = getattr(logits, "logits", logits)[0, -1, policy.tokens]
    assert policy.logits(ids, policy.tokens) == pytest.approx(expected.tolist(), abs=1e-5)


# --- a model of mlx_lm


@pytest.fixture
def mlx(monkeypatch: pytest.MonkeyPatch, hf: HuggingFacePolicy) -> SimpleNamespace:
    """As much of mlx and mlx_lm as a policy calls, over numpy: it shows that it is called as its
    documentation says, not that it answers so."""
    rng = {"now": np.random.default_rng()}
    state = SimpleNamespace(prompts=[], broken=False)

    def model(ids: Any) -> Any:  # (B, T) -> (B, T, V)
        return np.sin(np.arange(300) * (1 + ids[:, :, None] % 7)) * 3

    def stream_generate(
        model: Any, tokenizer: Any, prompt: list[int], max_tokens: int, sampler: Any
    ) -> Iterator[SimpleNamespace]:
        state.prompts.append(prompt)
        for n in range(max_tokens):
            token = 0 if n == 6 else int(rng["now"].integers(1, 300))
            logprobs = np.full(300, float("nan") if state.broken else -6.0)
            stop = token == 0
            text = "" if stop else tokenizer.decode([token])
            reason = "stop" if stop else None
            yield SimpleNamespace(text=text, token=token, logprobs=logprobs, finish_reason=reason)
            if stop:
                return

    core, lm, sampling = (ModuleType(n) for n in ("mlx.core", "mlx_lm", "mlx_lm.sample_utils"))
    vars(core).update(
        array=np.array,
        random=SimpleNamespace(seed=lambda s: rng.update(now=np.random.default_rng(s))),
    )
    vars(lm).update(load=lambda path: (model, hf.tokenizer), stream_generate=stream_generate)
    vars(sampling).update(make_sampler=lambda temp, top_k: (temp, top_k))
    for module in (core, lm, sampling):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(sys.modules, "mlx", ModuleType("mlx"))
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    return state


def test_mlx_is_asked_as_transformers_is(
    mlx: SimpleNamespace, run: TrainedRun, gpt2: Path, hf: HuggingFacePolicy, books: list[Document]
) -> None:
    policy = made(run, ModelPolicy(kind="mlx", path=str(gpt2), max_edit_tokens=12))
    edit = SelfEdit(source="edit", text_ops=["continue", "qa"], n=2)
    found = policy.with_text(edit, books[0], seed=0)
    assert mlx.prompts == hf.prompts(edit, books[0])
    assert len(set(found.edit.text)) == 4
    assert found.tokens == 4 * 6
    assert found == policy.with_text(edit, books[0], seed=0)
    drawn = policy.propose(books[0], 4, seed=0, explore=0.2)
    assert drawn == policy.propose(books[0], 4, seed=0, explore=0.2)
    assert all(edits.read(dataclasses.asdict(p.edit)) == p.edit for p in drawn)
    ids = [5, 6]
    expected = np.sin(np.array(policy.tokens) * 7) * 3
    assert policy.logits(ids, policy.tokens) == pytest.approx(expected.tolist())
    assert policy.backend not in LEARN
    mlx.broken = True
    with pytest.raises(RunError, match="it has diverged"):
        policy.with_text(edit, books[0], seed=0)


# --- a file


def test_a_file_gives_back_what_was_written(
    own: OwnPolicy, books: list[Document], tmp_path: Path
) -> None:
    written = own.propose(books[0], 4, seed=0, explore=1.0)
    others = own.propose(books[1], 2, seed=0, explore=1.0)
    path = tmp_path / "edits.jsonl"
    lines = [line(books[0], one) for one in written]
    lines += [line(books[1], one, doc_sha256=None) for one in others]
    path.write_text("\n".join(lines))
    policy = ReplayPolicy(str(path), books[:2])
    assert policy.propose(books[0], 4, seed=0, explore=0.5) == written
    assert policy.propose(books[0], 6, seed=3, explore=0.0) == [written[3], *written, written[0]]
    assert policy.propose(books[1], 1, seed=1, explore=0.0) == [others[1]]
    path.write_text(line(books[0], Proposal(SelfEdit())))
    with pytest.raises(RunError, match=f"has no text for the document {books[0].doc_id}"):
        ReplayPolicy(str(path)).with_text(SelfEdit(source="edit"), books[0], seed=0)


def test_a_document_without_edits_is_named(run: TrainedRun, books: list[Document], tmp_path: Path):
    path = tmp_path / "edits.jsonl"
    path.write_text(line(books[0], Proposal(SelfEdit())))
    said = f"policy.path={path}: has no edit of the document {books[1].doc_id}"
    with pytest.raises(ConfigError) as caught:
        made(run, FilePolicy(path=str(path)), *books[:2])
    assert str(caught.value) == said


GOOD = json.dumps({"doc_id": "x", "edit": dataclasses.asdict(SelfEdit())})


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ("{", "not JSON ("),
        ("\udcff", "not JSON ("),
        ("[1]", "must be an object with an edit"),
        ('{"doc_id": "x"}', "must be an object with an edit"),
        (GOOD.replace('"x"', "3"), "must name the document, by doc_sha256 or doc_id"),
        (GOOD.replace('"n": 1', '"n": 0'), "edit.n=0: must be at least 1"),
        (GOOD.replace('"lr": 0.003', '"lr": 1e999'), "edit.lr=inf: must be a finite number"),
        (GOOD[:-1] + ', "tokens": -1}', "tokens=-1: must be a number of tokens, at least 0"),
    ],
)
def test_a_line_that_is_no_edit_is_said_with_its_number(
    bad: str, said: str, tmp_path: Path
) -> None:
    path = tmp_path / "edits.jsonl"
    path.write_text(f"{GOOD}\n\n{bad}\n", errors="surrogateescape")
    with pytest.raises(ConfigError) as caught:
        ReplayPolicy(str(path))
    assert str(caught.value).startswith(f"policy.path={path}: line 3: {said}")
    assert "\n" not in str(caught.value)


# --- what cannot be had


def said(run: TrainedRun, policy: PolicyConfig) -> str:
    with pytest.raises(ConfigError) as caught:
        made(run, policy)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_no_model_is_said_in_a_line(run: TrainedRun, gpt2: Path, tmp_path: Path) -> None:
    assert said(run, ModelPolicy(path="nowhere")) == "policy.path=nowhere: no such folder"
    assert said(run, FilePolicy(path="nowhere")) == (
        "policy.path=nowhere: cannot be read (No such file or directory)"
    )
    where = f"policy.path={tmp_path}: "
    assert said(run, ModelPolicy(path=str(tmp_path))) == (
        f"{where}not the folder of a model, as it has no config.json"
    )
    (tmp_path / "config.json").write_text("[]")
    assert said(run, ModelPolicy(path=str(tmp_path))).startswith(where)
    (tmp_path / "config.json").write_text('{"model_file": "model.py"}')
    assert said(run, ModelPolicy(path=str(tmp_path))).endswith("code of its own, which is not run")
    (tmp_path / "config.json").write_bytes((gpt2 / "config.json").read_bytes())
    torch.save({}, tmp_path / "pytorch_model.bin")
    assert said(run, ModelPolicy(path=str(tmp_path))).startswith(
        f"{where}AutoModelForCausalLM of transformers cannot read it ("
    )
    (tmp_path / "model.safetensors").write_bytes((gpt2 / "model.safetensors").read_bytes())
    assert said(run, ModelPolicy(path=str(tmp_path))).startswith(f"{where}the tokenizer has 0 le")
    (tmp_path / "tokenizer.json").write_text("{")
    assert "AutoTokenizer" in said(run, ModelPolicy(path=str(tmp_path)))
    long = said(run, ModelPolicy(path=str(gpt2), max_edit_tokens=1000))
    prompts = (
        "its context of 1024 tokens is too short; prompts and policy.max_edit_tokens=1000 take"
    )
    assert prompts in long
    assert int(long.split()[-1]) > 1024


def test_code_in_a_folder_is_not_run(run: TrainedRun, gpt2: Path, tmp_path: Path) -> None:
    for file in gpt2.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    values = json.loads((gpt2 / "config.json").read_text())
    auto = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    values |= {"model_type": "evil", "auto_map": auto}
    (tmp_path / "config.json").write_text(json.dumps(values))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert "cannot read it" in said(run, ModelPolicy(path=str(tmp_path)))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("kind", "module"), [("hf", "transformers"), ("hf", "peft"), ("mlx", "mlx_lm")]
)
@pytest.mark.usefixtures("mlx")
def test_a_library_that_is_missing_is_named(
    kind: str, module: str, run: TrainedRun, gpt2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    line = f"policy.kind={kind}: needs `pip install -e '.[{kind}]'` in the folder of tinygpt"
    assert said(run, ModelPolicy(kind=kind, path=str(gpt2))) == line


def test_mlx_elsewhere_is_refused(
    run: TrainedRun, gpt2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    assert said(run, ModelPolicy(kind="mlx", path=str(gpt2))) == (
        "policy.kind=mlx: needs Apple silicon, and this is Linux x86_64; use hf"
    )


def test_a_state_that_is_another_policys_is_refused(
    own: OwnPolicy, run: TrainedRun, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=str(tmp_path)):
        own.load(tmp_path)
    torch.manual_seed(0)
    other = GPT(ModelConfig(d_model=32, n_heads=2), run.tokenizer.vocab_size)
    own.with_model(other, 0).save(tmp_path)
    with pytest.raises(ConfigError, match="not a policy of the model"):
        own.load(tmp_path)
