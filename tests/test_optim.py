"""Schedules as closed forms, decay groups, optimizers."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tinygpt.config import (
    AdamOptim,
    ConstantSchedule,
    DecaySchedule,
    ModelConfig,
    OptimConfig,
    ScheduleConfig,
    SgdOptim,
    WsdSchedule,
)
from tinygpt.model.gpt import GPT
from tinygpt.training.optim import make_optimizer, parameter_groups, rate_factor

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


@given(schedules, runs())
def test_a_decay_ends_with_its_minimum_at_the_last_step(
    schedule: ScheduleConfig, run: tuple[int, int]
) -> None:
    last = rates(schedule, run)[-1]
    assert last == pytest.approx(getattr(schedule, "min_ratio", 1.0), abs=1e-12)


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


def test_known_values() -> None:
    """By hand: 10 steps, 2 of warmup."""
    cosine = rates(DecaySchedule(kind="cosine", min_ratio=0.0), (10, 2))
    assert cosine[:2] == [0.5, 1.0]
    assert cosine[5] == pytest.approx(0.5)  # half way of the eight that decay
    assert cosine[9] == pytest.approx(0.0)
    wsd = rates(WsdSchedule(min_ratio=0.5, decay_fraction=0.4), (10, 2))
    assert wsd == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.875, 0.75, 0.625, 0.5])
    assert rates(ConstantSchedule(), (4, 2)) == [0.5, 1.0, 1.0, 1.0]


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


def test_fused_and_plain_steps_agree() -> None:
    models = [tiny_gpt(), tiny_gpt()]
    models[1].load_state_dict(models[0].state_dict())
    tokens = torch.arange(8).view(1, 8)
    for model, fused in zip(models, (True, False), strict=True):
        optimizer = make_optimizer(model, AdamOptim(learning_rate=0.01), fused=fused)
        for _ in range(3):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(tokens)[0, :-1], tokens[0, 1:]).backward()
            optimizer.step()
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, other)
