"""Make optimizers and compute learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tinygpt.config import (
    AdafactorOptim,
    AdamOptim,
    ConfigError,
    ConstantSchedule,
    DecaySchedule,
    LionOptim,
    MuonOptim,
    OptimConfig,
    ScheduleConfig,
    SgdOptim,
    WsdSchedule,
    rate_is_scaled,
    width_ratio,
)
from tinygpt.model.gpt import GPT


def rate_factor(step: int, config: ScheduleConfig, *, total_steps: int, warmup_steps: int) -> float:
    """Return the learning rate of optimizer step ``step``, counted from 0, relative to its peak.

    Linear warmup reaches the peak at step ``warmup_steps - 1``; a decay reaches ``min_ratio``
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
    """Return the steps, warmup included, before the decay of a warmup-stable-decay schedule."""
    decay_steps = max(1, round(config.decay_fraction * total_steps))
    return max(warmup_steps, total_steps - decay_steps)


def check_optimizer(config: OptimConfig) -> None:
    """Raise ConfigError where this torch lacks the optimizer."""
    if isinstance(config, MuonOptim) and not hasattr(torch.optim, "Muon"):
        raise ConfigError(
            f"optim=muon: needs torch 2.9 or later, here is {torch.__version__}; "
            "the other choices of optim work with it"
        )


def parameter_groups(model: GPT, config: OptimConfig) -> list[dict[str, Any]]:
    """Return the parameter groups with their learning rates and weight decays.

    Matrices are decayed, norms and biases never, embeddings if ``decay_embeddings``.  The matrices
    in the blocks are the first group if they have their own rate.  Where the width ratio divides a
    rate, it multiplies the decay, so that a step decays weights equally at any width ("independent
    weight decay", Wortsman et al. 2023).
    """
    ratio = width_ratio(model.config) if rate_is_scaled(model.config, config) else 1.0
    hidden = {id(matrix) for matrix in model.hidden_matrices()}
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    scaled: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for parameter in model.parameters():
        if not parameter.requires_grad:  # under LoRA
            continue
        is_matrix = parameter.ndim >= 2
        decays = is_matrix and (config.decay_embeddings or id(parameter) not in embeddings)
        if id(parameter) in hidden and (ratio != 1 or isinstance(config, MuonOptim)):
            scaled.append(parameter)
        else:
            (decayed if decays else plain).append(parameter)
    rate, decay = config.learning_rate, config.weight_decay
    rest = config.adam_learning_rate if isinstance(config, MuonOptim) else rate
    groups = [(scaled, rate / ratio, decay * ratio), (decayed, rest, decay), (plain, rest, 0.0)]
    return [{"params": some, "lr": lr, "weight_decay": wd} for some, lr, wd in groups if some]


class ClosureOptimizer(torch.optim.Optimizer):
    """Call the closure in ``step``, then ``update`` the weights."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.update()
        return loss

    def update(self) -> None:
        raise NotImplementedError


class Lion(ClosureOptimizer):
    """Move each weight by the learning rate, along the sign of a mean of gradients.

    Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms", with decoupled decay:
    u = sign(b1·m + (1 - b1)·g);  w = w·(1 - rate·decay) - rate·u;  m = b2·m + (1 - b2)·g.
    """

    def __init__(self, groups: list[dict[str, Any]], betas: tuple[float, float]) -> None:
        super().__init__(groups, {"betas": betas})

    def update(self) -> None:
        for group in self.param_groups:
            params: list[Tensor] = [p for p in group["params"] if p.grad is not None]
            if not params:  # the foreach functions need some
                continue
            gradients = [p.grad for p in params if p.grad is not None]
            for p in params:
                if "momentum" not in self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            momenta = [self.state[p]["momentum"] for p in params]
            beta1, beta2 = group["betas"]
            updates = torch._foreach_lerp(gradients, momenta, beta1)
            torch._foreach_sign_(updates)
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(params, updates, alpha=-group["lr"])
            torch._foreach_lerp_(momenta, gradients, 1 - beta2)


class MuonWithAdam(ClosureOptimizer):
    """Combine torch's Muon for the first group and its AdamW for the others in one optimizer.

    Muon (Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks") makes the
    momentum of a matrix orthogonal.  The two inner optimizers borrow groups and state for a step,
    so that a schedule and a checkpoint see one optimizer.
    """

    def __init__(
        self, groups: list[dict[str, Any]], muon: dict[str, Any], adam: dict[str, Any]
    ) -> None:
        # "original": the spectral norm of a step does not depend on the width, so one rate fits
        # all sizes; with "match_rms_adamw" it grows with the square root of the width.
        self.muon = torch.optim.Muon(groups[:1], adjust_lr_fn="original", **muon)
        self.adam = torch.optim.AdamW(groups[1:], **adam)
        super().__init__(self.muon.param_groups + self.adam.param_groups, {})

    def update(self) -> None:
        # anew for each step, as load_state_dict replaces these objects
        groups = self.param_groups
        self.muon.param_groups, self.adam.param_groups = groups[:1], groups[1:]
        self.muon.state = self.adam.state = self.state
        self.muon.step()  # type: ignore[no-untyped-call]
        self.adam.step()


def make_optimizer(model: GPT, config: OptimConfig, *, fused: bool) -> torch.optim.Optimizer:
    """Return the optimizer of ``model``, ``fused`` if asked and torch has a fused version."""
    groups, rate = parameter_groups(model, config), config.learning_rate
    if isinstance(config, SgdOptim):
        return torch.optim.SGD(
            groups, lr=rate, momentum=config.momentum, nesterov=config.nesterov, fused=fused
        )
    if isinstance(config, AdafactorOptim):
        # torch squares the first eps, which is 1e-30 in the paper; torch's default would also hide
        # the mean square of gradients below 3e-4
        eps = (1e-15, config.least_rms)
        decay, limit = config.beta2_decay, config.clip_threshold
        return torch.optim.Adafactor(groups, lr=rate, beta2_decay=decay, eps=eps, d=limit)
    assert isinstance(config, (AdamOptim, LionOptim, MuonOptim))
    betas = (config.betas[0], config.betas[1])
    if isinstance(config, LionOptim):
        return Lion(groups, betas)
    if isinstance(config, MuonOptim):
        check_optimizer(config)
        muon = {name: getattr(config, name) for name in ("momentum", "nesterov", "ns_steps")}
        return MuonWithAdam(groups, muon, {"betas": betas, "eps": config.eps})
    kind = torch.optim.AdamW if config.kind == "adamw" else torch.optim.Adam
    return kind(groups, lr=rate, betas=betas, eps=config.eps, fused=fused)
