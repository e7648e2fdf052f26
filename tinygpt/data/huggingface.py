"""Our tokenizers as Hugging Face's, with the same ids and texts, and theirs as ours.

One difference no file can take away: in theirs a special token's literal text, as
``<|endoftext|>``, becomes the special id, unless it is asked with ``split_special_tokens=True``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as HuggingFaceTokenizer

from tinygpt import fileio
from tinygpt.config import ConfigError, one_line
from tinygpt.data.tokenizers import (
    BOS,
    BYTE_OF,
    EOT,
    UNKNOWN,
    Bpe,
    Bytes,
    Char,
    Gpt2,
    Ids,
    Tokenizer,
    byte_level,
    checked_alphabet,
    library_errors,
    library_tokenizer,
    made_of_themselves,
    merged_tokens,
    read_gpt2,
)

UNHEARD_OF = "\U0010fffd"  # a character for private use, which hardly any vocabulary has


class Foreign(Tokenizer):
    """A tokenizer.json that is none of ours, as a Hugging Face model was trained with.

    `tokenizers` encodes, and may change the text, as the file says.
    """

    kind = "hf"

    def __init__(
        self,
        content: dict[str, Any],
        eot: str,
        bos: str,
        start: str | None = None,
        ends: bool = False,
    ) -> None:
        """``content`` is that of tokenizer.json; ``start``: the token that it puts before a text,
        ``ends``: ``eot`` behind it, too.  Raises ValueError where it cannot be used."""
        self.content, self.eot, self.bos = content, eot, bos
        self._inner = library_tokenizer(json.dumps(content))
        self._inner.no_truncation()
        self._inner.no_padding()
        self._inner.encode_special_tokens = True  # in a text they are ordinary characters
        vocab = self._inner.get_vocab(with_added_tokens=True)
        for token in (eot, bos, *([start] if start else [])):
            if token not in vocab:
                raise ValueError(f"no token {token!r}")
        self.vocab_size = max(vocab.values()) + 1
        self.eot_id, self.bos_id = vocab[eot], vocab[bos]
        self.start, self.ends = start, ends
        if start is not None:
            self.document_start = vocab[start]
            self.unscored = [vocab[start]] if ends else [vocab[eot], vocab[start]]
        unknown = content["model"].get("unk_token")
        falls_back = content["model"].get("byte_fallback")
        self.unknown_id = vocab.get(unknown) if unknown and not falls_back else None
        self._bytes = {i for token, i in vocab.items() if re.fullmatch("<0x[0-9A-F]{2}>", token)}
        self._unfolds = _unfolds(content.get("decoder"))
        self.encode(UNHEARD_OF)

    def _encode(self, text: str) -> Ids:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        clean = [text.encode("utf-8", "replace").decode() for text in texts]
        with library_errors():
            found = self._inner.encode_batch(clean, add_special_tokens=False)
        return [np.array(one.ids, dtype=np.uint32) for one in found]

    def decode(self, ids: Iterable[int]) -> str:
        checked = list(self._checked(ids))
        with library_errors():
            text: str = self._inner.decode(checked, skip_special_tokens=False)
        return text

    def is_settled(self, ids: Sequence[int], text: str) -> bool:
        """Bytes that spell no character, together, are none of them: they wait for their last."""
        last = not ids or ids[-1] not in self._bytes
        return self._unfolds and last and super().is_settled(ids, text)

    def _content(self) -> dict[str, Any]:
        start = {"start": self.start, "ends": self.ends} if self.start else {}
        named = {"kind": self.kind, "eot": self.eot, "bos": self.bos}
        return {**named, **start, "tokenizer": self.content}


def _unfolds(decoder: dict[str, Any] | None) -> bool:
    """Return whether a decoder never changes what it made of some tokens when others follow, but
    for characters that are not whole."""
    kind = decoder["type"] if decoder else "Fuse"
    if kind == "Sequence":
        return all(map(_unfolds, decoder["decoders"]))  # type: ignore[index]
    if kind == "Replace":  # of more than a character, it can join two tokens
        return len(decoder["pattern"].get("String", "??")) == 1  # type: ignore[index]
    return kind in ("ByteLevel", "ByteFallback", "Fuse", "Metaspace", "WordPiece") or (
        kind == "Strip" and decoder["stop"] == 0  # type: ignore[index]
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
    if isinstance(tokenizer, Foreign):
        return HuggingFaceTokenizer.from_str(json.dumps(tokenizer.content))
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

    A text begins as in training: after the end of another (<|bos|> was never seen), or after the
    token that tokenizer.json puts there.
    """
    end, unknown = EOT, {"unk_token": UNKNOWN} if tokenizer.unknown_id is not None else {}
    if isinstance(tokenizer, Foreign):
        end, own = tokenizer.eot, tokenizer.content["model"].get("unk_token")
        unknown = {"unk_token": own} if own else {}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",  # 5 would write another, which 4 refuses
        "model_max_length": max_seq_len,
        # else 4 also gives token types, whose embedding its GPT-2 adds to every token's
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        "bos_token": getattr(tokenizer, "start", None) or end,
        "eos_token": end,
        "pad_token": end,
        **unknown,
    }


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a Hugging Face folder.  Raises ConfigError, naming what is missing."""
    ours = tokenizer_from_hugging_face(folder)
    names = ("tokenizer_config.json", "special_tokens_map.json")
    settings, special = (_settings(folder / name) for name in names)
    eot, bos = (
        _token(settings.get(key)) or _token(special.get(key)) for key in ("eos_token", "bos_token")
    )
    path, adds_bos = folder / "tokenizer.json", settings.get("add_bos_token") is True
    if ours is not None and (not adds_bos or bos in (None, ours.decode([ours.eot_id]))):
        return ours
    content = fileio.read_json(path)
    try:
        eot = eot or _by_number(folder, content)
        if eot is None:
            raise ConfigError(
                f"{folder}: no eos_token, which ends a document, in {', '.join(names)}, "
                "generation_config.json or config.json"
            )
        if adds_bos and bos not in (None, eot):
            content = _with_start(content, str(bos), eot)
        start, ends = _added(content, eot)
        return Foreign(content, eot, start or _token(settings.get("bos_token")) or eot, start, ends)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"{path}: not a tokenizer that can be used ({one_line(error)})"
        ) from error


def _settings(path: Path) -> dict[str, Any]:
    return dict(fileio.read_json(path)) if path.exists() else {}


def _by_number(folder: Path, content: dict[str, Any]) -> str | None:
    """The token that the settings of the model give as the end, the first of several."""
    for name in ("generation_config.json", "config.json"):
        number = _settings(folder / name).get("eos_token_id")
        number = number[0] if isinstance(number, list) and number else number
        if isinstance(number, int):
            return library_tokenizer(json.dumps(content)).id_to_token(number)
    return None


def _added(content: dict[str, Any], eot: str) -> tuple[str | None, bool]:
    """The token that tokenizer.json puts before a text, unless it is ``eot``, which stands there
    anyway; and whether it puts ``eot`` behind it.  Raises ValueError for more than that."""
    library = library_tokenizer(json.dumps(content))
    with library_errors():
        words = sorted(library.get_vocab(with_added_tokens=False))
        some = next((w for w in words if library.encode(w, add_special_tokens=False).ids), "")
        found = library.encode(some)
    text = [n for n, mask in enumerate(found.special_tokens_mask) if not mask] or [0]
    before, behind = found.tokens[: text[0]], found.tokens[text[-1] + 1 :]
    if not before or before == [eot]:
        return None, behind == [eot]
    if len(before) > 1 or behind not in ([], [eot]):
        raise ValueError(
            f"puts {' '.join(before)} before a text, {' '.join(behind) or 'nothing'} behind"
        )
    return before[0], bool(behind)


def _with_start(content: dict[str, Any], bos: str, eot: str) -> dict[str, Any]:
    """Return the same with ``bos`` before a text that has none, as ``add_bos_token`` asks."""
    before, ends = _added(content, eot)
    if before is not None:
        return content
    library = library_tokenizer(json.dumps(content))
    tokens = [bos, eot] if ends else [bos]
    library.post_processor = processors.TemplateProcessing(
        single=" ".join([bos, "$A", *tokens[1:]]),
        special_tokens=[(token, library.token_to_id(token)) for token in tokens],
    )
    return dict(json.loads(library.to_str()))


def _token(value: Any) -> str | None:
    """A special token, which is written as a text or as a table of its properties."""
    return value.get("content") if isinstance(value, dict) else value


def tokenizer_from_hugging_face(folder: Path) -> Tokenizer | None:
    """The tokenizer of a Hugging Face folder as ours: one that we exported, or GPT-2's own.

    None where its tokenizer.json is another's.  Raises ConfigError where there is none, or where
    it cannot be read.
    """
    path = folder / "tokenizer.json"
    if not path.exists() and (folder / "vocab.json").exists():
        return _from_two_files(folder)  # as GPT-2's were, before there was a tokenizer.json
    try:
        given = library_tokenizer(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        reason = one_line(error) if path.exists() else "there is none"
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
        raise ConfigError(
            f"{folder}: has no tokenizer.json, and its vocab.json and merges.txt are not GPT-2's "
            f"({one_line(error)})"
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
        model.pop("unk_token", None)  # no byte is unknown
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        model[key] = model.get(key) or None
    return {
        "normalizer": content["normalizer"],
        "pre_tokenizer": first,
        "model": model,
        "adds": tokenizer.num_special_tokens_to_add(is_pair=False),
        "decoder": last,
    }
