"""Derive everything that is counted in steps from the horizon and the batch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tinygpt.config import HORIZONS, Config, TrainConfig
from tinygpt.config.checks import require

MOST_STEPS = 10**12
# Tokens per pass beyond which a larger pass is no faster.
PASS_TOKENS = {"cpu": 8192, "mps": 16384, "cuda": 65536}


@dataclass(frozen=True)
class Plan:
    """Hold what follows from a configuration and its data, in optimizer steps."""

    total_steps: int
    train_tokens: int
    warmup_steps: int
    eval_steps: int
    checkpoint_steps: int
    keep_steps: int | None
    batch_size: int  # sequences per optimizer step
    micro_batch_size: int  # sequences per pass on one device
    accumulate: int  # passes per optimizer step on one device


def derive(
    config: Config,
    *,
    parameters: int,
    flops_per_token: float,
    windows: int,
    devices: int = 1,
    pass_tokens: int = 8192,
) -> Plan:
    """Return the plan of a run with ``windows`` training windows per epoch.

    ``pass_tokens`` is a good number of tokens per pass on the device.  Raises ConfigError if the
    batch cannot be divided as requested.
    """
    train, schedule, length = config.train, config.schedule, config.model.max_seq_len
    batch_size = train.batch_tokens // length
    batch = f"the batch of {batch_size} sequences (train.batch_tokens={train.batch_tokens} / "
    batch += f"model.max_seq_len={length})"
    total = _total_steps(train, parameters, flops_per_token, windows / batch_size)
    warmup = schedule.warmup_steps
    if warmup is None:
        warmup = int(schedule.warmup_fraction * total)
    line = f"schedule.warmup_steps={warmup}: must be below the {total} steps of the run"
    require(warmup < total, line)
    given = f"hardware.devices={config.hardware.devices}: {devices} devices cannot share {batch}"
    require(batch_size % devices == 0, f"{given} evenly; their number must divide it")
    micro = config.hardware.micro_batch_size
    if micro is None:
        share, most = batch_size // devices, max(1, pass_tokens // length)
        micro = next(d for d in range(min(share, most), 0, -1) if share % d == 0)
    line = f"hardware.micro_batch_size={micro}: must divide {batch}"
    line += f" on {devices} devices" if devices > 1 else ""
    require(batch_size % (micro * devices) == 0, line)

    def steps(tokens: int | None) -> int | None:
        return None if tokens is None else max(1, tokens // train.batch_tokens)

    eval_steps = steps(train.eval_every) or math.ceil(total / 10)
    return Plan(
        total_steps=total,
        train_tokens=total * train.batch_tokens,
        warmup_steps=warmup,
        eval_steps=eval_steps,
        checkpoint_steps=steps(train.checkpoint_every) or eval_steps,
        keep_steps=steps(train.keep_every),
        batch_size=batch_size,
        micro_batch_size=micro,
        accumulate=batch_size // (micro * devices),
    )


def _total_steps(train: TrainConfig, parameters: int, flops_per_token: float, epoch: float) -> int:
    """Return the number of whole steps in the horizon; ``epoch`` is the steps of one epoch."""
    name = next(name for name in HORIZONS if getattr(train, name) is not None)
    value = getattr(train, name)
    match name:
        case "steps":
            total = float(value)
        case "epochs":
            total = value * epoch
        case "tokens_per_param":
            total = value * parameters / train.batch_tokens
        case "flops":
            total = value / flops_per_token / train.batch_tokens
        case _:
            total = value / train.batch_tokens
    given = f"train.{name}={value}"
    line = f"{given}: less than one step of train.batch_tokens={train.batch_tokens}"
    require(total >= 1, line)
    require(total <= MOST_STEPS, f"{given}: {total:.3g} steps are more than {MOST_STEPS:.0e}")
    return int(total)
