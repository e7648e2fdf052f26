"""A GPT and its training loop as one writes them in plain PyTorch, in nanoGPT's style.

Nothing of tinygpt is in here: a model of nn.Linear and nn.LayerNorm, batches stacked from a
memory map window by window, logits and loss of all positions, torch's AdamW with its defaults,
clipping, a learning rate set at each step, the loss read every ten steps.  Dropout is 0 and left
out.  It is meant to be as fast as this style is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

Batches = Callable[[], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Shape:
    n_layers: int
    d_model: int
    n_heads: int
    context: int
    vocab_size: int
    bias: bool = True  # of linear layers and norms


@dataclass(frozen=True)
class Recipe:
    learning_rate: float
    least_rate: float
    warmup_steps: int
    total_steps: int
    weight_decay: float
    betas: tuple[float, float]
    grad_clip: float


class CausalSelfAttention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.n_heads = shape.n_heads
        self.c_attn = nn.Linear(shape.d_model, 3 * shape.d_model, bias=shape.bias)
        self.c_proj = nn.Linear(shape.d_model, shape.d_model, bias=shape.bias)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(C, dim=2)
        q = q.view(B, T, self.n_heads, C // self.n_heads).transpose(1, 2)  # (B, H, T, D)
        k = k.view(B, T, self.n_heads, C // self.n_heads).transpose(1, 2)
        v = v.view(B, T, self.n_heads, C // self.n_heads).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        y = y.transpose(1, 2).contiguous().view(B, T, C)
        out: Tensor = self.c_proj(y)
        return out


class MLP(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.c_fc = nn.Linear(shape.d_model, 4 * shape.d_model, bias=shape.bias)
        self.gelu = nn.GELU()
        self.c_proj = nn.Linear(4 * shape.d_model, shape.d_model, bias=shape.bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.c_proj(self.gelu(self.c_fc(x)))
        return out


class Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(shape.d_model, bias=shape.bias)
        self.attn = CausalSelfAttention(shape)
        self.ln_2 = nn.LayerNorm(shape.d_model, bias=shape.bias)
        self.mlp = MLP(shape)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        out: Tensor = x + self.mlp(self.ln_2(x))
        return out


class PlainGPT(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.wte = nn.Embedding(shape.vocab_size, shape.d_model)
        self.wpe = nn.Embedding(shape.context, shape.d_model)
        self.h = nn.ModuleList([Block(shape) for _ in range(shape.n_layers)])
        self.ln_f = nn.LayerNorm(shape.d_model, bias=shape.bias)
        self.lm_head = nn.Linear(shape.d_model, shape.vocab_size, bias=False)
        self.wte.weight = self.lm_head.weight  # tied

    def forward(self, idx: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, T, V) and the loss."""
        _, T = idx.size()
        pos = torch.arange(0, T, dtype=torch.long, device=idx.device)
        x = self.wte(idx) + self.wpe(pos)
        for block in self.h:
            x = block(x)
        logits: Tensor = self.lm_head(self.ln_f(x))
        loss = F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))
        return logits, loss


def batches(path: Path, dtype: str, batch_size: int, context: int, seed: int) -> Batches:
    """Random windows of the file: inputs and targets (B, T)."""
    data = np.memmap(path, dtype=dtype, mode="r")
    generator = torch.Generator().manual_seed(seed)

    def get_batch() -> tuple[Tensor, Tensor]:
        ix = torch.randint(len(data) - context, (batch_size,), generator=generator)
        x = torch.stack([torch.from_numpy(data[i : i + context].astype(np.int64)) for i in ix])
        y = torch.stack(
            [torch.from_numpy(data[i + 1 : i + 1 + context].astype(np.int64)) for i in ix]
        )
        return x, y

    return get_batch


def make_adamw(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """Matrices and embeddings are decayed, biases and norms not; all else is torch's default."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=recipe.betas)


def rate(step: int, recipe: Recipe) -> float:
    """Linear warmup, then a cosine to the least rate."""
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.warmup_steps
    done = (step + 1 - recipe.warmup_steps) / max(1, recipe.total_steps - recipe.warmup_steps)
    share = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return recipe.least_rate + share * (recipe.learning_rate - recipe.least_rate)


def training(
    model: nn.Module,
    loss_of: Callable[[Tensor, Tensor], Tensor],
    get_batch: Batches,
    recipe: Recipe,
    context: AbstractContextManager[Any],
) -> Iterator[float]:
    """The loop; one step each time it is asked for the next, which is the last loss it read.

    ``context`` is that of the forward pass: autocast, or none.
    """
    model.train()
    optimizer = make_adamw(model, recipe)
    last, step = math.nan, 0
    while True:
        for group in optimizer.param_groups:
            group["lr"] = rate(step, recipe)
        x, y = get_batch()
        with context:
            loss = loss_of(x, y)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 10 == 0:
            last = loss.item()
        step += 1
        yield last
