"""The tokenizer class, over `tokenizers.Tokenizer`, and those read from Hugging Face folders.

Text is data: a literal ``<|endoftext|>`` in it is encoded as ordinary characters, never as the
special id; only code that asks for ``eot_id`` or ``bos_id`` gets one.  A lone surrogate is not
Unicode and cannot be written as UTF-8: it is read as U+FFFD, by ``char`` as unknown.
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

UNUSUAL = "\U0010fffd"  # a character for private use, which hardly any vocabulary has


class Tokenizer(ABC):
    """Text to ids and back.  Every id is below ``vocab_size``."""

    kind: str
    vocab_size: int
    bos_id: int
    eot_id: int
    unknown_id: int | None = None  # of characters outside the vocabulary; the caller counts it
    # Where a Hugging Face folder puts a token of its own before a text: it, and those behind a
    # document that are no part of it and are not scored.  Else a document follows the end of
    # another, which is scored.
    document_start: int | None = None
    unscored: Sequence[int] = ()

    @property
    def start_id(self) -> int:
        """The token that a document, and so a prompt, begins behind."""
        return self.eot_id if self.document_start is None else self.document_start

    @property
    def separator(self) -> list[int]:
        """The tokens between two documents."""
        return list(dict.fromkeys([self.eot_id, self.start_id]))

    @property
    def start_text(self) -> str | None:
        """The text of ``document_start``."""
        return None if self.document_start is None else self.decode([self.document_start])

    @property
    def convention(self) -> str | None:
        """A line on what begins a document, unless that is the end of another, as in ours."""
        start = self.start_text
        return start and f"documents start with {start}, as the tokenizer's folder does it"

    @abstractmethod
    def to_hugging_face(self) -> Library:
        """Return the same tokenizer as a new `tokenizers` object, which writes tokenizer.json.

        One difference no file can take away: in theirs a special token's literal text becomes the
        special id, unless ``encode_special_tokens`` is set.
        """

    @functools.cached_property
    def library(self) -> Library:
        made = self.to_hugging_face()
        made.no_truncation()
        made.no_padding()
        made.encode_special_tokens = True  # in a text they are ordinary characters
        return made

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text``, without any special token."""
        ids: list[int] = self.encode_batch([text])[0].tolist()
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """Return one array a text; the fast way for a corpus, from several threads too."""
        clean = [unicode_only(text) for text in texts]
        with library_errors():
            found = self.library.encode_batch_fast(clean, add_special_tokens=False)
        return [np.array(one.ids, dtype=np.uint32) for one in found]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ``ids``; special ids become their literal text, bytes that are not
        UTF-8 U+FFFD.  Raises ConfigError for an id outside the vocabulary."""
        numbers = [int(item) for item in ids]
        for number in numbers:
            if not 0 <= number < self.vocab_size:
                raise ConfigError(f"id {number}: must be from 0 to {self.vocab_size - 1}")
        with library_errors():
            text: str = self.library.decode(numbers, skip_special_tokens=False)
        return text

    def is_settled(self, ids: Sequence[int], text: str) -> bool:
        """Return whether ``text``, that of ``ids``, stays as it is whatever ids follow: it ends
        with a whole character."""
        return not text.endswith("\ufffd")

    @abstractmethod
    def content(self) -> dict[str, Any]:
        """Return all that distinguishes this tokenizer, as JSON values."""

    def fingerprint(self) -> str:
        """Return a SHA-256, the same wherever the tokenizer was saved or trained."""
        return digest(self.content())

    def serialised(self) -> str:
        return json.dumps(self.content(), indent=1, ensure_ascii=False) + "\n"

    def save(self, path: Path) -> None:
        """Write the file that ``load_tokenizer`` reads; a reader sees the old one or the new."""
        write_text(Path(path), self.serialised())


class Foreign(Tokenizer):
    """A tokenizer.json that is none of ours, as a Hugging Face model was trained with.

    `tokenizers` encodes, and may change the text, as the file says.
    """

    kind = "hf"

    def __init__(
        self, content: Any, eot: str, bos: str, start: str | None = None, ends: bool = False
    ) -> None:
        """``content`` is that of tokenizer.json; ``start``: the token that it puts before a text,
        ``ends``: ``eot`` behind it, too.  Raises ValueError where it cannot be used."""
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
        self.encode(UNUSUAL)  # or fail here, before training

    def to_hugging_face(self) -> Library:
        return library_tokenizer(json.dumps(self.tokenizer_json))

    def is_settled(self, ids: Sequence[int], text: str) -> bool:
        """Bytes that spell no character, together, are none of them: they wait for their last."""
        last = not ids or ids[-1] not in self._bytes
        return self._is_stable and last and super().is_settled(ids, text)

    def content(self) -> dict[str, Any]:
        start = {"start": self.start, "ends": self.ends} if self.start else {}
        named = {"kind": self.kind, "eot": self.eot, "bos": self.bos}
        return {**named, **start, "tokenizer": self.tokenizer_json}


def _is_stable(decoder: Any) -> bool:
    """Return whether a decoder never changes what it made of some tokens when others follow, but
    for characters that are not whole."""
    kind = decoder["type"] if decoder else "Fuse"
    if kind == "Sequence":
        return all(map(_is_stable, decoder["decoders"]))
    if kind == "Replace":  # of more than a character, it can join two tokens
        return len(decoder["pattern"].get("String", "??")) == 1
    return kind in ("ByteLevel", "ByteFallback", "Fuse", "Metaspace", "WordPiece") or (
        kind == "Strip" and decoder["stop"] == 0
    )


def library_tokenizer(text: str) -> Library:
    """Return the content of a tokenizer.json as a `tokenizers` object.  Raises ValueError."""
    content = parse_json(text)
    model = content["model"]
    vocab = model.get("vocab", ())
    largest = max(vocab.values(), default=0) if isinstance(vocab, dict) else 0
    if largest > 2 * len(vocab) + 1000:  # the library counts up to it
        raise ValueError(f"ids up to {largest} for {len(vocab)} tokens")
    if model.get("dropout"):
        raise ValueError(f"dropout={model['dropout']}: the same text must have the same ids")
    with library_errors():
        made = Library.from_str(text)
    growth = _growth([content.get("normalizer"), content.get("decoder")])
    if growth > 1000:  # or a short text would fill the memory
        raise ValueError(f"makes {growth} characters of one")
    return made


def _growth(steps: Any) -> int:
    """Return how many times as long a text may become by replacements, one after another."""
    inner = steps.values() if isinstance(steps, dict) else steps if isinstance(steps, list) else ()
    own = steps.get("content") if isinstance(steps, dict) else None
    return math.prod(map(_growth, inner)) * max(1, len(own) if isinstance(own, str) else 1)


@contextlib.contextmanager
def library_errors() -> Iterator[None]:
    """Turn what `tokenizers` raises into a ConfigError; a panic of its Rust is no Exception."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise ConfigError(f"this tokenizer fails: {one_line(error)}") from error
