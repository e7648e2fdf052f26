"""``adapt.jsonl``: a JSON object a line, as a study writes it and as an analysis reads it.

Free of torch and pandas.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tinygpt import fileio
from tinygpt.config import ConfigError

Record = dict[str, Any]
FIELDS = (
    *("run_id", "git_commit", "seed", "task", "method", "iteration"),
    *("doc_id", "doc_sha256", "split", "edit_id", "edit", "edit_text_sha256"),
    *("inner_steps", "lora_rank", "lora_alpha", "lora_params", "lr", "batch_tokens"),
    *("policy_backend", "policy_model", "policy_prompt_tokens", "policy_tokens"),
    *("edit_train_tokens", "tokens_processed", "eval_tokens", "sft_tokens", "flops_est"),
    *("base_parameters", "heldout_before", "heldout_after", "delta_val_loss", "reward"),
    *("base_before", "base_after", "forgetting", "accuracy_before", "accuracy_after"),
    *("train_loss_first", "train_loss_last", "doc_unknown_tokens", "edit_unknown_tokens"),
    *("times_proposed", "accepted", "wall_s", "cpu_s", "device", "error"),
)
# What an analysis needs of them, by kind.
WHOLE = ("base_parameters", "iteration", "lora_rank", "inner_steps", "seed")
NUMBERS = (
    *("reward", "forgetting", "accuracy_before", "accuracy_after", "lr", "flops_est"),
    *("tokens_processed", "policy_prompt_tokens", "policy_tokens", "sft_tokens", "times_proposed"),
)
TEXTS = ("run_id", "task", "split", "method", "doc_sha256", "edit_id", "error")
NEEDED = (*TEXTS, *WHOLE, *NUMBERS, "accepted")


class LinesFile:
    """JSON objects, a line each; lines are whole or not there.  One process writes it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def repair(self) -> None:
        """Cut off a torn last line, which will be written anew; before any ``append``."""
        if self.path.exists():
            with fileio.naming(self.path), self.path.open("rb+") as file:
                file.truncate(file.read().rfind(b"\n") + 1)

    def read(self) -> list[Record]:
        """Return the whole lines.  Raises ConfigError, naming the line, for what is no object."""
        if not self.path.exists():
            return []
        found = []
        *lines, _ = self.path.read_bytes().split(b"\n")
        for number, line in enumerate(lines, start=1):
            try:
                found.append(fileio.parse_object(line.decode()))
            except ValueError as error:
                raise ConfigError(f"{self.path}: line {number} is not JSON ({error})") from error
        return found

    def append(self, values: Sequence[Record]) -> None:
        """Write all of them at once or none; they are on the disk when it returns."""
        lines = [json.dumps(value, allow_nan=False) for value in values]
        fileio.append(self.path, "".join(f"{line}\n" for line in lines).encode(), sync=True)


class RecordsFile(LinesFile):
    """``adapt.jsonl``."""

    def read(self) -> list[Record]:
        """Also raises ConfigError, naming the line, for what is no record."""
        found = super().read()
        for number, record in enumerate(found, start=1):
            if record.keys() != set(FIELDS) or not isinstance(record["run_id"], str):
                raise ConfigError(f"{self.path}: line {number} is not a record of an adaptation")
        return found


def read_records(path: Path) -> tuple[list[dict[str, Any]], bool]:
    """Return the records, and whether a torn line follows them."""
    lines = path.read_bytes().split(b"\n")
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            row = fileio.parse_object(line.decode())
        except ValueError as error:
            if number == len(lines):  # no line end: it was being written
                return rows, bool(line.strip())
            raise ConfigError(f"{path}: line {number} is not JSON ({error})") from error
        for name in NEEDED:
            if name not in row:
                raise ConfigError(f"{path}: line {number} has no {name}")
        for name in NEEDED:
            if not _is_of_its_kind(name, row[name]):
                value = f"{row[name]!r:.40}"
                raise ConfigError(f"{path}: line {number}: {name}={value} is of another kind")
        rows.append(row)
    return rows, False


def _is_of_its_kind(name: str, value: Any) -> bool:
    if value is None:
        return True
    if name in TEXTS:
        return isinstance(value, str)
    if name == "accepted":
        return type(value) is bool
    kinds = (int,) if name in WHOLE else (int, float)
    return type(value) in kinds and abs(value) < (2**63 if type(value) is int else math.inf)
