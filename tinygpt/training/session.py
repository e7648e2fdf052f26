"""Train one run, from its configuration to its results."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
from rich.console import Console

from tinygpt import fileio, signals
from tinygpt.config import Config, ConfigError, RunError, is_out_of_memory
from tinygpt.data import corpora, shards
from tinygpt.data.datamodule import TokenData
from tinygpt.model.lora import check_peft
from tinygpt.runs import pretrained, rundir
from tinygpt.runs.load import initial_weights
from tinygpt.training.callbacks import Checkpoints, Interrupts, Journal, ProgressBar, Samples
from tinygpt.training.console import (
    log_beginning,
    logging_to,
    make_bar,
    preparing,
    print_summary,
    report_finished,
)
from tinygpt.training.evaluation import Scores
from tinygpt.training.hardware import (
    Device,
    numerics,
    quiet_lightning,
    resolve_device,
    set_up,
)
from tinygpt.training.loggers import Loggers, check_loggers
from tinygpt.training.module import LanguageModel
from tinygpt.training.optim import check_optimizer
from tinygpt.training.results import make_results, sizes_of
from tinygpt.training.trainer import (
    AtomicCheckpoints,
    ending_together,
    leave_with_parent,
    make_trainer,
    own_callbacks,
)

log = logging.getLogger("tinygpt")


@dataclass(frozen=True)
class Branch:
    """Describe how a run shares its first steps with others.

    Two runs with a warmup-stable-decay schedule that differ only in their length pass through the
    same states until the decay begins.  The shorter one may therefore begin at a checkpoint of the
    longer one, its trunk, and ends with the same weights as if trained from the start (Hägele et
    al. 2024, "Scaling laws and compute-optimal training beyond fixed training durations").
    """

    trunk: rundir.RunDir | None = None
    step: int = 0  # of the trunk's checkpoint to begin with
    keep_at: tuple[int, ...] = ()  # steps at which others will branch off this run

    def is_ready(self) -> bool:
        """Return whether the trunk has the checkpoint to begin with."""
        return self.trunk is not None and self.trunk.step(self.step).exists()

    def begin(self, run: rundir.RunDir) -> None:
        """Copy the trunk's metrics, samples and checkpoint to ``run``."""
        assert self.trunk is not None
        for mine, theirs in ((run.metrics, self.trunk.metrics), (run.samples, self.trunk.samples)):
            if theirs.exists():
                fileio.copy(theirs, mine)
        fileio.copy(self.trunk.step(self.step), run.last)  # last: it makes the run resumable


def train(
    config: Config, overrides: list[str], console: Console, branch: Branch | None = None
) -> dict[str, Any]:
    """Train or resume the run of ``config`` unless it is finished, and return its results.

    Raises ConfigError before a run folder is made where the machine lacks what is asked for,
    RunError where the run fails later.
    """
    device = open_machine(config)
    callbacks = own_callbacks(config.callbacks)
    if device.rank > 0:
        console = Console(quiet=True)
        if signals.PARENT in os.environ:
            leave_with_parent(int(os.environ[signals.PARENT]))
    corpus = corpora.open_corpus(config.data)
    cache = shards.cache_root(config.cache_dir)
    with preparing(console, config.data) as progress:
        hash_, run = identify(config, overrides, corpus)
        found = run.finished(hash_, config.force)
        if found is not None:
            return report_finished(run, found, console)
        prepared = shards.prepare(corpus, config.data, config.tokenizer, cache, progress)
    data, vocab_size = open_data(config, prepared, device), prepared.tokenizer.vocab_size
    if config.trainer.fast_dev_run:
        return _fast_dev_run(config, run, data, device, callbacks, console)
    begun = fileio.read_json(run.environment) if run.last.exists() and not config.force else {}
    rounding = numerics(config, vocab_size, data.plan, device, begun)
    module = LanguageModel(config, plan=data.plan)
    module.slices = rounding["slices"]
    module.build(vocab_size, None if begun else initial_weights(config, vocab_size))
    if rounding["compile"] == "on":
        module.model.compile()  # in place: no key of a checkpoint changes
    keep_at = branch.keep_at if branch else ()
    if device.rank > 0:  # the first process owns the folder
        Run(config, run, data, device, hash_, module, keep_at).train(bool(begun), callbacks, None)
        os._exit(0)  # otherwise gloo's threads, which may still hold tensors, would abort
    with run.locked(), failures_recorded(run):
        found = run.finished(hash_, config.force)  # another process may have trained it meanwhile
        if config.force:
            run.clear()
        elif found is not None:
            return report_finished(run, found, console)
        with logging_to(console, run):
            resuming = begin(config, run, prepared, device, hash_, rounding, branch)
            log_beginning(config, run, data, device, rounding["threads"], resuming)
            training = Run(config, run, data, device, hash_, module, keep_at)
            results = training.train(resuming, callbacks, console)
    print_summary(run, results, console)
    return results


def open_machine(config: Config) -> Device:
    """Set this process up for a run and return the device.

    Raises ConfigError where this machine lacks what is asked for.
    """
    device = resolve_device(config.hardware, config.train.precision)
    set_up(config.hardware, device)
    check_loggers(config)
    check_optimizer(config.optim)
    if config.optim.lora.rank is not None:
        check_peft()
    return device


def open_data(config: Config, prepared: shards.Prepared, device: Device) -> TokenData:
    """Return the data module of a prepared corpus, with the plan of the run on ``device``."""
    data = TokenData(config, prepared)
    data.derive_plan(device.accelerator, device.world_size)
    return data


def _fast_dev_run(
    config: Config,
    run: rundir.RunDir,
    data: TokenData,
    device: Device,
    callbacks: list[pl.Callback],
    console: Console,
) -> dict[str, Any]:
    """Train one step and validate one batch, without a run folder."""
    trainer = make_trainer(run, data.plan, device, callbacks, 1, config.trainer)
    module = LanguageModel(config)
    with ending_together(trainer), quiet_lightning():
        trainer.fit(module, datamodule=data)
    loss = float(trainer.callback_metrics["val_loss"])
    console.print(f"fast_dev_run: one step done, val loss {loss:.4f} of one batch; nothing is kept")
    return {"status": "fast_dev_run", "final_val_loss": loss}


class Run:
    """Train the model of one run folder in this process."""

    def __init__(
        self,
        config: Config,
        run: rundir.RunDir,
        data: TokenData,
        device: Device,
        hash_: str,
        module: LanguageModel,
        keep_at: Sequence[int],
    ) -> None:
        self.config, self.run, self.data, self.device = config, run, data, device
        self.plan, self.hash, self.module = data.plan, hash_, module
        self.loggers = Loggers()
        self.metrics = rundir.MetricsFile(run.metrics)
        self.samples = Samples(run, config, data.prepared.tokenizer, self.loggers)
        self.journal = Journal(config, self.plan, self.metrics, self.loggers, self.samples)
        self.interrupts = Interrupts(run, config, self.plan)
        self.checkpoints = Checkpoints(run, self.plan, self.journal, frozenset(keep_at))

    def train(
        self, resuming: bool, own: Sequence[pl.Callback], console: Console | None
    ) -> dict[str, Any]:
        """Train, and return the results, which are empty except in the first process.

        The user's callbacks ``own`` come first, as a checkpoint holds their state.  Raises
        signals.Stopped where a signal ended the training.
        """
        last = self._open_records(resuming)
        callbacks = [*own, self.journal, self.checkpoints, self.interrupts]
        if console is not None and console.is_terminal:
            callbacks.append(ProgressBar(make_bar(console), self.plan, self.journal))
        flags = self.config.trainer
        trainer = make_trainer(self.run, self.plan, self.device, callbacks, last, flags)
        ckpt_path = str(self.run.last) if resuming else None
        with self.loggers:
            with ending_together(trainer), quiet_lightning():
                # also a SIGTERM that submitit ignores
                with signals.handled(self.interrupts.note, also=(signal.SIGTERM,)):
                    trainer.fit(self.module, datamodule=self.data, ckpt_path=ckpt_path)
                is_stopped = self.interrupts.agreed(trainer)
                is_over = not is_stopped and self.journal.state["status"] != "diverged"
                final, test = self._final_scores(trainer) if is_over else (None, None)
            if self.device.rank > 0:
                return {}
            if is_stopped:
                assert self.interrupts.received is not None
                name = signal.Signals(self.interrupts.received).name
                at = f"at step {trainer.global_step} of {self.plan.total_steps}"
                line = f"stopped by {name} {at}; the same command resumes from there"
                raise signals.Stopped(self.interrupts.received, line)
            return self._finish(final, test)

    def _open_records(self, resuming: bool) -> int:
        """Open metrics, samples and loggers, and return the step to end at.

        Drops what was written after the last checkpoint.  A run that had stopped early ends where
        it stopped.
        """
        first, last = -1, self.plan.total_steps  # a new run writes step 0 itself
        if resuming:
            checkpoint = AtomicCheckpoints().load_checkpoint(self.run.last)
            first = int(checkpoint["global_step"])
            if checkpoint["callbacks"]["Journal"]["status"] == "stopped_early":
                last = first
            self.samples.restore(first)
        if self.device.rank == 0:
            self.metrics.keep_until(first)
            sizes = sizes_of(self.config, self.data, self.plan.total_steps)
            size = self.config.train.batch_tokens
            texts = {step * size: text for step, text in self.samples.texts.items()}
            self.loggers.begin(self.config, self.run, sizes, self.data.floor("val"), texts)
        return last

    def _final_scores(self, trainer: pl.Trainer) -> tuple[Scores, Scores | None]:
        """Draw a last sample, and return the scores on validation and test."""
        self.module.to(trainer.strategy.root_device)  # Lightning has moved it to the CPU
        self.samples.draw(trainer, self.module)
        if self.journal.scores is None:  # resumed at its last step
            trainer.validate(self.module, datamodule=self.data, verbose=False)
        final, test = self.journal.scores or self.module.scores, None
        if "test" in self.data.splits and self.config.trainer.limit_test_batches != 0:
            trainer.test(self.module, datamodule=self.data, verbose=False)
            test = self.module.scores
        assert final is not None
        return final, test

    def _finish(self, final: Scores | None, test: Scores | None) -> dict[str, Any]:
        """Write the results, which mark the run as finished, and return them."""
        if final is not None:
            fileio.copy(self.run.last, self.run.checkpoints / "final.ckpt")
        begun = fileio.read_json(self.run.environment)
        results = make_results(
            self.config, self.hash, self.data, self.device, self.journal.state, final, test
        )
        results |= {name: begun.get(name) for name in ("branched_from", "branched_at_step")}
        results["threads"] *= self.module.slices
        self.loggers.log_results(results)
        fileio.write_json(self.run.results, results)
        return results


def identify(
    config: Config, overrides: list[str], corpus: corpora.Corpus
) -> tuple[str, rundir.RunDir]:
    """Return the hash and the folder of a run, and fill in ``study`` and ``run_name``."""
    content = pretrained.contents(corpus, config)
    config.study = config.study or "runs"
    run = rundir.RunDir(rundir.folder_of(config, overrides, rundir.config_hash(config, content)))
    config.run_name = run.path.name
    return run.hash_in(config, content), run


def begin(
    config: Config,
    run: rundir.RunDir,
    prepared: shards.Prepared,
    device: Device,
    hash_: str,
    rounding: dict[str, Any],
    branch: Branch | None,
) -> bool:
    """Make the run folder, or check that it can be resumed here, and return whether it is."""
    run.error.unlink(missing_ok=True)
    fileio.remove_torn(run.path, run.checkpoints)
    if run.last.exists():
        repair(run)
        _check_begun(config, run, device, rounding)
        before = rundir.read_config(run.config)
        for name in rundir.FREE:
            if (old := getattr(before.train, name)) != (new := getattr(config.train, name)):
                log.info("note    train.%s=%s from here on, %s before", name, new, old)
        return True
    branching = branch is not None and branch.is_ready()
    # written first, as it identifies the run
    fileio.write_json(
        run.environment,
        rundir.environment(
            config_hash=hash_,
            precision_resolved=device.precision,
            **rounding,
            strategy=device.strategy,
            device=device.name,
            init_from=config.init_from,
            branched_from=branch.trunk.path.name if branch and branch.trunk and branching else None,
            branched_at_step=branch.step if branch and branching else None,
        ),
    )
    run.checkpoints.mkdir(exist_ok=True)
    run.write_config(config)
    prepared.tokenizer.save(run.tokenizer)
    if branch is not None and branching:
        branch.begin(run)
    elif branch is not None and branch.trunk is not None:
        line = "note    %s has no step %d: trained from the start"
        log.info(line, branch.trunk.path, branch.step)
    return branching


def _check_begun(
    config: Config, run: rundir.RunDir, device: Device, rounding: dict[str, Any]
) -> None:
    """Log what will round differently.  Raises ConfigError for a run that cannot resume here."""
    before = {"devices": 1, **fileio.read_json(run.environment, precision_resolved=str)}
    stack = (fileio.read_yaml(run.config).get("sweep") or {}).get("stack", "off")
    strategies = before.get("strategy"), rundir.read_config(run.config).hardware.strategy
    for name, is_removed in {
        "sweep.stack": before.get("stacked") or stack != "off",
        "hardware.strategy=fsdp": "fsdp" in strategies,
    }.items():
        if is_removed:
            raise ConfigError(f"{name}: removed; {run.path} was begun with it, use force=true")
    if before.get("compile") == "whole":  # as an earlier version called it
        before["compile"] = "on"
    if before["precision_resolved"] != device.precision:
        raise ConfigError(
            f"train.precision={device.precision}: {run.path} was begun at "
            f"{before['precision_resolved']}; resume with that, or use force=true"
        )
    for name, value in rounding.items():
        if before.get(name, value) != value:
            line = "note: begun with %s %s, now %s: equal within rounding, not bit for bit"
            log.info(line, name, before[name], value)


def repair(run: rundir.RunDir) -> None:
    """Replace a damaged last checkpoint with the newest intact one, and log it.

    Raises ConfigError if there is none.
    """
    io = AtomicCheckpoints()
    try:
        io.load_checkpoint(run.last)
    except ConfigError:
        steps = {}
        for path in set(run.checkpoints.glob("[!.]*.ckpt")) - {run.last}:
            with contextlib.suppress(ConfigError):
                steps[path] = int(io.load_checkpoint(path)["global_step"])
        if not steps:
            raise
        newest = max(steps, key=lambda path: (steps[path], path.name))
        log.info("note    %s is damaged: from %s, step %d", run.last, newest.name, steps[newest])
        fileio.copy(newest, run.last)


@contextlib.contextmanager
def failures_recorded(run: rundir.RunDir) -> Iterator[None]:
    """Record in ``error.json`` why a run failed, and raise RunError if it ran out of memory."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        line = " ".join(f"{type(error).__name__}: {error}".split())
        if run.environment.exists() and not isinstance(error, ConfigError):
            with contextlib.suppress(OSError):
                fileio.write_json(run.error, {"error": line})
        if is_out_of_memory(error):
            raise RunError(
                f"out of memory: {line}; try a smaller hardware.micro_batch_size or model"
            ) from error
        raise
