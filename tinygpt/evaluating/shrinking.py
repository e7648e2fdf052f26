"""A smaller model from a trained one, to see what that costs: int8 weights, pruned weights.

Both are of the matrices of the linear layers: attention, MLP and a head that is not tied.
Embeddings (a tied head is one), norms and biases stay as they are.
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn.utils import prune as pruning

from tinygpt.model.gpt import GPT

STEPS = 127  # of int8 to either side of zero


def linear_layers(model: GPT) -> list[nn.Linear]:
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


@torch.no_grad()
def quantized(model: GPT) -> tuple[GPT, int]:
    """A copy with weights rounded to int8, and its size in bytes.

    Weights only, symmetric, a scale for each row of a matrix, its largest weight / 127; sums and
    activations stay as they are.  (torch's eager dynamic quantization, which rounds activations
    too, is deprecated.)  The copy keeps the rounded weights as floating-point numbers.
    """
    made, saved = copy.deepcopy(model), 0
    for layer in linear_layers(made):
        weight = layer.weight
        scale = (weight.abs().amax(dim=1).float() / STEPS).clamp(min=torch.finfo().tiny)
        zero = torch.zeros(len(scale), dtype=torch.int32, device=scale.device)
        rounded = torch.fake_quantize_per_channel_affine(
            weight.float(), scale, zero, 0, -STEPS, STEPS
        )
        weight.copy_(rounded)
        saved += weight.numel() * (weight.itemsize - 1) - scale.numel() * scale.itemsize
    return made, size_in_bytes(model) - saved


def pruned(model: GPT, amount: float) -> tuple[GPT, int]:
    """A copy with that share of the weights zero, the smallest of all layers together, and its
    size in bytes where a zero takes a bit (a mask of all weights, then those that are not zero).
    """
    made, saved = copy.deepcopy(model), 0
    layers = linear_layers(made)
    places = [(layer, "weight") for layer in layers]
    pruning.global_unstructured(places, pruning.L1Unstructured, amount=amount)
    for layer in layers:
        pruning.remove(layer, "weight")  # type: ignore[no-untyped-call]
        zeros = int((layer.weight == 0).sum())
        saved += zeros * layer.weight.itemsize - layer.weight.numel() // 8
    return made, size_in_bytes(model) - saved


def size_in_bytes(model: GPT) -> int:
    """Of all parameters, tied ones once."""
    return sum(p.numel() * p.itemsize for p in model.parameters())
