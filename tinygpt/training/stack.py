"""Runs that train as one: each leaves the folder that it would have left alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import lightning.pytorch as pl
import torch
from rich.console import Console
from torch import Tensor

from tinygpt import fileio, rundir, signals
from tinygpt.config import Config, ConfigError, RunError, is_out_of_memory
from tinygpt.data import corpora, shards
from tinygpt.data.datamodule import Batch
from tinygpt.trained import initial_weights
from tinygpt.training.callbacks import STRETCH, Checkpoints, Interrupts, is_rest, step_ended
from tinygpt.training.console import logging_to, preparing
from tinygpt.training.folder import begin, identify, record_failure
from tinygpt.training.hardware import choose_threads, rounding
from tinygpt.training.module import Stretch
from tinygpt.training.optim import rate_factor
from tinygpt.training.session import Run, open_data, open_machine, train
from tinygpt.training.stacked import StackedAdamW, StackedGPT
from tinygpt.training.trainer import (
    AtomicCheckpoints,
    fit,
    make_trainer,
    quiet_lightning,
)

End = dict[str, Any] | Exception  # a run's results, or why it has none


class Asked(NamedTuple):
    """A run that is asked for, and its folder."""

    config: Config
    overrides: list[str]
    hash: str
    run: rundir.RunDir


def train_stack(jobs: Sequence[tuple[Config, list[str]]], console: Console) -> list[End]:
    """Trains runs that differ in their seed or their rate alone; the end of each, in their order.

    Those that can go on from the same step form a stack, any other trains alone.  Raises
    SystemExit where they are interrupted.
    """
    corpus = corpora.open_corpus(jobs[0][0].data)
    asked = [
        Asked(config, overrides, *identify(config, overrides, corpus)) for config, overrides in jobs
    ]
    together: dict[int | None, list[Asked]] = {}
    for one in asked:
        together.setdefault(_begins_at(one), []).append(one)
    ends: dict[str, End] = {}
    for step, some in together.items():
        if step is None or len(some) == 1:
            ends |= {one.hash: _alone(one, console) for one in some}
        else:
            some.sort(key=lambda one: one.config.optim.learning_rate)  # equal rates share a call
            ends |= _Stack(some, corpus, console).train()
    return [ends[one.hash] for one in asked]


def _begins_at(one: Asked) -> int | None:
    """The step of the last checkpoint; None where a run is not to be stacked."""
    try:
        found = one.run.finished(one.hash)
        if one.config.force or not one.run.last.exists():
            return None if found and not one.config.force else 0
        checkpoint = AtomicCheckpoints().load_checkpoint(one.run.last)
    except ConfigError:
        return None  # which will say so alone
    ended = checkpoint["callbacks"]["Journal"]["status"] != "finished" or found is not None
    return None if ended else int(checkpoint["global_step"])


def _alone(one: Asked, console: Console) -> End:
    try:
        return train(one.config, one.overrides, console)
    except Exception as error:
        return error


class _Trainer:
    """What one run of a stack knows of the trainer: checkpoints and an end of its own."""

    def __init__(self, trainer: pl.Trainer, member: _Member) -> None:
        self._trainer, self._member = trainer, member
        self.should_stop = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trainer, name)

    def save_checkpoint(self, path: Any) -> None:
        """As Lightning writes it for a lone run, so that the run can go on alone."""
        dump = self._trainer._checkpoint_connector.dump_checkpoint(weights_only=True)
        AtomicCheckpoints().save_checkpoint({**dump, **self._member.checkpoint()}, path)


class _Member:
    """One run of a stack: its parts, as it would have them alone, and its place."""

    def __init__(self, one: Asked, run: Run, resuming: bool, device: torch.device) -> None:
        self.one, self.run, self.module, self.journal = one, run, run.module, run.journal
        self.first, _ = run.open_records(resuming)
        self.loops: dict[str, Any] = {}
        self.module.to(device)
        self.optimizer, self.schedule = self.module.make_optimizer(fused=True)
        if resuming:
            self._restore()
        self.checkpoints = Checkpoints(one.run, run.plan, self.journal, frozenset())
        self.place = 0
        self.stepper: StackedAdamW

    def _restore(self) -> None:
        checkpoint = AtomicCheckpoints().load_checkpoint(self.one.run.last)
        self.module.on_load_checkpoint(checkpoint)
        self.module.load_state_dict(checkpoint["state_dict"])
        self.optimizer.load_state_dict(checkpoint["optimizer_states"][0])
        self.schedule.load_state_dict(checkpoint["lr_schedulers"][0])
        self.journal.load_state_dict(checkpoint["callbacks"][self.journal.state_key])
        self.loops = checkpoint["loops"]["fit_loop"]

    def checkpoint(self) -> dict[str, Any]:
        """What differs from the others in a checkpoint; tensors of their own, not views."""
        optimizer, schedule = self.stepper.hand_over(self.place), self.schedule
        schedule.last_epoch = self.run.trainer.global_step
        schedule._step_count = schedule.last_epoch + 1
        schedule._last_lr = [group["lr"] for group in optimizer.param_groups]
        own: dict[str, Any] = _own(
            {
                "state_dict": self.module.state_dict(),
                "callbacks": {self.journal.state_key: self.journal.state_dict()},
                "optimizer_states": [optimizer.state_dict()],
                "lr_schedulers": [schedule.state_dict()],
            }
        )
        return own


def _own(values: Any) -> Any:
    """The same with every tensor copied; a view would be saved with all that it is a view of."""
    if isinstance(values, Tensor):
        return values.detach().clone(memory_format=torch.contiguous_format)
    if isinstance(values, dict):
        return {key: _own(value) for key, value in values.items()}
    return [_own(value) for value in values] if isinstance(values, list) else values


class _StackModule(pl.LightningModule):
    """The sum of the runs' losses: each parameter gets the gradient of its own run's loss."""

    def __init__(self, members: Sequence[_Member]) -> None:
        super().__init__()
        lead = members[0].run
        self.config, self.plan, self.members = lead.config, lead.plan, members
        self.stacked = StackedGPT([member.module.model for member in members])
        self.stepper = StackedAdamW(self.stacked, [member.optimizer for member in members])
        zeros = torch.zeros(len(members), dtype=torch.float64, device=self.stacked.offsets.device)
        self.stretch = Stretch(zeros)
        self.grad_norms: Tensor | None = None

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        T = batch[0].shape[-1]
        inputs, targets = (part.view(len(self.members), -1, T) for part in batch)
        losses = self.stacked.losses(inputs, targets)
        self.stretch.loss_sum += losses.detach() / self.plan.accumulate
        return losses.sum()

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        self.grad_norms = self.stepper.clip(self.config.train.grad_clip_norm)
        self.stretch.see(self.grad_norms)

    def configure_optimizers(self) -> Any:
        plan, schedule = self.plan, self.config.schedule

        def factor(step: int) -> float:
            steps = {"total_steps": plan.total_steps, "warmup_steps": plan.warmup_steps}
            return rate_factor(step, schedule, **steps)

        first = self.members[0].first
        rates = torch.optim.lr_scheduler.LambdaLR(self.stepper, factor, last_epoch=first - 1)
        return {
            "optimizer": self.stepper,
            "lr_scheduler": {"scheduler": rates, "interval": "step"},
        }

    def tell(self) -> None:
        """Gives the runs what was measured of them."""
        for member in self.members:
            for name in STRETCH:
                measured = getattr(self.stretch, name)[member.place]
                setattr(member.module.stretch, name, measured.clone())
            if self.grad_norms is not None:
                member.module.grad_norm = self.grad_norms[member.place]

    def ask(self) -> None:
        """Goes on summing where the runs are, which may have begun a new stretch of steps."""
        for member in self.members:
            for name in STRETCH:
                getattr(self.stretch, name)[member.place] = getattr(member.module.stretch, name)


class _Members(pl.Callback):
    """The callbacks of every run that has not ended, in turn; their clocks stand meanwhile."""

    def __init__(self, module: _StackModule, console: Console) -> None:
        self.module, self.console = module, console
        self.active = list(module.members)
        self.ends: dict[str, End] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for member in list(self.active):
            with self._speaking(member):
                member.journal.on_train_start(member.run.trainer, member.module)
        self.module.ask()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        for member in self.active:
            member.journal.start_clock()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        step, plan = trainer.global_step, self.module.plan
        if not step_ended(trainer, batch_idx) or not is_rest(step, self.module.config, plan):
            return
        self._rest()
        for member in list(self.active):
            own = member.run.trainer
            with self._speaking(member):
                for callback in (member.journal, member.checkpoints):
                    callback.on_train_batch_end(own, member.module, outputs, batch, batch_idx)
                if own.should_stop or step >= plan.total_steps:
                    self._finish(member)
        self.module.ask()
        trainer.should_stop = trainer.should_stop or not self.active

    def finish_all(self) -> None:
        """For runs that were killed behind their last step."""
        for member in list(self.active):
            with self._speaking(member):
                self._finish(member)

    def _finish(self, member: _Member) -> None:
        self._end(member, member.run.finish(*member.run.final_scores()))

    def _rest(self) -> None:
        self.module.tell()
        for member in self.active:
            member.journal.stop_clock()

    @contextlib.contextmanager
    def _speaking(self, member: _Member) -> Iterator[None]:
        """What is said is this run's; where it fails the others go on."""
        try:
            with logging_to(self.console, member.one.run):
                yield
        except Exception as error:
            record_failure(member.one.run, error)
            self._end(member, error)

    def _end(self, member: _Member, end: End) -> None:
        self.ends[member.one.hash] = end
        self.active.remove(member)
        self.module.stepper.freeze(member.place)
        member.run.loggers.close("failed" if isinstance(end, Exception) else "success")

    def save(self) -> None:
        """Every run's last checkpoint, on an interrupt."""
        self._rest()
        for member in self.active:
            member.run.trainer.save_checkpoint(member.one.run.last)

    def fail(self, error: Exception) -> None:
        """What fails for all is said of each."""
        for member in list(self.active):
            with self._speaking(member):
                raise error

    def leave(self, number: int) -> None:
        for member in self.active:
            quietly = contextlib.suppress(signals.Stopped)
            with quietly, logging_to(self.console, member.one.run), member.run.loggers:
                member.run.leave_interrupted(number)
        raise signals.Stopped(number)


class _Stack:
    """Runs that begin at the same step, trained as one."""

    def __init__(self, asked: Sequence[Asked], corpus: corpora.Corpus, console: Console) -> None:
        self.asked, self.console, config = asked, console, asked[0].config
        self.device = open_machine(config)
        cache = shards.cache_root(config.cache_dir)
        with preparing(console) as progress:
            self.prepared = shards.prepare(corpus, config.data, config.tokenizer, cache, progress)
        self.data = open_data(config, self.prepared, self.device)
        assert self.data.plan is not None
        vocab_size = self.prepared.tokenizer.vocab_size
        self.initial = initial_weights(config, vocab_size)
        first = asked[0].run
        before = fileio.read_json(first.environment) if first.last.exists() else {}
        choose_threads(config, vocab_size, self.data.plan, self.device, before)
        begun = {"compile": "off"}
        self.rounds = rounding(config, vocab_size, self.data.plan, self.device, begun)

    def train(self) -> dict[str, End]:
        """The end of every run, by its hash."""
        ends: dict[str, End] = {}
        members: list[_Member] = []
        with contextlib.ExitStack() as locks:
            for one in self.asked:
                try:
                    locks.enter_context(one.run.locked())
                    members.append(self._open(one))
                except Exception as error:
                    record_failure(one.run, error)
                    ends[one.hash] = error
            return ends | (self._fit(members) if members else {})

    def _open(self, one: Asked) -> _Member:
        if one.config.force:
            one.run.clear()
        with logging_to(self.console, one.run):
            size = len(self.asked)
            resuming = begin(
                *(one.config, one.run, self.prepared, self.device, one.hash, self.rounds, None),
                stacked=size,
            )
            run = Run(
                *(one.config, one.run, self.data, self.device, one.hash, self.console),
                compiled="off",
                initial=self.initial,
                stacked=size,
            )
            return _Member(one, run, resuming, torch.device(self.device.accelerator))

    def _fit(self, members: Sequence[_Member]) -> dict[str, End]:
        lead = members[0]
        module = _StackModule(members)
        self.data.seeds = [member.one.config.seed for member in members]
        callback = _Members(module, self.console)
        interrupts = Interrupts(callback.save, module.config, module.plan)
        trainer = make_trainer(
            lead.one.run,
            module.plan,
            self.device,
            [callback, interrupts],
            module.plan.total_steps,
        )
        for place, member in enumerate(members):
            member.place, member.stepper = place, module.stepper
            member.run.trainer = cast(pl.Trainer, _Trainer(trainer, member))
        if lead.loops:
            trainer.fit_loop.load_state_dict(lead.loops)
        try:
            with quiet_lightning():
                fit(trainer, module, self.data, interrupts.note)
        except Exception as error:
            callback.fail(_explained(error))
        if interrupts.received is not None:
            callback.leave(interrupts.received)
        callback.finish_all()
        return callback.ends


def _explained(error: Exception) -> Exception:
    if is_out_of_memory(error):
        return RunError(f"out of memory: {error}; try a smaller hardware.micro_batch_size or stack")
    return error
