"""The file of a table of runs: its kind, its dialect, and its numbers as people write them."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import zipfile
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from tinygpt.config import ConfigError, first_line
from tinygpt.scaling.runs import words_of

MOST_COLUMNS = 10_000
MOST_BYTES = 1 << 28  # of a table once it is unpacked
TEXT = (".csv", ".tsv", ".tab", ".psv", ".txt", ".dat")
OPEN: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": partial(pa.input_stream, compression="zstd"),
}
DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar", " ": "space"}
MISSING = {*("", "-", "–", "—", "nan", "-nan", "na", "n/a", "#n/a", "#na", "none", "null", "<na>")}


def read_table(path: str | Path) -> pd.DataFrame:
    """Return a table of runs from elsewhere.  Raises ConfigError if it cannot be read."""
    cells = read_cells(Path(path), [])
    losses = {name for name in map(str, cells) if {"loss", "nll"} & set(words_of(name))}
    return with_numbers(cells, losses, [], None, [])


# --- files


def read_cells(path: Path, notes: list[str]) -> pd.DataFrame:
    """The table as it stands in the file: texts where the file has texts."""
    packed, kind = "", path.suffix.lower()
    if kind in (*OPEN, ".zip"):
        packed, kind = kind, Path(path.stem).suffix.lower()
    try:
        data = _bytes(path, packed)
        if packed == ".zip":
            kind, data = _only_member(data)
        said = ""
        if kind in TEXT:
            table, said = _text_table(_decoded(data))
        elif kind in (".json", ".jsonl", ".ndjson"):
            table = _json_table(_decoded(data))
        elif kind in (".parquet", ".pq"):
            table = pd.read_parquet(io.BytesIO(data))
        elif kind in (".xlsx", ".xlsm"):
            table, said = _sheet(data)
        else:
            kinds = ".csv, .tsv, .txt, .json, .jsonl, .parquet or .xlsx"
            raise ConfigError(f"must be a {kinds} file, as it is or as .gz, .bz2, .xz, .zst, .zip")
        table = _checked(table)
    except ConfigError as error:
        raise ConfigError(f"table={path}: {error}") from error
    except Exception as error:  # whatever broken bytes lead the libraries to
        reason = getattr(error, "strerror", None) or first_line(error)
        raise ConfigError(f"table={path}: cannot be read ({reason})") from error
    size = f"{len(table)} rows, {len(table.columns)} columns"
    notes.append(", ".join([path.name, *([said] if said else []), size]))
    return table


def _bytes(path: Path, packed: str) -> bytes:
    with OPEN.get(packed, partial(open, mode="rb"))(path) as file:
        data = bytes(file.read(MOST_BYTES + 1))
    if len(data) > MOST_BYTES:
        raise ConfigError(f"holds more than {MOST_BYTES >> 20} MiB; at most so much is read")
    return data


def _only_member(data: bytes) -> tuple[str, bytes]:
    """The kind and the content of the one file in a zip."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        hidden = ("__MACOSX", ".")
        files = [f for f in archive.infolist() if not f.is_dir()]
        files = [f for f in files if not f.filename.startswith(hidden)]
        if len(files) != 1:
            raise ConfigError(f"holds {len(files)} files; a .zip must hold one table")
        if files[0].file_size > MOST_BYTES:
            raise ConfigError(f"holds more than {MOST_BYTES >> 20} MiB; at most so much is read")
        return Path(files[0].filename).suffix.lower(), archive.read(files[0])


def _decoded(data: bytes) -> str:
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        kind = encoding[:-4] if encoding.endswith("sig") else encoding
        raise ConfigError(f"not {kind.upper()} text (byte {error.start}); save it so") from error


def _text_table(text: str) -> tuple[pd.DataFrame, str]:
    """The rows of a delimited text, and its dialect in words."""
    lines = [(n, line) for n, line in enumerate(io.StringIO(text, newline=""), 1) if line.strip()]
    comments = [line.strip() for _, line in lines if line.lstrip().startswith("#")]
    lines = [(n, line) for n, line in lines if not line.lstrip().startswith("#")]
    sample = [line for _, line in lines[:50]]
    mark = _delimiter(sample)
    source = (line.strip() + "\n" if mark == " " else line for _, line in lines)
    reader = csv.reader(source, delimiter=mark, skipinitialspace=True)
    rows = [(lines[reader.line_num - 1][0], list(row)) for row in reader]
    said = f"{DELIMITERS[mark]}-separated"
    if comments:
        said += f", {len(comments)} comment line{'s' * (len(comments) > 1)}"
        header = next(csv.reader([comments[-1].lstrip("# ")], delimiter=mark), [])
        if rows and _all_numbers(rows[0][1]) and len(header) == len(rows[0][1]):
            rows.insert(0, (0, header))
            said += ", the last of them its header"
    return _frame(rows), said


def _delimiter(sample: Sequence[str]) -> str:
    """That which cuts the header and nearly all rows into equally many parts, the most."""
    best, most = ",", 1
    for mark in DELIMITERS:
        lines = [line.strip() for line in sample] if mark == " " else sample
        counts = [len(row) for row in csv.reader(lines, delimiter=mark, skipinitialspace=True)]
        if (mark == " " and most > 1) or not counts or counts[0] < 2:
            continue
        rows = counts[1:] or counts
        regular = max(map(rows.count, rows)) >= 0.8 * len(rows)
        fits = sum(count >= counts[0] for count in rows) >= 0.5 * len(rows)
        if regular and fits and counts[0] > most:
            best, most = mark, counts[0]
    return best


def _all_numbers(cells: Iterable[Any]) -> bool:
    found = [cell for cell in cells if not _is_missing(cell)]
    matches = (not isinstance(v, str) or _NUMBER.fullmatch(v.strip()) for v in found)
    return bool(found) and all(m is True or (m and not m[5]) for m in matches)


def _frame(rows: list[tuple[int, list[Any]]]) -> pd.DataFrame:
    """Rows with the numbers of their lines, the first of them the header."""
    rows = [(n, [c.strip() if isinstance(c, str) else c for c in row]) for n, row in rows]
    rows = [(n, row) for n, row in rows if not all(map(_is_missing, row))]
    if not rows:
        raise ConfigError("has no rows")
    (_, first), body = rows[0], rows[1:]
    if _all_numbers(first):
        raise ConfigError(f"has no header: its first row is {', '.join(map(str, first[:4]))}")
    width = max(len(row) for _, row in rows)
    named = [i for i in range(width) if i < len(first) and not _is_missing(first[i])]
    for number, row in body:
        if row[: len(first)] == first:
            raise ConfigError(f"line {number} repeats the header; remove it")
        over = [cell for cell in row[len(first) :] if not _is_missing(cell)]
        if over:
            raise ConfigError(
                f"has more values in a row than columns in its first line (line {number}: "
                f"{len(row)}, {len(first)}); a decimal comma needs quotes or semicolons"
            )
    kept = [
        i
        for i in range(len(first))
        if i in named or any(i < len(row) and not _is_missing(row[i]) for _, row in body)
    ]
    header = [str(first[i]) if i in named else f"Unnamed: {i}" for i in kept]
    values = [[row[i] if i < len(row) else None for i in kept] for _, row in body]
    return pd.DataFrame(values, columns=pd.Index(header, dtype=object), dtype=object)


def _json_table(text: str) -> pd.DataFrame:
    """An array of records, one a line, or an object of columns; what is nested gets a dot."""
    try:
        found = json.loads(text)
    except ValueError:
        found = [json.loads(line) for line in text.splitlines() if line.strip()]
    if isinstance(found, dict):
        values = list(found.values())
        if values and all(isinstance(value, list) for value in values):
            return pd.DataFrame(found)
        if len(values) == 1 and isinstance(values[0], list):
            found = values[0]
        elif values and all(isinstance(value, dict) for value in values):
            by_column = all(str(key).isdigit() for value in values for key in value)
            found = pd.DataFrame(found).to_dict("records") if by_column else values
        else:
            found = [found]
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        raise ConfigError("must hold objects, one a run")
    return pd.json_normalize(found)


def _sheet(data: bytes) -> tuple[pd.DataFrame, str]:
    """The first sheet of a workbook that has rows."""
    try:
        import openpyxl  # type: ignore[import-untyped]
    except ImportError as error:
        raise ConfigError("needs openpyxl: pip install 'tinygpt[excel]'") from error
    book = openpyxl.load_workbook(io.BytesIO(data), read_only=True, data_only=True)
    for sheet in book.worksheets:
        rows = [(n, list(row)) for n, row in enumerate(sheet.iter_rows(values_only=True), 1)]
        if any(not all(map(_is_missing, row)) for _, row in rows):
            return _frame(rows), f"sheet {sheet.title} of {len(book.worksheets)}"
    raise ConfigError("has no rows")


def _checked(table: pd.DataFrame) -> pd.DataFrame:
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
    for name in table:
        if table[name].dtype.kind == "O":
            values = list(table[name])
            if any(isinstance(value, list | dict | np.ndarray) for value in values):
                raise ConfigError(f"{name} holds lists or tables, no numbers or texts")
    return table


# --- numbers

_DIGITS = r"(?:\d[\d.,_'’ \u00a0\u2009\u202f]*|[.,]\d+)"
_SUFFIX = {"k": 3, "thousand": 3, "m": 6, "mm": 6, "million": 6, "b": 9, "bn": 9, "g": 9}
_SUFFIX |= {"billion": 9, "t": 12, "trillion": 12, "p": 15}
_NUMBER = re.compile(
    rf"([+\-−]?)({_DIGITS})(?:e([+\-−]?\d{{1,4}})|\s*[x×*·]\s*10\s*(?:\^|\*\*)\s*(-?\d{{1,4}}))?"
    rf"\s*({'|'.join(sorted(_SUFFIX, key=len, reverse=True))})?"
    r"(?:\s*(?:param(?:eter)?s?|tokens?|flops?))?",
    re.IGNORECASE,
)
_GROUPS = re.compile(r"\d{1,3}(?:([.,_'’ \u00a0\u2009\u202f])\d{3})(?:\1\d{3})*")
_INFINITE = re.compile(r"[+\-−]?inf(inity)?", re.IGNORECASE)


def _is_missing(value: Any) -> bool:
    if value is None or value is pd.NA or value is pd.NaT:
        return True
    if isinstance(value, str):
        return value.strip().casefold() in MISSING
    return isinstance(value, float) and value != value


def _number(text: str, mark: str, is_loss: bool = False) -> float | None:
    """The number that ``text`` is where ``mark`` is the decimal one; None if it is none.

    Thousands are parted in groups of three, and never in a loss, which has no suffix either.
    """
    if _INFINITE.fullmatch(text):
        return float("nan")
    found = _NUMBER.fullmatch(text) if len(text) <= 64 else None
    if found is None:
        return None
    sign, digits, exponent, power, suffix = found.groups()
    digits = digits.rstrip()
    whole, _, part = digits.partition(mark)
    if digits.count(mark) > 1:
        whole, part = digits, ""  # several are no decimal marks
    if not re.fullmatch(r"\d*", whole):
        if is_loss or not _GROUPS.fullmatch(whole):
            return None
        whole = re.sub(r"\D", "", whole)
    if not re.fullmatch(r"\d*", part) or (is_loss and suffix):
        return None
    tens = int((exponent or power or "0").replace("−", "-")) + _SUFFIX.get(
        (suffix or "").casefold(), 0
    )
    return float(f"{'-' if sign in ('-', '−') else ''}{whole or 0}.{part or 0}e{tens}")


def _mark_of(text: str) -> str:
    """The decimal mark that a number must have, "" where it has none or either reading stands.

    "?" is a number with one comma before three digits, and "." with one point is taken for it.
    """
    found = _NUMBER.fullmatch(text)
    digits = found[2].rstrip() if found else ""
    commas, points = digits.count(","), digits.count(".")
    if commas and points:
        return "," if digits.rfind(",") > digits.rfind(".") else "."
    if commas > 1 or points > 1:
        return "." if commas else ","
    if commas:
        return "?" if re.fullmatch(r"[1-9]\d{0,2},\d{3}", digits) else ","
    thousands = re.fullmatch(r"[1-9]\d{0,2}\.\d{3}", digits)
    return "." if points and not thousands else ""


def with_numbers(
    table: pd.DataFrame,
    losses: Iterable[str],
    named: Sequence[str],
    decimal: str | None,
    notes: list[str],
) -> pd.DataFrame:
    """The table with numbers where texts are numbers.

    Whether a comma is a decimal mark is decided for the whole file.  Raises ConfigError for a
    named column that holds anything else, or a comma that could be either.
    """
    losses = [name for name in losses if name in table]
    texts: dict[str, pd.Series] = {}
    for name in map(str, table):
        if not pd.api.types.is_numeric_dtype(table[name]):
            cells = table[name].map(lambda v: v.strip() if isinstance(v, str) else v)
            texts[name] = cells[~cells.map(_is_missing)]
    numeric = [n for n, v in texts.items() if n in (*losses, *named) or _all_numbers(v)]
    marks = {n: texts[n].map(lambda v: _mark_of(v) if isinstance(v, str) else "") for n in numeric}
    of_file = {mark for found in marks.values() for mark in found} & {",", "."}
    words: dict[str, list[str]] = {}
    columns = {}
    for name in sorted(texts, key=lambda name: name not in losses):
        if name not in marks:
            columns[name] = _plain(table[name], texts[name])
            continue
        is_loss, strict = name in losses, name in losses or name in named
        mark = _decide(name, texts[name], marks[name], of_file, is_loss, decimal)
        if is_loss and mark == "," and "?" in set(marks[name]):
            of_file |= {",", "?"}
        read = [
            _number(v, mark, is_loss) if isinstance(v, str) else _as_number(v) for v in texts[name]
        ]
        bad = [row for row, value in zip(texts[name].index, read, strict=True) if value is None]
        if bad and strict:
            value = f"{table[name][bad[0]]!s:.40}"
            hint = "; a loss has no thousands" if is_loss and _number(value.strip(), ".") else ""
            raise ConfigError(f"{name}={value}: row {bad[0]}: must be a number{hint}")
        if bad:
            columns[name] = _plain(table[name], texts[name])
            continue
        columns[name] = _numbers(table.index, texts[name], read)
        if name in (*losses, *named):
            for word in _ways(texts[name], mark):
                words.setdefault(word, []).append(name)
    if words:
        notes.append("numbers: " + "; ".join(f"{w} ({', '.join(c)})" for w, c in words.items()))
    return table.assign(**columns)


def _decide(
    name: str, cells: pd.Series, marks: pd.Series, of_file: set[str], is_loss: bool,
    decimal: str | None,
) -> str:  # fmt: skip
    """The decimal mark of a column.  Raises ConfigError where two readings stand."""
    own = set(marks) & {",", "."}
    if decimal or not (own or "?" in set(marks)):
        return decimal or ("," if of_file == {","} and not is_loss else ".")
    if len(own) == 1:
        return str(own.pop())
    if own:
        rows = [
            f"{cells[marks == mark].iloc[0]} (row {marks.index[marks == mark][0]})" for mark in ",."
        ]
        raise ConfigError(f"{name}: has decimal commas and decimal points: {' and '.join(rows)}")
    if of_file == {","} or (is_loss and "." not in of_file and (marks == "?").all()):
        return ","
    if not is_loss and "," not in of_file:
        return "."
    row = marks.index[marks == "?"][0]
    raise ConfigError(
        f'{name}="{cells[row]}": row {row}: a decimal comma, or thousands? decimal=, or decimal=. '
        "says which"
    )


def _as_number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        return None
    try:
        found = float(value)
    except OverflowError:  # whole numbers have no end
        return float("nan")
    return found if abs(found) < 1e300 else float("nan")  # what is not finite is missing


def _numbers(index: pd.Index, cells: pd.Series, read: Sequence[float | None]) -> pd.Series:
    """As pandas has them: whole where all are written so and none is missing."""
    plain = all(re.fullmatch(r"[+-]?[0-9]{1,18}", str(v)) for v in cells)
    if plain and len(cells) == len(index) > 0:
        return pd.Series([int(v) for v in cells], index=index)
    return pd.Series(np.array(read, dtype=float), index=cells.index).reindex(index)


def _plain(column: pd.Series, cells: pd.Series) -> pd.Series:
    """Truths as such, texts as they are; what is missing is None."""
    if len(cells) == len(column) and all(str(v).casefold() in ("true", "false") for v in cells):
        return column.map(lambda v: str(v).strip().casefold() == "true").astype(bool)
    if cells.empty:
        return pd.Series(np.nan, index=column.index)
    return cells.reindex(column.index).infer_objects()


def _ways(cells: pd.Series, mark: str) -> list[str]:
    """How the numbers of a column are written, where it is not plainly."""
    texts = [v for v in cells if isinstance(v, str)]
    found = []
    if mark == "," and any("," in v for v in texts):
        found.append("decimal comma")
    other = "." if mark == "," else ","
    if any(other in v or _GROUPS.search(v.partition(mark)[0]) for v in texts):
        found.append("thousands separators")
    if any(re.search(r"\d\s*[a-df-z]", v, re.IGNORECASE) for v in texts):
        found.append("suffixes as in 1.3B")
    return found
