"""What laws are fitted to: tables from elsewhere, conditions on them, records of adaptations."""

from __future__ import annotations

from functools import partial

from tests.fuzz.harness import SEEDS, Harness, file_of
from tinygpt import fit
from tinygpt.adaptation.records import RecordsFile
from tinygpt.scaling.adaptation_records import load_records
from tinygpt.scaling.laws import LAWS
from tinygpt.scaling.points import Points
from tinygpt.scaling.runs import comparable


def table(suffix: str, data: bytes, where: str | None = None) -> None:
    """Up to the points that a law goes through."""
    path = file_of(f"table{suffix}", data)
    named = fit.TableColumns(n="params", d="tokens", loss="loss")
    found, columns, _ = fit._read(fit.Arguments(table=str(path), columns=named))
    used, _ = comparable(found, columns.loss, where)
    Points.read(used, LAWS["chinchilla"], {"N": columns.n, "D": columns.d}, columns.loss)


def where(data: bytes) -> None:
    valid = next((SEEDS / "table_csv").iterdir()).read_bytes()
    table(".csv", valid, data.decode("utf-8", "surrogateescape"))


def records(data: bytes) -> None:
    path = file_of("adapted/adapt.jsonl", data)
    load_records(path.parent)


def records_to_go_on_with(data: bytes) -> None:
    file = RecordsFile(file_of("begun/adapt.jsonl", data))
    file.read()
    file.mend()
    file.read()


HARNESSES = [
    Harness("table_csv", "csv", partial(table, ".csv")),
    Harness("table_parquet", "bytes", partial(table, ".parquet")),
    Harness("table_where", "bytes", where),
    Harness("records", "jsonl", records),
    Harness("records_begun", "jsonl", records_to_go_on_with),
]
