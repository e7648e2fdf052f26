"""Begin a run from another model's weights, shape and tokenizer."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.nn import functional as F

from tests.conftest import Command, tiny
from tinygpt import cli, fileio, load_run
from tinygpt.config import BpeTokenizer, ConfigError
from tinygpt.data.corpora import open_corpus, split_documents
from tinygpt.data.datamodule import TokenData
from tinygpt.data.huggingface import open_tokenizer
from tinygpt.data.shards import prepare
from tinygpt.data.tokenizers import train_tokenizer
from tinygpt.evaluating.runs import evaluate_runs
from tinygpt.export import export
from tinygpt.runs import rundir
from tinygpt.runs.pretrained import contents
from tinygpt.training.session import train


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("outputs")


@pytest.fixture(scope="module")
def base(corpus: Path, cache: Path, outputs: Path) -> Path:
    """A run with a vocabulary of its own, of another shape than the default model's."""
    more = ["tokenizer=bpe", "tokenizer.vocab_size=300", "model.bias=false", "run_name=base"]
    run(tiny(corpus, *more, "train.keep_every=1024"), outputs, cache)
    return outputs / "runs" / "base"


def run(words: list[str], outputs: Path, cache: Path) -> dict[str, Any]:
    words = [*words, f"output_dir={outputs}", f"cache_dir={cache}"]
    return train(cli.compose_config(words), words, Console(quiet=True))


def further(corpus: Path, base: Path, *more: str) -> list[str]:
    """The words of a run on the same text that takes what it can from ``base``."""
    taken = ("model.", "tokenizer")
    words = [word for word in tiny(corpus) if not word.startswith(taken)]
    return [*words, f"init_from={base}", *more]


def test_a_run_goes_on_from_where_another_ended(
    corpus: Path, cache: Path, outputs: Path, base: Path
) -> None:
    results = run(further(corpus, base, "run_name=more"), outputs, cache)
    before = fileio.read_json(base / "results.json")
    assert results["initial_val_loss"] == before["final_val_loss"]
    assert results["final_val_loss"] < before["final_val_loss"]
    assert results["tokenizer_fingerprint"] == before["tokenizer_fingerprint"]
    assert (results["tokenizer"], results["init_from"]) == ("bpe", str(base))
    made = load_run(outputs / "runs" / "more")
    assert (made.config.model.d_model, made.config.model.bias) == (16, False)


def test_a_shorter_context_takes_the_first_positions(
    corpus: Path, cache: Path, outputs: Path, base: Path
) -> None:
    words = further(corpus, base, "model.max_seq_len=16", "train.steps=1", "run_name=short")
    words.append("optim.learning_rate=1e-30")
    run(words, outputs, cache)
    short, long = load_run(outputs / "runs" / "short").model, load_run(base).model
    tokens = torch.arange(16)[None]
    assert torch.allclose(short(tokens), long(tokens), atol=1e-6)


def test_the_weights_stand_in_the_hash_and_the_path_does_not(
    corpus: Path, base: Path, tmp_path: Path
) -> None:
    def hash_of(*more: str) -> str:
        config = cli.compose_config([*further(corpus, base), *more])
        return rundir.config_hash(config, contents(open_corpus(config.data), config))

    copy = shutil.copytree(base, tmp_path / "copy")
    assert hash_of(f"init_from={copy}") == hash_of()
    assert hash_of(f"init_from={base}/checkpoints/step_4.ckpt") != hash_of()


def test_killed_and_started_again_it_is_the_same_run(
    corpus: Path, cache: Path, base: Path, tmp_path: Path
) -> None:
    words = further(corpus, base, "run_name=r", "model.dropout=0.1", "train.checkpoint_every=1024")
    whole = run(words, tmp_path / "whole", cache)
    run([*words, "train.keep_every=1024"], tmp_path / "cut", cache)
    cut = rundir.RunDir(tmp_path / "cut" / "runs" / "r")
    for name in ("results.json", "checkpoints/final.ckpt"):
        (cut.path / name).unlink()
    shutil.copy(cut.step(4), cut.last)
    again = run([*words, "train.keep_every=1024"], tmp_path / "cut", cache)
    for name in ("initial_val_loss", "final_val_loss", "test_loss"):
        assert again[name] == whole[name]


def their_tokenizer(texts: list[str]) -> Any:
    """One that is none of ours: Llama's kind, with a normaliser and bytes for the unknown."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers

    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    made.train_from_iterator(texts, trainer)
    return made


def save_theirs(folder: Path, kind: str, texts: list[str]) -> Any:
    """A Hugging Face folder with random weights; returns the model."""
    import transformers

    torch.manual_seed(1)
    if kind == "gpt2":
        tokenizer = train_tokenizer(BpeTokenizer(vocab_size=300), texts).to_hugging_face()
        config: Any = transformers.GPT2Config(
            vocab_size=300, n_positions=32, n_embd=16, n_layer=2, n_head=2
        )
        ends = "<|endoftext|>"
    else:
        tokenizer, ends = their_tokenizer(texts), "</s>"
        config = transformers.LlamaConfig(
            vocab_size=320,  # more rows than the tokenizer has tokens
            max_position_embeddings=32,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            rms_norm_eps=1e-3,
        )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=ends
    ).save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_hugging_face_model_is_gone_on_with(
    kind: str, corpus: Path, cache: Path, tmp_path: Path
) -> None:
    """Its first loss is the one that transformers computes of the same tokens; and back again."""
    import transformers

    texts = corpus.read_text().split("\n<|endoftext|>\n")
    theirs = save_theirs(tmp_path / "theirs", kind, texts)
    words = further(corpus, tmp_path / "theirs", "run_name=r", "train.sample_tokens=3")
    results = run(words, tmp_path, cache)
    made = load_run(tmp_path / "runs" / "r")
    data = TokenData(
        made.config,
        prepare(open_corpus(made.config.data), made.config.data, made.config.tokenizer, cache),
    )
    losses = []
    for inputs, targets in data.eval_batches("val", 1):
        with torch.no_grad():
            logits = theirs(inputs).logits.flatten(0, 1)
        losses.append(F.cross_entropy(logits, targets.flatten(), reduction="none"))
    scored = torch.cat(losses)[: data.splits["val"].info["tokens"]].double().mean()
    assert results["initial_val_loss"] == pytest.approx(float(scored), abs=1e-5)
    assert results["final_val_loss"] < results["initial_val_loss"]
    assert results["tokenizer"] == ("bpe" if kind == "gpt2" else "hf")
    text = "Story 3. The cat — a naïve one 🐈 — saw </s> 9 birds."
    assert made.tokenizer.decode(made.tokenizer.encode(text)).strip() == text
    assert made.tokenizer.eot_id not in made.tokenizer.encode(text)
    export(made, tmp_path / "back")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    ids = made.tokenizer.encode(text)
    with torch.no_grad():
        logits = made.model(torch.tensor([ids[:32]]))[..., : made.tokenizer.vocab_size]
        assert torch.allclose(again(torch.tensor([ids[:32]])).logits, logits, atol=1e-5)
    reader = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    assert reader(text, split_special_tokens=True)["input_ids"] == ids
    assert reader.eos_token_id == made.tokenizer.eot_id
    card = (tmp_path / "back" / "README.md").read_text()
    assert "trained further from theirs, by tinygpt" in card


def llama3(folder: Path, texts: list[str]) -> Any:
    """A Llama whose context holds the stories, scaled as Llama 3's; its tokenizer begins them."""
    import transformers
    from tokenizers import processors

    tokenizer = their_tokenizer(texts)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    rope = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        max_position_embeddings=256,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.1,
        rope_parameters=rope,
    )
    torch.manual_seed(2)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(folder)
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>"
    )
    made.save_pretrained(folder)
    settings = fileio.read_json(folder / "tokenizer_config.json")
    settings.pop("eos_token")
    fileio.write_json(folder / "tokenizer_config.json", settings)
    fileio.write_json(folder / "special_tokens_map.json", {"eos_token": {"content": "</s>"}})
    return model


def story_by_story(model: Any, tokenizer: Any, texts: list[str]) -> tuple[float, int]:
    """The sum of nats that transformers computes of each text alone, and of how many tokens."""
    nats, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([tokenizer(text, split_special_tokens=True)["input_ids"]])
        with torch.no_grad():
            nats += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    return nats, count


def test_documents_start_as_their_tokenizers_folder_does_it(
    corpus: Path, cache: Path, tmp_path: Path
) -> None:
    """In evaluation, training, sampling and export; the loss is that of transformers."""
    import transformers

    stories = corpus.read_text().split("\n<|endoftext|>\n")
    theirs = llama3(tmp_path / "theirs", stories)
    reader = transformers.AutoTokenizer.from_pretrained(tmp_path / "theirs")
    words = further(corpus, tmp_path / "theirs", "train.batch_tokens=256", "run_name=r")
    words += ["train.steps=1", "optim.learning_rate=1e-30", "train.sample_tokens=3"]
    results = run(words, tmp_path, cache)
    said = (tmp_path / "runs" / "r" / "run.log").read_text()
    assert "documents start with <s>, as the tokenizer's folder does it" in said
    assert results["document_start"] == "<s>"

    made = load_run(tmp_path / "runs" / "r")
    data = TokenData(
        made.config,
        prepare(open_corpus(made.config.data), made.config.data, made.config.tokenizer, cache),
    )
    documents = list(split_documents(open_corpus(made.config.data), made.config.data))
    texts = [document.text for split, document in documents if split == "val"]
    nats, count = story_by_story(theirs, reader, texts)
    assert results["initial_val_loss"] == pytest.approx(nats / count, rel=1e-5)
    bits = nats / math.log(2) / sum(len(text.encode()) for text in texts)
    assert results["final_val_bits_per_byte"] == pytest.approx(bits, rel=1e-5)

    start, end = (reader.convert_tokens_to_ids(token) for token in ("<s>", "</s>"))
    train = data.splits["train"]
    first = made.tokenizer.encode(next(d.text for split, d in documents if split == "train"))
    assert train.shards[0][: len(first) + 3].tolist() == [start, *first, end, start]
    assert made.encode_prompt("") == [start]
    assert made.encode_prompt("The cat") == reader("The cat")["input_ids"]

    scored = evaluate_runs(tmp_path / "runs" / "r", data=corpus, samples=2)
    nats, count = story_by_story(theirs, reader, stories)
    assert scored["loss"][0] == pytest.approx(nats / count, rel=1e-5)
    assert scored["scored_tokens"][0] == count
    assert scored["document_start"][0] == "<s>"
    short = evaluate_runs(tmp_path / "runs" / "r", data=corpus, stride=16)
    assert short["scored_tokens"][0] == count

    export(made, tmp_path / "back")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    text = "The cat — a naïve one 🐈 — saw 9 birds."
    assert again(text)["input_ids"] == made.encode_prompt(text) == reader(text)["input_ids"]
    assert (again.bos_token, again.eos_token) == ("<s>", "</s>")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    assert model.config.rope_parameters == theirs.config.rope_parameters
    ids = torch.tensor([made.encode_prompt(" ".join(stories[:3]))[:256]])
    with torch.no_grad():
        expected = theirs(ids).logits
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(made.model(ids), expected, rtol=1e-5, atol=1e-5)
    back = open_tokenizer("x", str(tmp_path / "back"))
    assert back.fingerprint() == made.tokenizer.fingerprint()
    assert model.generation_config.bos_token_id == start
    card = (tmp_path / "back" / "README.md").read_text()
    assert 'tokenizer("Once upon' in card
    assert "documents start with <s>, as the tokenizer's folder does it" in card


def test_what_no_gpt_of_ours_can_be_is_refused(corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    save_theirs(folder, "gpt2", ["a b c d"])

    def said(**changed: Any) -> str:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changed))
        with pytest.raises(ConfigError) as caught:
            cli.compose_config(further(corpus, folder))
        (folder / "config.json").write_text(json.dumps(config))
        return str(caught.value).replace(str(folder), "FOLDER")

    assert said(model_type="mamba") == "init_from=FOLDER: model_type=mamba: must be gpt2 or llama"
    assert said(vocab_size=10) == (
        "init_from=FOLDER: its tokenizer has 261 tokens, but its model only 10 rows for them"
    )
    (folder / "tokenizer.json").unlink()
    assert "FOLDER/tokenizer.json: " in said()


def test_another_shape_or_tokenizer_is_explained(corpus: Path, base: Path, tmp_path: Path) -> None:
    def said(*more: str) -> str:
        with pytest.raises(ConfigError) as caught:
            cli.compose_config([*further(corpus, base), *more])
        return str(caught.value).replace(str(base), "BASE")

    shape = "and brings its own shape; leave"
    assert said("model.d_model=32") == (
        f"model.d_model=32: init_from=BASE has 16 {shape} model.d_model= out"
    )
    assert said("model=medium") == f"model.n_layers=6: init_from=BASE has 1 {shape} model= out"
    assert said("model.max_seq_len=64") == (
        "model.max_seq_len=64: init_from=BASE has only 32 learned positions; "
        "leave model.max_seq_len= out"
    )
    assert said("tokenizer=byte") == (
        "tokenizer=byte: init_from=BASE brings its own vocabulary, of 300 tokens (bpe); "
        "leave tokenizer= out"
    )
    other = tmp_path / "tokenizer.json"
    other.write_text(json.dumps({"kind": "byte"}))
    assert "not the tokenizer that init_from=BASE was trained with" in said(
        "tokenizer=saved", f"tokenizer.path={other}"
    )
    lone = shutil.copy(base / "checkpoints" / "last.ckpt", tmp_path)
    for name, why in {
        "nowhere/at/all": "no such folder",
        "no-such-model": "no model of that name was fetched before",
        str(base.parent): "neither the folder of a run nor of a Hugging Face model",
        str(base / "config.yaml"): "not a folder",
        str(lone): "is not in a run folder",
    }.items():
        assert why in said(f"init_from={name}")


def test_a_saved_tokenizer_serves_a_new_run(
    corpus: Path, cache: Path, tmp_path: Path, base: Path, tinygpt: Command
) -> None:
    trained = tinygpt("tokenizer", "train", f"path={corpus}", "vocab_size=280", "out=own.json")
    assert trained.returncode == 0, trained.stderr
    words = [*tiny(corpus), "tokenizer=saved", f"tokenizer.path={tmp_path / 'own.json'}"]
    results = run(words, tmp_path, cache)
    assert (results["vocab_size"], results["tokenizer"]) == (280, "bpe")


def test_a_damaged_checkpoint_is_said_before_training(
    corpus: Path, base: Path, tmp_path: Path, tinygpt: Command
) -> None:
    copy = shutil.copytree(base, tmp_path / "torn")
    (copy / "checkpoints" / "final.ckpt").write_bytes(b"PK")
    done = tinygpt("run", *further(corpus, copy))
    assert (done.returncode, done.stdout) == (2, "loading …\n")
    assert done.stderr == f"error: {copy}/checkpoints/final.ckpt: this checkpoint is damaged\n"
    assert not list((tmp_path / "outputs").glob("**/config.yaml"))
