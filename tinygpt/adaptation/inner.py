"""The inner loop: a copy of a model is trained on the rows of one edit and scored on the way.

Constant rate, AdamW without decay, no dropout: so what it is after k steps does not depend on how
many follow, and 1, 3, 10 and 30 steps are snapshots of one run.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tinygpt.adaptation.config import InnerConfig
from tinygpt.adaptation.documents import Document, Heldout
from tinygpt.adaptation.edits import Row
from tinygpt.config import LoraConfig
from tinygpt.data.datamodule import IGNORED
from tinygpt.model.gpt import GPT
from tinygpt.model.lora import add_lora, merged

CLIP = 1.0  # norm of the gradient
WARMUP = 3  # steps, where all weights are trained: Adam's first move each of them by the full rate


class Score(NamedTuple):
    """Losses in nats per token: of a document's held-out part, of the base's own text."""

    heldout: float
    accuracy: float | None  # of the questions, where the held-out part has any
    base: float


@dataclass(frozen=True)
class Snapshot:
    """After ``steps`` steps, which took so many seconds; ``train_loss`` of the last of them."""

    steps: int
    score: Score
    train_loss: float | None
    wall_s: float
    cpu_s: float


@dataclass(frozen=True)
class Inner:
    """``error``: why there are no snapshots of more steps.  ``model`` has its adapters in it."""

    model: GPT
    snapshots: list[Snapshot]
    train_loss_first: float | None
    error: str | None


def score(model: GPT, document: Document, validation: Heldout) -> Score:
    """A model that has diverged is not asked any questions."""
    heldout = document.heldout.loss(model)
    accuracy = document.heldout.accuracy(model) if math.isfinite(heldout) else None
    return Score(heldout, accuracy, validation.loss(model))


def row_length(model: GPT, config: InnerConfig) -> int:
    """The most targets of a row: what both the context and a step can hold."""
    return min(model.config.max_seq_len, config.tokens_per_step)


def batches(
    rows: Sequence[Row], tokens: int, rng: np.random.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Without end, inputs and targets (R, T) of exactly ``tokens`` targets, counted or not.

    The rows come in one random order after the other, each behind a beginning of its own: packed
    behind one another a copy would be read off the context instead of learned.  The last row of a
    step is cut where it is full, and stands first in the next, whole.
    """
    order: list[int] = []
    while True:
        taken: list[Row] = []
        room = tokens
        while room > 0:
            order = order or rng.permutation(len(rows)).tolist()
            row = rows[order[0]]
            if len(row.mask) <= room:
                order.pop(0)
            taken.append(Row(row.ids[: room + 1], row.mask[:room]))
            room -= len(taken[-1].mask)
        yield _as_tensors(taken)


def _as_tensors(rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    inputs = torch.zeros(len(rows), max(len(row.mask) for row in rows), dtype=torch.int64)
    targets = torch.full_like(inputs, IGNORED)
    for n, row in enumerate(rows):
        ids, counted = torch.tensor(row.ids), torch.tensor(row.mask, dtype=torch.bool)
        inputs[n, : len(row.mask)] = ids[:-1]
        targets[n, : len(row.mask)] = ids[1:].masked_fill(~counted, IGNORED)
    return inputs, targets


def adapt(
    base: GPT,
    rows: Sequence[Row],
    rate: float,
    config: InnerConfig,
    seed: int,
    score: Callable[[GPT], Score],
) -> Inner:
    """Trains a copy of ``base`` on ``rows``, of ``row_length`` targets at most, and scores it after
    each of ``config.inner_steps``; ``base`` stays as it is.

    ``seed`` decides the adapters and the order of the rows, whatever was drawn before.
    """
    model = _copied(base, config.lora, seed)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0, fused=True)
    warmup = WARMUP if config.lora.rank is None else 1
    stream = batches(rows, config.tokens_per_step, np.random.default_rng(seed))
    snapshots: list[Snapshot] = []
    losses: list[float] = []
    wall = cpu = 0.0
    for steps in range(config.inner_steps[-1] + 1):
        if steps > 0:
            begun, begun_cpu = time.perf_counter(), time.process_time()
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1.0, steps / warmup)
            losses.append(_step(model, trained, optimizer, *next(stream)))
            wall, cpu = wall + time.perf_counter() - begun, cpu + time.process_time() - begun_cpu
        if losses and not math.isfinite(losses[-1]):
            return Inner(model, snapshots, losses[0], f"diverged at step {steps}")
        if steps in config.inner_steps:
            found = score(model)
            if not math.isfinite(found.heldout + found.base):
                return Inner(model, snapshots, losses[0], f"diverged at step {steps}")
            last = losses[-1] if losses else None
            snapshots.append(Snapshot(steps, found, last, wall, cpu))
    return Inner(model, snapshots, losses[0] if losses else None, None)


def _copied(base: GPT, lora: LoraConfig, seed: int) -> GPT:
    """In evaluation mode, so without dropout; the adapters' beginning is that of ``seed``."""
    model = copy.deepcopy(base).eval().requires_grad_(True)
    if lora.rank is not None:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            add_lora(model, lora)
    return model


def _step(
    model: GPT,
    trained: Sequence[Tensor],
    optimizer: torch.optim.Optimizer,
    inputs: Tensor,
    targets: Tensor,
) -> float:
    """One step; its loss, the mean of the targets that count, in nats."""
    device = model.output_weight.device
    counted = (targets != IGNORED).to(device)
    hidden = model.hidden(inputs.to(device))[counted]  # (n, C)
    loss = F.cross_entropy(model.logits(hidden), targets.to(device)[counted])
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(trained, CLIP)
    optimizer.step()
    return float(loss.detach())


def merge(model: GPT, lora: LoraConfig) -> GPT:
    """A plain GPT that computes what ``model`` does with its adapters."""
    plain = GPT(model.config, model.vocab_size).to(model.output_weight)
    plain.load_state_dict(merged(model.state_dict(), lora))
    return plain.eval()
