"""Optimizers and learning-rate schedules."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from tinygpt.config import (
    AdamOptim,
    ConstantSchedule,
    DecaySchedule,
    OptimConfig,
    ScheduleConfig,
    SgdOptim,
    WsdSchedule,
)


def rate_factor(step: int, config: ScheduleConfig, *, total_steps: int, warmup_steps: int) -> float:
    """The learning rate of optimizer step ``step`` (0 is the first) over its peak.

    Linear warmup reaches the peak at step ``warmup_steps - 1``; a decay ends with ``min_ratio``
    exactly at the last step.  Cosine: Loshchilov & Hutter 2017; wsd: Hu et al. 2024.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if isinstance(config, ConstantSchedule):
        return 1.0
    if isinstance(config, WsdSchedule):
        stable = stable_steps(config, total_steps=total_steps, warmup_steps=warmup_steps)
        done = (step + 1 - stable) / (total_steps - stable)
        return 1.0 - (1.0 - config.min_ratio) * min(1.0, max(0.0, done))
    assert isinstance(config, DecaySchedule)
    done = min(1.0, (step + 1 - warmup_steps) / max(1, total_steps - warmup_steps))
    shape = (1 + math.cos(math.pi * done)) / 2 if config.kind == "cosine" else 1 - done
    return config.min_ratio + (1.0 - config.min_ratio) * shape


def stable_steps(config: WsdSchedule, *, total_steps: int, warmup_steps: int) -> int:
    """Steps, the warmup's included, before the decay of a warmup-stable-decay schedule begins."""
    decay_steps = max(1, round(config.decay_fraction * total_steps))
    return max(warmup_steps, total_steps - decay_steps)


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Matrices are decayed; norms and biases never; embeddings if ``decay_embeddings``."""
    embeddings = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters()
    }
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for parameter in model.parameters():
        is_matrix = parameter.ndim >= 2
        wanted = is_matrix and (config.decay_embeddings or id(parameter) not in embeddings)
        (decayed if wanted else plain).append(parameter)
    groups = [(decayed, config.weight_decay), (plain, 0.0)]
    return [{"params": some, "weight_decay": decay} for some, decay in groups if some]


def make_optimizer(model: nn.Module, config: OptimConfig, *, fused: bool) -> torch.optim.Optimizer:
    """torch's own optimizer over the decay groups of ``model``."""
    groups = parameter_groups(model, config)
    if isinstance(config, SgdOptim):
        return torch.optim.SGD(
            groups,
            lr=config.learning_rate,
            momentum=config.momentum,
            nesterov=config.nesterov,
            fused=fused,
        )
    assert isinstance(config, AdamOptim)
    kind = torch.optim.AdamW if config.kind == "adamw" else torch.optim.Adam
    first, second = config.betas
    return kind(groups, lr=config.learning_rate, betas=(first, second), eps=config.eps, fused=fused)
