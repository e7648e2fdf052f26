"""What laws are fitted to: tables from elsewhere, conditions on them, records of adaptations."""

from __future__ import annotations

import functools
from functools import partial

import pandas as pd

from tests.fuzz.harness import SEEDS, Harness, file_of
from tinygpt import fit
from tinygpt.adaptation.records import RecordsFile
from tinygpt.scaling import adaptation_records
from tinygpt.scaling.columns import Columns
from tinygpt.scaling.laws import LAWS
from tinygpt.scaling.points import Points
from tinygpt.scaling.runs import comparable


def read(suffix: str, data: bytes) -> tuple[pd.DataFrame, Columns]:
    named = fit.TableColumns(n="params", d="tokens", loss="loss")
    path = str(file_of(f"table{suffix}", data))
    table, columns, _ = fit._read(fit.Arguments(table=path, columns=named))
    return table, columns


def points(table: pd.DataFrame, columns: Columns, where: str | None = None) -> None:
    """What a law goes through."""
    used, _ = comparable(table, columns.loss, where)
    Points.read(used, LAWS["chinchilla"], {"N": columns.n, "D": columns.d}, columns.loss)


def table(data: bytes) -> None:
    points(*read(".csv", data))


@functools.cache
def valid() -> tuple[pd.DataFrame, Columns]:
    return read(".csv", (SEEDS / "table_csv" / "valid").read_bytes())


def where(data: bytes) -> None:
    points(*valid(), data.decode("utf-8", "surrogateescape"))


def lines_of_records(data: bytes) -> None:
    adaptation_records._read(file_of("adapted/lines.jsonl", data))


def records(data: bytes) -> None:
    """As a table."""
    path = file_of("adapted/adapt.jsonl", data)
    adaptation_records.load_records(path.parent)


def records_to_go_on_with(data: bytes) -> None:
    file = RecordsFile(file_of("begun/adapt.jsonl", data))
    file.read()
    file.mend()
    file.read()


HARNESSES = [
    Harness("table_csv", "csv", partial(read, ".csv")),
    Harness("table_parquet", "bytes", partial(read, ".parquet")),
    Harness("table_points", "csv", table, seeds_of="table_csv"),
    Harness("table_where", "bytes", where),
    Harness("records", "jsonl", lines_of_records),
    Harness("records_table", "jsonl", records, seeds_of="records"),
    Harness("records_begun", "jsonl", records_to_go_on_with),
]
