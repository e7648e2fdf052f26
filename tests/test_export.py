"""Test the export of a run: what transformers loads, what the card says, what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console
from torch.nn import functional as F

from tests.conftest import REAL_DATA, Command, tiny
from tinygpt import cli, load_run
from tinygpt.config import ConfigError, HubData
from tinygpt.data.huggingface import tokenizer_from_hugging_face
from tinygpt.data.tokenizers import train_tokenizer
from tinygpt.export import FILES, check_target, export
from tinygpt.model.generate import generate
from tinygpt.model.gpt import GPT
from tinygpt.runs.load import TrainedRun
from tinygpt.training.session import train

GPT2 = REAL_DATA / "gpt2-bpe"
LLAMA = ["model.position=rope", "model.norm=rmsnorm", "model.activation=swiglu", "model.bias=false"]
TOKENIZERS = {
    "char": ["tokenizer=char"],
    "bpe": ["tokenizer=bpe", "tokenizer.vocab_size=300"],
    "gpt2": ["tokenizer=gpt2", f"tokenizer.vocab_dir={GPT2}"],
}


def make_run(folder: Path, corpus: Path, *words: str) -> TrainedRun:
    """Return an untrained run with weights so large that every part matters."""
    config = cli.compose_config(tiny(corpus, "model.max_seq_len=64", *words))
    tokenizer = train_tokenizer(config.tokenizer, [corpus.read_text()])
    torch.manual_seed(1)
    model = GPT(config.model, tokenizer.vocab_size).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    folder.mkdir()
    (folder / "environment.json").write_text('{"config_hash": "abc"}')
    (folder / "metrics.csv").write_text("step\n")
    return TrainedRun(folder, "last", 7, config, tokenizer, model, None)


@pytest.mark.parametrize("shape", [[], LLAMA], ids=["gpt2", "llama"])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_transformers_loads_it(kind: str, shape: list[str], corpus: Path, tmp_path: Path) -> None:
    """Its Auto classes, without code of ours, give the same ids, logits and 40 tokens."""
    transformers = pytest.importorskip("transformers")
    if kind == "gpt2" and not GPT2.is_dir():
        pytest.skip("no GPT-2 vocabulary beside the project")
    run = make_run(tmp_path / "run", corpus, *TOKENIZERS[kind], *shape)
    export(run, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer("The cat went to the barn.")["input_ids"]
    assert ids == run.tokenizer.encode("The cat went to the barn.")
    prompt = torch.tensor([[run.tokenizer.eot_id, *ids[:5]]])
    greedy = generate(run.model, prompt, 40, temperature=0, use_cache=False)
    assert run.tokenizer.eot_id not in greedy[0, 1:]  # where transformers would stop
    for kernel in ("sdpa", "eager"):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "out", attn_implementation=kernel
        )
        with torch.no_grad():
            assert (model(greedy).logits - run.model(greedy)).abs().max() <= 1e-5
        mask = torch.ones_like(prompt)
        written = model.generate(prompt, attention_mask=mask, max_new_tokens=40)
        assert torch.equal(written, greedy)
        assert model.generation_config.eos_token_id == run.tokenizer.eot_id
    back = tokenizer_from_hugging_face(tmp_path / "out")
    assert back is not None
    assert back.fingerprint() == run.tokenizer.fingerprint()


# --- a run that was trained


@pytest.fixture(scope="module")
def trained(corpus: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("outputs")
    more = [f"output_dir={folder}", f"cache_dir={cache}", "run_name=kept", "train.keep_every=1024"]
    words = tiny(corpus, "model.bias=false", "optim.learning_rate=1e-2", *more)
    words += ["train.steps=40", "train.eval_every=2560"]
    train(cli.compose_config(words), words, Console(quiet=True))
    return folder / "runs" / "kept"


def validation_ids(run: TrainedRun, cache: Path) -> list[int]:
    """Read the validation tokens from the cache without the code under test."""
    assert run.results is not None
    for path in (cache / "data").glob("*/index.json"):
        index = json.loads(path.read_text())
        split = index["splits"].get("val")  # a text that was scored whole has none
        if split and split["fingerprint"] == run.results["validation_fingerprint"]:
            file = path.parent / split["files"][0]["file"]
            return [int(i) for i in np.fromfile(file, dtype=index["dtype"])]
    raise AssertionError("not in the cache")


def test_the_command_and_the_loss_by_transformers(
    trained: Path, cache: Path, tinygpt: Command, tmp_path: Path
) -> None:
    """The validation text, read and scored by transformers, has the loss that the run reports."""
    transformers = pytest.importorskip("transformers")
    done = tinygpt("export", f"run={trained}", "to=out")
    assert (done.returncode, done.stderr) == (0, "")
    assert "final (step 40): GPT-2, " in done.stdout
    run = load_run(trained)
    assert run.results is not None
    expected = validation_ids(run, cache)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer(run.tokenizer.decode(expected))["input_ids"]
    assert ids == expected
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    losses, length = [], run.config.model.max_seq_len
    for start in range(0, len(ids) - 1, length):
        window = torch.tensor(ids[start : start + length + 1])
        with torch.no_grad():
            logits = model(window[None, :-1]).logits[0]
        losses += F.cross_entropy(logits, window[1:], reduction="none").tolist()
    assert run.results["final_val_loss"] < 5.3  # it learned: the loss before is ln 258 = 5.55
    loss = math.fsum(losses) / len(losses)
    assert loss == pytest.approx(run.results["final_val_loss"], rel=1e-4)
    window = torch.tensor([ids[:length]])
    with torch.no_grad():
        by_ours, by_theirs = run.model(window[:, :-1], window[:, 1:]), model(window, labels=window)
    assert by_ours.item() == pytest.approx(by_theirs.loss.item(), rel=1e-5)
    loading = "\n".join(line.strip() for line in done.stdout.splitlines()[-5:])
    assert "\n" + loading + "\n" in (tmp_path / "out" / "README.md").read_text()


def card_of(folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the head and the table of the model card."""
    _, head, text = (folder / "README.md").read_text().split("---\n", 2)
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if " | " in line]
    return yaml.safe_load(head), {line[0]: line[1] for line in lines if len(line) == 2}


def test_the_card_says_what_it_is(trained: Path, tmp_path: Path) -> None:
    run = load_run(trained)
    results = run.results
    assert results is not None
    export(run, tmp_path / "out")
    head, table = card_of(tmp_path / "out")
    assert head["library_name"] == "transformers"
    assert table["validation loss"] == (
        f"{results['final_val_loss']:.4f} nats per token, "
        f"{results['final_val_bits_per_byte']:.4f} bits per byte"
    )
    assert table["test loss"].startswith(f"{results['test_loss']:.4f} nats")
    assert table["budget"] == (
        f"{results['train_tokens']:,} training tokens, {results['flops_exact']:.3g} FLOPs"
    )
    assert table["parameters"].startswith(f"{results['model_parameters']:,}, of them ")
    assert table["data"] == "custom: stories.txt"
    assert table["licence of the data"] == "unknown"
    assert table["configuration's hash"] == results["config_hash"]
    assert str(trained.parent) not in (tmp_path / "out" / "README.md").read_text()
    for name, measured in (("step_20", True), ("step_8", False)):
        export(load_run(trained, name), tmp_path / name)
        table = card_of(tmp_path / name)[1]
        assert table["budget"].startswith(f"{int(name[5:]) * 256:,} training tokens")
        assert ("nats" in table["validation loss"]) == measured
        assert "test loss" not in table


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["model.bias=false"], ", with biases that are all zero"),
        (["model.pad_vocab_to_multiple=64"], ", without 62 rows that pad the vocabulary, which"),
        (LLAMA, None),
    ],
)
def test_the_card_says_what_transformers_counts(
    words: list[str], why: str | None, corpus: Path, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    run = make_run(tmp_path / "run", corpus, *words)
    export(run, tmp_path / "out")
    own = sum(parameter.numel() for parameter in run.model.parameters())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").num_parameters()
    text = card_of(tmp_path / "out")[1]["parameters"]
    assert text.startswith(f"{own:,}, of them ")
    assert (f"; transformers counts {theirs:,}{why}" in text) == (why is not None)
    assert (own != theirs) == (why is not None)


@pytest.mark.parametrize(
    ("words", "licence", "data"),
    [
        (["data=tinystories"], "CDLA-Sharing-1.0", "[roneneldan/TinyStories]("),
        (["data=wikipedia"], "unknown", "[lucadiliello/english_wikipedia]("),
        (["data=synthetic", "data.fraction=0.5"], "MIT, as tinygpt", "corpus, 0.5 of it"),
    ],
)
def test_the_card_says_whose_the_data_are(
    words: list[str], licence: str, data: str, corpus: Path, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", corpus)
    run.config.data = cli.compose_config(words).data
    export(run, tmp_path / "out")
    head, table = card_of(tmp_path / "out")
    assert table["licence of the data"] == licence
    assert data in table["data"]
    hub = run.config.data.repo if isinstance(run.config.data, HubData) else None
    assert head.get("datasets") == (hub and [hub])


def export_card(run: TrainedRun, to: Path) -> str:
    export(run, to)
    return (to / "README.md").read_text()


def test_the_card_tells_no_place_on_somebodys_machine(corpus: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", corpus)
    run.config.data = cli.compose_config(["data=custom", "data.path=/home/me/gone.txt"]).data
    run.config.init_from = "/home/me/gone"
    card = export_card(run, tmp_path / "out")
    assert "/home/me" not in card
    assert "further from gone," in card
    run.config.init_from = "/home/me/outputs/runs/tales/checkpoints/step_9.ckpt"
    assert "further from tales (step_9)," in export_card(run, tmp_path / "step")
    run.config.init_from = "openai-community/gpt2"
    assert "further from openai-community/gpt2," in export_card(run, tmp_path / "hub")


# --- what is there already, and what is refused


def said(act: Callable[..., Any], *arguments: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        act(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_only_an_export_is_replaced(trained: Path, tinygpt: Command, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    export(load_run(trained), tmp_path / "out")
    card = tmp_path / "out" / "README.md"
    card.write_text("old")
    words = f"run={trained}", "to=out", "checkpoint=step_8"
    again = tinygpt("export", *words)
    line = "error: to=out: there is a model already; force=true replaces it\n"
    assert (again.returncode, again.stderr, card.read_text()) == (2, line, "old")
    assert tinygpt("export", *words, "force=true").returncode == 0
    assert "step_8" in card.read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


@pytest.mark.parametrize("force", [False, True])
def test_what_is_no_export_is_never_replaced(
    force: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    line = "to=mine: has thesis.txt, which no export writes; give another folder"
    assert said(check_target, "mine", force) == line
    assert said(check_target, "file", force) == "to=file: a file; give a folder"
    assert said(check_target, "file/x", force) == "to=file: file is a file; give a folder"
    monkeypatch.chdir(tmp_path / "mine")
    for here in (".", "../mine"):
        assert said(check_target, here, force).endswith(
            "the working directory; give a folder in it"
        )
    check_target("new/folder", force)


def test_a_torn_export_leaves_the_old_one(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run", corpus)
    export(run, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def full(*_: Any) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tinygpt.export.model_card", full)
    with pytest.raises(OSError, match="No space left"):
        export(run, tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"run", "out"}
