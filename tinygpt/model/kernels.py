"""Speed up the two hot spots of a training step: matrix products on the CPU, and the loss.

Products: MKL, torch's default, uses AVX-512 only on Intel processors.  On AMD processors with
AVX-512, oneDNN, which ships with torch, takes less than half the time, and with AVX2 a seventh
less.  torch itself uses oneDNN only in half precision, so ``Linear`` calls it directly.

Loss: the logits (tokens x vocabulary) are by far the largest tensor of a batch.  The head and the
cross-entropy are computed together, chunk by chunk, so that a chunk's logits stay in the cache, and
the gradient is computed along with them; the full logits never exist (as in Liger Kernel, Hsu et
al. 2024, and Wijmans et al. 2024, "Cut your losses").
"""

from __future__ import annotations

import functools
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# With fewer rows or multiplications, calling oneDNN costs more than it saves.
FEW_ROWS, FEW_PRODUCTS = 16, 2**21
# Logits per chunk: what the CPU's cache holds, or what keeps another device busy.
CHUNK = {"cpu": 2**20, "mps": 2**25, "cuda": 2**26}
LEAST_ROWS = 128  # products of smaller chunks are slow


def onednn_is_there() -> bool:
    """Return whether this torch has oneDNN and TINYGPT_MATMUL=torch does not switch it off."""
    allowed = os.environ.get("TINYGPT_MATMUL") != "torch"
    return allowed and bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


@functools.cache
def onednn_is_faster() -> bool:
    """Return whether oneDNN is likely to beat MKL: torch has both and the CPU is not Intel's."""
    if not onednn_is_there() or not torch.backends.mkl.is_available():  # type: ignore[no-untyped-call]
        return False
    try:
        is_intel = "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:
        is_intel = "Intel" in platform.processor()
    return torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") and not is_intel


_forced: list[bool] = []  # empty: onednn_is_faster() decides


def use_onednn(wanted: bool | None) -> None:
    """Switch oneDNN on or off in this process; None: on where it is faster."""
    _forced[:] = [] if wanted is None else [wanted]


def onednn_is_used() -> bool:
    return _forced[0] if _forced else onednn_is_faster()


def takes_onednn(x: Tensor) -> bool:
    """Return whether to multiply ``x`` by oneDNN: float32 on the CPU, outside compiled code."""
    return (
        x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and x.dtype == torch.float32
        and onednn_is_used()
        and not torch.is_autocast_enabled("cpu")
    )


def onednn_product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return a b' + bias, computed by oneDNN: (..., k) x (n, k) -> (..., n)."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")
    return out


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """Return grad' x, computed by oneDNN: (N, out), (N, in) -> (out, in).

    oneDNN copies its second factor into contiguous rows, so that is the narrower of the two.
    """
    if grad.shape[1] > x.shape[1]:
        return onednn_product(x.t(), grad.t()).t()
    return onednn_product(grad.t(), x.t())


class _OneDnnLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return onednn_product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, _ = ctx.needs_input_grad
        grad_x = onednn_product(grad, weight.t()) if needs_x else None
        grad, x = grad.flatten(0, -2), x.flatten(0, -2)
        grad_weight = weight_gradient(grad, x) if needs_weight else None
        return grad_x, grad_weight, grad.sum(0) if ctx.has_bias else None


class Linear(nn.Linear):
    """Compute ``nn.Linear``, by oneDNN where that is in use."""

    def forward(self, x: Tensor) -> Tensor:
        is_large = x.numel() >= max(FEW_ROWS * self.in_features, FEW_PRODUCTS // self.out_features)
        if is_large and takes_onednn(x):
            if torch.is_grad_enabled():
                out: Tensor = _OneDnnLinear.apply(x, self.weight, self.bias)  # type: ignore[no-untyped-call]
                return out
            return onednn_product(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)


def chunk_rows(weight: Tensor) -> int:
    """Return the tokens per chunk for a head (V, C).

    Every chunk reads and writes the head's gradient, so a wide head needs larger chunks.
    """
    vocab_size, width = weight.shape
    return max(LEAST_ROWS, width // 2, CHUNK.get(weight.device.type, 2**25) // vocab_size)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Return a b': (n, k) x (m, k) -> (n, m)."""
    return onednn_product(a, b) if takes_onednn(a) else a @ b.t()


def _chunks(
    hidden: Tensor, weight: Tensor, targets: Tensor
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Yield the slice, logits (n, V), softmax (n, V) and losses (n,) of each chunk of n tokens."""
    rows = chunk_rows(weight)
    for first in range(0, len(hidden), rows):
        chunk = slice(first, first + rows)
        logits = _product(hidden[chunk], weight)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        probabilities = torch.softmax(logits, dim=1)
        wanted = logits.gather(1, targets[chunk, None])
        # the target's own probability may be 0, but the largest, exp(0) / sum, never is
        losses = logits.amax(1) - probabilities.amax(1).log() - wanted[:, 0]
        yield chunk, logits, probabilities, losses


class _ChunkedLoss(torch.autograd.Function):
    """Compute the mean loss, and already in the forward pass its gradients."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        grad_hidden = torch.empty_like(hidden)
        # accumulate the transpose (C, V), whose product is faster
        grad_columns = torch.zeros(weight.t().shape, dtype=wide, device=weight.device)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        by_onednn = takes_onednn(hidden)
        columns = weight.t().contiguous() if by_onednn else weight.t()
        for chunk, _, probabilities, losses in _chunks(hidden, weight, targets):
            total += losses.sum()
            wanted = targets[chunk, None]
            probabilities.scatter_(1, wanted, probabilities.gather(1, wanted) - 1)
            grad = probabilities.to(hidden.dtype)  # of the logits
            grad_hidden[chunk] = _product(grad, columns)
            tokens = hidden[chunk].t()
            if by_onednn:
                grad_columns += onednn_product(tokens, grad.t())
            elif grad.dtype == wide:
                grad_columns.addmm_(tokens, grad)
            else:
                grad_columns += tokens @ grad
        ctx.gradients, ctx.dtype = (grad_hidden, grad_columns), weight.dtype
        return total / len(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (grad_hidden, grad_columns), ctx.gradients = ctx.gradients, None
        factor = grad / len(grad_hidden)
        return grad_hidden.mul_(factor), grad_columns.mul_(factor).to(ctx.dtype).t(), None


def mean_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy in nats of the logits hidden x weight'.

    Shapes: ``hidden`` (N, C), ``weight`` (V, C), ``targets`` (N,).  Differentiable once.
    """
    hidden, weight = _autocast(hidden), _autocast(weight)
    with torch.autocast(hidden.device.type, enabled=False):
        # a small batch is faster on a GPU as a whole, and then it can be compiled
        if hidden.device.type != "cpu" and len(hidden) <= chunk_rows(weight):
            logits = hidden @ weight.t()
            wide = torch.promote_types(logits.dtype, torch.float32)
            return F.cross_entropy(logits.to(wide), targets)
        out: Tensor = _chunked_loss(hidden, weight, targets)
        return out


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _chunked_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    out: Tensor = _ChunkedLoss.apply(hidden, weight, targets)  # type: ignore[no-untyped-call]
    return out


@torch.compiler.disable  # type: ignore[untyped-decorator]
@torch.no_grad()
def token_scores(
    hidden: Tensor, weight: Tensor, targets: Tensor, top: int | None = None
) -> tuple[Tensor, ...]:
    """Return each token's loss, and 1 where the likeliest token is right: (N,) each.

    With ``top``, also return 1 where fewer than ``top`` tokens are likelier than the right one.
    Shapes as in ``mean_loss``.
    """
    hidden, weight = _autocast(hidden), _autocast(weight)
    found: list[list[Tensor]] = []
    with torch.autocast(hidden.device.type, enabled=False):
        for chunk, logits, _, losses in _chunks(hidden, weight, targets):
            wanted = targets[chunk]
            scores = [losses, (logits.argmax(1) == wanted).to(losses.dtype)]
            if top is not None:
                likelier = ~(logits <= logits.gather(1, wanted[:, None]))  # NaN counts as likelier
                scores.append((likelier.sum(1) < top).to(losses.dtype))
            found.append(scores)
    return tuple(torch.cat(parts) for parts in zip(*found, strict=True))


def _autocast(x: Tensor) -> Tensor:
    """Return ``x`` in the precision in which autocast would multiply it."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x
