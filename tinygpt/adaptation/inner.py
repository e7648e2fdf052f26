"""The inner loop: a copy of the base is trained on one edit of a document → a record each k steps.

Constant rate, AdamW without decay, no dropout: so what it is after k steps does not depend on how
many follow, and 1, 3, 10 and 30 steps are snapshots of one run.
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

from tinygpt import fileio, rundir
from tinygpt.adaptation.config import InnerConfig
from tinygpt.adaptation.documents import Document, Heldout, LeftOut, windows
from tinygpt.adaptation.edits import Row, SelfEdit, materialise
from tinygpt.adaptation.records import FIELDS, Record
from tinygpt.config import LoraConfig, RunError
from tinygpt.counting import count_parameters, lora_parameters
from tinygpt.data.datamodule import IGNORED
from tinygpt.model.gpt import GPT
from tinygpt.model.lora import add_lora, merged
from tinygpt.trained import TrainedRun

CLIP = 1.0  # norm of the gradient
WARMUP = 3  # steps, where all weights are trained: Adam's first move each of them by the full rate
FULL_RATE = 0.1  # the rate where all weights are trained, over that of adapters

# --- training on rows


class Score(NamedTuple):
    """Losses in nats per token: of a document's held-out part, of the base's own text."""

    heldout: float
    accuracy: float | None  # of the questions, where the held-out part has any
    base: float


@dataclass(frozen=True)
class Snapshot:
    """The model after ``steps`` steps, which took so many seconds."""

    steps: int
    score: Score
    train_loss: float | None  # of the last of them
    wall_s: float = 0.0
    cpu_s: float = 0.0


@dataclass(frozen=True)
class Inner:
    """Hold the outcome of an inner loop; ``model`` has its adapters in it."""

    model: GPT
    snapshots: list[Snapshot]
    train_loss_first: float | None
    error: str | None  # why there are no snapshots of more steps


def score(model: GPT, document: Document, validation: Heldout) -> Score:
    """Score a model; one that has diverged is not asked any questions."""
    heldout = document.heldout.loss(model)
    accuracy = document.heldout.accuracy(model) if math.isfinite(heldout) else None
    return Score(heldout, accuracy, validation.loss(model))


def batches(
    rows: Sequence[Row], tokens: int, rng: np.random.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield without end inputs and targets (R, T) of exactly ``tokens`` targets, counted or not.

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
        inputs, targets = windows([row.ids for row in taken])
        for wanted, row in zip(targets, taken, strict=True):
            wanted[: len(row.mask)].masked_fill_(torch.tensor(row.mask) == 0, IGNORED)
        yield inputs, targets


def adapt(
    base: GPT,
    rows: Sequence[Row],
    rate: float,
    config: InnerConfig,
    seed: int,
    score: Callable[[GPT], Score],
) -> Inner:
    """Train a copy of ``base`` on ``rows`` and score it after each of ``config.inner_steps``.

    ``base`` is left unchanged.  A row has no more targets than its context and a step can hold.
    ``seed`` decides the adapters and the order of the rows, whatever was drawn before.
    """
    model = copy.deepcopy(base).eval().requires_grad_(True)  # eval: no dropout
    if config.lora.rank is not None:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            add_lora(model, config.lora)
    steps_done = training(
        model,
        lambda inputs, counted: model.logits(model.hidden(inputs)[counted]),
        rows,
        rate,
        config.tokens_per_step,
        seed,
        warmup=WARMUP if config.lora.rank is None else 1,
    )
    snapshots: list[Snapshot] = []
    losses: list[float] = []
    wall = cpu = 0.0
    for steps in range(config.inner_steps[-1] + 1):
        if steps > 0:
            begun, begun_cpu = time.perf_counter(), time.process_time()
            losses.append(next(steps_done))
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


def training(
    model: Any,
    forward: Callable[[Tensor, Tensor], Tensor],
    rows: Sequence[Row],
    rate: float,
    tokens_per_step: int,
    seed: int,
    warmup: int = 1,
) -> Iterator[float]:
    """Train ``model`` on ``rows``; yield each step's loss, the mean of the targets that count.

    ``forward`` takes inputs (R, T) and which targets count, and gives their logits (n, V).
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    device = trained[0].device
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0, fused=True)
    stream = batches(rows, tokens_per_step, np.random.default_rng(seed))
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


def merge(model: GPT, lora: LoraConfig) -> GPT:
    """Return a plain GPT that computes what ``model`` does with its adapters."""
    plain = GPT(model.config, model.vocab_size).to(model.output_weight)
    plain.load_state_dict(merged(model.state_dict(), lora))
    return plain.eval()


# --- trials


@dataclass(frozen=True)
class Base:
    """The model that adapts, never itself changed, and what it may forget."""

    run: TrainedRun
    validation: Heldout
    _before: dict[str, Score] = field(default_factory=dict, compare=False)

    @cached_property
    def fingerprint(self) -> str:
        """The SHA-256 of its weights, wherever they lie."""
        sha = hashlib.sha256()
        for name, weight in sorted(self.run.model.state_dict().items()):
            sha.update(name.encode() + weight.cpu().contiguous().numpy().tobytes())
        return sha.hexdigest()

    @cached_property
    def git_commit(self) -> str | None:
        return rundir.git_commit()

    @property
    def parameters(self) -> int:
        return count_parameters(self.run.config.model, self.run.tokenizer.vocab_size).total

    def before(self, document: Document) -> Score:
        """Return the base's own score, computed once.  Raises RunError where it has diverged."""
        known = document.heldout.fingerprint
        if known not in self._before:
            found = score(self.run.model, document, self.validation)
            if not math.isfinite(found.heldout + found.base):
                raise RunError(f"run={self.run.path}: its loss on {document.doc_id} is not finite")
            self._before[known] = found
        return self._before[known]


@dataclass(frozen=True)
class Origin:
    """Say which policy proposed an edit, and what that cost in tokens."""

    backend: str | None = None
    model: str | None = None
    parameters: int | None = None  # of the model that read and wrote them; None: not known
    iteration: int | None = None
    prompt_tokens: int = 0
    tokens: int = 0
    sft_tokens: int = 0


@dataclass(frozen=True)
class Trial:
    """A document, an edit of it and a seed; without an ``edit`` nothing is done."""

    method: str
    document: Document
    edit: SelfEdit | None
    seed: int
    inner: InnerConfig
    origin: Origin = Origin()

    @property
    def steps(self) -> list[int]:
        return self.inner.inner_steps if self.edit else [0]

    @property
    def rate(self) -> float | None:
        if self.edit is None:
            return None
        return self.edit.lr if self.inner.lora.rank is not None else FULL_RATE * self.edit.lr

    def run_id(self, base: Base, steps: int) -> str:
        """Return the digest of all that decides the record after ``steps`` steps."""
        document, edit = self.document, self.edit
        return fileio.digest(
            {
                "base": [base.fingerprint, base.validation.fingerprint],
                "document": [document.sha256, document.context_ids, document.heldout.fingerprint],
                "split": document.split,
                "method": [self.method, self.origin.iteration],
                "edit": edit.edit_id if edit else None,
                "inner": dataclasses.asdict(self.inner) if edit else None,  # nothing is done
                "steps": steps,
                "seed": self.seed,
            }
        )

    def run_ids(self, base: Base) -> list[str]:
        return [self.run_id(base, steps) for steps in self.steps]


def run_trial(base: Base, trial: Trial) -> list[Record]:
    """Return a record for each of the trial's steps.

    An edit that comes out empty and an inner loop that diverges are records too, with an ``error``.
    """
    model, document, edit, inner = base.run.model, trial.document, trial.edit, trial.inner
    if edit is None:
        return [_record(base, trial, 0, Snapshot(0, base.before(document), None))]
    length = min(model.config.max_seq_len, inner.tokens_per_step)
    rows = materialise(edit, document, base.run.tokenizer, length)
    if not rows:
        return [_record(base, trial, n) | {"error": "empty edit"} for n in trial.steps]
    # a seed of its own, so that trials can be done in any order
    what = [document.sha256, edit.edit_id, inner.inner_steps[-1], inner.lora.rank, trial.seed]
    assert trial.rate is not None
    found = adapt(
        model,
        rows,
        trial.rate,
        inner,
        int(fileio.digest(what)[:15], 16),
        lambda adapted: score(adapted, document, base.validation),
    )
    unknown = base.run.tokenizer.unknown_id
    lacking = sum(row.ids[1:].count(unknown) for row in rows) if unknown is not None else 0
    first = found.train_loss_first
    first = first if first is not None and math.isfinite(first) else None
    reached = {snapshot.steps: snapshot for snapshot in found.snapshots}
    return [
        _record(base, trial, steps, reached.get(steps))
        | {
            "edit_train_tokens": sum(len(row.mask) for row in rows),
            "edit_unknown_tokens": lacking,
            "train_loss_first": first if steps else None,
            "error": None if steps in reached else found.error,
        }
        for steps in trial.steps
    ]


def _record(base: Base, trial: Trial, steps: int, after: Snapshot | None = None) -> Record:
    document, edit, origin, inner = trial.document, trial.edit, trial.origin, trial.inner
    rank = inner.lora.rank if edit else None
    adapters = lora_parameters(base.run.config.model, rank) if rank else 0
    tokens = steps * inner.tokens_per_step
    n = base.parameters
    # frozen weights have no gradient of their own: 2N forward, 2N backward, and the adapters' 6
    flops: float | None = (4 * n + 6 * adapters if rank else 6 * n) * tokens
    if policy_tokens := origin.prompt_tokens + origin.tokens:
        size = origin.parameters  # not known of every model that wrote an edit
        flops = 2 * size * policy_tokens + flops if size and flops is not None else None
    before = base.before(document)
    record = dict.fromkeys(FIELDS) | {
        "run_id": trial.run_id(base, steps),
        "git_commit": base.git_commit,
        "seed": trial.seed,
        "task": document.task,
        "method": trial.method,
        "iteration": origin.iteration,
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
        "lr": trial.rate,
        "batch_tokens": inner.tokens_per_step,
        "policy_backend": origin.backend,
        "policy_model": origin.model,
        "policy_prompt_tokens": origin.prompt_tokens,
        "policy_tokens": origin.tokens,
        "tokens_processed": tokens,
        "eval_tokens": document.heldout.tokens,
        "sft_tokens": origin.sft_tokens,
        "flops_est": flops,
        "base_parameters": n,
        "heldout_before": before.heldout,
        "base_before": before.base,
        "accuracy_before": before.accuracy,
        "doc_unknown_tokens": document.unknown,
        "device": str(base.run.model.output_weight.device),
    }
    if after is None:
        return record
    # both signed: a reward above 0 is a lower held-out loss, a forgetting below 0 a lower loss on
    # the base's own text
    return record | {
        "heldout_after": after.score.heldout,
        "delta_val_loss": after.score.heldout - before.heldout,
        "reward": before.heldout - after.score.heldout,
        "base_after": after.score.base,
        "forgetting": after.score.base - before.base,
        "accuracy_after": after.score.accuracy,
        "train_loss_last": after.train_loss,
        "wall_s": after.wall_s,
        "cpu_s": after.cpu_s,
    }


def record_left_out(base: Base, left_out: LeftOut, task: str) -> Record:
    """Return the record of a document that was skipped."""
    return dict.fromkeys(FIELDS) | {
        "run_id": fileio.digest([base.fingerprint, dataclasses.asdict(left_out)]),
        "git_commit": base.git_commit,
        "task": task,
        "doc_id": left_out.doc_id,
        "doc_sha256": left_out.sha256,
        "base_parameters": base.parameters,
        "error": f"left out: {left_out.error}",
    }
