"""One adaptation from its configuration to its results: as ``training.session`` of a training."""

from __future__ import annotations

import contextlib
import functools
import logging
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tinygpt import fileio, rundir
from tinygpt.adaptation.config import AdaptConfig, check_inner, count_records, methods_of
from tinygpt.adaptation.documents import Documents, open_documents, own_validation
from tinygpt.adaptation.identity import identify
from tinygpt.adaptation.methods import Study, run_methods
from tinygpt.adaptation.policies import make_policy
from tinygpt.adaptation.records import LinesFile, RecordsFile
from tinygpt.adaptation.trials import Base, record_left_out
from tinygpt.data import corpora
from tinygpt.data.shards import Progress as Reading
from tinygpt.trained import TrainedRun, load_run
from tinygpt.training.console import logging_to, preparing, short
from tinygpt.training.folder import failures_recorded
from tinygpt.training.hardware import set_up
from tinygpt.training.trainer import resolve_device

log = logging.getLogger("tinygpt")

EDITS = "edits.jsonl"  # the form that policy=file reads


def adapt(config: AdaptConfig, overrides: list[str], console: Console) -> dict[str, Any]:
    """Makes the records that ``config`` asks for, or goes on with them, or finds them all there.

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
        documents, base = open_study(config, base_run, progress)
    policy = make_policy(config, base_run, documents.used)
    with run.locked(), failures_recorded(run):
        if (found := _finished(config, run, hash_, console)) is not None:
            return found
        if config.force:
            _clear(run)
        begin(config, run, hash_, str(device.accelerator))
        with logging_to(console, run), progress_bar(console, config) as advance:
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
            introduce(study, run, documents)
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


def open_study(
    config: AdaptConfig, base_run: TrainedRun, progress: Reading
) -> tuple[Documents, Base]:
    """Raises ConfigError, one line, for too few documents and for a corpus that is another now."""
    corpus = None
    limit = None
    if config.data is not None:
        corpus, limit = corpora.open_corpus(config.data), config.data.max_documents
    documents = open_documents(config.documents, base_run, corpus, limit)
    tokens = config.documents.forgetting_tokens
    validation = own_validation(base_run, tokens, config.cache_dir, progress)
    return documents, Base(base_run, validation)


def begin(config: AdaptConfig, run: rundir.RunDir, hash_: str, device: str) -> None:
    """The folder and whose it is, or what a killed process left to go on with."""
    run.error.unlink(missing_ok=True)
    fileio.remove_torn(run.path)
    if not run.environment.exists():
        about = {"threads": torch.get_num_threads(), "device": device, "base": config.run}
        fileio.write_json(run.environment, rundir.environment(config_hash=hash_, **about))
    if not run.config.exists():
        run.write_config(config)


def _clear(run: rundir.RunDir) -> None:
    """Forgets an earlier adaptation of the same configuration; the results go first."""
    run.clear()
    for path in (run.path / EDITS, run.environment, run.config):
        path.unlink(missing_ok=True)
    for name in ("policies", "fit"):
        shutil.rmtree(run.path / name, ignore_errors=True)


@contextlib.contextmanager
def progress_bar(console: Console, config: AdaptConfig) -> Iterator[Callable[[int], None]]:
    """Of the records, on a terminal."""
    columns = (TextColumn("records"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    hidden = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task("", total=count_records(config))
        yield functools.partial(bar.advance, task)


def introduce(study: Study, run: rundir.RunDir, documents: Documents) -> None:
    config, base = study.config, study.base
    before = [base.before(document) for document in study.split("test")]
    own, heldout = before[0].base, np.mean([one.heldout for one in before])
    log.info("base    %s, %s parameters", config.run, short(base.parameters))
    log.info("        loss %.3f on its own text, %.3f on the test documents", own, heldout)
    counts = ", ".join(f"{len(study.split(name))} {name}" for name in ("train", "tune", "test"))
    short_ones = f"; {len(documents.left_out)} too short" if documents.left_out else ""
    log.info("task    %s: %s documents%s", config.documents.task, counts, short_ones)
    log.info("methods %s; policy %s", ", ".join(methods_of(config)), study.policy.backend)
    log.info("folder  %s%s", run.path, ", going on where it stopped" if study.known else "")
    facts = ", share of right answers" if config.documents.task == "new_facts" else ""
    log.info("told    after k steps: reward (forgetting)%s; means over documents", facts)
    task = config.documents.task
    study.keep(record_left_out(base, one, task) for one in documents.left_out)


def make_results(study: Study, hash_: str) -> dict[str, Any]:
    """``results.json``: counts, and the mean reward of each method on the test documents after
    the most steps, null where none has a result."""
    config, records = study.config, list(study.known.values())
    rewards: dict[str, float | None] = {}
    for method in dict.fromkeys(r["method"] for r in records if r["split"] == "test"):
        last = study.tested(method)[max(study.tested(method))]
        good = [record["reward"] for record in last if record["error"] is None]
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
        "train_documents": len(study.split("train")),
        "tune_documents": len(study.split("tune")),
        "test_documents": len(study.split("test")),
        "records": len(records),
        "errors": sum(r["error"] is not None for r in records if r["method"] is not None),
        **rewards,
    }
