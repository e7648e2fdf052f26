"""Parameters and FLOPs of a model in closed form, without building it and without torch.

The conventions, once: ``non_embedding`` is blocks + final norm; ``embedding`` is the token table,
the position table and the untied head; a tied weight counts once; rows that pad the vocabulary
are rows like any other.  A product of an (m, k) with a (k, n) matrix is 2·m·n·k FLOPs.
"""

from __future__ import annotations

from dataclasses import dataclass

from tinygpt.config import ModelConfig


@dataclass(frozen=True)
class Parameters:
    """How many numbers a model learns, by group."""

    total: int
    non_embedding: int
    embedding: int


def resolved_d_ff(model: ModelConfig) -> int:
    """Return the width of the feed-forward layer: ``d_ff``, or by default 4·d_model.

    SwiGLU has three matrices where the others have two, so its default is two thirds of that,
    rounded up to a multiple of 8, and a block keeps about the same size.
    """
    if model.d_ff is not None:
        return model.d_ff
    if model.activation == "swiglu":
        return 8 * -(-model.d_model // 3)  # 4·d·2/3 = 8·d/3
    return 4 * model.d_model


def padded_vocab(vocab_size: int, multiple: int) -> int:
    """Return the rows of the embedding: ``vocab_size`` rounded up to a multiple."""
    return -(-vocab_size // multiple) * multiple


def _linear_layers(model: ModelConfig) -> list[tuple[int, int]]:
    """Return (inputs, outputs) of the matrices of one block."""
    d_model, d_ff = model.d_model, resolved_d_ff(model)
    head_dim = d_model // model.n_heads
    n_kv_heads = model.n_kv_heads or model.n_heads
    qkv = (d_model, (model.n_heads + 2 * n_kv_heads) * head_dim)
    up = [(d_model, d_ff)] * (2 if model.activation == "swiglu" else 1)  # SwiGLU: gate and up
    return [qkv, (d_model, d_model), *up, (d_ff, d_model)]


def count_parameters(model: ModelConfig, vocab_size: int) -> Parameters:
    """Count what ``sum(p.numel() for p in GPT(model, vocab_size).parameters())`` would give."""
    layers = _linear_layers(model)
    norm = model.d_model * (2 if model.norm == "layernorm" and model.bias else 1)
    block = sum(m * n for m, n in layers) + 2 * norm
    if model.bias:
        block += sum(n for _, n in layers)
    non_embedding = model.n_layers * block + norm

    table = padded_vocab(vocab_size, model.pad_vocab_to_multiple) * model.d_model
    embedding = table if model.tie_weights else 2 * table
    if model.position == "learned":
        embedding += model.max_seq_len * model.d_model
    return Parameters(non_embedding + embedding, non_embedding, embedding)


def lora_parameters(model: ModelConfig, rank: int) -> int:
    """Count the parameters of LoRA: adapters of that rank beside every matrix of the blocks."""
    return model.n_layers * sum(rank * (m + n) for m, n in _linear_layers(model))


def flops_per_token(
    model: ModelConfig, vocab_size: int, seq_len: int | None = None, lora_rank: int | None = None
) -> float:
    """Return the FLOPs of training on one token of a sequence of ``seq_len`` (None: max_seq_len).

    Every matrix product of the forward pass, the head included, times 3, as the backward pass
    has two for each of them; under LoRA the weights have no gradient, so they have one, and the
    adapters two.  Attention counts the whole T x T square, though half of it is
    masked; what gradient checkpointing computes twice counts once.
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
    """Return the rule of thumb C = 6·N·D, where N counts all parameters."""
    return 6.0 * parameters_total * tokens
