"""Who proposes edits: one small protocol, and what every policy is made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tinygpt.adaptation.config import OuterConfig
from tinygpt.adaptation.documents import Document
from tinygpt.adaptation.edits import SelfEdit


@dataclass(frozen=True)
class Proposal:
    """An edit, and what it cost the policy in tokens: read, and written."""

    edit: SelfEdit
    prompt_tokens: int = 0
    tokens: int = 0


class Policy(Protocol):
    """``sft_tokens``: that it was trained on since it was new, in all."""

    backend: str  # the kind in the configuration
    model: str | None  # where its weights are from
    learns: bool  # whether ``sft`` can be asked for
    sft_tokens: int

    def propose(
        self, document: Document, count: int, *, seed: int, explore: float
    ) -> list[Proposal]:
        """``count`` edits; ``explore`` is the share of uniform choice in each slot.  The same
        seed gives the same edits.  Raises RunError where the policy has diverged."""

    def with_text(self, edit: SelfEdit, document: Document, *, seed: int) -> Proposal:
        """The directive ``edit`` with text for this document, where its source needs any."""

    def sft(
        self, examples: Sequence[tuple[Document, SelfEdit]], config: OuterConfig, *, seed: int
    ) -> Policy:
        """A new policy, trained on edits that paid; only their tokens are targets."""

    def save(self, folder: Path) -> None:
        """What ``load`` needs, into a folder that is there."""

    def load(self, folder: Path) -> Policy:
        """The policy that a later state of this one saved."""
