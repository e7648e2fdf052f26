"""Scoring: loss and accuracy of a model on a fixed set of tokens, every token once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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


@torch.no_grad()  # fsdp goes on training in what it gathers here: no inference_mode
def score(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    info: dict[str, Any],
    device: torch.device,
    autocast: AbstractContextManager[Any] | None = None,
    reduced: Callable[[Tensor], Tensor] | None = None,
) -> Scores:
    """Scores ``model`` on ``batches`` of inputs and targets, both ``(B, T)``.

    ``info`` is the split's entry of the index: the nats of all its tokens, ends of text included,
    are set against the bytes and characters of its documents.  ``reduced`` adds up the sums of
    several processes, each of which scores some of the batches.
    """
    was_training = model.training
    model.eval()
    # Plain sums, in 64 bits where the device has them: a NaN must show, and torchmetrics' mean
    # either drops it or rounds to 32 bits.
    dtype = torch.float32 if device.type == "mps" else torch.float64
    loss, right, count = torch.zeros(3, dtype=dtype, device=device)
    with autocast or nullcontext():
        for inputs, targets in batches:
            inputs, targets = inputs.to(device), targets.to(device)
            logits = model(inputs).flatten(0, 1)  # (B·T, V)
            wanted = targets.flatten()
            wide = logits if logits.dtype == torch.float64 else logits.float()
            losses = F.cross_entropy(wide, wanted, ignore_index=IGNORED, reduction="none")
            loss += losses.to(dtype).sum()
            right += (logits.argmax(-1) == wanted).sum()
            count += (wanted != IGNORED).sum()
    model.train(was_training)
    if reduced is not None:
        loss, right, count = reduced(torch.stack((loss, right, count)))
    mean = float(loss / count)
    bits = mean * info["tokens"] / math.log(2)
    return Scores(mean, float(right / count), bits / info["bytes"], bits / info["characters"])
