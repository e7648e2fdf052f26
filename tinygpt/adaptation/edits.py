"""Edits of a document: how a model is trained on it and on text about it, and who proposes them.

An edit is a directive, a choice for each of a few slots, and texts.  A small model cannot be told
to write JSON, so its directive is decoded slot by slot: each option stands for one token, and only
the tokens of the options can be chosen.  Whatever the logits, the directive can be read.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tinygpt.adaptation.config import OuterConfig
from tinygpt.adaptation.documents import Document
from tinygpt.config import ConfigError, RunError, key
from tinygpt.config.checks import check_bounds
from tinygpt.data.tokenizers import Tokenizer
from tinygpt.fileio import digest
from tinygpt.model.generate import NO_CHOICE

SOURCES = ("doc", "edit", "both")
TEXT_OPS = ("continue", "restate", "qa")
AUGMENTATIONS = ("none", "shuffle_sentences", "token_drop")
MASKS = ("all", "continuation_only")
COUNTS = (1, 2, 4)
DROPPED = 0.1  # share of the tokens that token_drop leaves out

Logits = Callable[[Sequence[int], Sequence[int]], Sequence[float]]  # prefix, allowed -> of each
Slots = dict[str, list[Any]]  # by name, what there is to choose


@dataclass(frozen=True)
class SelfEdit:
    """A directive and its texts.

    ``source``: train on the document's context, on the texts, or on both.  ``n``: how many texts
    each of ``text_ops`` asks for, and how many altered copies of each sequence ``aug`` adds.
    ``mask=continuation_only``: only the second half of each sequence counts in the loss.
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
    """An edit, and how many tokens the policy read and wrote for it."""

    edit: SelfEdit
    prompt_tokens: int = 0
    tokens: int = 0


class Policy(Protocol):
    """Propose edits of documents; by default a policy cannot be trained."""

    backend: str  # the kind in the configuration
    model: str  # where its weights are from
    parameters: int | None = None  # of the model that reads and writes; None: not known
    sft_tokens: int = 0  # that it was trained on in all
    ops: Sequence[str] = ("continue",)  # the texts that it can write

    def propose(
        self, document: Document, count: int, *, seed: int, explore: float
    ) -> list[Proposal]:
        """Return ``count`` edits, the same for the same seed; ``explore`` is the share of uniform
        choice in each slot.  Raises RunError where the policy has diverged."""

    def with_text(self, edit: SelfEdit, document: Document, *, seed: int) -> Proposal:
        """Return the directive ``edit`` with text for this document, where its source needs any.

        Raises RunError for text that the policy cannot write.
        """

    def sft(
        self, examples: Sequence[tuple[Document, SelfEdit]], config: OuterConfig, *, seed: int
    ) -> Policy:
        """Return a new policy, trained on the tokens of edits that paid; without any, itself.

        Raises RunError where its training diverges, and for a policy that cannot learn.
        """
        raise RunError(f"policy.kind={self.backend}: cannot be trained; use self or hf")

    def save(self, folder: Path) -> None:
        """Write what ``load`` needs into an existing folder."""
        raise RunError(f"policy.kind={self.backend}: never changes, so it is not saved")

    def load(self, folder: Path) -> Policy:
        """Return the policy that a later state of this one saved.  Raises ConfigError."""
        raise RunError(f"policy.kind={self.backend}: never changes, so it is not saved")


def read(values: Any) -> SelfEdit:
    """Return the edit of a JSON object, which must have every slot.  Raises ConfigError."""
    kinds = {field.name: str(field.type) for field in dataclasses.fields(SelfEdit)}
    if not isinstance(values, dict) or values.keys() != kinds.keys():
        raise ConfigError(f"edit={values!r:.60}: must be an object of {', '.join(kinds)}")
    for name, value in values.items():
        if kinds[name] == "list[str]":
            holds = isinstance(value, list) and all(isinstance(item, str) for item in value)
        elif type(value) is int:  # a larger one is no float either
            holds = kinds[name] in ("int", "float") and abs(value) < 2**63
        else:
            holds = type(value).__name__ == kinds[name]
        if not holds:
            raise ConfigError(f"edit.{name}={value!r:.60}: must be a {kinds[name]}")
    edit = SelfEdit(**{**values, "lr": float(values["lr"])})
    check_bounds(edit, "edit.")
    return edit


# --- directives as tokens


def slots(rates: Sequence[float], text_ops: Sequence[str] = ("continue",)) -> Slots:
    """Return what a directive chooses, in this order, of a policy that can write ``text_ops``."""
    sizes = range(1, len(text_ops) + 1)
    return {
        "source": list(SOURCES),
        "text_ops": [list(some) for size in sizes for some in combinations(text_ops, size)],
        "n": list(COUNTS),
        "aug": list(AUGMENTATIONS),
        "lr": list(rates),
        "mask": list(MASKS),
    }


def decode(
    logits: Logits,
    prefix: Sequence[int],
    slots: Slots,
    tokens: Sequence[int],
    epsilon: float,
    rng: np.random.Generator,
) -> tuple[SelfEdit, list[int]]:
    """Return a directive drawn from a policy behind ``prefix``, without text, and its tokens.

    ``tokens`` stand for the options of any slot.  An option has the probability
    (1 - epsilon) · softmax over the allowed tokens + epsilon / options.  Raises RunError where the
    logits are not finite.
    """
    values: dict[str, Any] = {}
    drawn: list[int] = []
    for name, options in slots.items():
        allowed = list(tokens[: len(options)])
        of_each = np.asarray(logits([*prefix, *drawn], allowed), dtype=np.float64)
        if not np.isfinite(of_each).all():
            raise RunError(NO_CHOICE)
        weights = np.exp(of_each - of_each.max())
        p = (1 - epsilon) * weights / weights.sum() + epsilon / len(allowed)
        number = int(rng.choice(len(allowed), p=p))
        drawn.append(allowed[number])
        values[name] = options[number]
    return SelfEdit(**values), drawn


def directive_tokens(edit: SelfEdit, slots: Slots, tokens: Sequence[int]) -> list[int]:
    """Return the tokens by which ``decode`` would have drawn this directive.

    Raises ValueError for an option that its slot lacks.
    """
    return [tokens[options.index(getattr(edit, name))] for name, options in slots.items()]


# --- training sequences


@dataclass(frozen=True)
class Row:
    """A training sequence: T + 1 tokens, and for each of the T targets whether it counts."""

    ids: list[int]
    mask: list[int]


def materialise(edit: SelfEdit, document: Document, tokenizer: Tokenizer, length: int) -> list[Row]:
    """Return what is trained on: a sequence for each line of the text, last the context itself.

    What is longer than ``length`` targets is cut up.  First come the copies that ``aug`` alters.
    The same edit of the same document gives the same rows; an edit without text can give none.
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
            some = whole[first : first + length + 1]
            targets = len(some) - 1
            given = targets // 2 if edit.mask == "continuation_only" else 0
            rows.append(Row(some, [0] * given + [1] * (targets - given)))
    return rows
