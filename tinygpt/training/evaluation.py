"""Scoring: loss and accuracy of a model on a fixed set of tokens, every token once."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric

from tinygpt.data.datamodule import IGNORED


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


@torch.inference_mode()
def score(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    info: dict[str, Any],
    device: torch.device,
    autocast: AbstractContextManager[Any] | None = None,
) -> Scores:
    """Scores ``model`` on ``batches`` of inputs and targets, both ``(B, T)``.

    ``info`` is the split's entry of the index: the nats of all its tokens, ends of text included,
    are set against the bytes and characters of its documents.
    """
    was_training = model.training
    model.eval()
    # MPS has no 64-bit floats
    dtype = torch.float32 if device.type == "mps" else torch.float64
    loss, accuracy = (MeanMetric().set_dtype(dtype).to(device) for _ in range(2))
    with autocast or nullcontext():
        for inputs, targets in batches:
            inputs, targets = inputs.to(device), targets.to(device)
            logits = model(inputs)  # (B, T, V)
            flat, wanted = logits.flatten(0, 1), targets.flatten()
            scored = wanted != IGNORED
            losses = F.cross_entropy(
                flat.float() if flat.dtype != torch.float64 else flat,
                wanted,
                ignore_index=IGNORED,
                reduction="none",
            )
            loss.update(losses, weight=scored)
            accuracy.update((flat.argmax(-1) == wanted).to(dtype), weight=scored)
    model.train(was_training)
    mean = float(loss.compute())
    bits = mean * info["tokens"] / math.log(2)
    return Scores(mean, float(accuracy.compute()), bits / info["bytes"], bits / info["characters"])
