"""Files to text and to rows: packed or not, in any encoding, in the dialect of the table."""

from __future__ import annotations

import bz2
import codecs
import contextlib
import csv
import gzip
import itertools
import json
import lzma
import re
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tinygpt import fileio
from tinygpt.config import ConfigError, CustomData, one_line

CHUNK = 1 << 20  # bytes read at a time
PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip")
ROW_FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}
# Byte order marks of what is not UTF-8, the longer ones first: they begin as the shorter do.
MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
HEAD_ROWS, HEAD_CHARACTERS = 2000, 1 << 22  # that are looked at to choose dialect and column
DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
NOWHERE = "\x1f"  # between the values of a table of one column, whose commas are text


def packing(path: Path) -> str:
    """Return the suffix by which a file is packed, or an empty text."""
    suffix = path.suffix.lower()
    return suffix if suffix in PACKED else ""


def inner_suffix(path: Path) -> str:
    """Return the suffix, in lower case, that says what a file holds, below that of its packing."""
    if not packing(path):
        return path.suffix.lower()
    suffix = Path(path.stem).suffix.lower()
    if packing(path) == ".zip" and suffix not in ROW_FORMATS and path.is_file():
        with contextlib.suppress(OSError, zipfile.BadZipFile, ConfigError):
            return Path(_member(zipfile.ZipFile(path), path).filename).suffix.lower()
    return suffix


def format_of(path: Path) -> str:
    """Return ``jsonl``, ``json``, ``csv`` or ``parquet`` by the suffix, for any other ``text``."""
    return ROW_FORMATS.get(inner_suffix(path), "text")


def _member(archive: zipfile.ZipFile, path: Path) -> zipfile.ZipInfo:
    """Return the one file of a .zip, beside those that macOS adds.  Raises ConfigError."""
    found = [
        one
        for one in archive.infolist()
        if not one.is_dir() and not re.search(r"(^|/)(__MACOSX/|\._|\.DS_Store)", one.filename)
    ]
    if len(found) != 1:
        raise ConfigError(
            f"data.path={path}: a .zip must hold one file, this one has {len(found)}; unpack it "
            "and give the folder"
        )
    if found[0].flag_bits & 1:
        raise ConfigError(f"data.path={path}: this .zip is encrypted; unpack it")
    return found[0]


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """Open a file: what is unpacked of it, and the file itself, whose place tells how far it is.

    Raises ConfigError for what cannot be unpacked.
    """
    kind = packing(path)
    try:
        with path.open("rb") as raw:
            if kind == ".zip":
                archive = zipfile.ZipFile(raw)
                yield archive.open(_member(archive, path)), raw
            elif kind == ".zst":
                import pyarrow

                yield pyarrow.CompressedInputStream(pyarrow.PythonFile(raw), "zstd"), raw
            else:
                openers: dict[str, Any] = {
                    ".gz": lambda raw: gzip.GzipFile(fileobj=raw),
                    ".bz2": bz2.BZ2File,
                    ".xz": lzma.LZMAFile,
                }
                yield openers.get(kind, lambda raw: raw)(raw), raw
    except ConfigError:
        raise
    except _DAMAGED as error:
        if not kind:
            raise
        raise ConfigError(f"data.path={path}: damaged or no {kind} ({one_line(error)})") from error


_DAMAGED = (
    *(OSError, EOFError, ValueError, RuntimeError, NotImplementedError),
    *(lzma.LZMAError, zlib.error, zipfile.BadZipFile),
)


def text_chunks(path: Path, read: dict[Path, int], encoding: str | None = None) -> Iterator[str]:
    """Yield the text of a file, as long as it is; ``read`` is told how many bytes of it are read.

    UTF-8, or what a byte order mark says, unless ``encoding`` names another.  Raises ConfigError
    for bytes that are no such text, naming their place.
    """
    with _opened(path) as (stream, raw):
        first = stream.read(CHUNK)
        name = _encoding(first, encoding)
        decoder = codecs.getincrementaldecoder(name)()
        offset = lines = 0
        for chunk in itertools.chain([first], iter(lambda: stream.read(CHUNK), b""), [None]):
            pending = len(decoder.getstate()[0])
            try:
                text = decoder.decode(chunk or b"", final=chunk is None)
            except UnicodeError as error:
                start = getattr(error, "start", 0)
                before = getattr(error, "object", b"")[:start]
                raise ConfigError(
                    f"data.path={path}: not {encoding or 'UTF-8'} text: "
                    f"{getattr(error, 'reason', error)} at byte {offset - pending + start:,}, line "
                    f"{lines + before.count(bytes([10])) + 1:,}; data.encoding= names another, "
                    "as latin-1"
                ) from error
            if "\0" in text:
                raise ConfigError(f"data.path={path}: not a text file (it has zero bytes)")
            offset += len(chunk or b"")
            lines += text.count("\n")
            read[path] = raw.tell()
            if text:
                yield text if encoding is None else _unicode(text)


def _encoding(first: bytes, asked: str | None) -> str:
    found = next((name for mark, name in MARKS.items() if first.startswith(mark)), "utf-8-sig")
    if asked is None:
        return found
    same = codecs.lookup(asked).name == codecs.lookup(found.removesuffix("-sig")).name
    return found if same else asked


def encoding_found(path: Path) -> str:
    """Return the encoding, other than UTF-8, that a byte order mark names, else an empty text."""
    with _opened(path) as (stream, _):
        found = _encoding(stream.read(4), None)
    return "" if found.startswith("utf-8") else found.upper()


def split_at(chunks: Iterable[str], separator: str) -> Iterator[str]:
    """Yield the pieces of a stream of text between the separators."""
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


# --- rows


@dataclass
class Dialect:
    """Say how a CSV file is written: its delimiter, whether quotes quote, whether it has names."""

    delimiter: str
    quoted: bool
    header: bool

    @property
    def is_default(self) -> bool:
        return (self.delimiter, self.quoted, self.header) == (",", True, True)

    def __str__(self) -> str:
        between = {**DELIMITERS, NOWHERE: "one column"}.get(self.delimiter, repr(self.delimiter))
        names = "a header" if self.header else "no header (columns are column_1, column_2, ...)"
        return f"CSV with {between}, {names}{'' if self.quoted else ', quotes are text'}"


class Rows:
    """The rows of a file, as dicts, from the beginning each time; their dialect is known once."""

    def __init__(self, path: Path, config: CustomData) -> None:
        """Raises ConfigError where the first rows cannot be read."""
        self.path, self.format = path, format_of(path)
        self.encoding = config.encoding
        self.dialect: Dialect | None = None
        self.line_end = "\n"
        if self.format == "csv":
            self.dialect = self._dialect(config)

    def read(
        self, read: dict[Path, int], columns: Iterable[str] | None = None
    ) -> Iterator[dict[str, Any]]:
        """Yield the rows; of parquet only ``columns``.  Raises ConfigError, naming the line."""
        if self.format == "parquet":
            return _parquet(self.path, read, columns)
        chunks = text_chunks(self.path, read, self.encoding)
        if self.dialect is not None:
            return self._csv(chunks, self.dialect)
        return _json(self.path, chunks, whole=self.format == "json")

    def _csv(self, chunks: Iterable[str], dialect: Dialect) -> Iterator[dict[str, Any]]:
        chunks = (chunk.replace(self.line_end, "\n") for chunk in chunks)
        records = _records(chunks, dialect.delimiter, dialect.quoted)
        names: list[str] = []
        line = 0
        try:
            for line, record in records:
                if not record:
                    continue
                if not names:
                    names, first = _names(record, dialect.header, line), record
                    if dialect.header:
                        continue
                elif dialect.header and record == first:
                    continue  # files put behind each other
                if len(record) < len(names) or any(record[len(names) :]):
                    # a text with a comma or a line break, unquoted: no part of it is dropped
                    raise csv.Error(
                        f"line {line:,} has {len(record)} values for {len(names)} columns; "
                        "data.delimiter= names what stands between values, and a value that has "
                        "it or a line break must be in quotes"
                    )
                yield dict(zip(names, record, strict=False))
        except csv.Error as error:
            where = "" if str(error).startswith("line") else f"behind line {line:,}: "
            raise ConfigError(
                f"data.path={self.path}: not readable as CSV ({where}{error})"
            ) from error

    def _dialect(self, config: CustomData) -> Dialect:
        text, ended = "", True
        for chunk in text_chunks(self.path, {}, self.encoding):
            text += chunk
            if len(text) > HEAD_CHARACTERS:
                ended = False
                break
        if "\r" in text and "\n" not in text:
            self.line_end = "\r"
            text = text.replace("\r", "\n")
        usual = "\t" if inner_suffix(self.path) == ".tsv" else ","
        delimiters = [usual, *(mark for mark in DELIMITERS if mark != usual)]
        if config.delimiter is not None:
            delimiters = [config.delimiter]
        found = []
        for place, delimiter in enumerate(delimiters):
            for quoted in (True, False) if delimiter == "\t" else (True,):
                share, width = _consistency(text, delimiter, quoted, ended)
                if width > 1:
                    found.append((share, quoted, -place, delimiter))
        best = max(found, default=(0.0, True, 0, delimiters[0]))
        if best[0] < 0.9 and config.delimiter is None:
            is_prose = (
                not found
                and _consistency(text, usual, True, ended)[0] < 1
                and not any(_is_table(text, mark) for mark in DELIMITERS)
            )
            best = (0.0, True, 0, NOWHERE if is_prose else usual)
        _, quoted, _, delimiter = best
        header = config.header
        if header is None:
            records: list[list[str]] = []
            with contextlib.suppress(csv.Error):  # which says so when it is read
                for _, record in itertools.islice(_records([text], delimiter, quoted), 500):
                    records += [record] if record else []
            header = _has_header(records)
        return Dialect(delimiter, quoted, header)


def _records(
    chunks: Iterable[str], delimiter: str, quoted: bool
) -> Iterator[tuple[int, list[str]]]:
    """Yield each record of a CSV text with the number of the line it ends in."""
    csv.field_size_limit(sys.maxsize)
    lines = (line + "\n" for line in split_at(chunks, "\n"))
    reader = csv.reader(
        lines,
        delimiter=delimiter,
        quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE,
        strict=True,
    )
    for record in reader:
        yield reader.line_num, record


def _consistency(text: str, delimiter: str, quoted: bool, ended: bool) -> tuple[float, int]:
    """Return the share of records with as many values as the first, and how many that are."""
    widths = []
    try:
        for _, record in itertools.islice(_records([text], delimiter, quoted), HEAD_ROWS):
            widths += [len(record)] if record else []
    except csv.Error:
        if ended or not widths:
            return 0.0, 0
    if not ended:
        widths.pop()
    if not widths:
        return 0.0, 0
    return widths.count(widths[0]) / len(widths), widths[0]


def _is_table(text: str, delimiter: str) -> bool:
    """Return whether most records behind the first, a title perhaps, have as many values."""
    with contextlib.suppress(csv.Error):
        records = itertools.islice(_records([text], delimiter, True), 1, 500)
        widths = [len(record) for _, record in records if record]
        usual = max(set(widths), key=widths.count, default=1)
        return usual > 1 and widths.count(usual) * 2 > len(widths)
    return True


def _has_header(records: list[list[str]]) -> bool:
    """Return whether the first record names columns: short, none a number or a link, and none a
    value further down or, but for its digits, like most of those."""
    if not records:
        return True
    first, *others = records
    if len(first) > 1:
        others = [record for record in others if record != first]  # files put behind each other
    for place, name in enumerate(cell.strip() for cell in first):
        below = [record[place].strip() for record in others if len(record) > place]
        alike = [re.sub(r"\d+", "0", value) for value in below].count(re.sub(r"\d+", "0", name))
        is_value = name in below or "://" in name or alike * 2 > len(below)
        if name and (is_value or len(name.split()) > 4 or _is_number(name)):
            return False
        if re.search(r"[.!?。！？]\W*$", name):
            return False
    return any(cell.strip() for cell in first)


def _is_number(text: str) -> bool:
    return re.fullmatch(r"[-+]?[\d., :/-]*\d[\d., :/-]*", text) is not None


def _names(record: list[str], header: bool, line: int) -> list[str]:
    """Return the names of the columns.  Raises csv.Error for one that stands twice."""
    if not header:
        return [f"column_{n}" for n in range(1, len(record) + 1)]
    names = [name.strip() for name in record]
    seen = {""}
    for name in names:
        if name in seen and name:
            raise csv.Error(
                f"line {line:,} names the column {name} twice; data.header=false: it is a row"
            )
        seen.add(name)
    return names


def _json(path: Path, chunks: Iterator[str], whole: bool) -> Iterator[dict[str, Any]]:
    """Yield the objects of JSON lines; with ``whole`` also those of an array, or of the list in
    one object.  Raises ConfigError, naming the line, for what is none."""
    if whole:
        head = ""
        for chunk in chunks:
            head += chunk
            if head.strip():
                break
        chunks = itertools.chain([head], chunks)
        if not _is_lines(head):
            yield from _json_values(path, chunks)
            return
    for number, line in enumerate(split_at(chunks, "\n"), start=1):
        if not line.strip():
            continue
        try:
            row = fileio.parse_json(line)
        except ValueError as error:
            raise ConfigError(f"data.path={path}: line {number} is not JSON ({error})") from error
        if not isinstance(row, dict):
            raise ConfigError(f"data.path={path}: line {number} is not a JSON object")
        yield _unicode(row)


def _is_lines(head: str) -> bool:
    """Return whether a JSON text has an object a line: its first line is one, and not all of it."""
    first, _, rest = head.strip().partition("\n")
    if not first.startswith("{") or not rest.strip():
        return False
    try:
        return isinstance(fileio.parse_json(first), dict)
    except ValueError:
        return False


def _json_values(path: Path, chunks: Iterator[str]) -> Iterator[dict[str, Any]]:
    """Yield the objects of an array or of a stream one by one, or those of the list in a lone
    object.  Raises ConfigError, naming the line."""
    decoder, space = json.JSONDecoder(), re.compile(r"[ \t\r\n]*")
    buffer, at, line, count = "", 0, 1, 0
    state, is_array, lone = "begin", False, None
    while True:
        start, at = at, space.match(buffer, at).end()  # type: ignore[union-attr]
        line += buffer.count("\n", start, at)
        if at == len(buffer):
            buffer, at = next(chunks, ""), 0
            if buffer:
                continue
            break
        mark, where = buffer[at], f"data.path={path}: line {line:,}"
        if state == "begin":
            is_array, state = mark == "[", "value"
            at += is_array
        elif is_array and mark == "]" and state != "end":
            at, state = at + 1, "end"
        elif state == "comma" and mark == ",":
            at, state = at + 1, "value"
        elif state != "value":
            expected = "nothing behind the array" if state == "end" else "',' or ']'"
            raise ConfigError(f"{where} is not JSON (must be {expected})")
        else:
            try:
                value, end = decoder.raw_decode(buffer, at)
            except RecursionError as error:
                raise ConfigError(f"{where} is not JSON (nested too deeply)") from error
            except ValueError as error:
                more = "".join(itertools.islice(chunks, max(1, len(buffer) // CHUNK)))
                if more:
                    buffer, at = buffer[at:] + more, 0
                    continue
                raise ConfigError(f"{where} begins what is not JSON ({error})") from error
            if not isinstance(value, dict):
                raise ConfigError(f"{where} is not a JSON object")
            line += buffer.count("\n", at, end)
            at, count = end, count + 1
            state = "comma" if is_array else "value"
            if count == 1 and not is_array:
                lone = value
                continue
            if lone is not None:
                yield _unicode(lone)
                lone = None
            yield _unicode(value)
    if is_array and state != "end":
        raise ConfigError(f"data.path={path}: line {line:,} is not JSON (the array has no end)")
    if lone is not None:
        yield from map(_unicode, _lone_rows(path, lone))


def _lone_rows(path: Path, value: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows in the only object of a file: its list of rows, else itself."""
    lists = {name: rows for name, rows in value.items() if isinstance(rows, list) and rows}
    tables = [name for name, rows in lists.items() if all(isinstance(row, dict) for row in rows)]
    chats = [name for name in tables if all({"role", "from"} & set(row) for row in lists[name])]
    tables = [name for name in tables if name not in chats]
    if len(tables) == 1:
        return lists[tables[0]]
    if tables or (not chats and all(isinstance(one, dict | list) for one in value.values())):
        found = f"{len(tables)} lists of rows ({', '.join(tables[:12])})" if tables else "no list"
        raise ConfigError(
            f"data.path={path}: one JSON object with {found}; an array of objects is read, an "
            "object a line, or one object with one list of objects"
        )
    return [value]


def _unicode(value: Any) -> Any:
    """JSON can spell half of a surrogate pair, which is no character: U+FFFD stands for it."""
    if isinstance(value, dict):
        return {name: _unicode(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_unicode(one) for one in value]
    if not isinstance(value, str) or value.isascii():
        return value
    return re.sub("[\ud800-\udfff]", "\ufffd", value)


def _parquet(
    path: Path, read: dict[Path, int], columns: Iterable[str] | None
) -> Iterator[dict[str, Any]]:
    """Yield rows, a few hundred read at a time.  Raises ConfigError for what is no parquet."""
    import pyarrow
    import pyarrow.parquet

    try:
        with _seekable(path) as source:
            file, rows = pyarrow.parquet.ParquetFile(source), 0
            wanted = (
                None if columns is None else [c for c in columns if c in file.schema_arrow.names]
            )
            for batch in file.iter_batches(batch_size=1024 if columns else 64, columns=wanted):
                rows += len(batch)
                read[path] = path.stat().st_size * rows // file.metadata.num_rows
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"data.path={path}: not readable as parquet ({error})") from error


@contextlib.contextmanager
def _seekable(path: Path) -> Iterator[Path | IO[bytes]]:
    """Unpack a packed file into a temporary one: parquet is read from its end."""
    if not packing(path):
        yield path
        return
    with _opened(path) as (stream, _), tempfile.TemporaryFile() as file:
        while chunk := stream.read(CHUNK):
            file.write(chunk)
        file.seek(0)
        yield file
