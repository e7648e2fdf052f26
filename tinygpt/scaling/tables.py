"""Read tables of runs in common file formats, dialects and notations of numbers."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
import zipfile
from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tinygpt import fileio
from tinygpt.config import ConfigError, first_line
from tinygpt.scaling.runs import words_of

MOST_COLUMNS = 10_000
MOST_BYTES = 1 << 28  # of an unpacked table
PACKED = (".gz", ".bz2", ".xz", ".zst", ".zstd", ".zip")
DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar", " ": "space"}
MISSING = {*("", "-", "–", "—", "nan", "-nan", "na", "n/a", "#n/a", "#na", "none", "null", "<na>")}
Rows = list[tuple[int, list[Any]]]  # line numbers and cells
Read = tuple[pd.DataFrame, str]  # a table and a description of its dialect


def read_table(path: str | Path) -> pd.DataFrame:
    """Read a table of runs that other software wrote.  Raises ConfigError if that fails."""
    cells = read_cells(Path(path), [])
    losses = {name for name in map(str, cells) if {"loss", "nll"} & set(words_of(name))}
    return with_numbers(cells, losses, [], None, [])


# --- files


def read_cells(path: Path, notes: list[str]) -> pd.DataFrame:
    """Return the table as written, without parsing text, and add a note on dialect and size.

    Raises ConfigError that names the file.
    """
    packed, kind = "", path.suffix.lower()
    if kind in PACKED:
        packed, kind = kind, Path(path.stem).suffix.lower()
    try:
        with path.open("rb") as file:
            data = bytes(fileio.unpacked(file, packed).read(MOST_BYTES + 1))
        if packed == ".zip":
            kind, data = _only_member(data)
        if len(data) > MOST_BYTES:
            raise ConfigError(f"holds more than {MOST_BYTES >> 20} MiB, the most that is read")
        if kind not in READERS:
            kinds = ".csv, .tsv, .txt, .json, .jsonl, .parquet or .xlsx"
            raise ConfigError(f"must be a {kinds} file, as it is or as .gz, .bz2, .xz, .zst, .zip")
        table, dialect = READERS[kind](data)
        table = _checked(table)
    except ConfigError as error:
        raise ConfigError(f"table={path}: {error}") from error
    except Exception as error:  # the libraries raise many kinds
        reason = getattr(error, "strerror", None) or first_line(error)
        raise ConfigError(f"table={path}: cannot be read ({reason})") from error
    size = f"{len(table)} rows, {len(table.columns)} columns"
    notes.append(", ".join(filter(None, [path.name, dialect, size])))
    return table


def _only_member(data: bytes) -> tuple[str, bytes]:
    """Return the suffix and content of the only file in a zip archive."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = [name for name in archive.namelist() if not re.match(r"__MACOSX|\.|.*/$", name)]
        if len(names) != 1:
            raise ConfigError(f"holds {len(names)} files; a .zip must hold one table")
        with archive.open(names[0]) as member:
            return Path(names[0]).suffix.lower(), member.read(MOST_BYTES + 1)


def _text(data: bytes) -> str:
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        kind = encoding.removesuffix("-sig").upper()
        raise ConfigError(f"not {kind} text (byte {error.start}); save it as {kind}") from error


def _read_text(data: bytes) -> Read:
    """Read delimited text, whose header may be the last # comment.

    A # that names a column or precedes a run's number does not start a comment.
    """
    stream = io.StringIO(_text(data), newline="")
    lines = [(n, line) for n, line in enumerate(stream, 1) if line.strip()]
    plain = [line for _, line in lines if not line.lstrip().startswith("#")]
    mark = _delimiter(plain[:50])
    cut = partial(csv.reader, delimiter=mark, skipinitialspace=True)
    width, names = len(next(cut(plain), [])), [row[0] for row in cut(plain[1:50])]

    def is_comment(line: str) -> bool:
        if not line.lstrip().startswith("#"):
            return False
        cells = next(cut([line.lstrip()]))
        name = re.fullmatch(r"#(\d*)", cells[0])
        return not name or len(cells) != width or bool(name[1] and _all_numbers(names))

    comments = [line.strip() for _, line in lines if is_comment(line)]
    lines = [(n, line) for n, line in lines if not is_comment(line)]
    reader = cut(line.strip() + "\n" if mark == " " else line for _, line in lines)
    rows = [(lines[reader.line_num - 1][0], list[Any](row)) for row in reader]
    dialect = f"{DELIMITERS[mark]}-separated"
    if comments:
        dialect += f", {len(comments)} comment line{'s' * (len(comments) > 1)}"
        header = next(cut([comments[-1].lstrip("# ")]), [])
        if rows and _all_numbers(rows[0][1]) and len(header) == len(rows[0][1]):
            rows.insert(0, (0, header))
            dialect += ", the last of them its header"
    return _frame(rows), dialect


def _delimiter(sample: Sequence[str]) -> str:
    """Return the delimiter that splits the header and most rows into the most equal parts.

    A space counts only if no other delimiter does.
    """
    best, most = ",", 1
    for mark in DELIMITERS:
        lines = [line.strip() for line in sample] if mark == " " else sample
        counts = [len(row) for row in csv.reader(lines, delimiter=mark, skipinitialspace=True)]
        if not counts or counts[0] <= most or (mark == " " and most > 1):
            continue
        rows = counts[1:] or counts
        are_regular = max(map(rows.count, rows)) >= 0.8 * len(rows)
        if are_regular and sum(count >= counts[0] for count in rows) >= 0.5 * len(rows):
            best, most = mark, counts[0]
    return best


def _frame(rows: Rows) -> pd.DataFrame:
    """Return a table with the first row as header, without empty rows and unnamed empty columns."""
    rows = [(n, [c.strip() if isinstance(c, str) else c for c in row]) for n, row in rows]
    rows = [(n, row) for n, row in rows if not all(map(_is_missing, row))]
    if not rows:
        raise ConfigError("has no rows")
    header, body, width = rows[0][1], rows[1:], len(rows[0][1])
    if _all_numbers(header):
        raise ConfigError(f"has no header: its first row is {', '.join(map(str, header[:4]))}")
    for number, row in body:
        if row[:width] == header:
            raise ConfigError(f"line {number} repeats the header; remove it")
        if not all(map(_is_missing, row[width:])):
            raise ConfigError(
                f"has more values in a row than columns in its first line (line {number}: "
                f"{len(row)}, {width}); a decimal comma needs quotes or semicolons"
            )
    cells = [row[:width] + [None] * (width - len(row)) for _, row in body]
    table = pd.DataFrame(cells, columns=range(width), dtype=object)
    unnamed = [i for i in range(width) if header[i] in ("", None)]  # "nan" is a name
    names = {i: f"Unnamed: {i}" if i in unnamed else str(n) for i, n in enumerate(header)}
    empty = [i for i in unnamed if all(map(_is_missing, table[i]))]
    return table.drop(columns=empty).rename(columns=names)


def _read_json(data: bytes) -> Read:
    """Read records (an array, one per line, or in one field of an object) or an object of columns.

    Nested names are joined by dots.
    """
    text = _text(data)
    try:
        found = json.loads(text)
    except ValueError:
        found = [json.loads(line) for line in re.split(r"[\r\n]+", text) if line.strip()]
    if isinstance(found, dict):
        values = list(found.values())
        held = [name for name, value in found.items() if value and _are_records(value)]
        if len(held) == 1:
            return pd.json_normalize(found[held[0]]), f"its {held[0]}"
        if values and all(isinstance(value, list) for value in values):
            return pd.DataFrame(found), ""
        if values and all(isinstance(value, dict) for value in values):
            by_column = all(str(key).isdigit() for value in values for key in value)
            found = pd.DataFrame(found).to_dict("records") if by_column else values
        else:
            found = [found]
    if not _are_records(found):
        raise ConfigError("must hold one object per run")
    return pd.json_normalize(found), ""


def _are_records(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(row, dict) for row in value)


def _read_workbook(data: bytes) -> Read:
    """Read the first sheet with rows and all sheets with its columns, adding a column ``sheet``."""
    try:
        import openpyxl  # type: ignore[import-untyped]
    except ImportError as error:
        raise ConfigError("needs openpyxl: pip install 'tinygpt[excel]'") from error
    book = openpyxl.load_workbook(io.BytesIO(data), read_only=True, data_only=True)
    sheets: dict[str, pd.DataFrame] = {}
    for sheet in book.worksheets:
        rows = [(n, list(row)) for n, row in enumerate(sheet.iter_rows(values_only=True), 1)]
        if any(not all(map(_is_missing, row)) for _, row in rows):
            with contextlib.suppress(*([ConfigError] if sheets else [])):
                sheets[sheet.title] = _frame(rows)
    if not sheets:
        raise ConfigError("has no rows")
    first, *_ = sheets.values()
    alike = {name: table for name, table in sheets.items() if list(table) == list(first)}
    dialect = f"sheet{'s' * (len(alike) > 1)} {', '.join(alike)} of {len(book.worksheets)}"
    if len(alike) == 1:
        return first, dialect
    parts = [t if "sheet" in t else t.assign(sheet=name) for name, t in alike.items()]
    return pd.concat(parts, ignore_index=True), f"{dialect} with the same columns"


READERS: dict[str, Callable[[bytes], Read]] = {
    **dict.fromkeys((".csv", ".tsv", ".tab", ".psv", ".txt", ".dat"), _read_text),
    **dict.fromkeys((".json", ".jsonl", ".ndjson"), _read_json),
    **dict.fromkeys((".parquet", ".pq"), lambda data: (pd.read_parquet(io.BytesIO(data)), "")),
    **dict.fromkeys((".xlsx", ".xlsm"), _read_workbook),
}


def _checked(table: pd.DataFrame) -> pd.DataFrame:
    """Return the table with text names.  Raises ConfigError if it cannot be a table of runs."""
    if not isinstance(table.index, pd.RangeIndex):
        table = table.reset_index()
    names = pd.Index([str(name) for name in table])
    if names.has_duplicates:
        raise ConfigError(f"two columns are called {names[names.duplicated()][0]}; rename one")
    if table.empty:
        raise ConfigError("has no rows")
    if len(names) > MOST_COLUMNS:
        raise ConfigError(f"has {len(names)} columns; at most {MOST_COLUMNS} are read")
    table = table.set_axis(names, axis=1)
    mixed = [name for name in names if table[name].dtype.kind == "O"]

    def plain(value: Any) -> Any:
        if isinstance(value, Decimal):
            return float(value)
        return str(value) if isinstance(value, list | dict | np.ndarray) else value

    return table.assign(**{name: table[name].astype(object).map(plain) for name in mixed})


# --- numbers

_GAPS = "_'’ \u00a0\u2009\u202f"  # thousands separators besides the non-decimal mark
_SUFFIX = {"k": 3, "thousand": 3, "m": 6, "mm": 6, "million": 6, "b": 9, "bn": 9, "g": 9}
_SUFFIX |= {"billion": 9, "t": 12, "trillion": 12, "p": 15}
_NUMBER = re.compile(
    rf"([+\-−]?)(\d[\d.,{_GAPS}]*|[.,]\d+)"
    r"(?:e([+\-−]?\d{1,4})|\s*[x×*·]\s*10\s*(?:\^|\*\*)\s*(-?\d{1,4}))?"
    rf"\s*({'|'.join(sorted(_SUFFIX, key=len, reverse=True))})?"
    r"(?:\s*(?:param(?:eter)?s?|tokens?|flops?))?",
    re.IGNORECASE,
)
_THOUSANDS = re.compile(rf"[1-9]\d{{0,2}}([.,{_GAPS}])\d{{3}}(?:\1\d{{3}})*")
_INFINITE = re.compile(r"[+\-−]?inf(inity)?", re.IGNORECASE)


def _is_missing(value: Any) -> bool:
    return value.strip().casefold() in MISSING if isinstance(value, str) else bool(pd.isna(value))


def _all_numbers(cells: Iterable[Any]) -> bool:
    """Return whether there are numbers and all other cells are missing; a suffix is no number."""
    texts = [v.strip() if isinstance(v, str) else "0" for v in cells if not _is_missing(v)]
    matches = [_NUMBER.fullmatch(text) for text in texts]
    return bool(matches) and all(match and not match[5] for match in matches)


def _number(value: Any, mark: str, is_loss: bool = False) -> float | None:
    """Return the number in a cell with the decimal mark ``mark``, or None if it is not one.

    Infinite values become NaN.  A loss has neither thousands separators nor a suffix.
    """
    if not isinstance(value, str):
        if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
            return None
        try:
            return float(value) if abs(float(value)) < 1e300 else float("nan")
        except OverflowError:  # of large integers
            return float("nan")
    if _INFINITE.fullmatch(value):
        return float("nan")
    match = _NUMBER.fullmatch(value) if len(value) <= 64 else None
    if match is None or (is_loss and match[5]):
        return None
    sign, digits, exponent, power, suffix = match.groups("")
    digits = digits.rstrip()
    whole, _, part = digits.partition(mark)
    if digits.count(mark) > 1:  # it separates thousands
        whole, part = digits, ""
    if not is_loss and _THOUSANDS.fullmatch(whole):
        whole = re.sub(r"\D", "", whole)
    if not re.fullmatch(r"\d*", whole) or not re.fullmatch(r"\d*", part):
        return None
    tens = int((exponent or power or "0").replace("−", "-")) + _SUFFIX.get(suffix.casefold(), 0)
    return float(f"{'-' if sign in ('-', '−') else ''}{whole or 0}.{part or 0}e{tens}")


def _mark_of(value: Any) -> str:
    """Return the decimal mark that a number must have, or "?" for an ambiguous comma.

    Returns "" without a mark, and for a single point, which counts as decimal.
    """
    if not isinstance(value, str):
        return ""
    marks = [m for m in ".," if value.count(m) < 2 and _number(value, m) is not None]
    return marks[0] if len(marks) == 1 else "?" if marks and "," in value else ""


def with_numbers(
    table: pd.DataFrame,
    losses: Iterable[str],
    named: Sequence[str],
    decimal: str | None,
    notes: list[str],
) -> pd.DataFrame:
    """Return the table with text parsed as numbers where a column holds numbers only.

    The decimal mark is decided for the whole file.  Raises ConfigError for a loss or named column
    with other text or an ambiguous comma.
    """
    losses = [name for name in losses if name in table]
    cells: dict[str, pd.Series] = {}
    for name in map(str, table):
        if not pd.api.types.is_numeric_dtype(table[name]):
            stripped = table[name].map(lambda v: v.strip() if isinstance(v, str) else v)
            cells[name] = stripped[~stripped.map(_is_missing)]
    strict = {*losses, *named}
    marks = {n: v.map(_mark_of) for n, v in cells.items() if n in strict or _all_numbers(v)}
    of_file = {mark for found in marks.values() for mark in found} & {",", "."}
    commas, thousands = list[str](), list[str]()
    columns = {name: _plain(table[name], found) for name, found in cells.items()}
    for name in sorted(marks, key=lambda name: name not in losses):
        is_loss, found = name in losses, cells[name]
        mark = _decide(name, found, marks[name], of_file, is_loss, decimal)
        if is_loss and mark == "," and "?" in set(marks[name]):
            of_file |= {",", "?"}  # a comma is ambiguous from here on
        read = [_number(value, mark, is_loss) for value in found]
        bad = [row for row, number in zip(found.index, read, strict=True) if number is None]
        if bad and name not in strict:
            continue
        if bad:
            value = f"{table[name][bad[0]]!s:.40}"
            hint = "; a loss has no thousands" if is_loss and _number(value.strip(), ".") else ""
            raise ConfigError(f"{name}={value}: row {bad[0]}: must be a number{hint}")
        are_whole = all(re.fullmatch(r"[+-]?[0-9]{1,18}", str(value)) for value in found)
        if are_whole and len(found) == len(table):
            columns[name] = found.map(int)
        else:
            columns[name] = pd.Series(read, found.index, dtype=float).reindex(table.index)
        texts = [value for value in found if isinstance(value, str) and name in strict]
        if mark == "," and any("," in text for text in texts):
            commas.append(name)
        if any(_THOUSANDS.search(text.partition(mark)[0]) for text in texts):
            thousands.append(name)
    choices = {"decimal comma": commas, "thousands separators": thousands}
    listed = [f"{choice} ({', '.join(names)})" for choice, names in choices.items() if names]
    if listed:
        notes.append(f"numbers: {'; '.join(listed)}")
    return table.assign(**columns)


def _decide(
    name: str, cells: pd.Series, marks: pd.Series, of_file: set[str], is_loss: bool,
    decimal: str | None,
) -> str:  # fmt: skip
    """Return the decimal mark of a column.  Raises ConfigError if it is ambiguous."""
    own = set(marks) & {",", "."}
    if decimal or len(own) == 1:
        return decimal or own.pop()
    if own:
        rows = [f"{cells[marks == m].iloc[0]} (row {marks.index[marks == m][0]})" for m in ",."]
        raise ConfigError(f"{name}: has decimal commas and decimal points: {' and '.join(rows)}")
    if "?" not in set(marks):
        return "," if of_file == {","} and not is_loss else "."
    if of_file == {","} or (is_loss and "." not in of_file and (marks == "?").all()):
        return ","
    if not is_loss and "," not in of_file:
        return "."
    row = marks.index[marks == "?"][0]
    raise ConfigError(
        f'{name}="{cells[row]}": row {row}: a decimal comma, or thousands? decimal=, or decimal=. '
        "says which"
    )


def _plain(column: pd.Series, cells: pd.Series) -> pd.Series:
    """Return true and false as booleans and text unchanged, with None for missing values."""
    if len(cells) == len(column) and all(str(v).casefold() in ("true", "false") for v in cells):
        return column.map(lambda v: str(v).strip().casefold() == "true").astype(bool)
    if cells.empty:
        return pd.Series(np.nan, index=column.index)
    return cells.reindex(column.index).infer_objects()
