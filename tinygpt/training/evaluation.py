"""Scoring: loss and accuracy of a model on a fixed set of tokens, every token once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

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


@torch.no_grad()
def score(
    model: Scored,
    batches: Iterable[tuple[Tensor, Tensor]],
    info: dict[str, Any],
    device: torch.device,
    autocast: AbstractContextManager[Any] | None = None,
    reduced: Callable[[Tensor], Tensor] | None = None,
    watch: Callable[[tuple[Tensor, ...], Tensor], None] | None = None,
) -> Scores:
    """Scores ``model`` on ``batches`` of inputs and targets, both ``(B, T)``.

    ``info`` is the split's entry of the index: the nats of all its tokens that are scored, ends of
    text included, are set against the bytes and characters of its documents.  ``reduced`` adds up
    the sums of several processes, each of which scores some of the batches.  ``watch`` is shown,
    batch by batch, what the model said of its targets and which of them count, ``(B, T)``.
    """
    was_training = model.training
    model.eval()
    # Plain sums, in 64 bits where the device has them: a NaN must show, and torchmetrics' mean
    # either drops it or rounds to 32 bits.
    dtype = torch.float32 if device.type == "mps" else torch.float64
    unscored = len(info["unscored_ids"]) * info["documents"] if "unscored_ids" in info else 0
    loss, right, count = torch.zeros(3, dtype=dtype, device=device)
    with autocast or nullcontext():
        for inputs, targets in batches:
            if unscored:  # a document each: as wide as the longest
                width = 1 + int((targets != IGNORED).any(0).nonzero().max())
                inputs, targets = inputs[:, :width], targets[:, :width]
            inputs, targets = inputs.to(device), targets.to(device)
            scored = (targets != IGNORED).flatten()
            found = model.scores(inputs, targets.clamp(min=0))  # (B·T,) each
            losses, is_right = found[:2]
            loss += losses.to(dtype).masked_fill(~scored, 0).sum()
            right += (is_right & scored).sum()
            count += scored.sum()
            if watch is not None:
                watch(found, scored.view_as(targets))
    model.train(was_training)
    if reduced is not None:
        loss, right, count = reduced(torch.stack((loss, right, count)))
    mean = float(loss / count)
    bits = mean * (info["tokens"] - unscored) / math.log(2)
    return Scores(mean, float(right / count), bits / info["bytes"], bits / info["characters"])
