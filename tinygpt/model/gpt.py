"""Build a GPT from first principles: embeddings, pre-norm blocks of attention and MLP, a head.

    x      = token_embedding + position_embedding         (learned; RoPE has no table)
    x      = x + attention(norm_1(x))                     n_layers times,
    x      = x + mlp(norm_2(x))                           the two lines together are a block
    logits = head(norm_final(x))

Under µP (Yang et al. 2022, "Tensor Programs V", the table for Adam) a learning rate tuned at one
width works at every one.  With m = d_model / mup_base_width the matrices inside the blocks start
smaller by sqrt(m), attention scores are divided by D instead of sqrt(D), and logits by m;
training/optim.py scales the rates.  The rules assume that d_ff grows with d_model.

Shapes in comments: B batch, T tokens (S including a cache), C = d_model, H heads (KV of them with
keys and values), D = C / H, F = d_ff, V = padded vocabulary.  The caller shifts the labels: the
logits at position t predict token t + 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tinygpt.config import ModelConfig, width_ratio
from tinygpt.config.counting import padded_vocab, resolved_d_ff
from tinygpt.model.kernels import Linear, mean_loss, token_scores

INIT_STD = 0.02  # as GPT-2
GOLDEN = 0x61C88647  # -2^32 / golden ratio, modulo 2^32: its multiples spread evenly
MUP_HEAD_DIM = 16  # head dimension at which µP leaves scores unchanged: the default model's

Rotary = tuple[Tensor, Tensor]  # cosines and sines, (T, D/2) each


def make_norm(config: ModelConfig) -> nn.Module:
    """Return a LayerNorm, or an RMSNorm, which never has a bias."""
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.d_model, eps=config.norm_eps)
    return nn.LayerNorm(config.d_model, eps=config.norm_eps, bias=config.bias)


def rotary_tables(
    length: int, head_dim: int, theta: float, scaling: Mapping[str, float] | None = None
) -> Rotary:
    """Return cosines and sines of the angles t · theta^(-2i/D) for position t and pair i of D/2.

    Llama 3.1's ``scaling`` makes wavelengths well beyond the original context ``factor`` times as
    long, keeps those well within it, and interpolates in between.
    """
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2).float() / head_dim)  # (D/2,)
    if scaling is not None:
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = scaling["original_max_position_embeddings"] / (2 * math.pi / frequencies)
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = (1 - kept) * frequencies / scaling["factor"] + kept * frequencies
    angles = torch.outer(torch.arange(length).float(), frequencies)  # (T, D/2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotate each pair (x[i], x[i + D/2]) of a head by its angle (RoPE, half-split as in Llama)."""
    cos, sin = rotary
    first, second = x.chunk(2, dim=-1)  # (B, H, T, D/2) each
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated.type_as(x)  # the tables are float32, also under autocast


def score_divisor(config: ModelConfig) -> float:
    """Return sqrt(D), or D / sqrt(16) under µP, because trained queries and keys correlate."""
    head_dim = config.d_model // config.n_heads
    if config.parametrization == "mup":
        return head_dim / math.sqrt(MUP_HEAD_DIM)
    return math.sqrt(head_dim)


def dropout_seeds(seed: int, step: int, first: int, count: int) -> Tensor:
    """Return two seeds for each of ``count`` sequences of a global batch, from ``first``: (B, 2).

    They decide what dropout drops, however the batch is split into passes.
    """
    numbers = range(first, first + count)
    seeds = [np.random.SeedSequence([seed, step, n]).generate_state(2) for n in numbers]
    return torch.from_numpy(np.stack(seeds).view(np.int32))


def _mixed(x: Tensor) -> Tensor:
    """Mix 32 bits so that each depends on all of ``x``, by Murmur3's finalizer (Appleby 2011)."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * -0x7A143595
    x = (x ^ ((x >> 13) & 0x7FFFF)) * -0x3D4D51CB
    return x ^ ((x >> 16) & 0xFFFF)


def drop(x: Tensor, p: float, seeds: Tensor | None, place: int = 0) -> Tensor:
    """Apply dropout to ``x`` (B, ...) with probability ``p``.

    Given ``seeds`` (B, 2), the choice depends only on the sequence's seeds, the ``place`` in the
    model and the position in the tensor; otherwise on torch's global state.
    """
    if p == 0:
        return x
    if seeds is None:
        return F.dropout(x, p)
    factor, offset = seeds[:, :1] | 1, _mixed(seeds[:, 1:] + place * (GOLDEN >> 8))  # (B, 1)
    index = torch.arange(x[0].numel(), dtype=torch.int32, device=x.device)
    threshold = min(round(p * 2**32), 2**32 - 1) - 2**31
    kept = _mixed(index * factor + offset) >= threshold
    return torch.where(kept.view(x.shape), x, 0.0) / (1 - p)


def causal_mask(T: int, S: int, device: torch.device) -> Tensor:
    """Return a mask (T, S) of the keys that each of the last T of S positions may attend to."""
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(diagonal=S - T)


def manual_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout: float,
    divisor: float,
    causal: bool = True,
    seeds: Tensor | None = None,
) -> Tensor:
    """Return softmax(q k' / divisor) v, causally masked, as SDPA computes it."""
    scores = q @ k.transpose(-2, -1) / divisor  # (B, H, T, S): query, key
    if causal:
        seen = causal_mask(q.shape[-2], k.shape[-2], q.device)
        scores = scores.masked_fill(~seen, float("-inf"))
    return drop(scores.softmax(dim=-1), dropout, seeds) @ v  # (B, H, T, D)


class KVCache:
    """Hold one layer's keys and values of up to ``capacity`` tokens."""

    keys: Tensor  # (B, KV, capacity, D)
    values: Tensor

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append the keys and values of T tokens; return those of all S: (B, KV, S, D) each."""
        if self.length == 0:  # only now are the batch size, dtype and device known
            B, KV, _, D = k.shape
            self.keys = k.new_empty(B, KV, self.capacity, D)
            self.values = v.new_empty(B, KV, self.capacity, D)
        start, self.length = self.length, self.length + k.shape[2]
        self.keys[:, :, start : self.length] = k
        self.values[:, :, start : self.length] = v
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]


class Attention(nn.Module):
    """Compute causal self-attention; if n_kv_heads < n_heads, query heads share keys and values."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_heads = config.n_heads
        self.n_kv_heads = config.n_kv_heads or config.n_heads
        self.head_dim = config.d_model // config.n_heads
        self.manual = config.attention == "manual"
        self.dropout = config.dropout
        self.divisor = score_divisor(config)
        width = (self.n_heads + 2 * self.n_kv_heads) * self.head_dim
        self.qkv = Linear(config.d_model, width, bias=config.bias)
        self.proj = Linear(config.d_model, config.d_model, bias=config.bias)

    def heads(self, x: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries (B, H, T, D), keys and values (B, KV, T, D), rotated under RoPE."""
        B, T, C = x.shape
        D, kv_width = self.head_dim, self.n_kv_heads * self.head_dim
        # split before the transpose, so that the gradients are concatenated along contiguous rows
        parts = self.qkv(x).split([C, kv_width, kv_width], dim=-1)
        q, k, v = (part.view(B, T, -1, D).transpose(1, 2) for part in parts)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        return q, k, v

    def forward(
        self,
        x: Tensor,
        rotary: Rotary | None,
        cache: KVCache | None = None,
        seeds: Tensor | None = None,
    ) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.heads(x, rotary)
        if cache is not None:
            k, v = cache.append(k, v)
        if T == 1:  # no mask, so the queries of a group can be rows and keys need no repeating
            q = q.reshape(B, self.n_kv_heads, -1, self.head_dim)
        elif self.n_kv_heads < self.n_heads:
            group = self.n_heads // self.n_kv_heads
            k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)

        dropout = self.dropout if self.training else 0.0
        if self.manual or (dropout and seeds is not None):  # SDPA takes no seeds
            y = manual_attention(q, k, v, dropout, self.divisor, causal=T > 1, seeds=seeds)
        else:
            S, scale = k.shape[2], 1 / self.divisor
            mask = causal_mask(T, S, x.device) if 1 < T < S else None  # SDPA's own needs S == T
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=1 < T == S, scale=scale
            )
        y = y.reshape(B, self.n_heads, T, self.head_dim).transpose(1, 2).reshape(B, T, C)
        return drop(self.proj(y), dropout, seeds, place=1)


def activate(h: Tensor, activation: str) -> Tensor:
    """Apply ``activation`` elementwise; for SwiGLU, ``h`` is the gate."""
    if activation == "swiglu":
        return F.silu(h)
    return F.gelu(h, approximate="tanh" if activation == "gelu_tanh" else "none")


class MLP(nn.Module):
    """Apply a feed-forward layer to each position; SwiGLU has an additional gate matrix."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d_ff = resolved_d_ff(config)
        self.activation = config.activation
        if config.activation == "swiglu":
            self.gate = Linear(config.d_model, d_ff, bias=config.bias)
        self.up = Linear(config.d_model, d_ff, bias=config.bias)
        self.down = Linear(d_ff, config.d_model, bias=config.bias)
        self.dropout = config.dropout

    def forward(self, x: Tensor, seeds: Tensor | None = None) -> Tensor:
        h = self.up(x)  # (B, T, F)
        if self.activation == "swiglu":
            h = activate(self.gate(x), "swiglu") * h
        else:
            h = activate(h, self.activation)
        return drop(self.down(h), self.dropout if self.training else 0.0, seeds, place=2)


class Block(nn.Module):
    """Add attention, then the feed-forward layer, to the residual stream, each after a norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm_1 = make_norm(config)
        self.attention = Attention(config)
        self.norm_2 = make_norm(config)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,
        rotary: Rotary | None,
        cache: KVCache | None = None,
        seeds: Tensor | None = None,
    ) -> Tensor:
        x = x + self.attention(self.norm_1(x), rotary, cache, seeds)
        out: Tensor = x + self.mlp(self.norm_2(x), seeds)
        return out


class GPT(nn.Module):
    """Map tokens (B, T) to logits (B, T, V), or to a loss if given targets."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        check_shape(config)
        self.config = config
        self.width_ratio = width_ratio(config) if config.parametrization == "mup" else 1.0
        self.vocab_size = vocab_size  # without the padding rows
        rows = padded_vocab(vocab_size, config.pad_vocab_to_multiple)

        self.token_embedding = nn.Embedding(rows, config.d_model)
        if config.position == "learned":
            self.position_embedding = nn.Embedding(config.max_seq_len, config.d_model)
        else:
            head_dim = config.d_model // config.n_heads
            scaling = config.rope_scaling
            cos, sin = rotary_tables(config.max_seq_len, head_dim, config.rope_theta, scaling)
            self.register_buffer("cos", cos, persistent=False)  # recomputed, not checkpointed
            self.register_buffer("sin", sin, persistent=False)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.n_layers)])
        self.norm_final = make_norm(config)
        if not config.tie_weights:
            self.head = Linear(config.d_model, rows, bias=False)
        self.init_weights()

    def init_weights(self) -> None:
        """Draw weights with standard deviation 0.02 and set biases to 0.

        The 2·L projections that add to the residual stream start smaller by sqrt(2·L); under µP
        all matrices inside the blocks start smaller by sqrt(m).
        """
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                std = INIT_STD
                if name.startswith("blocks."):
                    std /= math.sqrt(self.width_ratio)
                if name.endswith(("attention.proj", "mlp.down")):
                    std /= math.sqrt(2 * self.config.n_layers)
                nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def hidden_matrices(self) -> list[nn.Parameter]:
        """Return the matrices inside the blocks, both of whose dimensions grow with the width."""
        return [p for p in self.blocks.parameters() if p.ndim == 2]

    @property
    def output_weight(self) -> Tensor:
        """Return the head's matrix (V, C), which is the token embedding if the two are tied."""
        return self.token_embedding.weight if self.config.tie_weights else self.head.weight

    def hidden(
        self,
        tokens: Tensor,
        caches: Sequence[KVCache] | None = None,
        seeds: Tensor | None = None,
    ) -> Tensor:
        """Return the hidden states that the head reads: (B, T) -> (B, T, C).

        With ``caches``, one per block, the tokens follow the cached ones and are appended.
        ``seeds`` (B, 2) are for dropout.  Raises ValueError beyond ``max_seq_len``.
        """
        start = caches[0].length if caches else 0
        end = start + tokens.shape[1]
        if self.config.max_seq_len < end:
            raise ValueError(f"{end} tokens, but max_seq_len is {self.config.max_seq_len}")
        x = self.token_embedding(tokens)  # (B, T, C)
        rotary = None
        if self.config.position == "learned":
            x = x + self.position_embedding.weight[start:end]
        else:
            rotary = (self.cos[start:end], self.sin[start:end])
        x = drop(x, self.config.dropout if self.training else 0.0, seeds)
        each = caches if caches is not None else [None] * len(self.blocks)
        for number, (block, cache) in enumerate(zip(self.blocks, each, strict=True), start=1):
            own = None if seeds is None else seeds + number * GOLDEN % 2**31
            if self.config.gradient_checkpointing and self.training and cache is None:
                x = checkpoint(block, x, rotary, None, own, use_reentrant=False)
            else:
                x = block(x, rotary, cache, own)
        out: Tensor = self.norm_final(x)
        return out

    def scaled(self, hidden: Tensor) -> Tensor:
        """Divide hidden states by µP's width ratio, as the head does."""
        return hidden if self.width_ratio == 1 else hidden / self.width_ratio

    def logits(self, hidden: Tensor) -> Tensor:
        """Apply the head: (..., C) -> (..., V)."""
        return F.linear(self.scaled(hidden), self.output_weight)

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        each: bool = False,
        seeds: Tensor | None = None,
    ) -> Tensor:
        """Return the logits (B, T, V), or given ``targets`` (B, T) the mean loss, at less cost.

        With ``each``, return for every target its loss, and 1 if it is the likeliest token:
        (2, B·T).  ``seeds`` come from ``dropout_seeds``; None: dropout uses torch's global state.
        """
        hidden = self.hidden(tokens, seeds=seeds)
        if targets is None:
            return self.logits(hidden)
        rows = self.scaled(hidden).flatten(0, 1), self.output_weight, targets.flatten()
        return torch.stack(token_scores(*rows)) if each else mean_loss(*rows)

    def scores(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return every target's loss and whether it is the likeliest token: (B·T,) each."""
        losses, right = self(tokens, targets, each=True)  # not forward(): the call may be compiled
        return losses, right.bool()


@torch.no_grad()
def attention_weights(model: GPT, tokens: Tensor) -> Tensor:
    """Return how much each position attends to each other: (B, T) -> (L, B, H, T, T).

    ``[l, b, h, t, s]`` is the weight that position t gives to s: 0 if s > t, summing to 1 over s.
    Dropout is not applied.
    """
    found: list[Tensor] = []

    def record(layer: Attention, arguments: tuple[Tensor, Rotary | None]) -> None:
        q, k, _ = layer.heads(*arguments[:2])
        k = k.repeat_interleave(layer.n_heads // layer.n_kv_heads, dim=1)
        scores = q @ k.transpose(-2, -1) / layer.divisor
        hidden = ~causal_mask(q.shape[2], q.shape[2], q.device)
        found.append(scores.masked_fill(hidden, float("-inf")).softmax(dim=-1))

    layers = [module for module in model.modules() if isinstance(module, Attention)]
    hooks = [layer.register_forward_pre_hook(record) for layer in layers]
    try:
        model.hidden(tokens)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(found)


def check_shape(config: ModelConfig) -> None:
    """Raise ValueError if the width cannot be split into heads."""
    n_kv_heads = config.n_kv_heads or config.n_heads
    if config.d_model % config.n_heads:
        raise ValueError(f"n_heads={config.n_heads} must divide d_model={config.d_model}")
    if config.n_heads % n_kv_heads:
        raise ValueError(f"n_kv_heads={n_kv_heads} must divide n_heads={config.n_heads}")
    if config.position == "rope" and config.d_model // config.n_heads % 2:
        raise ValueError("position=rope needs an even d_model / n_heads, as it rotates pairs")
