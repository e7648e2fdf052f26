"""The machine as it was in training: on the same device a loss then is the same to the last bit."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from tinygpt import fileio, rundir
from tinygpt.config import Config, ConfigError
from tinygpt.evaluating.options import Options
from tinygpt.model import linear
from tinygpt.training.hardware import set_up
from tinygpt.training.trainer import PASS_TOKENS, Device, resolve_device

HALF = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


@dataclass(frozen=True)
class Machine:
    """What a run is scored on."""

    resolved: Device
    config: Config  # of the run, with the hardware of this evaluation

    @property
    def device(self) -> torch.device:
        return torch.device(self.resolved.accelerator)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return torch.float64 if self.resolved.precision == "64" else torch.float32

    def autocast(self) -> AbstractContextManager[Any]:
        half = HALF.get(self.resolved.precision)
        if half is None:
            return nullcontext()
        return torch.autocast(self.device.type, half, cache_enabled=False)

    def rows(self, length: int) -> int:
        """Sequences of so many tokens that one pass takes well."""
        return max(1, PASS_TOKENS[self.resolved.accelerator] // length)


@contextlib.contextmanager
def as_in_training(run: rundir.RunDir, config: Config, options: Options) -> Iterator[Machine]:
    """Precision, threads and matrix products of the run, but for what ``options`` says of them.

    Raises ConfigError where this machine lacks a device or a precision.
    """
    begun = fileio.read_json(run.environment)
    of_cpu = begun.get("device") == "cpu"
    if of_cpu:
        begun = fileio.read_json(run.environment, threads=int)
    threads = min(begun["threads"], os.cpu_count() or 1) if of_cpu else None
    hardware = dataclasses.replace(
        config.hardware,
        accelerator=options.device,
        devices=1,
        num_nodes=1,
        strategy="auto",
        threads=options.threads or threads,
        compile="off",
    )
    precision = options.precision
    if precision == "auto":
        precision = begun["precision_resolved"]
    try:
        resolved = resolve_device(hardware, precision)
    except ConfigError as error:
        line = str(error).replace("hardware.accelerator=", "device=")
        line = line.replace("train.precision=", "precision=")
        as_trained = options.precision == "auto" and "precision=" in line
        raise ConfigError(f"{line}, as {run.path} was trained" if as_trained else line) from error
    before = torch.get_num_threads()
    try:
        set_up(hardware, resolved)
        if of_cpu and "matmul" in begun:
            linear.use_onednn(begun["matmul"] == "onednn" and linear.onednn_is_there())
        if resolved.accelerator == "cuda":
            torch.set_float32_matmul_precision("high")  # TF32, as the Trainer has it
        yield Machine(resolved, dataclasses.replace(config, hardware=hardware))
    finally:
        torch.set_num_threads(before)
        linear.use_onednn(None)
