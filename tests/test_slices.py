"""A batch in slices, a thread each: the same loss and gradients, in an order that is fixed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tinygpt
from tests.conftest import tiny
from tests.test_gpt import make
from tests.test_training import Trained, same_weights
from tinygpt import fileio
from tinygpt.config import LoraConfig
from tinygpt.model.gpt import GPT, dropout_seeds
from tinygpt.model.lora import add_lora
from tinygpt.training.slices import in_slices, mean_loss

# 8 windows of 128 tokens a step: two slices, of four each
TWO = ("model.max_seq_len=128", "train.batch_tokens=1024", "hardware.threads=2")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def batch(rows: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    tokens = torch.randint(37, (rows, 13), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


def gradients(model: GPT, slices: int, *tensors: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Return half the loss and its gradients, as where two passes are accumulated."""
    model.zero_grad()
    loss = mean_loss(model, slices, *tensors) / 2
    torch.autograd.backward(loss)
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@settings(max_examples=25)
@given(
    rows=st.integers(1, 7),
    slices=st.integers(1, 7),
    changes=st.fixed_dictionaries(
        {},
        optional={
            "dropout": st.just(0.3),
            "gradient_checkpointing": st.just(True),
            "tie_weights": st.booleans(),
            "position": st.just("rope"),
            "n_kv_heads": st.just(2),
        },
    ),
    lora=st.booleans(),
)
def test_slices_have_the_loss_and_the_gradients_of_the_whole(
    rows: int, slices: int, changes: dict[str, Any], lora: bool
) -> None:
    slices = min(slices, rows)
    model = make(**changes).double().train()
    if lora:
        add_lora(model, LoraConfig(rank=2))
    tensors = *batch(rows), dropout_seeds(1, 2, 3, rows)
    loss, expected = gradients(model, 1, *tensors)
    sliced, found = gradients(model, slices, *tensors)
    torch.testing.assert_close(sliced, loss)
    torch.testing.assert_close(found, expected)


def test_what_a_thread_finds_does_not_depend_on_when() -> None:
    model, tensors = make().train(), batch(6)
    loss, expected = gradients(model, 3, *tensors)
    expected = {name: value.clone() for name, value in expected.items()}
    for _ in range(20):
        again, found = gradients(model, 3, *tensors)
        assert torch.equal(again, loss)
        assert same_weights(found, expected)


def test_results_are_in_order_and_an_error_is_raised() -> None:
    rows = torch.arange(7)
    assert in_slices(lambda x, _: x.tolist(), 3, (rows, None), grad=False) == [
        [0, 1, 2],
        [3, 4],
        [5, 6],
    ]
    with pytest.raises(ZeroDivisionError):
        in_slices(lambda x: 1 // int(x[0]), 7, (rows.flip(0),), grad=False)


def test_a_run_in_slices_resumes_to_the_same_bits_and_is_scored_as_in_training(
    tmp_path: Path, corpus: Path, cache: Path
) -> None:
    words = tiny(
        corpus, *TWO, "train.steps=6", "train.checkpoint_every=2048", "train.keep_every=2048"
    )
    whole = Trained(tmp_path / "whole", cache, words).go()
    environment = fileio.read_json(whole.path / "environment.json")
    assert (environment["threads"], environment["slices"]) == (2, 2)
    assert whole.results["threads"] == 2
    assert "on      cpu, 2 threads, precision 32" in whole.said
    (scores,) = tinygpt.evaluate_runs(whole.path).to_dict("records")
    assert scores["loss"] == whole.results["final_val_loss"]

    part = Trained(tmp_path / "part", cache, words).go()
    os.replace(part.path / "checkpoints/step_4.ckpt", part.path / "checkpoints/last.ckpt")
    (part.path / "results.json").unlink()
    # with one thread, too
    again = Trained(tmp_path / "part", cache, [*words, "hardware.threads=1"]).go()
    assert same_weights(again.weights(), whole.weights())
    assert again.results["final_val_loss"] == whole.results["final_val_loss"]

    one = Trained(tmp_path / "one", cache, [*words, "hardware.threads=1"]).go()
    assert not same_weights(one.weights(), whole.weights())  # equal within rounding
    assert one.results["final_val_loss"] == pytest.approx(whole.results["final_val_loss"], rel=1e-5)
