"""Compute the loss and accuracy of a model on a split, counting every token once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torchmetrics import Metric

from tinygpt.data.datamodule import IGNORED
from tinygpt.training.slices import in_slices


class Scored(Protocol):
    """Describe what is scored: a GPT, or an object with its methods."""

    training: bool

    def train(self, mode: bool = True) -> Any: ...

    def eval(self) -> Any: ...

    def scores(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, ...]: ...


@dataclass(frozen=True)
class Scores:
    """Hold the loss in nats per token, and bits, which compare across tokenizers."""

    loss: float
    accuracy: float
    bits_per_byte: float
    bits_per_char: float
    standard_error: float = math.nan  # of the loss, estimated from the windows scored

    @property
    def perplexity(self) -> float:
        """Return exp(loss), infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    def named(self, split: str) -> dict[str, float]:
        """Return the scores as columns of metrics.csv, e.g. ``val_loss``."""
        names = ("loss", "perplexity", "accuracy", "bits_per_byte", "bits_per_char")
        return {f"{split}_{name}": getattr(self, name) for name in names}


class TokenScores(Metric):
    """Sum losses and hits over batches and processes, in 64 bits where the device has them.

    The standard error of the mean is that of a ratio of losses to tokens over the windows (Cochran
    1977, section 2.11).
    """

    full_state_update = False
    # (7,): sums of losses, hits, tokens; over windows, of 1, loss², loss·tokens, tokens²
    sums: Tensor

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.add_state("sums", torch.zeros(7, dtype=dtype), dist_reduce_fx="sum")
        self.to(device)

    def update(self, losses: Tensor, right: Tensor, scored: Tensor) -> None:
        """Add the losses and hits of a batch, ``(B·T,)`` each; ``scored`` ``(B, T)`` counts."""
        each, tokens = scored.flatten(), scored.sum(1, dtype=self.sums.dtype)
        counted = losses.to(self.sums.dtype).masked_fill(~each, 0)
        loss = counted.view(scored.shape).sum(1)
        windows = torch.stack(((tokens > 0).to(loss), loss**2, loss * tokens, tokens**2)).sum(1)
        sums = torch.stack((counted.sum(), (right & each).sum(), each.sum()))
        self.sums += torch.cat((sums, windows))

    def compute(self) -> Tensor:
        """Return the mean loss, the accuracy, and the standard error of the loss, ``(3,)``."""
        tokens, windows, squares, products, lengths = self.sums[2:]
        loss, accuracy = self.sums[:2] / tokens
        residual = (squares - 2 * loss * products + loss**2 * lengths).clamp(min=0)
        error = (residual * windows / (windows - 1)).sqrt() / tokens  # NaN for one window
        return torch.stack((loss, accuracy, error))


def scores_of(metric: TokenScores, info: dict[str, Any]) -> Scores:
    """Return the scores of the split whose entry in the index is ``info``.

    The bits are those of all scored tokens, including the ends of documents.
    """
    loss, accuracy, error = metric.compute().tolist()
    bits = loss * scored_tokens(info) / math.log(2)
    return Scores(loss, accuracy, bits / info["bytes"], bits / info["characters"], error)


def scored_tokens(info: dict[str, Any]) -> int:
    """Return how many tokens of a split are scored; the others are only context."""
    return int(info["tokens"]) - len(info.get("unscored_ids", ())) * int(info["documents"])


def score_batch(
    model: Scored,
    batch: tuple[Tensor, Tensor],
    info: dict[str, Any],
    metric: TokenScores,
    slices: int = 1,
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Add a batch of inputs and targets, both ``(B, T)``, of a split to ``metric``.

    Returns the model's scores of the targets, ``(B·T,)`` each, and which targets count, ``(B, T)``.
    """
    inputs, targets = batch
    if info.get("unscored_ids"):  # each row is a document: cut the batch to the longest
        width = 1 + int((targets != IGNORED).any(0).nonzero().max())
        inputs, targets = inputs[:, :width], targets[:, :width]
    inputs, targets = inputs.to(metric.device), targets.to(metric.device)
    scored = targets != IGNORED
    parts = min(slices, len(inputs))
    batch = inputs, targets.clamp(min=0)
    each = in_slices(model.scores, parts, batch, grad=torch.is_grad_enabled())
    found = tuple(torch.cat(some) for some in zip(*each, strict=True))
    metric.update(found[0], found[1], scored)
    return found, scored


@torch.no_grad()
def score(
    model: Scored,
    batches: Iterable[tuple[Tensor, Tensor]],
    info: dict[str, Any],
    device: torch.device,
    autocast: AbstractContextManager[Any] | None = None,
    watch: Callable[[tuple[Tensor, ...], Tensor], None] | None = None,
    slices: int = 1,
) -> Scores:
    """Score ``model`` on ``batches`` of inputs and targets, both ``(B, T)``, of a split.

    A CPU computes each batch in ``slices``, a thread each.

    ``watch`` is called with the result of ``score_batch`` for each batch.
    """
    was_training = model.training
    model.eval()
    metric = TokenScores(device)
    with autocast or nullcontext():
        for batch in batches:
            found, scored = score_batch(model, batch, info, metric, slices)
            if watch is not None:
                watch(found, scored)
    model.train(was_training)
    return scores_of(metric, info)
