"""One run from its configuration to its results."""

from __future__ import annotations

import functools
import logging
import os
import signal
from collections.abc import Sequence
from typing import Any, NoReturn

import lightning.pytorch as pl
import torch
from rich.console import Console

from tinygpt import fileio, rundir, signals
from tinygpt.config import Config
from tinygpt.counting import count_parameters
from tinygpt.data import corpora, shards
from tinygpt.data.datamodule import TokenData
from tinygpt.data.survey import Survey
from tinygpt.model.generate import generate
from tinygpt.model.lora import check_peft
from tinygpt.trained import initial_weights
from tinygpt.training.branching import Branch
from tinygpt.training.callbacks import Checkpoints, Interrupts, Journal, ProgressBar
from tinygpt.training.console import (
    logging_to,
    make_bar,
    preparing,
    print_summary,
    report_finished,
    short,
)
from tinygpt.training.evaluation import Scores, score
from tinygpt.training.folder import begin, failures_recorded, identify
from tinygpt.training.hardware import choose_threads, rounding, set_up
from tinygpt.training.loggers import Loggers, check_loggers
from tinygpt.training.module import LanguageModel
from tinygpt.training.optim import check_optimizer
from tinygpt.training.results import make_results, sizes_of
from tinygpt.training.trainer import (
    AtomicCheckpoints,
    Device,
    ending_together,
    fit,
    leave_with_parent,
    make_trainer,
    own_callbacks,
    quiet_lightning,
    resolve_device,
    validate,
)

log = logging.getLogger("tinygpt")

SAMPLE_MARK = "--- step"  # heads each text in samples.txt


def train(
    config: Config, overrides: list[str], console: Console, branch: Branch | None = None
) -> dict[str, Any]:
    """Trains the run that ``config`` describes, or goes on with it, or finds it finished.

    Returns its results.  Raises ConfigError before a run folder is made where something asked
    for cannot be had, RunError where a run fails on its way.
    """
    device = open_machine(config)
    callbacks = own_callbacks(config.callbacks)
    if device.rank > 0:
        console = Console(quiet=True)
        if signals.PARENT in os.environ:
            leave_with_parent(int(os.environ[signals.PARENT]))
    corpus = corpora.open_corpus(config.data)
    cache = shards.cache_root(config.cache_dir)
    with preparing(console) as progress:
        hash_, run = identify(config, overrides, corpus)
        found = run.finished(hash_)  # refuses another configuration's folder, forced or not
        if found is not None and not config.force:
            return report_finished(run, found, console)
        prepared = shards.prepare(corpus, config.data, config.tokenizer, cache, progress)
    data = open_data(config, prepared, device)
    assert data.plan is not None
    if config.trainer.fast_dev_run:
        return fast_dev_run(config, run, data, device, callbacks, console)
    begun = fileio.read_json(run.environment) if run.last.exists() and not config.force else {}
    chosen = choose_threads(config, prepared.tokenizer.vocab_size, data.plan, device, begun)
    rounds = rounding(config, prepared.tokenizer.vocab_size, data.plan, device, begun)
    initial = None if begun else initial_weights(config, prepared.tokenizer.vocab_size)
    made = functools.partial(
        Run, config, run, data, device, hash_, console, rounds["compile"], initial
    )
    if device.rank > 0:  # the first process has the folder, and waits for this one to train
        return made().train(bool(begun), callbacks)
    with run.locked(), failures_recorded(run):
        found = run.finished(hash_)  # meanwhile, another process may have been here
        if config.force:
            run.clear()
        elif found is not None:
            return report_finished(run, found, console)
        with logging_to(console, run):
            if chosen is not None:
                log.info("threads %s", chosen)
            resuming = begin(config, run, prepared, device, hash_, rounds, branch)
            results = made(branch.keep_at if branch else ()).train(resuming, callbacks)
    print_summary(run, results, console)
    return results


def open_machine(config: Config) -> Device:
    """What the run computes on.  Raises ConfigError where this machine lacks what is asked for."""
    device = resolve_device(config.hardware, config.train.precision)
    set_up(config.hardware, device)
    check_loggers(config)
    check_optimizer(config.optim)
    if config.optim.lora.rank is not None:
        check_peft()
    return device


def fast_dev_run(
    config: Config,
    run: rundir.RunDir,
    data: TokenData,
    device: Device,
    callbacks: list[pl.Callback],
    console: Console,
) -> dict[str, Any]:
    """Train a step and validate a batch, to see whether all of it works; no folder is made."""
    assert data.plan is not None
    trainer = make_trainer(run, data.plan, device, callbacks, 1, config.trainer)
    module = LanguageModel(config)
    with ending_together(trainer), quiet_lightning():
        trainer.fit(module, datamodule=data)
    loss = float(trainer.callback_metrics["val_loss"])
    console.print(f"fast_dev_run: one step done, val loss {loss:.4f} of one batch; nothing is kept")
    return {"status": "fast_dev_run", "final_val_loss": loss}


def open_data(config: Config, prepared: shards.Prepared, device: Device) -> TokenData:
    """The prepared corpus and, with it known, all that is counted in steps."""
    data = TokenData(config, prepared)
    data.derive_plan(device.accelerator, device.world_size)
    return data


class Run:
    """One training run: its parts, and what it leaves.

    ``initial``: weights to begin with, of the model's shape; None: as its seed draws them.
    """

    def __init__(
        self,
        config: Config,
        run: rundir.RunDir,
        data: TokenData,
        device: Device,
        hash_: str,
        console: Console,
        compiled: str,
        initial: dict[str, torch.Tensor] | None = None,
        keep_at: Sequence[int] = (),
    ) -> None:
        assert data.plan is not None
        self.config, self.run, self.data, self.device = config, run, data, device
        self.hash, self.console, self.plan = hash_, console, data.plan
        self.compiled, self.keep_at = compiled, frozenset(keep_at)
        self.tokenizer = data.prepared.tokenizer
        self.module = LanguageModel(config, plan=self.plan)
        self.module.build(self.tokenizer.vocab_size, initial)
        self.trainer: pl.Trainer
        self.samples: dict[int, str] = {}  # by step
        self.loggers = Loggers()
        self.metrics = rundir.MetricsFile(run.metrics)
        self.journal = Journal(
            config,
            self.plan,
            self.metrics,
            self._validate,
            self._sample,
            self.module,
            self.loggers,
        )
        self.interrupts = Interrupts(run, config, self.plan)
        self.writes = device.rank == 0

    def train(self, resuming: bool, own: Sequence[pl.Callback] = ()) -> dict[str, Any]:
        """``own`` are the user's callbacks, called first, as the run's save their state."""
        last = self._open_records(resuming)
        with self.loggers:
            return self._train(resuming, last, own)

    def _train(self, resuming: bool, last: int, own: Sequence[pl.Callback]) -> dict[str, Any]:
        callbacks: list[pl.Callback] = [
            *own,
            self.journal,
            Checkpoints(self.run, self.plan, self.journal, self.keep_at),
            self.interrupts,
        ]
        if self.writes and self.console.is_terminal:
            callbacks.append(ProgressBar(make_bar(self.console), self.plan, self.journal))
        self.trainer = make_trainer(
            self.run, self.plan, self.device, callbacks, last, self.config.trainer
        )
        if self.compiled == "on":
            self.module.model.compile()  # in place: no key of a checkpoint changes
        ckpt_path = str(self.run.last) if resuming else None
        with ending_together(self.trainer), quiet_lightning():
            fit(self.trainer, self.module, self.data, self.interrupts.note, ckpt_path)
            self.module.to(self.trainer.strategy.root_device)  # Lightning puts it on the CPU
            self.interrupts.agreed(self.trainer)
            final, test = self._final_scores()
        if not self.writes:
            # The first process says how it ended.  At Python's own end gloo's threads, which may
            # still hold tensors, would abort the process.
            os._exit(0)
        if self.interrupts.received is not None:
            self._leave(self.interrupts.received)
        return self._finish(final, test)

    def _open_records(self, resuming: bool) -> int:
        """Return the step to end at."""
        self._introduce(resuming)
        first, last = self._restore_records() if resuming else (0, self.plan.total_steps)
        if self.writes:  # a new beginning has a step 0 of its own
            self.metrics.keep_until(first if resuming else -1)
            sizes = sizes_of(self.config, self.data, self.plan.total_steps)
            size = self.config.train.batch_tokens
            texts = {step * size: text for step, text in self.samples.items()}
            self.loggers.begin(self.config, self.run, sizes, self.data.floor("val"), texts)
        return last

    def _finish(self, final: Scores | None, test: Scores | None) -> dict[str, Any]:
        """Writes the results, and with them the run is finished."""
        if final is not None:
            fileio.copy(self.run.last, self.run.checkpoints / "final.ckpt")
        begun = fileio.read_json(self.run.environment)
        branched = {name: begun.get(name) for name in ("branched_from", "branched_at_step")}
        results = make_results(
            self.config,
            self.hash,
            self.plan,
            self.data,
            self.device,
            self.journal,
            final,
            test,
            branched,
        )
        self.loggers.log_results(results)
        with fileio.replacing(self.run.results) as temporary:
            temporary.write_text(fileio.to_json(results), encoding="utf-8")
        return results

    def _introduce(self, resuming: bool) -> None:
        config, plan, index = self.config, self.plan, self.data.prepared.index
        vocab_size = self.tokenizer.vocab_size
        sizes = count_parameters(config.model, vocab_size)
        log.info(
            "model   %s parameters, %s without embeddings; vocabulary %s (%s)",
            short(sizes.total),
            short(sizes.non_embedding),
            f"{vocab_size:,}",
            self.tokenizer.kind,
        )
        if vocab_size < getattr(config.tokenizer, "vocab_size", 0):
            log.info("note    the text is too short to learn a larger vocabulary from")
        if config.init_from is not None:
            log.info("from    %s, with its shape and its tokenizer", config.init_from)
        if self.tokenizer.convention:
            log.info("text    %s", self.tokenizer.convention)
        log.info("data    %s", corpora.describe(config.data))
        if index.get("survey"):
            for line in Survey.read(index["survey"]).lines():
                log.info("        %s", line)
        for name, info in index["splits"].items():
            if info:
                log.info("        %s", _describe_split(name, info))
        if index["duplicates_of_validation_or_test"]:
            log.info(
                "note    %d training documents stand in validation or test too and are left out",
                index["duplicates_of_validation_or_test"],
            )
        log.info(
            "train   %s tokens (%.2g epochs of %s) in %s steps of %s; %s%s, %s, precision %s",
            short(plan.train_tokens),
            plan.train_tokens / max(1, self.data.windows.used_tokens),
            short(self.data.windows.used_tokens),
            f"{plan.total_steps:,}",
            f"{config.train.batch_tokens:,}",
            self.device.accelerator,
            f" on {self.device.world_size} devices" if self.device.world_size > 1 else "",
            "1 thread" if torch.get_num_threads() == 1 else f"{torch.get_num_threads()} threads",
            self.device.precision,
        )
        log.info("folder  %s%s", self.run.path, ", going on where it stopped" if resuming else "")

    def _restore_records(self) -> tuple[int, int]:
        """The step of the last checkpoint and the step to end at.

        Samples written after the checkpoint are forgotten; a run that had stopped early stays
        where it stopped.
        """
        checkpoint = AtomicCheckpoints().load_checkpoint(self.run.last)
        step = int(checkpoint["global_step"])
        if self.run.samples.exists():
            text = self.run.samples.read_text(encoding="utf-8")
            for part in text.split(SAMPLE_MARK)[1:]:
                at = int(part.split()[0].replace(",", ""))
                if at <= step:
                    self.samples[at] = part.partition("\n")[2].removesuffix("\n\n")
        stopped = checkpoint["callbacks"]["Journal"]["status"] == "stopped_early"
        return step, step if stopped else self.plan.total_steps

    def _evaluate(self, split: str) -> Scores:
        batches = self.data.eval_batches(split, self.plan.micro_batch_size)
        mine = range(self.device.rank, len(batches), self.device.world_size)
        share = (batches[index] for index in mine)
        context = self.trainer.precision_plugin.forward_context()
        info = self.data.splits[split].info
        return score(self.module.model, share, info, self.module.device, context)

    def _validate(self) -> Scores:
        """Score the validation split in Lightning's own loop, which the user's callbacks see."""
        validate(self.trainer)
        assert self.module.scores is not None
        return self.module.scores

    def _sample(self, step: int) -> None:
        """Puts text of the model, as it is at ``step``, into samples.txt."""
        train = self.config.train
        if train.sample_tokens == 0 or not self.writes:
            return
        tokenizer = self.tokenizer
        prompt = [tokenizer.start_id, *tokenizer.encode(train.sample_prompt)]
        tokens = torch.tensor([prompt], device=self.module.device)
        generator = torch.Generator().manual_seed(self.config.seed)
        with self.trainer.precision_plugin.forward_context():
            out = generate(
                self.module.model,
                tokens[:, -self.config.model.max_seq_len :],
                train.sample_tokens,
                temperature=0.8,
                top_k=50,
                generator=generator,
                stop_token=tokenizer.eot_id,
                start_token=tokenizer.start_id,
            )
        ids = [i for i in out[0].tolist() if i not in tokenizer.separator]
        self.samples[step] = tokenizer.decode(ids)
        texts = (
            f"{SAMPLE_MARK} {at:,} ({at * train.batch_tokens:,} tokens)\n{text}\n\n"
            for at, text in self.samples.items()
        )
        with fileio.replacing(self.run.samples) as temporary:
            temporary.write_text("".join(texts), encoding="utf-8")
        self.loggers.log_text(self.samples[step])

    def _leave(self, number: int) -> NoReturn:
        name, step = signal.Signals(number).name, self.trainer.global_step
        at = f"at step {step} of {self.plan.total_steps}"
        raise signals.Stopped(
            number, f"stopped by {name} {at}; the same command goes on from there"
        )

    def _final_scores(self) -> tuple[Scores | None, Scores | None]:
        """Of validation and test, where the run came to its end; with a last sample."""
        if self.journal.state["status"] == "diverged" or self.interrupts.received is not None:
            return None, None
        self._sample(self.trainer.global_step)
        final = self.journal.scores or self._evaluate("val")
        test = self._evaluate("test") if "test" in self.data.splits else None
        return final, test


def _describe_split(name: str, info: dict[str, Any]) -> str:
    """One line: what a split has, and what of it was not taken as it came."""
    counts = [
        f"{name:<5} {info['documents']:>8,} documents",
        f"{short(info['tokens'])} tokens",
        f"{info['bytes'] / 1e6:.3g} MB",
        f"{short(info['characters'])} characters",
    ]
    others = ("unknown_tokens", "empty_documents", "left_out_documents")
    odd = [f"{info[key]:,} {key.replace('_', ' ')}" for key in others if info[key]]
    return ", ".join(counts + odd)
