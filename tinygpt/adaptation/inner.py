"""The inner loop: train a copy of the base on one edit of a document, and record what it does.

Constant rate, AdamW without weight decay, no dropout: what a model is after k steps does not
depend on how many follow, so 1, 3, 10 and 30 steps are snapshots of one training.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tinygpt import fileio
from tinygpt.adaptation.config import InnerConfig, OuterConfig
from tinygpt.adaptation.documents import Document, Heldout, windows
from tinygpt.adaptation.edits import Policy, Proposal, Row, materialise
from tinygpt.adaptation.records import FIELDS, Record
from tinygpt.config import LoraConfig, RunError
from tinygpt.config.counting import lora_parameters
from tinygpt.data.datamodule import IGNORED
from tinygpt.model.gpt import GPT
from tinygpt.model.lora import add_lora
from tinygpt.runs import rundir
from tinygpt.runs.load import TrainedRun

CLIP = 1.0  # norm of the gradient
WARMUP = 3  # steps, if all weights are trained: Adam's first step moves each by the full rate
FULL_RATE = 0.1  # the rate if all weights are trained, over that of adapters


def seed_of(*what: Any) -> int:
    """Return a seed for each thing that is drawn, so that the order of drawing does not matter."""
    return int(fileio.digest(what)[:15], 16)


# --- training on rows

# From inputs (R, T), and which of their targets count, to the logits (n, V) of these.
Forward = Callable[[Tensor, Tensor], Tensor]


def batches(
    rows: Sequence[Row], tokens: int, rng: np.random.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield without end inputs and targets (R, T) of exactly ``tokens`` targets, counted or not.

    The rows come in one random order after the other, each with a context of its own: if packed
    one behind the other, a copy would be read from the context instead of learned.  The last row
    of a step is cut where the step is full, and stands first in the next, whole.
    """
    order: list[int] = []
    while True:
        taken: list[Row] = []
        room = tokens
        while room > 0:
            order = order or rng.permutation(len(rows)).tolist()
            row = rows[order[0]]
            if row.targets <= room:
                order.pop(0)
            taken.append(Row(row.ids[: room + 1], row.given))
            room -= taken[-1].targets
        inputs, targets = windows([row.ids for row in taken])
        for wanted, row in zip(targets, taken, strict=True):
            wanted[: row.given] = IGNORED
        yield inputs, targets


def trainable_copy(base: GPT, lora: LoraConfig, seed: int) -> GPT:
    """Return a copy with fresh adapters, or of which all weights are trained (rank null)."""
    model = copy.deepcopy(base).eval().requires_grad_(True)  # eval: no dropout
    if lora.rank is not None:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            add_lora(model, lora)
    return model


def logits_of(model: GPT) -> Forward:
    """Return how a GPT computes these logits."""
    return lambda inputs, counted: model.logits(model.hidden(inputs)[counted])


def training(
    model: Any,
    forward: Forward,
    rows: Sequence[Row],
    rate: float,
    config: InnerConfig | OuterConfig,
    seed: int,
) -> Iterator[float]:
    """Train ``model`` on ``rows``; yield each step's loss, the mean of the targets that count.  A
    row has no more targets than the context and a step can hold."""
    trained = [p for p in model.parameters() if p.requires_grad]
    device, warmup = trained[0].device, WARMUP if config.lora.rank is None else 1
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0, fused=True)
    stream = batches(rows, config.tokens_per_step, np.random.default_rng(seed))
    for step, (inputs, targets) in enumerate(stream, start=1):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, step / warmup)
        counted = (targets != IGNORED).to(device)
        loss = F.cross_entropy(forward(inputs.to(device), counted), targets.to(device)[counted])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        yield float(loss.detach())


# --- trials


class Score(NamedTuple):
    """Losses in nats per token: of a document's held-out part, of the base's own text."""

    heldout: float
    accuracy: float | None  # of the questions, if the held-out part has any
    base: float

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.heldout + self.base)


@dataclass(frozen=True)
class Base:
    """The model that adapts, never itself changed, and what it may forget."""

    run: TrainedRun
    validation: Heldout
    git_commit: str | None = field(default_factory=rundir.git_commit, compare=False)
    _before: dict[str, Score] = field(default_factory=dict, compare=False)

    @cached_property
    def fingerprint(self) -> str:
        """The SHA-256 of its weights, on any device."""
        sha = hashlib.sha256()
        for name, weight in sorted(self.run.model.state_dict().items()):
            sha.update(name.encode() + weight.cpu().contiguous().numpy().tobytes())
        return sha.hexdigest()

    @cached_property
    def parameters(self) -> int:
        return sum(weight.numel() for weight in self.run.model.parameters())

    def score(self, model: GPT, document: Document) -> Score:
        """Score a model; one that has diverged is not asked any questions."""
        heldout = document.heldout.loss(model)
        accuracy = document.heldout.accuracy(model) if math.isfinite(heldout) else None
        return Score(heldout, accuracy, self.validation.loss(model))

    def before(self, document: Document) -> Score:
        """Return the base's own score, computed once.  Raises RunError where it has diverged."""
        known = document.heldout.fingerprint
        if known not in self._before:
            found = self.score(self.run.model, document)
            if not found.is_finite:
                raise RunError(f"run={self.run.path}: its loss on {document.doc_id} is not finite")
            self._before[known] = found
        return self._before[known]


@dataclass(frozen=True)
class Trial:
    """A document, an edit of it, and a seed; without a ``proposal`` nothing is trained.  ``policy``
    is who wrote the edit, if anyone did."""

    method: str
    document: Document
    proposal: Proposal | None
    seed: int
    inner: InnerConfig
    policy: Policy | None = None
    iteration: int | None = None

    @property
    def rate(self) -> float:
        """Return the learning rate; 0 if nothing is trained."""
        full = FULL_RATE if self.inner.lora.rank is None else 1.0
        return full * self.proposal.edit.lr if self.proposal else 0.0

    def run_id(self, base: Base, steps: int) -> str:
        """Return the digest of all that decides the record after ``steps`` steps."""
        document, proposal = self.document, self.proposal
        return fileio.digest(
            {
                "base": [base.fingerprint, base.validation.fingerprint],
                "document": [document.sha256, document.context_ids, document.heldout.fingerprint],
                "split": document.split,
                "method": [self.method, self.iteration],
                "edit": proposal.edit.edit_id if proposal else None,
                "inner": dataclasses.asdict(self.inner) if proposal else None,
                "steps": steps,
                "seed": self.seed,
            }
        )


def run_trial(base: Base, trial: Trial) -> list[Record]:
    """Return a record for each of the trial's steps.  An edit that comes out empty and a training
    that diverges are records too, with an ``error``."""
    document, inner = trial.document, trial.inner
    if trial.proposal is None:
        return [_record(base, trial, 0) | _outcome(base.before(document), base.before(document))]
    edit, model, tokenizer = trial.proposal.edit, base.run.model, base.run.tokenizer
    length = min(model.config.max_seq_len, inner.tokens_per_step)
    rows = materialise(edit, document, tokenizer, length)
    if not rows:
        return [
            _record(base, trial, steps) | {"error": "empty edit"} for steps in inner.inner_steps
        ]
    last, rank = inner.inner_steps[-1], inner.lora.rank
    seed = seed_of(document.sha256, edit.edit_id, last, rank, trial.seed)
    adapted = trainable_copy(model, inner.lora, seed)
    losses = training(adapted, logits_of(adapted), rows, trial.rate, inner, seed)
    read = [token for row in rows for token in row.ids[1:]]
    about: Record = {
        "edit_train_tokens": len(read),
        "edit_unknown_tokens": sum(token == tokenizer.unknown_id for token in read),
        "train_loss_first": None,
        "train_loss_last": None,
        "wall_s": 0.0,
        "cpu_s": 0.0,
    }
    records: list[Record] = []
    error: str | None = None
    for steps in range(last + 1):
        if steps > 0 and error is None:
            wall, cpu = time.perf_counter(), time.process_time()
            loss = next(losses)
            about["wall_s"] += time.perf_counter() - wall
            about["cpu_s"] += time.process_time() - cpu
            if not math.isfinite(loss):
                error = f"diverged at step {steps}"
            elif steps == 1:
                about["train_loss_first"] = loss
            about["train_loss_last"] = loss
        if steps not in inner.inner_steps:
            continue
        record = _record(base, trial, steps) | about
        if error is None:
            after = base.score(adapted, document)
            if after.is_finite:
                record |= _outcome(base.before(document), after)
            else:
                error = f"diverged at step {steps}"
        if error is not None:
            record |= {"error": error, "train_loss_last": None, "wall_s": None, "cpu_s": None}
        records.append(record)
    return records


def _outcome(before: Score, after: Score) -> Record:
    """Return what a record says of a model.  Both differences are signed: a reward above 0 is a
    lower held-out loss, a forgetting below 0 a lower loss on the base's own text."""
    return {
        "heldout_after": after.heldout,
        "delta_val_loss": after.heldout - before.heldout,
        "reward": before.heldout - after.heldout,
        "base_after": after.base,
        "forgetting": after.base - before.base,
        "accuracy_after": after.accuracy,
    }


def _record(base: Base, trial: Trial, steps: int) -> Record:
    """Return the record of a trial without its outcome."""
    document, inner, policy = trial.document, trial.inner, trial.policy
    edit = trial.proposal.edit if trial.proposal else None
    rank = inner.lora.rank if edit else None
    adapters = lora_parameters(base.run.config.model, rank) if rank else 0
    tokens, n = steps * inner.tokens_per_step, base.parameters
    # frozen weights have no gradient of their own: 2N forward, 2N backward, and the adapters' 6
    trained = (4 * n + 6 * adapters if rank else 6 * n) * tokens
    read = trial.proposal.prompt_tokens if trial.proposal and policy else 0
    wrote = trial.proposal.tokens if trial.proposal and policy else 0
    size = policy.parameters if policy and read + wrote else 0  # None: not known of this model
    before = base.before(document)
    return dict.fromkeys(FIELDS) | {
        "run_id": trial.run_id(base, steps),
        "git_commit": base.git_commit,
        "seed": trial.seed,
        "task": "new_facts" if document.heldout.questions else "domain_shift",
        "method": trial.method,
        "iteration": trial.iteration,
        "doc_id": document.doc_id,
        "doc_sha256": document.sha256,
        "split": document.split,
        "edit_id": edit.edit_id if edit else None,
        "edit": dataclasses.asdict(edit) if edit else None,
        "edit_text_sha256": fileio.digest(edit.text) if edit else None,
        "inner_steps": steps,
        "lora_rank": rank,
        "lora_alpha": (inner.lora.alpha or 2 * rank) if rank else None,
        "lora_params": adapters,
        "lr": trial.rate if edit else None,
        "batch_tokens": inner.tokens_per_step,
        "policy_backend": policy.backend if policy else None,
        "policy_model": policy.model if policy else None,
        "policy_prompt_tokens": read,
        "policy_tokens": wrote,
        "tokens_processed": tokens,
        "eval_tokens": document.heldout.tokens,
        "sft_tokens": policy.sft_tokens if policy else 0,
        "flops_est": None if size is None else 2 * size * (read + wrote) + trained,
        "base_parameters": n,
        "heldout_before": before.heldout,
        "base_before": before.base,
        "accuracy_before": before.accuracy,
        "doc_unknown_tokens": document.unknown,
        "device": str(base.run.model.output_weight.device),
    }
