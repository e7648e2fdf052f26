"""Files to documents: text that is cut, or the rows of a table; a chunk of it at a time."""

from __future__ import annotations

import csv
import glob
import hashlib
import io
import itertools
import os
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tinygpt import fileio
from tinygpt.config import ConfigError

END_OF_TEXT = "<|endoftext|>"
SECTION = 2000  # characters: about the length of a document cut from a long text
BINARY = (".parquet", ".arrow", ".gz", ".zst")
CHUNK = 1 << 20  # bytes read at a time
HEAD_CELLS = 1 << 17  # of rows that are looked at to choose the text column
TEXT_SUFFIXES = (".txt", ".jsonl", ".csv", ".parquet")


def find_files(key: str, value: str) -> list[Path]:
    """The files that a path, a folder or a glob names, in sorted order.  Raises ConfigError."""
    if not value:
        raise ConfigError(f"{key}={value}: must name a file, a folder or a glob")
    try:
        return _found(key, value, Path(value).expanduser())
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"{key}={value}: cannot be read ({reason})") from error


def _found(key: str, value: str, path: Path) -> list[Path]:
    if path.is_dir():
        os.scandir(path).close()  # rglob would pass over a folder that cannot be read
        files = sorted(p for p in path.rglob("*") if p.suffix in TEXT_SUFFIXES and p.is_file())
        if not files:
            raise ConfigError(f"{key}={value}: no {', '.join(TEXT_SUFFIXES)} file in this folder")
        return files
    there = [path] if path.exists() else map(Path, glob.glob(str(path), recursive=True))
    found = sorted(there, key=lambda p: (len(p.parts), p), reverse=True)
    # each once, by its shortest path: ** walks round a loop of links
    files = sorted({p.resolve(): p for p in found if p.is_file()}.values())
    if not files:
        raise ConfigError(f"{key}={value}: {'not a file' if found else 'no such file or folder'}")
    return files


class Scan(NamedTuple):
    """What is known of a file before it is read; ``size`` in bytes."""

    sha256: str
    has_end_of_text: bool
    size: int


def scan(path: Path, where: str) -> Scan:
    """One pass over a file.

    Raises ConfigError, which ``where`` begins, for one that is empty, no text or cannot be read.
    """
    sha, found, tail, size = hashlib.sha256(), False, b"", 0
    mark = END_OF_TEXT.encode()
    try:
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                if path.suffix not in BINARY and b"\0" in chunk:
                    raise ConfigError(f"{where}: not a text file (it has zero bytes)")
                tail += chunk
                found = found or mark in tail
                sha.update(chunk)
                size += len(chunk)
                tail = tail[-len(mark) :]
    except OSError as error:
        raise ConfigError(f"{where}: cannot be read ({error.strerror})") from error
    if size == 0:
        raise ConfigError(f"{where}: this file is empty")
    return Scan(sha.hexdigest(), found, size)


def text_chunks(path: Path, read: dict[Path, int]) -> Iterator[str]:
    """Its text; ``read`` is told how many bytes are.  Raises ConfigError for other than UTF-8."""
    try:
        # utf-8-sig drops a byte order mark; newline="" keeps the text as it is
        with path.open("rb") as raw, io.TextIOWrapper(raw, "utf-8-sig", newline="") as file:
            while chunk := file.read(CHUNK):
                read[path] = raw.tell()
                yield chunk
    except UnicodeDecodeError as error:
        raise ConfigError(f"data.path={path}: not UTF-8 text ({error.reason})") from error


def cut(chunks: Iterable[str], separator: str) -> Iterator[str]:
    """Documents from a stream of text: ``none`` (one), ``sections``, or at a literal separator.

    White space around a document belongs to the separator and is dropped.
    """
    if separator == "none":
        pieces: Iterator[str] = iter(["".join(chunks)])
    elif separator == "sections":
        pieces = _sections(chunks)
    else:
        pieces = _split_stream(chunks, separator)
    return (text for piece in pieces if (text := piece.strip()))


def _split_stream(chunks: Iterable[str], separator: str) -> Iterator[str]:
    pending: list[str] = []
    tail = ""
    for chunk in chunks:
        *ended, tail_new = (tail + chunk).split(separator)
        for piece in ended:
            yield "".join([*pending, piece])
            pending = []
        # what may hold the beginning of a separator waits for the next chunk
        safe = max(0, len(tail_new) - len(separator) + 1)
        pending.append(tail_new[:safe])
        tail = tail_new[safe:]
    yield "".join([*pending, tail])


def _sections(chunks: Iterable[str]) -> Iterator[str]:
    buffer = ""
    for chunk in chunks:
        buffer += chunk
        start = 0
        while len(buffer) - start > 2 * SECTION:
            end = _section_end(buffer, start)
            yield buffer[start:end]
            start = end
        buffer = buffer[start:]
    if len(buffer) > SECTION * 3 // 2:
        end = _section_end(buffer, 0)
        yield buffer[:end]
        buffer = buffer[end:]
    yield buffer


_BLANK_LINE = re.compile(r"\r?\n[ \t]*\r?\n")


def _section_end(buffer: str, start: int) -> int:
    """The first blank line after SECTION characters, else a line's end, a space, a hard cut."""
    window = (start + SECTION, start + 2 * SECTION)
    blank = _BLANK_LINE.search(buffer, *window)
    if blank:
        return blank.end()
    for mark in ("\n", " "):
        place = buffer.find(mark, *window)
        if place >= 0:
            return place + 1
    return window[0]


def text_of_rows(rows: Iterator[dict[str, Any]], column: str, where: str) -> Iterator[str]:
    """The text column of each row; ``auto`` looks at the first hundred, at fewer wide ones.

    Raises ConfigError, naming ``where`` and the row, for a value that is no text.
    """
    head: list[dict[str, Any]] = []
    for row in rows:
        head.append(row)
        if len(head) == 100 or len(head) * len(row) > HEAD_CELLS:
            break
    if not head:
        return
    name = choose_column(head, column, where)
    for number, row in enumerate(itertools.chain(head, rows), start=1):
        value = row.get(name)
        if value is not None and not isinstance(value, str):
            raise ConfigError(f"{where}: row {number}: column {name} is no text but {value!r:.40}")
        yield value or ""


def choose_column(rows: list[dict[str, Any]], column: str, where: str) -> str:
    """``column``, or for ``auto``: ``text``, else the text column with the most characters.

    Raises ConfigError where there is none.
    """
    lengths: dict[str, int] = {}
    for row in rows:
        for name, value in row.items():
            if isinstance(value, str):
                lengths[name] = lengths.get(name, 0) + len(value)
    if column != "auto":
        if not any(column in row for row in rows):
            names = list(dict.fromkeys(name for row in rows for name in row))
            shown = ", ".join(names[:12]) + ", ..." * (len(names) > 12)
            raise ConfigError(
                f"data.text_column={column}: {where} has no such column; it has {shown}"
            )
        return column
    if not lengths:
        raise ConfigError(f"data.text_column=auto: {where} has no column of text")
    return "text" if "text" in lengths else max(lengths, key=lambda name: lengths[name])


def jsonl_rows(path: Path, read: dict[Path, int]) -> Iterator[dict[str, Any]]:
    """As ``text_chunks``.  Raises ConfigError, naming the line, for what is no object."""
    for number, line in enumerate(_split_stream(text_chunks(path, read), "\n"), start=1):
        if not line.strip():
            continue
        try:
            row = fileio.parse_json(line)
        except ValueError as error:
            raise ConfigError(f"data.path={path}: line {number} is not JSON ({error})") from error
        if not isinstance(row, dict):
            raise ConfigError(f"data.path={path}: line {number} is not a JSON object")
        yield {name: _unicode(value) for name, value in row.items()}


def _unicode(value: Any) -> Any:
    """JSON can spell half of a surrogate pair, which is no character: U+FFFD stands for it."""
    if not isinstance(value, str) or value.isascii():
        return value
    return re.sub("[\ud800-\udfff]", "\ufffd", value)


def csv_rows(path: Path, read: dict[Path, int]) -> Iterator[dict[str, Any]]:
    """As ``text_chunks``.  Raises ConfigError for a row with more values than columns."""
    csv.field_size_limit(sys.maxsize)
    lines = (line + "\n" for line in _split_stream(text_chunks(path, read), "\n"))
    try:
        rows = csv.DictReader(lines, strict=True)
        for row in rows:
            if any(row.pop(None, ())):
                # a text with a comma, unquoted: its end is not dropped unheard
                raise csv.Error(f"line {rows.line_num} has more values than columns")
            yield dict(row)
    except csv.Error as error:
        raise ConfigError(f"data.path={path}: not readable as CSV ({error})") from error


def parquet_rows(path: Path, read: dict[Path, int]) -> Iterator[dict[str, Any]]:
    """A thousand at a time.  Raises ConfigError for what is no parquet."""
    import pyarrow
    import pyarrow.parquet

    try:
        file, rows = pyarrow.parquet.ParquetFile(path), 0
        for batch in file.iter_batches(batch_size=1024):
            rows += len(batch)
            read[path] = path.stat().st_size * rows // file.metadata.num_rows
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise ConfigError(f"data.path={path}: not readable as parquet ({error})") from error


ROWS = {".jsonl": jsonl_rows, ".csv": csv_rows, ".parquet": parquet_rows}
