"""Choose the device of a run, and set up threads, memory and compilation on it."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import psutil
import torch
from lightning.pytorch.strategies import DDPStrategy, ParallelStrategy

from tinygpt.config import Config, ConfigError, HardwareConfig, ModelConfig
from tinygpt.config.counting import count_parameters
from tinygpt.config.horizon import Plan
from tinygpt.model.gpt import GPT, Block, rotary_tables
from tinygpt.model.kernels import onednn_is_used
from tinygpt.runs.load import usable_device
from tinygpt.training.optim import make_optimizer

AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
KEPT_BYTES = 2**30
MMAP_BYTES = 2**25  # glibc's limit; larger tensors come from the system as before
SMALL = 2_000_000  # parameters: below, one thread is enough
MIN_SPEEDUP = 1.2  # by which more threads must be faster
TIMED_FLOPS = 2e9  # of a timed block
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


def choose_threads(
    config: Config, vocab_size: int, plan: Plan, device: Device, begun: dict[str, Any]
) -> str | None:
    """Set the number of CPU threads unless it is given, and return a line that says why.

    A resumed run, whose environment is ``begun``, keeps its number.  A small model gets one thread:
    more help little, and wait for one another where other programs run.  For a larger model, a
    block is timed on one, half and all of torch's threads.
    """
    most, hardware = _default_threads(), config.hardware
    if hardware.threads is not None or device.accelerator != "cpu" or device.world_size > 1:
        return None
    if "threads" in begun:
        torch.set_num_threads(begun["threads"])
        return f"{begun['threads']}, as it began"
    if most == 1 or "OMP_NUM_THREADS" in os.environ:
        return None
    chosen, why = 1, "as the model is small"
    if count_parameters(config.model, vocab_size).total >= SMALL:
        key = f"{config.model} {plan.micro_batch_size}"
        seconds = _block_times.setdefault(key, {})
        for count in [n for n in sorted({1, most // 2, most}) if n not in seconds]:
            torch.set_num_threads(count)
            seconds[count] = _block_seconds(config.model, plan)
        for count in sorted(seconds):
            chosen = count if seconds[count] * MIN_SPEEDUP < seconds[chosen] else chosen
        why = ", ".join(f"{1000 * s:.3g} ms a block on {n}" for n, s in sorted(seconds.items()))
    torch.set_num_threads(chosen)
    return f"{chosen} of {most}: {why}"


# Seconds by the number of threads, for each model, so that the runs of a sweep choose once.
_block_times: dict[str, dict[int, float]] = {}


def _block_seconds(model: ModelConfig, plan: Plan) -> float:
    """Return the seconds of a forward and backward pass of a block over part of a micro-batch."""
    with torch.random.fork_rng(devices=[]):
        block = Block(dataclasses.replace(model, dropout=0.0))
        size = sum(p.numel() for p in block.parameters())
        most = max(16, TIMED_FLOPS / (6 * size))  # about ten milliseconds
        tokens = int(min(plan.micro_batch_size * model.max_seq_len, most))
        T = min(model.max_seq_len, tokens)
        x = torch.randn(tokens // T, T, model.d_model)
    rotary = None
    if model.position == "rope":
        rotary = rotary_tables(T, model.d_model // model.n_heads, model.rope_theta)

    def one_pass() -> None:
        torch.autograd.backward(block(x, rotary).sum())

    one_pass()
    return _mean_seconds(one_pass, 0.05, least=2)


def seconds_per_step(config: Config, vocab_size: int, plan: Plan, device: Device) -> float:
    """Return the seconds of one optimizer step over random tokens."""
    model = GPT(config.model, vocab_size).to(device.accelerator)
    optimizer = make_optimizer(model, config.optim, fused=False)
    shape = (plan.micro_batch_size, config.model.max_seq_len + 1)
    tokens = torch.randint(vocab_size, shape, device=device.accelerator)
    dtype = AUTOCAST.get(device.precision)

    def one_pass() -> None:
        with torch.autocast(device.accelerator, dtype, enabled=dtype is not None):
            loss = model(tokens[:, :-1], tokens[:, 1:])
        torch.autograd.backward(loss)

    one_pass()
    optimizer.step()  # the first makes the moments
    return plan.accumulate * _mean_seconds(one_pass, 0.3) + _mean_seconds(optimizer.step, 0.05)


def _mean_seconds(work: Callable[[], object], seconds: float, least: int = 1) -> float:
    """Return the mean seconds of calling ``work`` for ``seconds``, at least ``least`` times."""
    begun, times = time.perf_counter(), 0
    while times < least or time.perf_counter() - begun < seconds:
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
    """Return what decides the last bits of a result, for environment.json.

    ``auto`` compiles on one CUDA device if the run is long enough to pay for it.  A resumed run,
    whose environment is ``begun``, keeps its choice.
    """
    compiled = config.hardware.compile
    if compiled == "auto":
        compiled = "off" if begun.get("compile", "off") == "off" else "on"  # it once was "whole"
        if "compile" not in begun and device.accelerator == "cuda" and device.world_size == 1:
            seconds = plan.total_steps * seconds_per_step(config, vocab_size, plan, device)
            compiled = "on" if seconds > COMPILING_PAYS else "off"
    return {
        "threads": torch.get_num_threads(),
        "devices": device.world_size,
        "matmul": "onednn" if device.accelerator == "cpu" and onednn_is_used() else "torch",
        "compile": compiled,
    }
