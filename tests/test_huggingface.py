"""Our GPT as Hugging Face's GPT-2 or Llama and back, against transformers itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tinygpt.config import LLAMA3, ConfigError, ModelConfig
from tinygpt.model.families import family, from_config, to_config, vocab_rows
from tinygpt.model.gpt import GPT
from tinygpt.model.huggingface import from_hugging_face, read_weights, to_hugging_face

transformers = pytest.importorskip("transformers")

VOCAB, LENGTH = 50, 24
ROPE: dict[str, Any] = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LLAMA: dict[str, Any] = {"position": "rope", "norm": "rmsnorm", "activation": "swiglu"}
MUP: dict[str, Any] = {"parametrization": "mup", "mup_base_width": 8}
SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "gpt2-plain": {"bias": False, "d_ff": 20, "norm_eps": 1e-3},
    "gpt2-tanh": {"activation": "gelu_tanh", "tie_weights": False, "pad_vocab_to_multiple": 16},
    "gpt2-mup": {**MUP, "tie_weights": False},
    "gpt2-mup-plain": {**MUP, "bias": False, "pad_vocab_to_multiple": 64},
    "llama": {**LLAMA, "bias": False, "norm_eps": 1e-6},
    "llama-3": {**LLAMA, "rope_theta": 50.0, "rope_scaling": {n: ROPE[n] for n in LLAMA3}},
    "llama-bias": {**LLAMA, "n_kv_heads": 2, "rope_theta": 500.0, "d_ff": 20},
    "llama-untied": {**LLAMA, "n_kv_heads": 1, "tie_weights": False, "norm_eps": 1e-2},
    "llama-mup": {**LLAMA, **MUP, "n_kv_heads": 2},
}


def make(dtype: torch.dtype = torch.float32, **shape: Any) -> GPT:
    """Weights of a size at which every part of the model matters; biases too."""
    sizes = {"n_layers": 2, "d_model": 32, "n_heads": 4, "max_seq_len": LENGTH}
    torch.manual_seed(3)
    model = GPT(ModelConfig(**{**sizes, **shape}), VOCAB).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.15)
    return model.eval()


def some_tokens() -> Tensor:
    return torch.randint(VOCAB, (3, LENGTH), generator=torch.Generator().manual_seed(5))


def write(folder: Path, model: GPT) -> Path:
    content = to_config(model.config, VOCAB, eot_id=1)
    (folder / "config.json").write_text(json.dumps(content))
    save_file(to_hugging_face(model), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def read(folder: Path, **changes: Any) -> GPT:
    """As a run that begins with it would."""
    content = json.loads((folder / "config.json").read_text())
    config = replace(ModelConfig(**from_config(content, "x")), **changes)
    model = GPT(config, vocab_rows(content))
    model.load_state_dict(from_hugging_face(read_weights(folder), config, model.vocab_size, "x"))
    return model.eval()


@torch.no_grad()
def difference(ours: GPT, theirs: Any) -> float:
    tokens = some_tokens()
    logits = ours(tokens)[..., :VOCAB]
    assert logits.abs().max() > 0.5  # else all would agree
    return float((logits - theirs(tokens).logits).abs().max())


@pytest.mark.parametrize("name", SHAPES)
def test_ours_is_theirs(name: str, tmp_path: Path) -> None:
    """Loaded by transformers with nothing left over, the same logits by both of its kernels."""
    model = make(**SHAPES[name])
    write(tmp_path, model)
    for kernel in ("sdpa", "eager"):
        theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, attn_implementation=kernel, output_loading_info=True
        )
        assert not any(info.values()), info
        assert (
            type(theirs).__name__
            == json.loads((tmp_path / "config.json").read_text())["architectures"].pop()
        )
        assert difference(model, theirs) <= 1e-5
        head, table = theirs.get_output_embeddings().weight, theirs.get_input_embeddings().weight
        assert (head.data_ptr() == table.data_ptr()) == model.config.tie_weights


@pytest.mark.parametrize("name", SHAPES)
def test_ours_there_and_back(name: str, tmp_path: Path) -> None:
    model = make(**SHAPES[name])
    write(tmp_path, model)
    back = read(tmp_path)
    if model.config.parametrization == "mup":  # it is an ordinary model now, with its logits
        logits = model(some_tokens())[..., :VOCAB]
        assert (back(some_tokens()) - logits).abs().max() <= 1e-5
    else:
        expected = replace(
            model.config, d_ff=back.config.d_ff, dropout=0.0, pad_vocab_to_multiple=1
        )
        assert back.config == expected
        for key, value in model.state_dict().items():
            rows = VOCAB if key in ("token_embedding.weight", "head.weight") else None
            assert torch.equal(back.state_dict()[key], value[:rows])
    again = to_hugging_face(back)
    there = load_file(tmp_path / "model.safetensors")
    assert again.keys() == there.keys()
    assert all(torch.equal(again[key], there[key]) for key in there)


def test_weights_of_float64_are_exported_in_float32(tmp_path: Path) -> None:
    model = make(torch.float64)
    write(tmp_path, model)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {weight.dtype for weight in theirs.state_dict().values()} == {torch.float32}
    assert difference(model, theirs) <= 1e-5


# --- theirs, ours, theirs


def gpt2(**values: Any) -> Any:
    config = {"vocab_size": VOCAB, "n_positions": LENGTH, "n_embd": 32, "n_layer": 2, "n_head": 4}
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    return _enlarged(
        transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**config, **ids, **values}))
    )


def llama(**values: Any) -> Any:
    config = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "head_dim": None,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": LENGTH,
    }
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    made = transformers.LlamaConfig(**{**config, **ids, **values})
    return _enlarged(transformers.LlamaForCausalLM(made))


def _enlarged(model: Any) -> Any:
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.15)
    return model.eval()


THEIRS: dict[str, Callable[[], Any]] = {
    "gpt2": gpt2,
    "gpt2-gelu": lambda: gpt2(activation_function="gelu", n_inner=20, layer_norm_epsilon=1e-3),
    "gpt2-untied": lambda: gpt2(tie_word_embeddings=False, reorder_and_upcast_attn=True),
    "llama": llama,
    "llama-gqa": lambda: llama(num_key_value_heads=2, attention_bias=True, mlp_bias=True),
    "llama-mqa": lambda: llama(num_key_value_heads=1, tie_word_embeddings=True, rms_norm_eps=1e-2),
    "llama-theta": lambda: llama(
        rope_parameters={"rope_type": "default", "rope_theta": 5e5}, num_key_value_heads=2
    ),
    "llama-3": lambda: llama(rope_parameters={**ROPE, "rope_theta": 50.0}),
}


@pytest.mark.parametrize("name", THEIRS)
def test_theirs_is_ours_and_theirs_again(name: str, tmp_path: Path) -> None:
    theirs = THEIRS[name]()
    theirs.save_pretrained(tmp_path, max_shard_size="20KB" if "gelu" in name else "1GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == ("gelu" in name)
    ours = read(tmp_path)
    assert difference(ours, theirs) <= 1e-5
    there, again = read_weights(tmp_path), to_hugging_face(ours)
    assert again.keys() == there.keys()
    assert all(torch.equal(again[key], there[key]) for key in there)
    content = to_config(ours.config, VOCAB, eot_id=0)
    original = json.loads((tmp_path / "config.json").read_text())
    left = {"n_inner", "head_dim"}  # theirs may leave them to a default; dropout is the run's own
    same = {key for key in content.keys() & original.keys() - left if not key.endswith("_pdrop")}
    assert {k: content[k] for k in same} == {k: original[k] for k in same}


def test_the_form_of_transformers_4_is_read_too() -> None:
    shape = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
    old = {**shape, "model_type": "llama", "vocab_size": 9, "num_hidden_layers": 2}
    new = {**old, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    old |= {"rope_theta": 5e5, "rope_scaling": None}
    assert from_config(old, "x") == from_config(new, "x")
    scaled = {**old, "rope_scaling": {**ROPE, "rope_type": None, "type": "llama3"}}
    assert from_config(scaled, "x") == from_config(
        {**new, "rope_parameters": {**ROPE, "rope_theta": 5e5}}, "x"
    )
    assert set(from_config(scaled, "x")["rope_scaling"]) == set(LLAMA3)
    values = from_config(old, "x")
    found = values["rope_theta"], values["norm_eps"], values["tie_weights"], values["n_kv_heads"]
    assert found == (5e5, 1e-6, False, None)


def test_the_hubs_first_gpt2_is_read() -> None:
    """openai-community/gpt2: saved without a head, with its masks, and a config.json of 2019."""
    theirs = gpt2()
    weights = {k.removeprefix("transformer."): v for k, v in theirs.state_dict().items()}
    del weights["lm_head.weight"]
    for layer in range(2):
        weights[f"h.{layer}.attn.bias"] = torch.ones(1, 1, LENGTH, LENGTH).tril()
        weights[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    content = {
        "activation_function": "gelu_new",
        "architectures": ["GPT2LMHeadModel"],
        "n_ctx": 24,
        "model_type": "gpt2",
        "n_embd": 32,
        "n_head": 4,
        "n_layer": 2,
        "n_positions": LENGTH,
        "layer_norm_epsilon": 1e-5,
        "vocab_size": VOCAB,
        "summary_type": "cls_index",
    }
    config = ModelConfig(**from_config(content, "x"))
    ours = GPT(config, VOCAB).eval()
    ours.load_state_dict(from_hugging_face(weights, config, VOCAB, "x"))
    assert difference(ours, theirs) <= 1e-5
    # a head that is tied may be there all the same
    assert (
        from_hugging_face(theirs.state_dict(), config, VOCAB, "x").keys()
        == dict(ours.named_parameters()).keys()
    )


def test_a_shorter_context_and_a_padded_vocabulary(tmp_path: Path) -> None:
    theirs = gpt2(tie_word_embeddings=False)
    theirs.save_pretrained(tmp_path)
    tokens = some_tokens()[:, :8]
    short = read(tmp_path, max_seq_len=8, pad_vocab_to_multiple=64)
    logits, expected = short(tokens), theirs(tokens).logits
    assert logits.shape[-1] == 64
    assert (logits[..., :VOCAB] - expected).abs().max() <= 1e-5
    added, likely = logits.softmax(-1)[..., VOCAB:], logits.softmax(-1)[..., :VOCAB]
    assert (added.amax(-1) <= likely.mean(-1) + 1e-6).all()


# --- what is refused, in a line


def said(act: Callable[[], Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        act()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("shape", "line"),
    [
        ({"position": "rope"}, "model.norm=layernorm: Hugging Face's Llama, the family with"),
        ({**LLAMA, "activation": "gelu"}, "model.activation=gelu: Hugging Face's Llama"),
        ({"norm": "rmsnorm"}, "model.norm=rmsnorm: Hugging Face's GPT-2, the family with"),
        ({"activation": "swiglu"}, "has gelu or gelu_tanh"),
        ({"n_kv_heads": 2}, "model.n_kv_heads=2: Hugging Face's GPT-2"),
    ],
)
def test_a_mixture_is_refused(shape: dict[str, Any], line: str) -> None:
    assert line in said(lambda: to_config(ModelConfig(**shape), VOCAB, 0))
    assert line in said(lambda: to_hugging_face(make(**shape)))


def test_the_families() -> None:
    assert family(ModelConfig(n_kv_heads=4)) == "gpt2"  # as many as heads
    assert family(ModelConfig(**LLAMA, n_kv_heads=2)) == "llama"


BASE = {
    "gpt2": to_config(make().config, VOCAB, 1),
    "llama": to_config(make(**LLAMA).config, VOCAB, 1),
}


@pytest.mark.parametrize(
    ("kind", "change", "line"),
    [
        ("gpt2", {"model_type": "mistral"}, "model_type=mistral: must be gpt2 or llama"),
        ("gpt2", {"n_layer": None}, "n_layer: not in its config.json"),
        ("gpt2", {"n_layer": 2.5}, "n_layer=2.5: must be an integer above 0"),
        ("gpt2", {"n_head": 5}, "5 heads do not divide a width of 32"),
        ("gpt2", {"vocab_size": "many"}, "vocab_size=many: must be"),
        ("gpt2", {"activation_function": "relu"}, "must be one of gelu_new, gelu_pytorch_tanh, ge"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "must be False"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights=False: must be True"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention=True"),
        ("gpt2", {"layer_norm_epsilon": 0}, "layer_norm_epsilon=0: must be a number above 0"),
        ("gpt2", {"tie_word_embeddings": "no"}, "tie_word_embeddings=no: must be true or false"),
        ("llama", {"head_dim": 16}, "head_dim=16: must be 8"),
        ("llama", {"num_key_value_heads": 3}, "3 heads of keys and values do not divide 4 heads"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act=gelu: must be silu"),
        ("llama", {"mlp_bias": False}, "mlp_bias=False: must be True like attention_bias=True"),
        (
            "llama",
            {"rope_scaling": {"type": "linear", "factor": 2}},
            "rope_type=linear: must be default or",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "yarn"}},
            "rope_parameters: rope_type=yarn: mu",
        ),
        (
            "llama",
            {"rope_scaling": {"rope_type": "llama3"}},
            "rope_scaling: factor: not in its con",
        ),
        (
            "llama",
            {"rope_scaling": {**ROPE, "factor": -1}},
            "rope_scaling: factor=-1: must be a nu",
        ),
        ("llama", {"rope_scaling": {**ROPE, "low_freq_factor": 4}}, "must be below high_freq_fac"),
        ("llama", {"rope_parameters": 3}, "rope_parameters=3: must be a table"),
        ("llama", {"num_attention_heads": 32}, "the width of a head is odd"),
    ],
)
def test_a_config_that_ours_cannot_be(kind: str, change: dict[str, Any], line: str) -> None:
    from_config(BASE[kind], "there")
    words = said(lambda: from_config({**BASE[kind], **change}, "there"))
    assert words.startswith("there: ")
    assert line in words


@pytest.mark.parametrize(
    ("shape", "change", "line"),
    [
        ({}, {"transformer.ln_f.bias": None}, "transformer.ln_f.bias is not among its weights"),
        ({}, {"transformer.h.2.ln_1.bias": torch.ones(32)}, "has no place in a GPT-2 of its shape"),
        ({}, {"transformer.wpe.weight": torch.ones(9, 32)}, "wpe.weight is 9 x 32, must be 24 x 3"),
        (
            {},
            {"transformer.h.0.attn.c_attn.weight": torch.ones(96, 32)},
            "c_attn.weight is 96 x 32, must be 32 x 96",
        ),
        (
            {},
            {"lm_head.weight": torch.ones(VOCAB, 32)},
            "is not the embedding, to which config.json ties it",
        ),
        (
            {"bias": False},
            {"transformer.h.0.mlp.c_fc.bias": torch.ones(128)},
            "c_fc.bias is not zero, but config.json has bias=false",
        ),
        (LLAMA, {"model.embed_tokens.weight": torch.ones(51, 32)}, "is 51 x 32, must be 50 x 32"),
        (
            {**LLAMA, "n_kv_heads": 2},
            {"model.layers.1.self_attn.k_proj.weight": torch.ones(32, 32)},
            "k_proj.weight is 32 x 32, must be 16 x 32",
        ),
        ({**LLAMA, "tie_weights": False}, {"lm_head.weight": None}, "lm_head.weight is not among"),
    ],
)
def test_weights_that_do_not_fit(
    shape: dict[str, Any], change: dict[str, Tensor | None], line: str
) -> None:
    model = make(**shape)
    weights = {**to_hugging_face(model), **change}
    left = {key: value for key, value in weights.items() if value is not None}
    words = said(lambda: from_hugging_face(left, model.config, VOCAB, "there"))
    assert words.startswith("there: ")
    assert line in words


def test_theirs_are_not_mup() -> None:
    model = make(**MUP)
    weights = to_hugging_face(model)
    line = "model.parametrization=mup: must be standard, as there is"
    assert said(lambda: from_hugging_face(weights, model.config, VOCAB, "there")) == line


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert said(lambda: read_weights(tmp_path)).endswith("has no model.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert "with transformers' from_pretrained and save_pretrained" in said(
        lambda: read_weights(tmp_path)
    )
    (tmp_path / "model.safetensors").write_bytes(b"torn")
    assert "model.safetensors: cannot be read" in said(lambda: read_weights(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    index = tmp_path / "model.safetensors.index.json"
    index.write_text("[]")
    assert "not an object" in said(lambda: read_weights(tmp_path))
    index.write_text('{"weight_map": {"a": "part-1.safetensors"}}')
    assert "part-1.safetensors: cannot be read" in said(lambda: read_weights(tmp_path))
    shutil.copy(write(tmp_path, make()) / "model.safetensors", tmp_path / "part-1.safetensors")
    (tmp_path / "model.safetensors").unlink()
    assert read_weights(tmp_path).keys() == to_hugging_face(make()).keys()
