"""Propose edits: the protocol of a policy, language models as policies, and a file of edits.

A language model draws a directive slot by slot, then writes the texts that it asks for.  Models
that read instructions are in ``prompted``.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from tinygpt.adaptation import edits
from tinygpt.adaptation.config import (
    AdaptConfig,
    FilePolicy,
    InnerConfig,
    ModelPolicy,
    OuterConfig,
    SelfPolicy,
    WritingPolicy,
)
from tinygpt.adaptation.documents import Document
from tinygpt.adaptation.edits import Row, SelfEdit, Slot
from tinygpt.adaptation.inner import Score, adapt, merge
from tinygpt.config import ConfigError, RunError, Sampling
from tinygpt.fileio import digest, parse_json, replacing
from tinygpt.model.gpt import GPT
from tinygpt.trained import TrainedRun


@dataclass(frozen=True)
class Proposal:
    """An edit, and what it cost the policy in tokens: read, and written."""

    edit: SelfEdit
    prompt_tokens: int = 0
    tokens: int = 0


class Policy(Protocol):
    backend: str  # the kind in the configuration
    model: str  # where its weights are from
    parameters: int | None  # of the model that reads and writes; None: not known
    sft_tokens: int  # that it was trained on since it was new, in all
    ops: Sequence[str]  # the texts that it can write

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

    def save(self, folder: Path) -> None:
        """Write what ``load`` needs into an existing folder."""

    def load(self, folder: Path) -> Policy:
        """Return the policy that a later state of this one saved.  Raises ConfigError."""


def make_policy(config: AdaptConfig, run: TrainedRun, documents: Sequence[Document] = ()) -> Policy:
    """Return the policy of ``config``, where ``run`` is what adapts.

    ``documents`` are those that it will be asked about: a file must have edits of each.  Raises
    ConfigError, one line.
    """
    policy, rates = config.policy, config.tuning.learning_rates
    if isinstance(policy, SelfPolicy):
        return OwnPolicy(run, policy, rates)
    if isinstance(policy, ModelPolicy):
        from tinygpt.adaptation.prompted import HuggingFacePolicy, MlxPolicy  # builds on Writer

        if policy.kind == "mlx":
            return MlxPolicy(policy, rates)
        return HuggingFacePolicy(policy, rates, run.model.output_weight.device)
    assert isinstance(policy, FilePolicy)
    return ReplayPolicy(policy.path, documents)


# --- any language model


class Text(NamedTuple):
    """A text that a policy wrote, and how many tokens it took."""

    text: str
    tokens: int


def seed_of(*what: Any) -> int:
    """Return a seed for each thing that is drawn, so that the order of drawing does not matter."""
    return int(digest(what)[:15], 16)


def learned_rows(given: Sequence[int], written: Sequence[int], length: int) -> Iterator[Row]:
    """Yield rows of ``length`` targets at most, of which only the tokens written count.

    Before them stands as much as fits of what they were written behind, one token at least.
    """
    for first in range(0, len(written), length):
        some = written[first : first + length]
        before = [*given, *written[:first]][-(length + 1 - len(some)) :]
        yield Row([*before, *some], [0] * (len(before) - 1) + [1] * len(some))


class Writer(Policy):
    """Proposes edits by a language model, given how that model reads and writes."""

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
            edits.decode(
                self.logits, prefix, self.slots, self.tokens, explore, np.random.default_rng(one)
            )
            for one in seeds
        ]
        read, wrote = len(prefix), len(self.slots)
        return [
            Proposal(written.edit, written.prompt_tokens + read, written.tokens + wrote)
            for written in self.write([edit for edit, _ in drawn], document, seeds)
        ]

    def with_text(self, edit: SelfEdit, document: Document, *, seed: int) -> Proposal:
        return self.write([edit], document, [seed])[0]

    def write(
        self, directives: Sequence[SelfEdit], document: Document, seeds: Sequence[int]
    ) -> list[Proposal]:
        """Return each with the text that it asks for, and what that cost."""
        prompts = [self.prompts(edit, document) for edit in directives]
        written = self.texts(prompts, seeds)
        return [
            Proposal(
                dataclasses.replace(edit, text=[text.text for text in texts]),
                sum(map(len, asked)),
                sum(text.tokens for text in texts),
            )
            for edit, asked, texts in zip(directives, prompts, written, strict=True)
        ]

    def prompts(self, edit: SelfEdit, document: Document) -> list[list[int]]:
        """Return the tokens behind which each text is written; none where none is needed.

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
        learned = self.trained(rows, config, seed_of(seed, "sft"))
        learned.sft_tokens = self.sft_tokens + config.steps * config.tokens_per_step
        return learned

    def rows(
        self, examples: Sequence[tuple[Document, SelfEdit]], tokens_per_step: int
    ) -> list[Row]:
        """Return what ``sft`` trains on: of each edit the directive, and each of its texts."""
        found: list[Row] = []
        for document, edit in examples:
            written = [edits.directive_tokens(edit, self.slots, self.tokens)]
            written += map(self.encode, edit.text)
            given = [self.prefix(document), *self.prompts(edit, document)]
            for pair in zip(given, written, strict=True):
                found += learned_rows(*pair, min(self.length, tokens_per_step))
        return found

    @abstractmethod
    def encode(self, text: str) -> list[int]: ...

    @abstractmethod
    def prefix(self, document: Document) -> list[int]:
        """Return the tokens behind which a directive is drawn."""

    @abstractmethod
    def behind(self, op: str, document: Document, count: int) -> list[list[int]]:
        """Return the tokens behind which ``count`` texts of a kind are written."""

    @abstractmethod
    def logits(self, ids: Sequence[int], allowed: Sequence[int]) -> Sequence[float]:
        """Return those of the tokens ``allowed``, as the one that follows ``ids``."""

    @abstractmethod
    def texts(
        self, prompts: Sequence[Sequence[list[int]]], seeds: Sequence[int]
    ) -> list[list[Text]]:
        """Return what follows the prompts of some edits, of which each has its seed.

        Raises RunError where the model has diverged.
        """

    @abstractmethod
    def trained(self, rows: Sequence[Row], config: OuterConfig, seed: int) -> Writer:
        """Return a copy whose model was trained on ``rows``.  Raises RunError if that diverges."""


# --- the base itself


class OwnPolicy(Writer):
    """The model that adapts.  It cannot follow instructions: behind the document's context it
    draws a directive, and texts are what it continues parts of that context with."""

    backend = "self"
    ops: Sequence[str] = ("continue",)

    def __init__(self, run: TrainedRun, config: WritingPolicy, rates: Sequence[float]) -> None:
        """Raises ConfigError for a tokenizer without enough letters."""
        self.run, self.model = run, str(run.path)
        self.parameters = sum(weight.numel() for weight in run.model.parameters())
        self.length = run.model.config.max_seq_len
        self.sampling = Sampling(temperature=config.temperature, top_k=config.top_k)
        self.max_edit_tokens = config.max_edit_tokens
        self.slots = edits.slots(rates, self.ops)
        tokenizer, most = run.tokenizer, max(len(slot.options) for slot in self.slots)
        where = f"tokenizer.kind={tokenizer.kind}"
        self.tokens = edits.option_tokens(tokenizer.encode, tokenizer.unknown_id, most, where)

    def encode(self, text: str) -> list[int]:
        return self.run.tokenizer.encode(text)

    def prefix(self, document: Document) -> list[int]:
        # the last token of a directive is not read
        return document.context_ids[-max(1, self.length + 1 - len(self.slots)) :]

    def behind(self, op: str, document: Document, count: int) -> list[list[int]]:
        """Return evenly spread chunks; one alone is the end of the context, which says least of
        what follows it.  A short context is a chunk itself."""
        ids = document.context_ids
        size = min(len(ids), max(1, self.length // 2))
        starts = np.linspace(len(ids) - size, 0, count).round().astype(int).tolist()
        return [ids[start : start + size] for start in starts]

    @torch.no_grad()
    def logits(self, ids: Sequence[int], allowed: Sequence[int]) -> Sequence[float]:
        model = self.run.model
        read = torch.tensor([ids[-self.length :]], device=model.output_weight.device)
        last: list[float] = model.logits(model.hidden(read)[0, -1])[list(allowed)].tolist()
        return last

    def texts(
        self, prompts: Sequence[Sequence[list[int]]], seeds: Sequence[int]
    ) -> list[list[Text]]:
        """Return all, written side by side: the prompts of a document are of one length."""
        pairs = zip(prompts, seeds, strict=True)
        flat = [(ids, seed_of(seed, n)) for some, seed in pairs for n, ids in enumerate(some)]
        if not flat:
            return [[] for _ in prompts]
        tokenizer = self.run.tokenizer
        begun, drawn = [ids for ids, _ in flat], [seed for _, seed in flat]
        steps = self.run.stream(begun, drawn, self.max_edit_tokens, self.sampling)
        columns = [step.tokens.tolist() for step in steps]
        rows = [
            list(itertools.takewhile(tokenizer.eot_id.__ne__, row))
            for row in zip(*columns, strict=True)
        ]
        written = iter([Text(tokenizer.decode(row), len(row)) for row in rows])
        return [list(itertools.islice(written, len(some))) for some in prompts]

    def trained(self, rows: Sequence[Row], config: OuterConfig, seed: int) -> OwnPolicy:
        inner = InnerConfig([config.steps], config.tokens_per_step, config.lora)
        found = adapt(
            self.run.model,
            rows,
            config.learning_rate,
            inner,
            seed,
            lambda _: Score(0.0, None, 0.0),  # the outer loop scores it, by its edits
        )
        if found.error:
            rate = config.learning_rate
            raise RunError(f"outer.learning_rate={rate}: the policy's training {found.error}")
        return self._with(
            found.model if config.lora.rank is None else merge(found.model, config.lora)
        )

    def _with(self, model: GPT) -> OwnPolicy:
        new = copy.copy(self)
        new.run = dataclasses.replace(self.run, model=model)
        return new

    def save(self, folder: Path) -> None:
        spent = {"sft_tokens": str(self.sft_tokens)}
        with replacing(folder / "policy.safetensors") as temporary:
            save_file(self.run.model.state_dict(), temporary, spent)

    def load(self, folder: Path) -> OwnPolicy:
        path, like = folder / "policy.safetensors", self.run.model
        model = GPT(like.config, like.vocab_size).to(like.output_weight)
        try:
            with safe_open(path, "pt") as file:
                model.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
                spent = int(file.metadata()["sft_tokens"])
        except (OSError, SafetensorError, RuntimeError, TypeError, LookupError) as error:
            raise ConfigError(f"{path}: not a policy that the model of {self.model} was") from error
        new = self._with(model.eval())
        new.sft_tokens = spent
        return new


# --- a file


class ReplayPolicy:
    """Edits that were written before, a JSON object a line.

    Each has an ``edit`` and whose it is: ``doc_sha256``, the SHA-256 of the document's text, or
    ``doc_id`` alone.  It may say what the edit cost, in ``prompt_tokens`` and ``tokens``; other
    keys are ignored.
    """

    backend = "file"
    parameters: int | None = None
    ops: Sequence[str] = ("continue",)  # whatever its texts are
    sft_tokens = 0

    def __init__(self, path: str, documents: Sequence[Document] = ()) -> None:
        """Raises ConfigError for a line that is none, naming its number, and where one of
        ``documents`` has no edit."""
        self.model = path
        self._proposals: dict[str, list[Proposal]] = {}
        try:
            lines = Path(path).expanduser().read_bytes().split(b"\n")
        except OSError as error:
            raise ConfigError(f"policy.path={path}: cannot be read ({error.strerror})") from error
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    owner, proposal = _read_proposal(line)
                except ConfigError as error:
                    raise ConfigError(f"policy.path={path}: line {number}: {error}") from error
                self._proposals.setdefault(owner, []).append(proposal)
        try:
            for document in documents:
                self._of(document)
        except RunError as error:
            raise ConfigError(str(error)) from error

    def _of(self, document: Document) -> list[Proposal]:
        for name in (document.sha256, document.doc_id):
            if name in self._proposals:
                return self._proposals[name]
        raise RunError(f"policy.path={self.model}: has no edit of the document {document.doc_id}")

    def propose(
        self, document: Document, count: int, *, seed: int, explore: float
    ) -> list[Proposal]:
        """Return them in the order of the file, beginning at the seed; nothing is explored."""
        found = self._of(document)
        return [found[(seed + n) % len(found)] for n in range(count)]

    def with_text(self, edit: SelfEdit, document: Document, *, seed: int) -> Proposal:
        """Return it with the text of the first edit that has any."""
        if edit.source == "doc":
            return Proposal(dataclasses.replace(edit, text=[]))
        chosen = next((one for one in self._of(document) if one.edit.text), None)
        if chosen is None:
            where = f"policy.path={self.model}"
            raise RunError(f"{where}: has no text for the document {document.doc_id}")
        return dataclasses.replace(chosen, edit=dataclasses.replace(edit, text=chosen.edit.text))

    def sft(
        self, examples: Sequence[tuple[Document, SelfEdit]], config: OuterConfig, *, seed: int
    ) -> Policy:
        raise RunError("policy.kind=file: its edits are written; it cannot be trained")

    def save(self, folder: Path) -> None:
        """Write nothing: the file stays as it is."""

    def load(self, folder: Path) -> Policy:
        return self


def _read_proposal(line: bytes) -> tuple[str, Proposal]:
    """Return whose edit it is, and the edit."""
    try:
        values = parse_json(line.decode())
    except ValueError as error:
        raise ConfigError(f"not JSON ({error})") from error
    if not isinstance(values, dict) or "edit" not in values:
        raise ConfigError("must be an object with an edit")
    owner = values.get("doc_sha256") or values.get("doc_id")
    if not isinstance(owner, str):
        raise ConfigError("must say whose edit it is, by doc_sha256 or doc_id")
    costs = {name: values.get(name, 0) for name in ("prompt_tokens", "tokens")}
    for name, value in costs.items():
        if type(value) is not int or value < 0:
            raise ConfigError(f"{name}={value!r:.60}: must be a number of tokens, at least 0")
    return owner, Proposal(edits.read(values["edit"]), **costs)
