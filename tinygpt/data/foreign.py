"""A tokenizer of another project: any ``tokenizer.json``, encoded by `tokenizers` itself."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer as HuggingFaceTokenizer

from tinygpt import rundir
from tinygpt.config import ConfigError
from tinygpt.data.tokenizers import Ids, Tokenizer


class Foreign(Tokenizer):
    """As a Hugging Face model was trained with.  It may change the text, as its rules say."""

    kind = "hf"

    def __init__(self, content: dict[str, Any], eot: str, bos: str) -> None:
        """``content`` is that of tokenizer.json.  Raises ValueError where it cannot be used."""
        self.content, self.eot, self.bos = content, eot, bos
        try:
            self._inner = HuggingFaceTokenizer.from_str(json.dumps(content))
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(str(error)) from error
        self._inner.no_truncation()
        self._inner.no_padding()
        self._inner.encode_special_tokens = True  # in a text they are ordinary characters
        vocab = self._inner.get_vocab(with_added_tokens=True)
        for token in (eot, bos):
            if token not in vocab:
                raise ValueError(f"no token {token!r}")
        self.vocab_size = max(vocab.values()) + 1
        self.eot_id, self.bos_id = vocab[eot], vocab[bos]
        unknown = content["model"].get("unk_token")
        falls_back = content["model"].get("byte_fallback")
        self.unknown_id = vocab.get(unknown) if unknown and not falls_back else None

    def _encode(self, text: str) -> Ids:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        clean = [text.encode("utf-8", "replace").decode() for text in texts]
        found = self._inner.encode_batch(clean, add_special_tokens=False)
        return [np.array(one.ids, dtype=np.uint32) for one in found]

    def decode(self, ids: Iterable[int]) -> str:
        text: str = self._inner.decode(list(self._checked(ids)), skip_special_tokens=False)
        return text

    def _content(self) -> dict[str, Any]:
        return {"kind": self.kind, "eot": self.eot, "bos": self.bos, "tokenizer": self.content}


def read_foreign(folder: Path) -> Foreign:
    """The tokenizer of a Hugging Face folder.  Raises ConfigError, naming what is missing."""
    path = folder / "tokenizer.json"
    content = rundir.read_json(path)
    settings = rundir.read_json(folder / "tokenizer_config.json")
    eot = _token(settings.get("eos_token"))
    if eot is None:
        raise ConfigError(f"{folder}/tokenizer_config.json: no eos_token, which ends a document")
    try:
        return Foreign(content, eot, _token(settings.get("bos_token")) or eot)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path}: not a tokenizer that can be used ({reason})") from error


def _token(value: Any) -> str | None:
    """A special token, which is written as a text or as a table of its properties."""
    return value.get("content") if isinstance(value, dict) else value
