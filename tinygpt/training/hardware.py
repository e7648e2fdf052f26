"""What ``hardware`` asks of a process beyond its device: threads, memory, products, compiling."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import os
import time
from typing import Any

import torch

from tinygpt.config import Config, ConfigError, HardwareConfig, ModelConfig
from tinygpt.counting import count_parameters
from tinygpt.horizon import Plan
from tinygpt.model.gpt import Block, rotary_tables
from tinygpt.model.linear import onednn_is_used
from tinygpt.training.calibration import seconds_per_step
from tinygpt.training.trainer import Device

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
KEPT_BYTES = 2**30
LARGEST = 2**25  # what glibc takes; a tensor beyond that is the system's as before
SMALL = 2_000_000  # parameters: with fewer, one thread is enough
GAIN = 1.2  # so many times as fast must more threads be
TIMED = 2e9  # FLOPs of a block that is timed
COMPILING_PAYS = 300.0  # seconds of training, uncompiled; compiling takes about a tenth of it


def set_up(hardware: HardwareConfig, device: Device) -> None:
    """Before a model is made.  Raises ConfigError for what this machine does not have."""
    if hardware.compile == "on" and device.accelerator == "mps":
        raise ConfigError("hardware.compile=on: on mps one of auto, off")
    set_threads(hardware, device)
    if device.accelerator == "cpu":
        keep_freed_memory()


def set_threads(hardware: HardwareConfig, device: Device) -> None:
    """CPU threads: what is asked for, else torch's choice, which processes side by side share;
    alone, a run chooses for itself once its model is known."""
    _most_threads()
    threads = hardware.threads
    if threads is None and device.devices > 1:
        share = max(1, (os.cpu_count() or 1) // device.devices)
        threads = min(share, torch.get_num_threads())
    if threads is not None:
        torch.set_num_threads(threads)
    if device.world_size > 1:
        os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())  # else Lightning sets its own


@functools.cache
def _most_threads() -> int:
    """What torch takes by itself; asked before a run has chosen."""
    return torch.get_num_threads()


def choose_threads(
    config: Config, vocab_size: int, plan: Plan, device: Device, begun: dict[str, Any]
) -> str | None:
    """Sets the number of CPU threads where nobody gave it, and says in a line how it came about.

    A run that is taken up, of which ``begun`` is the beginning, keeps its number.  A small model
    takes one thread: more gain little, and wait for one another where others are at work.  Of a
    larger one a block is timed on one, half and all of torch's threads; more must be worth it.
    """
    most, hardware = _most_threads(), config.hardware
    if hardware.threads is not None or device.accelerator != "cpu" or device.world_size > 1:
        return None
    if "threads" in begun:
        torch.set_num_threads(begun["threads"])
        return f"{begun['threads']}, as it began"
    if most == 1 or "OMP_NUM_THREADS" in os.environ:
        return None
    chosen, why = 1, "as the model is small"
    if count_parameters(config.model, vocab_size).total >= SMALL:
        key = f"{config.model} {plan.micro_batch_size}"  # the runs of a sweep choose once
        seconds = _timed.setdefault(key, {})
        for count in [n for n in sorted({1, most // 2, most}) if n not in seconds]:
            torch.set_num_threads(count)
            seconds[count] = _block_seconds(config.model, plan)
        for count in sorted(seconds):
            chosen = count if seconds[count] * GAIN < seconds[chosen] else chosen
        why = ", ".join(f"{1000 * s:.3g} ms a block on {n}" for n, s in sorted(seconds.items()))
    torch.set_num_threads(chosen)
    return f"{chosen} of {most}: {why}"


_timed: dict[str, dict[int, float]] = {}  # by model: seconds by the number of threads


def _block_seconds(model: ModelConfig, plan: Plan) -> float:
    """Of one pass through a block of ``model`` and back, over as much of a micro-batch as takes
    some ten milliseconds; the mean over a while, as others at work slow some passes alone."""
    with torch.random.fork_rng(devices=[]):
        block = Block(dataclasses.replace(model, dropout=0.0))
        size = sum(p.numel() for p in block.parameters())
        tokens = int(min(plan.micro_batch_size * model.max_seq_len, max(16, TIMED / (6 * size))))
        T = min(model.max_seq_len, tokens)
        x = torch.randn(tokens // T, T, model.d_model)
    rotary = None
    if model.position == "rope":
        rotary = rotary_tables(T, model.d_model // model.n_heads, model.rope_theta)
    begun, passes = 0.0, -1
    while passes < 2 or time.perf_counter() - begun < 0.05:
        if passes == 0:  # the first is not timed
            begun = time.perf_counter()
        torch.autograd.backward(block(x, rotary).sum())
        passes += 1
    return (time.perf_counter() - begun) / passes


def keep_freed_memory() -> bool:
    """Has malloc keep what is freed for the next step; whether it can (glibc).

    It would give tensors back to the system, which zeroes every page of them anew when the next
    step asks: up to a third of the time of a small step.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # not glibc
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST) and mallopt(M_TRIM_THRESHOLD, KEPT_BYTES))


def rounding(
    config: Config, vocab_size: int, plan: Plan, device: Device, begun: dict[str, Any]
) -> dict[str, Any]:
    """What decides the last bits of a result, as environment.json keeps it.

    ``begun`` is what a run that is taken up began with: ``auto`` stays what it was then.
    """
    compiled = config.hardware.compile
    if compiled == "auto":
        before = begun.get("compile") or _auto_compile(config, vocab_size, plan, device)
        compiled = "off" if before == "off" else "on"  # earlier versions had three ways to compile
    return {
        "threads": torch.get_num_threads(),
        "devices": device.world_size,
        "matmul": "onednn" if device.accelerator == "cpu" and onednn_is_used() else "torch",
        "compile": compiled,
    }


def _auto_compile(config: Config, vocab_size: int, plan: Plan, device: Device) -> str:
    """Return "on" with one CUDA device and a run long enough to pay for it, else "off"."""
    if device.accelerator != "cuda" or device.world_size > 1:
        return "off"
    seconds = plan.total_steps * seconds_per_step(config, vocab_size, plan, device)
    return "on" if seconds > COMPILING_PAYS else "off"
