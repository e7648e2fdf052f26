"""Run the inner loop: train a copy of the base on one edit of a document, and record the outcome.

At a constant rate, by AdamW without weight decay or dropout, the model after k steps does not
depend on how many follow, so the scores after 1, 3, 10 and 30 steps come from one training.
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
FULL_RATE = 0.1  # learning rate of full fine-tuning, relative to that of adapters


def seed_of(*what: Any) -> int:
    """Return a seed that depends only on ``what`` it is for, not on the order of use."""
    return int(fileio.digest(what)[:15], 16)


# --- training on rows

# Map inputs (R, T) and a mask of the n targets that count to their logits (n, V).
Forward = Callable[[Tensor, Tensor], Tensor]


def batches(
    rows: Sequence[Row], tokens: int, rng: np.random.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield inputs and targets (R, T) with exactly ``tokens`` targets, masked or not, forever.

    The rows come in successive random orders.  They are not packed into one sequence, as the model
    would then copy from its context instead of learning.  A row that does not fit is cut, and
    repeated in full at the start of the next step.
    """
    order: list[int] = []
    while True:
        batch: list[Row] = []
        room = tokens
        while room > 0:
            order = order or rng.permutation(len(rows)).tolist()
            row = rows[order[0]]
            if row.targets <= room:
                order.pop(0)
            batch.append(Row(row.ids[: room + 1], row.given))
            room -= batch[-1].targets
        inputs, targets = windows([row.ids for row in batch])
        for wanted, row in zip(targets, batch, strict=True):
            wanted[: row.given] = IGNORED
        yield inputs, targets


def trainable_copy(base: GPT, lora: LoraConfig, seed: int) -> GPT:
    """Return a copy of ``base`` with new adapters, or (rank None) with all weights trainable."""
    model = copy.deepcopy(base).eval().requires_grad_(True)  # eval: no dropout
    if lora.rank is not None:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            add_lora(model, lora)
    return model


def logits_of(model: GPT) -> Forward:
    """Return the ``Forward`` of a GPT."""
    return lambda inputs, counted: model.logits(model.hidden(inputs)[counted])


def training(
    model: Any,
    forward: Forward,
    rows: Sequence[Row],
    rate: float,
    config: InnerConfig | OuterConfig,
    seed: int,
) -> Iterator[float]:
    """Train ``model`` on ``rows``; yield the mean loss of each step's unmasked targets."""
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
    """Hold losses in nats per token on a document's held-out part and on the base's own text."""

    heldout: float
    accuracy: float | None  # on the questions, if there are any
    base: float

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.heldout + self.base)


@dataclass(frozen=True)
class Base:
    """Hold the model that adapts, which never changes, and text to measure forgetting on."""

    run: TrainedRun
    validation: Heldout
    git_commit: str | None = field(default_factory=rundir.git_commit, compare=False)
    _before: dict[str, Score] = field(default_factory=dict, compare=False)

    @cached_property
    def fingerprint(self) -> str:
        """Return the SHA-256 of the weights."""
        sha = hashlib.sha256()
        for name, weight in sorted(self.run.model.state_dict().items()):
            sha.update(name.encode() + weight.cpu().contiguous().numpy().tobytes())
        return sha.hexdigest()

    @cached_property
    def parameters(self) -> int:
        return sum(weight.numel() for weight in self.run.model.parameters())

    def score(self, model: GPT, document: Document) -> Score:
        """Return a model's score, without accuracy if it has diverged."""
        heldout = document.heldout.loss(model)
        accuracy = document.heldout.accuracy(model) if math.isfinite(heldout) else None
        return Score(heldout, accuracy, self.validation.loss(model))

    def before(self, document: Document) -> Score:
        """Return the base's own score, computed once.  Raise RunError if it is not finite."""
        known = document.heldout.fingerprint
        if known not in self._before:
            self._before[known] = self.score(self.run.model, document)
        if not self._before[known].is_finite:
            raise RunError(f"run={self.run.path}: its loss on {document.doc_id} is not finite")
        return self._before[known]


@dataclass(frozen=True)
class Trial:
    """Hold a document, a seed and an edit, if any, with the ``policy`` that wrote it, if any."""

    method: str
    document: Document
    proposal: Proposal | None
    seed: int
    inner: InnerConfig
    policy: Policy | None = None
    iteration: int | None = None

    @property
    def rate(self) -> float:
        """Return the learning rate, 0 if nothing is trained."""
        full = FULL_RATE if self.inner.lora.rank is None else 1.0
        return full * self.proposal.edit.lr if self.proposal else 0.0

    def run_id(self, base: Base, steps: int) -> str:
        """Return a digest of everything that determines the record after ``steps`` steps."""
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
    """Return a record for each number of steps; an empty edit or divergence is an ``error``."""
    document, inner = trial.document, trial.inner
    if trial.proposal is None:
        return [_record(base, trial, 0) | _outcome(base.before(document), base.before(document))]
    edit, model, tokenizer = trial.proposal.edit, base.run.model, base.run.tokenizer
    rows = materialise(
        edit, document, tokenizer, min(model.config.max_seq_len, inner.tokens_per_step)
    )
    if not rows:
        return [_record(base, trial, k) | {"error": "empty edit"} for k in inner.inner_steps]
    last, rank = inner.inner_steps[-1], inner.lora.rank
    seed = seed_of(document.sha256, edit.edit_id, last, rank, trial.seed)
    adapted = trainable_copy(model, inner.lora, seed)
    losses = training(adapted, logits_of(adapted), rows, trial.rate, inner, seed)
    read = [token for row in rows for token in row.ids[1:]]
    about: Record = {"edit_train_tokens": len(read), "wall_s": 0.0, "cpu_s": 0.0}
    about["edit_unknown_tokens"] = sum(token == tokenizer.unknown_id for token in read)
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
    """Return the outcome fields of a record.

    A positive reward is a lower held-out loss, a negative forgetting a lower loss on the base's
    own text.
    """
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
    document, inner, policy, proposal = trial.document, trial.inner, trial.policy, trial.proposal
    edit = proposal.edit if proposal else None
    rank = inner.lora.rank if edit else None
    adapters = lora_parameters(base.run.config.model, rank) if rank else 0
    tokens, n = steps * inner.tokens_per_step, base.parameters
    # frozen weights take 2N FLOPs forward and 2N backward, trained ones 6
    trained = (4 * n + 6 * adapters if rank else 6 * n) * tokens
    read, wrote = (proposal.prompt_tokens, proposal.tokens) if proposal and policy else (0, 0)
    size = policy.parameters if policy and read + wrote else 0  # None: unknown
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
