"""Our tokenizers as Hugging Face's: the same ids and texts, and the way back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as HuggingFaceTokenizer
from tokenizers import models, pre_tokenizers, processors

from tests.conftest import REAL_DATA
from tinygpt.config import (
    BpeTokenizer,
    ByteTokenizer,
    CharTokenizer,
    ConfigError,
    Gpt2Tokenizer,
    TokenizerConfig,
)
from tinygpt.data.huggingface import read_tokenizer, tokenizer_config, tokenizer_from_hugging_face
from tinygpt.data.tokenizers import (
    BOS,
    EOT,
    UNKNOWN,
    Bpe,
    Gpt2,
    Tokenizer,
    load_tokenizer,
    train_tokenizer,
)
from tinygpt.fileio import digest

GPT2 = REAL_DATA / "gpt2-bpe"
KINDS: dict[str, TokenizerConfig] = {
    "char": CharTokenizer(),
    "byte": ByteTokenizer(),
    "bpe": BpeTokenizer(vocab_size=400),
    "gpt2": Gpt2Tokenizer(vocab_dir=str(GPT2)),
}
LEARNED = ["Once upon a time they're\r\n\t naïve — 日本 😀 <|endoftext|> it's 12345  the the"] * 9
special = st.sampled_from(
    [EOT, BOS, UNKNOWN, "<|endof", "\r\n", "\t", " ", "'s", "😀", "日本", "ë"]
)
texts = st.text(max_size=60) | st.lists(special | st.text("ab 't\n日", max_size=9)).map("".join)


@pytest.fixture(scope="module", params=KINDS)
def ours(request: pytest.FixtureRequest) -> Tokenizer:
    if request.param == "gpt2" and not GPT2.is_dir():
        pytest.skip("no GPT-2 vocabulary beside the project")
    return train_tokenizer(KINDS[request.param], LEARNED)


@pytest.fixture(scope="module")
def theirs(ours: Tokenizer) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer.from_str(ours.to_hugging_face().to_str())


@pytest.fixture
def exported(ours: Tokenizer, tmp_path: Path) -> Path:
    (tmp_path / "tokenizer.json").write_text(ours.to_hugging_face().to_str())
    settings_ = json.dumps(tokenizer_config(ours, max_seq_len=64))
    (tmp_path / "tokenizer_config.json").write_text(settings_)
    return tmp_path


@settings(max_examples=200)
@given(text=texts)
def test_any_text_has_the_same_ids(
    ours: Tokenizer, theirs: HuggingFaceTokenizer, text: str
) -> None:
    theirs.encode_special_tokens = True
    ids = ours.encode(text)
    assert theirs.encode(text).ids == ids
    assert theirs.decode(ids, skip_special_tokens=False) == ours.decode(ids)


def test_a_literal_special_token(ours: Tokenizer, exported: Path) -> None:
    """The one difference, as the model card says it; the rest of transformers' tokenizer."""
    transformers = pytest.importorskip("transformers")
    (exported / "config.json").write_text('{"model_type": "gpt2"}')
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    text = f"Once{EOT} upon"
    assert ours.eot_id not in ours.encode(text)
    assert tokenizer(text, split_special_tokens=True)["input_ids"] == ours.encode(text)
    read = tokenizer(text)
    expected = [*ours.encode("Once"), ours.eot_id, *ours.encode(" upon")]
    assert dict(read) == {"input_ids": expected, "attention_mask": [1] * len(expected)}
    assert tokenizer.decode(expected) == text
    assert tokenizer.decode(expected, skip_special_tokens=True) == "Once upon"
    assert tokenizer.decode(ours.encode("a , b .")) == ours.decode(ours.encode("a , b ."))
    assert len(tokenizer) == ours.vocab_size
    assert tokenizer.model_max_length == 64
    ids = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    assert ids == (ours.eot_id,) * 3
    assert tokenizer.unk_token_id == ours.unknown_id
    tokenizer.save_pretrained(exported / "again")
    again = tokenizer_from_hugging_face(exported / "again")
    assert again is not None
    assert again.fingerprint() == ours.fingerprint()


def test_there_and_back(ours: Tokenizer, exported: Path) -> None:
    back = tokenizer_from_hugging_face(exported)
    assert type(back) is type(ours)
    assert back is not None
    assert back.fingerprint() == ours.fingerprint()


@pytest.mark.skipif(not GPT2.is_dir(), reason="GPT-2's vocabulary is not here")
def test_the_hubs_gpt2_is_ours(tmp_path: Path) -> None:
    """Its tokenizer.json, made by transformers, and the two files that came before it."""
    transformers = pytest.importorskip("transformers")
    expected = train_tokenizer(KINDS["gpt2"], ()).fingerprint()
    vocab = json.loads((GPT2 / "encoder.json").read_text(encoding="utf-8"))
    lines = (GPT2 / "vocab.bpe").read_text(encoding="utf-8").split("\n")[1:]
    merges = [tuple(line.split()) for line in lines if line]
    transformers.GPT2TokenizerFast(vocab=vocab, merges=merges).save_pretrained(tmp_path)
    found = tokenizer_from_hugging_face(tmp_path)
    assert isinstance(found, Gpt2)
    assert found.fingerprint() == expected
    (tmp_path / "tokenizer.json").unlink()
    shutil.copy(GPT2 / "encoder.json", tmp_path / "vocab.json")
    shutil.copy(GPT2 / "vocab.bpe", tmp_path / "merges.txt")
    found = tokenizer_from_hugging_face(tmp_path)
    assert found is not None
    assert found.fingerprint() == expected


def changed(name: str) -> HuggingFaceTokenizer:
    """One of ours but for something that decides ids."""
    bpe = train_tokenizer(KINDS["bpe"], LEARNED)
    assert isinstance(bpe, Bpe)
    made = bpe.to_hugging_face()
    if name == "pieces":
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    elif name == "space":
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    elif name == "template":
        made.post_processor = processors.TemplateProcessing(f"{BOS} $A", None, [(BOS, 0)])
    elif name == "vocabulary":
        content = json.loads(made.to_str())
        vocab = content["model"]["vocab"]
        vocab["!"], vocab["#"] = vocab["#"], vocab["!"]
        made = HuggingFaceTokenizer.from_str(json.dumps(content))
    elif name == "contradiction":  # 'abc' can never be reached: 'ab' comes first
        made = Bpe([("a", "b"), ("b", "c"), ("a", "bc")]).to_hugging_face()
    else:
        made = HuggingFaceTokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    return made


@pytest.mark.parametrize(
    "name", ["pieces", "space", "template", "vocabulary", "contradiction", "words"]
)
def test_one_that_is_none_of_ours(name: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(changed(name).to_str())
    assert tokenizer_from_hugging_face(tmp_path) is None


def test_what_cannot_be_read_is_said_in_a_line(tmp_path: Path) -> None:
    def said() -> str:
        with pytest.raises(ConfigError) as caught:
            tokenizer_from_hugging_face(tmp_path)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert said().endswith("tokenizer.json: not a tokenizer of Hugging Face's (there is none)")
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    assert "merges.txt" in said()
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    assert "its vocab.json and merges.txt are not GPT-2's" in said()
    (tmp_path / "tokenizer.json").write_text("{}")
    assert "tokenizer.json: not a tokenizer of Hugging Face's" in said()


# --- what begins and ends a document -------------------------------------------------------


def a_folder(folder: Path, template: str | None, eos: str | None = "</s>", **settings: Any) -> Path:
    """Words and three special tokens; ``template`` is what tokenizer.json makes of a text."""
    made = HuggingFaceTokenizer(
        models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4}, unk_token="<unk>")
    )
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    if template is not None:
        special = [(token, made.token_to_id(token)) for token in ("<s>", "</s>")]
        made.post_processor = processors.TemplateProcessing(template, None, special)
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(made.to_str())
    ends = {"eos_token": eos} if eos else {}
    (folder / "tokenizer_config.json").write_text(json.dumps({**ends, **settings}))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


@pytest.mark.parametrize(
    ("template", "settings", "start", "unscored", "separator"),
    [
        (None, {}, None, [], [2]),
        ("$A </s>", {}, None, [], [2]),
        ("</s> $A", {}, None, [], [2]),  # where the end of another stands anyway
        ("<s> $A", {}, "<s>", [2, 1], [2, 1]),
        ("<s> $A </s>", {}, "<s>", [1], [2, 1]),  # which the folder itself counts as text
        (None, {"add_bos_token": True, "bos_token": "<s>"}, "<s>", [2, 1], [2, 1]),
        ("$A </s>", {"add_bos_token": True, "bos_token": "<s>"}, "<s>", [1], [2, 1]),
        (None, {"add_bos_token": True}, None, [], [2]),  # and no such token
        (None, {"add_bos_token": False, "bos_token": "<s>"}, None, [], [2]),
    ],
)
def test_what_a_folder_puts_before_a_text_begins_documents(
    tmp_path: Path,
    template: str | None,
    settings: dict[str, Any],
    start: str | None,
    unscored: list[int],
    separator: list[int],
) -> None:
    tokenizer = read_tokenizer(a_folder(tmp_path / "theirs", template, **settings))
    assert (tokenizer.start_text, list(tokenizer.unscored)) == (start, unscored)
    assert (tokenizer.separator, tokenizer.start_id) == (separator, 1 if start else 2)
    said = f"documents start with {start}, as the tokenizer's folder does it"
    assert tokenizer.convention == (said if start else None)
    assert tokenizer.encode("a b") == [3, 4]
    tokenizer.save(tmp_path / "saved.json")  # as a run keeps it
    saved = load_tokenizer(tmp_path / "saved.json")
    assert saved.fingerprint() == tokenizer.fingerprint()
    assert saved.separator == separator
    if start:  # the export says so to transformers
        transformers = pytest.importorskip("transformers")
        back = tmp_path / "back"
        back.mkdir()
        (back / "tokenizer.json").write_text(tokenizer.to_hugging_face().to_str())
        (back / "tokenizer_config.json").write_text(json.dumps(tokenizer_config(tokenizer, 64)))
        (back / "config.json").write_text('{"model_type": "llama"}')
        ids = transformers.AutoTokenizer.from_pretrained(back)("a b")["input_ids"]
        assert ids == [1, 3, 4] + [2] * (unscored == [1])
        assert read_tokenizer(back).fingerprint() == tokenizer.fingerprint()


def test_a_tokenizer_saved_before_there_was_a_convention_is_read_as_it_was(tmp_path: Path) -> None:
    folder = a_folder(tmp_path, "<s> $A")
    content = json.loads((folder / "tokenizer.json").read_text())
    old = {"kind": "hf", "eot": "</s>", "bos": "</s>", "tokenizer": content}
    (tmp_path / "old.json").write_text(json.dumps(old))
    tokenizer = load_tokenizer(tmp_path / "old.json")
    assert (tokenizer.convention, tokenizer.separator) == (None, [2])
    assert tokenizer.fingerprint() == digest(old)


def test_more_than_one_token_before_a_text_is_refused(tmp_path: Path) -> None:
    a_folder(tmp_path, "<s> </s> $A")
    with pytest.raises(ConfigError, match=r"puts <s> </s> before a text"):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("special_tokens_map.json", {"eos_token": "b"}),
        ("special_tokens_map.json", {"eos_token": {"content": "b", "lstrip": False}}),
        ("tokenizer_config.json", {"eos_token": {"content": "b"}}),
        ("generation_config.json", {"eos_token_id": 4}),
        ("generation_config.json", {"eos_token_id": [4, 3]}),
        ("config.json", {"model_type": "llama", "eos_token_id": 4}),
    ],
)
def test_what_ends_a_document_stands_in_one_of_several_files(
    tmp_path: Path, name: str, content: dict[str, object]
) -> None:
    a_folder(tmp_path, None, eos=None)
    with pytest.raises(ConfigError, match=r"no eos_token, which ends a document, in tokenizer_con"):
        read_tokenizer(tmp_path)
    (tmp_path / name).write_text(json.dumps(content))
    assert read_tokenizer(tmp_path).eot_id == 4
