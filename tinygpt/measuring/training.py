"""The real Trainer, its callbacks and its files, stopped between two steps to be timed."""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import psutil
import torch
from rich.console import Console
from torch import Tensor
from torch.utils.data import Dataset

from tinygpt import rundir
from tinygpt.config import Config
from tinygpt.counting import count_parameters, flops_per_token
from tinygpt.data.datamodule import Batch, StepLoader, TokenData
from tinygpt.measuring.tokens import open_tokens
from tinygpt.measuring.turns import Clock, Lap, Player
from tinygpt.training.callbacks import peak_memory, step_ended
from tinygpt.training.hardware import rounding
from tinygpt.training.session import Run, open_data, open_machine
from tinygpt.training.trainer import Device

PARTS = ("data", "forward", "backward", "optimizer", "framework")


@dataclass
class Training:
    """What there is to train, before it starts."""

    run: Run
    device: Device
    clock: Clock
    facts: dict[str, Any]
    resident: int  # bytes, before there is a model

    @property
    def peak_bytes(self) -> int:
        return (peak_memory(self.device.accelerator) or 0) - self.resident


def prepare(config: Config, tokens: Path) -> Training:
    """A run of ``config`` on random tokens.  Raises ConfigError where the machine lacks a part."""
    device = open_machine(config)
    data = open_data(config, open_tokens(tokens), device)
    assert data.plan is not None
    resident = 0 if device.accelerator == "cuda" else psutil.Process().memory_info().rss
    place = rundir.RunDir(Path(tempfile.mkdtemp(dir=tokens)))  # goes with the tokens
    config.run_name, config.study = place.path.name, "benchmark"
    place.checkpoints.mkdir()
    facts = facts_of(config, data, device)
    run = Run(config, place, data, device, "", Console(quiet=True), facts["compile"])
    return Training(run, device, clock_of(device), facts, resident)


def clock_of(device: Device) -> Clock:
    return Clock(torch.cuda.synchronize) if device.accelerator == "cuda" else Clock()


def facts_of(config: Config, data: TokenData, device: Device) -> dict[str, Any]:
    """What was decided here, for the rows of the table."""
    assert data.plan is not None
    vocab_size = data.prepared.tokenizer.vocab_size
    rounds = rounding(config, vocab_size, data.plan, device, {})
    return {
        "device": device.name,
        "precision": device.precision,
        **{name: rounds[name] for name in ("threads", "compile", "matmul")},
        "parameters": count_parameters(config.model, vocab_size).total,
        "flops_per_token": flops_per_token(config.model, vocab_size),
        "micro_batch_size": data.plan.micro_batch_size,
    }


def probe_loss(loss_of: Callable[[Tensor, Tensor], Tensor], data: TokenData) -> float:
    """Of the first batch of the file, before any step: the same wherever the same is trained."""
    assert data.plan is not None
    starts = torch.arange(data.plan.batch_size).numpy() * data.length
    tokens = torch.from_numpy(data.splits["train"].gather(starts, data.length + 1))
    with torch.no_grad():
        return float(loss_of(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()))


class Turns(pl.Callback):
    """After each turn's steps it stops the clock and waits for the next turn."""

    def __init__(self, training: Training, player: Player, warmup: int) -> None:
        self.training, self.player, self.left = training, player, warmup
        self.steps = 0  # of this turn; none in the warmup
        self.timeline: Timeline | None = None

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if not step_ended(trainer, batch_idx):
            return
        self.left -= 1
        if self.left > 0:
            return
        training, timeline = self.training, self.timeline
        if self.steps == 0:
            training.clock.wait()
            self.player.say(facts={**training.facts, "cpu_seconds": time.process_time()})
        elif timeline is not None:
            timeline.mark("framework")
            self.player.done(timeline.laps(self.steps))
        else:
            tokens = self.steps * training.run.config.train.batch_tokens
            laps = {"train": training.clock.lap(tokens)}
            self.player.done(laps, peak_bytes=training.peak_bytes)
        self.steps = self.left = self.player.turn()
        training.clock.start()
        if timeline is not None:
            timeline.forget()


class Timeline(pl.Callback):
    """Every moment of a step belongs to one part: the time since the last mark to the named one.

    The gradient of the loss by the logits is made on the way forward, and counts there.
    On CUDA each mark waits for the device, so that the parts are true and their sum is larger
    than a step of its own.
    """

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.forget()

    def forget(self) -> None:
        self.spent = {part: Lap(0, 0.0, 0.0) for part in PARTS}

    def mark(self, part: str) -> None:
        before, lap = self.spent[part], self.clock.lap(0)
        self.spent[part] = Lap(0, before.wall + lap.wall, before.cpu + lap.cpu)

    def laps(self, steps: int) -> dict[str, Lap]:
        return {part: Lap(steps, lap.wall, lap.cpu) for part, lap in self.spent.items()}

    def watch(self, run: Run) -> None:
        """Marks where the module and the data begin and end what Lightning has no hook for."""
        module, data = run.module, run.data
        for name, part in (
            ("training_step", "forward"),
            ("configure_gradient_clipping", "optimizer"),
            ("transfer_batch_to_device", "data"),
        ):
            setattr(module, name, self._marked(getattr(module, name), part))
        load = data.train_dataloader
        data.train_dataloader = lambda: self._marked_loader(load())  # type: ignore[method-assign]

    def _marked(self, work: Callable[..., Any], part: str) -> Callable[..., Any]:
        @functools.wraps(work)
        def marked(*args: Any, **kwargs: Any) -> Any:
            self.mark("framework")
            result = work(*args, **kwargs)
            self.mark(part)
            return result

        return marked

    def _marked_loader(self, loader: StepLoader) -> StepLoader:
        batches = _Marked(self._marked(loader.dataset.__getitem__, "data"))
        pinned = loader.pin_memory
        return StepLoader(batches, batch_size=None, sampler=loader.sampler, pin_memory=pinned)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for optimizer in trainer.optimizers:
            optimizer.register_step_post_hook(lambda *_: self.mark("optimizer"))

    def on_before_zero_grad(self, *_: Any) -> None:
        self.mark("framework")

    def on_before_backward(self, *_: Any) -> None:
        self.mark("optimizer")

    def on_after_backward(self, *_: Any) -> None:
        self.mark("backward")


class _Marked(Dataset[Batch]):
    def __init__(self, read: Callable[[int], Batch]) -> None:
        self.read = read

    def __getitem__(self, index: int) -> Batch:
        return self.read(index)


def play_training(
    config: Config, tokens: Path, player: Player, *, warmup: int, by_part: bool, probe: bool
) -> None:
    """Trains until nobody gives a turn any more."""
    training = prepare(config, tokens)
    turns = Turns(training, player, warmup)
    watchers: list[pl.Callback] = [turns]
    if by_part:
        turns.timeline = Timeline(training.clock)
        turns.timeline.watch(training.run)
        watchers.insert(0, turns.timeline)
    if probe:
        training.facts["probe_loss"] = probe_loss(training.run.module.model, training.run.data)
    training.run.train(resuming=False, watchers=watchers)
