"""Low-rank adaptation (Hu et al. 2021) by the `peft` library: W + (alpha / rank)·B·A, W kept."""

from __future__ import annotations

import importlib
from collections.abc import Mapping

from torch import Tensor

from tinygpt.config import ConfigError, LoraConfig, install
from tinygpt.model.gpt import GPT

# The matrices of a block, by the end of their names.  Never embedding or head: peft would merge
# an adapter of one into the other where they are tied.
TARGETS = ["attention.qkv", "attention.proj", "mlp.up", "mlp.gate", "mlp.down"]
KEPT, A, B = ".base_layer", ".lora_A.default.weight", ".lora_B.default.weight"


def check_peft() -> None:
    """Raises ConfigError where the library is missing."""
    try:
        importlib.import_module("peft")
    except ImportError as error:
        raise ConfigError(f"optim.lora: needs {install('lora')}") from error


def add_lora(model: GPT, config: LoraConfig) -> None:
    """Gives every matrix of the blocks an adapter that begins as zero, and freezes all else.

    A is drawn from torch's global generator (Kaiming), B is 0.
    """
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model

    assert config.rank is not None
    alpha = config.alpha or 2 * config.rank
    peft = PeftConfig(r=config.rank, lora_alpha=alpha, target_modules=TARGETS)
    inject_adapter_in_model(peft, model)


def merged(weights: Mapping[str, Tensor], config: LoraConfig) -> dict[str, Tensor]:
    """The state of a plain GPT from that of one with adapters, which are added to its matrices."""
    assert config.rank is not None
    scale = (config.alpha or 2 * config.rank) / config.rank
    found: dict[str, Tensor] = {}
    for name, weight in weights.items():
        place = name.partition(KEPT)[0]
        if name.endswith(f"{KEPT}.weight"):
            weight = weight + scale * weights[place + B] @ weights[place + A]
        if not name.endswith((A, B)):
            found[name.replace(KEPT, "")] = weight
    return found
