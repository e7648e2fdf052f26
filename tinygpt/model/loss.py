"""The head and the cross-entropy together, a piece of the tokens at a time.

The logits of a batch, tokens x vocabulary, are by far its largest tensor, and a step would read
and write them several times.  Of a piece they stay in the processor's cache, and the gradient of
a piece is known as soon as its logits are; so neither all logits nor all of their gradients ever
exist (as Liger Kernel, Hsu et al. 2024, and before it Wijmans et al. 2024, "Cut your losses").
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tinygpt.model.linear import onednn_product, takes_onednn

# Logits of one piece: on the CPU what its cache holds, elsewhere what keeps the device busy.
PIECE = {"cpu": 2**20, "mps": 2**25, "cuda": 2**26}
LEAST_ROWS = 128  # on a smaller piece the products become slow


def piece_rows(weight: Tensor) -> int:
    """How many tokens make a piece, for a head (V, C).

    The gradient of the head is read and written once a piece: the wider it is, the fewer of them.
    """
    vocab_size, width = weight.shape
    return max(LEAST_ROWS, width // 2, PIECE.get(weight.device.type, 2**25) // vocab_size)


def _pieces(
    hidden: Tensor, weight: Tensor, targets: Tensor
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Of each piece: which tokens, its logits (n, V), its softmax (n, V), its losses (n,)."""
    rows = piece_rows(weight)
    for first in range(0, len(hidden), rows):
        piece = slice(first, first + rows)
        logits = _product(hidden[piece], weight)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        chances = torch.softmax(logits, dim=1)
        wanted = logits.gather(1, targets[piece, None])
        # the largest chance is exp(0) / sum: safe where that of the target vanishes
        losses = logits.amax(1) - chances.amax(1).log() - wanted[:, 0]
        yield piece, logits, chances, losses


def _product(a: Tensor, b: Tensor) -> Tensor:
    """(n, k) x (m, k) -> (n, m)."""
    return onednn_product(a, b) if takes_onednn(a) else a @ b.t()


def _add_up(
    hidden: Tensor, weight: Tensor, targets: Tensor, of_hidden: Tensor, of_columns: Tensor
) -> Tensor:
    """The sum of the losses.  Its gradients are written into ``of_hidden`` (N, C) and added to
    ``of_columns`` (C, V), which is of ``weight'``: in this order the product is faster."""
    total = torch.zeros((), dtype=of_columns.dtype, device=hidden.device)
    by_onednn = takes_onednn(hidden)
    columns = weight.t().contiguous() if by_onednn else weight.t()
    for piece, _, chances, losses in _pieces(hidden, weight, targets):
        total += losses.sum()
        wanted = targets[piece, None]
        chances.scatter_(1, wanted, chances.gather(1, wanted) - 1)  # the gradient of the logits
        grad = chances.to(hidden.dtype)
        of_hidden[piece] = _product(grad, columns)
        of_tokens = hidden[piece].t()
        if by_onednn:
            of_columns += onednn_product(of_tokens, grad.t())
        elif grad.dtype == of_columns.dtype:
            of_columns.addmm_(of_tokens, grad)
        else:
            of_columns += of_tokens @ grad
    return total


class _InPieces(torch.autograd.Function):
    """The mean loss; the gradients are made on the way forward, and given away on the way back."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        of_columns = torch.zeros(weight.t().shape, dtype=wide, device=weight.device)
        ctx.gradients = torch.empty_like(hidden), of_columns
        ctx.dtype = weight.dtype
        return _add_up(hidden, weight, targets, *ctx.gradients) / len(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (of_hidden, of_columns), ctx.gradients = ctx.gradients, None
        factor = grad / len(of_hidden)
        return of_hidden.mul_(factor), of_columns.mul_(factor).to(ctx.dtype).t(), None


def mean_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The mean over all tokens of the cross-entropy of their logits, hidden x weight', in nats.

    ``hidden`` (N, C), ``weight`` (V, C), ``targets`` (N,).  Differentiable once.
    """
    hidden, weight = _autocast(hidden), _autocast(weight)
    with torch.autocast(hidden.device.type, enabled=False):
        if not _worth_cutting(hidden, weight):
            logits = hidden @ weight.t()
            wide = torch.promote_types(logits.dtype, torch.float32)
            return F.cross_entropy(logits.to(wide), targets)
        out: Tensor = _in_pieces(hidden, weight, targets)
        return out


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _in_pieces(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    out: Tensor = _InPieces.apply(hidden, weight, targets)  # type: ignore[no-untyped-call]
    return out


def _worth_cutting(hidden: Tensor, weight: Tensor) -> bool:
    """A graphics card takes a small batch in one piece faster, and in a compiled graph."""
    kind = hidden.device.type
    return kind == "cpu" or len(hidden) > piece_rows(weight)


@torch.compiler.disable  # type: ignore[untyped-decorator]
@torch.no_grad()
def token_scores(
    hidden: Tensor, weight: Tensor, targets: Tensor, top: int | None = None
) -> tuple[Tensor, ...]:
    """Of each token its loss (N,), and 1 where the likeliest is right (N,); shapes as above.

    With ``top`` also 1 where fewer than so many tokens are likelier than the right one (N,).
    """
    hidden, weight = _autocast(hidden), _autocast(weight)
    found: list[tuple[Tensor, ...]] = []
    with torch.autocast(hidden.device.type, enabled=False):
        for piece, logits, _, losses in _pieces(hidden, weight, targets):
            wanted = targets[piece]
            scores = [losses, (logits.argmax(1) == wanted).to(losses.dtype)]
            if top is not None:
                likelier = ~(logits <= logits.gather(1, wanted[:, None]))  # what is NaN, too
                scores.append((likelier.sum(1) < top).to(losses.dtype))
            found.append(tuple(scores))
    return tuple(torch.cat(pieces) for pieces in zip(*found, strict=True))


def _autocast(x: Tensor) -> Tensor:
    """As autocast would hand it to a matrix product."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x
