"""Translate a model's shape to and from the config.json of Hugging Face's GPT-2 or Llama.

GPT-2 has learned positions, LayerNorm and GELU, Llama has RoPE, RMSNorm and SwiGLU; a mixture of
the two belongs to neither.  ``huggingface.py`` translates the weights.  Torch-free.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tinygpt.config import LLAMA3, ConfigError, ModelConfig
from tinygpt.config.checks import require
from tinygpt.config.counting import resolved_d_ff

TITLES = {"gpt2": "GPT-2", "llama": "Llama"}
# The options that each family allows.
ALLOWED = {
    "gpt2": {"position": ["learned"], "norm": ["layernorm"], "activation": ["gelu", "gelu_tanh"]},
    "llama": {"position": ["rope"], "norm": ["rmsnorm"], "activation": ["swiglu"]},
}
# Our activations by GPT-2's name for them; of two names for the same one the first is written.
GPT2_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
# Settings that we support at one value only: any other changes what the weights compute.
FIXED: dict[str, dict[str, Any]] = {
    "gpt2": {
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    },
    "llama": {"hidden_act": "silu"},
}


def family(model: ModelConfig) -> str:
    """Return ``gpt2`` or ``llama``.  Raise ConfigError, naming the key, if it is neither."""
    name = "llama" if model.position == "rope" else "gpt2"
    with_it = f"Hugging Face's {TITLES[name]}, the family with model.position={model.position}, has"
    for key, allowed in ALLOWED[name].items():
        value = getattr(model, key)
        require(value in allowed, f"model.{key}={value}: {with_it} {' or '.join(allowed)}")
    require(
        name == "llama" or model.n_kv_heads in (None, model.n_heads),
        f"model.n_kv_heads={model.n_kv_heads}: {with_it} as many as model.n_heads="
        f"{model.n_heads}; Llama, with rope, rmsnorm and swiglu, may have fewer",
    )
    return name


def to_config(
    model: ModelConfig, vocab_size: int, eot_id: int, start_id: int | None = None
) -> dict[str, Any]:
    """Return the content of config.json.

    ``start_id`` begins a text (None: ``eot_id``, as in training).  There is no pad_token_id, as
    Llama would never train its row.  GPT-2 always has biases: where ours has none, theirs are zero
    and the key ``bias``, which transformers ignores, says so.  Raises ConfigError if the model
    belongs to neither family.
    """
    name = family(model)
    common = {
        "model_type": name,
        "dtype": "float32",
        "vocab_size": vocab_size,
        "tie_word_embeddings": model.tie_weights,
        "initializer_range": 0.02,
        "bos_token_id": eot_id if start_id is None else start_id,
        "eos_token_id": eot_id,
    }
    if name == "gpt2":
        theirs = next(k for k, ours in GPT2_ACTIVATIONS.items() if ours == model.activation)
        return {
            "architectures": ["GPT2LMHeadModel"],
            **common,
            **FIXED[name],
            "n_positions": model.max_seq_len,
            "n_embd": model.d_model,
            "n_layer": model.n_layers,
            "n_head": model.n_heads,
            "n_inner": resolved_d_ff(model),
            "activation_function": theirs,
            "layer_norm_epsilon": model.norm_eps,
            "embd_pdrop": model.dropout,
            "attn_pdrop": model.dropout,
            "resid_pdrop": model.dropout,
            "bias": model.bias,
        }
    rope: dict[str, Any] = {"rope_type": "default"}
    if model.rope_scaling:
        original = int(model.rope_scaling[LLAMA3[3]])
        rope = {"rope_type": "llama3", **model.rope_scaling, LLAMA3[3]: original}
    return {
        "architectures": ["LlamaForCausalLM"],
        **common,
        **FIXED[name],
        "max_position_embeddings": model.max_seq_len,
        "hidden_size": model.d_model,
        "intermediate_size": resolved_d_ff(model),
        "num_hidden_layers": model.n_layers,
        "num_attention_heads": model.n_heads,
        "num_key_value_heads": model.n_kv_heads or model.n_heads,
        "head_dim": model.d_model // model.n_heads,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,  # read by transformers 4, rope_parameters by 5
        "rope_parameters": {**rope, "rope_theta": model.rope_theta},
        **({"rope_scaling": rope} if model.rope_scaling else {}),
        "attention_bias": model.bias,
        "mlp_bias": model.bias,
        "attention_dropout": model.dropout,
    }


def vocab_rows(content: Mapping[str, Any]) -> int:
    """Return the rows of the embedding, given a config.json that ``from_config`` accepts."""
    return int(content["vocab_size"])


def from_config(content: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the values of ModelConfig's keys from a config.json of transformers 4 or 5.

    Raises ConfigError, starting with ``where``, for a model that we cannot represent.
    """
    name = content.get("model_type")
    if not isinstance(name, str) or name not in FIXED:
        raise ConfigError(f"{where}: model_type={name}: must be {' or '.join(FIXED)}")
    read = _Reader(content, where)
    for key, value in FIXED[name].items():
        read.fixed(key, value)
    read.number("vocab_size")
    shape = _gpt2_shape(read) if name == "gpt2" else _llama_shape(read)
    d_model, n_heads, n_kv_heads = shape["d_model"], shape["n_heads"], shape["n_kv_heads"]
    read.require(d_model % n_heads == 0, f"{n_heads} heads do not divide a width of {d_model}")
    read.require(
        n_kv_heads is None or n_heads % n_kv_heads == 0,
        f"{n_kv_heads} heads of keys and values do not divide {n_heads} heads",
    )
    read.fixed("head_dim", d_model // n_heads)
    return {**{key: allowed[0] for key, allowed in ALLOWED[name].items()}, **shape}


def _gpt2_shape(read: _Reader) -> dict[str, Any]:
    d_model = read.number("n_embd")
    activation = read.content.get("activation_function", "gelu_new")
    read.require(
        isinstance(activation, str) and activation in GPT2_ACTIVATIONS,
        f"activation_function={activation}: must be one of {', '.join(GPT2_ACTIVATIONS)}",
    )
    return {
        "n_layers": read.number("n_layer"),
        "d_model": d_model,
        "n_heads": read.number("n_head"),
        "n_kv_heads": None,
        "d_ff": read.number("n_inner", 4 * d_model),
        "max_seq_len": read.number("n_positions"),
        "bias": read.switch("bias", True),
        "tie_weights": read.switch("tie_word_embeddings", True),
        "rope_theta": ModelConfig.rope_theta,
        "norm_eps": read.positive("layer_norm_epsilon", 1e-5),
        "activation": GPT2_ACTIVATIONS[activation],
    }


def _llama_shape(read: _Reader) -> dict[str, Any]:
    n_heads = read.number("num_attention_heads")
    n_kv_heads = read.number("num_key_value_heads", n_heads)
    d_model = read.number("hidden_size")
    bias, mlp_bias = (read.switch(f"{part}_bias", False) for part in ("attention", "mlp"))
    read.require(
        mlp_bias == bias, f"mlp_bias={mlp_bias}: must be {bias} like attention_bias={bias}"
    )
    read.require(d_model // n_heads % 2 == 0, "the width of a head is odd, but RoPE rotates pairs")
    return {
        "n_layers": read.number("num_hidden_layers"),
        "d_model": d_model,
        "n_heads": n_heads,
        "n_kv_heads": None if n_kv_heads == n_heads else n_kv_heads,
        "d_ff": read.number("intermediate_size"),
        "max_seq_len": read.number("max_position_embeddings", 2048),
        "bias": bias,
        "tie_weights": read.switch("tie_word_embeddings", False),
        "norm_eps": read.positive("rms_norm_eps", 1e-6),
        **_rope(read),
    }


def _rope(read: _Reader) -> dict[str, Any]:
    """Return RoPE's base, and Llama 3's scaling if it has one; other scalings are refused."""
    theta, scaling = read.positive("rope_theta", 10000.0), None
    # transformers 4 writes the first table, transformers 5 the second; a folder may have both
    for key in ("rope_scaling", "rope_parameters"):
        table = read.content.get(key) or {}
        read.require(isinstance(table, dict), f"{key}={table}: must be a table of RoPE's settings")
        inside = _Reader(table, f"{read.where}: {key}")
        inside.fixed("partial_rotary_factor", 1.0)
        theta = inside.positive("rope_theta", theta)
        kind = table.get("rope_type") or table.get("type") or "default"
        known = ("default", "llama3")
        inside.require(kind in known, f"rope_type={kind}: must be default or llama3")
        if kind == "llama3":
            scaling = {name: inside.positive(name) for name in LLAMA3[:3]}
            context = read.number("max_position_embeddings", 2048)
            scaling[LLAMA3[3]] = float(inside.number(LLAMA3[3], context))
            _, low, high, _ = scaling.values()
            line = f"low_freq_factor={low}: must be below high_freq_factor={high}"
            inside.require(low < high, line)
    return {"rope_theta": theta, "rope_scaling": scaling}


class _Reader:
    """Read values of a JSON object by key; an absent or null value means its default."""

    def __init__(self, content: Mapping[str, Any], where: str) -> None:
        self.content, self.where = content, where

    def require(self, holds: bool, line: str) -> None:
        require(holds, f"{self.where}: {line}")

    def _get(self, key: str, default: Any) -> Any:
        value = self.content.get(key)
        value = default if value is None else value
        self.require(value is not None, f"{key}: not in its config.json")
        return value

    def number(self, key: str, default: int | None = None) -> int:
        value = self._get(key, default)
        holds = type(value) is int and 0 < value < 2**31
        self.require(holds, f"{key}={value!s:.40}: must be an integer above 0")
        return int(value)

    def positive(self, key: str, default: float | None = None) -> float:
        value = self._get(key, default)
        holds = type(value) in (int, float) and 0 < value < 1e300
        self.require(holds, f"{key}={value!s:.40}: must be a number above 0")
        return float(value)

    def switch(self, key: str, default: bool) -> bool:
        value = self._get(key, default)
        self.require(type(value) is bool, f"{key}={value}: must be true or false")
        return bool(value)

    def fixed(self, key: str, wanted: Any) -> None:
        value = self._get(key, wanted)
        self.require(value == wanted, f"{key}={value}: must be {wanted}")
