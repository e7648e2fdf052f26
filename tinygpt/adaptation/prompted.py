"""Policies of a language model that reads instructions, from a local folder: how it is asked.

The prompts follow those of Zweiger et al. 2025 (implications, rewrite, self-qa), in other words.
"""

from __future__ import annotations

import itertools
import re
import sys
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tinygpt.adaptation import edits
from tinygpt.adaptation.config import ModelPolicy
from tinygpt.adaptation.documents import Document
from tinygpt.adaptation.edits import TEXT_OPS
from tinygpt.adaptation.writers import Text, Writer, seed_of
from tinygpt.config import ConfigError
from tinygpt.fileio import read_json

Frame = tuple[str, str]  # what stands before the document in a prompt, and behind it
FRAMES: dict[str, Frame] = {
    "continue": ("", ""),
    "restate": (
        "Text:\n",
        "\n\nThe same in other words, and what follows from it, one statement a line:\n",
    ),
    "qa": (
        "Text:\n",
        "\n\nQuestions that the text answers, one a line, each with its answer:\n",
    ),
}
QUESTIONS = {
    "source": "What it reads: the text (doc), new text about it (edit) or both",
    "text_ops": "The new text goes on (continue), says the same (restate) or asks (qa)",
    "n": "How many new texts of each kind",
    "aug": "What is altered in copies",
    "lr": "Learning rate",
    "mask": "What counts: all, or the second half of each sequence",
}
ANSWER = re.compile(r"\s*\n\s*(?=(?:Answer|A):)")  # on a line of its own it would be learned alone


class PromptedPolicy(Writer):
    """Its tokenizer is one of transformers; so are those of mlx_lm."""

    ops: Sequence[str] = TEXT_OPS

    def __init__(self, config: ModelPolicy, rates: Sequence[float], tokenizer: Any) -> None:
        """Raises ConfigError where the prompts and the text do not fit into the context, and for
        a tokenizer without enough letters."""
        self.model, self.config, self.tokenizer = config.path, config, tokenizer
        self.length = _context(config.path)
        self.slots = edits.slots(rates, self.ops)
        where = f"policy.path={config.path}"
        most = max(len(slot.options) for slot in self.slots)
        self.tokens = edits.option_tokens(self.encode, tokenizer.unk_token_id, most, where)
        self.frames = FRAMES | {"directive": self._questions()}
        room = min(map(self._room, self.frames))
        if room < 1:
            raise ConfigError(
                f"{where}: its context of {self.length} tokens is too short; prompts and "
                f"policy.max_edit_tokens={config.max_edit_tokens} take {self.length - room}"
            )

    def _questions(self) -> Frame:
        letters = [self.tokenizer.decode([token]).strip() for token in self.tokens]
        asked = ""
        for slot in self.slots:
            said = ["+".join(o) if isinstance(o, list) else str(o) for o in slot.options]
            options = ", ".join(f"{a} = {o}" for a, o in zip(letters, said, strict=False))
            asked += f"{QUESTIONS[slot.name]}: {options}\n"
        before = "\n\nHow does a language model best learn this text?\n"
        return "Text:\n", f"{before}{asked}The letters of the best choices, in this order: "

    def _room(self, name: str) -> int:
        """How many tokens of a document a prompt can have."""
        written = len(self.slots) if name == "directive" else self.config.max_edit_tokens
        return self.length - written - len(self._prompt(name, []))

    def _prompt(self, name: str, document: Sequence[int]) -> list[int]:
        begin = self.tokenizer.bos_token_id
        before, behind = map(self.encode, self.frames[name])
        return [*([] if begin is None else [begin]), *before, *document, *behind]

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False, verbose=False)
        return ids

    def prefix(self, document: Document) -> list[int]:
        return self.behind("directive", document, 1)[0]

    def behind(self, op: str, document: Document, count: int) -> list[list[int]]:
        """The end of a document that is too long."""
        return [self._prompt(op, self.encode(document.context)[-self._room(op) :])] * count

    def texts(
        self, prompts: Sequence[Sequence[list[int]]], seeds: Sequence[int]
    ) -> list[list[Text]]:
        found = []
        for some, seed in zip(prompts, seeds, strict=True):
            groups = [(prompt, len(list(same))) for prompt, same in itertools.groupby(some)]
            each = [self.continued(ids, count, seed_of(seed, ids)) for ids, count in groups]
            found.append([Text(ANSWER.sub(" ", text), n) for texts in each for text, n in texts])
        return found

    @abstractmethod
    def continued(self, prompt: list[int], count: int, seed: int) -> list[Text]:
        """So many texts behind one prompt."""


def read_config(path: str) -> dict[str, Any]:
    """``config.json`` of a local folder.  Raises ConfigError where there is none."""
    folder, where = Path(path).expanduser(), f"policy.path={path}"
    if not folder.is_dir():
        raise ConfigError(f"{where}: no such folder")
    if not (folder / "config.json").exists():
        raise ConfigError(f"{where}: not the folder of a model, as it has no config.json")
    try:
        values: dict[str, Any] = read_json(folder / "config.json")
    except ConfigError as error:
        raise ConfigError(f"{where}: not the folder of a model ({error})") from error
    return values


def _context(path: str) -> int:
    """The most tokens that the model reads at once; without a limit in its file there is none."""
    values = read_config(path)
    found = values.get("max_position_embeddings") or values.get("n_positions") or sys.maxsize
    if type(found) is not int or found < 1:
        raise ConfigError(
            f"policy.path={path}: max_position_embeddings={found!r:.40}: must be a whole number"
        )
    return found
