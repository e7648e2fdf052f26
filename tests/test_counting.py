"""Closed forms against the real module: its parameters, and the FLOPs torch counts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from tinygpt.config import ACTIVATIONS, ModelConfig
from tinygpt.config.counting import (
    Parameters,
    count_parameters,
    flops_per_token,
    resolved_d_ff,
)
from tinygpt.model.gpt import GPT


@st.composite
def model_configs(draw: st.DrawFn) -> ModelConfig:
    """Any model that can be built, small."""
    n_kv_heads = draw(st.integers(1, 3))
    n_heads = n_kv_heads * draw(st.integers(1, 3))
    head_dim = 2 * draw(st.integers(1, 4))
    return ModelConfig(
        n_layers=draw(st.integers(1, 3)),
        d_model=n_heads * head_dim,
        n_heads=n_heads,
        n_kv_heads=draw(st.sampled_from([None, n_kv_heads])),
        d_ff=draw(st.none() | st.integers(1, 50)),
        max_seq_len=draw(st.integers(1, 20)),
        bias=draw(st.booleans()),
        tie_weights=draw(st.booleans()),
        position=draw(st.sampled_from(["learned", "rope"])),
        norm=draw(st.sampled_from(["layernorm", "rmsnorm"])),
        activation=draw(st.sampled_from(ACTIVATIONS)),
        attention="manual",
        pad_vocab_to_multiple=draw(st.sampled_from([1, 8, 64])),
    )


def build(config: ModelConfig, vocab_size: int) -> GPT:
    with torch.device("meta"):
        return GPT(config, vocab_size)


@settings(max_examples=40)
@given(model_configs(), st.integers(1, 200))
def test_parameters_are_those_of_the_module(config: ModelConfig, vocab_size: int) -> None:
    sizes = {name: p.numel() for name, p in build(config, vocab_size).named_parameters()}
    outside = ("token_embedding", "position_embedding", "head")
    embedding = sum(size for name, size in sizes.items() if name.startswith(outside))
    total = sum(sizes.values())
    assert count_parameters(config, vocab_size) == Parameters(total, total - embedding, embedding)


@settings(max_examples=25)
@given(model_configs(), st.integers(1, 200), st.integers(1, 3), st.data())
def test_flops_are_those_torch_counts(
    config: ModelConfig, vocab_size: int, batch: int, data: st.DataObject
) -> None:
    length = data.draw(st.integers(1, config.max_seq_len))
    model = build(config, vocab_size)
    tokens = torch.zeros(batch, length, dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as counter:
        model(tokens).sum().backward()
    expected = flops_per_token(config, vocab_size, length) * batch * length
    assert counter.get_total_flops() == expected


def test_flops_by_hand() -> None:
    config = ModelConfig(n_layers=1, d_model=2, n_heads=1, d_ff=3, max_seq_len=5)
    # qkv 2x6, projection 2x2, up 2x3, down 3x2, head 2x7; scores and values 5x2 each
    assert flops_per_token(config, 7) == 3 * 2 * (12 + 4 + 6 + 6 + 14 + 10 + 10)


@pytest.mark.parametrize(
    ("d_model", "activation", "expected"),
    [
        (64, "gelu", 256),
        (3, "swiglu", 8),
        (64, "swiglu", 176),  # 170.7
        (4096, "swiglu", 10928),  # 10922.7
    ],
)
def test_default_d_ff(d_model: int, activation: str, expected: int) -> None:
    config = ModelConfig(d_model=d_model, activation=activation)
    assert resolved_d_ff(config) == expected
    config.d_ff = 7
    assert resolved_d_ff(config) == 7


def test_published_counts() -> None:
    def total(layers: int, width: int, heads: int, context: int, vocabulary: int) -> int:
        config = ModelConfig(n_layers=layers, d_model=width, n_heads=heads, max_seq_len=context)
        return count_parameters(config, vocabulary).total

    assert total(12, 768, 12, 1024, 50257) == 124_439_808  # GPT-2 small
    assert total(6, 384, 6, 128, 50257) == 29_995_392
    assert total(4, 128, 4, 256, 1000) == 954_112
    assert total(2, 64, 4, 128, 35) - 2 * 3 * 64 == 110_144  # without q, k, v biases
