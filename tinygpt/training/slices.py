"""Compute a batch on the CPU in slices of its sequences, one thread each.

Threads that share one operator wait for one another at every operator, so other work on a single
core slows all of them down.  The threads of slices wait once per pass.  Gradients are added in the
order of the slices, so the result depends on the number of slices but not on which ends first.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from tinygpt.model.gpt import GPT

T = TypeVar("T")


@functools.cache
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="slice")


def in_slices(
    work: Callable[..., T], slices: int, tensors: Sequence[Tensor | None], *, grad: bool
) -> list[T]:
    """Return the result of ``work`` for each slice of the ``tensors`` (B, ...), in order.

    ``grad`` says whether autograd records, which each thread has to be told.
    """

    def one(*parts: Tensor | None) -> T:
        with torch.set_grad_enabled(grad):
            return work(*parts)

    split = [[None] * slices if x is None else x.tensor_split(slices) for x in tensors]
    first, *others = zip(*split, strict=True)
    waiting = [_threads(slices - 1).submit(one, *parts) for parts in others]
    return [one(*first), *(future.result() for future in waiting)]


class _SlicedLoss(torch.autograd.Function):
    """Compute the mean loss, and already in the forward pass its gradients."""

    @staticmethod
    def forward(
        ctx: Any, model: GPT, slices: int, batch: Sequence[Tensor | None], *weights: Tensor
    ) -> Tensor:
        def work(inputs: Tensor, targets: Tensor, seeds: Tensor | None) -> Any:
            loss = model(inputs, targets, seeds=seeds) * (len(inputs) / rows)
            return loss.detach(), torch.autograd.grad(loss, weights)

        rows = len(batch[0])  # type: ignore[arg-type]
        losses, gradients = zip(*in_slices(work, slices, batch, grad=True), strict=True)
        total = list(gradients[0])
        for more in gradients[1:]:
            torch._foreach_add_(total, more)
        ctx.gradients = total
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        torch._foreach_mul_(gradients, grad)
        return None, None, None, *gradients


def mean_loss(
    model: GPT, slices: int, inputs: Tensor, targets: Tensor, seeds: Tensor | None = None
) -> Tensor:
    """Return the mean loss of ``inputs`` and ``targets`` (B, T), as ``model`` does.

    With several ``slices``, at most B of them, it is differentiable once.
    """
    if slices == 1:
        loss: Tensor = model(inputs, targets, seeds=seeds)
        return loss
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    out: Tensor = _SlicedLoss.apply(model, slices, (inputs, targets, seeds), *weights)  # type: ignore[no-untyped-call]
    return out
