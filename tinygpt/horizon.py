"""Everything counted in steps, from the horizon and the batch, in one place."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tinygpt.checks import require
from tinygpt.config import HORIZONS, Config, TrainConfig

MOST_STEPS = 10**12
# Tokens that a device takes well in one pass: beyond that a larger pass is not faster.
PASS_TOKENS = {"cpu": 8192, "mps": 16384, "cuda": 65536}


@dataclass(frozen=True)
class Plan:
    """What follows from a configuration once the data is known.  Steps are optimizer steps."""

    total_steps: int
    train_tokens: int
    warmup_steps: int
    eval_steps: int
    checkpoint_steps: int
    keep_steps: int | None
    batch_size: int  # sequences an optimizer step
    micro_batch_size: int  # sequences a pass on one device
    accumulate: int  # passes an optimizer step on one device


def derive(
    config: Config,
    *,
    parameters: int,
    flops_per_token: float,
    windows: int,
    devices: int = 1,
    pass_tokens: int = 8192,
) -> Plan:
    """Everything counted in steps, from the horizon and the batch, in this one place.

    ``windows`` is the number of training windows of one epoch, ``pass_tokens`` what the device
    takes well in one pass.  Raises ConfigError if the batch cannot be cut up as asked for.
    """
    train, length = config.train, config.model.max_seq_len
    batch_size = train.batch_tokens // length
    total = _total_steps(train, parameters, flops_per_token, windows / batch_size)
    schedule = config.schedule
    if schedule.warmup_steps is not None:
        warmup = schedule.warmup_steps
        require(
            warmup < total,
            f"schedule.warmup_steps={warmup}: must be below the {total} steps of the run",
        )
    else:
        warmup = int(schedule.warmup_fraction * total)
    eval_steps = _steps(train.eval_every, train.batch_tokens) or math.ceil(total / 10)
    require(
        batch_size % devices == 0,
        f"hardware.devices={config.hardware.devices}: {devices} devices cannot share the batch of "
        f"{batch_size} sequences evenly (train.batch_tokens={train.batch_tokens} / "
        f"model.max_seq_len={length}); their number must divide it",
    )
    micro = config.hardware.micro_batch_size
    if micro is None:
        micro = _largest_divisor(batch_size // devices, max(1, pass_tokens // length))
    require(
        batch_size % (micro * devices) == 0,
        f"hardware.micro_batch_size={micro}: must divide the batch of {batch_size} sequences "
        f"(train.batch_tokens={train.batch_tokens} / model.max_seq_len={length})"
        + (f" on {devices} devices" if devices > 1 else ""),
    )
    return Plan(
        total_steps=total,
        train_tokens=total * train.batch_tokens,
        warmup_steps=warmup,
        eval_steps=eval_steps,
        checkpoint_steps=_steps(train.checkpoint_every, train.batch_tokens) or eval_steps,
        keep_steps=_steps(train.keep_every, train.batch_tokens),
        batch_size=batch_size,
        micro_batch_size=micro,
        accumulate=batch_size // (micro * devices),
    )


def _total_steps(train: TrainConfig, parameters: int, flops_per_token: float, epoch: float) -> int:
    """Whole steps that the horizon pays for; ``epoch`` is the steps of one pass over the data."""
    if train.steps is not None:
        return train.steps
    if train.epochs is not None:
        total = train.epochs * epoch
    elif train.tokens_per_param is not None:
        total = train.tokens_per_param * parameters / train.batch_tokens
    elif train.flops is not None:
        total = train.flops / flops_per_token / train.batch_tokens
    else:
        assert train.tokens is not None
        total = train.tokens / train.batch_tokens
    name = next(h for h in HORIZONS if getattr(train, h) is not None)
    require(
        total >= 1,
        f"train.{name}={getattr(train, name)}: less than one step of "
        f"train.batch_tokens={train.batch_tokens}",
    )
    require(
        total <= MOST_STEPS,
        f"train.{name}={getattr(train, name)}: {total:.3g} steps are more than {MOST_STEPS:.0e}",
    )
    return int(total)


def _steps(tokens: int | None, batch_tokens: int) -> int | None:
    return None if tokens is None else max(1, tokens // batch_tokens)


def _largest_divisor(number: int, limit: int) -> int:
    return next((d for d in range(min(number, limit), 0, -1) if number % d == 0), 1)
