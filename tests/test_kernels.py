"""The chunked loss, and the products by oneDNN, against torch's own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from tinygpt.model import kernels
from tinygpt.model.kernels import mean_loss, token_scores

has_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN"
)


@pytest.fixture(autouse=True)
def as_torch_decides() -> Iterator[None]:
    kernels.use_onednn(False)
    yield
    kernels.use_onednn(None)


def made(
    tokens: int, width: int, vocabulary: int, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(vocabulary, width, generator=generator, dtype=torch.float64).to(dtype)
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(hidden @ weight.t(), targets)


def with_gradients(value: Tensor, *of: Tensor) -> list[Tensor]:
    return [value.detach(), *torch.autograd.grad(3 * value, of)]


@settings(max_examples=40)
@given(st.integers(1, 300), st.integers(1, 9), st.integers(1, 40), st.integers(0, 99))
def test_value_and_gradients_are_those_of_the_plain_loss(
    tokens: int, width: int, vocabulary: int, seed: int
) -> None:
    """Whatever the number of chunks: here of 128 tokens, the last one short."""
    hidden, weight, targets = made(tokens, width, vocabulary, torch.float64, seed)
    before, kernels.CHUNK["cpu"] = kernels.CHUNK["cpu"], 1
    try:
        found = with_gradients(mean_loss(hidden, weight, targets), hidden, weight)
    finally:
        kernels.CHUNK["cpu"] = before
    for ours, theirs in zip(
        found, with_gradients(plain(hidden, weight, targets), hidden, weight), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@has_onednn
@pytest.mark.parametrize("by_onednn", [False, True])
@pytest.mark.parametrize("vocabulary", [31, 20_000])
def test_in_32_bits(by_onednn: bool, vocabulary: int) -> None:
    hidden, weight, targets = made(300, 24, vocabulary, torch.float32)
    kernels.use_onednn(by_onednn)
    found = with_gradients(mean_loss(hidden, weight, targets), hidden, weight)
    for ours, theirs in zip(
        found, with_gradients(plain(hidden, weight, targets), hidden, weight), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_under_autocast_as_autocast_has_it() -> None:
    hidden, weight, targets = made(200, 16, 50, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = with_gradients(mean_loss(hidden, weight, targets), hidden, weight)
        expected = with_gradients(
            F.cross_entropy((hidden @ weight.t()).float(), targets), hidden, weight
        )
    assert [x.dtype for x in found] == [torch.float32] * 3
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=1e-3)


def test_a_target_without_any_chance_has_a_finite_loss() -> None:
    """In 32 bits its softmax is 0; the loss is the distance of the logits all the same."""
    hidden = torch.tensor([[1.0, 0.0]], requires_grad=True)
    weight = torch.tensor([[400.0, 0.0], [-400.0, 0.0]])
    found = mean_loss(hidden, weight, torch.tensor([1]))
    assert float(found.detach()) == pytest.approx(800.0)
    (gradient,) = torch.autograd.grad(found, hidden)
    assert gradient.tolist() == [[800.0, 0.0]]


def test_what_is_not_a_number_stays_so() -> None:
    hidden, weight, targets = made(100, 4, 9, torch.float32)
    with torch.no_grad():
        hidden[50, 0] = float("nan")
    assert mean_loss(hidden, weight, targets).isnan()


@settings(max_examples=30)
@given(st.integers(1, 200), st.integers(2, 40), st.integers(0, 99))
def test_scores_are_the_losses_of_each_token(tokens: int, vocabulary: int, seed: int) -> None:
    hidden, weight, targets = made(tokens, 5, vocabulary, torch.float64, seed)
    losses, right = token_scores(hidden, weight, targets)
    logits = hidden @ weight.t()
    torch.testing.assert_close(losses, F.cross_entropy(logits, targets, reduction="none").detach())
    assert right.bool().tolist() == (logits.argmax(1) == targets).tolist()


@settings(max_examples=30)
@given(st.integers(1, 200), st.integers(5, 40), st.integers(1, 5), st.integers(0, 99))
def test_hits_among_the_likeliest(tokens: int, vocabulary: int, top: int, seed: int) -> None:
    hidden, weight, targets = made(tokens, 5, vocabulary, torch.float64, seed)
    near = token_scores(hidden, weight, targets, top=top)[2]
    likeliest = (hidden @ weight.t()).topk(top).indices
    assert near.bool().tolist() == (likeliest == targets[:, None]).any(1).tolist()
    broken = hidden.detach().clone().fill_(float("nan"))
    assert not token_scores(broken, weight, targets, top=top)[2].any()


@pytest.mark.slow
def test_the_loss_of_a_large_vocabulary_takes_a_fraction_of_the_memory() -> None:
    """`small` at vocabulary 50257, batch 32, context 256: at most 40 % of the plain loss's."""
    ours, theirs = (peak_bytes(f"tinygpt.{name}") for name in ("chunks", "plain"))
    assert ours <= 0.4 * theirs


def peak_bytes(kind: str) -> int:
    """The most that one forward and backward pass of a process of its own had resident."""
    import subprocess
    import sys

    program = f"""
import resource, torch
from torch.nn import functional as F
from tinygpt.config import ModelConfig
from tinygpt.model.gpt import GPT
model = GPT(ModelConfig(n_layers=4, d_model=128, n_heads=8), 50257)
tokens = torch.randint(50257, (32, 257))
inputs, targets = tokens[:, :-1], tokens[:, 1:]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
if {kind!r} == "tinygpt.chunks":
    loss = model(inputs, targets)
else:
    loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
loss.backward()
print(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return int(run.stdout)


@has_onednn
@settings(max_examples=40)
@given(st.integers(1, 5), st.integers(1, 40), st.integers(1, 30), st.integers(1, 30), st.booleans())
def test_a_layer_by_onednn_is_torchs_own(
    rows: int, length: int, inputs: int, outputs: int, bias: bool
) -> None:
    torch.manual_seed(0)
    layer = kernels.Linear(inputs, outputs, bias=bias)
    x = torch.randn(rows, length, inputs, requires_grad=True)
    wanted = torch.randn(rows, length, outputs)
    found = {}
    for by_onednn in (True, False):
        kernels.use_onednn(by_onednn)
        y = layer(x)
        found[by_onednn] = [y, *torch.autograd.grad((y * wanted).sum(), [x, *layer.parameters()])]
    for ours, theirs in zip(found[True], found[False], strict=True):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@has_onednn
def test_half_precision_and_64_bits_are_left_to_torch() -> None:
    kernels.use_onednn(True)
    layer = kernels.Linear(8, 8)
    x = torch.randn(40, 8)
    assert kernels.takes_onednn(x)
    assert not kernels.takes_onednn(x.double())
    with torch.autocast("cpu", torch.bfloat16):
        assert not kernels.takes_onednn(x)
        assert layer(x).dtype == torch.bfloat16
    assert layer.double()(x.double()).dtype == torch.float64
