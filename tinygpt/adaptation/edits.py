"""Define edits of a document, which say how to train on it, and the policies that propose them.

An edit is a directive, which is a choice for each of a few slots, and texts.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from tinygpt.adaptation.documents import Document
from tinygpt.config import key
from tinygpt.config.checks import check_bounds, require
from tinygpt.data.tokenizers import Tokenizer
from tinygpt.fileio import digest

SOURCES = ("doc", "edit", "both")
TEXT_OPS = ("continue", "restate", "qa")
AUGMENTATIONS = ("none", "shuffle_sentences", "token_drop")
MASKS = ("all", "continuation_only")
DROPPED = 0.1  # share of the tokens that token_drop removes


@dataclass(frozen=True)
class SelfEdit:
    """Hold a directive and its texts.

    ``source`` says whether to train on the document's context, the texts, or both.  ``n`` is the
    number of texts for each of ``text_ops``, and of altered copies of each sequence that ``aug``
    adds.  ``mask=continuation_only`` excludes the first half of each sequence from the loss.
    """

    source: str = key("doc", among=SOURCES)
    text_ops: list[str] = key(["continue"], among=TEXT_OPS)
    n: int = key(1, least=1)
    aug: str = key("none", among=AUGMENTATIONS)
    lr: float = key(3e-3, above=0.0)
    mask: str = key("all", among=MASKS)
    text: list[str] = key([])

    @property
    def edit_id(self) -> str:
        return digest(dataclasses.asdict(self))


@dataclass(frozen=True)
class Proposal:
    """Hold an edit, and how many tokens the policy read and wrote for it."""

    edit: SelfEdit
    prompt_tokens: int = 0
    tokens: int = 0


class Policy:
    """Propose edits of documents."""

    backend: str  # policy.kind
    model: str  # where its weights are from
    parameters: int | None = None  # of its model; None: unknown
    sft_tokens: int = 0  # tokens that it was trained on in all
    ops: Sequence[str] = ("continue",)  # kinds of text that it can write

    def propose(self, document: Document, count: int, seed: int, explore: float) -> list[Proposal]:
        """Return ``count`` edits, with a share ``explore`` of random choices, or raise RunError."""
        raise NotImplementedError

    def with_text(self, edit: SelfEdit, document: Document, *, seed: int) -> Proposal:
        """Return ``edit`` with text for this document if it needs any.  Raise RunError if the
        policy has none."""
        raise NotImplementedError


def read(values: Any) -> SelfEdit:
    """Return the edit in a JSON object, or raise ConfigError unless it has every slot."""
    kinds = {field.name: str(field.type) for field in dataclasses.fields(SelfEdit)}
    line = f"edit={values!r:.60}: must be an object of {', '.join(kinds)}"
    require(isinstance(values, dict) and values.keys() == kinds.keys(), line)
    for name, value in values.items():
        if kinds[name] == "list[str]":
            holds = isinstance(value, list) and all(isinstance(item, str) for item in value)
        elif type(value) is int:
            holds = kinds[name] in ("int", "float") and abs(value) < 2**63
        else:
            holds = type(value).__name__ == kinds[name]
        require(holds, f"edit.{name}={value!r:.60}: must be a {kinds[name]}")
    edit = SelfEdit(**{**values, "lr": float(values["lr"])})
    check_bounds(edit, "edit.")
    return edit


class Row(NamedTuple):
    """Hold a sequence of T + 1 tokens; the first ``given`` of its T targets do not count."""

    ids: list[int]
    given: int = 0

    @property
    def targets(self) -> int:
        return len(self.ids) - 1


def materialise(edit: SelfEdit, document: Document, tokenizer: Tokenizer, length: int) -> list[Row]:
    """Return the rows to train on: copies altered by ``aug``, each line of the texts, the context.

    Sequences longer than ``length`` targets are split.  The rows depend only on the edit and the
    document; an edit without text may give none.
    """
    pieces: list[tuple[str, list[int]]] = []
    if edit.source != "doc":
        lines = [line.strip() for text in edit.text for line in text.splitlines()]
        pieces += [(line, tokenizer.encode(line)) for line in lines]
    if edit.source != "edit":
        pieces.append((document.context, document.context_ids[1:]))
    rng = np.random.default_rng(int(digest([document.sha256, edit.edit_id])[:16], 16))
    sequences: list[list[int]] = []
    for text, ids in pieces * (edit.n if edit.aug != "none" else 0):
        if edit.aug == "token_drop":
            kept = rng.random(len(ids)) >= DROPPED
            sequences.append([token for token, keep in zip(ids, kept, strict=True) if keep])
        else:
            sentences = re.split(r"(?<=[.!?])\s+", text)
            shuffled = " ".join(sentences[n] for n in rng.permutation(len(sentences)))
            sequences.append(tokenizer.encode(shuffled))
    rows = []
    for ids in [*sequences, *(ids for _, ids in pieces)]:
        whole = [tokenizer.start_id, *ids]
        for first in range(0, len(ids), length):
            part = whole[first : first + length + 1]
            rows.append(Row(part, (len(part) - 1) // 2 if edit.mask == "continuation_only" else 0))
    return rows
