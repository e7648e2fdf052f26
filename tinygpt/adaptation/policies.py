"""Who proposes edits: one small protocol, and what every policy is made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tinygpt.adaptation.config import (
    AdaptConfig,
    FilePolicy,
    ModelPolicy,
    OuterConfig,
    SelfPolicy,
)
from tinygpt.adaptation.documents import Document
from tinygpt.adaptation.edits import SelfEdit
from tinygpt.trained import TrainedRun


@dataclass(frozen=True)
class Proposal:
    """An edit, and what it cost the policy in tokens: read, and written."""

    edit: SelfEdit
    prompt_tokens: int = 0
    tokens: int = 0


class Policy(Protocol):
    """``sft_tokens``: that it was trained on since it was new, in all."""

    backend: str  # the kind in the configuration
    model: str  # where its weights are from
    parameters: int | None  # of the model that reads and writes; None: not known
    sft_tokens: int
    ops: Sequence[str]  # the texts that it can write

    def propose(
        self, document: Document, count: int, *, seed: int, explore: float
    ) -> list[Proposal]:
        """``count`` edits; ``explore`` is the share of uniform choice in each slot.  The same
        seed gives the same edits.  Raises RunError where the policy has diverged."""

    def with_text(self, edit: SelfEdit, document: Document, *, seed: int) -> Proposal:
        """The directive ``edit`` with text for this document, where its source needs any.  Raises
        RunError for text that the policy cannot write."""

    def sft(
        self, examples: Sequence[tuple[Document, SelfEdit]], config: OuterConfig, *, seed: int
    ) -> Policy:
        """A new policy, trained on edits that paid; only their tokens are targets.  Without any,
        itself.  Raises RunError where its training diverges, and for a policy that cannot learn."""

    def save(self, folder: Path) -> None:
        """What ``load`` needs, into a folder that is there."""

    def load(self, folder: Path) -> Policy:
        """The policy that a later state of this one saved.  Raises ConfigError for what is none."""


def make_policy(config: AdaptConfig, run: TrainedRun, documents: Sequence[Document] = ()) -> Policy:
    """The policy of ``config``, where ``run`` is what adapts.

    ``documents`` are those that it will be asked about: a file must have edits of each.  Raises
    ConfigError, one line.
    """
    # imported here: each needs what stands above, and libraries that the others do without
    policy, rates = config.policy, config.tuning.learning_rates
    if isinstance(policy, SelfPolicy):
        from tinygpt.adaptation.self_policy import OwnPolicy

        return OwnPolicy(run, policy, rates)
    if isinstance(policy, ModelPolicy):
        if policy.kind == "mlx":
            from tinygpt.adaptation.mlx_policy import MlxPolicy

            return MlxPolicy(policy, rates)
        from tinygpt.adaptation.hf_policy import HuggingFacePolicy

        return HuggingFacePolicy(policy, rates, run.model.output_weight.device)
    assert isinstance(policy, FilePolicy)
    from tinygpt.adaptation.file_policy import ReplayPolicy

    return ReplayPolicy(policy.path, documents)
