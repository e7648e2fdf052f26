"""Matrix products on the CPU by oneDNN, where torch's own choice, MKL, is the slower one.

MKL uses AVX-512 on Intel's processors alone: on AMD's that have it, a product by oneDNN, which
torch carries too, takes less than half the time, and with AVX2 still a seventh less.  torch asks
oneDNN only in half precision, so the products of a linear layer are handed to it here.
"""

from __future__ import annotations

import functools
import os
import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FEW_ROWS = 16  # below so many the call costs more than the product


def onednn_is_there() -> bool:
    """Return whether this torch has oneDNN and TINYGPT_MATMUL=torch does not switch it off."""
    if os.environ.get("TINYGPT_MATMUL") == "torch":
        return False
    return bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


@functools.cache
def onednn_is_faster() -> bool:
    """Whether torch has both here and the processor is one that MKL was not made for."""
    if not onednn_is_there() or not torch.backends.mkl.is_available():  # type: ignore[no-untyped-call]
        return False
    return torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") and not _is_intel()


def _is_intel() -> bool:
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return "Intel" in platform.processor()


_in_use: list[bool] = []  # empty: as onednn_is_faster says


def use_onednn(wanted: bool | None) -> None:
    """For this process; None: where it is faster."""
    _in_use[:] = [] if wanted is None else [wanted]


def onednn_is_used() -> bool:
    return _in_use[0] if _in_use else onednn_is_faster()


def onednn_product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """(..., k) x (n, k) -> (..., n): a b' + bias, by oneDNN; float32 on the CPU only."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")
    return out


class _ByOneDnn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return onednn_product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, _ = ctx.needs_input_grad
        grad_x = onednn_product(grad, weight.t()) if of_x else None
        grad, x = grad.flatten(0, -2), x.flatten(0, -2)
        grad_weight = weight_gradient(grad, x) if of_weight else None
        return grad_x, grad_weight, grad.sum(0) if ctx.has_bias else None


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """(N, out), (N, in) -> (out, in).  oneDNN wants the rows of its second factor in one piece, so
    the narrower of the two is the one that it reorders at more cost."""
    if grad.shape[1] > x.shape[1]:
        return onednn_product(x.t(), grad.t()).t()
    return onednn_product(grad.t(), x.t())


class Linear(nn.Linear):
    """``nn.Linear``, by oneDNN where that is in use."""

    def forward(self, x: Tensor) -> Tensor:
        if takes_onednn(x) and x.numel() >= FEW_ROWS * self.in_features:
            if torch.is_grad_enabled():
                out: Tensor = _ByOneDnn.apply(x, self.weight, self.bias)  # type: ignore[no-untyped-call]
                return out
            return onednn_product(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)


def takes_onednn(x: Tensor) -> bool:
    """Compiled code has products of its own, which cannot hold a call of oneDNN's."""
    return (
        x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and x.dtype == torch.float32
        and onednn_is_used()
        and not torch.is_autocast_enabled("cpu")
    )
