"""Train in this process: compare with a plain loop, check the run folder and every ending."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import logging
import math
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F

from tests.conftest import OPTIMIZERS, Command, tiny
from tests.grammar import entropy
from tinygpt import cli
from tinygpt.config import Config, ConfigError, ModelConfig, SyntheticData
from tinygpt.config.counting import count_parameters, flops_per_token
from tinygpt.config.horizon import derive
from tinygpt.data.synthetic import Grammar
from tinygpt.data.tokenizers import load_tokenizer
from tinygpt.model.gpt import GPT
from tinygpt.runs import rundir
from tinygpt.training.callbacks import Journal
from tinygpt.training.console import print_summary, short
from tinygpt.training.optim import rate_factor
from tinygpt.training.session import train
from tinygpt.training.trainer import AtomicCheckpoints

FILES = {
    "config.yaml",
    "environment.json",
    "metrics.csv",
    "results.json",
    "run.log",
    "samples.txt",
    "tokenizer.json",
    "checkpoints",
}
SCORES = ("loss", "perplexity", "accuracy", "bits_per_byte", "bits_per_char")
RESULTS = {  # design.md, section 4
    *["schema_version", "study", "run_name", "config_hash", "git_commit", "seed", "status"],
    *(f"final_val_{name}" for name in SCORES),
    *(f"test_{name}" for name in SCORES),
    *["best_val_loss", "best_val_step", "final_train_loss", "irreducible_loss_exact"],
    *["final_val_loss_standard_error", "test_loss_standard_error", "val_tokens", "val_documents"],
    *["corpus_tokens", "corpus_documents", "corpus_bytes", "test_tokens", "test_documents"],
    *["model_parameters", "parameters_non_embedding", "parameters_embedding"],
    *["total_steps", "train_tokens", "unique_train_tokens", "flops_6nd", "flops_exact"],
    *["schedule_finished", "d_model", "d_ff", "n_layers", "n_heads", "max_seq_len", "vocab_size"],
    *["tokenizer", "dataset", "data_fraction", "batch_tokens", "learning_rate", "weight_decay"],
    *["warmup_steps", "optimizer", "schedule", "precision_resolved", "threads", "devices"],
    *["tokenizer_fingerprint", "data_fingerprint", "validation_fingerprint"],
    *["tokens_per_second", "seconds_training", "peak_memory_bytes", "mfu"],
}


class Trained:
    """A run and what it left; ``go()`` gives the same command once more."""

    def __init__(self, folder: Path, cache: Path, words: list[str]) -> None:
        self.words = ["logger=csv", "study=s", "run_name=r", *words]
        self.words += [f"output_dir={folder}", f"cache_dir={cache}"]
        self.path = folder / "s" / "r"
        self.said = ""
        self.results: dict[str, Any] = {}

    def go(self, *more: str) -> Trained:
        words, out = [*self.words, *more], io.StringIO()
        try:
            self.results = train(cli.compose_config(words), words, Console(file=out, width=200))
        finally:
            self.said = out.getvalue()
        return self

    def rows(self) -> list[dict[str, str]]:
        with (self.path / "metrics.csv").open() as file:
            return list(csv.DictReader(file))

    def checkpoint(self, name: str = "final") -> dict[str, Any]:
        path = self.path / "checkpoints" / f"{name}.ckpt"
        loaded: dict[str, Any] = torch.load(path, weights_only=True)
        return loaded

    def weights(self, name: str = "final") -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.checkpoint(name)["state_dict"]
        return state

    def steps(self, column: str) -> list[int]:
        """Where this column of metrics.csv has a value."""
        return [int(row["step"]) for row in self.rows() if row[column]]


def run(folder: Path, cache: Path, corpus: Path, *more: str) -> Trained:
    return Trained(folder, cache, tiny(corpus, *more)).go()


def until(horizon: str, corpus: Path, *more: str) -> list[str]:
    """The arguments of ``tiny`` with another horizon than its steps."""
    return [horizon, *(word for word in tiny(corpus, *more) if "train.steps" not in word)]


def same_weights(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, corpus: Path, cache: Path) -> Trained:
    """A run with everything on; tests only look at it."""
    torch.set_num_threads(1)
    return run(
        tmp_path_factory.mktemp("finished"),
        cache,
        corpus,
        "logger=[csv,tensorboard]",
        "train.steps=20",
        "train.log_every=3",
        "train.eval_every=1280",  # 5 steps
        "train.checkpoint_every=1024",  # 4 steps
        "train.keep_every=2048",  # 8 steps
        "hardware.micro_batch_size=4",
    )


# The run folder


def test_every_file_is_there(finished: Trained) -> None:
    names = {path.name for path in finished.path.iterdir() if not path.name.startswith(".")}
    events = {name for name in names if name.startswith("events.out.tfevents.")}
    assert len(events) == 1
    assert names == FILES | events
    kept = {path.name for path in (finished.path / "checkpoints").iterdir()}
    assert kept == {"last.ckpt", "best.ckpt", "final.ckpt", "step_8.ckpt", "step_16.ckpt"}
    assert not list(finished.path.rglob("*.tmp"))


def test_results_are_whole(finished: Trained) -> None:
    text = (finished.path / "results.json").read_text()
    found = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in results.json"))
    assert found == finished.results
    assert found.keys() >= RESULTS
    assert all(not isinstance(v, dict | list) for v in found.values())
    empty = {name for name in RESULTS if found[name] is None} - {"git_commit"}
    assert empty == {"irreducible_loss_exact", "mfu"}  # no such floor, no peak known of a CPU


def test_results_say_what_was_run(finished: Trained) -> None:
    r = finished.results
    sizes = count_parameters(ModelConfig(n_layers=1, d_model=16, n_heads=2, max_seq_len=32), 258)
    expected = {
        "study": "s",
        "run_name": "r",
        "seed": 42,
        "status": "finished",
        "schedule_finished": True,
        "total_steps": 20,
        "train_tokens": 20 * 256,
        "unique_train_tokens": 20 * 256,
        "batch_tokens": 256,
        "model_parameters": sizes.total,
        "parameters_non_embedding": sizes.non_embedding,
        "parameters_embedding": sizes.embedding,
        "flops_6nd": 6 * sizes.total * 20 * 256,
        "d_model": 16,
        "d_ff": 64,
        "n_layers": 1,
        "n_heads": 2,
        "max_seq_len": 32,
        "vocab_size": 258,
        "tokenizer": "byte",
        "dataset": "custom",
        "data_fraction": 1.0,
        "learning_rate": 3e-3,
        "weight_decay": 0.1,
        "warmup_steps": 1,
        "optimizer": "adamw",
        "schedule": "cosine",
        "precision_resolved": "32",
        "threads": 1,
    }
    assert {name: r[name] for name in expected} == expected
    assert r["final_val_perplexity"] == pytest.approx(math.exp(r["final_val_loss"]))
    assert r["best_val_loss"] <= r["final_val_loss"] < r["initial_val_loss"]
    assert r["final_val_bits_per_byte"] == r["final_val_bits_per_char"]  # the text is ASCII
    assert r["initial_val_loss"] == pytest.approx(math.log(258), abs=0.1)


def test_metrics_are_against_tokens(finished: Trained) -> None:
    rows = finished.rows()
    assert list(rows[0]) == list(rundir.METRICS)
    steps = [int(row["step"]) for row in rows]
    assert steps == sorted({0, *range(3, 21, 3), *range(5, 21, 5)})
    assert [int(row["tokens"]) for row in rows] == [256 * step for step in steps]
    assert finished.steps("val_loss") == [0, 5, 10, 15, 20]
    assert finished.steps("train_loss") == steps[1:]
    assert float(rows[-1]["val_loss"]) == finished.results["final_val_loss"]
    assert float(rows[-1]["train_loss"]) == finished.results["final_train_loss"]
    best = min((float(row["val_loss"]), int(row["step"])) for row in rows[1:] if row["val_loss"])
    assert best == (finished.results["best_val_loss"], finished.results["best_val_step"])
    seconds = [float(row["seconds"]) for row in rows]
    assert seconds == sorted(seconds)


def test_config_and_environment_are_what_was_resolved(finished: Trained) -> None:
    config = OmegaConf.load(finished.path / "config.yaml")
    assert config.model.d_model == 16
    assert config.train.steps == 20
    assert config.train.tokens is None
    assert config.tokenizer.kind == "byte"
    environment = json.loads((finished.path / "environment.json").read_text())
    assert environment["config_hash"] == finished.results["config_hash"]
    assert environment["threads"] == 1
    assert environment["precision_resolved"] == "32"
    assert environment["packages"]["torch"] == torch.__version__
    tokenizer = load_tokenizer(finished.path / "tokenizer.json")
    assert tokenizer.fingerprint() == finished.results["tokenizer_fingerprint"]


def test_samples_are_of_before_during_and_after(finished: Trained) -> None:
    text = (finished.path / "samples.txt").read_text()
    heads = [line for line in text.splitlines() if line.startswith("--- step")]
    assert heads == [
        "--- step 0 (0 tokens)",
        "--- step 10 (2,560 tokens)",
        "--- step 20 (5,120 tokens)",
    ]


def test_checkpoints_are_of_the_steps_they_name(finished: Trained) -> None:
    at = {name: finished.checkpoint(name)["global_step"] for name in ("last", "final", "best")}
    assert at == {"last": 20, "final": 20, "best": finished.results["best_val_step"]}
    assert finished.checkpoint("step_8")["global_step"] == 8
    assert finished.checkpoint("step_16")["global_step"] == 16
    assert same_weights(finished.weights("last"), finished.weights("final"))
    assert not same_weights(finished.weights("step_8"), finished.weights("final"))


def fresh(trained: Trained, name: str = "final") -> GPT:
    """The checkpoint in a model built anew, strictly."""
    config = cli.compose_config(trained.words)
    model = GPT(config.model, trained.results["vocab_size"]).eval()
    state = trained.weights(name)
    assert all(key.startswith("model.") for key in state)
    model.load_state_dict({key.removeprefix("model."): value for key, value in state.items()})
    return model


def split_tokens(trained: Trained, cache: Path, split: str) -> list[int]:
    """The tokens of a split, read from the cache without the code under test."""
    wanted = [trained.results[f"{name}_fingerprint"] for name in ("data", "validation")]
    for path in (cache / "data").glob("*/index.json"):
        index = json.loads(path.read_text())
        splits = [index["splits"].get(name) or {} for name in ("train", "val")]
        if [info.get("fingerprint") for info in splits] == wanted:
            file = path.parent / index["splits"][split]["files"][0]["file"]
            return [int(token) for token in np.fromfile(file, dtype=index["dtype"])]
    raise AssertionError("not in the cache")


@torch.no_grad()
def direct_loss(model: GPT, tokens: list[int], length: int) -> float:
    """Every token behind the first once, in windows cut from the front."""
    losses = []
    for start in range(0, len(tokens) - 1, length):
        window = torch.tensor(tokens[start : start + length + 1])
        logits = model(window[None, :-1])[0].double()
        losses += F.cross_entropy(logits, window[1:], reduction="none").tolist()
    assert len(losses) == len(tokens) - 1
    return math.fsum(losses) / len(losses)


@pytest.mark.parametrize(
    ("split", "key", "checkpoint"),
    [
        ("val", "final_val_loss", "final"),
        ("test", "test_loss", "final"),
        ("val", "best_val_loss", "best"),
    ],
)
def test_a_reported_loss_is_that_of_its_checkpoint(
    finished: Trained, cache: Path, split: str, key: str, checkpoint: str
) -> None:
    loss = direct_loss(fresh(finished, checkpoint), split_tokens(finished, cache, split), 32)
    assert finished.results[key] == pytest.approx(loss, rel=1e-6)


def test_between_first_and_last_a_part_of_validation_is_scored(
    tmp_path: Path, corpus: Path, cache: Path
) -> None:
    """The part that its share of the time allows, the same windows each time; no weight and no
    final score depends on it, and nor does it on the passes that a batch is cut into."""
    words = ["train.eval_every=768", "train.keep_every=768", "train.eval_share=0.5"]
    part = run(tmp_path / "part", cache, corpus, *words)
    whole = run(tmp_path / "whole", cache, corpus, *words, "train.eval_share=null")
    tokens = split_tokens(part, cache, "val")
    # three evaluations between, of a third of a step's cost a token; 12 steps of 256 tokens
    every = math.ceil(3 * len(tokens) / (3 * 0.5 * 12 * 256))
    assert part.results["val_every"] == every > 1
    assert whole.results["val_every"] == 1
    found, full = ([float(r["val_loss"]) for r in t.rows() if r["val_loss"]] for t in (part, whole))
    assert [found[0], found[-1]] == [full[0], full[-1]]
    for step, loss in zip((3, 6, 9), found[1:-1], strict=True):
        model = fresh(part, f"step_{step}")
        windows = [tokens[i : i + 33] for i in range(0, len(tokens) - 1, 32)][::every]
        losses = [direct_loss(model, window, 32) for window in windows]
        lengths = [len(window) - 1 for window in windows]
        assert loss == pytest.approx(np.average(losses, weights=lengths), rel=1e-6)
    assert same_weights(part.weights(), whole.weights())
    for key in ("final_val_loss", "final_val_accuracy", "test_loss", "initial_val_loss"):
        assert part.results[key] == whole.results[key]
    small = run(tmp_path / "small", cache, corpus, *words, "hardware.micro_batch_size=2")
    again = [float(row["val_loss"]) for row in small.rows() if row["val_loss"]]
    assert again == pytest.approx(found, rel=1e-5)
    assert "already finished" in part.go("train.eval_share=null").said  # it changes no weight


def test_a_run_that_stops_early_ends_with_the_score_of_all(
    tmp_path: Path, corpus: Path, cache: Path
) -> None:
    words = ["train.steps=200", "train.eval_every=256", "optim.learning_rate=1e-9"]
    words += ["train.early_stopping_patience=2", "train.eval_share=0.1", "schedule=constant"]
    stopped = run(tmp_path, cache, corpus, *words)
    assert stopped.results["status"] == "stopped_early"
    assert stopped.results["val_every"] > 1
    loss = direct_loss(fresh(stopped), split_tokens(stopped, cache, "val"), 32)
    assert stopped.results["final_val_loss"] == pytest.approx(loss, rel=1e-6)


# Against a loop of our own


def plain_loop(config: Config, tokens: list[int], vocab_size: int) -> tuple[list[float], GPT]:
    """The same training, written out: losses of the steps and the model at the end."""
    length, steps = config.model.max_seq_len, config.train.steps
    assert steps is not None
    size = config.train.batch_tokens // length
    starts = np.arange(0, len(tokens) - length, length)
    epochs = -(-steps * size // len(starts))
    rngs = [np.random.default_rng([config.seed, epoch]) for epoch in range(epochs)]
    order = np.concatenate([rng.permutation(starts) for rng in rngs])
    torch.manual_seed(config.seed)
    model = GPT(config.model, vocab_size).double()
    decayed = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95), eps=1e-8)
    warmup, losses = 3, []
    for step in range(steps):
        place = order[step * size : (step + 1) * size]
        windows = torch.tensor([tokens[start : start + length + 1] for start in place])
        logits = model(windows[:, :-1])
        loss = F.cross_entropy(logits.reshape(-1, vocab_size), windows[:, 1:].reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norm = math.sqrt(sum(float((g**2).sum()) for g in gradients))
        for gradient in gradients:
            gradient *= min(1.0, 0.3 / (norm + 1e-6))
        done = (step + 1 - warmup) / (steps - warmup)
        cosine = 0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * ((step + 1) / warmup if step < warmup else cosine)
        optimizer.step()
        losses.append(loss.item())
    return losses, model


def test_training_is_a_plain_loop(tmp_path: Path, corpus: Path, cache: Path) -> None:
    """Loss by loss and weight by weight, over more than one epoch, with clipping and decay."""
    trained = run(
        tmp_path,
        cache,
        corpus,
        "data.fraction=0.15",
        "train.precision=64",
        "train.steps=60",
        "train.log_every=1",
        "train.grad_clip_norm=0.3",
        "schedule.warmup_steps=3",
        "hardware.micro_batch_size=2",
        "model.position=rope",
        "model.norm=rmsnorm",
    )
    r = trained.results
    tokens = split_tokens(trained, cache, "train")
    ends = [place for place, token in enumerate(tokens) if token == 257]
    tokens = tokens[: ends[round(0.15 * (len(ends) - 1))] + 1]
    assert len(tokens) < 60 * 256  # more than an epoch
    losses, model = plain_loop(cli.compose_config(trained.words), tokens, r["vocab_size"])
    rows = trained.rows()[1:]
    assert [float(row["train_loss"]) for row in rows] == pytest.approx(losses, rel=1e-9)
    assert losses[-1] < losses[0] - 1
    assert max(float(row["grad_norm"]) for row in rows) > 0.3  # clipped, and the norm is before
    state = trained.weights()
    for name, value in model.state_dict().items():
        assert state[f"model.{name}"].dtype == torch.float64
        torch.testing.assert_close(state[f"model.{name}"], value, rtol=1e-9, atol=1e-9)
    val = direct_loss(model.eval(), split_tokens(trained, cache, "val"), 32)
    assert r["final_val_loss"] == pytest.approx(val, rel=1e-6)


@pytest.mark.parametrize(
    ("precision", "tolerance"),
    [("64", 1e-9), ("32", 1e-4)],
)
def test_the_micro_batch_is_no_part_of_the_experiment(
    tmp_path: Path, corpus: Path, cache: Path, precision: str, tolerance: float
) -> None:
    """Nor of what dropout drops."""
    words = [f"train.precision={precision}", "train.batch_tokens=1024", "train.log_every=1"]
    words += ["train.steps=15", "model.dropout=0.2"]
    few = run(tmp_path / "4", cache, corpus, *words, "hardware.micro_batch_size=4")
    many = run(tmp_path / "32", cache, corpus, *words, "hardware.micro_batch_size=32")
    assert few.results["config_hash"] == many.results["config_hash"]
    for column in ("train_loss", "grad_norm", "learning_rate"):
        one, other = ([float(r[column]) for r in t.rows()[1:]] for t in (few, many))
        assert one == pytest.approx(other, rel=tolerance)
    for key in ("final_val_loss", "test_loss", "final_train_loss"):
        assert few.results[key] == pytest.approx(many.results[key], rel=tolerance)


def test_logging_and_evaluating_change_nothing_that_is_learned(
    tmp_path: Path, corpus: Path, cache: Path
) -> None:
    words = ["model.dropout=0.2", "train.steps=10"]
    often = run(
        tmp_path / "often",
        cache,
        corpus,
        *words,
        *("train.log_every=1", "train.eval_every=256", "train.sample_tokens=40"),
    )
    rarely = run(tmp_path / "rarely", cache, corpus, *words, "train.sample_tokens=0")
    assert same_weights(often.weights(), rarely.weights())
    assert often.results["final_val_loss"] == rarely.results["final_val_loss"]
    assert not (rarely.path / "samples.txt").exists()


def test_a_seed_gives_the_same_bits_and_another_seed_others(
    tmp_path: Path, corpus: Path, cache: Path
) -> None:
    words = ["model.dropout=0.1", "train.steps=4"]
    first = run(tmp_path / "a", cache, corpus, *words)
    torch.rand(7)  # whatever happened in this process before
    again = run(tmp_path / "b", cache, corpus, *words)
    other = run(tmp_path / "c", cache, corpus, *words, "seed=43")
    assert same_weights(first.weights(), again.weights())
    assert first.results["final_val_loss"] == again.results["final_val_loss"]
    assert not same_weights(first.weights(), other.weights())
    assert first.results["config_hash"] != other.results["config_hash"]
    assert first.results["validation_fingerprint"] == other.results["validation_fingerprint"]


@pytest.mark.parametrize("optim", OPTIMIZERS)
@pytest.mark.parametrize("schedule", ["cosine", "wsd", "linear", "constant"])
def test_every_optimizer_steps_by_every_schedule(
    tmp_path: Path, corpus: Path, cache: Path, optim: str, schedule: str
) -> None:
    trained = run(
        tmp_path,
        cache,
        corpus,
        f"optim={optim}",
        f"schedule={schedule}",
        *("schedule.warmup_steps=2", "train.steps=5", "train.log_every=1"),
        *("train.sample_tokens=0", "data.eval_tokens=500", "train.keep_every=1024"),
    )
    config = cli.compose_config(trained.words)
    rates = [float(row["learning_rate"]) for row in trained.rows()[1:]]
    expected = [rate_factor(n, config.schedule, total_steps=5, warmup_steps=2) for n in range(5)]
    assert rates == pytest.approx([config.optim.learning_rate * x for x in expected])
    used = trained.checkpoint("step_4")["optimizer_states"][0]["param_groups"]
    for group in used:  # muon's rates are two
        assert group["lr"] == pytest.approx(group["initial_lr"] * expected[4])  # the next one
    assert trained.results["final_val_loss"] < trained.results["initial_val_loss"]
    assert (trained.results["optimizer"], trained.results["schedule"]) == (optim, schedule)


@pytest.mark.parametrize(
    ("precision", "dtype"), [("64", torch.float64), ("bf16-mixed", torch.float32)]
)
def test_precisions_run_and_are_recorded(
    tmp_path: Path, corpus: Path, cache: Path, precision: str, dtype: torch.dtype
) -> None:
    trained = run(tmp_path, cache, corpus, f"train.precision={precision}", "train.steps=6")
    assert trained.results["precision_resolved"] == precision
    assert {v.dtype for v in trained.weights().values()} == {dtype}
    exact = run(tmp_path / "32", cache, corpus, "train.steps=6")
    difference = abs(trained.results["final_train_loss"] - exact.results["final_train_loss"])
    assert 0 < difference < 0.02


def test_fp16_is_refused_on_the_cpu_before_there_is_a_folder(
    tmp_path: Path, corpus: Path, cache: Path
) -> None:
    with pytest.raises(ConfigError, match="precision=16-mixed: on cpu one of auto, 32, 64"):
        run(tmp_path, cache, corpus, "train.precision=16-mixed")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("threads", [1, 2])
def test_the_threads_are_set_and_recorded(
    tmp_path: Path, corpus: Path, cache: Path, threads: int
) -> None:
    trained = run(tmp_path, cache, corpus, f"hardware.threads={threads}", "train.steps=1")
    assert torch.get_num_threads() == threads
    assert trained.results["threads"] == threads


# Finished, failed, ended early


def test_a_finished_run_is_reported_and_not_trained_again(
    tmp_path: Path, corpus: Path, cache: Path
) -> None:
    trained = run(tmp_path, cache, corpus)
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in tmp_path.rglob("*") if p.is_file()}
    results = trained.results
    assert trained.go().results == results
    assert "already finished" in trained.said
    assert f"{results['final_val_loss']:.4f}" in trained.said
    # neither what does not change the result nor the order of words makes it another run
    trained.words.append("hardware.micro_batch_size=2")
    assert trained.go().results == results
    after = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in tmp_path.rglob("*") if p.is_file()}
    assert after == before


def test_force_trains_anew(tmp_path: Path, corpus: Path, cache: Path) -> None:
    trained = run(tmp_path, cache, corpus, "train.eval_every=1024")
    first, rows = trained.results, len(trained.rows())
    made = (trained.path / "results.json").stat().st_mtime_ns
    assert trained.go("force=true").results["final_val_loss"] == first["final_val_loss"]
    assert (trained.path / "results.json").stat().st_mtime_ns > made
    assert len(trained.rows()) == rows  # not appended to the old ones
    assert "val" in (trained.path / "run.log").read_text()
    assert "already" not in trained.said


def test_only_force_replaces_a_run_of_another_configuration(
    tmp_path: Path, corpus: Path, cache: Path
) -> None:
    trained = run(tmp_path, cache, corpus)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    differs = "holds a run of another configuration; it has seed=42, not 1; choose another run_name"
    with pytest.raises(ConfigError, match=f"run_name=r: .* {differs}"):
        trained.go("seed=1", "train.log_every=3")
    longer = f"train.steps=12, not 32; init_from={trained.path} with another run_name trains on"
    with pytest.raises(ConfigError, match=re.escape(longer)):
        trained.go("train.steps=32")
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert trained.go("seed=1", "force=true").results["seed"] == 1


def test_keys_that_change_no_weight_do_not_lock_a_run(
    tmp_path: Path, corpus: Path, cache: Path
) -> None:
    words = ["train.eval_every=1024", "train.checkpoint_every=1024"]
    trained = run(tmp_path, cache, corpus, *words)
    hash_, weights = trained.results["config_hash"], trained.weights()
    others = ["log_every=3", "checkpoint_every=512", "keep_every=512"]
    others = [f"train.{other}" for other in (*others, "sample_tokens=7", "sample_prompt=Hm")]
    trained.go(*others)
    assert trained.said.startswith("already finished")
    (trained.path / "results.json").unlink()
    (trained.path / "checkpoints/last.ckpt").unlink()
    assert trained.go(*others).results["config_hash"] == hash_
    assert 3 in trained.steps("train_loss")
    assert same_weights(trained.weights(), weights)


DIVERGING = ["optim=sgd", "optim.learning_rate=1e6", "train.grad_clip_norm=null"]
DIVERGING += ["schedule=constant", "schedule.warmup_steps=0", "train.log_every=1"]


def test_a_diverged_run_says_so(tmp_path: Path, corpus: Path, cache: Path) -> None:
    trained = run(tmp_path, cache, corpus, *DIVERGING, "train.steps=50")
    r = trained.results
    text = (trained.path / "results.json").read_text()
    assert json.loads(text, parse_constant=lambda name: pytest.fail(name)) == r
    assert r.keys() >= RESULTS
    assert r["status"] == "diverged"
    assert r["schedule_finished"] is False
    assert 0 < r["total_steps"] < 50
    assert r["train_tokens"] == 256 * r["total_steps"]
    assert all(r[f"final_val_{name}"] is None and r[f"test_{name}"] is None for name in SCORES)
    assert r["final_train_loss"] is None or r["final_train_loss"] > 1e3
    assert not (trained.path / "checkpoints" / "final.ckpt").exists()
    for path in (trained.path / "checkpoints").glob("*.ckpt"):  # none holds what is not finite
        weights = torch.load(path, weights_only=True)["state_dict"]
        assert all(torch.isfinite(value).all() for value in weights.values()), path
    assert re.search("diverged: the (training loss|gradient's norm) is nan", trained.said)
    assert trained.go().results == r
    assert "already diverged" in trained.said


def test_a_diverged_run_leaves_with_exit_code_1(
    tmp_path: Path, corpus: Path, tinygpt: Command
) -> None:
    done = tinygpt("run", *tiny(corpus, *DIVERGING, "train.steps=50", "study=s", "run_name=r"))
    assert done.returncode == 1, done.stderr
    assert "diverged" in done.stdout
    results = json.loads((tmp_path / "outputs" / "s" / "r" / "results.json").read_text())
    assert results["status"] == "diverged"


STANDING_STILL = ["optim=sgd", "optim.learning_rate=1e-30", "train.steps=40"]
STANDING_STILL += ["train.eval_every=512", "train.early_stopping_patience=3"]  # 2 steps


def test_early_stopping_stops_and_says_so(tmp_path: Path, corpus: Path, cache: Path) -> None:
    trained = run(tmp_path, cache, corpus, *STANDING_STILL)
    r = trained.results
    assert r["status"] == "stopped_early"
    assert r["total_steps"] == 2 * (1 + 3)  # the first evaluation, then three without progress
    assert r["schedule_finished"] is False
    assert r["final_val_loss"] == pytest.approx(r["initial_val_loss"])
    assert r["train_tokens"] == 8 * 256
    assert trained.checkpoint()["global_step"] == 8
    assert "stopped early: no progress in 3 evaluations" in trained.said
    # killed between the last checkpoint and the results
    rows = trained.rows()
    (trained.path / "results.json").unlink()
    (trained.path / "checkpoints" / "final.ckpt").unlink()
    again = trained.go().results
    assert "resuming" in trained.said
    measured = {"tokens_per_second", "seconds_training", "peak_memory_bytes"}
    assert {k: v for k, v in again.items() if k not in measured} == {
        k: v for k, v in r.items() if k not in measured
    }
    assert trained.rows() == rows
    assert trained.checkpoint()["global_step"] == 8


def test_the_closing_lines_of_an_early_stopped_run_name_its_best_checkpoint(
    tmp_path: Path, corpus: Path, cache: Path
) -> None:
    trained = run(tmp_path, cache, corpus, *STANDING_STILL)
    path, best = trained.path / "checkpoints/best.ckpt", trained.results["best_val_loss"]
    assert trained.results["best_val_step"] == trained.checkpoint("best")["global_step"] == 2
    line = f"best       {path}: val loss {best:.4f} at step 2; final.ckpt is of step 8"
    assert line in trained.said.splitlines()
    path.unlink()
    out, results = io.StringIO(), {**trained.results, "best_val_step": 0}
    print_summary(rundir.RunDir(trained.path), results, Console(file=out, width=40))
    line = f"best       val loss {best:.4f} at step 0, before training"
    assert line in out.getvalue().splitlines()


def test_no_early_stopping_while_there_is_progress(
    tmp_path: Path, corpus: Path, cache: Path
) -> None:
    words = ["train.eval_every=512", "train.early_stopping_patience=1"]
    trained = run(tmp_path, cache, corpus, *words)
    assert trained.results["status"] == "finished"
    assert trained.results["total_steps"] == 12


@contextlib.contextmanager
def failing_at_step_6() -> Iterator[None]:
    """Raise after the evaluation of step 6, before anything of that step is saved."""
    update_best = Journal._update_best

    def fail(self: Journal, step: int, scores: Any) -> None:
        if step == 6:
            raise ValueError("the disk\nis full")
        update_best(self, step, scores)

    with mock.patch.object(Journal, "_update_best", fail):
        yield


def test_a_failed_run_says_why_and_its_patience_is_resumed(
    tmp_path: Path, corpus: Path, cache: Path
) -> None:
    whole = run(tmp_path / "whole", cache, corpus, *STANDING_STILL)
    trained = Trained(tmp_path / "failing", cache, tiny(corpus, *STANDING_STILL))
    with failing_at_step_6(), pytest.raises(ValueError, match="the disk"):
        trained.go()
    error = json.loads((trained.path / "error.json").read_text())
    assert error == {"error": "ValueError: the disk is full"}
    assert not (trained.path / "results.json").exists()
    trained.go()
    assert not (trained.path / "error.json").exists()
    assert "resuming" in trained.said
    assert trained.results["total_steps"] == whole.results["total_steps"] == 8
    assert same_weights(trained.weights(), whole.weights())
    losses = [[row["val_loss"] for row in t.rows()] for t in (trained, whole)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("optim", [name for name in OPTIMIZERS if name != "adamw"])
def test_a_run_that_failed_goes_on_with_the_same_bits(
    tmp_path: Path, corpus: Path, cache: Path, optim: str
) -> None:
    words = [f"optim={optim}", "train.eval_every=768", "train.checkpoint_every=1024"]
    whole = run(tmp_path / "whole", cache, corpus, *words)
    trained = Trained(tmp_path / "failing", cache, tiny(corpus, *words))
    with failing_at_step_6(), pytest.raises(ValueError, match="the disk"):
        trained.go()
    assert trained.checkpoint("last")["global_step"] == 4
    trained.go()
    assert same_weights(trained.weights(), whole.weights())
    states = [t.checkpoint()["optimizer_states"][0]["state"] for t in (trained, whole)]
    for one, other in zip(*(state.values() for state in states), strict=True):
        assert same_weights(one, other)
    assert trained.results["final_val_loss"] == whole.results["final_val_loss"]


def test_a_run_goes_on_with_another_micro_batch(tmp_path: Path, corpus: Path, cache: Path) -> None:
    """Between whole steps, though Lightning counts passes and a step has another number of them."""
    words = ["train.precision=64", "train.log_every=1", "train.eval_every=768"]  # 3 steps
    whole = run(tmp_path / "whole", cache, corpus, *words)
    trained = Trained(tmp_path / "failing", cache, tiny(corpus, *words))
    with failing_at_step_6(), pytest.raises(ValueError, match="the disk"):
        trained.go("hardware.micro_batch_size=4")
    trained.go("hardware.micro_batch_size=2")
    assert [row["step"] for row in trained.rows()] == [row["step"] for row in whole.rows()]
    for column in ("train_loss", "grad_norm", "learning_rate"):
        one, other = ([float(r[column]) for r in t.rows()[1:]] for t in (trained, whole))
        assert one == pytest.approx(other, rel=1e-9)


def test_another_precision_does_not_go_on_with_a_run(
    tmp_path: Path, corpus: Path, cache: Path
) -> None:
    """``auto`` may resolve to something else on another machine."""
    trained = run(tmp_path, cache, corpus)
    (trained.path / "results.json").unlink()
    environment = json.loads((trained.path / "environment.json").read_text())
    (trained.path / "environment.json").write_text(
        json.dumps({**environment, "precision_resolved": "bf16-mixed"})
    )
    with pytest.raises(ConfigError, match="begun at bf16-mixed"):
        trained.go()
    assert not (trained.path / "error.json").exists()


def test_a_damaged_checkpoint_is_named(tmp_path: Path, corpus: Path, cache: Path) -> None:
    trained = run(tmp_path, cache, corpus)
    (trained.path / "results.json").unlink()
    for path in (trained.path / "checkpoints").iterdir():  # none is left to fall back to
        path.write_bytes(b"half a checkpoint")
    with pytest.raises(ConfigError, match=r"last\.ckpt: this checkpoint is damaged"):
        trained.go()
    assert trained.go("force=true").results["status"] == "finished"


def test_a_run_that_ended_before_its_first_checkpoint_begins_anew(
    tmp_path: Path, corpus: Path, cache: Path
) -> None:
    trained = run(tmp_path, cache, corpus)
    rows = len(trained.rows())
    (trained.path / "results.json").unlink()
    (trained.path / "checkpoints" / "last.ckpt").unlink()
    assert len(trained.go().rows()) == rows
    assert trained.steps("val_loss")[:2] == [0, 2]


def test_nothing_is_left_behind_in_the_process(tmp_path: Path, corpus: Path, cache: Path) -> None:
    """Signal handlers and log handlers are those of before."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    handlers = list(logging.getLogger("tinygpt").handlers)
    run(tmp_path, cache, corpus, "train.steps=1")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert logging.getLogger("tinygpt").handlers == handlers


# Intervals and horizons


@pytest.mark.parametrize(
    ("words", "column", "steps"),
    [
        (["train.log_every=1"], "train_loss", list(range(1, 13))),
        (["train.log_every=5"], "train_loss", [5, 6, 10, 12]),  # evaluations are logged too
        (["train.eval_every=768"], "val_loss", [0, 3, 6, 9, 12]),
        (["train.eval_every=1280"], "val_loss", [0, 5, 10, 12]),  # the last step always
        (["train.eval_every=100"], "val_loss", list(range(13))),  # less than a step
        (["train.eval_every=100_000"], "val_loss", [0, 12]),
    ],
)
def test_intervals_are_in_steps_and_in_tokens(
    tmp_path: Path, corpus: Path, cache: Path, words: list[str], column: str, steps: list[int]
) -> None:
    base = ["train.eval_every=1536", "train.sample_tokens=0", "data.eval_tokens=500"]
    assert run(tmp_path, cache, corpus, *base, *words).steps(column) == steps


def test_checkpoint_every_is_how_often_last_is_written(
    tmp_path: Path, corpus: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[tuple[str, int]] = []
    save = AtomicCheckpoints.save_checkpoint

    def note(self: AtomicCheckpoints, checkpoint: Any, path: Any, **options: Any) -> None:
        written.append((Path(path).name, checkpoint["global_step"]))
        save(self, checkpoint, path, **options)

    monkeypatch.setattr(AtomicCheckpoints, "save_checkpoint", note)
    words = ["train.eval_every=100_000", "train.keep_every=2560"]
    run(tmp_path, cache, corpus, "train.checkpoint_every=1280", *words)
    assert written == [
        ("last.ckpt", 5),
        ("step_10.ckpt", 10),
        ("last.ckpt", 10),
        ("best.ckpt", 12),
        ("last.ckpt", 12),
    ]


@pytest.mark.parametrize(("tokens", "prompt"), [(5, ""), (9, "The cat")])
def test_samples_are_as_long_as_asked_and_begin_with_the_prompt(
    tmp_path: Path, corpus: Path, cache: Path, tokens: int, prompt: str
) -> None:
    words = [f"train.sample_tokens={tokens}", f"train.sample_prompt='{prompt}'", "train.steps=1"]
    trained = run(tmp_path, cache, corpus, *words, "tokenizer=char")
    text = (trained.path / "samples.txt").read_text()
    sample = text.split("tokens)\n", 1)[1].split("\n\n--- step")[0]
    assert sample.startswith(prompt)
    symbols = sample.replace("<|unk|>", "?").replace("<|bos|>", "?")
    assert 0 < len(symbols) - len(prompt) <= tokens


WINDOWS, PARAMETERS, FLOPS = 1000, 7_950, 49_000.0


@pytest.mark.parametrize(
    ("horizon", "steps"),
    [
        ("train.steps=12", 12),
        ("train.tokens=2600", 10),  # 10.2
        ("train.epochs=1", 125),  # 1000 windows, 8 a step
        ("train.epochs=0.5", 62),
        ("train.epochs=2.5", 312),
        ("train.tokens_per_param=20", 621),  # 20 · 7950 / 256 = 621.1
        ("train.flops=1e9", 79),  # 1e9 / 49000 / 256 = 79.7
    ],
)
def test_each_horizon_gives_its_steps(corpus: Path, horizon: str, steps: int) -> None:
    plan = derive(
        cli.compose_config(until(horizon, corpus)),
        parameters=PARAMETERS,
        flops_per_token=FLOPS,
        windows=WINDOWS,
    )
    assert plan.total_steps == steps
    assert plan.train_tokens == 256 * steps
    assert plan.batch_size == plan.micro_batch_size * plan.accumulate == 8
    assert plan.eval_steps == plan.checkpoint_steps
    assert abs(plan.eval_steps - steps / 10) <= 1  # a tenth of it


@pytest.mark.parametrize("horizon", ["train.epochs=0.3", "train.flops=2e9", "train.tokens=9000"])
def test_a_run_goes_as_far_as_its_horizon(
    tmp_path: Path, corpus: Path, cache: Path, horizon: str
) -> None:
    words = until(horizon, corpus, "train.sample_tokens=0")
    r = Trained(tmp_path, cache, words).go().results
    name, value = horizon.removeprefix("train.").split("=")
    step = r["flops_exact"] / r["total_steps"]
    model = ModelConfig(n_layers=1, d_model=16, n_heads=2, max_seq_len=32)
    assert step == pytest.approx(256 * flops_per_token(model, 258))
    used = {"epochs": r["train_tokens"], "flops": r["flops_exact"], "tokens": r["train_tokens"]}
    one = {"epochs": 256, "flops": step, "tokens": 256}[name]
    wanted = float(value)
    if name == "epochs":
        everything = Trained(tmp_path / "one", cache, until("train.epochs=1", corpus)).go().results
        wanted *= everything["unique_train_tokens"] // 256 * 256
    assert used[name] <= wanted + one
    assert used[name] > wanted - 2 * one


@pytest.mark.parametrize("horizon", ["tokens=255", "epochs=0.001", "flops=1"])
def test_a_horizon_of_no_step_is_refused(
    tmp_path: Path, corpus: Path, cache: Path, horizon: str
) -> None:
    with pytest.raises(ConfigError, match=f"train.{horizon.split('=')[0]}=.*less than one step"):
        Trained(tmp_path, cache, until(f"train.{horizon}", corpus)).go()
    assert not list(tmp_path.iterdir())


def test_every_batch_that_cannot_be_cut_is_refused(
    tmp_path: Path, corpus: Path, cache: Path
) -> None:
    with pytest.raises(ConfigError, match="micro_batch_size=3: must divide the batch of 8"):
        run(tmp_path, cache, corpus, "hardware.micro_batch_size=3")
    with pytest.raises(ConfigError, match="warmup_steps=12: must be below the 12 steps"):
        run(tmp_path, cache, corpus, "schedule.warmup_steps=12")
    assert not list(tmp_path.iterdir())


def test_unique_tokens_are_counted_over_epochs(tmp_path: Path, corpus: Path, cache: Path) -> None:
    words = until("train.epochs=3", corpus, "data.fraction=0.05", "train.sample_tokens=0")
    r = Trained(tmp_path, cache, words).go().results
    assert r["train_tokens"] == pytest.approx(3 * r["unique_train_tokens"], rel=0.1)
    assert r["unique_train_tokens"] % 32 == 0  # windows do not overlap
    assert r["data_fraction"] == 0.05


# Vocabulary and floor


def test_the_vocabulary_is_that_of_the_training_text(
    tmp_path: Path, corpus: Path, cache: Path
) -> None:
    other = tmp_path / "val.txt"
    other.write_text("\n<|endoftext|>\n".join(f"¡Año {n}! {'ñandú ' * 10}" for n in range(20)))
    words = ["tokenizer=char", f"data.val_file={other}", "train.steps=2"]
    trained = run(tmp_path / "out", cache, corpus, *words)
    tokenizer = load_tokenizer(trained.path / "tokenizer.json")
    text = set(corpus.read_text().replace("\n<|endoftext|>\n", ""))
    assert tokenizer.vocab_size == trained.results["vocab_size"] == 3 + len(text)
    assert tokenizer.encode("ñ") == [tokenizer.unknown_id]
    unknown = sum(c not in text for n in range(20) for c in f"¡Año {n}! {'ñandú ' * 10}".strip())
    said = [line for line in trained.said.splitlines() if "unknown" in line]
    assert len(said) == 1  # of validation alone
    assert f"{unknown} unknown" in said[0]
    assert re.search(rf"val [^\n]*\n *{unknown} unknown", trained.said)


SYNTHETIC = ["data.max_documents=300", "tokenizer=byte", "model.max_seq_len=1024"]
SYNTHETIC += ["model.d_model=16", "model.n_heads=2", "model.n_layers=1", "train.steps=2"]
SYNTHETIC += ["hardware=cpu", "hardware.threads=1", "train.batch_tokens=2048"]


def test_the_floor_is_told_where_stories_fit_and_null_where_not(
    tmp_path: Path, cache: Path
) -> None:
    fitting = Trained(tmp_path / "fitting", cache, SYNTHETIC).go().results
    nats = entropy(Grammar(SyntheticData(name="synthetic")))
    tokens_a_story = fitting["irreducible_loss_exact"] and nats / fitting["irreducible_loss_exact"]
    assert 300 < tokens_a_story < 500  # bytes of a story
    assert fitting["final_val_loss"] > fitting["irreducible_loss_exact"] > 0
    assert fitting["test_irreducible_loss_exact"] > 0
    short = Trained(tmp_path / "short", cache, [*SYNTHETIC, "model.max_seq_len=64"]).go().results
    assert short["irreducible_loss_exact"] is None
    assert short["test_irreducible_loss_exact"] is None


@pytest.mark.slow
def test_a_model_that_has_learned_comes_near_the_floor_and_not_below(
    tmp_path: Path, cache: Path
) -> None:
    words = ["data.max_documents=3000", "data.n_facts=4", "data.noise_rate=0"]
    words += ["data.heldout_entities=0", "tokenizer.vocab_size=512", "model.max_seq_len=256"]
    words += ["tokenizer.train_bytes=200_000", "data.eval_tokens=20_000", "train.steps=400"]
    r = Trained(tmp_path, cache, [*words, "hardware=cpu", "hardware.threads=1"]).go().results
    for loss, floor in (
        (r["final_val_loss"], r["irreducible_loss_exact"]),
        (r["test_loss"], r["test_irreducible_loss_exact"]),
    ):
        assert floor < loss < floor + 0.35


@pytest.mark.parametrize(
    ("number", "says"),
    [(7, "7"), (999, "999"), (999.6, "1k"), (1234, "1.23k"), (999_936, "1M"), (1_234_567, "1.23M")],
)
def test_three_digits_have_the_letter_of_what_they_round_to(number: float, says: str) -> None:
    assert short(number) == says
