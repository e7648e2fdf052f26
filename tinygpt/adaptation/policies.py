"""Propose edits by the base itself or from a file; ``prompted`` has models that read instructions.

A language model draws a directive slot by slot, then writes the texts that it asks for.  A small
model cannot be told to write JSON, so each option of a slot is represented by one token and only
these tokens can be chosen: any logits give a valid directive.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import string
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_model, save_model

from tinygpt.adaptation import edits
from tinygpt.adaptation.config import OuterConfig, SelfPolicy
from tinygpt.adaptation.documents import Document
from tinygpt.adaptation.edits import Policy, Proposal, Row, SelfEdit
from tinygpt.adaptation.inner import Forward, logits_of, seed_of, trainable_copy, training
from tinygpt.config import ConfigError, RunError, Sampling
from tinygpt.config.checks import require
from tinygpt.fileio import parse_json, replacing
from tinygpt.model.generate import NO_CHOICE
from tinygpt.model.gpt import GPT
from tinygpt.model.lora import merged
from tinygpt.runs.load import TrainedRun

Examples = Sequence[tuple[Document, SelfEdit]]  # successful edits

# --- any language model


class Writer(Policy):
    """Propose edits with a language model; subclasses say how it reads, writes and is trained."""

    lm: Any  # the model itself
    length: int  # of its context, in tokens
    slots: dict[str, list[Any]]  # the options of each slot, in the order of drawing
    tokens: list[int]  # which represent the options of any slot

    def encode(self, text: str) -> list[int]:
        raise NotImplementedError

    def behind(self, what: str, document: Document, count: int) -> list[list[int]]:
        """Return ``count`` prompts, in tokens, for texts of a kind or for the ``directive``."""
        raise NotImplementedError

    def logits(self, ids: Sequence[int], allowed: Sequence[int]) -> Sequence[float]:
        """Return the logits of the ``allowed`` tokens after ``ids``."""
        raise NotImplementedError

    def texts(self, prompts: Sequence[list[int]], seed: int) -> tuple[list[str], int]:
        """Return the texts after an edit's prompts and their number of tokens.  Raise RunError if
        the model has diverged."""
        raise NotImplementedError

    def trained(self, rows: Sequence[Row], config: OuterConfig, seed: int) -> Any:
        """Return a copy of the model, trained on ``rows``.  Raise RunError if that diverges."""
        raise NotImplementedError

    def set_slots(self, rates: Sequence[float], unknown_id: int | None, where: str) -> None:
        """Set the slots and the tokens of their options.  Raise ConfigError for too few letters."""
        sizes = range(1, len(self.ops) + 1)
        self.slots = {
            "source": list(edits.SOURCES),
            "text_ops": [list(some) for size in sizes for some in combinations(self.ops, size)],
            "n": [1, 2, 4],
            "aug": list(edits.AUGMENTATIONS),
            "lr": list(rates),
            "mask": list(edits.MASKS),
        }
        found = [ids[-1] for letter in string.ascii_letters if (ids := self.encode(letter))]
        tokens = list(dict.fromkeys(token for token in found if token != unknown_id))
        most = max(map(len, self.slots.values()))
        line = f"{where}: the tokenizer has {len(tokens)} letters; a policy needs {most}"
        require(len(tokens) >= most, line)
        self.tokens = tokens[:most]

    def draw(
        self, prefix: Sequence[int], explore: float, rng: np.random.Generator
    ) -> tuple[SelfEdit, list[int]]:
        """Return a directive drawn after ``prefix``, without text, and its tokens.

        Option probabilities are (1 - explore) · softmax(logits) + explore / number of options.
        Raises RunError if the logits are not finite.
        """
        values: dict[str, Any] = {}
        drawn: list[int] = []
        for name, options in self.slots.items():
            allowed = self.tokens[: len(options)]
            logits = np.asarray(self.logits([*prefix, *drawn], allowed), dtype=np.float64)
            if not np.isfinite(logits).all():
                raise RunError(NO_CHOICE)
            weights = np.exp(logits - logits.max())
            p = (1 - explore) * weights / weights.sum() + explore / len(allowed)
            number = int(rng.choice(len(allowed), p=p))
            drawn.append(allowed[number])
            values[name] = options[number]
        return SelfEdit(**values), drawn

    def directive(self, edit: SelfEdit) -> list[int]:
        """Return the tokens that represent the directive of an edit."""
        return [self.tokens[options.index(getattr(edit, k))] for k, options in self.slots.items()]

    def propose(self, document: Document, count: int, seed: int, explore: float) -> list[Proposal]:
        (prefix,) = self.behind("directive", document, 1)
        found = []
        for one in [seed_of(seed, document.sha256, n) for n in range(count)]:
            edit, drawn = self.draw(prefix, explore, np.random.default_rng(one))
            text = self.with_text(edit, document, seed=one)
            read, wrote = text.prompt_tokens + len(prefix), text.tokens + len(drawn)
            found.append(Proposal(text.edit, read, wrote))
        return found

    def with_text(self, edit: SelfEdit, document: Document, *, seed: int) -> Proposal:
        prompts = self.prompts(edit, document)
        texts, tokens = self.texts(prompts, seed) if prompts else ([], 0)
        return Proposal(dataclasses.replace(edit, text=texts), sum(map(len, prompts)), tokens)

    def prompts(self, edit: SelfEdit, document: Document) -> list[list[int]]:
        """Return the prompt of each text, in tokens."""
        if edit.source == "doc":
            return []
        return [prompt for op in edit.text_ops for prompt in self.behind(op, document, edit.n)]

    def sft(self, examples: Examples, config: OuterConfig, *, seed: int) -> Writer:
        """Return a new policy, trained to write these edits.  Raise RunError if it diverges."""
        rows: list[Row] = []
        for document, edit in examples:
            written = [self.directive(edit), *map(self.encode, edit.text)]
            given = [*self.behind("directive", document, 1), *self.prompts(edit, document)]
            for pair in zip(given, written, strict=True):
                rows += learned_rows(*pair, min(self.length, config.tokens_per_step))
        model = self.trained(rows, config, seed_of(seed, "sft"))
        return self.with_model(model, self.sft_tokens + config.steps * config.tokens_per_step)

    def with_model(self, model: Any, sft_tokens: int) -> Writer:
        new = copy.copy(self)
        new.lm, new.sft_tokens = model, sft_tokens
        return new

    def save(self, folder: Path) -> None:
        """Write what ``load`` needs into an existing folder."""
        with replacing(folder / "policy.safetensors") as temporary:
            save_model(self.lm, str(temporary), {"sft_tokens": str(self.sft_tokens)})

    def load(self, folder: Path) -> Writer:
        """Return the policy that ``save`` wrote.  Raise ConfigError if it does not fit."""
        path, model = folder / "policy.safetensors", copy.deepcopy(self.lm)
        try:
            load_model(model, path)
            with safe_open(path, "pt") as file:
                return self.with_model(model, int(file.metadata()["sft_tokens"]))
        except (OSError, SafetensorError, RuntimeError, TypeError, LookupError) as error:
            raise ConfigError(f"{path}: not a policy of the model {self.model}") from error


def fine_tune(
    model: Any, forward: Forward, rows: Sequence[Row], config: OuterConfig, seed: int
) -> None:
    """Train ``model`` on ``rows`` in place.  Raise RunError if it diverges."""
    rate = config.learning_rate
    losses = training(model, forward, rows, rate, config, seed)
    for step, loss in enumerate(itertools.islice(losses, config.steps), start=1):
        if not math.isfinite(loss):
            line = f"outer.learning_rate={rate}: the policy's training diverged at step {step}"
            raise RunError(line)


def learned_rows(given: Sequence[int], written: Sequence[int], length: int) -> Iterator[Row]:
    """Yield rows of at most ``length`` targets, of which only the tokens ``written`` count.

    They follow as much of their context as fits, at least one token.
    """
    for first in range(0, len(written), length):
        part = written[first : first + length]
        before = [*given, *written[:first]][-(length + 1 - len(part)) :]
        yield Row([*before, *part], given=len(before) - 1)


# --- the base itself


class OwnPolicy(Writer):
    """Propose edits with the model that adapts, which cannot follow instructions.

    It draws the directive after the document's context; its texts continue parts of the context.
    """

    backend = "self"

    def __init__(self, run: TrainedRun, config: SelfPolicy, rates: Sequence[float]) -> None:
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
        """Return evenly spaced chunks of the context, starting with the end of it."""
        ids = document.context_ids
        if what == "directive":  # whose last token is never read
            return [ids[-max(1, self.length + 1 - len(self.slots)) :]]
        size = min(len(ids), max(1, self.length // 2))
        starts = np.linspace(len(ids) - size, 0, count).round().astype(int).tolist()
        return [ids[start : start + size] for start in starts]

    @torch.no_grad()
    def logits(self, ids: Sequence[int], allowed: Sequence[int]) -> Sequence[float]:
        read = torch.tensor([ids[-self.length :]], device=self.lm.output_weight.device)
        last: list[float] = self.lm.logits(self.lm.hidden(read)[0, -1])[list(allowed)].tolist()
        return last

    def texts(self, prompts: Sequence[list[int]], seed: int) -> tuple[list[str], int]:
        tokenizer, seeds = self.run.tokenizer, [seed_of(seed, n) for n in range(len(prompts))]
        run = dataclasses.replace(self.run, model=self.lm)
        steps = run.stream(prompts, seeds, self.max_edit_tokens, self.sampling)
        rows = zip(*(step.tokens.tolist() for step in steps), strict=True)
        new = [list(itertools.takewhile(tokenizer.eot_id.__ne__, row)) for row in rows]
        return list(map(tokenizer.decode, new)), sum(map(len, new))

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
    """Replay edits from a file of JSON objects, one per line.

    Each has an ``edit`` and its document, by ``doc_sha256`` (of the text) or ``doc_id``, and may
    have costs ``prompt_tokens`` and ``tokens``; other keys are ignored.
    """

    backend = "file"

    def __init__(self, path: str, documents: Sequence[Document] = ()) -> None:
        """Raise ConfigError for an invalid line, and if a document has no edit."""
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

    def propose(self, document: Document, count: int, seed: int, explore: float) -> list[Proposal]:
        """Return edits in the order of the file, starting at the seed, without exploring."""
        found = self._of(document)
        return [found[(seed + n) % len(found)] for n in range(count)]

    def with_text(self, edit: SelfEdit, document: Document, *, seed: int) -> Proposal:
        """Return ``edit`` with the text of the document's first edit that has any."""
        if edit.source == "doc":
            return Proposal(dataclasses.replace(edit, text=[]))
        chosen = next((one for one in self._of(document) if one.edit.text), None)
        if chosen is None:
            where = f"policy.path={self.model}"
            raise RunError(f"{where}: has no text for the document {document.doc_id}")
        return dataclasses.replace(chosen, edit=dataclasses.replace(edit, text=chosen.edit.text))


def _read_proposal(line: bytes) -> tuple[str, Proposal]:
    """Return the name of the document in a line, and its edit."""
    try:
        values = parse_json(line.decode())
    except ValueError as error:
        raise ConfigError(f"not JSON ({error})") from error
    require(isinstance(values, dict) and "edit" in values, "must be an object with an edit")
    owner = values.get("doc_sha256") or values.get("doc_id")
    require(isinstance(owner, str), "must name the document, by doc_sha256 or doc_id")
    costs = {name: values.get(name, 0) for name in ("prompt_tokens", "tokens")}
    for name, value in costs.items():
        holds = type(value) is int and value >= 0
        require(holds, f"{name}={value!r:.60}: must be a number of tokens, at least 0")
    return owner, Proposal(edits.read(values["edit"]), **costs)
