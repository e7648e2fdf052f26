"""How long a step takes here, from a few passes over random tokens."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from tinygpt.config import Config
from tinygpt.horizon import Plan
from tinygpt.model.gpt import GPT
from tinygpt.training.optim import make_optimizer
from tinygpt.training.trainer import Device

AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


def seconds_per_step(config: Config, vocab_size: int, plan: Plan, device: Device) -> float:
    """Seconds of one optimizer step: its passes, timed for a third of a second, and the update."""
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
    return plan.accumulate * _timed(one_pass, device, 0.3) + _timed(optimizer.step, device, 0.05)


def _timed(work: Callable[[], object], device: Device, seconds: float) -> float:
    begun, times = time.perf_counter(), 0
    while times == 0 or time.perf_counter() - begun < seconds:
        work()
        times += 1
        if device.accelerator == "cuda":
            torch.cuda.synchronize()
    return (time.perf_counter() - begun) / times
