"""Schedules as closed forms, decay groups, optimizers."""

from __future__ import annotations

import copy
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tinygpt.config import (
    AdafactorOptim,
    AdamOptim,
    ConfigError,
    ConstantSchedule,
    DecaySchedule,
    LionOptim,
    ModelConfig,
    MuonOptim,
    OptimConfig,
    ScheduleConfig,
    SgdOptim,
    WsdSchedule,
)
from tinygpt.model.gpt import GPT
from tinygpt.training.optim import (
    check_optimizer,
    make_optimizer,
    parameter_groups,
    rate_factor,
)

ratios = st.floats(0.0, 1.0)
schedules: st.SearchStrategy[ScheduleConfig] = st.one_of(
    st.just(ConstantSchedule()),
    st.builds(DecaySchedule, kind=st.sampled_from(["cosine", "linear"]), min_ratio=ratios),
    st.builds(WsdSchedule, min_ratio=ratios, decay_fraction=st.floats(0.01, 1.0)),
)


@st.composite
def runs(draw: st.DrawFn) -> tuple[int, int]:
    """Steps of a run and of its warmup, which is shorter."""
    total = draw(st.integers(1, 300))
    return total, draw(st.integers(0, total - 1))


def rates(schedule: ScheduleConfig, run: tuple[int, int]) -> list[float]:
    total, warmup = run
    return [
        rate_factor(step, schedule, total_steps=total, warmup_steps=warmup) for step in range(total)
    ]


# Schedules


@given(schedules, runs())
def test_no_rate_is_above_the_peak_or_below_the_minimum(
    schedule: ScheduleConfig, run: tuple[int, int]
) -> None:
    found, minimum = rates(schedule, run), getattr(schedule, "min_ratio", 1.0)
    assert all(0.0 <= rate <= 1.0 for rate in found)
    assert all(rate >= minimum - 1e-12 for rate in found[run[1] :])
    after = found[max(0, run[1] - 1) :]
    assert all(one >= other - 1e-12 for one, other in pairwise(after))


@given(schedules, runs())
def test_warmup_is_a_line_from_above_zero_to_the_peak(
    schedule: ScheduleConfig, run: tuple[int, int]
) -> None:
    _, warmup = run
    found = rates(schedule, run)[:warmup]
    assert found == pytest.approx([(step + 1) / warmup for step in range(warmup)])
    if warmup > 1:
        assert 0 < found[0] < 1
    if warmup:
        assert found[-1] == 1.0


@given(runs(), ratios)
def test_cosine_and_linear_are_their_formulas(run: tuple[int, int], minimum: float) -> None:
    total, warmup = run
    done = [(step + 1 - warmup) / (total - warmup) for step in range(warmup, total)]
    cosine = [minimum + (1 - minimum) * 0.5 * (1 + math.cos(math.pi * x)) for x in done]
    linear = [1 - (1 - minimum) * x for x in done]
    schedule = DecaySchedule(kind="cosine", min_ratio=minimum)
    assert rates(schedule, run)[warmup:] == pytest.approx(cosine, abs=1e-12)
    schedule = DecaySchedule(kind="linear", min_ratio=minimum)
    assert rates(schedule, run)[warmup:] == pytest.approx(linear, abs=1e-12)


@given(runs(), st.floats(0.01, 1.0), ratios)
def test_wsd_is_flat_and_then_a_line(run: tuple[int, int], fraction: float, minimum: float) -> None:
    total, warmup = run
    decay = min(max(1, round(fraction * total)), total - warmup)
    found = rates(WsdSchedule(min_ratio=minimum, decay_fraction=fraction), run)
    plateau = found[warmup : total - decay]
    assert plateau == [1.0] * (total - decay - warmup)
    line = [1 - (1 - minimum) * (n + 1) / decay for n in range(decay)]
    assert found[total - decay :] == pytest.approx(line, abs=1e-12)


# Decay groups


def tiny_gpt(**values: Any) -> GPT:
    sizes = {"n_layers": 2, "d_model": 8, "n_heads": 2, "max_seq_len": 8}
    return GPT(ModelConfig(**{**sizes, **values}), vocab_size=11)


def names_by_decay(model: GPT, config: OptimConfig) -> dict[float, set[str]]:
    names = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model, config)
    given = [id(p) for group in groups for p in group["params"]]
    assert sorted(given) == sorted(names)  # each once, a tied weight too
    return {g["weight_decay"]: {names[id(p)] for p in g["params"]} for g in groups}


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("decay_embeddings", [True, False])
def test_matrices_are_decayed_and_norms_and_biases_never(
    norm: str, bias: bool, tied: bool, decay_embeddings: bool
) -> None:
    model = tiny_gpt(norm=norm, bias=bias, tie_weights=tied, activation="swiglu")
    config = AdamOptim(weight_decay=0.1, decay_embeddings=decay_embeddings)
    found = names_by_decay(model, config)
    every = {name for name, _ in model.named_parameters()}
    plain = {name for name in every if name.endswith("bias") or "norm" in name}
    if not decay_embeddings:
        plain |= {"token_embedding.weight", "position_embedding.weight"}
    assert found == {0.1: every - plain, 0.0: plain}
    assert ("head.weight" in found[0.1]) == (not tied)  # an untied head is a matrix like others


def test_decay_shrinks_what_it_should_and_nothing_else() -> None:
    """One step with gradients of zero: only decay moves a weight."""
    model = tiny_gpt()
    for parameter in model.parameters():
        torch.nn.init.ones_(parameter)
        parameter.grad = torch.zeros_like(parameter)
    config = AdamOptim(kind="adamw", learning_rate=0.5, weight_decay=0.1, decay_embeddings=False)
    make_optimizer(model, config, fused=False).step()
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim == 2 and "embedding" not in name
        expected = 1 - 0.5 * 0.1 if is_matrix else 1.0
        assert torch.allclose(parameter, torch.tensor(expected)), name


# Optimizers


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (AdamOptim(kind="adamw", betas=[0.8, 0.99], eps=1e-5), torch.optim.AdamW),
        (AdamOptim(kind="adam", betas=[0.7, 0.9], eps=1e-4), torch.optim.Adam),
        (SgdOptim(momentum=0.5, nesterov=True), torch.optim.SGD),
        (SgdOptim(momentum=0.0, nesterov=False), torch.optim.SGD),
    ],
)
def test_every_key_reaches_the_optimizer(
    config: AdamOptim | SgdOptim, kind: type[torch.optim.Optimizer], fused: bool
) -> None:
    config.learning_rate, config.weight_decay = 0.02, 0.3
    optimizer = make_optimizer(tiny_gpt(), config, fused=fused)
    assert type(optimizer) is kind
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    for group in optimizer.param_groups:
        assert group["lr"] == 0.02
        assert group["fused"] == fused
        if isinstance(config, AdamOptim):
            assert list(group["betas"]) == config.betas
            assert group["eps"] == config.eps
        else:
            assert (group["momentum"], group["nesterov"]) == (config.momentum, config.nesterov)


# Lion, Adafactor, Muon

NEW: list[OptimConfig] = [
    LionOptim(learning_rate=0.01, betas=[0.8, 0.95], weight_decay=0.3),
    AdafactorOptim(learning_rate=0.05, weight_decay=0.3),
    MuonOptim(learning_rate=0.02, adam_learning_rate=0.01, weight_decay=0.3),
]
names_of_new = [config.kind for config in NEW]


def batch(step: int) -> torch.Tensor:
    return torch.randint(11, (4, 8), generator=torch.Generator().manual_seed(step))


def backward(model: GPT, step: int) -> None:
    """The gradients of batch number ``step``."""
    tokens = batch(step)
    model.zero_grad()
    logits = model(tokens)[:, :-1].flatten(0, 1)
    torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten()).backward()


def same_twice(**values: Any) -> tuple[GPT, GPT]:
    model = tiny_gpt(**values)
    return model, copy.deepcopy(model)


def test_lion_is_its_formula() -> None:
    """Number by number, as the paper's algorithm has it."""
    model = tiny_gpt().double()
    optimizer = make_optimizer(model, NEW[0], fused=False)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    momenta = {name: torch.zeros_like(p) for name, p in weights.items()}
    for _ in range(5):
        for name, p in model.named_parameters():
            g = p.grad = torch.randn_like(p)
            u = (0.8 * momenta[name] + (1 - 0.8) * g).sign()
            decay = 0.3 if p.ndim == 2 else 0.0
            weights[name] = weights[name] - 0.01 * (u + decay * weights[name])
            momenta[name] = 0.95 * momenta[name] + (1 - 0.95) * g
        optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, weights[name], rtol=1e-9, atol=1e-12)


def test_lion_decays_where_the_gradient_is_zero_and_leaves_what_has_none() -> None:
    model = tiny_gpt()
    matrix, norm = model.token_embedding.weight, model.get_parameter("norm_final.weight")
    before = matrix.detach().clone()
    matrix.grad = torch.zeros_like(matrix)
    make_optimizer(model, NEW[0], fused=False).step()
    torch.testing.assert_close(matrix, before * (1 - 0.01 * 0.3))
    assert torch.equal(norm, torch.ones(8))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("decay_embeddings", [True, False])
def test_muon_moves_the_matrices_of_the_blocks_and_adamw_the_rest(
    tied: bool, decay_embeddings: bool
) -> None:
    """Against torch's two optimizers, each on its own parameters."""
    model, plain = same_twice(tie_weights=tied, activation="swiglu")
    config = MuonOptim(learning_rate=0.02, adam_learning_rate=0.01, weight_decay=0.3, eps=1e-6)
    config.momentum, config.nesterov, config.ns_steps, config.betas = 0.8, False, 4, [0.7, 0.9]
    config.decay_embeddings = decay_embeddings
    optimizer = make_optimizer(model, config, fused=True)
    hidden, decayed, rest = [], [], []
    for name, p in plain.named_parameters():
        if name.startswith("blocks.") and p.ndim == 2:
            hidden.append(p)
        elif p.ndim == 2 and (decay_embeddings or name == "head.weight"):
            decayed.append(p)
        else:
            rest.append(p)
    assert len(hidden) == 2 * 5  # qkv, proj, gate, up, down
    muon = torch.optim.Muon(
        hidden, 0.02, 0.3, momentum=0.8, nesterov=False, ns_steps=4, adjust_lr_fn="original"
    )
    groups = [{"params": decayed, "weight_decay": 0.3}, {"params": rest, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    adam = torch.optim.AdamW(groups, lr=0.01, betas=(0.7, 0.9), eps=1e-6)
    for step in range(3):
        backward(model, step)
        optimizer.step()
        backward(plain, step)
        muon.step()
        adam.step()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_muon_step_is_nearly_orthogonal() -> None:
    """The singular values of what is added lie about 1, times the rate and the shape's factor."""
    model = tiny_gpt(d_model=32)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    config = MuonOptim(learning_rate=0.5, weight_decay=0.0)
    torch.manual_seed(0)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    make_optimizer(model, config, fused=False).step()
    for name, p in model.named_parameters():
        if name.startswith("blocks.") and p.ndim == 2:
            factor = 0.5 * math.sqrt(max(1, p.shape[0] / p.shape[1]))
            values = torch.linalg.svdvals((p - before[name]).detach()) / factor
            assert 0.6 < values.median() < 1.3
            assert values.max() < 1.4


def test_adafactor_is_torchs_with_the_keys_of_ours() -> None:
    model, plain = same_twice()
    config = AdafactorOptim(learning_rate=0.05, weight_decay=0.3, beta2_decay=-0.6)
    config.least_rms, config.clip_threshold = 0.02, 1.5
    optimizer = make_optimizer(model, config, fused=True)
    assert type(optimizer) is torch.optim.Adafactor
    decayed = [p for p in plain.parameters() if p.ndim == 2]
    others = [p for p in plain.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.3}, {"params": others, "weight_decay": 0.0}]
    theirs = torch.optim.Adafactor(groups, 0.05, -0.6, (1e-15, 0.02), 1.5)
    for step in range(3):
        backward(model, step)
        optimizer.step()
        backward(plain, step)
        theirs.step()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)


def test_adafactor_is_the_paper_for_small_gradients_too() -> None:
    """Shazeer & Stern 2018, algorithm 4, first step of a matrix: torch's own eps would show."""
    model = tiny_gpt()
    matrix = model.get_parameter("blocks.0.mlp.up.weight")
    before = matrix.detach().double()
    torch.manual_seed(0)
    g = 1e-6 * torch.randn(matrix.shape, dtype=torch.float64).exp()
    matrix.grad = g.float()
    config = AdafactorOptim(learning_rate=0.05, weight_decay=0.0)
    make_optimizer(model, config, fused=False).step()
    rows, columns = (g**2).mean(1, keepdim=True), (g**2).mean(0, keepdim=True)
    u = g / (rows * columns / rows.mean()).sqrt()
    u /= max(1.0, u.square().mean().sqrt().item())
    alpha = 0.05 * max(1e-3, before.square().mean().sqrt().item())
    torch.testing.assert_close(matrix.double(), before - alpha * u, rtol=0, atol=1e-7)


@pytest.mark.parametrize("config", NEW, ids=names_of_new)
def test_a_schedule_scales_every_rate(config: OptimConfig) -> None:
    optimizer = make_optimizer(tiny_gpt(), config, fused=False)
    peaks = [group["lr"] for group in optimizer.param_groups]
    assert set(peaks) == {config.learning_rate, getattr(config, "adam_learning_rate", peaks[-1])}
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25 * peak for peak in peaks]
    model, still = same_twice()
    optimizer = make_optimizer(model, config, fused=False)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    backward(model, 0)
    optimizer.step()  # and the rates are those of the step
    for one, other in zip(model.parameters(), still.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("config", NEW, ids=names_of_new)
def test_a_saved_optimizer_goes_on_with_the_same_bits(config: OptimConfig, tmp_path: Path) -> None:
    model, other = same_twice()
    optimizer = make_optimizer(model, config, fused=False)
    for step in range(6):
        backward(model, step)
        optimizer.step()
    first = make_optimizer(other, config, fused=False)
    for step in range(3):
        backward(other, step)
        first.step()
    torch.save([other.state_dict(), first.state_dict()], tmp_path / "half")
    weights, state = torch.load(tmp_path / "half", weights_only=True)
    fresh = tiny_gpt()
    fresh.load_state_dict(weights)
    second = make_optimizer(fresh, config, fused=False)
    second.load_state_dict(state)
    for step in range(3, 6):
        backward(fresh, step)
        second.step()
    for one, another in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(one, another)
    states = optimizer.state_dict()["state"], second.state_dict()["state"]
    assert states[0].keys() == states[1].keys() == set(range(len(list(model.parameters()))))
    for number, values in states[0].items():
        for name, value in values.items():
            assert torch.equal(value, states[1][number][name])


@pytest.mark.parametrize("config", NEW, ids=names_of_new)
def test_a_step_takes_its_gradients_from_a_closure(config: OptimConfig) -> None:
    """As Lightning gives it: gradients on, though the step itself records none."""
    model = tiny_gpt()

    def closure() -> float:
        assert torch.is_grad_enabled()
        backward(model, 0)
        return 7.0

    before = copy.deepcopy(model)
    assert make_optimizer(model, config, fused=False).step(closure) == 7.0
    for one, other in zip(model.parameters(), before.parameters(), strict=True):
        assert not torch.equal(one, other)


def test_an_old_torch_has_no_muon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon")
    monkeypatch.setattr(torch, "__version__", "2.5.1")
    with pytest.raises(
        ConfigError, match=r"optim=muon: needs torch 2\.9 or later, here is 2\.5\.1"
    ):
        check_optimizer(MuonOptim())
    for config in (*NEW[:2], AdamOptim(), SgdOptim()):
        check_optimizer(config)
        make_optimizer(tiny_gpt(), config, fused=False)
