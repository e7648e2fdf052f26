"""The weights that are shown are those that the model attends by."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tinygpt.config import ModelConfig
from tinygpt.model.gpt import GPT, Attention, attention_weights


def make(**options: Any) -> GPT:
    torch.manual_seed(0)
    shape = {"d_model": 24, "n_heads": 4, "n_layers": 3, "max_seq_len": 16}
    model = GPT(ModelConfig(**{**shape, **options}), vocab_size=50).eval()
    for parameter in model.parameters():
        parameter.data *= 4  # so that heads do not look everywhere alike
    return model


def layers(model: GPT) -> list[Attention]:
    return [module for module in model.modules() if isinstance(module, Attention)]


@pytest.mark.parametrize(
    "options",
    [
        {"attention": "manual"},
        {"attention": "sdpa", "position": "rope", "n_heads": 6, "n_kv_heads": 2},
        {"parametrization": "mup", "mup_base_width": 12, "bias": False},
    ],
    ids=["manual", "rope-groups", "mup"],
)
def test_they_make_the_output_of_every_layer(options: dict[str, Any]) -> None:
    model = make(**options)
    tokens = torch.randint(0, 50, (2, 11))
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    for attention in layers(model):
        attention.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        attention.proj.register_forward_pre_hook(lambda _, args: outputs.append(args[0]))
    weights = attention_weights(model, tokens)
    heads = model.config.n_heads
    assert weights.shape == (3, 2, heads, 11, 11)
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 2, heads, 11))
    assert torch.equal(weights, weights.tril())
    assert not torch.allclose(weights[:, :, 0], weights[:, :, 1])
    for layer, attention in enumerate(layers(model)):
        D, KV = attention.head_dim, attention.n_kv_heads
        v = attention.qkv(inputs[layer])[..., -KV * D :]  # the last columns: the values
        per_head = [v[..., h // (heads // KV) * D :][..., :D] for h in range(heads)]
        mixed = [weights[layer, :, h] @ per_head[h] for h in range(heads)]
        torch.testing.assert_close(torch.cat(mixed, dim=-1), outputs[layer])


def test_the_model_is_as_before() -> None:
    model, tokens = make(), torch.arange(5)[None]
    before = model(tokens)
    attention_weights(model, tokens)
    assert torch.equal(model(tokens), before)
    assert not any(attention._forward_pre_hooks for attention in layers(model))
