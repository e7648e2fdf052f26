"""Read and write the JSON lines of ``adapt.jsonl`` (records) and ``edits.jsonl``.  Torch-free."""

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
# Fields that the analysis and a resumed study need, by type; each may be null.
WHOLE = ("base_parameters", "iteration", "lora_rank", "inner_steps", "seed")
NUMBERS = (
    *("reward", "forgetting", "accuracy_before", "accuracy_after", "lr", "flops_est"),
    *("tokens_processed", "policy_prompt_tokens", "policy_tokens", "sft_tokens", "times_proposed"),
)
TEXTS = ("run_id", "task", "split", "method", "doc_sha256", "edit_id", "error")
TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(TEXTS, (str,)),
    **dict.fromkeys(WHOLE, (int,)),
    **dict.fromkeys(NUMBERS, (int, float)),
    "accepted": (bool,),
}


def append(path: Path, rows: Sequence[Record]) -> None:
    """Append all rows or none, and wait until they are on disk."""
    lines = (json.dumps(row, allow_nan=False) + "\n" for row in rows)
    fileio.append(path, "".join(lines).encode(), sync=True)


def repair(path: Path) -> None:
    """Remove an incomplete last line; call this before any ``append``."""
    if path.exists():
        with fileio.naming(path), path.open("rb+") as file:
            file.truncate(file.read().rfind(b"\n") + 1)


def read_lines(path: Path) -> tuple[list[Record], bool]:
    """Return the objects in a file and whether a torn line follows, or raise ConfigError."""
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    rows: list[Record] = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(fileio.parse_object(line.decode()))
        except ValueError as error:
            if number == len(lines):  # the process was killed while writing it
                return rows, bool(line.strip())
            raise ConfigError(f"{path}: line {number} is not JSON ({error})") from error
    return rows, False


def read_records(path: Path) -> tuple[list[Record], bool]:
    """Return the records in a file, as ``read_lines`` does.  Raise ConfigError for other lines."""
    rows, torn = read_lines(path)
    for number, row in enumerate(rows, start=1):
        for name in [name for name in TYPES if name not in row]:
            raise ConfigError(f"{path}: line {number} has no {name}")
        for name, types in TYPES.items():
            value = row[name]
            limit = {int: 2**63, float: math.inf}.get(type(value))  # more does not fit in a table
            holds = type(value) in types and not (limit and abs(value) >= limit)
            if value is not None and not holds:
                line = f"line {number}: {name}={value!r:.40} has the wrong type"
                raise ConfigError(f"{path}: {line}")
    return rows, torn
