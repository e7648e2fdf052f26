"""One adaptation from its configuration to its results: what each method trains on, and the study
of all of them.

A score is the reward after the most steps, less ``forgetting_weight`` times what was forgotten.
Rates are chosen by their mean score on the tune documents; the test documents are looked at once,
with what was chosen.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tinygpt import fileio, rundir
from tinygpt.adaptation.config import (
    AdaptConfig,
    check_inner,
    count_records,
    identify,
    methods_of,
)
from tinygpt.adaptation.documents import Document, Documents, open_documents, own_validation
from tinygpt.adaptation.edits import SelfEdit, read
from tinygpt.adaptation.inner import (
    Base,
    Origin,
    Trial,
    record_left_out,
    run_trial,
)
from tinygpt.adaptation.policies import Policy, Proposal, make_policy, seed_of
from tinygpt.adaptation.records import LinesFile, Record, RecordsFile
from tinygpt.config import LoraConfig
from tinygpt.trained import load_run
from tinygpt.training.console import logging_to, preparing, short
from tinygpt.training.hardware import resolve_device, set_up
from tinygpt.training.session import failures_recorded

log = logging.getLogger("tinygpt")

EDITS = "edits.jsonl"  # in the form that policy=file reads
TEXTS = 4  # of a document, about, where a method has text of the policy's
SOURCES = {
    "lora_doc": "doc",
    "lora_edit": "edit",
    "lora_doc+edit": "both",
    "oracle": "both",
    "full_ft_doc": "doc",
}


# --- a study


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
    known: dict[str, Record] = field(default_factory=dict, init=False)  # by run id
    # by what they were asked for
    _proposed: dict[str, list[Proposal]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        for file in (self.records, self.edits):
            file.repair()
        self.known = {record["run_id"]: record for record in self.records.read()}
        for line in self.edits.read():
            proposal = Proposal(read(line["edit"]), line["prompt_tokens"], line["tokens"])
            self._proposed.setdefault(line["key"], []).append(proposal)

    def split(self, name: str) -> list[Document]:
        return [document for document in self.documents if document.split == name]

    def keep(self, records: Iterable[Record]) -> None:
        """Write those that are new, at once."""
        new = {r["run_id"]: r for r in records if r["run_id"] not in self.known}
        self.records.append(list(new.values()))
        self.known |= new
        self.advance(len(new))

    def outcome(self, trial: Trial) -> list[Record]:
        """Return the trial's records, from the file or anew; they are not kept yet."""
        ids = trial.run_ids(self.base)
        if all(run_id in self.known for run_id in ids):
            return [self.known[run_id] for run_id in ids]
        return run_trial(self.base, trial)

    def tested(self, method: str) -> dict[int, list[Record]]:
        """Return the method's records of test documents, by steps."""
        found: dict[int, list[Record]] = {}
        for record in self.known.values():
            if (record["method"], record["split"]) == (method, "test"):
                found.setdefault(record["inner_steps"], []).append(record)
        return found

    def score(self, records: Sequence[Record]) -> float:
        """Return the score of a trial, -inf where it has no result."""
        last = records[-1]
        if last["error"] is not None:
            return -math.inf
        forgotten = max(0.0, last["forgetting"])
        return float(last["reward"] - self.config.tuning.forgetting_weight * forgotten)

    def proposed(
        self, key: str, document: Document, make: Callable[[], list[Proposal]]
    ) -> list[Proposal]:
        """Return proposals from the file, else make and keep them."""
        key = f"{key} {document.sha256}"
        if key not in self._proposed:
            made = make()
            about = {"key": key, "doc_id": document.doc_id, "doc_sha256": document.sha256}
            self.edits.append([about | dataclasses.asdict(proposal) for proposal in made])
            self._proposed[key] = made
        return self._proposed[key]

    def written(self, edit: SelfEdit, document: Document) -> Proposal:
        """Return the directive with text of the untrained policy, the same for all rates."""
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
        """Return the trial of a method whose directive is known."""
        inner = self.config.inner
        if method == "full_ft_doc":
            inner = dataclasses.replace(inner, lora=LoraConfig())
        if directive is None or method == "oracle":
            edit = directive and dataclasses.replace(directive, text=list(document.oracle))
            return Trial(method, document, edit, self.config.seed, inner)
        text = self.written(directive, document)
        origin = _origin(self.policy, text, None) if text.edit.text else Origin()
        return Trial(method, document, text.edit, self.config.seed, inner, origin)

    def sampled(
        self, policy: Policy, iteration: int, document: Document, count: int
    ) -> list[Proposal]:
        """Return edits of a policy; it explores on train documents alone."""
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
        """Return the trial of an edit that a policy proposed; ``number`` tells trainings apart."""
        origin = _origin(policy, found, iteration)
        method, seed = f"restem_it{iteration}", self.config.seed + number
        return Trial(method, document, found.edit, seed, self.config.inner, origin)


def _origin(policy: Policy, found: Proposal, iteration: int | None) -> Origin:
    who = (policy.backend, policy.model, policy.parameters, iteration)
    return Origin(*who, found.prompt_tokens, found.tokens, policy.sft_tokens)


# --- the methods


def run_methods(study: Study) -> None:
    """Do all methods of the study, one after the other."""
    for method in methods_of(study.config):
        if method == "restem":
            learn(study)
            continue
        directive = None if method == "none" else tune(method, study)
        for document in study.split("test"):
            study.keep(study.outcome(study.trial(method, directive, document)))
        _log_tested(study, method)


def tune(method: str, study: Study) -> SelfEdit:
    """Return the directive of ``method`` whose rate has the best score on the tune documents."""
    ops, rates = list(study.policy.ops), study.config.tuning.learning_rates
    source = SOURCES[method]
    plain = SelfEdit(source, ops, n=max(1, TEXTS // len(ops))) if source != "doc" else SelfEdit()
    if not study.split("tune"):  # allowed where there is one rate
        return dataclasses.replace(plain, lr=rates[0])
    scores: dict[float, float] = {}
    for rate in rates:
        edit, each = dataclasses.replace(plain, lr=rate), []
        for document in study.split("tune"):
            records = study.outcome(study.trial(method, edit, document))
            study.keep(records)
            each.append(study.score(records))
        scores[rate] = float(np.mean(each))
    best = max(scores, key=lambda rate: scores[rate])
    ends = {min(scores): ", the lowest tried", max(scores): ", the highest tried"}
    rest = ", ".join(f"{rate:g} {score:+.3f}" for rate, score in scores.items() if rate != best)
    log.info(
        "tuned   %s: %s, rate %g%s: %+.3f%s",
        method,
        source,
        best,
        ends.get(best, "") if rest else "",
        scores[best],
        f" ({rest})" if rest else "",
    )
    return dataclasses.replace(plain, lr=best)


def _log_tested(study: Study, method: str) -> None:
    """Log the means over the test documents after each number of steps."""
    parts = []
    for steps, records in study.tested(method).items():
        good = [record for record in records if record["error"] is None]
        if not good:
            parts.append(f"k={steps} no result")
            continue
        reward, forgetting = (np.mean([r[name] for r in good]) for name in ("reward", "forgetting"))
        parts.append(f"k={steps} {reward:+.3f} ({forgetting:+.3f})")
        if good[0]["accuracy_after"] is not None:
            parts[-1] += f" {np.mean([r['accuracy_after'] for r in good]):.0%}"
    log.info("tested  %s: %s", method, ", ".join(parts))


def learn(study: Study) -> None:
    """Do ReST-EM: test the policy before and after each iteration; in each, for every train
    document, learn from the best of its edits, if its mean score is above 0."""
    policy = study.policy
    for iteration in range(study.config.outer.iterations + 1):
        for document in study.split("test"):
            (found,) = study.sampled(policy, iteration, document, 1)
            study.keep(study.outcome(study.trial_of(policy, iteration, document, found)))
        _log_tested(study, f"restem_it{iteration}")
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
        for edit_id, found in distinct.items():
            for number in range(outer.inner_seeds):
                outcome = study.outcome(study.trial_of(policy, iteration, document, found, number))
                records += outcome
                each.setdefault(edit_id, []).append(study.score(outcome))
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
    log.info(
        "learned restem_it%d: from the best edit of %d of %d train documents, those that gained by "
        "one; mean score of all %d edits %s",
        iteration + 1,
        len(chosen),
        len(study.split("train")),
        len(scores),
        f"{np.mean(scores):+.3f}" if np.isfinite(scores).all() else "none: some failed",
    )
    if not chosen:
        return policy
    folder = study.policies / f"iteration_{iteration + 1}"
    if folder.exists():
        return policy.load(folder)
    learned = policy.sft(chosen, outer, seed=seed_of(study.config.seed, "sft", iteration))
    with fileio.replacing_folder(folder) as new:
        learned.save(new)
    return learned


# --- the command


def adapt(config: AdaptConfig, overrides: list[str], console: Console) -> dict[str, Any]:
    """Make the records that ``config`` asks for, resume making them, or find them all there.

    Returns the results.  Raises ConfigError before a folder is made where something asked for
    cannot be had, RunError where it fails on its way.
    """
    device = resolve_device(config.hardware, "32")
    set_up(config.hardware, device)
    hash_, run = identify(config, overrides)
    if (found := _finished(config, run, hash_, console)) is not None:
        return found
    base_run = load_run(config.run, config.checkpoint, device.accelerator)
    check_inner(config.inner, base_run.config.model)
    with preparing(console) as progress:
        documents = open_documents(config.documents, base_run, config.data)
        tokens = config.documents.forgetting_tokens
        base = Base(base_run, own_validation(base_run, tokens, config.cache_dir, progress))
    policy = make_policy(config, base_run, documents.used)
    with run.locked(), failures_recorded(run):
        if (found := _finished(config, run, hash_, console)) is not None:
            return found
        _begin(config, run, hash_, str(device.accelerator))
        with logging_to(console, run), _progress_bar(console, config) as advance:
            study = Study(
                config,
                base,
                documents.used,
                policy,
                RecordsFile(run.records),
                LinesFile(run.path / EDITS),
                run.path / "policies",
                advance,
            )
            _introduce(study, run, documents)
            run_methods(study)
            results = make_results(study, hash_)
            fileio.write_json(run.results, results)
            log.info("records %s", study.records.path)
    return results


def _finished(
    config: AdaptConfig, run: rundir.RunDir, hash_: str, console: Console
) -> dict[str, Any] | None:
    found = run.finished(hash_)  # refuses another configuration's folder, forced or not
    if found is None or config.force:
        return None
    line = f"already finished: {run.path} ({found['records']} records); force=true makes them anew"
    console.print(line, highlight=False, soft_wrap=True)
    return found


def _begin(config: AdaptConfig, run: rundir.RunDir, hash_: str, device: str) -> None:
    """Make the folder and say whose it is, or keep what a killed process left to resume.

    Where forced, an earlier adaptation of the same configuration goes first.
    """
    if config.force:
        run.clear()
        for path in (run.path / EDITS, run.environment, run.config):
            path.unlink(missing_ok=True)
        for name in ("policies", "fit"):
            shutil.rmtree(run.path / name, ignore_errors=True)
    run.error.unlink(missing_ok=True)
    fileio.remove_torn(run.path)
    if not run.environment.exists():
        about = {"threads": torch.get_num_threads(), "device": device, "base": config.run}
        fileio.write_json(run.environment, rundir.environment(config_hash=hash_, **about))
    if not run.config.exists():
        run.write_config(config)


@contextlib.contextmanager
def _progress_bar(console: Console, config: AdaptConfig) -> Iterator[Callable[[int], None]]:
    """Show how many records there are, on a terminal."""
    columns = (TextColumn("records"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    hidden = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task("", total=count_records(config))
        yield functools.partial(bar.advance, task)


def _introduce(study: Study, run: rundir.RunDir, documents: Documents) -> None:
    """Log what is adapted to what, and keep the records of documents that are skipped."""
    config, base, task = study.config, study.base, study.config.documents.task
    before = [base.before(document) for document in study.split("test")]
    own, heldout = before[0].base, np.mean([one.heldout for one in before])
    log.info("base    %s, %s parameters", config.run, short(base.parameters))
    log.info("        loss %.3f on its own text, %.3f on the test documents", own, heldout)
    counts = ", ".join(f"{len(study.split(name))} {name}" for name in ("train", "tune", "test"))
    short_ones = f"; {len(documents.left_out)} too short" if documents.left_out else ""
    log.info("task    %s: %s documents%s", task, counts, short_ones)
    log.info("methods %s; policy %s", ", ".join(methods_of(config)), study.policy.backend)
    log.info("folder  %s%s", run.path, ", going on where it stopped" if study.known else "")
    facts = ", share of right answers" if task == "new_facts" else ""
    log.info("told    after k steps: reward (forgetting)%s; means over documents", facts)
    study.keep(record_left_out(base, one, task) for one in documents.left_out)


def make_results(study: Study, hash_: str) -> dict[str, Any]:
    """Return ``results.json``: counts, and the mean reward of each method on the test documents
    after the most steps, null where none has a result."""
    config, records = study.config, list(study.known.values())
    rewards: dict[str, float | None] = {}
    for method in dict.fromkeys(r["method"] for r in records if r["split"] == "test"):
        tested = study.tested(method)
        good = [record["reward"] for record in tested[max(tested)] if record["error"] is None]
        rewards[f"reward_{method}"] = float(np.mean(good)) if good else None
    return {
        "schema_version": rundir.SCHEMA_VERSION,
        "study": config.study,
        "run_name": config.run_name,
        "config_hash": hash_,
        "git_commit": study.base.git_commit,
        "seed": config.seed,
        "status": "finished",
        "task": config.documents.task,
        "base_run": config.run,
        "base_parameters": study.base.parameters,
        "lora_rank": config.inner.lora.rank,
        "policy": study.policy.backend,
        "inner_steps": config.inner.inner_steps[-1],
        **{f"{name}_documents": len(study.split(name)) for name in ("train", "tune", "test")},
        "records": len(records),
        "errors": sum(r["error"] is not None for r in records if r["method"] is not None),
        **rewards,
    }
