"""Define the tokenizer class, over `tokenizers.Tokenizer`, and the one for other models' files.

A literal ``<|endoftext|>`` in a text is encoded as ordinary characters, never as the special id.
A lone surrogate, which UTF-8 cannot express, is encoded as U+FFFD, by ``char`` as unknown.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer as Library

from tinygpt.config import ConfigError, one_line
from tinygpt.data.textfiles import unicode_only
from tinygpt.fileio import digest, parse_json, write_text

Ids = npt.NDArray[np.uint32]

UNUSUAL = "\U0010fffd"  # a private-use character that hardly any vocabulary has


class Tokenizer(ABC):
    """Turn text into ids below ``vocab_size`` and back."""

    kind: str
    vocab_size: int
    bos_id: int
    eot_id: int
    unknown_id: int | None = None  # of characters outside the vocabulary
    # Set if a Hugging Face tokenizer begins texts with a token of its own: that token, and those
    # after a document that are not scored.  By default a document follows a scored ``eot_id``.
    document_start: int | None = None
    unscored: Sequence[int] = ()

    @property
    def start_id(self) -> int:
        """Return the token that precedes a document or a prompt."""
        return self.eot_id if self.document_start is None else self.document_start

    @property
    def separator(self) -> list[int]:
        """Return the tokens between two documents."""
        return list(dict.fromkeys([self.eot_id, self.start_id]))

    @property
    def start_text(self) -> str | None:
        """Return the text of ``document_start``."""
        return None if self.document_start is None else self.decode([self.document_start])

    @property
    def convention(self) -> str | None:
        """Return a note on the token that begins documents, None for our own tokenizers."""
        start = self.start_text
        return start and f"documents start with {start}, as the tokenizer's folder does it"

    @abstractmethod
    def to_hugging_face(self) -> Library:
        """Return the same tokenizer as a new `tokenizers` object, which writes tokenizer.json.

        It encodes a special token's literal text as the special id unless
        ``encode_special_tokens`` is set, which no file can express.
        """

    @functools.cached_property
    def library(self) -> Library:
        made = self.to_hugging_face()
        made.no_truncation()
        made.no_padding()
        made.encode_special_tokens = True  # as ordinary characters
        return made

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text``, without special tokens."""
        ids: list[int] = self.encode_batch([text])[0].tolist()
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """Return one array of ids per text; safe to call from several threads."""
        clean = [unicode_only(text) for text in texts]
        with library_errors():
            found = self.library.encode_batch_fast(clean, add_special_tokens=False)
        return [np.array(one.ids, dtype=np.uint32) for one in found]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ``ids``, with special tokens spelled out and U+FFFD for invalid UTF-8.

        Raises ConfigError for an id outside the vocabulary.
        """
        numbers = [int(item) for item in ids]
        for number in numbers:
            if not 0 <= number < self.vocab_size:
                raise ConfigError(f"id {number}: must be from 0 to {self.vocab_size - 1}")
        with library_errors():
            text: str = self.library.decode(numbers, skip_special_tokens=False)
        return text

    def is_settled(self, ids: Sequence[int], text: str) -> bool:
        """Return whether ``text``, decoded from ``ids``, cannot change when more ids follow."""
        return not text.endswith("\ufffd")

    @abstractmethod
    def content(self) -> dict[str, Any]:
        """Return everything that distinguishes this tokenizer, as JSON values."""

    def fingerprint(self) -> str:
        """Return the SHA-256 of ``content``."""
        return digest(self.content())

    def serialised(self) -> str:
        return json.dumps(self.content(), indent=1, ensure_ascii=False) + "\n"

    def save(self, path: Path) -> None:
        """Write the file that ``load_tokenizer`` reads, atomically."""
        write_text(Path(path), self.serialised())


class Foreign(Tokenizer):
    """Encode by the tokenizer.json of another model, which may normalize the text."""

    kind = "hf"

    def __init__(
        self, content: Any, eot: str, bos: str, start: str | None = None, ends: bool = False
    ) -> None:
        """Take the ``content`` of a tokenizer.json, which puts ``start`` before a text and, if
        ``ends``, ``eot`` after it.  Raises ValueError if it cannot be used."""
        self.tokenizer_json, self.eot, self.bos = content, eot, bos
        self.start, self.ends = start, ends
        vocab = self.library.get_vocab(with_added_tokens=True)
        for token in (eot, bos, *([start] if start else [])):
            if token not in vocab:
                raise ValueError(f"no token {token!r}")
        self.vocab_size = max(vocab.values()) + 1
        self.eot_id, self.bos_id = vocab[eot], vocab[bos]
        if start is not None:
            self.document_start = vocab[start]
            self.unscored = [vocab[start]] if ends else [vocab[eot], vocab[start]]
        unknown = content["model"].get("unk_token")
        falls_back = content["model"].get("byte_fallback")
        self.unknown_id = vocab.get(unknown) if unknown and not falls_back else None
        self._bytes = {i for token, i in vocab.items() if re.fullmatch("<0x[0-9A-F]{2}>", token)}
        self._is_stable = _is_stable(content.get("decoder"))
        self.encode(UNUSUAL)  # if this fails, it should fail before training

    def to_hugging_face(self) -> Library:
        return library_tokenizer(json.dumps(self.tokenizer_json))

    def is_settled(self, ids: Sequence[int], text: str) -> bool:
        """Return False after a byte token too: invalid UTF-8 is decided by its last byte."""
        last = not ids or ids[-1] not in self._bytes
        return self._is_stable and last and super().is_settled(ids, text)

    def content(self) -> dict[str, Any]:
        start = {"start": self.start, "ends": self.ends} if self.start else {}
        named = {"kind": self.kind, "eot": self.eot, "bos": self.bos}
        return {**named, **start, "tokenizer": self.tokenizer_json}


def _is_stable(decoder: Any) -> bool:
    """Return whether later tokens never change the decoded text, incomplete characters aside."""
    kind = decoder["type"] if decoder else "Fuse"
    if kind == "Sequence":
        return all(map(_is_stable, decoder["decoders"]))
    if kind == "Replace":  # a longer pattern can span two tokens
        return len(decoder["pattern"].get("String", "??")) == 1
    return kind in ("ByteLevel", "ByteFallback", "Fuse", "Metaspace", "WordPiece") or (
        kind == "Strip" and decoder["stop"] == 0
    )


def library_tokenizer(text: str) -> Library:
    """Load the content of a tokenizer.json with `tokenizers`.  Raises ValueError."""
    content = parse_json(text)
    model = content["model"]
    vocab = model.get("vocab", ())
    largest = max(vocab.values(), default=0) if isinstance(vocab, dict) else 0
    if largest > 2 * len(vocab) + 1000:  # the library allocates memory up to it
        raise ValueError(f"ids up to {largest} for {len(vocab)} tokens")
    if model.get("dropout"):
        raise ValueError(f"dropout={model['dropout']}: the same text must have the same ids")
    with library_errors():
        made = Library.from_str(text)
    growth = _growth([content.get("normalizer"), content.get("decoder")])
    if growth > 1000:  # a short text would fill the memory
        raise ValueError(f"makes {growth} characters of one")
    return made


def _growth(steps: Any) -> int:
    """Return the factor by which successive replacements may lengthen a text."""
    inner = steps.values() if isinstance(steps, dict) else steps if isinstance(steps, list) else ()
    own = steps.get("content") if isinstance(steps, dict) else None
    return math.prod(map(_growth, inner)) * max(1, len(own) if isinstance(own, str) else 1)


@contextlib.contextmanager
def library_errors() -> Iterator[None]:
    """Turn errors of `tokenizers` into ConfigError, also panics, which are no ``Exception``."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise ConfigError(f"this tokenizer fails: {one_line(error)}") from error
