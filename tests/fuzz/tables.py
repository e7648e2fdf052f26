"""What laws are fitted to: tables from elsewhere, conditions on them, records of adaptations."""

from __future__ import annotations

import functools
from functools import partial

import pandas as pd

from tests.fuzz.harness import SEEDS, Harness, file_of
from tinygpt import fit
from tinygpt.adaptation import analysis
from tinygpt.adaptation.records import read_records, repair
from tinygpt.scaling.columns import Columns
from tinygpt.scaling.elsewhere import Table
from tinygpt.scaling.laws import LAWS
from tinygpt.scaling.points import Points
from tinygpt.scaling.runs import comparable


def read(suffix: str, data: bytes) -> Table:
    named = fit.TableColumns(n="params", d="tokens", loss="loss")
    units = fit.TableUnits(n=1.0, d=1.0)  # damaged counts are to reach the law
    path = str(file_of(f"table{suffix}", data))
    return fit._read(fit.Arguments(table=path, columns=named, units=units))


def points(table: pd.DataFrame, columns: Columns) -> None:
    """What a law goes through."""
    Points.read(table, LAWS["chinchilla"], {"N": columns.n, "D": columns.d}, columns.loss)


def table(data: bytes) -> None:
    found = read(".csv", data)
    points(found.runs, found.columns)


def units(data: bytes) -> None:
    """Whether the values are plain counts."""
    named = fit.TableColumns(n="params", d="tokens", loss="loss")
    fit._read(fit.Arguments(table=str(file_of("table.csv", data)), columns=named))


@functools.cache
def valid() -> Table:
    return read(".csv", (SEEDS / "table_csv" / "valid").read_bytes())


def where(data: bytes) -> None:
    condition = data.decode("utf-8", "surrogateescape")
    comparable(valid().runs, valid().columns.loss, condition)


def lines_of_records(data: bytes) -> None:
    read_records(file_of("adapted/lines.jsonl", data))


def records(data: bytes) -> None:
    """As a table."""
    path = file_of("adapted/adapt.jsonl", data)
    analysis.load_records(path.parent)


def records_to_go_on_with(data: bytes) -> None:
    path = file_of("begun/adapt.jsonl", data)
    repair(path)
    read_records(path)


HARNESSES = [
    Harness("table_csv", "csv", partial(read, ".csv")),
    Harness("table_parquet", "bytes", partial(read, ".parquet")),
    Harness("table_jsonl", "jsonl", partial(read, ".jsonl")),
    Harness("table_xlsx", "zip", partial(read, ".xlsx")),
    Harness("table_units", "csv", units, seeds_of="table_csv"),
    Harness("table_points", "csv", table, seeds_of="table_csv"),
    Harness("table_where", "bytes", where),
    Harness("records", "jsonl", lines_of_records),
    Harness("records_table", "jsonl", records, seeds_of="records"),
    Harness("records_begun", "jsonl", records_to_go_on_with),
]
