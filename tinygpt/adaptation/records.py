"""The file of records: JSON, a line each; lines are whole or not there.  Torch-free."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tinygpt.config import ConfigError
from tinygpt.fileio import append, naming, parse_object

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


def blank() -> Record:
    """Every field, none of them known."""
    return dict.fromkeys(FIELDS)


class LinesFile:
    """JSON objects, a line each.  One process writes it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def mend(self) -> None:
        """Cuts off a last line that was torn, which will be written anew; before any ``append``."""
        if self.path.exists():
            with naming(self.path), self.path.open("rb+") as file:
                file.truncate(file.read().rfind(b"\n") + 1)

    def read(self) -> list[Record]:
        """Whole lines only; a torn last one is left out.  Raises ConfigError, naming the line, for
        what is no object."""
        if not self.path.exists():
            return []
        found = []
        *lines, _ = self.path.read_bytes().split(b"\n")
        for number, line in enumerate(lines, start=1):
            try:
                found.append(parse_object(line.decode()))
            except ValueError as error:
                raise ConfigError(f"{self.path}: line {number} is not JSON ({error})") from error
        return found

    def append(self, values: Sequence[Record], sync: bool = False) -> None:
        """All of them in one write, or none.  ``sync``: on the disk when it returns."""
        lines = [json.dumps(value, allow_nan=False) for value in values]
        content = "".join(f"{line}\n" for line in lines).encode()
        append(self.path, content, sync)


class RecordsFile(LinesFile):
    """``adapt.jsonl``."""

    def read(self) -> list[Record]:
        """As of any such file.  Raises ConfigError, naming the line, for what is no record."""
        found = super().read()
        for number, record in enumerate(found, start=1):
            if record.keys() != set(FIELDS) or not isinstance(record["run_id"], str):
                raise ConfigError(f"{self.path}: line {number} is not a record of an adaptation")
        return found
