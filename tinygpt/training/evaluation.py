"""Scoring: loss and accuracy of a model on a fixed set of tokens, every token once."""

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


class Scored(Protocol):
    """A GPT, or what has its methods."""

    training: bool

    def train(self, mode: bool = True) -> Any: ...

    def eval(self) -> Any: ...

    def scores(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, ...]: ...


@dataclass(frozen=True)
class Scores:
    """``loss`` in nats per token; bits per byte and per character compare across tokenizers."""

    loss: float
    accuracy: float
    bits_per_byte: float
    bits_per_char: float

    @property
    def perplexity(self) -> float:
        """Return exp(loss), infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    def named(self, split: str) -> dict[str, float]:
        """Return the scores as columns of metrics.csv, e.g. ``val_loss``."""
        names = ("loss", "perplexity", "accuracy", "bits_per_byte", "bits_per_char")
        return {f"{split}_{name}": getattr(self, name) for name in names}


class TokenScores(Metric):
    """Sums the losses and hits of tokens, each counted once, over batches and processes.

    In 64 bits where the device has them.  A NaN is kept, as it must show.
    """

    full_state_update = False
    sums: Tensor  # (3,): of losses, of right tokens, of tokens

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.add_state("sums", torch.zeros(3, dtype=dtype), dist_reduce_fx="sum")
        self.to(device)

    def update(self, losses: Tensor, right: Tensor, scored: Tensor) -> None:
        """Add tokens, ``(N,)`` each: losses, whether the model was right, and which count."""
        loss = losses.to(self.sums.dtype).masked_fill(~scored, 0).sum()
        self.sums += torch.stack((loss, (right & scored).sum(), scored.sum()))

    def compute(self) -> Tensor:
        """Return the mean loss and the accuracy, ``(2,)``."""
        return self.sums[:2] / self.sums[2]


def scores_of(metric: TokenScores, info: dict[str, Any]) -> Scores:
    """Return the scores of the split that ``info`` of the index describes.

    Bits per byte and per character divide the loss of all scored tokens, ends of text included, by
    the bytes and characters of the documents.
    """
    loss, accuracy = metric.compute().tolist()
    bits = loss * (info["tokens"] - _unscored(info)) / math.log(2)
    return Scores(loss, accuracy, bits / info["bytes"], bits / info["characters"])


def _unscored(info: dict[str, Any]) -> int:
    """Return how many tokens of a split are only context, in which case a row is a document."""
    return len(info["unscored_ids"]) * info["documents"] if "unscored_ids" in info else 0


def score_batch(
    model: Scored, batch: tuple[Tensor, Tensor], info: dict[str, Any], metric: TokenScores
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Add a batch of inputs and targets, both ``(B, T)``, of a split to ``metric``.

    Where each row is a document, the batch is cut to the longest.  Returns the model's scores of
    the targets, ``(B·T,)`` each, and which targets count, ``(B, T)``.
    """
    inputs, targets = batch
    if _unscored(info):
        width = 1 + int((targets != IGNORED).any(0).nonzero().max())
        inputs, targets = inputs[:, :width], targets[:, :width]
    inputs, targets = inputs.to(metric.device), targets.to(metric.device)
    scored = targets != IGNORED
    found = model.scores(inputs, targets.clamp(min=0))
    metric.update(found[0], found[1], scored.flatten())
    return found, scored


@torch.no_grad()
def score(
    model: Scored,
    batches: Iterable[tuple[Tensor, Tensor]],
    info: dict[str, Any],
    device: torch.device,
    autocast: AbstractContextManager[Any] | None = None,
    watch: Callable[[tuple[Tensor, ...], Tensor], None] | None = None,
) -> Scores:
    """Score ``model`` on ``batches`` of inputs and targets, both ``(B, T)``, of a split.

    ``watch`` is called for each batch with what ``score_batch`` returns.
    """
    was_training = model.training
    model.eval()
    metric = TokenScores(device)
    with autocast or nullcontext():
        for batch in batches:
            found, scored = score_batch(model, batch, info, metric)
            if watch is not None:
                watch(found, scored)
    model.train(was_training)
    return scores_of(metric, info)
