"""A language model as a policy: it draws a directive slot by slot, then writes the texts."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tinygpt.adaptation.config import OuterConfig
from tinygpt.adaptation.documents import Document
from tinygpt.adaptation.edits import Row, SelfEdit, Slot, decode, directive_tokens
from tinygpt.adaptation.policies import Policy, Proposal
from tinygpt.config import RunError
from tinygpt.fileio import digest


class Text(NamedTuple):
    """What a policy wrote."""

    text: str
    tokens: int  # that were written


def seed_of(*what: Any) -> int:
    """A seed of its own for each thing that is drawn, so that the order of drawing is nothing."""
    return int(digest(what)[:15], 16)


def learned_rows(given: Sequence[int], written: Sequence[int], length: int) -> Iterator[Row]:
    """Rows of ``length`` targets at most, of which only the tokens written count.  Before them
    stands as much as fits of what they were written behind, one token at least."""
    for first in range(0, len(written), length):
        some = written[first : first + length]
        before = [*given, *written[:first]][-(length + 1 - len(some)) :]
        yield Row([*before, *some], [0] * (len(before) - 1) + [1] * len(some))


class Writer(ABC):
    """What a policy of any language model is, given how that model reads and writes."""

    backend: str
    model: str
    ops: Sequence[str]  # the texts that it can write
    slots: list[Slot]
    tokens: list[int]  # that stand for the options of a slot
    length: int  # the most tokens that the model reads at once
    parameters: int | None = None
    sft_tokens = 0

    def propose(
        self, document: Document, count: int, *, seed: int, explore: float
    ) -> list[Proposal]:
        prefix = self.prefix(document)
        seeds = [seed_of(seed, document.sha256, n) for n in range(count)]
        drawn = [
            decode(
                self.logits, prefix, self.slots, self.tokens, explore, np.random.default_rng(one)
            )
            for one in seeds
        ]
        read, wrote = len(prefix), len(self.slots)
        return [
            Proposal(found.edit, found.prompt_tokens + read, found.tokens + wrote)
            for found in self.write([edit for edit, _ in drawn], document, seeds)
        ]

    def with_text(self, edit: SelfEdit, document: Document, *, seed: int) -> Proposal:
        return self.write([edit], document, [seed])[0]

    def write(
        self, edits: Sequence[SelfEdit], document: Document, seeds: Sequence[int]
    ) -> list[Proposal]:
        """Each with the text that it asks for; what that cost."""
        prompts = [self.prompts(edit, document) for edit in edits]
        return [
            Proposal(
                dataclasses.replace(edit, text=[text.text for text in texts]),
                sum(map(len, asked)),
                sum(text.tokens for text in texts),
            )
            for edit, asked, texts in zip(edits, prompts, self.texts(prompts, seeds), strict=True)
        ]

    def prompts(self, edit: SelfEdit, document: Document) -> list[list[int]]:
        """The tokens behind which each text is written; none where its source needs no text.

        Raises RunError for a kind of text that the policy cannot write.
        """
        if edit.source == "doc":
            return []
        for op in edit.text_ops:
            if op not in self.ops:
                can = ", ".join(self.ops)
                raise RunError(f"policy.kind={self.backend}: cannot {op} a text; it can {can}")
        return [prompt for op in edit.text_ops for prompt in self.behind(op, document, edit.n)]

    def sft(
        self, examples: Sequence[tuple[Document, SelfEdit]], config: OuterConfig, *, seed: int
    ) -> Policy:
        rows = self.rows(examples, config.tokens_per_step)
        if not rows:
            return self
        found = self.trained(rows, config, seed_of(seed, "sft"))
        found.sft_tokens = self.sft_tokens + config.steps * config.tokens_per_step
        return found

    def rows(
        self, examples: Sequence[tuple[Document, SelfEdit]], tokens_per_step: int
    ) -> list[Row]:
        """What ``sft`` trains on: of each edit the directive, and each of its texts."""
        found: list[Row] = []
        for document, edit in examples:
            written = [directive_tokens(edit, self.slots, self.tokens)]
            written += map(self.encode, edit.text)
            given = [self.prefix(document), *self.prompts(edit, document)]
            for pair in zip(given, written, strict=True):
                found += learned_rows(*pair, min(self.length, tokens_per_step))
        return found

    @abstractmethod
    def encode(self, text: str) -> list[int]: ...

    @abstractmethod
    def prefix(self, document: Document) -> list[int]:
        """The tokens behind which a directive is drawn."""

    @abstractmethod
    def behind(self, op: str, document: Document, count: int) -> list[list[int]]:
        """The tokens behind which ``count`` texts of a kind are written."""

    @abstractmethod
    def logits(self, ids: Sequence[int], allowed: Sequence[int]) -> Sequence[float]:
        """Of each of the tokens ``allowed``, as the one that follows ``ids``."""

    @abstractmethod
    def texts(
        self, prompts: Sequence[Sequence[list[int]]], seeds: Sequence[int]
    ) -> list[list[Text]]:
        """What follows the prompts of some edits, of which each has its seed.  Raises RunError
        where the model has diverged."""

    @abstractmethod
    def trained(self, rows: Sequence[Row], config: OuterConfig, seed: int) -> Writer:
        """A copy whose model was trained on ``rows``.  Raises RunError where that diverges."""

    @abstractmethod
    def save(self, folder: Path) -> None: ...

    @abstractmethod
    def load(self, folder: Path) -> Policy: ...
