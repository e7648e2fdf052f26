"""The model: against transformers' GPT-2 and Llama, against itself, and key by key."""

import copy
import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from tinygpt.config import ACTIVATIONS, ModelConfig
from tinygpt.model.gpt import GOLDEN, GPT, drop, dropout_seeds, rotary_tables, rotate
from tinygpt.model.huggingface import to_hugging_face

VOCAB = 37
SMALL: dict[str, Any] = {"n_layers": 2, "d_model": 24, "n_heads": 4, "max_seq_len": 12}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Threads cost small tensors more than they give, ten times so on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make(seed: int = 0, vocab_size: int = VOCAB, **changes: Any) -> GPT:
    """A small model whose every parameter differs from its initial 0, 1 or tiny value."""
    torch.manual_seed(seed)
    model = GPT(ModelConfig(**{**SMALL, **changes}), vocab_size)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
    return model


def some_tokens(batch: int = 3, length: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(VOCAB, (batch, length), generator=generator)


def loss_of(logits: Tensor, tokens: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def gradients(model: GPT, tokens: Tensor, seeds: Tensor | None = None) -> dict[str, Tensor]:
    model.zero_grad()
    torch.autograd.backward(loss_of(model(tokens, seeds=seeds), tokens))
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# --- against transformers ------------------------------------------------------------------


def exported(model: GPT, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return values of our parameters, or their gradients, by transformers' names."""
    other = copy.deepcopy(model)
    other.load_state_dict(tensors)
    return to_hugging_face(other)


def assert_same_function(model: GPT, reference: torch.nn.Module) -> None:
    """The same weights give the same logits and the same gradients, for each parameter."""
    weights = exported(model, model.state_dict())
    missing, unexpected = reference.load_state_dict(weights, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}  # tied
    reference.double()
    model.double()
    tokens = some_tokens()
    theirs = reference(input_ids=tokens, use_cache=False).logits
    torch.testing.assert_close(model(tokens), theirs, rtol=1e-6, atol=1e-6)

    ours = exported(model, gradients(model, tokens))
    torch.autograd.backward(loss_of(theirs, tokens))
    expected = {n: p.grad for n, p in reference.named_parameters() if p.grad is not None}
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(ours[name].double(), gradient, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("attention", ["sdpa", "manual"])
@pytest.mark.parametrize("tie_weights", [True, False])
@pytest.mark.parametrize(("activation", "name"), [("gelu", "gelu"), ("gelu_tanh", "gelu_new")])
def test_same_as_gpt2(attention: str, tie_weights: bool, activation: str, name: str) -> None:
    transformers = pytest.importorskip("transformers")
    model = make(attention=attention, tie_weights=tie_weights, activation=activation)
    reference = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCAB,
            n_positions=12,
            n_embd=24,
            n_layer=2,
            n_head=4,
            activation_function=name,
            tie_word_embeddings=tie_weights,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    assert_same_function(model, reference)


@pytest.mark.parametrize("attention", ["sdpa", "manual"])
@pytest.mark.parametrize(
    ("n_kv_heads", "bias", "tie_weights", "theta"),
    [(None, False, True, 10000.0), (2, False, False, 500.0), (1, True, True, 10000.0)],
)
def test_same_as_llama(
    attention: str, n_kv_heads: int | None, bias: bool, tie_weights: bool, theta: float
) -> None:
    transformers = pytest.importorskip("transformers")
    model = make(
        attention=attention,
        n_kv_heads=n_kv_heads,
        bias=bias,
        tie_weights=tie_weights,
        rope_theta=theta,
        position="rope",
        norm="rmsnorm",
        activation="swiglu",
    )
    llama_config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=24,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=n_kv_heads or 4,
        max_position_embeddings=12,
        rms_norm_eps=1e-5,
        attention_bias=bias,
        mlp_bias=bias,
        tie_word_embeddings=tie_weights,
        rope_theta=theta,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        bos_token_id=0,
        eos_token_id=0,
    )
    assert_same_function(model, transformers.LlamaForCausalLM(llama_config))


# --- attention -----------------------------------------------------------------------------


@st.composite
def shapes(draw: st.DrawFn) -> dict[str, Any]:
    n_kv_heads = draw(st.integers(1, 3))
    n_heads = n_kv_heads * draw(st.integers(1, 3))
    max_seq_len = draw(st.integers(1, 10))
    return {
        "n_layers": draw(st.integers(1, 2)),
        "d_model": n_heads * 2 * draw(st.integers(2, 3)),  # LayerNorm of 2 numbers is but a sign
        "n_heads": n_heads,
        "n_kv_heads": n_kv_heads,
        "d_ff": draw(st.none() | st.integers(1, 20)),
        "max_seq_len": max_seq_len,
        "bias": draw(st.booleans()),
        "tie_weights": draw(st.booleans()),
        "position": draw(st.sampled_from(["learned", "rope"])),
        "norm": draw(st.sampled_from(["layernorm", "rmsnorm"])),
        "activation": draw(st.sampled_from(ACTIVATIONS)),
        "pad_vocab_to_multiple": draw(st.sampled_from([1, 8])),
    }


@settings(max_examples=20)
@given(shapes(), st.data())
def test_any_shape(shape: dict[str, Any], data: st.DataObject) -> None:
    """SDPA and the manual attention agree in values and gradients, and nothing looks ahead."""
    length = data.draw(st.integers(1, shape["max_seq_len"]))
    tokens = some_tokens(batch=2, length=length)
    sdpa = make(**shape, attention="sdpa").double()
    manual = make(**shape, attention="manual").double()
    logits = sdpa(tokens)
    rows = -(-VOCAB // shape["pad_vocab_to_multiple"]) * shape["pad_vocab_to_multiple"]
    assert logits.shape == (2, length, rows)
    torch.testing.assert_close(logits, manual(tokens))

    weights = torch.randn(logits.shape, dtype=torch.float64)
    ours = torch.autograd.grad((logits * weights).sum(), list(sdpa.parameters()))
    theirs = torch.autograd.grad((manual(tokens) * weights).sum(), list(manual.parameters()))
    for name, a, b in zip(dict(sdpa.named_parameters()), ours, theirs, strict=True):
        torch.testing.assert_close(a, b, msg=name)

    position = data.draw(st.integers(0, length - 1))
    changed = tokens.clone()
    changed[:, position:] = (changed[:, position:] + 1) % VOCAB
    torch.testing.assert_close(sdpa(changed)[:, :position], logits[:, :position])
    assert not torch.allclose(sdpa(changed)[:, position], logits[:, position])


def test_shared_keys_and_values_are_repeated_heads() -> None:
    """Grouped queries are the full attention whose keys and values are copies within a group."""
    grouped = make(n_kv_heads=2).double()
    full = make(n_kv_heads=4).double()
    weights = grouped.state_dict()
    for name in [name for name in weights if "qkv" in name]:
        q, k, v = weights[name].unflatten(0, (-1, 6)).split([4, 2, 2])
        k, v = k.repeat_interleave(2, dim=0), v.repeat_interleave(2, dim=0)
        weights[name] = torch.cat((q, k, v)).flatten(0, 1)
    full.load_state_dict(weights)
    torch.testing.assert_close(full(some_tokens()), grouped(some_tokens()))


def test_rotation_depends_on_distance_only() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 8, dtype=torch.float64)
    tables = rotary_tables(20, 8, 100.0)
    cos, sin = tables[0].double(), tables[1].double()
    products = rotate(q.expand(20, 8), (cos, sin)) @ rotate(k.expand(20, 8), (cos, sin)).T
    torch.testing.assert_close(products[1:, 1:], products[:-1, :-1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(products[0, 0], q @ k)  # position 0 is not turned
    assert not torch.allclose(products[0, 1], products[0, 0])
    assert not torch.allclose(products[0, 1], products[1, 0])
    assert rotate(q.expand(20, 8).bfloat16(), tables).dtype == torch.bfloat16


# --- every key does what it says -----------------------------------------------------------


def shape_of(model: GPT) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def test_module_names_and_shapes() -> None:
    block = {
        "norm_1.weight": (24,),
        "norm_1.bias": (24,),
        "attention.qkv.weight": (72, 24),
        "attention.qkv.bias": (72,),
        "attention.proj.weight": (24, 24),
        "attention.proj.bias": (24,),
        "norm_2.weight": (24,),
        "norm_2.bias": (24,),
        "mlp.up.weight": (96, 24),
        "mlp.up.bias": (96,),
        "mlp.down.weight": (24, 96),
        "mlp.down.bias": (24,),
    }
    expected = {
        "token_embedding.weight": (37, 24),
        "position_embedding.weight": (12, 24),
        **{f"blocks.{i}.{name}": shape for i in range(2) for name, shape in block.items()},
        "norm_final.weight": (24,),
        "norm_final.bias": (24,),
    }
    assert shape_of(make()) == expected


PARAMETER_KEYS: dict[str, tuple[Any, dict[str, tuple[int, ...] | None]]] = {
    "n_layers": (3, {"blocks.2.mlp.up.weight": (96, 24)}),
    "d_model": (32, {"norm_final.weight": (32,), "blocks.0.mlp.up.weight": (128, 32)}),
    "n_kv_heads": (2, {"blocks.0.attention.qkv.weight": (48, 24)}),
    "d_ff": (10, {"blocks.1.mlp.up.weight": (10, 24), "blocks.1.mlp.down.weight": (24, 10)}),
    "max_seq_len": (20, {"position_embedding.weight": (20, 24)}),
    "bias": (False, {"blocks.0.mlp.up.bias": None, "norm_final.bias": None}),
    "tie_weights": (False, {"head.weight": (37, 24)}),
    "position": ("rope", {"position_embedding.weight": None}),
    "norm": ("rmsnorm", {"norm_final.bias": None, "blocks.0.norm_2.bias": None}),
    "activation": ("swiglu", {"blocks.0.mlp.gate.weight": (64, 24)}),
    "pad_vocab_to_multiple": (64, {"token_embedding.weight": (64, 24)}),
}


@pytest.mark.parametrize("key", PARAMETER_KEYS)
def test_keys_that_change_parameters(key: str) -> None:
    value, expected = PARAMETER_KEYS[key]
    before, after = shape_of(make()), shape_of(make(**{key: value}))
    for name, shape in expected.items():
        assert after.get(name) == shape
        assert before.get(name) != shape
    if key == "bias":
        assert not any(name.endswith("bias") for name in after)


@pytest.mark.parametrize(
    ("base", "changes"),
    [
        ({}, {"n_heads": 2}),
        ({"position": "rope"}, {"rope_theta": 100.0}),
        ({}, {"activation": "gelu_tanh"}),
        ({"bias": False}, {"norm": "rmsnorm"}),
        ({}, {"norm_eps": 1e-2}),
        ({"norm": "rmsnorm"}, {"norm_eps": 1e-2}),
        ({}, {"parametrization": "mup"}),
        ({"parametrization": "mup"}, {"mup_base_width": 12}),
    ],
)
def test_keys_that_change_the_function(base: dict[str, Any], changes: dict[str, Any]) -> None:
    """The same weights, another key: other logits."""
    one, other = make(**base), make(**{**base, **changes})
    other.load_state_dict(one.state_dict())
    difference = (one(some_tokens()) - other(some_tokens())).abs().max()
    assert difference > 1e-4


def test_every_key_is_tested() -> None:
    elsewhere = {"n_heads", "rope_theta", "dropout", "attention", "gradient_checkpointing"}
    elsewhere |= {"parametrization", "mup_base_width", "norm_eps", "rope_scaling"}
    assert {f.name for f in dataclasses.fields(ModelConfig)} == {*PARAMETER_KEYS, *elsewhere}


def test_attention_key_chooses_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Tensor:
        raise AssertionError("SDPA was called")

    monkeypatch.setattr(F, "scaled_dot_product_attention", refuse)
    make(attention="manual")(some_tokens())
    with pytest.raises(AssertionError, match="SDPA"):
        make(attention="sdpa")(some_tokens())


@pytest.mark.parametrize("attention", ["sdpa", "manual"])
def test_dropout(attention: str) -> None:
    tokens = some_tokens()
    model, plain = make(dropout=0.3, attention=attention), make(attention=attention)
    assert not torch.equal(model(tokens), model(tokens))
    torch.manual_seed(1)
    once = model(tokens)
    torch.manual_seed(1)
    assert torch.equal(model(tokens), once)
    torch.testing.assert_close(model.eval()(tokens), plain(tokens))  # off in eval
    assert torch.equal(plain.train()(tokens), plain(tokens))  # 0 is off in training too


def test_dropout_is_in_four_places(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []

    def spy(x: Tensor, p: float, training: bool = True, inplace: bool = False) -> Tensor:
        if training and p == 0.3:
            seen.append(tuple(x.shape))
        return x

    monkeypatch.setattr(F, "dropout", spy)
    model = make(dropout=0.3, attention="manual", n_layers=1)
    model(some_tokens())
    residual = (3, 12, 24)
    # embedding, attention weights, the attention's output, the MLP's
    assert seen == [residual, (3, 4, 12, 12), residual, residual]
    model.eval()(some_tokens())
    assert len(seen) == 4


def test_dropout_inside_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    original = F.scaled_dot_product_attention

    def spy(*args: Any, **options: Any) -> Tensor:
        seen.append(options["dropout_p"])
        return original(*args, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    model = make(dropout=0.3)
    model(some_tokens())
    model.eval()(some_tokens())
    assert seen == [0.3, 0.3, 0.0, 0.0]


def test_what_is_dropped_of_a_sequence_is_its_own() -> None:
    """Whatever batch it is in; by step, sequence, block and place others."""
    model = make(dropout=0.3).double()
    tokens, seeds = some_tokens(), dropout_seeds(5, 2, 4, 3)
    together = model(tokens, seeds=seeds)
    alone = [model(tokens[n : n + 1], seeds=dropout_seeds(5, 2, 4 + n, 1)) for n in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-12, atol=1e-12)
    torch.rand(9)  # whatever torch's own state is
    assert torch.equal(model(tokens, seeds=seeds), together)
    assert not torch.allclose(model(tokens, seeds=dropout_seeds(5, 3, 4, 3)), together)
    assert torch.equal(model.eval()(tokens, seeds=seeds), model(tokens))


def test_dropped_numbers_are_as_good_as_random() -> None:
    kept = []
    for step, block, place in itertools.product(range(2), range(2), range(3)):
        seeds = dropout_seeds(0, step, 0, 4) + block * GOLDEN
        kept.append(drop(torch.ones(4, 2**14), 0.3, seeds, place))
    rows = torch.cat(kept)
    assert rows.unique().tolist() == pytest.approx([0, 1 / 0.7])
    shares = (rows > 0).double().mean(1)
    assert (shares - 0.7).abs().max() < 4.5 * (0.3 * 0.7 / 2**14) ** 0.5
    shifted = torch.cat([rows.roll(n, 1) for n in (0, 1, 2, 64)])
    among = torch.corrcoef(shifted) - torch.eye(len(shifted))
    assert among.abs().max() < 5.5 / 2**7  # as the largest of so many pairs that are independent


@pytest.mark.parametrize(("dropout", "seeded"), [(0.0, False), (0.2, False), (0.2, True)])
@pytest.mark.parametrize("position", ["learned", "rope"])
def test_gradient_checkpointing_changes_no_gradient(
    dropout: float, seeded: bool, position: str
) -> None:
    tokens, results = some_tokens(), []
    for checkpointing in (False, True):
        model = make(gradient_checkpointing=checkpointing, dropout=dropout, position=position)
        calls: list[int] = []
        norm = model.get_submodule("blocks.0.norm_1")
        norm.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        torch.manual_seed(7)
        results.append(gradients(model, tokens, dropout_seeds(0, 0, 0, 3) if seeded else None))
        assert len(calls) == (2 if checkpointing else 1)  # it does compute anew
    plain, anew = results
    assert plain.keys() == anew.keys()
    for name, gradient in plain.items():
        assert torch.equal(gradient, anew[name]), name


# --- initialisation, checkpoints, devices and precisions ------------------------------------


def test_initialisation() -> None:
    torch.manual_seed(0)
    config = ModelConfig(n_layers=8, d_model=64, n_heads=4, tie_weights=False, activation="swiglu")
    model = GPT(config, 500)
    for name, p in model.named_parameters():
        if "norm" in name:
            assert (p == (1 if name.endswith("weight") else 0)).all(), name
        elif name.endswith("bias"):
            assert (p == 0).all(), name
        else:
            residual = name.endswith(("attention.proj.weight", "mlp.down.weight"))
            std = 0.02 / math.sqrt(2 * 8) if residual else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.06), name
            assert abs(p.mean().item()) < 5 * std / math.sqrt(p.numel()), name


@pytest.mark.parametrize("attention", ["sdpa", "manual"])
@pytest.mark.parametrize("position", ["learned", "rope"])
def test_a_checkpoint_holds_parameters_only(attention: str, position: str) -> None:
    model = make(seed=1, attention=attention, position=position)
    logits = model(some_tokens())  # a forward pass leaves nothing behind
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}
    fresh = make(seed=2, attention=attention, position=position)
    fresh.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(fresh(some_tokens()), logits)


def test_tied_weights_are_one_and_stay_one() -> None:
    for model in (make(), copy.deepcopy(make()), make().double()):
        assert model.output_weight is model.token_embedding.weight
        assert not hasattr(model, "head")
    untied = make(tie_weights=False)
    assert untied.output_weight is untied.head.weight


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention": "manual"},
        {"position": "rope", "norm": "rmsnorm", "activation": "swiglu", "n_kv_heads": 2},
        {"position": "rope", "attention": "manual"},
    ],
)
def test_bfloat16_autocast(changes: dict[str, Any]) -> None:
    model, tokens = make(**changes), some_tokens()
    full = model(tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(tokens)
    assert logits.dtype == torch.bfloat16
    assert (logits - full).abs().max() < 0.05 * full.abs().max()
    torch.autograd.backward(loss_of(logits.float(), tokens))
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


def test_too_long_a_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match=r"13 tokens.*max_seq_len is 12"):
        make()(some_tokens(length=13))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_heads": 5}, "n_heads=5 must divide d_model=24"),
        ({"n_kv_heads": 3}, "n_kv_heads=3 must divide n_heads=4"),
        ({"n_heads": 8, "position": "rope"}, "even"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPT(ModelConfig(**{**SMALL, **changes}), VOCAB)
