"""Our tokenizers as Hugging Face's, with the same ids and texts, and theirs as ours.

One difference no file can take away: in theirs a special token's literal text, as
``<|endoftext|>``, becomes the special id, unless it is asked with ``split_special_tokens=True``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as HuggingFaceTokenizer

from tinygpt.config import ConfigError
from tinygpt.data.tokenizers import (
    BOS,
    BYTE_OF,
    EOT,
    UNKNOWN,
    Bpe,
    Bytes,
    Char,
    Gpt2,
    Tokenizer,
    byte_level,
    checked_alphabet,
    made_of_themselves,
    merged_tokens,
    read_gpt2,
)


def to_hugging_face(tokenizer: Tokenizer) -> HuggingFaceTokenizer:
    """The same tokenizer as a `tokenizers` object; its ``save`` writes tokenizer.json."""
    if isinstance(tokenizer, Bpe):
        return tokenizer.hugging_face()
    if isinstance(tokenizer, Char):  # a BPE that merges nothing: a character each
        vocab = _numbered(tokenizer.symbols)
        made = HuggingFaceTokenizer(models.BPE(vocab=vocab, merges=[], unk_token=UNKNOWN))
        made.decoder = decoders.Fuse()
        return _with_special(made, UNKNOWN, BOS, EOT)
    if isinstance(tokenizer, Bytes):
        vocab = {**BYTE_OF, BOS: tokenizer.bos_id, EOT: tokenizer.eot_id}
        made = byte_level(models.BPE(vocab=vocab, merges=[]))
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return _with_special(made, BOS, EOT)
    assert isinstance(tokenizer, Gpt2)
    vocab = _numbered([*merged_tokens(tokenizer.merges), EOT])
    return _with_special(byte_level(models.BPE(vocab=vocab, merges=tokenizer.merges)), EOT)


def _numbered(tokens: list[str]) -> dict[str, int]:
    return {token: i for i, token in enumerate(tokens)}


def _with_special(made: HuggingFaceTokenizer, *tokens: str) -> HuggingFaceTokenizer:
    made.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in tokens])
    return made


def tokenizer_config(tokenizer: Tokenizer, max_seq_len: int) -> dict[str, Any]:
    """The content of tokenizer_config.json, for transformers 4 and 5.

    A text begins after the end of another, as in training; <|bos|> was never seen.
    """
    unknown = {"unk_token": UNKNOWN} if tokenizer.unknown_id is not None else {}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",  # 5 would write another, which 4 refuses
        "model_max_length": max_seq_len,
        # else 4 also gives token types, whose embedding its GPT-2 adds to every token's
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        "bos_token": EOT,
        "eos_token": EOT,
        "pad_token": EOT,
        **unknown,
    }


def tokenizer_from_hugging_face(folder: Path) -> Tokenizer | None:
    """The tokenizer of a Hugging Face folder as ours: one that we exported, or GPT-2's own.

    None where its tokenizer.json is another's.  Raises ConfigError where there is none, or where
    it cannot be read.
    """
    path = folder / "tokenizer.json"
    if not path.exists() and (folder / "vocab.json").exists():
        return _from_two_files(folder)  # as GPT-2's were, before there was a tokenizer.json
    try:
        given = HuggingFaceTokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        reason = " ".join(str(error).split()) if path.exists() else "there is none"
        raise ConfigError(f"{path}: not a tokenizer of Hugging Face's ({reason})") from error
    content = json.loads(given.to_str())
    try:
        made = _of_its_kind(content)
    except ValueError:
        return None
    if made is None or _essence(to_hugging_face(made)) != _essence(given):
        return None
    merges = getattr(made, "merges", [])
    return made if made_of_themselves(given, merges) else None


def _from_two_files(folder: Path) -> Tokenizer:
    try:
        return read_gpt2((folder / "vocab.json").read_bytes(), (folder / "merges.txt").read_bytes())
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"{folder}: has no tokenizer.json, and its vocab.json and merges.txt are not GPT-2's "
            f"({reason})"
        ) from error


def _of_its_kind(content: dict[str, Any]) -> Tokenizer | None:
    """That of ours which has such special tokens.  Raises ValueError for merges or an alphabet
    that it cannot have."""
    special = {token["content"]: token["id"] for token in content["added_tokens"]}
    model = content["model"]
    merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in model.get("merges", ())]
    if special == {UNKNOWN: 0, BOS: 1, EOT: 2}:
        return Char(checked_alphabet("".join(sorted(model["vocab"].keys() - special))))
    if special == {BOS: Bytes.bos_id, EOT: Bytes.eot_id} and not merges:
        return Bytes()
    if special == {BOS: 0, EOT: 1}:
        return Bpe(merges)
    if special == {EOT: len(BYTE_OF) + len(merges)}:
        return Gpt2(merges)
    return None


def _essence(tokenizer: HuggingFaceTokenizer) -> dict[str, Any]:
    """What decides ids and text, of all that tokenizer.json says.

    Left out is how offsets are told, padding and truncation, which are settings of the last call,
    and how special tokens in a text are found.
    """
    content: dict[str, Any] = json.loads(tokenizer.to_str())
    model, first, last = (content[key] or {} for key in ("model", "pre_tokenizer", "decoder"))
    if first.get("type") == "ByteLevel":
        first.pop("trim_offsets")
        last = last.get("type")
        model.pop("unk_token")  # no byte is unknown
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        model[key] = model.get(key) or None
    return {
        "normalizer": content["normalizer"],
        "pre_tokenizer": first,
        "model": model,
        "adds": tokenizer.num_special_tokens_to_add(is_pair=False),
        "decoder": last,
    }
