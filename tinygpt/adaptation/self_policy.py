"""The base as its own policy."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from tinygpt.adaptation import edits
from tinygpt.adaptation.config import InnerConfig, OuterConfig, WritingPolicy
from tinygpt.adaptation.documents import Document
from tinygpt.adaptation.edits import Row
from tinygpt.adaptation.inner import Score, adapt, merge
from tinygpt.adaptation.writers import Text, Writer, seed_of
from tinygpt.config import ConfigError, RunError, Sampling
from tinygpt.fileio import replacing
from tinygpt.model.gpt import GPT
from tinygpt.trained import TrainedRun


class OwnPolicy(Writer):
    """The model that adapts.  It cannot follow instructions: behind the document's context it
    draws a directive, and texts are what it continues parts of that context with."""

    backend = "self"
    ops: Sequence[str] = ("continue",)

    def __init__(self, run: TrainedRun, config: WritingPolicy, rates: Sequence[float]) -> None:
        """Raises ConfigError for a tokenizer without enough letters."""
        self.run = run
        self.model = str(run.path)
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
        """The last token of a directive is not read."""
        return document.context_ids[-max(1, self.length + 1 - len(self.slots)) :]

    def behind(self, op: str, document: Document, count: int) -> list[list[int]]:
        """Chunks, evenly spread; one alone is the end of the context, which says least of what
        follows it.  A short context is a chunk itself."""
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
        """All side by side: those of a document are of one length."""
        pairs = zip(prompts, seeds, strict=True)
        flat = [(ids, seed_of(seed, n)) for some, seed in pairs for n, ids in enumerate(some)]
        found = iter(self._continued(*zip(*flat, strict=True)) if flat else [])
        return [list(itertools.islice(found, len(some))) for some in prompts]

    def _continued(self, prompts: Sequence[list[int]], seeds: Sequence[int]) -> list[Text]:
        tokenizer = self.run.tokenizer
        steps = self.run.stream(prompts, seeds, self.max_edit_tokens, self.sampling)
        columns = [step.tokens.tolist() for step in steps]
        rows = [
            list(itertools.takewhile(tokenizer.eot_id.__ne__, row))
            for row in zip(*columns, strict=True)
        ]
        return [Text(tokenizer.decode(row), len(row)) for row in rows]

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
        plain = found.model if config.lora.rank is None else merge(found.model, config.lora)
        return self._with(plain)

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
