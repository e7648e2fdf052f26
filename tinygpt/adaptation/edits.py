"""Edits of a document: how a model is to be trained on it, and on what text beside it.

An edit is a directive, a choice for each of a few slots, and lines of text.  A small policy cannot
be told to write JSON: its directive is decoded slot by slot, each option standing for one token,
and only the tokens of the options can be chosen.  So whatever the logits, it can be read.
"""

from __future__ import annotations

import dataclasses
import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from tinygpt.adaptation.documents import Document
from tinygpt.checks import check_bounds
from tinygpt.config import ConfigError, RunError, key
from tinygpt.data.tokenizers import Tokenizer
from tinygpt.fileio import digest
from tinygpt.model.generate import NO_CHOICE

SOURCES = ("doc", "edit", "both")
TEXT_OPS = ("continue", "restate", "qa")
AUGMENTATIONS = ("none", "shuffle_sentences", "token_drop")
MASKS = ("all", "continuation_only")
COUNTS = (1, 2, 4)
DROPPED = 0.1  # of the tokens, by token_drop

Logits = Callable[[Sequence[int], Sequence[int]], Sequence[float]]  # prefix, allowed -> of each


@dataclass(frozen=True)
class SelfEdit:
    """``source``: trained on is the document's context, the text, or both.  ``n``: texts asked
    for by each of ``text_ops``, and altered copies of each sequence that ``aug`` adds.  ``mask``
    continuation_only: of each sequence the second half counts, the first is what it goes on from.
    """

    source: str = key("doc", among=SOURCES)
    text_ops: list[str] = key(["continue"], among=TEXT_OPS)  # noqa: RUF009
    n: int = key(1, least=1)
    aug: str = key("none", among=AUGMENTATIONS)
    lr: float = key(3e-3, above=0.0)
    mask: str = key("all", among=MASKS)
    text: list[str] = key([])  # noqa: RUF009

    @property
    def edit_id(self) -> str:
        return digest(dataclasses.asdict(self))


def read(values: Any) -> SelfEdit:
    """Return the edit of a JSON object, which must have every slot.  Raises ConfigError."""
    kinds = {field.name: field.type for field in dataclasses.fields(SelfEdit)}
    if not isinstance(values, dict) or values.keys() != kinds.keys():
        raise ConfigError(f"edit={values!r:.60}: must be an object of {', '.join(kinds)}")
    for name, value in values.items():
        if not _is(str(kinds[name]), value):
            raise ConfigError(f"edit.{name}={value!r:.60}: must be a {kinds[name]}")
    edit = SelfEdit(**{**values, "lr": float(values["lr"])})
    check_bounds(edit, "edit.")
    return edit


def _is(kind: str, value: Any) -> bool:
    if kind == "list[str]":
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    types: dict[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "float": (int, float)}
    if isinstance(value, int) and abs(value) >= 2**63:  # no float either
        return False
    return isinstance(value, types[kind]) and not isinstance(value, bool)


@dataclass(frozen=True)
class Slot:
    """A choice of a directive, and what there is to choose."""

    name: str
    options: list[Any]


def slots(rates: Sequence[float], text_ops: Sequence[str] = ("continue",)) -> list[Slot]:
    """Return what a directive chooses, in this order; the policy can do ``text_ops``."""
    sizes = range(1, len(text_ops) + 1)
    return [
        Slot("source", list(SOURCES)),
        Slot("text_ops", [list(some) for size in sizes for some in combinations(text_ops, size)]),
        Slot("n", list(COUNTS)),
        Slot("aug", list(AUGMENTATIONS)),
        Slot("lr", list(rates)),
        Slot("mask", list(MASKS)),
    ]


def option_tokens(
    encode: Callable[[str], list[int]], unknown_id: int | None, count: int, where: str
) -> list[int]:
    """Return the tokens of letters, which stand for the first, the second ... option of any slot.

    Raises ConfigError, which ``where`` begins, for a tokenizer with fewer.
    """
    found = [ids[-1] for letter in string.ascii_letters if (ids := encode(letter))]
    tokens = list(dict.fromkeys(token for token in found if token != unknown_id))
    if len(tokens) < count:
        raise ConfigError(
            f"{where}: the tokenizer has {len(tokens)} letters; a policy needs {count}"
        )
    return tokens[:count]


def decode(
    logits: Logits,
    prefix: Sequence[int],
    chosen_from: Sequence[Slot],
    tokens: Sequence[int],
    epsilon: float,
    rng: np.random.Generator,
) -> tuple[SelfEdit, list[int]]:
    """Return a directive drawn from a policy behind ``prefix``, without text, and its tokens.

    In each slot an option has the probability (1 - epsilon) · softmax over the allowed tokens +
    epsilon / options.  Raises RunError where the logits are not finite.
    """
    values: dict[str, Any] = {}
    drawn: list[int] = []
    for slot in chosen_from:
        allowed = list(tokens[: len(slot.options)])
        of_each = np.asarray(logits([*prefix, *drawn], allowed), dtype=np.float64)
        if not np.isfinite(of_each).all():
            raise RunError(NO_CHOICE)
        weights = np.exp(of_each - of_each.max())
        p = (1 - epsilon) * weights / weights.sum() + epsilon / len(allowed)
        number = int(rng.choice(len(allowed), p=p))
        drawn.append(allowed[number])
        values[slot.name] = slot.options[number]
    return SelfEdit(**values), drawn


def directive_tokens(
    edit: SelfEdit, chosen_from: Sequence[Slot], tokens: Sequence[int]
) -> list[int]:
    """Return the tokens by which ``decode`` would have drawn this directive.

    Raises ValueError for an option that its slot lacks.
    """
    return [tokens[slot.options.index(getattr(edit, slot.name))] for slot in chosen_from]


@dataclass(frozen=True)
class Row:
    """A training sequence: tokens, and 1 for each of them but the first if it is a target that
    counts, else 0."""

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
    copies = range(edit.n if edit.aug != "none" else 0)
    every = [_altered(edit.aug, *piece, tokenizer, rng) for _ in copies for piece in pieces]
    every += [ids for _, ids in pieces]
    return [row for ids in every for row in _rows([tokenizer.start_id, *ids], edit.mask, length)]


def _altered(
    aug: str, text: str, ids: list[int], tokenizer: Tokenizer, rng: np.random.Generator
) -> list[int]:
    if aug == "token_drop":
        kept = rng.random(len(ids)) >= DROPPED
        return [token for token, keep in zip(ids, kept, strict=True) if keep]
    sentences = re.split(r"(?<=[.!?])\s+", text)
    return tokenizer.encode(" ".join(sentences[n] for n in rng.permutation(len(sentences))))


def _rows(ids: list[int], mask: str, length: int) -> list[Row]:
    found = []
    for first in range(0, len(ids) - 1, length):
        some = ids[first : first + length + 1]
        given = (len(some) - 1) // 2 if mask == "continuation_only" else 0
        found.append(Row(some, [0] * given + [1] * (len(some) - 1 - given)))
    return found
