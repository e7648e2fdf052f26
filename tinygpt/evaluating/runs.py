"""Runs to a table: every run at its checkpoints, a row for each model that is scored."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tinygpt import checks, rundir
from tinygpt.config import Config, ConfigError, RunError, SyntheticData
from tinygpt.counting import count_parameters, flops_per_token
from tinygpt.data.synthetic import Grammar
from tinygpt.evaluating import facts, samples, shrinking
from tinygpt.evaluating.folders import find, names_of
from tinygpt.evaluating.items import Task, read_tasks
from tinygpt.evaluating.machine import Machine, as_in_training
from tinygpt.evaluating.options import Options, OtherText
from tinygpt.evaluating.scoring import Positions, score_text
from tinygpt.evaluating.tasks import score_task
from tinygpt.evaluating.text import Text, other_text, own_split
from tinygpt.model.gpt import GPT
from tinygpt.trained import TrainedRun, load_run

if TYPE_CHECKING:
    import pandas as pd

NEAR = 0.01  # of the final loss: where a run counts as converged
LISTS = ("checkpoints", "task")  # a text stands for a list, as on the command line
Say = Callable[[str], None]


@dataclass(frozen=True)
class Evaluation:
    """A model on a text, and what it was asked besides: ``facts``, ``samples``, tasks by name."""

    scores: dict[str, Any]
    positions: Positions | None
    asked: dict[str, dict[str, Any]]

    @property
    def row(self) -> dict[str, Any]:
        """Its line of evaluation_results.csv."""
        asked = {f"{a}_{name}": v for a, found in self.asked.items() for name, v in found.items()}
        return {**self.scores, **asked}

    @property
    def is_whole(self) -> bool:
        """The trained model itself."""
        return bool(self.scores["variant"] == "trained")


def evaluate_runs(
    *runs: str | Path, data: str | Path | None = None, **options: Any
) -> pd.DataFrame:
    """Scores runs, as ``python -m tinygpt.evaluate`` does, without writing a file: a row a model.

    ``data`` is a file, a folder or a glob to score instead of each run's own validation split; the
    other ``options`` are those of the command, as ``split="test"``, ``checkpoints="all"``,
    ``baseline=True``, ``stride=64``.  Raises ConfigError.
    """
    import pandas as pd

    return pd.DataFrame([made.row for made in evaluate(runs, _options(data, options))])


def loss_by_position(
    run: str | Path, data: str | Path | None = None, **options: Any
) -> pd.DataFrame:
    """What a longer context buys: the mean loss at each position of it, in nats per token.

    Columns ``position`` (from 1: tokens that the model has seen), ``loss`` and its
    ``standard_error``, over windows of full length.  Arguments as of ``evaluate_runs``.  Raises
    ConfigError, also for a text shorter than the context.
    """
    import pandas as pd

    made = evaluate([run], _options(data, options))[0]
    if made.positions is None:
        raise ConfigError(f"runs={run}: the text is shorter than the context")
    positions, loss = np.arange(1, len(made.positions.loss) + 1), made.positions.loss
    columns = {"position": positions, "loss": loss, "standard_error": made.positions.error}
    return pd.DataFrame(columns)


def _options(data: str | Path | None, options: dict[str, Any]) -> Options:
    names = [item.name for item in dataclasses.fields(Options)]
    for name in options:
        if name not in names:
            raise ConfigError(checks.unknown_key(name, names))
    options = {
        k: v.split(",") if k in LISTS and isinstance(v, str) else v for k, v in options.items()
    }
    found = Options(**options, data=OtherText(str(data)) if data else OtherText())
    checks.check_bounds(found)
    return found


def evaluate(
    runs: Sequence[str | Path],
    options: Options,
    say: Say = lambda what: None,
    refused: Say | None = None,
) -> list[Evaluation]:
    """Of each run, in turn, each checkpoint.  Raises ConfigError.

    ``refused`` is told of a run that cannot be scored, in a line, and the others go on; without
    it that raises ConfigError or RunError too.
    """
    options.check()
    tasks = read_tasks(options.task)
    paths, _ = find(runs)
    labels = names_of(paths)
    for path in paths:
        run = rundir.RunDir(path)
        there = run.kept()
        for name in options.checkpoints:
            if name not in (*there, "all"):
                raise ConfigError(f"checkpoints={name}: {path} has {', '.join(there) or 'none'}")
        if options.stride is not None:
            _check_stride(options.stride, run)
    made = []
    for path, label in zip(paths, labels, strict=True):
        try:
            made += list(_evaluate_run(path, label, options, tasks, say))
        except (ConfigError, RunError) as error:
            if refused is None:
                raise
            refused(str(error))
    return made


def _check_stride(stride: int, run: rundir.RunDir) -> None:
    try:
        length = rundir.read_config(run.config).model.max_seq_len
    except ConfigError:
        return  # which is said in its turn
    if stride > length:
        raise ConfigError(f"stride={stride}: must be at most the context, {length} of {run.path}")


def _evaluate_run(
    path: Path, label: str, options: Options, tasks: list[Task], say: Say
) -> Iterator[Evaluation]:
    run = rundir.RunDir(path)
    chosen: list[str | None] = list(options.checkpoints) or [None]
    if chosen == ["all"]:
        by_step = {load_run(path, name).step: name for name in run.kept()}
        chosen = [by_step[step] for step in sorted(by_step)]  # last and final are often the same
    first = load_run(path, chosen[0])
    with as_in_training(run, first.config, options) as machine:
        text = _text(
            run, first, options, machine, lambda what, done, total: say(f"{label}: {what}")
        )
        scorer = _Scorer(run, label, text, options, tasks, machine, say)
        if options.baseline:
            yield scorer.untrained(first)
        for name in chosen:
            yield from scorer.trained(load_run(path, name))


def _text(
    run: rundir.RunDir, first: TrainedRun, options: Options, machine: Machine, progress: Any
) -> Text:
    cache, tokenizer = options.cache_dir, first.tokenizer
    if options.data.path is None:
        return own_split(run, tokenizer, machine, options.split, cache, progress)
    length = first.config.model.max_seq_len
    return other_text(options.data, length, tokenizer, machine, cache, progress)


class _Scorer:
    """What the models of one run have in common."""

    def __init__(
        self,
        run: rundir.RunDir,
        label: str,
        text: Text,
        options: Options,
        tasks: list[Task],
        machine: Machine,
        say: Say,
    ) -> None:
        self.run, self.label, self.text = run, label, text
        self.options, self.tasks, self.machine, self.say = options, tasks, machine, say
        self.curve = curve_of(run)

    def untrained(self, trained: TrainedRun) -> Evaluation:
        """With the weights that its seed gives; with those the run began but for ``init_from``."""
        config = trained.config
        torch.manual_seed(config.seed)
        model = GPT(config.model, trained.tokenizer.vocab_size)
        bare = dataclasses.replace(trained, model=model, step=0, checkpoint="none")
        return self._scored(bare, "untrained", self._placed(model))

    def trained(self, trained: TrainedRun) -> Iterator[Evaluation]:
        """The model as it is, with all that is asked of it; then the losses of the smaller ones."""
        model, options = self._placed(trained.model), self.options
        yield self._scored(trained, "trained", model, asked=self._asked(trained, model))
        if options.quantize:
            yield self._scored(trained, options.quantize, *shrinking.quantized(model))
        if options.prune:
            smaller, size = shrinking.pruned(model, options.prune)
            yield self._scored(trained, f"pruned {options.prune:g}", smaller, size)

    def _asked(self, trained: TrainedRun, model: GPT) -> dict[str, dict[str, Any]]:
        tokenizer, machine, found = trained.tokenizer, self.machine, {}
        if isinstance(trained.config.data, SyntheticData):
            self._tell(trained, "facts")
            grammar = Grammar(trained.config.data)
            found["facts"] = facts.score_facts(model, tokenizer, grammar, machine)
        for task in self.tasks:
            self._tell(trained, task.name)
            found[task.name] = score_task(model, tokenizer, task, machine)
        if count := self.options.samples:
            self._tell(trained, "samples")
            seed = self.options.seed
            found["samples"] = samples.score_samples(
                model, tokenizer, self.text, count, seed, machine
            )
        return found

    def _tell(self, trained: TrainedRun, what: str) -> None:
        self.say(f"{self.label}: {trained.checkpoint}: {what}")

    def _placed(self, model: GPT) -> GPT:
        return model.to(self.machine.device, self.machine.dtype).eval()

    def _scored(
        self,
        trained: TrainedRun,
        variant: str,
        model: GPT,
        size: int | None = None,
        asked: dict[str, dict[str, Any]] | None = None,
    ) -> Evaluation:
        self._tell(trained, variant)
        is_whole = variant == "trained"
        found = score_text(model, self.text, self.machine, self.options.stride, is_whole)
        scores = {
            "run": self.label,
            "folder": str(self.run.path),
            "checkpoint": trained.checkpoint,
            "variant": variant,
            "init_from": trained.config.init_from,
            "document_start": trained.tokenizer.start_text,
            "step": trained.step,
            "train_tokens": trained.tokens,
            "text": self.text.name,
            "text_fingerprint": self.text.info["fingerprint"],
            "stride": self.options.stride,
            **found.values(),
            "unknown_tokens": self.text.info["unknown_tokens"],
            "irreducible_loss_exact": self.text.floor,
            "size_bytes": shrinking.size_in_bytes(model) if size is None else size,
            **budget(trained, found.scores.loss, self.curve),
            **convergence(self.curve if is_whole else []),
            "device": str(self.machine.device),
            "precision": self.machine.resolved.precision,
        }
        return Evaluation(scores, found.positions, asked or {})


Curve = list[dict[str, float]]  # step, tokens, seconds, and the validation loss where there is one


def curve_of(run: rundir.RunDir) -> Curve:
    """metrics.csv as numbers; what was not measured is left out of its line."""
    if not run.metrics.exists():
        return []
    names = ("step", "tokens", "seconds", "val_loss")
    rows = rundir.MetricsFile(run.metrics).read()
    return [{name: float(row[name]) for name in names if row[name]} for row in rows]


def budget(trained: TrainedRun, loss: float, curve: Curve) -> dict[str, float | None]:
    """What the model cost up to its checkpoint, and what it gained for that: nats per token below
    ln V, the loss of a guess among all tokens alike."""
    config: Config = trained.config
    vocab_size = trained.tokenizer.vocab_size
    sizes = count_parameters(config.model, vocab_size)
    flops = flops_per_token(config.model, vocab_size, lora_rank=config.optim.lora.rank)
    flops *= trained.tokens
    timed = [(row["step"], row["seconds"]) for row in curve if "seconds" in row]
    hours = None
    if timed:
        steps, seconds = zip(*timed, strict=True)
        hours = float(np.interp(trained.step, steps, seconds)) / 3600
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
    """Where the validation loss of training first was within 1 % of its last value; as fine as
    the run evaluated."""
    losses = [row for row in curve if "val_loss" in row]
    near = [row for row in losses if row["val_loss"] <= (1 + NEAR) * losses[-1]["val_loss"]]
    first = near[0] if near else {}
    return {
        "steps_to_1_percent": int(first["step"]) if near else None,
        "tokens_to_1_percent": int(first["tokens"]) if near else None,
    }
