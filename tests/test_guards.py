"""Numbers that leave their range: seen, counted, and where it is asked for left out."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn

from tests.conftest import OPTIMIZERS, tiny
from tests.test_training import Trained, run, same_weights
from tinygpt import cli
from tinygpt.config import ModelConfig
from tinygpt.model.gpt import Attention, make_norm, manual_attention
from tinygpt.model.kernels import mean_loss, token_scores
from tinygpt.runs import rundir
from tinygpt.training import session, trainer
from tinygpt.training.module import LanguageModel

STEPS = ["train.steps=24", "schedule.warmup_steps=0"]


@pytest.fixture
def multiply(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """The loss of some passes, counted from 1, is multiplied by ``factor``."""

    def patch(factor: float, *passes: int) -> None:
        step, count = LanguageModel.training_step, iter(range(1, 10**6))

        def training_step(self: LanguageModel, batch: Any, batch_idx: int) -> Tensor:
            factors = factor if next(count) in passes else 1.0
            return step(self, batch, batch_idx) * factors

        monkeypatch.setattr(LanguageModel, "training_step", training_step)

    return patch


# The gradient's norm


def test_the_largest_norm_between_two_lines_is_logged(
    tmp_path: Path, corpus: Path, cache: Path
) -> None:
    each = run(tmp_path / "each", cache, corpus, *STEPS, "train.log_every=1").rows()
    some = run(tmp_path / "some", cache, corpus, *STEPS, "train.log_every=6").rows()
    norms = {int(row["step"]): float(row["grad_norm"]) for row in each if row["grad_norm"]}
    assert len(norms) == 24
    assert all(row["grad_norm_max"] == row["grad_norm"] for row in each)
    before = 0
    for row in some[1:]:
        step = int(row["step"])
        assert float(row["grad_norm_max"]) == max(norms[n] for n in range(before + 1, step + 1))
        before = step
    assert before == 24


def test_a_spike_is_noted_and_counted(
    tmp_path: Path, corpus: Path, cache: Path, multiply: Callable[..., None]
) -> None:
    multiply(1000.0, 17)
    # the limit keeps the weights where they are
    trained = run(tmp_path, cache, corpus, *STEPS, "train.log_every=2", "train.eval_every=6144")
    assert "note    gradient norm" in trained.said
    assert "in steps 17 to 18, usual is" in trained.said
    assert trained.results["grad_norm_spikes"] == 1
    assert "status     finished, 1 gradient spike\n" in trained.said
    assert trained.results["status"] == "finished"
    norms = [float(row["grad_norm_max"]) for row in trained.rows()[1:]]
    assert norms[8] > 100 * max(norms[:8])


def test_no_spike_in_a_quiet_run(tmp_path: Path, corpus: Path, cache: Path) -> None:
    trained = run(tmp_path, cache, corpus, *STEPS, "train.log_every=1")
    assert trained.results["grad_norm_spikes"] == trained.results["skipped_steps"] == 0
    assert "gradient norm" not in trained.said
    assert "status     finished\n" in trained.said
    assert {row["skipped_steps"] for row in trained.rows()} == {""}  # it could not skip


def test_a_gradient_that_is_no_number_ends_a_run_before_its_weights_are_saved(
    tmp_path: Path, corpus: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of that step is finite, and no further one comes before the checkpoint."""
    backward, count = LanguageModel.backward, iter(range(1, 100))

    def spoiled(self: LanguageModel, loss: Tensor) -> None:
        backward(self, loss)
        if next(count) == 8:
            next(self.model.parameters()).grad.fill_(math.nan)  # type: ignore[union-attr]

    monkeypatch.setattr(LanguageModel, "backward", spoiled)
    words = ["train.log_every=100", "train.checkpoint_every=1024", "train.eval_every=6144"]
    trained = run(tmp_path, cache, corpus, *STEPS, *words)  # a checkpoint after steps 4 and 8
    assert trained.results["status"] == "diverged"
    assert "diverged: the gradient's norm is nan at step 8" in trained.said
    assert trained.checkpoint("last")["global_step"] == 4


# Steps that are left out


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_a_skipped_step_changes_nothing_and_is_counted(
    tmp_path: Path, corpus: Path, cache: Path, multiply: Callable[..., None], optim: str
) -> None:
    """One of the two passes of step 6 is NaN."""
    multiply(math.nan, 12)
    words = [f"optim={optim}", "train.steps=8", "train.skip_nonfinite=true", "train.log_every=4"]
    words += ["hardware.micro_batch_size=4", "train.keep_every=256", "train.eval_every=2048"]
    trained = run(tmp_path, cache, corpus, *words)
    assert trained.results["status"] == "finished"
    assert trained.results["skipped_steps"] == 1
    assert "status     finished, 1 skipped step\n" in trained.said
    assert [row["skipped_steps"] for row in trained.rows()] == ["", "0", "1"]
    before, after = trained.checkpoint("step_5"), trained.checkpoint("step_6")
    assert same_weights(before["state_dict"], after["state_dict"])
    assert not same_weights(after["state_dict"], trained.weights("step_7"))
    state, unchanged = (c["optimizer_states"][0]["state"] for c in (before, after))
    assert state.keys() == unchanged.keys()
    for key, own in state.items():
        for name, value in own.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(unchanged[key][name])), name
    assert all(torch.isfinite(w).all() for w in trained.weights().values())
    losses = [float(row["train_loss"]) for row in trained.rows()[1:]]
    assert all(0 < loss < 7 for loss in losses)  # a mean of the steps that were taken


def test_skipping_changes_nothing_where_all_is_finite(
    tmp_path: Path, corpus: Path, cache: Path
) -> None:
    plain = run(tmp_path / "plain", cache, corpus, *STEPS)
    asked = run(tmp_path / "asked", cache, corpus, *STEPS, "train.skip_nonfinite=true")
    assert same_weights(plain.weights(), asked.weights())
    losses = [[row["train_loss"] for row in trained.rows()] for trained in (plain, asked)]
    assert losses[0] == losses[1]


def test_where_no_step_is_finite_the_run_has_diverged(
    tmp_path: Path, corpus: Path, cache: Path, multiply: Callable[..., None]
) -> None:
    multiply(math.nan, *range(8, 100))
    words = ["train.skip_nonfinite=true", "train.log_every=4", "train.eval_every=2304"]
    trained = run(tmp_path, cache, corpus, *STEPS, *words)
    assert trained.results["status"] == "diverged"
    assert trained.results["skipped_steps"] == 11
    assert "diverged: no gradient was finite in the 10 steps until 18" in trained.said
    # lines after steps 4, 8, 9 (an evaluation), 12, 16 and 18
    losses = [row["train_loss"] for row in trained.rows()[1:]]
    assert [loss == "" for loss in losses] == [False, False, True, True, True, True]


def test_a_run_that_skipped_resumes_to_the_same_bits(
    tmp_path: Path,
    corpus: Path,
    cache: Path,
    multiply: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Interrupted between two lines of metrics, behind a skipped step and before another."""
    multiply(math.nan, 10, 14)
    words = [*STEPS, "train.skip_nonfinite=true", "train.log_every=8", "train.eval_every=4096"]
    whole = run(tmp_path / "whole", cache, corpus, *words)
    assert whole.results["skipped_steps"] == 2
    multiply(math.nan, 10)  # on top of the first, whose count goes on
    passes = iter(range(1, 100))
    step = LanguageModel.training_step

    def interrupted(self: LanguageModel, batch: Any, batch_idx: int) -> Tensor:
        if next(passes) == 12:
            signal.raise_signal(signal.SIGINT)
        return step(self, batch, batch_idx)

    monkeypatch.setattr(LanguageModel, "training_step", interrupted)
    half = Trained(tmp_path / "half", cache, tiny(corpus, *words))
    with pytest.raises(SystemExit):
        half.go()
    assert half.checkpoint("last")["global_step"] == 12
    multiply(math.nan, 2)
    half.go()
    assert same_weights(half.weights(), whole.weights())
    assert half.results["skipped_steps"] == 2
    for name in ("train_loss", "grad_norm", "grad_norm_max", "skipped_steps", "val_loss"):
        assert [r[name] for r in half.rows()] == [r[name] for r in whole.rows()], name


# Determinism


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")
@pytest.mark.parametrize("precision", ["32", "bf16-mixed"])
def test_cuda_gives_the_same_bits_twice(
    tmp_path: Path, corpus: Path, cache: Path, precision: str
) -> None:
    words = [*STEPS, "hardware.accelerator=cuda", f"train.precision={precision}"]
    one, other = (run(tmp_path / name, cache, corpus, *words) for name in ("one", "other"))
    assert same_weights(one.weights(), other.weights())
    assert one.results["final_val_loss"] == other.results["final_val_loss"]


def test_deterministic_kernels_are_asked_for(
    tmp_path: Path, corpus: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here on the CPU; the same flags make CUDA choose its kernels."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    torch.use_deterministic_algorithms(False)
    run(tmp_path, cache, corpus, "train.steps=1")
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.is_deterministic_algorithms_warn_only_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert not torch.backends.cudnn.benchmark


# Half precision


@pytest.fixture
def with_loss_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """16-mixed on the CPU, where Lightning gives bf16 instead: the scale is torch's own."""

    def trainer_with_scale(*args: Any) -> pl.Trainer:
        made = trainer.make_trainer(*args)
        made.strategy._precision_plugin = MixedPrecision("16-mixed", "cpu")
        return made

    monkeypatch.setattr(session, "make_trainer", trainer_with_scale)


@pytest.mark.usefixtures("with_loss_scale")
def test_a_loss_scale_is_logged_and_what_it_skips_is_counted(
    tmp_path: Path, corpus: Path, cache: Path, multiply: Callable[..., None]
) -> None:
    multiply(1e30, 2)
    words = ["train.precision=bf16-mixed", "train.log_every=4"]
    trained = run(tmp_path, cache, corpus, *STEPS, *words)
    assert trained.results["status"] == "finished"
    assert trained.results["skipped_steps"] == 1
    assert {row["loss_scale"] for row in trained.rows()[1:]} == {str(2.0**15)}  # half of 2^16


@pytest.mark.usefixtures("with_loss_scale")
def test_a_loss_scale_has_a_floor(
    tmp_path: Path, corpus: Path, cache: Path, multiply: Callable[..., None]
) -> None:
    """The loss of these steps is finite, their gradients never are."""
    multiply(1e30, *range(1, 100))
    trained = run(tmp_path, cache, corpus, *STEPS, "train.precision=bf16-mixed")
    assert trained.results["status"] == "diverged"
    assert trained.results["skipped_steps"] == 18  # lines are written after 10 and every third
    line = "diverged: the loss scale fell to 0.25 because gradients overflow at step 18"
    assert line in trained.said


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_a_norm_takes_large_numbers_in_half_precision(norm: str, dtype: torch.dtype) -> None:
    """Their squares are beyond what 16 bits hold."""
    layer = make_norm(ModelConfig(d_model=64, norm=norm))
    x = 2000.0 * torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    x = x.to(dtype)
    expected = layer(x.float())
    found = layer.to(dtype)(x)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("attention", ["sdpa", "manual"])
def test_attention_takes_large_scores_in_half_precision(attention: str, dtype: torch.dtype) -> None:
    """Queries and keys whose products, before they are divided, are beyond 16 bits."""
    torch.manual_seed(0)
    config = ModelConfig(d_model=256, n_heads=1, attention=attention)
    layer = Attention(config)
    nn.init.normal_(layer.qkv.weight, std=1.5)
    x = torch.randn(2, 16, 256).to(dtype)
    with torch.no_grad():
        q, k, v = layer.heads(x.float(), None)
        products = q @ k.transpose(-2, -1)
        found = layer.to(dtype)(x, None)
        expected = layer.double()(x.double(), None)
    assert products.abs().max() > torch.finfo(torch.float16).max / 4
    assert found.dtype == dtype
    assert torch.isfinite(found).all()
    # a score of some thousands is off by its last bit: most positions still look at one key
    off = (found.double() - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert off.median() < 0.05
    assert torch.isfinite(manual_attention(q, k, v, 0.0, layer.divisor)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_loss_is_computed_in_32_bits(dtype: torch.dtype) -> None:
    """Logits of 300 apart, whose exponentials 16 bits do not hold."""
    generator = torch.Generator().manual_seed(0)
    hidden = (5 * torch.randn(40, 32, generator=generator)).to(dtype).requires_grad_()
    weight = (5 * torch.randn(50, 32, generator=generator)).to(dtype).requires_grad_()
    targets = torch.randint(50, (40,), generator=generator)
    loss = mean_loss(hidden, weight, targets)
    loss.backward()
    logits = (hidden @ weight.t()).detach().double()
    expected = nn.functional.cross_entropy(logits, targets)
    assert loss.dtype == torch.float32
    assert loss.detach().item() == pytest.approx(float(expected), rel=1e-2)
    assert hidden.grad is not None
    assert torch.isfinite(hidden.grad).all()
    losses, _ = token_scores(hidden.detach(), weight.detach(), targets)
    assert float(losses.mean()) == pytest.approx(float(expected), rel=1e-2)


def test_a_run_from_before_there_was_the_option_keeps_its_hash() -> None:
    config, asked = cli.compose_config([]), cli.compose_config(["train.skip_nonfinite=true"])
    assert rundir.config_hash(config, {}) == (
        "01fb89de6567d00ac17f5dfd947d5ea486cb840754018c7aa1eaed0e5a32bb35"
    )
    assert rundir.config_hash(asked, {}) != rundir.config_hash(config, {})
