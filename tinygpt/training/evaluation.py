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
    """What is scored: a GPT, or what answers as it does."""

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
        """exp(loss), infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    def named(self, split: str) -> dict[str, float]:
        """As columns of metrics.csv, e.g. ``val_loss``."""
        names = ("loss", "perplexity", "accuracy", "bits_per_byte", "bits_per_char")
        return {f"{split}_{name}": getattr(self, name) for name in names}


class TokenScores(Metric):
    """The sums behind ``Scores``, every scored token counted once; processes are added up.

    In 64 bits where the device has them, and with nothing dropped, as a NaN must show.
    """

    full_state_update = False
    sums: Tensor  # (3,): of losses, of right tokens, of tokens

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.add_state("sums", torch.zeros(3, dtype=dtype), dist_reduce_fx="sum")
        self.to(device)

    def update(self, losses: Tensor, right: Tensor, scored: Tensor) -> None:
        """Add tokens, ``(N,)`` each: their losses, whether the model was right, which count."""
        loss = losses.to(self.sums.dtype).masked_fill(~scored, 0).sum()
        self.sums += torch.stack((loss, (right & scored).sum(), scored.sum()))

    def compute(self) -> Tensor:
        """Return the mean loss and the accuracy, ``(2,)``."""
        return self.sums[:2] / self.sums[2]


def scores_of(metric: TokenScores, info: dict[str, Any]) -> Scores:
    """Return what ``metric`` has measured of the split that ``info`` of the index describes.

    The nats of all its tokens that are scored, ends of text included, are set against the bytes
    and characters of its documents.
    """
    loss, accuracy = metric.compute().tolist()
    bits = loss * (info["tokens"] - _unscored(info)) / math.log(2)
    return Scores(loss, accuracy, bits / info["bytes"], bits / info["characters"])


def _unscored(info: dict[str, Any]) -> int:
    """Return how many tokens of a split are context alone; then each row is a document."""
    return len(info["unscored_ids"]) * info["documents"] if "unscored_ids" in info else 0


def cut(batch: tuple[Tensor, Tensor], info: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return the batch as wide as its longest document, where each row is a document."""
    inputs, targets = batch
    if not _unscored(info):
        return batch
    width = 1 + int((targets != IGNORED).any(0).nonzero().max())
    return inputs[:, :width], targets[:, :width]


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

    ``watch`` is shown, batch by batch, what the model said of its targets and which of them
    count, ``(B, T)``.
    """
    was_training = model.training
    model.eval()
    metric = TokenScores(device)
    with autocast or nullcontext():
        for batch in batches:
            inputs, targets = (tensor.to(device) for tensor in cut(batch, info))
            scored = targets != IGNORED
            found = model.scores(inputs, targets.clamp(min=0))  # (B·T,) each
            metric.update(found[0], found[1], scored.flatten())
            if watch is not None:
                watch(found, scored)
    model.train(was_training)
    return scores_of(metric, info)
