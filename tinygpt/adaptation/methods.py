"""What each method trains on: a directive whose rate is tuned, or a policy's edits.

A score is the reward after the most steps, less ``forgetting_weight`` times what was forgotten.
Rates are chosen by their mean score on the tune documents; the test documents are
looked at once, with what was chosen.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tinygpt import fileio
from tinygpt.adaptation.config import AdaptConfig, methods_of
from tinygpt.adaptation.documents import Document
from tinygpt.adaptation.edits import SelfEdit, read
from tinygpt.adaptation.policies import Policy, Proposal
from tinygpt.adaptation.records import LinesFile, Record, RecordsFile
from tinygpt.adaptation.trials import Base, Origin, Trial, run_trial
from tinygpt.adaptation.writers import seed_of
from tinygpt.config import LoraConfig

log = logging.getLogger("tinygpt")

TEXTS = 4  # of a document, about, where a method has text of the policy's
SOURCES = {
    "lora_doc": "doc",
    "lora_edit": "edit",
    "lora_doc+edit": "both",
    "oracle": "both",
    "full_ft_doc": "doc",
}
OUTCOMES = ("reward", "forgetting")


class Tried(NamedTuple):
    """A directive and its mean score on the tune documents."""

    edit: SelfEdit
    score: float


@dataclass
class Study:
    """Its records and edits so far; what is there is not computed again.

    ``advance`` is called with the number of new records.
    """

    config: AdaptConfig
    base: Base
    documents: Sequence[Document]
    policy: Policy
    records: RecordsFile
    edits: LinesFile
    policies: Path  # the folder of those that were trained
    advance: Callable[[int], None] = lambda count: None
    # Records by run id; edits by what they were asked for.
    known: dict[str, Record] = field(default_factory=dict, init=False)
    _proposed: dict[str, list[Proposal]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        for file in (self.records, self.edits):
            file.mend()
        self.known = {record["run_id"]: record for record in self.records.read()}
        for line in self.edits.read():
            proposal = Proposal(read(line["edit"]), line["prompt_tokens"], line["tokens"])
            self._proposed.setdefault(line["key"], []).append(proposal)

    def split(self, name: str) -> list[Document]:
        return [document for document in self.documents if document.split == name]

    def keep(self, records: Iterable[Record]) -> None:
        """Those that are new, at once."""
        new = {r["run_id"]: r for r in records if r["run_id"] not in self.known}
        self.records.append(list(new.values()), sync=True)
        self.known |= new
        self.advance(len(new))

    def outcome(self, trial: Trial) -> list[Record]:
        """From the file, else anew; not kept yet."""
        ids = trial.run_ids(self.base)
        if all(run_id in self.known for run_id in ids):
            return [self.known[run_id] for run_id in ids]
        return run_trial(self.base, trial)

    def tested(self, method: str) -> dict[int, list[Record]]:
        """Its records of test documents, by steps."""
        found: dict[int, list[Record]] = {}
        for record in self.known.values():
            if (record["method"], record["split"]) == (method, "test"):
                found.setdefault(record["inner_steps"], []).append(record)
        return found

    def score(self, records: Sequence[Record]) -> float:
        """Of a trial; -inf where it has no result."""
        last = records[-1]
        if last["error"] is not None:
            return -math.inf
        forgotten = max(0.0, last["forgetting"])
        return float(last["reward"] - self.config.tuning.forgetting_weight * forgotten)

    def proposed(
        self, key: str, document: Document, make: Callable[[], list[Proposal]]
    ) -> list[Proposal]:
        """From the file, else anew and kept."""
        key = f"{key} {document.sha256}"
        if key not in self._proposed:
            made = make()
            about = {"key": key, "doc_id": document.doc_id, "doc_sha256": document.sha256}
            lines = [about | dataclasses.asdict(proposal) for proposal in made]
            self.edits.append(lines, sync=True)
            self._proposed[key] = made
        return self._proposed[key]

    def written(self, edit: SelfEdit, document: Document) -> Proposal:
        """The directive with text of the untrained policy, the same for all rates."""
        if edit.source == "doc":
            return Proposal(edit)
        plain = SelfEdit("edit", text_ops=edit.text_ops, n=edit.n)
        seed = seed_of(self.config.seed, "text", document.sha256, edit.text_ops, edit.n)
        (text,) = self.proposed(
            f"text {'+'.join(edit.text_ops)} {edit.n}",
            document,
            lambda: [self.policy.with_text(plain, document, seed=seed)],
        )
        return dataclasses.replace(text, edit=dataclasses.replace(edit, text=text.edit.text))

    def trial(self, method: str, directive: SelfEdit | None, document: Document) -> Trial:
        """Of a method whose directive is known."""
        inner = self.config.inner
        if method == "full_ft_doc":
            inner = dataclasses.replace(inner, lora=LoraConfig())
        if directive is None or method == "oracle":
            edit = directive and dataclasses.replace(directive, text=list(document.oracle))
            return Trial(method, document, edit, self.config.seed, inner)
        found = self.written(directive, document)
        origin = Origin()
        if found.edit.text:
            origin = self.origin(self.policy, found, None)
        return Trial(method, document, found.edit, self.config.seed, inner, origin)

    def sampled(
        self, policy: Policy, iteration: int, document: Document, count: int
    ) -> list[Proposal]:
        """Edits of a policy; it explores on train documents alone."""
        outer = self.config.outer
        explore = outer.explore_later if iteration else outer.explore
        explore = explore if document.split == "train" else 0.0
        seed = seed_of(self.config.seed, "sampled", iteration, document.sha256)
        return self.proposed(
            f"restem_it{iteration} {document.split}",
            document,
            lambda: policy.propose(document, count, seed=seed, explore=explore),
        )

    def trial_of(
        self, policy: Policy, iteration: int, document: Document, found: Proposal, number: int = 0
    ) -> Trial:
        """Of an edit that a policy proposed; ``number`` tells trainings on it apart."""
        origin = self.origin(policy, found, iteration)
        method, seed = f"restem_it{iteration}", self.config.seed + number
        return Trial(method, document, found.edit, seed, self.config.inner, origin)

    def origin(self, policy: Policy, found: Proposal, iteration: int | None) -> Origin:
        who = (policy.backend, policy.model, policy.parameters, iteration)
        return Origin(*who, found.prompt_tokens, found.tokens, policy.sft_tokens)


def run_methods(study: Study) -> None:
    """All methods of the study, one after the other."""
    for method in methods_of(study.config):
        if method == "restem":
            learn(study)
            continue
        directive = tune(method, study)
        for document in study.split("test"):
            study.keep(study.outcome(study.trial(method, directive, document)))
        _say(study, method)


def tune(method: str, study: Study) -> SelfEdit | None:
    """The directive of ``method`` whose rate has the best score on the tune documents; of ``none``
    None."""
    if method == "none":
        return None
    tried: list[Tried] = []
    candidates = _candidates(method, study)
    if not study.split("tune"):  # allowed where there is one rate
        return candidates[0]
    for edit in candidates:
        scores = []
        for document in study.split("tune"):
            records = study.outcome(study.trial(method, edit, document))
            study.keep(records)
            scores.append(study.score(records))
        tried.append(Tried(edit, float(np.mean(scores))))
    chosen = max(tried, key=lambda one: one.score)
    log.info("tuned   %s: %s", method, _told(chosen, tried))
    return chosen.edit


def _candidates(method: str, study: Study) -> list[SelfEdit]:
    ops, source = list(study.policy.ops), SOURCES[method]
    plain = SelfEdit(source, ops, n=max(1, TEXTS // len(ops))) if source != "doc" else SelfEdit()
    return [dataclasses.replace(plain, lr=rate) for rate in study.config.tuning.learning_rates]


def _told(chosen: Tried, tried: Sequence[Tried]) -> str:
    """The choice and its score, and beside it those of other rates."""
    edit = chosen.edit
    rates = sorted({one.edit.lr for one in tried})
    ends = {rates[0]: ", the lowest tried", rates[-1]: ", the highest tried"}
    end = ends.get(edit.lr, "") if len(rates) > 1 else ""
    rest = [f"{one.edit.lr:g} {one.score:+.3f}" for one in tried if one is not chosen]
    others = f" ({', '.join(rest)})" if rest else ""
    return f"{edit.source}, rate {edit.lr:g}{end}: {chosen.score:+.3f}{others}"


def _say(study: Study, method: str) -> None:
    """The means over the test documents after each number of steps."""
    parts = []
    for steps, records in study.tested(method).items():
        good = [record for record in records if record["error"] is None]
        if not good:
            parts.append(f"k={steps} no result")
            continue
        reward, forgetting = (np.mean([r[name] for r in good]) for name in OUTCOMES)
        parts.append(f"k={steps} {reward:+.3f} ({forgetting:+.3f})")
        if good[0]["accuracy_after"] is not None:
            parts[-1] += f" {np.mean([r['accuracy_after'] for r in good]):.0%}"
    log.info("tested  %s: %s", method, ", ".join(parts))


def learn(study: Study) -> None:
    """ReST-EM: the policy before and after each iteration is tested; between them, for every
    train document, the best of its edits is learned from, if its mean score is above 0."""
    policy = study.policy
    for iteration in range(study.config.outer.iterations + 1):
        for document in study.split("test"):
            (found,) = study.sampled(policy, iteration, document, 1)
            study.keep(study.outcome(study.trial_of(policy, iteration, document, found)))
        _say(study, f"restem_it{iteration}")
        if iteration < study.config.outer.iterations:
            policy = _improved(study, policy, iteration)


def _improved(study: Study, policy: Policy, iteration: int) -> Policy:
    outer = study.config.outer
    chosen: list[tuple[Document, SelfEdit]] = []
    scores: list[float] = []
    for document in study.split("train"):
        each: dict[str, list[float]] = {}
        records: list[Record] = []
        proposals = study.sampled(policy, iteration, document, outer.samples)
        distinct = {one.edit.edit_id: one for one in proposals}
        for found in distinct.values():
            for number in range(outer.inner_seeds):
                trial = study.trial_of(policy, iteration, document, found, number)
                outcome = study.outcome(trial)
                records += outcome
                each.setdefault(found.edit.edit_id, []).append(study.score(outcome))
        means = {edit_id: float(np.mean(some)) for edit_id, some in each.items()}
        best = max(means, key=lambda edit_id: means[edit_id])
        accepted = best if means[best] > 0 else None
        if accepted is not None:
            chosen.append((document, distinct[accepted].edit))
        scores += [score for some in each.values() for score in some]
        times = Counter(found.edit.edit_id for found in proposals)
        study.keep(
            record | {"accepted": one == accepted, "times_proposed": times[one]}
            for record in records
            for one in [record["edit_id"]]
        )
    mean = f"{np.mean(scores):+.3f}" if np.isfinite(scores).all() else "none: some failed"
    log.info(
        "learned restem_it%d: from the best edit of %d of %d train documents, those that gained by "
        "one; mean score of all %d edits %s",
        iteration + 1,
        len(chosen),
        len(study.split("train")),
        len(scores),
        mean,
    )
    if not chosen:
        return policy
    folder = study.policies / f"iteration_{iteration + 1}"
    if folder.exists():
        return policy.load(folder)
    seed = seed_of(study.config.seed, "sft", iteration)
    learned = policy.sft(chosen, outer, seed=seed)
    with fileio.replacing_folder(folder) as new:
        learned.save(new)
    return learned
