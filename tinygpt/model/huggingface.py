"""Convert the weights of our GPT to those of Hugging Face's GPT-2 or Llama, and back.

The conversion is exact, except that a µP model becomes a standard one with the same logits.
``families.py`` translates config.json.
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
from tinygpt.config.checks import require
from tinygpt.config.counting import padded_vocab
from tinygpt.fileio import read_json
from tinygpt.model.families import TITLES, family
from tinygpt.model.gpt import GPT, score_divisor

# By family: the prefix of all names except the head's, the name of the blocks, theirs by ours.
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
# Buffers that files of older transformers contain: masks and RoPE's frequencies.
BUFFERS = re.compile(r"\.attn\.(bias|masked_bias)$|\.rotary_emb\.inv_freq$")


def _their_names(name: str, kind: str) -> list[str]:
    """Return their names for our parameter: one, or Llama's three for queries, keys and values."""
    if name == "head.weight":
        return [HEAD]
    block, number, rest = re.fullmatch(r"(blocks\.(\d+)\.)?(.*)", name).groups()  # type: ignore[union-attr]
    module, _, last = rest.rpartition(".")
    root = ROOTS[kind] + (f"{BLOCKS[kind]}.{number}." if block else "")
    return [f"{root}{theirs}.{last}" for theirs in NAMES[kind][module]]


def _is_transposed(name: str, kind: str) -> bool:
    """Return whether they store a parameter as (in, out), as GPT-2 does the blocks' matrices."""
    return kind == "gpt2" and name.startswith("blocks.") and "norm" not in name


def _qkv_rows(config: ModelConfig) -> list[int]:
    """Return how many rows of ``attention.qkv`` are queries, keys and values."""
    keys = config.d_model // config.n_heads * (config.n_kv_heads or config.n_heads)
    return [config.d_model, keys, keys]


def to_hugging_face(model: GPT) -> dict[str, Tensor]:
    """Return the tensors of model.safetensors, in float32, without rows that pad the vocabulary.

    As in transformers, a tied head is omitted.  Raises ConfigError if the model is neither a GPT-2
    nor a Llama.
    """
    config, kind = model.config, family(model.config)
    weights = _without_mup(model)
    for name in {"token_embedding.weight", "head.weight"} & weights.keys():
        weights[name] = weights[name][: model.vocab_size]
    if kind == "gpt2" and not config.bias:
        weights |= _zero_biases(weights)
    found: dict[str, Tensor] = {}
    for name, weight in weights.items():
        theirs = _their_names(name, kind)
        parts = torch.split(weight, _qkv_rows(config)) if len(theirs) > 1 else [weight]
        for their_name, part in zip(theirs, parts, strict=True):
            stored = part.t() if _is_transposed(name, kind) else part
            found[their_name] = stored.clone(memory_format=torch.contiguous_format)
    return found


def _without_mup(model: GPT) -> dict[str, Tensor]:
    """Return the weights of a standard model with the same logits.

    µP's different divisor of the scores is folded into the queries, and its division of the head's
    input by m into the final norm.
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
    """Return zeros for the biases that our norms and linear layers lack."""
    return {
        name.removesuffix("weight") + "bias": torch.zeros(len(weight))
        for name, weight in weights.items()
        if name.startswith(("blocks.", "norm_final."))
    }


def from_hugging_face(
    weights: Mapping[str, Tensor], config: ModelConfig, rows: int, where: str
) -> dict[str, Tensor]:
    """Return the ``state_dict`` of ``GPT(config, rows)``, in float32, from their tensors.

    ``rows`` is the size of their embedding; rows that ``config`` adds as padding are set to the
    mean row, which is no likelier than theirs are on average.  Only the first ``max_seq_len`` of
    GPT-2's positions are used.  Raises ConfigError, starting with ``where``, for µP, and for a
    tensor that is missing, has the wrong shape or is not part of the model.
    """
    standard = config.parametrization == "standard"
    require(standard, f"model.parametrization=mup: must be standard, as {where} is")
    kind = family(config)
    left = {_full_name(k, kind): v for k, v in weights.items() if not BUFFERS.search(f".{k}")}
    _check_sizes(left, config, rows, where)
    with torch.device("meta"):
        expected = GPT(replace(config, pad_vocab_to_multiple=1), rows).state_dict()
    found: dict[str, Tensor] = {}
    for name, like in expected.items():
        theirs = _their_names(name, kind)
        parts = torch.split(like, _qkv_rows(config)) if len(theirs) > 1 else [like]
        transposed = _is_transposed(name, kind)
        shapes = [part.t().shape if transposed else part.shape for part in parts]
        taken = [_take(left, *pair, where) for pair in zip(theirs, shapes, strict=True)]
        found[name] = torch.cat([part.t() if transposed else part for part in taken])
    _check_rest(left, found, config, where)
    padding = padded_vocab(rows, config.pad_vocab_to_multiple) - rows
    for name in {"token_embedding.weight", "head.weight"} & found.keys():
        mean = found[name].mean(0, keepdim=True)
        found[name] = torch.cat([found[name], mean.expand(padding, -1)])
    return found


def _check_sizes(left: Mapping[str, Tensor], config: ModelConfig, rows: int, where: str) -> None:
    """Check the sizes that config.json claims before a model of such a size is built."""
    width, kind = config.d_model, family(config)
    last = f"blocks.{config.n_layers - 1}.norm_1.weight"
    for name, shape in {"token_embedding.weight": (rows, width), last: (width,)}.items():
        _take(dict(left), _their_names(name, kind)[0], torch.Size(shape), where)


def _full_name(name: str, kind: str) -> str:
    """Add the root, which the hub's first GPT-2s, saved without a head, lack."""
    return name if name == HEAD or name.startswith(ROOTS[kind]) else ROOTS[kind] + name


def _take(left: dict[str, Tensor], name: str, shape: torch.Size, where: str) -> Tensor:
    require(name in left, f"{where}: {name} is not among its weights")
    tensor = left.pop(name).float()
    if name.endswith(".wpe.weight"):
        tensor = tensor[: shape[0]]
    is_size, must_be = (" x ".join(map(str, size)) for size in (tensor.shape, shape))
    require(is_size == must_be, f"{where}: {name} is {is_size}, must be {must_be}")
    return tensor


def _check_rest(
    left: Mapping[str, Tensor], found: Mapping[str, Tensor], config: ModelConfig, where: str
) -> None:
    """Check that tensors without a parameter of ours are a tied head or biases of zero."""
    kind = family(config)
    implied = {HEAD: found["token_embedding.weight"]} if config.tie_weights else {}
    if kind == "gpt2" and not config.bias:
        zeros = _zero_biases(found)
        implied |= {_their_names(name, kind)[0]: zero for name, zero in zeros.items()}
    for name, tensor in left.items():
        line = f"{where}: {name} has no place in a {TITLES[kind]} of its shape"
        require(name in implied, line)
        why = (
            "not the embedding, to which config.json ties it"
            if name == HEAD
            else "not zero, but config.json has bias=false"
        )
        line = f"{where}: {name} is {why}"
        require(torch.equal(tensor.float(), implied[name]), line)


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of a Hugging Face folder, from model.safetensors or its parts.

    Pickled weights, which can contain code, are not opened.  Raises ConfigError, one line.
    """
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    is_there = whole.exists() or index.exists()
    require(
        is_there or not list(folder.glob("pytorch_model*.bin*")),
        f"{folder}: its weights are pickled, which can contain code; convert them to safetensors "
        "with transformers' from_pretrained and save_pretrained",
    )
    require(is_there, f"{folder}: has no model.safetensors")
    files = [whole] if whole.exists() else _parts(index)
    weights: dict[str, Tensor] = {}
    for file in files:
        try:
            weights |= load_file(file)
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{file}: cannot be read ({error})") from error
    return weights


def _parts(index: Path) -> list[Path]:
    content = read_json(index)
    try:
        # with_name raises ValueError for a name that leads out of the folder
        return [index.with_name(name) for name in sorted(set(content["weight_map"].values()))]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ConfigError(f"{index}: not an index of weights") from error
