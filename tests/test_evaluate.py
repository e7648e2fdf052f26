"""Test ``python -m tinygpt.evaluate``: every number against a direct computation."""

from __future__ import annotations

import collections
import dataclasses
import io
import itertools
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from scipy import stats
from torch import Tensor
from torch.nn import functional as F

import tinygpt
from tests.conftest import Command, tiny
from tinygpt import cli, fileio
from tinygpt.config import ConfigError, SyntheticData
from tinygpt.data.shards import Split
from tinygpt.data.synthetic import Grammar
from tinygpt.data.tokenizers import Bytes, Char
from tinygpt.evaluating import runs, scoring, table, tasks
from tinygpt.evaluating.options import (
    Options,
    Question,
    Task,
    folder_for,
    names_of,
    read_task,
    read_tasks,
    text_name,
)
from tinygpt.evaluating.scoring import Machine, Positions, as_in_training
from tinygpt.model.gpt import GPT
from tinygpt.model.search import likeliest, tree_of
from tinygpt.runs import rundir
from tinygpt.runs.load import TrainedRun, load_run
from tinygpt.training.hardware import Device
from tinygpt.training.session import train

CPU = Machine(Device("cpu", "32"), cli.compose_config([]))


def trained_in(folder: Path, cache: Path, overrides: list[str]) -> Path:
    overrides = [*overrides, f"output_dir={folder}", f"cache_dir={cache}"]
    train(cli.compose_config(overrides), overrides, Console(quiet=True))
    return max((folder / "runs").iterdir(), key=lambda path: path.stat().st_ctime)


def scored(*runs: Path, **options: Any) -> list[dict[str, Any]]:
    """Return the rows of ``evaluate_runs``."""
    table = tinygpt.evaluate_runs(*runs, **options)
    return [{str(k): v for k, v in row.items()} for row in table.to_dict("records")]


def shown(made: list[runs.Evaluation]) -> str:
    """Return what the terminal shows, with single spaces."""
    text = io.StringIO()
    table.show(made, Console(file=text, width=80))
    return " ".join(text.getvalue().split())


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("outputs")


@pytest.fixture(scope="module")
def run(corpus: Path, cache: Path, outputs: Path) -> Path:
    """Train for twelve steps on the small corpus, and keep two checkpoints."""
    more = ("run_name=one", "train.keep_every=1024", "optim.learning_rate=0.01")
    return trained_in(outputs, cache, tiny(corpus, *more))


@pytest.fixture(scope="module")
def synthetic(cache: Path, outputs: Path) -> Path:
    """Train on the embedded corpus, where windows hold whole documents."""
    words = ["run_name=stories", "data.max_tokens=20000", "data.eval_tokens=8000"]
    words += ["data.n_facts=8", "data.heldout_entities=0", "tokenizer.vocab_size=600"]
    words += ["tokenizer.train_bytes=100_000", "model.d_model=16", "model.n_heads=2"]
    words += ["train.steps=6", "hardware.accelerator=cpu", "hardware.threads=1"]
    return trained_in(outputs, cache, [*words, *PLAIN])


PLAIN = ["train.batch_tokens=512", "train.sample_tokens=0", "logger=csv"]


# --- loss and accuracy


@pytest.mark.parametrize("name", ["run", "synthetic"])
def test_the_loss_is_that_of_training_to_the_last_digit(
    name: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(name)
    results = fileio.read_json(folder / "results.json")
    untrained, trained = scored(folder, baseline=True)
    assert trained["loss"] == results["final_val_loss"]
    assert trained["accuracy"] == results["final_val_accuracy"]
    assert trained["bits_per_byte"] == results["final_val_bits_per_byte"]
    assert trained["irreducible_loss_exact"] == results["irreducible_loss_exact"]
    assert (trained["irreducible_loss_exact"] is None) == (name == "run")
    assert untrained["loss"] == results["initial_val_loss"]
    assert scored(folder, split="test")[0]["loss"] == results["test_loss"]


def test_every_checkpoint_is_scored(run: Path) -> None:
    table = tinygpt.evaluate_runs(run, checkpoints=["all"])
    assert list(table["checkpoint"]) == ["step_4", "step_8", "final"]  # best and last are final
    assert list(table["step"]) == [4, 8, 12]
    named = tinygpt.evaluate_runs(run, checkpoints="best,step_4")
    assert list(named["loss"]) == [table["loss"].iloc[2], table["loss"].iloc[0]]
    assert table["loss"].is_monotonic_decreasing
    results = fileio.read_json(run / "results.json")
    assert table["flops_exact"].iloc[-1] == results["flops_exact"]
    assert (table["gain"] + table["loss"]).round(9).nunique() == 1
    last = table.iloc[-1]
    assert last["gain"] == pytest.approx(math.log(258) - last["loss"])
    assert last["gain_per_pflop"] == pytest.approx(last["gain"] / last["flops_exact"] * 1e15)
    assert last["gain_per_million_parameters"] == pytest.approx(
        last["gain"] / results["model_parameters"] * 1e6
    )


def stream(path: Path) -> list[int]:
    """Return the tokens of a text without separators, as one document."""
    return [257, *path.read_bytes(), 257]


def naive(model: GPT, tokens: list[int], stride: int) -> tuple[list[float], list[int]]:
    """Return the loss of each target in the window with the most context, and how many tokens are
    likelier."""
    length = model.config.max_seq_len
    losses, likelier = [], []
    for place in range(len(tokens) - 1):
        start = max(0, -(-(place - length + 1) // stride) * stride)
        with torch.no_grad():
            logits = model(torch.tensor([tokens[start : place + 1]]))[0, -1].double()
        losses.append(float(F.cross_entropy(logits, torch.tensor(tokens[place + 1]))))
        likelier.append(int((logits > logits[tokens[place + 1]]).sum()))
    return losses, likelier


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("The hen, the fox and the cow went to the wood; " * 4 + "then they slept.")
    return path


@pytest.mark.parametrize("stride", [1, 7, 32, None])
def test_a_sliding_window_scores_every_target_once_with_the_most_context(
    run: Path, text: Path, stride: int | None
) -> None:
    found = scored(run, data=text, stride=stride)[0]
    tokens = stream(text)
    losses, likelier = naive(load_run(run).model, tokens, stride or 32)
    assert found["scored_tokens"] == len(losses) == len(tokens) - 1
    assert found["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert found["accuracy"] == pytest.approx(np.mean([n == 0 for n in likelier]))
    assert found["accuracy_top5"] == pytest.approx(np.mean([n < 5 for n in likelier]))
    assert found["bits_per_byte"] == pytest.approx(
        sum(losses) / math.log(2) / text.stat().st_size, rel=1e-5
    )
    assert found["perplexity"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-4)


@settings(max_examples=200)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=3), st.integers(1, 20), st.data())
def test_windows_of_any_stride_share_out_the_targets(
    sizes: list[int], length: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, length))
    split = Split.__new__(Split)
    split.unscored = 0
    split.shards = [np.zeros(size + 1) for size in sizes]  # type: ignore[misc]
    split.offsets = [np.array([0, size]) for size in sizes]
    windows = split.eval_windows(length, False, stride)
    counted: list[int] = []
    for start, size, before in zip(*windows, strict=True):
        assert 0 < size <= length
        is_first = start in np.cumsum([0, *(size + 1 for size in sizes)])
        assert before == 0 if is_first else before >= length - stride
        counted += range(start + before, start + size)
    begins = np.cumsum([0, *(size + 1 for size in sizes)])[:-1]
    assert counted == [b + n for b, size in zip(begins, sizes, strict=True) for n in range(size)]


def test_loss_by_position(run: Path, text: Path) -> None:
    tokens = torch.tensor(stream(text))
    full = (len(tokens) - 1) // 32
    inputs, targets = tokens[: full * 32].view(full, 32), tokens[1 : full * 32 + 1].view(full, 32)
    with torch.no_grad():
        logits = load_run(run).model(inputs)
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    table = losses.view(full, 32).numpy()
    for stride in (None, 5):  # the windows of the curve are the same
        found = tinygpt.loss_by_position(run, data=text, stride=stride)
        assert list(found["position"]) == list(range(1, 33))
        assert np.allclose(found["loss"], table.mean(axis=0), rtol=1e-5)
        assert np.allclose(found["standard_error"], stats.sem(table, axis=0), rtol=1e-3)


def test_bands_of_positions_hold_each_once() -> None:
    loss = np.arange(1.0, 12.0)
    bands = Positions(loss, loss, 1).bands()
    assert [(start, end) for start, end, _ in bands] == [(1, 1), (2, 2), (3, 4), (5, 8), (9, 11)]
    assert [mean for *_, mean in bands] == [1, 2, 3.5, 6.5, 10]
    assert Positions(loss[:1], loss[:1], 1).bands() == [(1, 1, 1.0)]


def test_another_text_is_scored_whole(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("one<|endoftext|>two")
    (folder / "b.txt").write_text("thrée")
    found = scored(run, data=folder)[0]
    assert found["scored_tokens"] == 3 + 3 + 6 + 3  # bytes, and the end of each document
    assert found["bits_per_byte"] == pytest.approx(found["loss"] * 15 / 12 / math.log(2))
    assert found["bits_per_char"] == pytest.approx(found["loss"] * 15 / 11 / math.log(2))
    with pytest.raises(ConfigError, match="shorter than the context"):
        tinygpt.loss_by_position(run, data=folder)


def test_a_corpus_that_has_changed_is_said(
    corpus: Path, cache: Path, run: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "mine.txt"
    mine.write_text(corpus.read_text())
    folder = trained_in(tmp_path, cache, tiny(mine, "run_name=mine", "train.steps=1"))
    assert len(tinygpt.evaluate_runs(folder, cache_dir=str(cache))) == 1
    mine.write_text(corpus.read_text() + "\n<|endoftext|>\nOne more story.")
    with pytest.raises(ConfigError, match=r"not what .*mine was trained on, another data"):
        tinygpt.evaluate_runs(folder)
    mine.unlink()
    with pytest.raises(ConfigError, match=r"mine\.txt: no such file"):
        tinygpt.evaluate_runs(folder)
    assert len(tinygpt.evaluate_runs(folder, data=corpus)) == 1


def test_a_run_is_scored_when_what_it_began_from_is_gone(
    corpus: Path, cache: Path, run: Path, tmp_path: Path
) -> None:
    source = shutil.copytree(run, tmp_path / "source")
    words = ["data=custom", f"data.path={corpus}", "data.val_fraction=0.1", "run_name=fine"]
    words += ["data.test_fraction=0.1", f"init_from={source}", "train.steps=1"]
    folder = trained_in(tmp_path, cache, [*words, "hardware.threads=1", *PLAIN])
    shutil.rmtree(source)
    before = fileio.read_json(folder / "results.json")["final_val_loss"]
    made = runs.evaluate([folder, run], Options(cache_dir=str(cache)))
    assert made[0].scores["loss"] == before
    assert "hours and gain of fine exclude the cost of init_from" in shown(made)


TEXTS = [("val", None), ("test", None), ("val", "a/book.txt"), ("val", "b/book.txt"), ("val", "*")]


def test_where_it_is_written_is_known_before_anything_is_scored(tmp_path: Path) -> None:
    one, two = tmp_path / "a" / "one", Path("two")
    assert folder_for([one], None) == one / "evaluation"
    assert folder_for([one, tmp_path / "b" / "two"], None) == tmp_path / "evaluation"
    common = Path(os.path.commonpath([one.parent, Path.cwd()]))
    assert folder_for([one, two], None) == common / "evaluation"
    names = [text_name(*of) for of in TEXTS]  # what one text gave does not replace what another did
    assert names[:2] == ["", "test"]
    assert len(set(names)) == len(names)
    assert names[2].startswith("book.txt-")
    assert folder_for([one], None, names[2]) == one / "evaluation" / names[2]
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"output_dir=.*file/x: .*file is a file; give"):
        folder_for([one], str(tmp_path / "file" / "x"))


# --- smaller models


def test_int8_rounds_each_row_of_the_linear_layers(run: Path) -> None:
    model = load_run(run).model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    smaller, size = scoring.quantized(model)
    saved = 0
    for name, value in smaller.state_dict().items():
        old = before[name].numpy()
        assert torch.equal(model.state_dict()[name], before[name])
        if value.ndim == 1 or "embedding" in name:
            assert np.array_equal(value.numpy(), old)
            continue
        scale = np.abs(old).max(axis=1, keepdims=True) / 127
        assert np.allclose(value.numpy(), np.rint(old / scale) * scale, rtol=0, atol=1e-7)
        saved += 3 * old.size - 4 * len(old)
    assert size == sum(4 * value.numel() for value in model.parameters()) - saved


@pytest.mark.parametrize("amount", [0.25, 0.9])
def test_pruning_takes_the_smallest_of_all_layers_together(run: Path, amount: float) -> None:
    model = load_run(run).model
    smaller, size = scoring.pruned(model, amount)
    names = [n for n, v in model.state_dict().items() if v.ndim == 2 and "embedding" not in n]
    old = np.concatenate([model.state_dict()[name].flatten().numpy() for name in names])
    new = np.concatenate([smaller.state_dict()[name].flatten().numpy() for name in names])
    count = round(amount * len(old))
    kept = np.sort(np.argsort(np.abs(old), kind="stable")[count:])
    assert np.array_equal(np.flatnonzero(new), kept)
    assert np.array_equal(new[kept], old[kept])
    assert set(smaller.state_dict()) == set(model.state_dict())
    whole = sum(4 * value.numel() for value in model.parameters())
    assert size == pytest.approx(whole - 4 * count + len(old) / 8, abs=len(names))


def test_what_a_smaller_model_costs_stands_beside_the_whole(run: Path) -> None:
    whole, rounded, pruned = scored(run, quantize="int8", prune=0.9)
    assert [r["variant"] for r in (whole, rounded, pruned)] == ["trained", "int8", "pruned 0.9"]
    assert rounded["loss"] == pytest.approx(whole["loss"], rel=1e-3)
    assert rounded["loss"] != whole["loss"]
    assert pruned["loss"] > whole["loss"] + 1e-3
    assert whole["size_bytes"] > rounded["size_bytes"] > pruned["size_bytes"]


# --- questions


@pytest.mark.parametrize(
    ("prompt", "answer", "before", "after"),
    [
        ("The sky is", "blue", "The sky is", " blue"),
        ("The sky is", " blue", "The sky is", " blue"),
        ("The sky is ", "blue", "The sky is", " blue"),
        ("Line:\n", "blue", "Line:", "\nblue"),
        ("", "blue", "", "blue"),
    ],
)
def test_what_follows_a_prompt(prompt: str, answer: str, before: str, after: str) -> None:
    read, follows = tasks.encode_pair(Bytes(), prompt, answer)
    assert (read[0], bytes(read[1:]).decode(), bytes(follows).decode()) == (257, before, after)


def log_p(model: GPT, read: list[int], follows: list[int]) -> tuple[float, bool]:
    """Return log p of one pair, token by token, and whether each is the likeliest."""
    total, greedy = 0.0, True
    for n, token in enumerate(follows):
        context = [*read, *follows[:n]][-model.config.max_seq_len :]
        with torch.no_grad():
            row = model(torch.tensor([context]))[0, -1].double().log_softmax(0)
        total, greedy = total + float(row[token]), greedy and int(row.argmax()) == token
    return total, greedy


def test_likelihoods_are_those_of_one_token_at_a_time(run: Path) -> None:
    """The longest pair just fits: with a longer one the reference would move its window."""
    model, random = load_run(run).model, np.random.default_rng(0)
    pairs = []
    for _ in range(40):
        size = int(random.integers(2, 34))
        row = random.integers(0, 258, size).tolist()
        cut = int(random.integers(1, size))
        pairs.append((row[:cut], row[cut:]))
    best = [int(model(torch.tensor([read]))[0, -1].argmax()) for read, _ in pairs]
    pairs += [(read, [token]) for (read, _), token in zip(pairs, best, strict=True)]
    sums, greedy = tasks.likelihoods(model, pairs, CPU)
    expected = [log_p(model, *pair) for pair in pairs]
    assert np.allclose(sums, [value for value, _ in expected], rtol=1e-5)
    assert greedy.tolist() == [value for _, value in expected]
    assert 40 <= sum(greedy) < 80


def test_multiple_choice_by_the_sum_and_by_the_byte(run: Path) -> None:
    model, tokenizer = load_run(run).model, Bytes()
    items = [
        Question(f"Story {n}.", ["The cat", "x", "é", "went to the barn and"], n % 4)
        for n in range(12)
    ]
    found = tasks.score_task(model, tokenizer, Task("t", items), CPU)
    right: list[list[bool]] = [[], []]
    for item in items:
        sums = [
            log_p(model, [257, *item.prompt.encode()], list(f" {choice}".encode()))[0]
            for choice in item.choices
        ]
        by_byte = [value / len(c.encode()) for value, c in zip(sums, item.choices, strict=True)]
        for values, hits in zip((sums, by_byte), right, strict=True):
            hits.append(int(np.argmax(values)) == item.label)
    for name, hits in zip(("accuracy", "accuracy_norm"), right, strict=True):
        assert found[name] == pytest.approx(np.mean(hits))
        assert found[f"{name}_stderr"] == pytest.approx(stats.sem(hits))
    assert right[0] != right[1]
    assert (found["chance"], found["questions"], found["left_out"]) == (0.25, 12, 0)


def test_a_cloze_is_right_where_each_token_is_the_likeliest(run: Path) -> None:
    model = load_run(run).model
    prompt = "The fox"
    first = int(model(torch.tensor([[257, *prompt.encode(), 32]]))[0, -1].argmax())
    items = [Question(prompt, [f" {chr(first)}"]), Question(prompt, ["Qq"])]
    found = tasks.score_task(model, Bytes(), Task("t", items), CPU)
    pairs = [tasks.encode_pair(Bytes(), item.prompt, item.choices[0]) for item in items]
    expected = [log_p(model, *pair) for pair in pairs]
    assert found["accuracy"] == np.mean([greedy for _, greedy in expected])
    assert found["nats"] == pytest.approx(-np.mean([value for value, _ in expected]), rel=1e-5)


def test_what_is_too_long_is_cut_or_left_out_and_counted(run: Path) -> None:
    model = load_run(run).model
    items = [
        Question("The cat " * 9, ["sat"]),
        Question("The cat", ["sat " * 9]),
        Question("The cat", ["sat"]),
    ]
    found = tasks.score_task(model, Bytes(), Task("t", items), CPU)
    assert (found["questions"], found["left_out"], found["prompts_cut"]) == (2, 1, 1)
    cut = [257, *("The cat " * 9).rstrip().encode()][-(33 - 4) :]
    nats = [-log_p(model, read, list(b" sat"))[0] for read in (cut, [257, *b"The cat"])]
    assert found["nats"] == pytest.approx(np.mean(nats), rel=1e-5)
    for choices in (["sat " * 9], ["sat " * 9, "sat"]):
        nothing = tasks.score_task(model, Bytes(), Task("t", [Question("", choices)]), CPU)
        assert (nothing["questions"], nothing["accuracy"]) == (0, None)


def test_unknown_characters_of_a_question_are_counted() -> None:
    tokenizer = Char(" abc")
    model = GPT(cli.compose_config(tiny(Path("x"))).model, tokenizer.vocab_size).eval()
    task = Task("t", [Question("a?", ["b!c"])])
    assert tasks.score_task(model, tokenizer, task, CPU)["unknown_tokens"] == 2


GOOD = '{"prompt": "a", "choices": ["b", "c"], "label": 1}'


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2: Expecting property name"),
        ("[1]", "line 2: must have prompt and answer, or prompt, choices and label"),
        ('{"prompt": "a"}', "line 2: must have prompt and answer"),
        ('{"prompt": "a", "choices": ["b", "c"]}', "line 2: must have prompt and answer"),
        ('{"prompt": 1, "choices": ["b", "c"], "label": 0}', "prompt=1: must be text"),
        ('{"prompt": "a", "choices": "bc", "label": 0}', "choices='bc': must be a list of two"),
        ('{"prompt": "a", "choices": ["b"], "label": 0}', "must be a list of two or more"),
        ('{"prompt": "a", "choices": ["b", " "], "label": 0}', "choices: ' ' is not text"),
        ('{"prompt": "a", "choices": ["b", "c"], "label": 2}', "label=2: must be from 0 to 1"),
        ('{"prompt": "a", "choices": ["b", "c"], "label": true}', "label=True: must be"),
        ('{"prompt": "a", "answer": ""}', "answer: '' is not text"),
        ('{"prompt": "a", "answer": "b"}', "line 2: must have answer or choices as line 1 does"),
    ],
)
def test_a_line_that_is_no_question_is_named(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(f"{GOOD}\n{line}\n")
    with pytest.raises(ConfigError) as caught:
        read_task(path)
    assert str(caught.value).startswith(f"task={path}: line 2: ")
    assert said in str(caught.value)


def test_files_of_questions(tmp_path: Path) -> None:
    path, other = tmp_path / "a.jsonl", tmp_path / "b" / "a.jsonl"
    path.write_text(f"\ufeff{GOOD}\n\n{GOOD}")
    assert read_task(path) == Task("a", [Question("a", ["b", "c"], 1)] * 2)
    other.parent.mkdir()
    other.write_text("\n")
    with pytest.raises(ConfigError, match="has no questions"):
        read_task(other)
    shutil.copy(path, other)
    with pytest.raises(ConfigError, match="two files named a"):
        read_tasks([str(path), str(other)])
    with pytest.raises(ConfigError, match="cannot be read"):
        read_task(tmp_path / "none.jsonl")


# --- facts of the embedded corpus

GRAMMAR = Grammar(SyntheticData(name="s", n_facts=300, heldout_entities=5, max_tokens=1))


@settings(max_examples=15)
@given(st.integers(0, 1000), st.floats(0.1, 3), st.integers(1, 4))
def test_the_likeliest_answer_is_that_of_all_scored_one_by_one(
    seed: int, scale: float, at_once: int
) -> None:
    torch.manual_seed(seed)
    config = cli.compose_config(tiny(Path("x"))).model
    model = GPT(config, 258).eval()
    with torch.no_grad():
        model.token_embedding.weight *= 50 * scale  # chances that differ
    values = ["red lamp", "red lamps", "blue cup", "pea", "pear", "red cup"]
    prompts = [[257, *text.encode()] for text in ("A", "What? A", "Dan has a")]
    answers = [list(f" {value}.".encode()) for value in values]
    tree = tree_of(map(tuple, answers))
    found = likeliest(model, prompts, [tree] * len(prompts), CPU, at_once)
    for prompt, path in zip(prompts, found, strict=True):
        sums, _ = tasks.likelihoods(model, [(prompt, answer) for answer in answers], CPU)
        assert list(path) == answers[int(sums.argmax())]


class Knowing:
    """Stand for a model that knows the answers to the questions it is given, and nothing else."""

    def __init__(self, answers: dict[str, str]) -> None:
        self.answers = answers
        self.config = cli.compose_config([]).model

    def hidden(self, tokens: Tensor) -> Tensor:
        """Return at each position all tokens up to it, (B, T, T)."""
        T = tokens.shape[1]
        return tokens[:, None].expand(-1, T, -1).masked_fill(~torch.ones(T, T).tril().bool(), -1)

    def logits(self, read: Tensor) -> Tensor:
        out = torch.zeros(len(read), 258)
        for row, tokens in enumerate(read.tolist()):
            text = bytes(token for token in tokens if 0 <= token < 256).decode()
            question = max(self.answers, key=lambda q: len(q) if q in text else 0)
            known, said = self.answers[question], text.rpartition(question)[2]
            if question in text and known.startswith(said) and known != said:
                out[row, known.encode()[len(said)]] = 20.0
        return out


def test_accuracy_by_the_rank_of_a_fact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "ASKED", 16)
    head = tasks.bands(GRAMMAR)["head"]
    known = {q: f"{a}." for e, r in head for q, a in GRAMMAR.queries(e, r)}
    found = tasks.score_facts(Knowing(known), Bytes(), GRAMMAR, CPU)  # type: ignore[arg-type]
    assert (found["head"], found["head_asked"], found["head_stderr"]) == (1.0, 16, 0.0)
    assert found["middle"] < 0.05
    assert found["heldout"] < 0.3
    assert found["heldout_asked"] == 5
    assert found["chance"] == 1 / 1024
    assert "tail" not in found  # 300 facts have none


def test_bands_hold_facts_of_their_ranks() -> None:
    bands = tasks.bands(GRAMMAR)
    ranks = {
        name: [4 * GRAMMAR.entities.index(e) + list(e.attributes).index(r) for e, r in pairs]
        for name, pairs in bands.items()
        if name != "heldout"
    }
    assert (ranks["head"][0], ranks["head"][-1]) == (0, 99)
    assert (ranks["middle"][0], ranks["middle"][-1]) == (100, 299)
    assert all(sorted(set(found)) == found for found in ranks.values())
    assert [entity for entity, _ in bands["heldout"]] == GRAMMAR.heldout


# --- text of the model

texts = st.lists(st.lists(st.integers(0, 5), max_size=30).map(np.array), min_size=1, max_size=4)


@settings(max_examples=100)
@given(texts, texts)
def test_qualities_of_text_are_those_of_a_direct_computation(
    written: list[Any], real: list[Any]
) -> None:
    rows, others = ([list(map(int, text)) for text in some] for some in (written, real))
    ours, theirs = ([np.array(row, dtype=np.int64) for row in some] for some in (rows, others))
    found = tasks.qualities(ours, theirs, vocab_size=6)

    def grams(some: list[list[int]], n: int) -> list[tuple[int, ...]]:
        return [tuple(row[i : i + n]) for row in some for i in range(len(row) - n + 1)]

    for n in (1, 2, 3):
        of_n = grams(rows, n)
        assert found[f"distinct_{n}"] == (len(set(of_n)) / len(of_n) if of_n else None)
    seen = [grams([row], 4) for row in rows]
    again = sum(gram in part[:i] for part in seen for i, gram in enumerate(part))
    total = sum(map(len, seen))
    assert found["repetition"] == (pytest.approx(again / total) if total else None)
    counts, pairs = (collections.Counter(grams(others, n)) for n in (1, 2))
    q = np.array([counts[v,] + 1 for v in range(6)]) / (counts.total() + 6)
    grid = list(itertools.product(range(6), repeat=2))
    q2 = [(pairs[a, b] + 6 * q[a] * q[b]) / (pairs.total() + 6) for a, b in grid]
    for n, name, expected in ((1, "kl_unigram", q), (2, "kl_bigram", q2)):
        mine = collections.Counter(grams(rows, n))
        p = [mine[gram] for gram in itertools.product(range(6), repeat=n)]
        divergence = pytest.approx(stats.entropy(p, expected), abs=1e-12) if mine else None
        assert found[name] == divergence


def test_real_text_beside_the_samples_is_as_much_and_not_in_the_reference() -> None:
    documents = [np.arange(10) + 100 * n for n in range(5)]
    taken, rest = tasks.held_out(documents, 19, 8)
    assert [len(part) for part in taken] == [8, 8, 3]
    assert [part[0] for part in rest] == [300, 400]


def test_samples_are_the_same_again_and_compared(run: Path) -> None:
    first, again, other = (scored(run, samples=4, seed=seed)[0] for seed in (0, 0, 1))
    assert first == again
    assert first["samples_distinct_1"] != other["samples_distinct_1"]
    assert first["samples_tokens"] <= 4 * 32
    assert first["samples_kl_unigram"] > first["samples_kl_unigram_real"]  # hardly trained
    with pytest.raises(ConfigError, match=r"samples=100: val has \d+ documents to compare with"):
        tinygpt.evaluate_runs(run, samples=100)


# --- the machine, budgets, names


def test_the_machine_is_as_in_training_and_given_back(run: Path) -> None:
    trained: TrainedRun = load_run(run)
    torch.set_num_threads(2)
    with as_in_training(rundir.RunDir(run), trained.config, Options()) as machine:
        assert torch.get_num_threads() == 1
        assert (machine.resolved.precision, machine.dtype) == ("32", torch.float32)
    assert torch.get_num_threads() == 2
    with as_in_training(rundir.RunDir(run), trained.config, Options(precision="64")) as machine:
        assert machine.dtype == torch.float64
    half = scored(run, precision="bf16-mixed")[0]["loss"]
    single = scored(run)[0]["loss"]
    assert half != single
    assert half == pytest.approx(single, rel=1e-2)


def test_a_precision_that_the_device_has_not(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "copy")
    begun = fileio.read_json(copy / "environment.json")
    fileio.write_json(copy / "environment.json", {**begun, "precision_resolved": "16-mixed"})
    with pytest.raises(ConfigError, match=r"^precision=16-mixed: on cpu one of .* was trained$"):
        tinygpt.evaluate_runs(copy, device="cpu")
    assert scored(copy, precision="32", device="cpu")[0]["precision"] == "32"


def test_convergence_is_at_the_first_evaluation_within_one_percent_of_the_last() -> None:
    losses = [3.0, 2.0, 1.009, 1.05, 1.0]
    curve = [{"step": 10.0 * n, "tokens": 80.0 * n, "val_loss": x} for n, x in enumerate(losses)]
    curve.insert(1, {"step": 5.0, "tokens": 40.0})
    assert runs.convergence(curve) == {"steps_to_1_percent": 20, "tokens_to_1_percent": 160}
    assert set(runs.convergence([]).values()) == {None}


def test_hours_are_those_up_to_the_checkpoint(run: Path) -> None:
    curve = [{"step": 0.0, "seconds": 0.0}, {"step": 8.0, "seconds": 7200.0}]
    trained = load_run(run, "step_4")
    found = runs.budget(trained, 1.0, curve)
    assert found["hours"] == 1.0
    assert found["gain_per_hour"] == pytest.approx(math.log(258) - 1)
    assert runs.budget(trained, 1.0, [])["hours"] is None


def test_names_are_the_shortest_that_tell_runs_apart() -> None:
    paths = [Path(name) for name in ("/o/a/seed-1", "/o/a/seed-2", "/o/b/seed-1")]
    assert names_of(paths[:1]) == ["seed-1"]
    assert names_of(paths[:2]) == ["seed-1", "seed-2"]
    assert names_of(paths) == ["a/seed-1", "a/seed-2", "b/seed-1"]


def test_what_cannot_be_evaluated_is_said_before_anything_is(run: Path, tmp_path: Path) -> None:
    def said(*folders: Path, **options: Any) -> str:
        with pytest.raises(ConfigError) as caught:
            tinygpt.evaluate_runs(*folders, **options)
        return str(caught.value)

    assert said(run, checkpoints=["step_5"]).startswith("checkpoints=step_5: ")
    assert said(run, checkpoints=["all", "best"]).startswith("checkpoints=all,best: ")
    assert said(run, stride=33) == f"stride=33: must be at most the context, 32 of {run}"
    assert said(run, splt="test").startswith("splt: no such key; did you mean split")
    assert said(run, prune=1.0).startswith("prune=1.0: must be")
    assert said(tmp_path / "none").endswith("none: no such folder")
    assert said(tmp_path).endswith("no runs in there")
    begun = tmp_path / "begun"
    fileio.write_json(begun / "environment.json", {})
    assert said(tmp_path).endswith("none of them has a checkpoint")
    assert said(run, begun) == f"runs={begun}: has no checkpoint"


# --- the command


@pytest.fixture(scope="module")
def wide(corpus: Path, cache: Path, outputs: Path, run: Path) -> Path:
    """Train a run twice as wide as ``run``, with another seed."""
    more = ("run_name=x.wide", "model.d_model=32", "seed=7")
    return trained_in(outputs, cache, tiny(corpus, *more))


def test_one_run_with_all_that_can_be_asked(
    run: Path, tinygpt: Command, text: Path, tmp_path: Path
) -> None:
    (tmp_path / "q[red].jsonl").write_text(GOOD + "\n")
    words = ["baseline=true", "quantize=int8", "prune=0.5", "samples=3", "task=q[red].jsonl"]
    done = tinygpt("evaluate", f"runs={run}", *words, "output_dir=here")
    assert (done.returncode, done.stderr) == (0, "")
    shown, files = done.stdout.rsplit("\n\n", 1)
    assert max(map(len, shown.splitlines())) <= 80
    assert "\x1b" not in done.stdout
    assert "q[red]" in done.stdout
    folder = tmp_path / "here"
    names = {"evaluation_results.csv", "evaluation_results.json", "loss_by_position.png"}
    assert {path.name for path in folder.iterdir()} == {*names, "convergence.png"}
    assert all(name in files for name in names)
    table = pd.read_csv(folder / "evaluation_results.csv")
    assert list(table["variant"]) == ["untrained", "trained", "int8", "pruned 0.5"]
    found = json.loads(
        (folder / "evaluation_results.json").read_text(),
        parse_constant=lambda word: pytest.fail(f"{word} is not JSON"),
    )
    results = fileio.read_json(run / "results.json")
    whole = found["results"][1]
    assert whole["loss"] == results["final_val_loss"]
    assert f"{whole['loss']:.4f}" in done.stdout
    assert whole["q[red]_questions"] == 1
    assert whole["q[red]_accuracy_stderr"] is None  # of one question
    assert len(whole["by_position"]["loss"]) == 32
    assert found["results"][0]["by_position"] is None


def test_a_run_that_cannot_be_scored_is_named_and_the_others_are_scored(
    run: Path, wide: Path, tinygpt: Command, tmp_path: Path
) -> None:
    shutil.copytree(wide, tmp_path / "torn")
    (tmp_path / "torn" / "checkpoints" / "final.ckpt").write_bytes(b"half")
    done = tinygpt("evaluate", f"runs={run},torn", "stride=8", "output_dir=here")
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1
    assert line.startswith("error: 1 of 2 runs not scored: torn/checkpoints/final.ckpt: ")
    found = fileio.read_json(tmp_path / "here" / "evaluation_results.json")
    assert [one["run"] for one in found["results"]] == [run.name]
    assert found["not_scored"] == [line.partition("scored: ")[2]]
    alone = tinygpt("evaluate", "runs=torn")
    assert (alone.returncode, alone.stdout) == (2, "loading …\n")


def test_runs_side_by_side(
    run: Path, wide: Path, synthetic: Path, outputs: Path, tinygpt: Command, corpus: Path
) -> None:
    another = ["data=custom", f"data.path={corpus}"]
    done = tinygpt("evaluate", f"runs={run},{wide},{synthetic}", *another)
    assert (done.returncode, done.stderr) == (0, "")
    shown, _ = done.stdout.rsplit("\n\n", 1)
    assert max(map(len, shown.splitlines())) <= 80
    text = " ".join(done.stdout.split())
    assert "seed 42 7 42" in text
    assert "data.n_facts – – 8" in text
    assert "facts of the corpus stories" in text  # only of the run on the embedded corpus
    assert "note: compare losses on the same tokens" in text
    (folder,) = (outputs / "runs" / "evaluation").iterdir()
    assert folder.name.startswith(f"{corpus.name}-")
    assert (folder / "comparison.png").exists()
    table = pd.read_csv(folder / "evaluation_results.csv")
    assert list(table["run"]) == ["one", "x.wide", "stories"]
    assert list(table["text_fingerprint"].duplicated()) == [False, True, False]
    assert list(table["model_parameters"]) == [
        fileio.read_json(path / "results.json")["model_parameters"]
        for path in (run, wide, synthetic)
    ]


def test_what_is_not_the_same_of_all_is_said_of_each(run: Path, wide: Path) -> None:
    one, other = runs.evaluate([run, wide], Options())
    odd = {**other.scores, "precision": "64", "unknown_tokens": 4}
    shorter = Positions(np.arange(24.0), np.zeros(24), windows=1)
    one = dataclasses.replace(one, asked={"facts": {"head": 0.5}})
    other = dataclasses.replace(
        other, scores=odd, positions=shorter, asked={"facts": {"head": 0.5, "tail": 0.25}}
    )
    text = shown([one, other])
    assert "cpu, precision 32, 64" in text
    assert "4 characters are unknown to the tokenizer of x.wide" in text
    assert "tail: beyond 25.0 %" in text
    assert "17 to 24 19.5000 17 to 32" in text


def test_compare_says_in_what_runs_differ(run: Path, wide: Path) -> None:
    table = tinygpt.compare(run, wide)
    assert list(table.index) == ["one", "x.wide"]
    results = [fileio.read_json(path / "results.json") for path in (run, wide)]
    for name in ("final_val_loss", "train_tokens", "flops_exact"):
        assert list(table[name]) == [found[name] for found in results]
    settings = list(table.columns)[list(table.columns).index("test_loss") + 1 :]
    assert set(settings) == {"seed", "d_model", "d_ff", "learning_rate", "train.keep_every"}


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["runs=."], "runs=.: no runs in there"),
        ([], "runs: must be given, as runs=outputs/runs/x"),
        (["runs=.", "data=cutom"], "data=cutom: must be custom"),
        (["runs=.", "data=custom"], "data.path: must be given"),
        (["runs=.", "task=absent.jsonl"], "task=absent.jsonl: cannot be read"),
        (["runs=.", "quantize=int4"], "quantize=int4: must be one of int8"),
        (["runs=.", "data.separator=none"], "data.separator=none: needs data.path="),
        (["runs=.", "data.path=x", "data.separator="], "data.separator='': must be auto, none or"),
    ],
)
def test_a_mistake_is_one_line(
    tinygpt: Command, tmp_path: Path, words: list[str], line: str
) -> None:
    done = tinygpt("evaluate", *words)
    assert done.stderr.startswith(f"error: {line}")
    assert done.stderr.count("\n") == 1
    assert (done.returncode, done.stdout) == (2, "")
    assert list(tmp_path.iterdir()) == []
