"""What goes on inside a model, to be looked at."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tinygpt.model.gpt import GPT, Attention, causal_mask


@torch.no_grad()
def attention_weights(model: GPT, tokens: Tensor) -> Tensor:
    """How much each position looks at each: (B, T) -> (L, B, H, T, T).

    ``[l, b, h, t, s]`` is the weight that position t gives to position s: 0 where s > t, in all 1
    for each t.  Dropout is not applied to them.
    """
    found: list[Tensor] = []
    layers = [module for module in model.modules() if isinstance(module, Attention)]
    hooks = [layer.register_forward_pre_hook(partial(_note, found)) for layer in layers]
    try:
        model.hidden(tokens)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(found)


def _note(found: list[Tensor], module: nn.Module, arguments: tuple[Any, ...]) -> None:
    assert isinstance(module, Attention)
    x, rotary = arguments[:2]
    q, k, _ = module.heads(x, rotary)
    k = k.repeat_interleave(module.n_heads // module.n_kv_heads, dim=1)
    scores = q @ k.transpose(-2, -1) / module.divisor  # (B, H, T, T)
    seen = causal_mask(x.shape[1], x.shape[1], x.device)
    found.append(scores.masked_fill(~seen, float("-inf")).softmax(dim=-1))
