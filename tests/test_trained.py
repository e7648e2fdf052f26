"""Test loading a run in Python: ``tinygpt.load_run``."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console

import tinygpt
from tests.conftest import tiny
from tinygpt import cli
from tinygpt.config import ConfigError
from tinygpt.runs import rundir
from tinygpt.training.session import train


@pytest.fixture(scope="module")
def trained(corpus: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a run of 12 steps that keeps its checkpoints."""
    folder = tmp_path_factory.mktemp("outputs")
    more = (f"output_dir={folder}", f"cache_dir={cache}", "train.keep_every=1024", "run_name=kept")
    overrides = tiny(corpus, *more)
    train(cli.compose_config(overrides), overrides, Console(quiet=True))
    return folder / "runs" / "kept"


def test_three_lines_give_what_was_trained(trained: Path) -> None:
    run = tinygpt.load_run(trained)
    weights = torch.load(trained / "checkpoints" / "final.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(weights[f"model.{k}"], v) for k, v in run.model.state_dict().items())
    assert not run.model.training
    assert run.results is not None
    assert (run.checkpoint, run.step, run.tokens) == ("final", 12, run.results["train_tokens"])
    assert run.results["final_val_loss"] > 0
    assert run.config.model.d_model == run.model.config.d_model == 16
    assert run.config == rundir.read_config(trained / "config.yaml")
    assert run.tokenizer.decode(run.tokenizer.encode("a cat")) == "a cat"


def test_a_run_is_printed_in_five_lines(trained: Path, tmp_path: Path) -> None:
    run = tinygpt.load_run(trained)
    assert run.results is not None
    first, model, text, recipe, loss = str(run).splitlines()
    assert first == f"run     {trained}, finished; final.ckpt after 12 steps"
    assert f"{run.results['model_parameters']:,} parameters" in model
    assert f"{run.results['train_tokens']:,} tokens of custom" in text
    assert f"learning rate {run.results['learning_rate']:g}" in recipe
    assert f"{run.results['final_val_loss']:.4f} nats per token" in loss
    assert run._repr_html_().count("<tr>") == 5
    begun = shutil.copytree(trained, tmp_path / "begun")
    (begun / "results.json").unlink()
    (begun / "checkpoints" / "final.ckpt").unlink()
    unfinished = tinygpt.load_run(begun)
    assert "has not ended; last.ckpt after 12 steps" in str(unfinished)
    assert (unfinished.checkpoint, unfinished.results) == ("last", None)


def test_every_checkpoint_can_be_had(trained: Path) -> None:
    kept = {name: tinygpt.load_run(trained, name) for name in ("step_4", "step_8", "last", "best")}
    assert [kept[name].step for name in ("step_4", "step_8", "last")] == [4, 8, 12]
    early, late = (kept[name].model.token_embedding.weight for name in ("step_4", "last"))
    assert not torch.equal(early, late)


def test_what_cannot_be_loaded_is_said_in_a_line(trained: Path, tmp_path: Path) -> None:
    def said(path: Path, checkpoint: str | None = None) -> str:
        with pytest.raises(ConfigError) as caught:
            tinygpt.load_run(path, checkpoint)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    there = "there are step_4, step_8, step_12, best, last, final"
    assert said(trained, "step_5").endswith(f"step_5: not in {trained / 'checkpoints'}; {there}")
    assert said(tmp_path / "nowhere").endswith("no such folder")
    assert f"give one of them, as {trained}" in said(trained.parent.parent)
    copy = shutil.copytree(trained, tmp_path / "bare")
    shutil.rmtree(copy / "checkpoints")
    assert said(copy) == f"run={copy}: has no checkpoint"
    copy = shutil.copytree(trained, tmp_path / "torn")
    (copy / "checkpoints" / "final.ckpt").write_bytes(b"PK torn")
    assert said(copy).endswith("final.ckpt: this checkpoint is damaged")
    shutil.copy(trained / "checkpoints" / "best.ckpt", copy / "checkpoints" / "final.ckpt")
    text = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(text.replace("d_model: 16", "d_model: 32"))
    assert "does not fit" in said(copy)
    (copy / "config.yaml").write_text(text.replace("d_model: 16", "d_model: sixteen"))
    assert "not the configuration of a run" in said(copy)


def test_public_names_are_there_and_no_others() -> None:
    assert all(hasattr(tinygpt, name) and name in dir(tinygpt) for name in tinygpt.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        tinygpt.nope  # noqa: B018
