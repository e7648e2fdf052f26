"""Unpack and decode files, and cut their text into documents, a chunk at a time."""

from __future__ import annotations

import codecs
import contextlib
import io
import itertools
import lzma
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from tinygpt import fileio
from tinygpt.config import ConfigError, one_line

CHUNK = 1 << 20  # bytes read at a time
PACKED = (".gz", ".bz2", ".xz", ".zst", ".zstd", ".zip")
BINARY = (".parquet", ".arrow")
ROW_FORMATS = {
    **dict.fromkeys((".jsonl", ".ndjson", ".jsonlines"), "jsonl"),
    **dict.fromkeys((".csv", ".tsv", ".tab", ".psv"), "csv"),
    ".json": "json",
    ".parquet": "parquet",
}
# Byte order marks other than UTF-8's, the longer ones first because the shorter are their prefixes.
MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_DAMAGED = (lzma.LZMAError, zlib.error, zipfile.BadZipFile)

REFUSED = {
    b"%PDF-": "a PDF; extract its text first",
    b"{\\rtf": "RTF; save it as plain text first",
}
_ESCAPE = re.compile(rb"\x1b\$(?:[@B]|\)C)")  # begins Japanese or Korean in ISO-2022

END_OF_TEXT = "<|endoftext|>"
SECTION = 2000  # characters, the approximate length of a section

_BLANK_LINE = re.compile(r"\n[ \t]*\n")
_MARK = re.compile(rf"(.)(.){re.escape(END_OF_TEXT)}(?=(.))", re.DOTALL)
_QUOTES = "\"'`“”‘’«»„()[]{}<>*_"
_ENDS = ".!?…。！？\"'”’»)\n"  # of a text
ENOUGH_MARKS = 1000  # marks to look at
MANY_MARKS = 50  # a text about the mark that has so many would quote them


# --- packed files


def packing(path: Path) -> str:
    """Return the suffix of a packed file, or an empty string."""
    suffix = path.suffix.lower()
    return suffix if suffix in PACKED else ""


def inner_suffix(path: Path) -> str:
    """Return the lower-case suffix of a file's content, without that of its packing."""
    if not packing(path):
        return path.suffix.lower()
    suffix = Path(path.stem).suffix.lower()
    if packing(path) == ".zip" and suffix not in ROW_FORMATS and path.is_file():
        with contextlib.suppress(OSError, zipfile.BadZipFile, ConfigError):
            return Path(_member(zipfile.ZipFile(path), path).filename).suffix.lower()
    return suffix


def format_of(path: Path) -> str:
    """Return ``jsonl``, ``json``, ``csv`` or ``parquet`` by the suffix, otherwise ``text``."""
    suffix = inner_suffix(path)
    if suffix == ".jl" and has_objects(path):  # Scrapy's, not Julia
        return "jsonl"
    return ROW_FORMATS.get(suffix, "text")


def has_objects(path: Path) -> bool:
    """Return whether the first ten lines of a file are JSON objects."""
    with unpacked(path) as (stream, _):
        head = stream.read(CHUNK).decode("utf-8-sig", "replace")
    lines = [line for line in head.split("\n")[:10] if line.strip()]
    try:
        return bool(lines) and all(isinstance(fileio.parse_json(line), dict) for line in lines)
    except ValueError:
        return False


def _member(archive: zipfile.ZipFile, path: Path) -> zipfile.ZipInfo:
    """Return the only file of a .zip, ignoring those of macOS.  Raises ConfigError."""
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
def unpacked(path: Path) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """Open a file and yield its unpacked stream and the raw one, whose position is the progress.

    Raises ConfigError if it cannot be unpacked.
    """
    kind = packing(path)
    try:
        with path.open("rb") as raw:
            if kind == ".zip":
                archive = zipfile.ZipFile(raw)
                yield archive.open(_member(archive, path)), raw
            else:
                yield fileio.unpacked(raw, kind), raw
    except (OSError, EOFError, ValueError, RuntimeError, *_DAMAGED) as error:
        if not kind or isinstance(error, ConfigError):
            raise
        raise ConfigError(f"data.path={path}: damaged or no {kind} ({one_line(error)})") from error


# --- text


def text_chunks(path: Path, read: dict[Path, int], encoding: str | None = None) -> Iterator[str]:
    """Yield the text of a file in chunks, and keep the number of bytes read in ``read``.

    The encoding is ``encoding``, else that of a byte order mark, else UTF-8.  Raises ConfigError,
    naming the place, for bytes that it cannot decode.
    """
    with unpacked(path) as (stream, raw):
        first = stream.read(CHUNK)
        is_unmarked = encoding is None and not first.startswith(tuple(MARKS))
        reason = next((REFUSED[mark] for mark in REFUSED if first.startswith(mark)), None)
        if reason or (is_unmarked and b"\0" in first):
            reason = reason or "it has NUL bytes"
            raise ConfigError(f"data.path={path}: not a text file ({reason})")
        decoder = codecs.getincrementaldecoder(_encoding(first, encoding))()
        offset = lines = 0
        for chunk in itertools.chain([first], iter(lambda: stream.read(CHUNK), b""), [None]):
            if encoding is None and chunk and (escape := _ESCAPE.search(chunk)):
                name = "iso2022_kr" if escape[0].endswith(b"C") else "iso2022_jp"
                raise ConfigError(
                    f"data.path={path}: not UTF-8 text: it changes its character set at byte "
                    f"{offset + escape.start():,}; data.encoding={name} reads that"
                )
            pending = len(decoder.getstate()[0])
            try:
                text = decoder.decode(chunk or b"", final=chunk is None)
            except UnicodeError as error:
                start = getattr(error, "start", 0)
                line = lines + getattr(error, "object", b"")[:start].count(b"\n") + 1
                raise ConfigError(
                    f"data.path={path}: not {encoding or 'UTF-8'} text: "
                    f"{getattr(error, 'reason', error)} at byte {offset - pending + start:,}, line "
                    f"{line:,}; data.encoding= names another, as latin-1"
                ) from error
            if "\0" in text:
                raise ConfigError(f"data.path={path}: not a text file (it has NUL bytes)")
            offset += len(chunk or b"")
            lines += text.count("\n")
            read[path] = raw.tell()
            if text:
                yield text if encoding is None else unicode_only(text)


def _encoding(first: bytes, asked: str | None) -> str:
    found = next((name for mark, name in MARKS.items() if first.startswith(mark)), "utf-8-sig")
    if asked is None:
        return found
    same = codecs.lookup(asked).name == codecs.lookup(found.removesuffix("-sig")).name
    return found if same else asked


def encoding_found(path: Path) -> str:
    """Return the encoding of a byte order mark, an empty string for UTF-8."""
    with unpacked(path) as (stream, _):
        found = _encoding(stream.read(4), None)
    return "" if found.startswith("utf-8") else found.upper()


def split_at(chunks: Iterable[str], separator: str) -> Iterator[str]:
    """Split a stream of text at every ``separator``."""
    pending: list[str] = []
    tail = ""
    for chunk in chunks:
        *ended, tail = (tail + chunk).split(separator)
        for piece in ended:
            yield "".join([*pending, piece])
            pending = []
        # the tail may be the beginning of a separator
        safe = max(0, len(tail) - len(separator) + 1)
        pending.append(tail[:safe])
        tail = tail[safe:]
    yield "".join([*pending, tail])


def unicode_only(value: Any) -> Any:
    """Replace lone surrogates, which JSON can express, by U+FFFD in all strings of ``value``."""
    if isinstance(value, dict):
        return {name: unicode_only(one) for name, one in value.items()}
    if isinstance(value, list):
        return [unicode_only(one) for one in value]
    if not isinstance(value, str) or value.isascii():
        return value
    return re.sub("[\ud800-\udfff]", "\ufffd", value)


# --- documents


def cut(chunks: Iterable[str], separator: str) -> Iterator[str]:
    """Cut a stream of text into one document (``none``), ``sections``, or at a separator.

    Line ends become ``\\n``.  Blank lines around a document and white space after it are dropped,
    and if the separator is a mark such as ``<|endoftext|>``, also white space before it.
    """
    chunks, separator = unix_lines(chunks), "".join(unix_lines([separator]))
    if separator == "none":
        pieces: Iterator[str] = iter(["".join(chunks)])
    elif separator == "sections":
        pieces = _sections(chunks)
    else:
        pieces = split_at(chunks, separator)
    keeps = keeps_indentation(separator)
    for piece in pieces:
        text = piece.strip()
        if text and keeps:
            before = piece[: piece.find(text[0])]
            text = (before + ".").splitlines()[-1][:-1] + text
        if text:
            yield text


def keeps_indentation(separator: str) -> bool:
    """Return whether documents begin at the start of a line and keep its indentation."""
    return separator in ("none", "sections") or separator.isspace()


def unix_lines(chunks: Iterable[str]) -> Iterator[str]:
    """Replace every ``\\r\\n`` and ``\\r`` by ``\\n``."""
    decoder = io.IncrementalNewlineDecoder(None, translate=True)
    for chunk in chunks:
        yield decoder.decode(chunk)
    yield decoder.decode("", final=True)


def is_separated(chunks: Iterable[str]) -> bool:
    """Return whether ``<|endoftext|>`` separates documents rather than being mentioned in a text.

    It does if at least half of the marks have a line of their own or touch the text before or
    after them, without quotation marks; if nearly all follow the end of a sentence; or if there
    are many and few are quoted.
    """
    between = sentences = quoted = count = 0
    for last, before, behind in itertools.islice(around_marks(chunks), ENOUGH_MARKS):
        count += 1
        is_quoted = before in _QUOTES and behind in _QUOTES
        # in scripts without spaces between words a mention touches its sentence
        in_sentence = before.isalnum() and before >= "\u0e00"
        after_blank = before in " \t" and last in _ENDS
        directly = before not in " \t=,;:" or (after_blank and behind == "\n")
        between += directly and not (is_quoted or in_sentence or behind in " \t.,;:!?)")
        sentences += after_blank
        quoted += is_quoted
    return (
        between * 2 >= count > 0
        or (count > 1 and (between + sentences) * 10 >= count * 9)
        or (count >= MANY_MARKS and quoted * 10 <= count)
    )


def around_marks(chunks: Iterable[str]) -> Iterator[tuple[str, str, str]]:
    """Yield the two characters before and the one after every mark."""
    tail = "\n\n"
    for chunk in itertools.chain(unix_lines(chunks), ["\n"]):
        text = tail + chunk
        yield from _MARK.findall(text)
        tail = text[-len(END_OF_TEXT) - 2 :]


def _sections(chunks: Iterable[str]) -> Iterator[str]:
    last = "\n"
    for section in _lengths_of_text(chunks):
        # the spaces at a cut within a line are no indentation
        yield section if last == "\n" else re.sub(r"\A[^\S\n]+", "", section)
        last = section[-1:]


def _lengths_of_text(chunks: Iterable[str]) -> Iterator[str]:
    """Cut after SECTION characters at a blank line, else at the end of a line, else at a space,
    else anywhere."""
    buffer = ""
    for chunk in itertools.chain(chunks, [None]):
        buffer += chunk or ""
        start, longest = 0, SECTION * 3 // 2 if chunk is None else 2 * SECTION
        while len(buffer) - start > longest:
            window = (start + SECTION, start + 2 * SECTION)
            blank = _BLANK_LINE.search(buffer, *window)
            ends = (buffer.find(mark, *window) + 1 for mark in ("\n", " "))
            end = blank.end() if blank else next(filter(None, ends), window[0])
            yield buffer[start:end]
            start = end
        buffer = buffer[start:]
    yield buffer
