"""The weights of our GPT as those of Hugging Face's GPT-2 or Llama, and theirs as ours.

Bit for bit in both directions, except that a µP model becomes an ordinary one with the same
logits.  What of config.json belongs to it is ``families.py``'s.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tinygpt.config import ConfigError, ModelConfig
from tinygpt.config.counting import padded_vocab
from tinygpt.fileio import read_json
from tinygpt.model.families import TITLES, family
from tinygpt.model.gpt import GPT, score_divisor

# By family: what is before all names but the head's, the blocks' name, ours by theirs.
ROOTS = {"gpt2": "transformer.", "llama": "model."}
BLOCKS = {"gpt2": "h", "llama": "layers"}
NAMES: dict[str, dict[str, list[str]]] = {
    "gpt2": {
        "token_embedding": ["wte"],
        "position_embedding": ["wpe"],
        "norm_1": ["ln_1"],
        "attention.qkv": ["attn.c_attn"],
        "attention.proj": ["attn.c_proj"],
        "norm_2": ["ln_2"],
        "mlp.up": ["mlp.c_fc"],
        "mlp.down": ["mlp.c_proj"],
        "norm_final": ["ln_f"],
    },
    "llama": {
        "token_embedding": ["embed_tokens"],
        "norm_1": ["input_layernorm"],
        "attention.qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        "attention.proj": ["self_attn.o_proj"],
        "norm_2": ["post_attention_layernorm"],
        "mlp.gate": ["mlp.gate_proj"],
        "mlp.up": ["mlp.up_proj"],
        "mlp.down": ["mlp.down_proj"],
        "norm_final": ["norm"],
    },
}
HEAD = "lm_head.weight"
# What files of older versions hold beside the weights: masks and RoPE's frequencies.
BUFFERS = re.compile(r"\.attn\.(bias|masked_bias)$|\.rotary_emb\.inv_freq$")


def _their_names(name: str, kind: str) -> list[str]:
    """Theirs for our parameter ``name``: one, of Llama's queries, keys and values three."""
    if name == "head.weight":
        return [HEAD]
    block, number, rest = re.fullmatch(r"(blocks\.(\d+)\.)?(.*)", name).groups()  # type: ignore[union-attr]
    module, _, last = rest.rpartition(".")
    root = ROOTS[kind] + (f"{BLOCKS[kind]}.{number}." if block else "")
    return [f"{root}{theirs}.{last}" for theirs in NAMES[kind][module]]


def _is_turned(name: str, kind: str) -> bool:
    """GPT-2 keeps the matrices of a block as (in, out)."""
    return kind == "gpt2" and name.startswith("blocks.") and "norm" not in name


def _qkv_rows(config: ModelConfig) -> list[int]:
    """How many rows of ``attention.qkv`` are queries, keys, values."""
    keys = config.d_model // config.n_heads * (config.n_kv_heads or config.n_heads)
    return [config.d_model, keys, keys]


def to_hugging_face(model: GPT) -> dict[str, Tensor]:
    """The tensors of model.safetensors, in float32; the rows that pad the vocabulary are left out.

    A tied head is not written, as transformers does not.  Raises ConfigError for a mixture that
    is neither GPT-2 nor Llama.
    """
    config, kind = model.config, family(model.config)
    weights = _ordinary(model)
    for name in ("token_embedding.weight", "head.weight"):
        if name in weights:
            weights[name] = weights[name][: model.vocab_size]
    if kind == "gpt2" and not config.bias:
        weights |= _zero_biases(weights)
    found: dict[str, Tensor] = {}
    for name, weight in weights.items():
        theirs = _their_names(name, kind)
        parts = torch.split(weight, _qkv_rows(config)) if len(theirs) > 1 else [weight]
        for their_name, part in zip(theirs, parts, strict=True):
            turned = part.t() if _is_turned(name, kind) else part
            found[their_name] = turned.clone(memory_format=torch.contiguous_format)
    return found


def _ordinary(model: GPT) -> dict[str, Tensor]:
    """The weights of a standard model with the same logits.

    Under µP scores are divided by another number than sqrt(D), which goes into the queries, and
    the head reads the last norm's output divided by m, which goes into that norm.
    """
    config = model.config
    weights = {k: v.detach().cpu().float() for k, v in model.state_dict().items()}
    scale = math.sqrt(config.d_model // config.n_heads) / score_divisor(config)
    for name, weight in weights.items():
        if name.startswith("norm_final."):
            weights[name] = weight / model.width_ratio
        elif ".attention.qkv." in name:
            queries, *others = torch.split(weight, _qkv_rows(config))
            weights[name] = torch.cat([queries * scale, *others])
    return weights


def _zero_biases(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those that our norms and linear layers do not have."""
    return {
        name.removesuffix("weight") + "bias": torch.zeros(len(weight))
        for name, weight in weights.items()
        if name.startswith(("blocks.", "norm_final."))
    }


def from_hugging_face(
    weights: Mapping[str, Tensor], config: ModelConfig, rows: int, where: str
) -> dict[str, Tensor]:
    """The ``state_dict`` of ``GPT(config, rows)``, in float32, from the tensors of their files.

    ``rows``: those of their embedding.  Rows that ``config`` pads it with get the mean row, which
    is at most as likely as one of theirs on average.  Of GPT-2's positions the first
    ``max_seq_len`` are taken.  Raises ConfigError, which ``where`` begins, for a tensor that is
    missing, has another shape or has no place in ``config``; and for µP, whose scores and logits
    are divided by other numbers than theirs.
    """
    if config.parametrization == "mup":
        raise ConfigError(f"model.parametrization=mup: must be standard, as {where} is")
    kind = family(config)
    left = {_full_name(k, kind): v for k, v in weights.items() if not BUFFERS.search(f".{k}")}
    _check_sizes(left, config, rows, where)
    with torch.device("meta"):
        expected = GPT(replace(config, pad_vocab_to_multiple=1), rows).state_dict()
    found: dict[str, Tensor] = {}
    for name, like in expected.items():
        theirs = _their_names(name, kind)
        parts = torch.split(like, _qkv_rows(config)) if len(theirs) > 1 else [like]
        turned = _is_turned(name, kind)
        shapes = [part.t().shape if turned else part.shape for part in parts]
        taken = [_take(left, *pair, where) for pair in zip(theirs, shapes, strict=True)]
        found[name] = torch.cat([part.t() if turned else part for part in taken])
    _check_rest(left, found, config, where)
    for name in ("token_embedding.weight", "head.weight"):
        if name in found:
            more = padded_vocab(rows, config.pad_vocab_to_multiple) - rows
            mean = found[name].mean(0, keepdim=True)
            found[name] = torch.cat([found[name], mean.expand(more, -1)])
    return found


def _check_sizes(left: Mapping[str, Tensor], config: ModelConfig, rows: int, where: str) -> None:
    """Before a model is built as large as a config.json may say."""
    width, kind = config.d_model, family(config)
    last = f"blocks.{config.n_layers - 1}.norm_1.weight"
    for name, shape in {"token_embedding.weight": (rows, width), last: (width,)}.items():
        _take(dict(left), _their_names(name, kind)[0], torch.Size(shape), where)


def _full_name(name: str, kind: str) -> str:
    """The hub's first GPT-2s were saved without a head, and so without the root."""
    return name if name == HEAD or name.startswith(ROOTS[kind]) else ROOTS[kind] + name


def _take(left: dict[str, Tensor], name: str, shape: torch.Size, where: str) -> Tensor:
    if name not in left:
        raise ConfigError(f"{where}: {name} is not among its weights")
    tensor = left.pop(name).float()
    if name.endswith(".wpe.weight"):
        tensor = tensor[: shape[0]]
    if tensor.shape != shape:
        sizes = [" x ".join(map(str, s)) for s in (tensor.shape, shape)]
        raise ConfigError(f"{where}: {name} is {sizes[0]}, must be {sizes[1]}")
    return tensor


def _check_rest(
    left: Mapping[str, Tensor], found: Mapping[str, Tensor], config: ModelConfig, where: str
) -> None:
    """Tensors that ours does not have may only be what it implies."""
    kind = family(config)
    implied = {HEAD: found["token_embedding.weight"]} if config.tie_weights else {}
    if kind == "gpt2" and not config.bias:
        zeros = _zero_biases(found)
        implied |= {_their_names(name, kind)[0]: zero for name, zero in zeros.items()}
    for name, tensor in left.items():
        if name not in implied:
            raise ConfigError(f"{where}: {name} has no place in a {TITLES[kind]} of its shape")
        if not torch.equal(tensor.float(), implied[name]):
            why = (
                "not the embedding, but tied to it" if name == HEAD else "not zero, but bias=false"
            )
            raise ConfigError(f"{where}: {name} is {why}, says its config.json")


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of a Hugging Face folder, from model.safetensors or its parts.

    Pickled weights, which can hold any code, are not opened.  Raises ConfigError, one line.
    """
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if not whole.exists() and not index.exists():
        if list(folder.glob("pytorch_model*.bin*")):
            raise ConfigError(
                f"{folder}: its weights are pickled; as safetensors, which hold no code, they can "
                "be read: transformers' from_pretrained and save_pretrained convert them"
            )
        raise ConfigError(f"{folder}: has no model.safetensors")
    files = [whole] if whole.exists() else _parts(index)
    weights: dict[str, Tensor] = {}
    for file in files:
        try:
            weights |= load_file(file)
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{file}: cannot be read ({error})") from error
    return weights


def _parts(index: Path) -> list[Path]:
    """The files that the index names."""
    content = read_json(index)
    try:
        # with_name raises ValueError for a name that leads out of the folder
        return [index.with_name(name) for name in sorted(set(content["weight_map"].values()))]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ConfigError(f"{index}: not an index of weights") from error
