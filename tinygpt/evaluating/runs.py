"""Evaluate runs at their checkpoints, one row per model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from tinygpt.config import ConfigError, RunError, SyntheticData, checks
from tinygpt.config.counting import count_parameters, flops_per_token
from tinygpt.data.synthetic import Grammar
from tinygpt.evaluating.options import Options, OtherText, Task, find, names_of, read_tasks
from tinygpt.evaluating.scoring import (
    Positions,
    as_in_training,
    open_text,
    pruned,
    quantized,
    score_text,
    size_in_bytes,
)
from tinygpt.evaluating.tasks import score_facts, score_samples, score_task
from tinygpt.model.gpt import GPT
from tinygpt.runs import rundir
from tinygpt.runs.load import TrainedRun, load_run

NEAR = 0.01  # a run counts as converged within this share of its last loss
LISTS = ("checkpoints", "task")  # may be one string with commas, as on the command line
Say = Callable[[str], None]
Curve = list[dict[str, float]]  # rows of step, tokens, seconds, val_loss, where measured


@dataclass(frozen=True)
class Evaluation:
    """Hold the scores of a model on a text, and on ``facts``, ``samples`` and each task."""

    scores: dict[str, Any]
    positions: Positions | None = None
    asked: dict[str, dict[str, Any]] = field(default_factory=dict)
    curve: Curve = field(default_factory=list)  # of the run's training

    @property
    def row(self) -> dict[str, Any]:
        """Return the line of evaluation_results.csv."""
        asked = {f"{a}_{name}": v for a, some in self.asked.items() for name, v in some.items()}
        return {**self.scores, **asked}

    @property
    def is_whole(self) -> bool:
        """Return whether this is the trained model, neither untrained nor made smaller."""
        return bool(self.scores["variant"] == "trained")


def evaluate_runs(
    *runs: str | Path, data: str | Path | None = None, **options: Any
) -> pd.DataFrame:
    """Score runs as ``python -m tinygpt.evaluate`` does, one row per model, and write no files.

    ``data`` is a file, a folder or a glob to score instead of each run's own validation split; the
    other ``options`` are those of the command, as ``split="test"``, ``checkpoints="all"``,
    ``baseline=True``, ``stride=64``.  Raises ConfigError.
    """
    return pd.DataFrame([made.row for made in evaluate(runs, _options(data, options))])


def loss_by_position(
    run: str | Path, data: str | Path | None = None, **options: Any
) -> pd.DataFrame:
    """Return the mean loss at each position of the context, in nats per token.

    The columns are ``position`` (the number of tokens that the model has seen, from 1), ``loss``
    and its ``standard_error``, over windows of full length.  The arguments are those of
    ``evaluate_runs``.  Raises ConfigError, also for a text shorter than the context.
    """
    means = evaluate([run], _options(data, options))[0].positions
    if means is None:
        raise ConfigError(f"runs={run}: the text is shorter than the context")
    columns = {"loss": means.loss, "standard_error": means.error}
    return pd.DataFrame({"position": np.arange(1, len(means.loss) + 1), **columns})


def _options(data: str | Path | None, options: dict[str, Any]) -> Options:
    names = [item.name for item in dataclasses.fields(Options)]
    for name in options:
        if name not in names:
            raise ConfigError(checks.unknown_key(name, names))
    lists = {k: options[k].split(",") for k in LISTS if isinstance(options.get(k), str)}
    text = OtherText(str(data)) if data else OtherText()
    given = Options(**{**options, **lists}, data=text)
    checks.check_bounds(given)
    return given


def evaluate(
    runs: Sequence[str | Path],
    options: Options,
    say: Say = lambda what: None,
    refused: Say | None = None,
) -> list[Evaluation]:
    """Evaluate each checkpoint of each run.

    Raises ConfigError for bad options before anything is scored.  For a run that cannot be scored,
    ``refused`` is called with a line; without ``refused``, raises ConfigError or RunError.
    """
    options.check()
    tasks = read_tasks(options.task)
    paths, _ = find(runs)
    for path in paths:
        _check_run(rundir.RunDir(path), options)
    made: list[Evaluation] = []
    for path, label in zip(paths, names_of(paths), strict=True):
        try:
            made += list(_evaluate_run(path, label, options, tasks, say))
        except (ConfigError, RunError) as error:
            if refused is None:
                raise
            refused(str(error))
    return made


def _check_run(run: rundir.RunDir, options: Options) -> None:
    """Raise ConfigError for a checkpoint that the run lacks, or a stride beyond its context."""
    kept = run.kept()
    for name in options.checkpoints:
        if name not in (*kept, "all"):
            raise ConfigError(f"checkpoints={name}: {run.path} has {', '.join(kept) or 'none'}")
    if options.stride is None:
        return
    try:
        length = rundir.read_config(run.config).model.max_seq_len
    except ConfigError:
        return  # reported when this run is scored
    if options.stride > length:
        line = f"stride={options.stride}: must be at most the context, {length} of {run.path}"
        raise ConfigError(line)


def _evaluate_run(
    path: Path, label: str, options: Options, tasks: list[Task], say: Say
) -> Iterator[Evaluation]:
    """Score the untrained model if asked for, then each checkpoint and its smaller variants."""
    run = rundir.RunDir(path)
    chosen: list[str | None] = list(options.checkpoints) or [None]
    if chosen == ["all"]:
        by_step = {load_run(path, name).step: name for name in run.kept()}
        chosen = [by_step[step] for step in sorted(by_step)]  # last and final are often the same
    first = load_run(path, chosen[0])
    with as_in_training(run, first.config, options) as machine:
        text = open_text(first, options, machine, lambda what, *_: say(f"{label}: {what}"))
        curve = _read_curve(run)

        def scored(
            trained: TrainedRun, variant: str, model: GPT, size: int | None = None
        ) -> Evaluation:
            say(f"{label}: {trained.checkpoint}: {variant}")
            is_whole = variant == "trained"
            measured, positions = score_text(model, text, machine, options.stride, is_whole)
            scores = {
                "run": label,
                "folder": str(path),
                "checkpoint": trained.checkpoint,
                "variant": variant,
                "init_from": trained.config.init_from,
                "document_start": trained.tokenizer.start_text,
                "step": trained.step,
                "train_tokens": trained.tokens,
                "text": text.name,
                "text_fingerprint": text.split.info["fingerprint"],
                "stride": options.stride,
                **measured,
                "unknown_tokens": text.split.info["unknown_tokens"],
                "irreducible_loss_exact": text.floor,
                "size_bytes": size_in_bytes(model) if size is None else size,
                **budget(trained, measured["loss"], curve),
                **convergence(curve if is_whole else []),
                "device": str(machine.device),
                "precision": machine.resolved.precision,
            }
            return Evaluation(scores, positions, curve=curve)

        def asked(trained: TrainedRun, model: GPT) -> Iterator[tuple[str, dict[str, Any]]]:
            tokenizer, data, count = trained.tokenizer, trained.config.data, options.samples
            if isinstance(data, SyntheticData):
                say(f"{label}: {trained.checkpoint}: facts")
                yield "facts", score_facts(model, tokenizer, Grammar(data), machine)
            for task in tasks:
                say(f"{label}: {trained.checkpoint}: {task.name}")
                yield task.name, score_task(model, tokenizer, task, machine)
            if count:
                say(f"{label}: {trained.checkpoint}: samples")
                measures = score_samples(model, tokenizer, text, count, options.seed, machine)
                yield "samples", measures

        if options.baseline:  # the weights of the seed, even if the run took others by init_from
            torch.manual_seed(first.config.seed)
            model = GPT(first.config.model, first.tokenizer.vocab_size)
            bare = dataclasses.replace(first, model=model, step=0, checkpoint="none")
            yield scored(bare, "untrained", model.to(machine.device, machine.dtype).eval())
        for name in chosen:
            trained = load_run(path, name)
            model = trained.model.to(machine.device, machine.dtype).eval()
            answers = dict(asked(trained, model))
            yield dataclasses.replace(scored(trained, "trained", model), asked=answers)
            if options.quantize:
                yield scored(trained, options.quantize, *quantized(model))
            if options.prune:
                yield scored(trained, f"pruned {options.prune:g}", *pruned(model, options.prune))


def _read_curve(run: rundir.RunDir) -> Curve:
    names = ("step", "tokens", "seconds", "val_loss")
    rows = rundir.MetricsFile(run.metrics).read() if run.metrics.exists() else []
    return [{name: float(row[name]) for name in names if row[name]} for row in rows]


def budget(trained: TrainedRun, loss: float, curve: Curve) -> dict[str, float | None]:
    """Return the cost of the model up to its checkpoint, and its gain for that cost.

    The gain is in nats per token below ln V, the loss of a uniform guess.
    """
    config, vocab_size = trained.config, trained.tokenizer.vocab_size
    sizes = count_parameters(config.model, vocab_size)
    flops = flops_per_token(config.model, vocab_size, lora_rank=config.optim.lora.rank)
    flops *= trained.tokens
    timed = [row for row in curve if "seconds" in row]
    steps, seconds = ([row[name] for row in timed] for name in ("step", "seconds"))
    hours = float(np.interp(trained.step, steps, seconds)) / 3600 if timed else None
    gain = float(np.log(vocab_size)) - loss
    return {
        "model_parameters": sizes.total,
        "parameters_non_embedding": sizes.non_embedding,
        "flops_exact": flops,
        "hours": hours,
        "gain": gain,
        "gain_per_pflop": gain / (flops / 1e15) if flops else None,
        "gain_per_million_parameters": gain / (sizes.total / 1e6),
        "gain_per_hour": gain / hours if hours else None,
    }


def convergence(curve: Curve) -> dict[str, int | None]:
    """Return when the validation loss in training first was within 1 % of its last value."""
    rows = [row for row in curve if "val_loss" in row]
    near = [row for row in rows if row["val_loss"] <= (1 + NEAR) * rows[-1]["val_loss"]]
    return {
        "steps_to_1_percent": int(near[0]["step"]) if near else None,
        "tokens_to_1_percent": int(near[0]["tokens"]) if near else None,
    }
