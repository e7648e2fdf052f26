"""Test ``training.evaluation.score`` against a direct computation."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tinygpt.data.datamodule import IGNORED
from tinygpt.model.kernels import token_scores
from tinygpt.training.evaluation import Scores, score

INFO = {"tokens": 60, "bytes": 150, "characters": 120, "documents": 1}
CPU = torch.device("cpu")


class Table(nn.Module):
    """Give logits that depend on the token alone, and record how it is called."""

    def __init__(self, vocabulary: int = 7, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        table = torch.randn(vocabulary, vocabulary, generator=generator, dtype=torch.float64)
        self.logits = nn.Embedding.from_pretrained(3 * table.to(dtype))
        self.dropout = nn.Dropout(0.5)
        self.was_training: list[bool] = []

    def scores(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        self.was_training.append(self.training)
        logits = self.dropout(self.logits(tokens)).flatten(0, 1)
        losses, right = token_scores(
            logits, torch.eye(logits.shape[1]).to(logits), targets.flatten()
        )
        return losses, right.bool()


def batch(rows: int, length: int, seed: int = 0, ignored: int = 0) -> tuple[Tensor, Tensor]:
    """Return random inputs and targets, the last ``ignored`` of the last row masked."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(7, (rows, length + 1), generator=generator)
    targets = tokens[:, 1:].clone()
    if ignored:
        targets[-1, -ignored:] = IGNORED
    return tokens[:, :-1], targets


def direct(model: Table, batches: list[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    """Return the mean loss and the accuracy, computed one target at a time."""
    table = model.logits.weight.double()
    losses, right = [], 0
    for inputs, targets in batches:
        counted = targets != IGNORED
        for token, target in zip(inputs[counted].tolist(), targets[counted].tolist(), strict=True):
            row = table[token].tolist()
            losses.append(math.log(sum(math.exp(x) for x in row)) - row[target])
            right += row.index(max(row)) == target
    return math.fsum(losses) / len(losses), right / len(losses)


@settings(max_examples=40)
@given(st.integers(1, 5), st.integers(2, 9), st.integers(0, 8), st.integers(0, 1000))
def test_scores_are_those_of_a_direct_computation(
    rows: int, length: int, ignored: int, seed: int
) -> None:
    model = Table()
    batches = [batch(rows, length, seed), batch(1, length, seed + 1, min(ignored, length - 1))]
    found = score(model, batches, INFO, CPU)
    loss, accuracy = direct(model, batches)
    assert found.loss == pytest.approx(loss, rel=1e-6)
    assert found.accuracy == pytest.approx(accuracy, rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(loss))
    assert found.bits_per_byte == pytest.approx(loss * 60 / 150 / math.log(2))
    assert found.bits_per_char == pytest.approx(loss * 60 / 120 / math.log(2))


def test_the_batch_size_does_not_matter() -> None:
    """The scores agree to 64 bits; a window in which all targets are ignored is not counted."""
    inputs, targets = batch(11, 6, ignored=4)
    loss, accuracy = direct(Table(), [(inputs, targets)])
    rows = [direct(Table(), [(i[None], t[None])])[0] for i, t in zip(inputs, targets, strict=True)]
    tokens = [6] * 10 + [2]
    apart = math.fsum((t * (row - loss)) ** 2 for t, row in zip(tokens, rows, strict=True))
    error = math.sqrt(11 / 10 * apart) / sum(tokens)
    inputs = torch.cat([inputs, inputs[:1]])
    targets = torch.cat([targets, torch.full_like(targets[:1], IGNORED)])
    for size in (1, 2, 5, 12):
        pieces = list(zip(inputs.split(size), targets.split(size), strict=True))
        found = score(Table(), pieces, INFO, CPU)
        assert found.loss == pytest.approx(loss, rel=1e-13)
        assert found.accuracy == pytest.approx(accuracy, rel=1e-13)
        assert found.standard_error == pytest.approx(error, rel=1e-9)


@pytest.mark.parametrize("training", [True, False])
def test_dropout_and_gradients_are_off_and_the_mode_is_given_back(training: bool) -> None:
    model = Table().train(training)
    model.logits.weight.requires_grad_(True)
    first = score(model, [batch(2, 5)], INFO, CPU)
    assert score(model, [batch(2, 5)], INFO, CPU) == first
    assert model.was_training == [False, False]
    assert model.training is training
    assert model.logits.weight.grad is None


def test_half_precision_logits_are_scored_in_full() -> None:
    """The loss of bfloat16 logits, which have three digits, has more."""
    model = Table(dtype=torch.bfloat16)
    batches = [batch(4, 8)]
    assert score(model, batches, INFO, CPU).loss == pytest.approx(
        direct(model, batches)[0], rel=1e-6
    )


def test_the_context_given_is_used() -> None:
    class Matrix(Table):
        def scores(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
            out = torch.ones(1, 1) @ torch.ones(1, 1)
            dtypes.append(out.dtype)
            return super().scores(tokens, targets)

    dtypes: list[torch.dtype] = []
    score(Matrix(), [batch(2, 5)], INFO, CPU, torch.autocast("cpu", torch.bfloat16))
    score(Matrix(), [batch(2, 5)], INFO, CPU)
    assert dtypes == [torch.bfloat16, torch.float32]


def test_one_loss_that_is_not_a_number_is_never_averaged_away() -> None:
    model = Table()
    with torch.no_grad():
        model.logits.weight[3] = float("nan")
    assert math.isnan(score(model, [batch(4, 8)], INFO, CPU).loss)


def test_names_are_the_columns_of_metrics() -> None:
    assert Scores(1e4, 0.0, 1.0, 1.0).perplexity == math.inf  # it overflows
    named: dict[str, Any] = Scores(1.0, 0.5, 2.0, 3.0).named("val")
    assert named == {
        "val_loss": 1.0,
        "val_perplexity": math.e,
        "val_accuracy": 0.5,
        "val_bits_per_byte": 2.0,
        "val_bits_per_char": 3.0,
    }
