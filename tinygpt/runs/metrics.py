"""Read and append ``metrics.csv``, the log of a run, without torch."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from tinygpt import fileio
from tinygpt.config import ConfigError

METRICS = (
    *("step", "tokens", "seconds", "train_loss", "learning_rate", "grad_norm", "grad_norm_max"),
    *("skipped_steps", "loss_scale", "tokens_per_second", "peak_memory_bytes", "val_loss"),
    *("val_perplexity", "val_accuracy", "val_bits_per_byte", "val_bits_per_char"),
)
# as repr writes numbers
_NUMBER = r"(?:-?[0-9]{1,18}(?:\.[0-9]{1,30})?(?:e[-+]?[0-9]{1,3})?|nan|-?inf)?"
_ROW = re.compile(rf"{_NUMBER}(?:,{_NUMBER})*")


class MetricsFile:
    """Read and append metrics; an empty field was not measured."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def keep_until(self, step: int) -> None:
        """Make the file, or drop the lines after ``step``."""
        rows = self.read() if self.path.exists() else []
        kept = [row for row in rows if row["step"].isdecimal() and int(row["step"]) <= step]
        lines = [",".join(METRICS), *(",".join(row[name] for name in METRICS) for row in kept)]
        fileio.write_text(self.path, "\n".join(lines) + "\n")

    def read(self) -> list[dict[str, str]]:
        columns = self.columns()
        return [dict(zip(METRICS, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def columns(self) -> dict[str, Sequence[str]]:
        """Return the columns of all complete lines; a missing column is empty.

        Raises ConfigError, naming the file, if it holds no metrics.
        """
        try:
            with self.path.open(newline="", encoding="utf-8") as file:
                lines = [line for line in file if line.endswith("\n")]
            header = next(csv.reader(lines), list(METRICS))
        except (ValueError, csv.Error) as error:
            raise ConfigError(f"{self.path}: not the metrics of a run ({error})") from error
        if "step" not in header or len(set(header)) < len(header):
            raise ConfigError(f"{self.path}: not the metrics of a run (other columns)")
        lines = [line.rstrip("\r\n") for line in lines[1:]]
        for number, line in enumerate(lines, start=2):
            if not _ROW.fullmatch(line):
                strange = next(v for v in line.split(",") if not re.fullmatch(_NUMBER, v))
                raise ConfigError(f"{self.path}: line {number}: {strange!r:.40} is not a number")
        rows = [line.split(",") for line in lines]
        whole = [row for row in rows if len(row) == len(header)]
        there = dict(zip(header, zip(*whole, strict=True), strict=True)) if whole else {}
        return {name: there.get(name, ("",) * len(whole)) for name in METRICS}

    def append(self, row: Mapping[str, float | int | None]) -> None:
        values = ["" if row.get(name) is None else repr(row[name]) for name in METRICS]
        fileio.append(self.path, (",".join(values) + "\n").encode())
