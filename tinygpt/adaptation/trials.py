"""A trial: a document, an edit of it and a seed → a record for each snapshot of the inner loop."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from dataclasses import dataclass, field
from functools import cached_property

from tinygpt import fileio, rundir
from tinygpt.adaptation.config import InnerConfig
from tinygpt.adaptation.documents import Document, Heldout, LeftOut
from tinygpt.adaptation.edits import SelfEdit, materialise
from tinygpt.adaptation.inner import Inner, Score, Snapshot, adapt, row_length, score
from tinygpt.adaptation.records import Record, blank
from tinygpt.config import RunError
from tinygpt.counting import count_parameters, lora_parameters
from tinygpt.trained import TrainedRun

OF_FULL = 0.1  # the rate where all weights are trained, over that of adapters


@dataclass(frozen=True)
class Base:
    """The model that adapts, never itself changed, and what it may forget."""

    run: TrainedRun
    validation: Heldout
    _before: dict[str, Score] = field(default_factory=dict, compare=False)

    @cached_property
    def fingerprint(self) -> str:
        """Of its weights, wherever they lie."""
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
        """Of the base itself; computed once.  Raises RunError where it has diverged."""
        known = document.heldout.fingerprint
        if known not in self._before:
            found = score(self.run.model, document, self.validation)
            if not math.isfinite(found.heldout + found.base):
                raise RunError(f"run={self.run.path}: its loss on {document.doc_id} is not finite")
            self._before[known] = found
        return self._before[known]


@dataclass(frozen=True)
class Origin:
    """Who proposed an edit, and what that cost in tokens."""

    backend: str | None = None
    model: str | None = None
    parameters: int | None = None  # of the model that read and wrote them; None: not known
    iteration: int | None = None
    prompt_tokens: int = 0
    tokens: int = 0
    sft_tokens: int = 0


@dataclass(frozen=True)
class Trial:
    """``edit`` None: nothing is done, and the one record is of no steps."""

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
    def inner_seed(self) -> int:
        """Of its own, so that trials can be done in any order."""
        inner = self.inner
        edit_id = self.edit.edit_id if self.edit else None
        what = [self.document.sha256, edit_id, inner.inner_steps[-1], inner.lora.rank, self.seed]
        return int(fileio.digest(what)[:15], 16)

    @property
    def rate(self) -> float | None:
        if self.edit is None or self.inner.lora.rank is not None:
            return self.edit.lr if self.edit else None
        return OF_FULL * self.edit.lr

    def run_id(self, base: Base, steps: int) -> str:
        """Of all that decides the record after ``steps`` steps."""
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
    """A record for each of the trial's steps.  An edit that comes out empty and an inner loop that
    diverges are records too, with an ``error``."""
    if trial.edit is None:
        return [_record(base, trial, 0, Snapshot(0, base.before(trial.document), None, 0.0, 0.0))]
    model, document = base.run.model, trial.document
    length = row_length(model, trial.inner)
    rows = materialise(trial.edit, document, base.run.tokenizer, length)
    if not rows:
        return [_record(base, trial, n) | {"error": "empty edit"} for n in trial.steps]
    assert trial.rate is not None
    found = adapt(
        model,
        rows,
        trial.rate,
        trial.inner,
        trial.inner_seed,
        lambda adapted: score(adapted, document, base.validation),
    )
    unique = sum(len(row.mask) for row in rows)
    unknown = base.run.tokenizer.unknown_id
    lacking = sum(row.ids[1:].count(unknown) for row in rows) if unknown is not None else 0
    of_rows = {"edit_train_tokens": unique, "edit_unknown_tokens": lacking}
    return [record | of_rows for record in _snapshots(base, trial, found)]


def _snapshots(base: Base, trial: Trial, found: Inner) -> list[Record]:
    reached = {snapshot.steps: snapshot for snapshot in found.snapshots}
    records = []
    for steps in trial.steps:
        record = _record(base, trial, steps, reached.get(steps))
        first = found.train_loss_first if steps else None
        first = first if first is not None and math.isfinite(first) else None
        error = None if steps in reached else found.error
        records.append(record | {"train_loss_first": first, "error": error})
    return records


def _record(base: Base, trial: Trial, steps: int, after: Snapshot | None = None) -> Record:
    document, edit, origin, inner = trial.document, trial.edit, trial.origin, trial.inner
    lora = inner.lora if edit else None
    rank = lora.rank if lora else None
    model = base.run.config.model
    adapters = lora_parameters(model, rank) if rank else 0
    tokens = steps * inner.tokens_per_step
    n = base.parameters
    # frozen weights have no gradient of their own: 2N forward, 2N backward, and the adapters' 6
    of_training = (4 * n + 6 * adapters if rank else 6 * n) * tokens
    before = base.before(document)
    record = blank() | {
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
        "edit_text_sha256": edit.text_sha256 if edit else None,
        "inner_steps": steps,
        "lora_rank": rank,
        "lora_alpha": (lora.alpha or 2 * rank) if lora and rank else None,
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
        "flops_est": _flops_of(origin, of_training),
        "base_parameters": n,
        "heldout_before": before.heldout,
        "base_before": before.base,
        "accuracy_before": before.accuracy,
        "doc_unknown_tokens": document.unknown,
        "device": str(base.run.model.output_weight.device),
    }
    return record | _outcome(before, after) if after else record


def _flops_of(origin: Origin, of_training: float) -> float | None:
    """Of an edit and the steps on it; not known where a model of unknown size wrote it."""
    tokens = origin.prompt_tokens + origin.tokens
    if not tokens:
        return of_training
    return 2 * origin.parameters * tokens + of_training if origin.parameters else None


def _outcome(before: Score, after: Snapshot) -> Record:
    """What was gained and forgotten, both signed: a reward above 0 is a lower held-out loss, a
    forgetting below 0 a lower loss on the base's own text."""
    change = after.score.heldout - before.heldout
    return {
        "heldout_after": after.score.heldout,
        "delta_val_loss": change,
        "reward": before.heldout - after.score.heldout,
        "base_after": after.score.base,
        "forgetting": after.score.base - before.base,
        "accuracy_after": after.score.accuracy,
        "train_loss_last": after.train_loss,
        "wall_s": after.wall_s,
        "cpu_s": after.cpu_s,
    }


def record_left_out(base: Base, left_out: LeftOut, task: str) -> Record:
    """A document that was passed over is an outcome too."""
    return blank() | {
        "run_id": fileio.digest([base.fingerprint, dataclasses.asdict(left_out)]),
        "git_commit": base.git_commit,
        "task": task,
        "doc_id": left_out.doc_id,
        "doc_sha256": left_out.sha256,
        "base_parameters": base.parameters,
        "error": f"left out: {left_out.error}",
    }
