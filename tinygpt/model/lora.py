"""Add low-rank adapters (Hu et al. 2021) with `peft`: W + (alpha / rank)·B·A, with W frozen."""

from __future__ import annotations

import importlib
from collections.abc import Mapping

from torch import Tensor

from tinygpt.config import ConfigError, LoraConfig, install
from tinygpt.model.gpt import GPT

# The matrices of a block, by the end of their names.  Not the embedding or the head: where they
# are tied, peft would merge an adapter of one into the other.
TARGETS = ["attention.qkv", "attention.proj", "mlp.up", "mlp.gate", "mlp.down"]
KEPT, A, B = ".base_layer", ".lora_A.default.weight", ".lora_B.default.weight"


def check_peft() -> None:
    """Raise ConfigError if the library is missing."""
    try:
        importlib.import_module("peft")
    except ImportError as error:
        raise ConfigError(f"optim.lora: needs {install('lora')}") from error


def add_lora(model: GPT, config: LoraConfig) -> None:
    """Give every matrix of the blocks an adapter that starts at zero, and freeze all other weights.

    A is drawn from torch's global generator (Kaiming), B is 0.
    """
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model

    assert config.rank is not None
    alpha = config.alpha or 2 * config.rank
    peft = PeftConfig(r=config.rank, lora_alpha=alpha, target_modules=TARGETS)
    inject_adapter_in_model(peft, model)


def merged(weights: Mapping[str, Tensor], config: LoraConfig) -> dict[str, Tensor]:
    """Merge the adapters in a state dict into its matrices; return the state of a plain GPT."""
    assert config.rank is not None
    scale = (config.alpha or 2 * config.rank) / config.rank
    found: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if name.endswith(f"{KEPT}.weight"):
            place = name.partition(KEPT)[0]
            weight = weight + scale * weights[place + B] @ weights[place + A]
        if not name.endswith((A, B)):
            found[name.replace(KEPT, "")] = weight
    return found
