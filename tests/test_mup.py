"""µP: the standard model at the base width, and activations that do not grow with the width."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tinygpt import cli
from tinygpt.config import AdamOptim, ConfigError, LionOptim, ModelConfig, MuonOptim, OptimConfig
from tinygpt.model.generate import generate
from tinygpt.model.gpt import GPT
from tinygpt.training.optim import make_optimizer, parameter_groups

VOCAB = 64
OPTIMIZERS: dict[str, OptimConfig] = {
    "adamw": AdamOptim(learning_rate=3e-3),
    "adam": AdamOptim(kind="adam", learning_rate=3e-3, weight_decay=0.0),
    "lion": LionOptim(learning_rate=1e-3),
    "muon": MuonOptim(learning_rate=0.02, adam_learning_rate=3e-3),
}
SHAPES = [
    pytest.param({}, id="gpt2"),
    pytest.param({"attention": "manual", "tie_weights": False}, id="manual-untied"),
    pytest.param(
        {"position": "rope", "norm": "rmsnorm", "activation": "swiglu", "n_kv_heads": 2},
        id="llama",
    ),
]


def make(width: int, n_heads: int, parametrization: str, **changes: Any) -> GPT:
    torch.manual_seed(0)
    sizes = {"n_layers": 2, "d_model": width, "n_heads": n_heads, "max_seq_len": 32}
    return GPT(ModelConfig(**{**sizes, "parametrization": parametrization, **changes}), VOCAB)


def some_tokens(batch: int = 4) -> Tensor:
    return torch.randint(VOCAB, (batch, 32), generator=torch.Generator().manual_seed(5))


def train(model: GPT, config: OptimConfig, tokens: Tensor, steps: int) -> None:
    optimizer = make_optimizer(model, config, fused=False)
    for _ in range(steps):
        optimizer.zero_grad()
        logits = model(tokens)[:, :-1].flatten(0, 1)
        F.cross_entropy(logits, tokens[:, 1:].flatten()).backward()
        optimizer.step()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_at_the_base_width_it_is_the_standard_model_to_the_bit(
    name: str, shape: dict[str, Any]
) -> None:
    config, tokens = OPTIMIZERS[name], some_tokens()
    models = [make(64, 4, kind, **shape) for kind in ("standard", "mup")]
    groups = [parameter_groups(model, config) for model in models]
    told = [[(g["lr"], g["weight_decay"], len(g["params"])) for g in some] for some in groups]
    assert told[0] == told[1]
    for steps in (0, 2):
        for model in models:
            train(model, config, tokens, steps)
        for one, other in zip(*(model.parameters() for model in models), strict=True):
            assert torch.equal(one, other)
        assert torch.equal(*(model(tokens) for model in models))


def outputs(model: GPT, tokens: Tensor) -> dict[str, Tensor]:
    """What each block and the head give out."""
    found: dict[str, Tensor] = {}
    hooks = [
        block.register_forward_hook(lambda _m, _i, out, n=n: found.update({f"block {n}": out}))
        for n, block in enumerate(model.blocks)
    ]
    with torch.no_grad():
        found["logits"] = model(tokens)
    for hook in hooks:
        hook.remove()
    return found


def growth(parametrization: str, config: OptimConfig, fixed: str) -> dict[str, float]:
    """The exponent of width by which training changes each output: the slope on log-log axes."""
    widths: tuple[int, ...] = (32, 64, 128, 256)
    tokens = some_tokens()
    if isinstance(config, MuonOptim):  # its products in bfloat16 take minutes on many CPUs
        widths = widths[:3]
    changes: list[dict[str, float]] = []
    for width in widths:
        n_heads = 4 if fixed == "n_heads" else width // 16
        model = make(width, n_heads, parametrization)
        before = outputs(model, tokens)
        train(model, config, tokens, steps=8)
        after = outputs(model, tokens)
        changes.append({k: (after[k] - before[k]).abs().mean().item() for k in after})
    x = torch.tensor(widths).double().log()
    slopes = {}
    for name in changes[0]:
        y = torch.tensor([change[name] for change in changes]).double().log()
        slopes[name] = (
            ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
        ).item()
    return slopes


@pytest.mark.parametrize("fixed", ["head_width", "n_heads"])
@pytest.mark.parametrize("name", ["adamw", "lion", "muon"])
def test_coordinate_check(name: str, fixed: str) -> None:
    """As Yang et al. 2022, appendix D.1: under µP outputs change by as much at any width."""
    mup = growth("mup", OPTIMIZERS[name], fixed)
    standard = growth("standard", OPTIMIZERS[name], fixed)
    assert set(mup) == {"block 0", "block 1", "logits"}
    assert max(mup.values()) < 0.12, mup
    assert min(mup.values()) > -0.35, mup  # nor do they vanish
    assert min(standard.values()) > 0.25, standard


def test_the_coordinate_check_sees_a_wrong_rule() -> None:
    """µP without its rates is seen by the check, and so is muon with rates divided by m."""
    config = AdamOptim(learning_rate=3e-3, scale_rate_with_width=False)
    assert growth("mup", config, "n_heads")["block 1"] > 0.5
    muon = MuonOptim(learning_rate=0.02, adam_learning_rate=3e-3, scale_rate_with_width=True)
    assert growth("mup", muon, "n_heads")["block 1"] < -0.35


@pytest.mark.parametrize("shape", SHAPES)
def test_manual_attention_and_sdpa_agree(shape: dict[str, Any]) -> None:
    models = [
        make(48, 4, "mup", **{**shape, "attention": attention}) for attention in ("sdpa", "manual")
    ]
    sdpa, manual = (model.double() for model in models)
    with torch.no_grad():
        for p, q in zip(sdpa.parameters(), manual.parameters(), strict=True):
            p.normal_(std=0.3)
            q.copy_(p)
    torch.testing.assert_close(sdpa(some_tokens()), manual(some_tokens()))


@pytest.mark.parametrize("tied", [True, False])
def test_it_is_the_standard_model_of_other_weights(tied: bool) -> None:
    """Scores and logits by closed form: folded into queries and the final norm they are gone."""
    d_model, n_heads, base = 96, 4, 32  # D = 24, m = 3
    mup = make(d_model, n_heads, "mup", tie_weights=tied, mup_base_width=base).double()
    plain = make(d_model, n_heads, "standard", tie_weights=tied).double()
    with torch.no_grad():
        for p in mup.parameters():
            p.normal_(std=0.3)
        weights: dict[str, Tensor] = {name: p.clone() for name, p in mup.named_parameters()}
        for name, weight in weights.items():
            if ".qkv." in name:
                weight[:d_model] *= (4 / 24) / (1 / math.sqrt(24))
            if name.startswith("norm_final"):
                weight /= 3
    plain.load_state_dict(weights)
    tokens = some_tokens()
    torch.testing.assert_close(mup(tokens), plain(tokens))
    torch.testing.assert_close(mup.logits(mup.hidden(tokens)), mup(tokens))
    options: dict[str, Any] = {"temperature": 0.7, "generator": None}
    texts = [generate(model, tokens[:, :4], 12, **options) for model in (mup, plain)]
    assert torch.equal(*texts)  # the factor is in what is sampled from, once


@pytest.mark.parametrize("parametrization", ["standard", "mup"])
def test_initialisation(parametrization: str) -> None:
    model = make(256, 4, parametrization, tie_weights=False, activation="swiglu")
    smaller = 2 if parametrization == "mup" else 1  # sqrt(256 / 64)
    for name, p in model.named_parameters():
        if p.ndim == 2:
            std = 0.02 / smaller if name.startswith("blocks.") else 0.02
            if name.endswith(("attention.proj.weight", "mlp.down.weight")):
                std /= math.sqrt(2 * 2)
            assert p.std().item() == pytest.approx(std, rel=0.03), name


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("parametrization", "scale", "divided"),
    [
        ("standard", None, False),
        ("standard", True, True),
        ("standard", False, False),
        ("mup", None, True),
        ("mup", True, True),
        ("mup", False, False),
    ],
)
def test_rates_by_closed_form(
    parametrization: str, scale: bool | None, divided: bool, tied: bool
) -> None:
    model = make(96, 4, parametrization, tie_weights=tied, mup_base_width=32)  # m = 3
    for kind in ("adamw", "adam"):
        config = AdamOptim(
            kind=kind,
            learning_rate=0.03,
            weight_decay=0.1,
            decay_embeddings=False,
            scale_rate_with_width=scale,
        )
        names = {id(p): name for name, p in model.named_parameters()}
        seen = []
        for group in make_optimizer(model, config, fused=False).param_groups:
            for p in group["params"]:
                name = names[id(p)]
                seen.append(name)
                hidden = name.startswith("blocks.") and p.ndim == 2
                m = 3 if hidden and divided else 1
                decay = 0.1 if hidden or name == "head.weight" else 0.0
                assert group["lr"] == pytest.approx(0.03 / m), name
                assert group["weight_decay"] == pytest.approx(decay * m), name
        assert sorted(seen) == sorted(names.values())


def test_muon_keeps_its_rates_under_mup() -> None:
    """Its step has the spectral norm sqrt(max(1, rows/columns)), the same at any width."""
    groups = parameter_groups(make(256, 4, "mup"), OPTIMIZERS["muon"])
    assert [(g["lr"], g["weight_decay"]) for g in groups] == [(0.02, 0.1), (3e-3, 0.1), (3e-3, 0)]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            "optim=sgd optim.scale_rate_with_width=true",
            "optim.scale_rate_with_width=true: not with optim=sgd; "
            "allowed with optim=adamw, adam, lion",
        ),
        (
            "optim=muon optim.scale_rate_with_width=true",
            "optim.scale_rate_with_width=true: not with optim=muon; "
            "allowed with optim=adamw, adam, lion",
        ),
        (
            "optim=sgd model.parametrization=mup",
            "model.parametrization=mup: has no rule for the rates of optim=sgd; "
            "allowed with optim=adamw, adam, lion, muon",
        ),
        (
            "optim=adafactor model.parametrization=mup",
            "model.parametrization=mup: has no rule for the rates of optim=adafactor; "
            "allowed with optim=adamw, adam, lion, muon",
        ),
        (
            "model.parametrization=mupp",
            "model.parametrization=mupp: must be one of standard, mup",
        ),
        ("model.mup_base_width=0", "model.mup_base_width=0: must be at least 1"),
    ],
)
def test_what_has_no_rule_is_refused_in_one_line(words: str, line: str) -> None:
    with pytest.raises(ConfigError) as error:
        cli.compose_config(words.split())
    assert str(error.value) == line


@pytest.mark.parametrize(
    "words",
    [
        "optim=muon model.parametrization=mup",
        "optim=sgd model.parametrization=mup optim.scale_rate_with_width=false",
        "optim=lion optim.scale_rate_with_width=true",
    ],
)
def test_what_has_a_rule_is_composed(words: str) -> None:
    cli.compose_config(words.split())
