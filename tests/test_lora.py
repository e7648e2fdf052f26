"""LoRA: adapters alone are trained, and a run so trained is used like any other."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from tests.conftest import Command, tiny
from tinygpt import cli, load_run
from tinygpt.config import ConfigError, LoraConfig, ModelConfig
from tinygpt.config.counting import lora_parameters
from tinygpt.model.gpt import GPT
from tinygpt.model.lora import add_lora, merged
from tinygpt.training.session import train


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("outputs")


@pytest.fixture(scope="module")
def base(corpus: Path, cache: Path, outputs: Path) -> Path:
    run(tiny(corpus, "run_name=base"), outputs, cache)
    return outputs / "runs" / "base"


def run(words: list[str], outputs: Path, cache: Path) -> dict[str, Any]:
    words = [*words, f"output_dir={outputs}", f"cache_dir={cache}"]
    return train(cli.compose_config(words), words, Console(quiet=True))


def adapted(corpus: Path, base: Path, *more: str) -> list[str]:
    words = [word for word in tiny(corpus) if not word.startswith(("model.", "tokenizer"))]
    return [*words, f"init_from={base}", "optim.lora.rank=4", *more]


SHAPES = {
    "gpt2": ModelConfig(d_model=16, n_heads=2),
    "llama": ModelConfig(
        d_model=16,
        n_heads=4,
        n_kv_heads=2,
        bias=False,
        position="rope",
        norm="rmsnorm",
        activation="swiglu",
        tie_weights=False,
    ),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_an_adapter_begins_as_nothing_and_merges_into_its_matrix(shape: str) -> None:
    torch.manual_seed(0)
    model = GPT(SHAPES[shape], 50).eval()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    tokens = torch.randint(50, (2, 32))
    plain = model(tokens)
    config = LoraConfig(rank=3, alpha=5)
    add_lora(model, config)
    assert torch.equal(model(tokens), plain)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trained.values()) == lora_parameters(SHAPES[shape], 3)
    assert not any("embedding" in name or "head" in name for name in trained)
    for parameter in trained.values():
        torch.nn.init.normal_(parameter, std=0.1)
    alone = GPT(SHAPES[shape], 50).eval()
    alone.load_state_dict(merged(model.state_dict(), config))
    assert not torch.allclose(model(tokens), plain, atol=1e-2)
    assert torch.allclose(alone(tokens), model(tokens), atol=1e-5)
    # by hand, for one matrix
    name = "blocks.1.mlp.up"
    a, b = (trained[f"{name}.lora_{x}.default.weight"] for x in "AB")
    by_hand = before[f"{name}.weight"] + 5 / 3 * b @ a
    assert torch.allclose(alone.state_dict()[f"{name}.weight"], by_hand, atol=1e-6)


def test_a_run_trains_its_adapters_alone(
    corpus: Path, cache: Path, outputs: Path, base: Path
) -> None:
    results = run(adapted(corpus, base, "run_name=lora"), outputs, cache)
    assert results["final_val_loss"] < results["initial_val_loss"]
    config = cli.compose_config(adapted(corpus, base)).model
    assert (
        results["trainable_parameters"]
        == lora_parameters(config, 4)
        == 4 * ((16 + 48) + (16 + 16) + (16 + 64) + (64 + 16))
    )
    old, new = load_run(base).model.state_dict(), load_run(outputs / "runs" / "lora").model
    changed = {name for name, w in new.state_dict().items() if not torch.equal(w, old[name])}
    targets = ("attention.qkv", "attention.proj", "mlp.up", "mlp.down")
    assert changed == {f"blocks.0.{name}.weight" for name in targets}
    # and what was trained is what is loaded: as good on the same text
    again = run(
        [*(w for w in adapted(corpus, outputs / "runs" / "lora") if "lora.rank" not in w)],
        outputs,
        cache,
    )
    assert again["initial_val_loss"] == pytest.approx(results["final_val_loss"], abs=1e-6)


def test_it_goes_on_where_it_was(corpus: Path, cache: Path, base: Path, tmp_path: Path) -> None:
    words = adapted(corpus, base, "run_name=r", "train.keep_every=1024")
    whole = run(words, tmp_path / "whole", cache)
    run(words, tmp_path / "cut", cache)
    folder = tmp_path / "cut" / "runs" / "r"
    for name in ("results.json", "checkpoints/final.ckpt"):
        (folder / name).unlink()
    (folder / "checkpoints" / "step_4.ckpt").replace(folder / "checkpoints" / "last.ckpt")
    again = run(words, tmp_path / "cut", cache)
    for name in ("initial_val_loss", "final_val_loss", "test_loss"):
        assert again[name] == whole[name]


def test_what_cannot_be_is_said(
    corpus: Path, base: Path, monkeypatch: pytest.MonkeyPatch, tinygpt: Command
) -> None:
    def said(words: list[str]) -> str:
        with pytest.raises(ConfigError) as caught:
            cli.compose_config(words)
        return str(caught.value)

    rank = "optim.lora.rank=4"
    assert said(tiny(corpus, rank)) == f"{rank}: needs init_from, whose weights it keeps"
    words = adapted(corpus, base)
    assert said([*words, "optim.lora.rank=17"]).endswith("17: must be at most model.d_model=16")
    assert said([*words, "optim.lora.rank=0"]) == "optim.lora.rank=0: must be at least 1"
    assert said([*words, "optim=muon"]).startswith(f"{rank}: not with optim=muon")
    assert said([*words[:-1], "optim.lora.alpha=2"]).endswith("alpha=2: needs optim.lora.rank")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"needs `pip install -e '\.\[lora\]'`"):
        train(cli.compose_config(words), words, Console(quiet=True))
