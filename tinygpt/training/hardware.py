"""Choose the device of a run, and set up threads, memory and compilation on it."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import logging
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import psutil
import torch
from lightning.pytorch.strategies import DDPStrategy, ParallelStrategy

from tinygpt.config import Config, ConfigError, HardwareConfig
from tinygpt.config.counting import count_parameters
from tinygpt.config.horizon import Plan
from tinygpt.model.gpt import GPT
from tinygpt.model.kernels import onednn_is_used
from tinygpt.runs.load import usable_device
from tinygpt.training.optim import make_optimizer
from tinygpt.training.slices import mean_loss

AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
KEPT_BYTES = 2**30
MMAP_BYTES = 2**25  # glibc's limit; larger tensors come from the system as before
SMALL = 2_000_000  # parameters: below, threads that share an operator mostly wait
GRADIENTS = 2**28  # numbers that the gradients of further slices may take: 1 GiB
SLICE_TOKENS, MOST_SLICES = 256, 8  # otherwise threads would wait for Python, which runs one
COMPILING_PAYS = 300.0  # seconds of uncompiled training; compiling takes about a tenth of it


@dataclass(frozen=True)
class Device:
    """Hold what ``hardware`` and ``train.precision`` resolve to on this machine."""

    accelerator: str  # cpu, mps or cuda
    precision: str  # 32, 64, bf16-mixed or 16-mixed
    devices: int = 1  # on each node
    num_nodes: int = 1
    strategy: str = "auto"  # ddp; auto: one device
    rank: int = 0  # of this process; only rank 0 prints and writes

    @property
    def world_size(self) -> int:
        return self.devices * self.num_nodes

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name() if self.accelerator == "cuda" else self.accelerator


def resolve_device(hardware: HardwareConfig, precision: str) -> Device:
    """Return the device to compute on.  Raises ConfigError where the machine lacks it."""
    kind = usable_device(hardware.accelerator, "hardware.accelerator").type
    full = ("32", "64", "bf16-mixed")
    allowed = {"cpu": full, "mps": ("32",), "cuda": (*full, "16-mixed")}[kind]
    if precision == "auto":
        precision = "32"
        if kind == "cuda":
            precision = "bf16-mixed" if torch.cuda.is_bf16_supported() else "16-mixed"
    if precision not in allowed:
        raise ConfigError(
            f"train.precision={precision}: on {kind} one of auto, {', '.join(allowed)}"
        )
    devices = hardware.devices
    if kind == "cuda":
        count = torch.cuda.device_count()
        if devices > count:
            raise ConfigError(f"hardware.devices={devices}: this machine has {count}")
        devices = count if devices == -1 else devices
    elif devices == -1:
        raise ConfigError(f"hardware.devices=-1: on {kind} say how many")
    if kind == "mps" and devices * hardware.num_nodes > 1:
        raise ConfigError(f"hardware.devices={devices}: mps has one device")
    strategy = "ddp" if devices * hardware.num_nodes > 1 else "auto"
    device = Device(kind, precision, devices, hardware.num_nodes, strategy)
    return device if strategy == "auto" else dataclasses.replace(device, rank=_rank(device))


def _rank(device: Device) -> int:
    """Return the rank of this process, launched by Lightning, by srun or by torchrun."""
    try:
        with quiet_lightning():
            trainer = pl.Trainer(**placement(device), logger=False, enable_checkpointing=False)
        strategy = trainer.strategy
        assert isinstance(strategy, ParallelStrategy)
        assert strategy.cluster_environment is not None
        strategy.cluster_environment.validate_settings(device.devices, device.num_nodes)
    except (RuntimeError, ValueError) as error:  # srun was asked for other numbers
        raise ConfigError(f"hardware.devices={device.devices}: {error}") from error
    return trainer.global_rank


def placement(device: Device) -> dict[str, Any]:
    """Return the Trainer's arguments that say where it runs."""
    ddp = device.strategy == "ddp"
    return {
        "accelerator": device.accelerator,
        "devices": device.devices,
        "num_nodes": device.num_nodes,
        "strategy": DDPStrategy(broadcast_buffers=False) if ddp else "auto",  # they are constants
    }


@contextlib.contextmanager
def quiet_lightning() -> Iterator[None]:
    """Hide Lightning's hints, which are meant for its own users."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning.*")
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        yield


def set_up(hardware: HardwareConfig, device: Device) -> None:
    """Set the threads and the allocator of this process, before a model is made.

    Without ``hardware.threads``, several processes divide the cores between them; a single process
    chooses its threads later.  Raises ConfigError for what the device cannot do.
    """
    if hardware.compile == "on" and device.accelerator == "mps":
        raise ConfigError("hardware.compile=on: on mps one of auto, off")
    _default_threads()
    threads = hardware.threads
    if threads is None and device.devices > 1:
        share = max(1, (os.cpu_count() or 1) // device.devices)
        threads = min(share, torch.get_num_threads())
    if threads is not None:
        torch.set_num_threads(threads)
    if device.world_size > 1:
        os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())  # else Lightning sets its own
    if device.accelerator == "cpu":
        _keep_freed_memory()


@functools.cache
def _default_threads() -> int:
    """Return torch's own number of threads; it must be asked before a run sets another."""
    return torch.get_num_threads()


def choose_slices(
    config: Config, vocab_size: int, plan: Plan, device: Device, begun: Mapping[str, Any]
) -> int:
    """Return into how many slices to divide a pass, and set the threads that each may use.

    On a CPU there is a slice for each thread, unless slices become too small or their gradients too
    large.  What is left of the threads speeds up the operators of a large model; those of a small
    one would only wait.  A resumed run, whose environment is ``begun``, keeps its slices.
    """
    if device.accelerator != "cpu" or device.world_size > 1:
        return 1
    given, most = config.hardware.threads, _default_threads()
    threads = given or begun.get("threads") or most
    slices: int = begun.get("slices", 1)
    if not begun:
        size, rows = count_parameters(config.model, vocab_size).total, plan.micro_batch_size
        if device.precision in ("32", "64") and config.hardware.compile != "on":
            least = rows * config.model.max_seq_len // SLICE_TOKENS
            most = max(1, min(threads, MOST_SLICES, least, 1 + GRADIENTS // size))
            slices = math.ceil(rows / math.ceil(rows / most))
        if size < SMALL and given is None:
            threads = slices
    torch.set_num_threads(max(1, threads // slices))
    return slices


def seconds_per_step(config: Config, vocab_size: int, plan: Plan, device: Device) -> float:
    """Return the seconds of one optimizer step over random tokens."""
    slices = choose_slices(config, vocab_size, plan, device, {})
    model = GPT(config.model, vocab_size).to(device.accelerator)
    optimizer = make_optimizer(model, config.optim, fused=False)
    shape = (plan.micro_batch_size, config.model.max_seq_len + 1)
    tokens = torch.randint(vocab_size, shape, device=device.accelerator)
    dtype = AUTOCAST.get(device.precision)

    def one_pass() -> None:
        with torch.autocast(device.accelerator, dtype, enabled=dtype is not None):
            loss = mean_loss(model, slices, tokens[:, :-1], tokens[:, 1:])
        torch.autograd.backward(loss)

    one_pass()
    optimizer.step()  # the first makes the moments
    return plan.accumulate * _mean_seconds(one_pass, 0.3) + _mean_seconds(optimizer.step, 0.05)


def _mean_seconds(work: Callable[[], object], seconds: float) -> float:
    """Return the mean seconds of calling ``work`` for ``seconds``."""
    begun, times = time.perf_counter(), 0
    while time.perf_counter() - begun < seconds or not times:
        work()
        times += 1
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()
    return (time.perf_counter() - begun) / times


def _keep_freed_memory() -> None:
    """Make glibc's malloc keep freed memory for the next step.

    Otherwise the system would zero every page again, up to a third of the time of a small step.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # not glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, MMAP_BYTES)
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)


def peak_memory(accelerator: str) -> int | None:
    """Return the peak of the bytes allocated on CUDA, or resident in this process."""
    if accelerator == "cuda":
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def numerics(
    config: Config, vocab_size: int, plan: Plan, device: Device, begun: dict[str, Any]
) -> dict[str, Any]:
    """Return what decides the last bits of a result, for environment.json, and set the threads.

    ``auto`` compiles on one CUDA device if the run is long enough to pay for it.  A resumed run,
    whose environment is ``begun``, keeps its choice.
    """
    compiled = config.hardware.compile
    if compiled == "auto":
        compiled = "off" if begun.get("compile", "off") == "off" else "on"  # it once was "whole"
        if "compile" not in begun and device.accelerator == "cuda" and device.world_size == 1:
            seconds = plan.total_steps * seconds_per_step(config, vocab_size, plan, device)
            compiled = "on" if seconds > COMPILING_PAYS else "off"
    slices = choose_slices(config, vocab_size, plan, device, begun)
    return {
        "threads": slices * torch.get_num_threads(),
        "slices": slices,
        "devices": device.world_size,
        "matmul": "onednn" if device.accelerator == "cpu" and onednn_is_used() else "torch",
        "compile": compiled,
    }
