"""Propose edits: by the base itself, or from a file of edits.  Models that read instructions are in
``prompted``.

A language model draws a directive slot by slot, then writes the texts that it asks for.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import string
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_model, save_model
from torch import Tensor

from tinygpt.adaptation import edits
from tinygpt.adaptation.config import OuterConfig, SelfPolicy
from tinygpt.adaptation.documents import Document
from tinygpt.adaptation.edits import Policy, Proposal, Row, SelfEdit, Slots
from tinygpt.adaptation.inner import logits_of, trainable_copy, training
from tinygpt.config import ConfigError, RunError, Sampling
from tinygpt.fileio import digest, parse_json, replacing
from tinygpt.model.gpt import GPT
from tinygpt.model.lora import merged
from tinygpt.runs.load import TrainedRun


def seed_of(*what: Any) -> int:
    """Return a seed for each thing that is drawn, so that the order of drawing does not matter."""
    return int(digest(what)[:15], 16)


# --- any language model


class Text(NamedTuple):
    """A text that a policy wrote, and how many tokens it took."""

    text: str
    tokens: int


class Writer(Policy):
    """Propose edits by a language model, given how that model reads, writes and is trained."""

    lm: Any  # the model itself
    length: int  # the most tokens that it reads at once
    slots: Slots
    tokens: list[int]  # that stand for the options of a slot

    @abstractmethod
    def encode(self, text: str) -> list[int]: ...

    @abstractmethod
    def behind(self, what: str, document: Document, count: int) -> list[list[int]]:
        """Return the tokens behind which ``count`` texts of a kind are written, or behind which a
        ``directive`` is drawn."""

    @abstractmethod
    def logits(self, ids: Sequence[int], allowed: Sequence[int]) -> Sequence[float]:
        """Return those of the tokens ``allowed``, as the one that follows ``ids``."""

    @abstractmethod
    def texts(self, prompts: Sequence[list[int]], seed: int) -> list[Text]:
        """Return what follows the prompts of an edit.  Raises RunError for a diverged model."""

    @abstractmethod
    def trained(self, rows: Sequence[Row], config: OuterConfig, seed: int) -> Any:
        """Return a copy of the model, trained on ``rows``.  Raises RunError if that diverges."""

    def set_slots(self, rates: Sequence[float], unknown_id: int | None, where: str) -> None:
        """Choose tokens of letters, which stand for the first, the second ... option of any slot.

        Raises ConfigError, which ``where`` begins, for a tokenizer with too few.
        """
        self.slots = edits.slots(rates, self.ops)
        found = [ids[-1] for letter in string.ascii_letters if (ids := self.encode(letter))]
        tokens = list(dict.fromkeys(token for token in found if token != unknown_id))
        most = max(map(len, self.slots.values()))
        if len(tokens) < most:
            raise ConfigError(
                f"{where}: the tokenizer has {len(tokens)} letters; a policy needs {most}"
            )
        self.tokens = tokens[:most]

    def propose(
        self, document: Document, count: int, *, seed: int, explore: float
    ) -> list[Proposal]:
        (prefix,) = self.behind("directive", document, 1)
        found = []
        for one in [seed_of(seed, document.sha256, n) for n in range(count)]:
            rng = np.random.default_rng(one)
            edit, drawn = edits.decode(self.logits, prefix, self.slots, self.tokens, explore, rng)
            text = self.with_text(edit, document, seed=one)
            read, wrote = text.prompt_tokens + len(prefix), text.tokens + len(drawn)
            found.append(Proposal(text.edit, read, wrote))
        return found

    def with_text(self, edit: SelfEdit, document: Document, *, seed: int) -> Proposal:
        prompts = self.prompts(edit, document)
        texts = self.texts(prompts, seed) if prompts else []
        written = dataclasses.replace(edit, text=[text.text for text in texts])
        return Proposal(written, sum(map(len, prompts)), sum(text.tokens for text in texts))

    def prompts(self, edit: SelfEdit, document: Document) -> list[list[int]]:
        """Return the tokens behind which each text is written; none if none is needed.

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
    ) -> Writer:
        rows = self.rows(examples, config.tokens_per_step)
        if not rows:
            return self
        model = self.trained(rows, config, seed_of(seed, "sft"))
        return self.with_model(model, self.sft_tokens + config.steps * config.tokens_per_step)

    def rows(
        self, examples: Sequence[tuple[Document, SelfEdit]], tokens_per_step: int
    ) -> list[Row]:
        """Return what ``sft`` trains on: of each edit the directive, and each of its texts."""
        found: list[Row] = []
        for document, edit in examples:
            written = [edits.directive_tokens(edit, self.slots, self.tokens)]
            written += map(self.encode, edit.text)
            given = [*self.behind("directive", document, 1), *self.prompts(edit, document)]
            for pair in zip(given, written, strict=True):
                found += learned_rows(*pair, min(self.length, tokens_per_step))
        return found

    def with_model(self, model: Any, sft_tokens: int) -> Writer:
        new = copy.copy(self)
        new.lm, new.sft_tokens = model, sft_tokens
        return new

    def save(self, folder: Path) -> None:
        with replacing(folder / "policy.safetensors") as temporary:
            save_model(self.lm, str(temporary), {"sft_tokens": str(self.sft_tokens)})

    def load(self, folder: Path) -> Writer:
        path, model = folder / "policy.safetensors", copy.deepcopy(self.lm)
        try:
            load_model(model, path)
            with safe_open(path, "pt") as file:
                return self.with_model(model, int(file.metadata()["sft_tokens"]))
        except (OSError, SafetensorError, RuntimeError, TypeError, LookupError) as error:
            raise ConfigError(f"{path}: not a policy that the model of {self.model} was") from error


def fine_tune(
    model: Any,
    forward: Callable[[Tensor, Tensor], Tensor],
    rows: Sequence[Row],
    config: OuterConfig,
    seed: int,
) -> None:
    """Train ``model`` on ``rows``, as ``training`` does.  Raises RunError if it diverges."""
    rate = config.learning_rate
    losses = training(model, forward, rows, rate, config.lora, config.tokens_per_step, seed)
    for step, loss in enumerate(itertools.islice(losses, config.steps), start=1):
        if not math.isfinite(loss):
            line = f"outer.learning_rate={rate}: the policy's training diverged at step {step}"
            raise RunError(line)


def learned_rows(given: Sequence[int], written: Sequence[int], length: int) -> Iterator[Row]:
    """Yield rows of ``length`` targets at most, of which only the tokens written count.

    Before them stands as much as fits of what they were written behind, one token at least.
    """
    for first in range(0, len(written), length):
        some = written[first : first + length]
        before = [*given, *written[:first]][-(length + 1 - len(some)) :]
        yield Row([*before, *some], [0] * (len(before) - 1) + [1] * len(some))


# --- the base itself


class OwnPolicy(Writer):
    """The model that adapts.  It cannot follow instructions: behind the document's context it
    draws a directive, and texts are what it continues parts of that context with."""

    backend = "self"

    def __init__(self, run: TrainedRun, config: SelfPolicy, rates: Sequence[float]) -> None:
        """Raises ConfigError for a tokenizer without enough letters."""
        self.run, self.lm, self.model = run, run.model, str(run.path)
        self.parameters = sum(weight.numel() for weight in run.model.parameters())
        self.length = run.model.config.max_seq_len
        self.sampling = Sampling(temperature=config.temperature, top_k=config.top_k)
        self.max_edit_tokens = config.max_edit_tokens
        tokenizer = run.tokenizer
        self.set_slots(rates, tokenizer.unknown_id, f"tokenizer.kind={tokenizer.kind}")

    def encode(self, text: str) -> list[int]:
        return self.run.tokenizer.encode(text)

    def behind(self, what: str, document: Document, count: int) -> list[list[int]]:
        """Return evenly spread chunks; one alone is the end of the context, which says least of
        what follows it.  A short context is a chunk itself."""
        ids = document.context_ids
        if what == "directive":  # whose last token is not read
            return [ids[-max(1, self.length + 1 - len(self.slots)) :]]
        size = min(len(ids), max(1, self.length // 2))
        starts = np.linspace(len(ids) - size, 0, count).round().astype(int).tolist()
        return [ids[start : start + size] for start in starts]

    @torch.no_grad()
    def logits(self, ids: Sequence[int], allowed: Sequence[int]) -> Sequence[float]:
        read = torch.tensor([ids[-self.length :]], device=self.lm.output_weight.device)
        last: list[float] = self.lm.logits(self.lm.hidden(read)[0, -1])[list(allowed)].tolist()
        return last

    def texts(self, prompts: Sequence[list[int]], seed: int) -> list[Text]:
        """Return all, written side by side: the prompts of a document are of one length."""
        tokenizer, seeds = self.run.tokenizer, [seed_of(seed, n) for n in range(len(prompts))]
        run = dataclasses.replace(self.run, model=self.lm)
        steps = run.stream(prompts, seeds, self.max_edit_tokens, self.sampling)
        rows = zip(*(step.tokens.tolist() for step in steps), strict=True)
        new = [list(itertools.takewhile(tokenizer.eot_id.__ne__, row)) for row in rows]
        return [Text(tokenizer.decode(row), len(row)) for row in new]

    def trained(self, rows: Sequence[Row], config: OuterConfig, seed: int) -> GPT:
        model = trainable_copy(self.lm, config.lora, seed)
        fine_tune(model, logits_of(model), rows, config, seed)
        if config.lora.rank is None:
            return model
        plain = GPT(model.config, model.vocab_size).to(model.output_weight)
        plain.load_state_dict(merged(model.state_dict(), config.lora))
        return plain.eval()


# --- a file


class ReplayPolicy(Policy):
    """Edits that were written before, a JSON object a line.

    Each has an ``edit`` and whose it is: ``doc_sha256``, the SHA-256 of the document's text, or
    ``doc_id`` alone.  It may say what the edit cost, in ``prompt_tokens`` and ``tokens``; other
    keys are ignored.
    """

    backend = "file"

    def __init__(self, path: str, documents: Sequence[Document] = ()) -> None:
        """Raises ConfigError, naming the number of a line that is none, and if one of
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
        for document in documents:
            self._of(document)

    def _of(self, document: Document) -> list[Proposal]:
        for name in (document.sha256, document.doc_id):
            if name in self._proposals:
                return self._proposals[name]
        line = f"policy.path={self.model}: has no edit of the document {document.doc_id}"
        raise ConfigError(line)

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
