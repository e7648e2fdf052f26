"""Read the rows of tables: CSV in any dialect, JSON in three shapes, and parquet."""

from __future__ import annotations

import contextlib
import csv
import itertools
import json
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from tinygpt import fileio
from tinygpt.config import ConfigError, CustomData
from tinygpt.data import textfiles

Row = dict[str, Any]
MOST_FIELDS = 20  # a JSON object with more texts than this is not one row
HEAD_ROWS, HEAD_CHARACTERS = 2000, 1 << 22  # enough to detect the dialect and the column
DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
EXCEL = re.compile(r"sep=(.)\r?\n")  # the line in which Excel names the delimiter
NOWHERE = "\x1f"  # the delimiter of a table of one column, whose commas are text


class Rows:
    """Read the rows of a file, from the beginning each time, in a dialect detected once."""

    def __init__(self, path: Path, config: CustomData) -> None:
        """Detect format and dialect.  Raises ConfigError if the first rows cannot be read."""
        self.path, self.format, self.encoding = path, textfiles.format_of(path), config.encoding
        self.dialect = find_dialect(path, config) if self.format == "csv" else None

    def read(
        self, read: dict[Path, int], columns: Iterable[str] | None = None, texts: bool = False
    ) -> Iterator[Row]:
        """Yield the rows as dicts.  Raises ConfigError, naming the line.

        Of parquet only ``columns`` are read, and with ``texts`` all other text columns.
        """
        if self.format == "parquet":
            return _parquet(self.path, read, columns, texts)
        chunks = textfiles.text_chunks(self.path, read, self.encoding)
        if self.dialect is not None:
            return _csv(self.path, chunks, self.dialect)
        return _json(self.path, chunks, whole=self.format == "json")


@dataclass(frozen=True)
class Dialect:
    """Describe how a CSV file is written; ``str`` of it is shown to the user."""

    delimiter: str
    quoted: bool = True
    header: bool = True
    line_end: str = "\n"  # "\r" if the file has no other
    spaced: bool = False  # blanks between a delimiter and a quote

    @property
    def is_default(self) -> bool:
        return replace(self, line_end="\n") == Dialect(",")

    def __str__(self) -> str:
        between = {**DELIMITERS, NOWHERE: "one column"}.get(self.delimiter, repr(self.delimiter))
        names = "a header" if self.header else "no header (columns are column_1, column_2, ...)"
        quotes = "" if self.quoted else ", quotes are text"
        return f"CSV with {between}, {names}{', blanks before quotes' * self.spaced}{quotes}"

    def records(self, chunks: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
        """Yield each record with the number of its last line.

        Byte order marks within the text, left by concatenating files, are removed.
        """
        csv.field_size_limit(sys.maxsize)
        lines = (line.removeprefix("\ufeff") + "\n" for line in textfiles.split_at(chunks, "\n"))
        first = next(lines)
        skipped = bool(EXCEL.fullmatch(first))
        reader = csv.reader(
            lines if skipped else itertools.chain([first], lines),
            delimiter=self.delimiter,
            quoting=csv.QUOTE_MINIMAL if self.quoted else csv.QUOTE_NONE,
            skipinitialspace=self.spaced,
            strict=True,
        )
        for record in reader:
            yield reader.line_num + skipped, record


def find_dialect(path: Path, config: CustomData) -> Dialect:
    """Return the dialect of the first rows: with its delimiter most have as many values as the
    first.  A text that no delimiter makes a table is one column."""
    text, ended, line_end = "", True, "\n"
    for chunk in textfiles.text_chunks(path, {}, config.encoding):
        text += chunk
        if len(text) > HEAD_CHARACTERS:
            ended = False
            break
    if "\r" in text and "\n" not in text:
        text, line_end = text.replace("\r", "\n"), "\r"

    def dialect(delimiter: str, quoted: bool = True) -> Dialect:
        mark = re.escape(delimiter)
        blank_before_quote = re.compile(rf'{mark} +"[^"\r\n{mark}]')
        spaced = quoted and delimiter != " " and blank_before_quote.search(text) is not None
        return Dialect(delimiter, quoted, line_end=line_end, spaced=spaced)

    usual = {".tsv": "\t", ".tab": "\t", ".psv": "|"}.get(textfiles.inner_suffix(path), ",")
    named = EXCEL.match(text)
    given = config.delimiter or (named[1] if named else None)
    marks = [given] if given else list(dict.fromkeys([usual, *DELIMITERS]))
    asked = [dialect(mark) for mark in marks]
    asked += [dialect("\t", quoted=False)] * ("\t" in marks)
    widths = {one: _widths(text, one, ended) for one in asked}

    def share(one: Dialect) -> float:
        found = widths[one]
        return found.count(found[0]) / len(found) if found and found[0] > 1 else 0.0

    best = max(asked, key=share)  # the first of equals
    if share(best) < 0.9 and config.delimiter is None:
        is_narrow = all(found[:1] == [1] for found in widths.values())
        is_prose = is_narrow and not any(map(_is_table, widths.values()))
        best = dialect(NOWHERE if is_prose and max(widths[asked[0]]) > 1 else usual)
    if config.header is not None:
        return replace(best, header=config.header)
    records: list[list[str]] = []
    with contextlib.suppress(csv.Error):  # which says so when it is read
        for _, record in itertools.islice(best.records([text]), 500):
            records += [record] if record else []
    if title := _title(records):
        raise ConfigError(
            f"data.path={path}: the first line has only {title!r:.60}, a title above the names "
            "of the columns? remove it; data.header=true: it is a name itself"
        )
    return replace(best, header=_has_header(records))


def _widths(text: str, dialect: Dialect, ended: bool) -> list[int]:
    """Return the number of values in each of the first records, an empty list if unreadable."""
    widths = []
    try:
        for _, record in itertools.islice(dialect.records([text]), HEAD_ROWS):
            widths += [len(record)] if record else []
    except csv.Error:
        if ended:
            return []
    return widths if ended else widths[:-1]


def _is_table(widths: list[int]) -> bool:
    """Return whether most records after the first have the same number of values."""
    usual = max(set(widths[1:]), key=widths.count, default=1)
    return usual > 1 and widths[1:].count(usual) * 2 > len(widths[1:])


def _has_header(records: list[list[str]]) -> bool:
    """Return whether the first record names columns.

    Names are short, not numbers or links, and neither occur below nor resemble most values there.
    """
    if not records or records[0] in (["text"], ["Text"]):
        return True
    first, *others = records
    if len(first) > 1:
        others = [record for record in others if record != first]  # of concatenated files
    for place, name in enumerate(cell.strip() for cell in first):
        below = [record[place].strip() for record in others if len(record) > place]
        alike = [re.sub(r"\d+", "0", value) for value in below].count(re.sub(r"\d+", "0", name))
        is_value = name in below or "://" in name or alike * 2 > len(below)
        asks = [bool(re.search(r"[?？]\W*$", value)) for value in (name, *below)]
        if len(first) > 1 and len(below) > 1 and asks[0] and not any(asks[1:]) and not is_value:
            continue  # a question of a survey, above its answers
        is_number = re.fullmatch(r"[-+]?[\d., :/-]*\d[\d., :/-]*", name)
        is_sentence = len(name.split()) > 4 or re.search(r"[.!?。！？]\W*$", name)
        if name and (is_value or is_number or is_sentence):
            return False
    return any(cell.strip() for cell in first)


def _title(records: list[list[str]]) -> str:
    """Return the only value of the first record if the second is a header, else nothing."""
    if len(records) < 3 or not 1 < len(records[1]) == sum(bool(c.strip()) for c in records[1]):
        return ""
    filled = [cell for cell in records[0] if cell.strip()]
    return filled[0] if len(filled) == 1 and _has_header(records[1:]) else ""


def _csv(path: Path, chunks: Iterable[str], dialect: Dialect) -> Iterator[Row]:
    names: list[str] = []
    line = 0
    try:
        for line, record in dialect.records(c.replace(dialect.line_end, "\n") for c in chunks):
            if not record:
                continue
            if not names:
                first, given = record, record if dialect.header else [""] * len(record)
                names = [name.strip() or f"column_{n}" for n, name in enumerate(given, 1)]
                twice = next((n for n, times in Counter(names).items() if times > 1), None)
                if twice is not None:
                    raise csv.Error(
                        f"line {line:,} names the column {twice} twice; data.header=false: it is "
                        "a row"
                    )
                if dialect.header:
                    continue
            elif dialect.header and record == first:
                continue  # the header of a concatenated file
            if len(record) < len(names) or any(record[len(names) :]):
                # likely a comma or a line break in an unquoted text; dropping it would lose words
                raise csv.Error(
                    f"line {line:,} has {len(record)} values for {len(names)} columns, it begins "
                    f"{record[0]!r:.40}; "
                    "data.delimiter= names what stands between values, and a value that has "
                    "it or a line break must be in quotes"
                )
            yield dict(zip(names, record, strict=False))
    except csv.Error as error:
        where = "" if str(error).startswith("line") else f"behind line {line:,}: "
        hint = "; a quote in a value is written twice" if "expected after" in str(error) else ""
        raise ConfigError(
            f"data.path={path}: not readable as CSV ({where}{error}{hint})"
        ) from error


def _json(path: Path, chunks: Iterator[str], whole: bool) -> Iterator[Row]:
    """Yield the objects of JSON lines or, if ``whole``, of an array or the list in one object.

    A plain string is a row's ``text``.  Raises ConfigError, naming the line.
    """
    if whole:
        head = ""
        for chunk in chunks:
            head += chunk
            if head.strip():
                break
        chunks = itertools.chain([head], chunks)
        if not _is_lines(head):
            is_array = head.lstrip().startswith("[")
            values = _values(path, chunks, is_array)
            first = list(itertools.islice(values, 2))
            lone = _rows_in(path, first[0]) if len(first) == 1 and not is_array else first
            yield from map(textfiles.unicode_only, itertools.chain(lone, values))
            return
    for number, line in enumerate(textfiles.split_at(chunks, "\n"), start=1):
        line = line.removeprefix("\ufeff")  # of a concatenated file
        if not line.strip():
            continue
        try:
            row = fileio.parse_json(line)
        except ValueError as error:
            raise ConfigError(f"data.path={path}: line {number} is not JSON ({error})") from error
        yield textfiles.unicode_only(_row(row, f"data.path={path}: line {number}"))


def _row(value: Any, where: str) -> Row:
    if isinstance(value, str):
        return {"text": value}
    if not isinstance(value, dict):
        raise ConfigError(f"{where} is not a JSON object")
    return value


def _is_lines(head: str) -> bool:
    """Return whether a JSON text has one object per line, as its first line suggests."""
    first, _, rest = head.strip().partition("\n")
    try:
        return bool(rest.strip()) and isinstance(fileio.parse_json(first), dict)
    except ValueError:
        return False


def _values(path: Path, chunks: Iterator[str], is_array: bool) -> Iterator[Row]:
    """Yield the objects of an array or of concatenated JSON.  Raises ConfigError, naming the
    line."""
    decoder, space = json.JSONDecoder(), re.compile(r"[ \t\r\n\ufeff]*")
    buffer, at, line, expected = "", 0, 1, "[" if is_array else "value"
    while True:
        start, at = at, space.match(buffer, at).end()  # type: ignore[union-attr]
        line += buffer.count("\n", start, at)
        where = f"data.path={path}: line {line:,}"
        if at == len(buffer):
            buffer, at = next(chunks, ""), 0
            if not buffer:
                break
        elif is_array and buffer[at] == "]" and expected in (",", "value"):
            at, expected = at + 1, "nothing behind the array"
        elif buffer[at] == expected:
            at, expected = at + 1, "value"
        elif expected != "value":
            wanted = "',' or ']'" if expected == "," else expected
            raise ConfigError(f"{where} is not JSON (must be {wanted})")
        else:
            try:
                value, end = decoder.raw_decode(buffer, at)
            except RecursionError as error:
                raise ConfigError(f"{where} is not JSON (nested too deeply)") from error
            except ValueError as error:
                more = "".join(itertools.islice(chunks, max(1, len(buffer) // textfiles.CHUNK)))
                if more:
                    buffer, at = buffer[at:] + more, 0
                    continue
                raise ConfigError(f"{where} begins what is not JSON ({error})") from error
            row = _row(value, where)
            line += buffer.count("\n", at, end)
            at, expected = end, "," if is_array else "value"
            yield row
    if is_array and not expected.startswith("nothing"):
        raise ConfigError(f"data.path={path}: line {line:,} is not JSON (the array has no end)")


def _rows_in(path: Path, value: Row) -> list[Row]:
    """Return the rows in the only object of a file: its list of rows, or the object itself."""
    fields = list(value.values())
    lists = {
        name: rows
        for name, rows in value.items()
        if isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows)
    }
    inner = [one for one in fields if isinstance(one, dict)]
    is_words = any(isinstance(one, str) and len(one.split()) > 3 for one in fields)
    deeper = [one for one in inner[0].values() if isinstance(one, list)] if len(inner) == 1 else []
    if not lists and not is_words and any(isinstance(row, dict) for one in deeper for row in one):
        return _rows_in(path, inner[0])
    tables = {
        name: rows
        for name, rows in lists.items()
        if not all({"role", "from"} & set(row) for row in rows)
        or not any({"content", "value"} & set(row) for row in rows)  # else a chat
    }
    if len(tables) == 1:
        return next(iter(tables.values()))
    texts = len(value) if all(isinstance(one, str) for one in fields) else 0
    is_row = len(tables) < len(lists) or not all(isinstance(one, dict | list) for one in fields)
    if tables or not is_row or texts > MOST_FIELDS:
        lists_found = f"{len(tables)} lists of rows ({', '.join([*tables][:12])})"
        found = f"{texts} texts" if texts else lists_found if tables else "no list"
        raise ConfigError(
            f"data.path={path}: one JSON object with {found}; an array of objects is read, an "
            "object a line, or one object with one list of objects"
        )
    return [value]


def _parquet(
    path: Path, read: dict[Path, int], columns: Iterable[str] | None, texts: bool
) -> Iterator[Row]:
    """Yield the rows of a parquet file, read in batches.  Raises ConfigError."""
    import pyarrow
    import pyarrow.parquet

    try:
        with contextlib.ExitStack() as stack:
            source: Path | IO[bytes] = path
            if textfiles.packing(path):  # parquet is read from its end
                stream, _ = stack.enter_context(textfiles.unpacked(path))
                source = stack.enter_context(tempfile.TemporaryFile())
                shutil.copyfileobj(stream, source, textfiles.CHUNK)
                source.seek(0)
            file, rows = pyarrow.parquet.ParquetFile(source), 0
            wanted: list[str] | None = None
            if columns is not None:
                kinds = ("string", "large_string") if texts else ()
                there = file.schema_arrow
                wanted = [f.name for f in there if f.name in columns or str(f.type) in kinds]
            for batch in file.iter_batches(batch_size=1024 if columns else 64, columns=wanted):
                rows += len(batch)
                read[path] = path.stat().st_size * rows // file.metadata.num_rows
                yield from batch.to_pylist()
    except ConfigError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise ConfigError(f"data.path={path}: not readable as parquet ({error})") from error
