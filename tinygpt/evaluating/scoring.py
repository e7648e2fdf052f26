"""Loss and accuracy of a model on a text, every target once, in one pass over the logits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tinygpt.evaluating.machine import Machine
from tinygpt.evaluating.text import Text
from tinygpt.model.gpt import GPT
from tinygpt.model.loss import token_scores
from tinygpt.training.evaluation import Scores, score

Floats = NDArray[np.float64]
TOP = 5


@dataclass(frozen=True)
class Positions:
    """Mean loss at each position of the context, ``(T,)``, in windows of full length: at position
    t the model has seen t tokens of them.  ``error`` is the standard error of the mean."""

    loss: Floats
    error: Floats
    windows: int

    def bands(self) -> list[tuple[int, int, float]]:
        """The mean loss over the positions from 1, from 2, from 3 to 4, from 5 to 8 and so on."""
        length = len(self.loss)
        ends = [2**n for n in range(length.bit_length()) if 2**n < length] + [length]
        starts = [0, *ends[:-1]]
        return [
            (start + 1, end, float(self.loss[start:end].mean()))
            for start, end in zip(starts, ends, strict=True)
        ]


@dataclass(frozen=True)
class TextScores:
    """A model on a text: nats per token, and shares of the targets."""

    scores: Scores
    accuracy_top5: float
    targets: int
    positions: Positions | None  # None: not asked for, or no window is full

    def values(self) -> dict[str, float | int]:
        return {
            "loss": self.scores.loss,
            "perplexity": self.scores.perplexity,
            "accuracy": self.scores.accuracy,
            "accuracy_top5": self.accuracy_top5,
            "bits_per_byte": self.scores.bits_per_byte,
            "bits_per_char": self.scores.bits_per_char,
            "scored_tokens": self.targets,
        }


def score_text(
    model: GPT, text: Text, machine: Machine, stride: int | None = None, by_position: bool = False
) -> TextScores:
    """Without a ``stride`` exactly what training says of this split."""
    sums = _Sums(text.length)
    found = _pass(model, text.batches(stride), text, machine, sums)
    plain = not text.packed and stride in (None, text.length)
    if by_position and not plain:
        others, batches = _Sums(text.length), text.full_windows()
        if len(batches):
            _pass(model, batches, text, machine, others)
    else:
        others = sums
    positions = others.positions() if by_position else None
    return TextScores(found, sums.near / sums.targets, sums.targets, positions)


def _pass(model: GPT, batches: Any, text: Text, machine: Machine, sums: _Sums) -> Scores:
    ranked = _Ranked(model)
    return score(ranked, batches, text.info, machine.device, machine.autocast(), watch=sums)


class _Ranked:
    """A model that says of each target, too, whether it is among the five likeliest."""

    def __init__(self, model: GPT) -> None:
        self.model = model
        self.training = model.training
        self.train, self.eval = model.train, model.eval

    def scores(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        rows = self.model.scaled(self.model.hidden(tokens)).flatten(0, 1)
        losses, right, near = token_scores(
            rows, self.model.output_weight, targets.flatten(), top=TOP
        )
        return losses, right.bool(), near.bool()


class _Sums:
    """What the scores do not say, added up batch by batch, in 64 bits."""

    def __init__(self, length: int) -> None:
        self.near = self.targets = self.windows = 0
        self.loss, self.squares = torch.zeros(2, length, dtype=torch.float64)

    def __call__(self, found: tuple[Tensor, ...], counted: Tensor) -> None:
        losses, _, near = (values.view_as(counted).cpu() for values in found)
        counted = counted.cpu()
        self.near += int((near & counted).sum())
        self.targets += int(counted.sum())
        if counted.shape[1] < len(self.loss):
            return
        full = losses[counted.all(dim=1)].double()
        self.windows += len(full)
        self.loss += full.sum(0)
        self.squares += full.square().sum(0)

    def positions(self) -> Positions | None:
        n = self.windows
        if n == 0:
            return None
        mean = self.loss / n
        spread = (self.squares / n - mean.square()).clamp(min=0)
        error = (spread / (n - 1)).sqrt() if n > 1 else torch.full_like(mean, math.nan)
        return Positions(mean.numpy(), error.numpy(), n)
