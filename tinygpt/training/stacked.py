"""Several GPTs of one shape computed as one: every parameter has a leading axis of runs.

A small model at a small batch spends much of its time between the operations.  Where K runs differ
in their seed or their rate alone, one batched operation does the work of K.  Each run's GPT stays
an ordinary one whose parameters are views of the stacked storage, so that it is evaluated, sampled
and saved as if it were alone.  The sums are the same ones in another order: a stacked run equals a
lone one within rounding, not bit for bit.

Shapes in comments: K runs, R = B·T rows of a run's batch, the others as in model/gpt.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from tinygpt.model.gpt import GPT, Rotary, bend, manual_attention, rotate, score_divisor
from tinygpt.model.linear import onednn_product, takes_onednn
from tinygpt.model.loss import add_up, room_for_gradients
from tinygpt.training.optim import Stepping

LEAST_PRODUCT = 2**20  # multiplications; below, K calls of oneDNN cost more than they gain


def is_turned(name: str, parameter: Tensor) -> bool:
    """A matrix in a block is kept as (K, in, out), as its gradient comes, and spares a copy."""
    return name.startswith("blocks.") and parameter.ndim == 2


def stack(tensors: Sequence[Tensor], turned: bool) -> tuple[Tensor, list[Tensor]]:
    """Storage of its own for all of them, and a view of each in it, shaped as it was."""
    one = torch.stack([t.detach().t() if turned else t.detach() for t in tensors])
    return one, [part.t() if turned else part for part in one]


class StackedGPT:
    """The training pass of ``models``, which becomes views of ``weights``, by parameter name.

    No dropout, no gradient checkpointing.
    """

    def __init__(self, models: Sequence[GPT]) -> None:
        self.model, self.config, self.size = models[0], models[0].config, len(models)
        self.weights: dict[str, Tensor] = {}
        for name, _ in self.model.named_parameters():
            own = [model.get_parameter(name) for model in models]
            one, views = stack(own, is_turned(name, own[0]))
            self.weights[name] = one.requires_grad_()
            for parameter, view in zip(own, views, strict=True):
                parameter.data = view
        rows = models[0].token_embedding.num_embeddings
        self.offsets = (torch.arange(self.size) * rows).unsqueeze(1).to(one.device)  # (K, 1)

    def losses(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Each run's mean cross entropy: (K, B, T) twice -> (K,)."""
        K, B, T = tokens.shape
        w, config = self.weights, self.config
        table = w["token_embedding.weight"]  # (K, V, C)
        x = F.embedding(tokens.reshape(K, -1) + self.offsets, table.flatten(0, 1))  # (K, R, C)
        rotary = None
        if config.position == "learned":
            places = w["position_embedding.weight"][:, None, :T]  # (K, 1, T, C)
            x = (x.view(K, B, T, -1) + places).view(K, B * T, -1)
        else:
            rotary = (self.model.cos[:T], self.model.sin[:T])
        for number in range(config.n_layers):
            block = f"blocks.{number}"
            x = x + self._attention(
                f"{block}.attention", self._norm(f"{block}.norm_1", x), rotary, T
            )
            x = x + self._mlp(f"{block}.mlp", self._norm(f"{block}.norm_2", x))
        x = self._norm("norm_final", x)
        if self.model.width_ratio != 1:
            x = x / self.model.width_ratio
        head = table if config.tie_weights else w["head.weight"]
        return head_losses(x, head, targets.reshape(K, -1))

    def _linear(self, name: str, x: Tensor) -> Tensor:
        """(K, R, in) -> (K, R, out)."""
        weight, bias = self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias")
        if takes_onednn(x) and x[0].numel() * weight.shape[2] >= LEAST_PRODUCT:
            out: Tensor = _ByOneDnn.apply(x, weight, bias)  # type: ignore[no-untyped-call]
            return out
        return torch.bmm(x, weight) if bias is None else torch.baddbmm(bias[:, None], x, weight)

    def _norm(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias")
        shape = (x.shape[-1],)
        if self.config.norm == "rmsnorm":
            return F.rms_norm(x, shape, eps=self.config.norm_eps) * weight[:, None]
        normed = F.layer_norm(x, shape, eps=self.config.norm_eps)
        if bias is None:
            return normed * weight[:, None]
        return torch.addcmul(bias[:, None], normed, weight[:, None])

    def _attention(self, name: str, x: Tensor, rotary: Rotary | None, T: int) -> Tensor:
        config = self.config
        K, R, C = x.shape
        H = config.n_heads
        KV = config.n_kv_heads or H
        widths = [C, KV * C // H, KV * C // H]
        parts = torch.split(self._linear(f"{name}.qkv", x), widths, dim=-1)
        q, k, v = (part.view(-1, T, part.shape[-1] * H // C, C // H) for part in parts)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (K·B, H or KV, T, D)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        if KV < H:
            k, v = k.repeat_interleave(H // KV, dim=1), v.repeat_interleave(H // KV, dim=1)
        divisor = score_divisor(config)
        if config.attention == "manual":
            y = manual_attention(q, k, v, 0.0, divisor)
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1 / divisor)
        return self._linear(f"{name}.proj", y.transpose(1, 2).reshape(K, R, C))

    def _mlp(self, name: str, x: Tensor) -> Tensor:
        h = self._linear(f"{name}.up", x)
        kind = self.config.activation
        h = bend(self._linear(f"{name}.gate", x), kind) * h if kind == "swiglu" else bend(h, kind)
        return self._linear(f"{name}.down", h)


def head_losses(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Each run's mean cross entropy: (K, R, C), (K, V, C), (K, R) -> (K,)."""
    if hidden.is_cpu and not torch.is_autocast_enabled("cpu"):
        out: Tensor = _HeadLosses.apply(hidden, head, targets)  # type: ignore[no-untyped-call]
        return out
    logits = torch.bmm(hidden, head.transpose(1, 2)).flatten(0, 1)  # (K·R, V)
    losses = F.cross_entropy(logits, targets.flatten(), reduction="none")
    return losses.view(targets.shape).mean(1)


class _HeadLosses(torch.autograd.Function):
    """Run by run: the logits of one stay in the cache, those of all would not."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        ctx.gradients = of_hidden, of_columns = room_for_gradients(hidden, head)
        runs = zip(hidden, head, targets, of_hidden, of_columns, strict=True)
        return torch.stack([add_up(*run) for run in runs]) / targets.shape[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (of_hidden, of_columns), ctx.gradients = ctx.gradients, None
        factor = (gradients[0] / of_hidden.shape[1])[:, None, None]
        return of_hidden.mul_(factor), of_columns.mul_(factor).transpose(1, 2), None


class _ByOneDnn(torch.autograd.Function):
    """x w + bias run by run, by oneDNN, which torch does not ask for a batch of products.

    (K, R, in), (K, in, out), (K, out) -> (K, R, out).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        out = x.new_empty(*x.shape[:2], weight.shape[2])
        for k in range(len(x)):
            out[k] = onednn_product(x[k], weight[k].t(), None if bias is None else bias[k])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        (x, weight), grad = ctx.saved_tensors, gradients[0].contiguous()
        of_x = torch.empty_like(x)
        for k in range(len(x)):
            of_x[k] = onednn_product(grad[k], weight[k])
        # oneDNN would have to turn both factors, which at these sizes costs what it gains
        of_weight = torch.bmm(x.transpose(1, 2), grad)
        return of_x, of_weight, grad.sum(1) if ctx.has_bias else None


class StackedAdamW(Stepping):
    """One fused AdamW step for the runs of a stack; their own optimizers hold views of its state.

    ``optimizers`` are those the runs would have alone.  Runs of one rate that stand side by side
    share a kernel call.  The groups' ``lr`` is that of a step over the peak, as the schedule sets
    it; the peaks are the runs' own.
    """

    def __init__(self, stacked: StackedGPT, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self.optimizers = list(optimizers)
        names = {id(p): name for name, p in stacked.model.named_parameters()}
        groups = []
        for group in optimizers[0].param_groups:
            of_group = [names[id(p)] for p in group["params"]]
            weights = [stacked.weights[name] for name in of_group]
            groups.append({"params": weights, "names": of_group, "lr": 1.0, "initial_lr": 1.0})
        super().__init__(groups, {})
        self.frozen = torch.zeros(stacked.size, dtype=torch.bool, device=stacked.offsets.device)
        self.moments = [self._stack_state(g) for g in range(len(groups))]
        peaks = [tuple(g["initial_lr"] for g in o.param_groups) for o in optimizers]
        counts = [len(list(same)) for _, same in groupby(peaks)]
        ends = torch.tensor(counts).cumsum(0).tolist()
        self.spans = [slice(end - n, end) for n, end in zip(counts, ends, strict=True)]

    def _stack_state(self, g: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """First and second moments (K, ...) and steps of a group."""
        firsts: list[Tensor] = []
        seconds: list[Tensor] = []
        steps: list[Tensor] = []
        for place, name in enumerate(self.param_groups[g]["names"]):
            own = [o.param_groups[g]["params"][place] for o in self.optimizers]
            states = [o.state[p] for o, p in zip(self.optimizers, own, strict=True)]
            for state, p in zip(states, own, strict=True):
                if not state:  # as torch begins
                    state["step"] = torch.zeros((), device=p.device)
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
            for moment, kept in (("exp_avg", firsts), ("exp_avg_sq", seconds)):
                one, views = stack([state[moment] for state in states], is_turned(name, own[0]))
                kept.append(one)
                for state, view in zip(states, views, strict=True):
                    state[moment] = view
            step = states[0]["step"]
            steps.append(step)
            for state in states:
                state["step"] = step
        return firsts, seconds, steps

    def move(self) -> None:
        for g, group in enumerate(self.param_groups):
            firsts, seconds, steps = self.moments[g]
            weights, gradients = group["params"], [p.grad for p in group["params"]]
            torch._foreach_add_(steps, 1)
            for span in self.spans:
                own = self.optimizers[span.start].param_groups[g]
                torch._fused_adamw_(
                    [p[span] for p in weights],
                    [g[span] for g in gradients],
                    [m[span] for m in firsts],
                    [m[span] for m in seconds],
                    [],
                    steps,
                    lr=own["initial_lr"] * group["lr"],
                    beta1=own["betas"][0],
                    beta2=own["betas"][1],
                    weight_decay=own["weight_decay"],
                    eps=own["eps"],
                    amsgrad=False,
                    maximize=False,
                )

    @torch.no_grad()
    def clip(self, limit: float | None) -> Tensor:
        """Scales each run's gradients to a norm of at most ``limit``; returns the norms (K,)."""
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        each = [torch.linalg.vector_norm(g.flatten(1), dim=1) for g in gradients]
        norms: Tensor = torch.linalg.vector_norm(torch.stack(each), dim=0)
        scales = torch.ones_like(norms)
        if limit is not None:
            scales = (limit / (norms + 1e-6)).clamp(max=1.0)  # as torch's clip_grad_norm_
        scales.masked_fill_(self.frozen, 0.0)
        for gradient in gradients:
            gradient.mul_(scales.view(-1, *[1] * (gradient.ndim - 1)))
        return norms

    @torch.no_grad()
    def freeze(self, k: int) -> None:
        """Run ``k`` has ended: its place holds zeros from now on, and no step moves them.

        It is computed on all the same, so that the others keep their very bits.
        """
        self.frozen[k] = True
        for group, (firsts, seconds, _) in zip(self.param_groups, self.moments, strict=True):
            for tensor in (*group["params"], *firsts, *seconds):
                tensor[k] = 0.0

    def hand_over(self, k: int) -> torch.optim.Optimizer:
        """Run ``k``'s own optimizer, with the rates of the next step."""
        own = self.optimizers[k]
        for group, ours in zip(own.param_groups, self.param_groups, strict=True):
            group["lr"] = group["initial_lr"] * ours["lr"]
        return own
