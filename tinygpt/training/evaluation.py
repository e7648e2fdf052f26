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
    standard_error: float = math.nan  # of the loss, as the windows scored differ

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

    In 64 bits where the device has them.  A NaN is kept, as it must show.  The standard error of
    the mean is that of a ratio, of losses to tokens, over the windows (Cochran 1977, section 2.11).
    """

    full_state_update = False
    # (7,): of losses, right tokens, tokens; over windows of 1, loss², loss·tokens, tokens²
    sums: Tensor

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.add_state("sums", torch.zeros(7, dtype=dtype), dist_reduce_fx="sum")
        self.to(device)

    def update(self, losses: Tensor, right: Tensor, scored: Tensor) -> None:
        """Add windows: losses and whether the model was right, ``(B·T,)`` each, and which tokens
        count, ``(B, T)``."""
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
        apart = (squares - 2 * loss * products + loss**2 * lengths).clamp(min=0)
        error = (apart * windows / (windows - 1)).sqrt() / tokens  # of one window: no number
        return torch.stack((loss, accuracy, error))


def scores_of(metric: TokenScores, info: dict[str, Any]) -> Scores:
    """Return the scores of the split that ``info`` of the index describes.

    Bits per byte and per character divide the loss of all scored tokens, ends of text included, by
    the bytes and characters of the documents.
    """
    loss, accuracy, error = metric.compute().tolist()
    bits = loss * scored_tokens(info) / math.log(2)
    return Scores(loss, accuracy, bits / info["bytes"], bits / info["characters"], error)


def scored_tokens(info: dict[str, Any]) -> int:
    """Return how many tokens of a split count; the others are only context."""
    return int(info["tokens"]) - _unscored(info)


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
