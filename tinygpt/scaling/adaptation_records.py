"""``adapt.jsonl`` → one table, a row a record: a method, a document, a seed, k inner steps."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tinygpt.config import ConfigError
from tinygpt.fileio import parse_object
from tinygpt.scaling.runs import is_number

LOG = "adapt.jsonl"
RAW = "lora_doc"  # what every method is compared with: the same inner loop on the raw document
REFERENCES = ("none", RAW, "oracle", "full_ft_doc")  # no edits of the model's own choice
REMOVED = ("uniform_directive", "fixed_best_directive")  # methods of earlier versions
BASE = ["task", "base_parameters"]
WHOLE = ("base_parameters", "iteration", "lora_rank", "inner_steps", "seed")
NUMBERS = (
    *("reward", "forgetting", "accuracy_before", "accuracy_after", "lr", "flops_est"),
    *("tokens_processed", "policy_prompt_tokens", "policy_tokens", "sft_tokens", "times_proposed"),
)
TEXTS = ("run_id", "task", "split", "method", "doc_sha256", "edit_id", "error")
NEEDED = (*TEXTS, *WHOLE, *NUMBERS, "accepted")


def load_records(*folders: str | Path) -> pd.DataFrame:
    """Every record of the ``adapt.jsonl`` under ``folders``: a row a record, ``folder`` last.

    ``attrs`` count what is not in it: ``torn`` last lines of a study that was killed, ``repeated``
    records, found in several runs, and those of ``removed`` methods.  Raises ConfigError for a line
    that is no record and for one ``run_id`` with two rewards.
    """
    paths = {path.resolve(): path for one in folders for path in sorted(Path(one).rglob(LOG))}
    rows: list[dict[str, Any]] = []
    torn = 0
    for path in paths.values():
        found, cut = _read(path)
        rows += [{**row, "folder": str(path.parent)} for row in found]
        torn += cut
    if not rows:
        raise ConfigError(f"runs={','.join(map(str, folders))}: no record of an adaptation yet")
    table = _typed(pd.DataFrame(rows))
    old = table["method"].isin(REMOVED)
    table = table[~old]
    once = table.drop_duplicates(["run_id", "reward"], ignore_index=True)
    twice = once[once["run_id"].duplicated(keep=False)].sort_values("run_id")
    if len(twice):
        one, other = twice.iloc[0], twice.iloc[1]
        raise ConfigError(
            f"run_id={one['run_id']}: reward {one['reward']:g} in {one['folder']} "
            f"and {other['reward']:g} in {other['folder']}"
        )
    once.attrs = {"torn": torn, "repeated": len(table) - len(once), "removed": int(old.sum())}
    return once


def _read(path: Path) -> tuple[list[dict[str, Any]], bool]:
    """The records, and whether a torn line follows them."""
    lines = path.read_bytes().split(b"\n")
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            row = parse_object(line.decode())
        except ValueError as error:
            if number == len(lines):  # no line end: it was being written
                return rows, bool(line.strip())
            raise ConfigError(f"{path}: line {number} is not JSON ({error})") from error
        missing = [name for name in NEEDED if name not in row]
        if missing:
            raise ConfigError(f"{path}: line {number} has no {missing[0]}")
        strange = [name for name in NEEDED if not _is_of_its_kind(name, row[name])]
        if strange:
            name = strange[0]
            raise ConfigError(f"{path}: line {number}: {name}={row[name]!r:.40} is of another kind")
        rows.append(row)
    return rows, False


def _is_of_its_kind(name: str, value: Any) -> bool:
    if value is None:
        return True
    if name in TEXTS:
        return isinstance(value, str)
    if name in WHOLE:
        return type(value) is int and abs(value) < 2**63
    return type(value) is bool if name == "accepted" else is_number(value)


def _typed(table: pd.DataFrame) -> pd.DataFrame:
    table = table.assign(**{name: pd.to_numeric(table[name]) for name in (*WHOLE, *NUMBERS)})
    table = table.astype({**dict.fromkeys(WHOLE, "Int64"), "accepted": "boolean"})
    table = table.astype(dict.fromkeys(NUMBERS, float))
    measured = np.isfinite(table["reward"]) & np.isfinite(table["forgetting"])
    table["error"] = table["error"].astype(object).mask(table["error"].isna(), None)
    return table.assign(error=table["error"].mask(~measured & table["error"].isna(), "not finite"))


def by_order(methods: Iterable[str]) -> list[str]:
    """References first and last, iterations by number."""
    first = ["none", RAW, "lora_edit", "lora_doc+edit"]
    last = ["oracle", "full_ft_doc"]

    def place(name: str) -> tuple[int, int, str]:
        if name in first:
            return 0, first.index(name), name
        return 2 if name in last else 1, len(name), name

    return sorted(set(methods), key=place)
