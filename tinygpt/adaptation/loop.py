"""Run an adaptation study, which compares several methods, from its configuration to its results.

A score is the reward after the most steps, minus ``forgetting_weight`` times the forgetting.
Learning rates are chosen by mean score on the tune documents; the test documents are used only
once, with the chosen rates.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tinygpt import fileio
from tinygpt.adaptation import records as lines
from tinygpt.adaptation.config import (
    AdaptConfig,
    FilePolicy,
    ModelPolicy,
    SelfPolicy,
    count_records,
    identify,
    methods_of,
)
from tinygpt.adaptation.documents import Document, domain_shift, new_facts, own_validation
from tinygpt.adaptation.edits import Policy, Proposal, SelfEdit, read
from tinygpt.adaptation.inner import Base, Trial, run_trial, seed_of
from tinygpt.adaptation.policies import OwnPolicy, ReplayPolicy, Writer
from tinygpt.adaptation.prompted import HuggingFacePolicy, MlxPolicy
from tinygpt.adaptation.records import Record
from tinygpt.config import LoraConfig
from tinygpt.data import corpora
from tinygpt.runs import rundir
from tinygpt.runs.load import TrainedRun, load_run
from tinygpt.training.console import logging_to, preparing, short
from tinygpt.training.hardware import resolve_device, set_up
from tinygpt.training.session import failures_recorded

log = logging.getLogger("tinygpt")

TEXTS = 4  # texts per document that a method asks the policy for, about
SOURCES = {
    "lora_doc": "doc",
    "lora_edit": "edit",
    "lora_doc+edit": "both",
    "oracle": "both",
    "full_ft_doc": "doc",
}


@dataclass
class Study:
    """Hold the records and edits so far, which are not computed again."""

    config: AdaptConfig
    base: Base
    documents: Sequence[Document]
    policy: Policy
    folder: Path
    advance: Callable[[int], None] = lambda count: None  # called with the number of new records

    def __post_init__(self) -> None:
        self.records = self.folder / "adapt.jsonl"
        self.edits = self.folder / "edits.jsonl"  # as policy=file reads it
        for path in (self.records, self.edits):
            lines.repair(path)
        self.known = {record["run_id"]: record for record in lines.read_records(self.records)[0]}
        self.proposals: dict[str, list[Proposal]] = {}  # by question and document
        for line in lines.read_lines(self.edits)[0]:
            proposal = Proposal(read(line["edit"]), line["prompt_tokens"], line["tokens"])
            self.proposals.setdefault(line["key"], []).append(proposal)

    def split(self, name: str) -> list[Document]:
        return [document for document in self.documents if document.split == name]

    def outcome(self, trial: Trial) -> list[Record]:
        """Return the trial's records, from the file or by running it, without saving them."""
        steps = trial.inner.inner_steps if trial.proposal else [0]
        ids = [trial.run_id(self.base, k) for k in steps]
        if all(run_id in self.known for run_id in ids):
            return [self.known[run_id] for run_id in ids]
        return run_trial(self.base, trial)

    def keep(self, records: Iterable[Record]) -> None:
        """Save the records that are new."""
        new = {r["run_id"]: r for r in records if r["run_id"] not in self.known}
        lines.append(self.records, list(new.values()))
        self.known |= new
        self.advance(len(new))

    def done(self, trial: Trial) -> list[Record]:
        """Return the trial's records after saving them."""
        records = self.outcome(trial)
        self.keep(records)
        return records

    def score(self, records: Sequence[Record]) -> float:
        """Return the score of a trial, -inf if it failed."""
        last = records[-1]
        if last["error"] is not None:
            return -math.inf
        forgotten = max(0.0, last["forgetting"])
        return float(last["reward"] - self.config.tuning.forgetting_weight * forgotten)

    def proposed(
        self, question: str, document: Document, make: Callable[[], list[Proposal]]
    ) -> list[Proposal]:
        """Return proposals from the file, or make and save them."""
        key = f"{question} {document.sha256}"
        if key not in self.proposals:
            made = make()
            about = {"key": key, "doc_id": document.doc_id, "doc_sha256": document.sha256}
            lines.append(self.edits, [about | dataclasses.asdict(one) for one in made])
            self.proposals[key] = made
        return self.proposals[key]

    def trial(self, method: str, directive: SelfEdit | None, document: Document) -> Trial:
        """Return the trial of a method; the text of its edit is the oracle's or the policy's."""
        inner, policy = self.config.inner, None
        if method == "full_ft_doc":
            inner = dataclasses.replace(inner, lora=LoraConfig())
        proposal = Proposal(directive) if directive else None
        if directive and method == "oracle":
            proposal = Proposal(dataclasses.replace(directive, text=list(document.oracle)))
        elif directive and directive.source != "doc":
            policy, ops, n = self.policy, directive.text_ops, directive.n
            plain = SelfEdit("edit", text_ops=ops, n=n)
            seed = seed_of(self.config.seed, "text", document.sha256, ops, n)
            question = f"text {'+'.join(ops)} {n}"
            make = functools.partial(self.policy.with_text, plain, document, seed=seed)
            (written,) = self.proposed(question, document, lambda: [make()])
            edit = dataclasses.replace(directive, text=written.edit.text)
            proposal = dataclasses.replace(written, edit=edit)
        return Trial(method, document, proposal, self.config.seed, inner, policy)

    def sampled(
        self, policy: Policy, iteration: int, document: Document, count: int, seeds: int = 1
    ) -> list[Trial]:
        """Return a trial for each of ``count`` edits and ``seeds`` seeds; only train explores."""
        config, outer, method = self.config, self.config.outer, f"restem_it{iteration}"
        explore = outer.explore_later if iteration else outer.explore
        explore = explore if document.split == "train" else 0.0
        seed = seed_of(config.seed, "sampled", iteration, document.sha256)
        make = functools.partial(policy.propose, document, count, seed=seed, explore=explore)
        return [
            Trial(method, document, one, config.seed + n, config.inner, policy, iteration)
            for one in self.proposed(f"{method} {document.split}", document, make)
            for n in range(seeds)
        ]


# --- the methods


def run_methods(study: Study) -> dict[str, float | None]:
    """Run all methods; return each one's mean final test reward, None without a result."""
    rewards: dict[str, float | None] = {}
    for method in methods_of(study.config):
        if method == "restem":
            rewards |= learn(study)
            continue
        directive = None if method == "none" else tune(method, study)
        trials = (study.trial(method, directive, document) for document in study.split("test"))
        rewards |= _tested(method, study, trials)
    return rewards


def _tested(method: str, study: Study, trials: Iterable[Trial]) -> dict[str, float | None]:
    """Run a method's trials on test documents; log the means after each number of steps."""
    parts: list[str] = []
    reward: float | None = None
    for records in zip(*[study.done(trial) for trial in trials], strict=True):
        good = [record for record in records if record["error"] is None]
        text, reward = "no result", None
        if good:
            names = ("reward", "forgetting")
            reward, forgetting = (float(np.mean([r[name] for r in good])) for name in names)
            text = f"{reward:+.3f} ({forgetting:+.3f})"
            if good[0]["accuracy_after"] is not None:
                text += f" {np.mean([r['accuracy_after'] for r in good]):.0%}"
        parts.append(f"k={records[0]['inner_steps']} {text}")
    log.info("tested  %s: %s", method, ", ".join(parts))
    return {f"reward_{method}": reward}


def tune(method: str, study: Study) -> SelfEdit:
    """Return the directive of ``method`` with the rate that scores best on the tune documents."""
    ops, rates = list(study.policy.ops), study.config.tuning.learning_rates
    source, documents = SOURCES[method], study.split("tune")
    plain = SelfEdit(source, ops, n=max(1, TEXTS // len(ops))) if source != "doc" else SelfEdit()
    if not documents:  # check_adapt then allows one rate only
        return dataclasses.replace(plain, lr=rates[0])
    scores: dict[float, float] = {}
    for rate in rates:
        edit = dataclasses.replace(plain, lr=rate)
        trials = (study.trial(method, edit, document) for document in documents)
        scores[rate] = float(np.mean([study.score(study.done(trial)) for trial in trials]))
    best = max(scores, key=scores.__getitem__)
    others = ", ".join(f"{rate:g} {score:+.3f}" for rate, score in scores.items() if rate != best)
    end = {min(scores): ", the lowest tried", max(scores): ", the highest tried"}.get(best, "")
    end, others = (end, f" ({others})") if others else ("", "")
    line = "tuned   %s: %s, rate %g%s: %+.3f%s"
    log.info(line, method, source, best, end, scores[best], others)
    return dataclasses.replace(plain, lr=best)


def learn(study: Study) -> dict[str, float | None]:
    """Run ReST-EM; test the policy before the first and after each iteration."""
    policy, rewards = study.policy, dict[str, float | None]()
    for iteration in range(study.config.outer.iterations + 1):
        if iteration > 0:
            policy = _improved(study, policy, iteration - 1)
        documents = study.split("test")
        trials = (study.sampled(policy, iteration, document, 1)[0] for document in documents)
        rewards |= _tested(f"restem_it{iteration}", study, trials)
    return rewards


def _improved(study: Study, policy: Policy, iteration: int) -> Policy:
    """Return the policy trained on its best edit of each train document.

    Only edits whose mean score over the inner seeds is positive count; without any, the policy
    stays the same.
    """
    outer = study.config.outer
    chosen: list[tuple[Document, SelfEdit]] = []
    every: list[float] = []
    for document in study.split("train"):
        trials = study.sampled(policy, iteration, document, outer.samples, outer.inner_seeds)
        edits = [trial.proposal.edit for trial in trials if trial.proposal]
        times = Counter(edit.edit_id for edit in edits)  # an edit may be proposed repeatedly
        distinct = {trial.run_id(study.base, 0): trial for trial in trials}
        outcomes = [study.outcome(trial) for trial in distinct.values()]
        scores: dict[str, list[float]] = {}
        for records in outcomes:
            scores.setdefault(records[0]["edit_id"], []).append(study.score(records))
        means = {edit_id: float(np.mean(some)) for edit_id, some in scores.items()}
        best = max(means, key=means.__getitem__)
        accepted = best if means[best] > 0 else None
        chosen += [(document, edit) for edit in edits if edit.edit_id == accepted][:1]
        every += [score for some in scores.values() for score in some]
        flat = [record for records in outcomes for record in records]
        for record in flat:
            record["accepted"] = record["edit_id"] == accepted
            record["times_proposed"] = times[record["edit_id"]] // outer.inner_seeds
        study.keep(flat)
    mean = f"{np.mean(every):+.3f}" if np.isfinite(every).all() else "none: some failed"
    log.info(
        "learned restem_it%d: from %d of %d train documents, those with an edit that helped; "
        "mean score of all %d edits %s",
        *(iteration + 1, len(chosen), len(study.split("train")), len(every), mean),
    )
    if not chosen:
        return policy
    assert isinstance(policy, Writer)  # checked by check_adapt
    folder = study.folder / "policies" / f"iteration_{iteration + 1}"
    if folder.exists():
        return policy.load(folder)
    learned = policy.sft(chosen, outer, seed=seed_of(study.config.seed, "sft", iteration))
    with fileio.replacing_folder(folder) as new:
        learned.save(new)
    return learned


# --- the command


def adapt(config: AdaptConfig, overrides: list[str], console: Console) -> dict[str, Any]:
    """Return the results of running or resuming a study, or raise ConfigError or RunError."""
    device = resolve_device(config.hardware, "32")
    set_up(config.hardware, device)
    hash_, run = identify(config, overrides)
    if (found := _finished(config, run, hash_, console)) is not None:
        return found
    base_run = load_run(config.run, config.checkpoint, device.accelerator)
    with preparing(console, base_run.config.data) as progress:
        if config.data is None:
            documents, skipped = new_facts(config.documents, base_run), 0
        else:
            corpus = corpora.open_corpus(config.data).documents("train")
            texts = (one.text for one in itertools.islice(corpus, config.data.max_documents))
            documents, skipped = domain_shift(config.documents, base_run, texts)
        tokens = config.documents.forgetting_tokens
        base = Base(base_run, own_validation(base_run, tokens, config.cache_dir, progress))
    policy = make_policy(config, base_run, documents)
    columns = (TextColumn("records"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    hidden = not console.is_terminal
    with run.locked(), failures_recorded(run):
        if (found := _finished(config, run, hash_, console)) is not None:
            return found
        _begin(config, run, hash_, str(device.accelerator))
        with (
            logging_to(console, run),
            Progress(*columns, console=console, transient=True, disable=hidden) as bar,
        ):
            task = bar.add_task("", total=count_records(config))
            advance = functools.partial(bar.advance, task)
            study = Study(config, base, documents, policy, run.path, advance)
            _introduce(study, skipped)
            results = make_results(study, hash_, run_methods(study))
            fileio.write_json(run.results, results)
            log.info("records %s", study.records)
    return results


def make_policy(config: AdaptConfig, run: TrainedRun, documents: Sequence[Document]) -> Policy:
    """Return the policy of ``config``, where ``run`` is the base, or raise ConfigError."""
    policy, rates = config.policy, config.tuning.learning_rates
    if isinstance(policy, SelfPolicy):
        return OwnPolicy(run, policy, rates)
    if isinstance(policy, FilePolicy):
        return ReplayPolicy(policy.path, documents)
    assert isinstance(policy, ModelPolicy)
    if policy.kind == "mlx":
        return MlxPolicy(policy, rates)
    return HuggingFacePolicy(policy, rates, run.model.output_weight.device)


def _finished(
    config: AdaptConfig, run: rundir.RunDir, hash_: str, console: Console
) -> dict[str, Any] | None:
    found = run.finished(hash_, config.force)
    if found is not None:
        said = f"{run.path} ({found['records']} records); force=true makes them again"
        console.print(f"already finished: {said}", highlight=False, soft_wrap=True)
    return found


def _begin(config: AdaptConfig, run: rundir.RunDir, hash_: str, device: str) -> None:
    """Prepare the folder of a new or resumed study; with ``force``, remove an earlier one first."""
    if config.force:
        run.clear()
        for path in (run.path / "edits.jsonl", run.environment, run.config):
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


def _introduce(study: Study, skipped: int) -> None:
    """Log the base, the documents and the methods."""
    config, base, task = study.config, study.base, study.config.documents.task
    before = [base.before(document) for document in study.split("test")]
    own, heldout = before[0].base, np.mean([one.heldout for one in before])
    log.info("base    %s, %s parameters", config.run, short(base.parameters))
    log.info("        loss %.3f on its own text, %.3f on the test documents", own, heldout)
    counts = ", ".join(f"{len(study.split(name))} {name}" for name in ("train", "tune", "test"))
    too_short = f"; {skipped} skipped, too short" if skipped else ""
    log.info("task    %s: %s documents%s", task, counts, too_short)
    log.info("methods %s; policy %s", ", ".join(methods_of(config)), study.policy.backend)
    log.info("folder  %s%s", study.folder, ", resuming" if study.known else "")
    facts = ", share of right answers" if task == "new_facts" else ""
    log.info("shown   after k steps: reward (forgetting)%s; means over documents", facts)


def make_results(study: Study, hash_: str, rewards: Mapping[str, float | None]) -> dict[str, Any]:
    """Return the content of ``results.json``."""
    config, records = study.config, study.known.values()
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
