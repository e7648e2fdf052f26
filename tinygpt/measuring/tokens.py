"""Random tokens as a prepared corpus: any vocabulary at once, and the real shards and windows.

What the tokens say makes no difference to the time of a step.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from tinygpt import fileio
from tinygpt.data.shards import Prepared
from tinygpt.data.tokenizers import Ids, Tokenizer

TRAIN_TOKENS = 2_000_000


class Numbers(Tokenizer):
    """Text that is numbers already: a vocabulary of any size without training one."""

    kind, bos_id, eot_id = "numbers", 0, 0

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def _encode(self, text: str) -> Ids:
        return np.array([int(word) for word in text.split()], dtype=np.uint32)

    def decode(self, ids: Iterable[int]) -> str:
        return " ".join(map(str, self._checked(ids)))

    def _content(self) -> dict[str, Any]:
        return {"kind": self.kind, "vocab_size": self.vocab_size}


def write_tokens(folder: Path, vocab_size: int, length: int, seed: int) -> None:
    """Shards of uniformly random ids: training, and a validation of one window of ``length``."""
    random = np.random.default_rng(seed)
    dtype = np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)
    splits: dict[str, Any] = {"test": None}
    for name, tokens in (("train", max(TRAIN_TOKENS, 100 * length)), ("val", length)):
        random.integers(vocab_size, size=tokens + 1, dtype=dtype).tofile(folder / f"{name}.bin")
        np.save(folder / f"{name}.npy", np.array([0, tokens]))
        splits[name] = {
            "documents": 1,
            "tokens": tokens,
            "bytes": tokens,
            "characters": tokens,
            "unknown_tokens": 0,
            "empty_documents": 0,
            "left_out_documents": 0,
            "longest_document": tokens,
            "irreducible_loss_exact": None,
            "files": [{"file": f"{name}.bin", "documents": 1}],
            "offsets": {"file": f"{name}.npy"},
        }
    fileio.write_json(
        folder / "index.json",
        {
            "dtype": dtype.name,
            "vocab_size": vocab_size,
            "duplicates_of_validation_or_test": 0,
            "splits": splits,
        },
    )


def open_tokens(folder: Path) -> Prepared:
    """What ``write_tokens`` wrote, as the data module takes it."""
    index = fileio.read_json(folder / "index.json")
    return Prepared(folder, index, Numbers(index["vocab_size"]))
