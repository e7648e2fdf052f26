"""Count the parameters and FLOPs of a model in closed form, without torch.

``non_embedding`` covers the blocks and the final norm; ``embedding`` the token table, the position
table and the untied head.  Tied weights count once, and rows that pad the vocabulary count too.
The product of an (m, k) and a (k, n) matrix takes 2·m·n·k FLOPs.
"""

from __future__ import annotations

from dataclasses import dataclass

from tinygpt.config import ModelConfig


@dataclass(frozen=True)
class Parameters:
    """Hold the number of parameters of a model, by group."""

    total: int
    non_embedding: int
    embedding: int


def resolved_d_ff(model: ModelConfig) -> int:
    """Return the width of the feed-forward layer: ``d_ff``, or by default 4·d_model.

    SwiGLU has three matrices instead of two, so its default is two thirds of that, rounded up to
    a multiple of 8.
    """
    if model.d_ff is not None:
        return model.d_ff
    if model.activation == "swiglu":
        return 8 * -(-model.d_model // 3)  # 4·d·2/3 = 8·d/3
    return 4 * model.d_model


def padded_vocab(vocab_size: int, multiple: int) -> int:
    """Return ``vocab_size`` rounded up to a multiple."""
    return -(-vocab_size // multiple) * multiple


def _linear_layers(model: ModelConfig) -> list[tuple[int, int]]:
    """Return (inputs, outputs) of each matrix of a block."""
    d_model, d_ff = model.d_model, resolved_d_ff(model)
    head_dim = d_model // model.n_heads
    n_kv_heads = model.n_kv_heads or model.n_heads
    qkv = (d_model, (model.n_heads + 2 * n_kv_heads) * head_dim)
    up = [(d_model, d_ff)] * (2 if model.activation == "swiglu" else 1)  # SwiGLU: gate and up
    return [qkv, (d_model, d_model), *up, (d_ff, d_model)]


def count_parameters(model: ModelConfig, vocab_size: int) -> Parameters:
    """Count the parameters of ``GPT(model, vocab_size)``."""
    norm = model.d_model * (2 if model.norm == "layernorm" and model.bias else 1)
    block = 2 * norm + sum((m + model.bias) * n for m, n in _linear_layers(model))
    non_embedding = model.n_layers * block + norm
    table = padded_vocab(vocab_size, model.pad_vocab_to_multiple) * model.d_model
    embedding = table if model.tie_weights else 2 * table
    if model.position == "learned":
        embedding += model.max_seq_len * model.d_model
    return Parameters(non_embedding + embedding, non_embedding, embedding)


def lora_parameters(model: ModelConfig, rank: int) -> int:
    """Count the parameters of LoRA adapters of that rank for every matrix of the blocks."""
    return model.n_layers * sum(rank * (m + n) for m, n in _linear_layers(model))


def flops_per_token(
    model: ModelConfig, vocab_size: int, seq_len: int | None = None, lora_rank: int | None = None
) -> float:
    """Return the training FLOPs per token of a sequence of ``seq_len`` (None: max_seq_len).

    Each matrix product of the forward pass, the head included, counts three times, as the backward
    pass has two more; under LoRA it has only one for the frozen weights.  Attention counts the full
    T x T square, though half of it is masked; recomputation by gradient checkpointing is not
    counted.
    """
    length = model.max_seq_len if seq_len is None else seq_len
    linear = sum(2 * m * n for m, n in _linear_layers(model))
    attention = 2 * 2 * length * model.d_model  # scores and values, all heads together
    head = 2 * model.d_model * padded_vocab(vocab_size, model.pad_vocab_to_multiple)
    if lora_rank is not None:
        learned = model.n_layers * attention + 2 * lora_parameters(model, lora_rank)
        return 2.0 * (model.n_layers * linear + head) + 3.0 * learned
    return 3.0 * (model.n_layers * (linear + attention) + head)


def flops_6nd(parameters_total: int, tokens: int) -> float:
    """Return the rule-of-thumb FLOPs C = 6·N·D, where N counts all parameters."""
    return 6.0 * parameters_total * tokens
