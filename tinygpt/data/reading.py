"""Files to documents: text that is cut, or the rows of a table; a chunk of it at a time."""

from __future__ import annotations

import glob
import hashlib
import io
import itertools
import os
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tinygpt.config import ConfigError
from tinygpt.data.readers import (
    CHUNK,
    MARKS,
    PACKED,
    format_of,
    inner_suffix,
    packing,
    split_at,
    text_chunks,
)
from tinygpt.data.survey import Survey, counted

END_OF_TEXT = "<|endoftext|>"
SECTION = 2000  # characters: about the length of a document cut from a long text
BINARY = (".parquet", ".arrow")
# What is read of a folder, packed or not; a file that is named, also by a glob, has any suffix.
_KINDS = """
csv tsv jsonl ndjson json parquet
txt text md markdown mdx rst adoc asciidoc org tex log
srt vtt asm awk bash bat c cc clj cljs coffee cpp cs css cu cuh cxx d dart el erl ex exs
f f90 f95 fish for fs glsl go gradle graphql groovy h hh hpp hs hxx java jl js jsx kt
kts lean less lisp lua m mjs ml mli mm nim pas php pl pm proto ps1 py pyi pyx r rb rkt
rs s sass scala scm scss sh sol sql sv svelte swift tcl ts tsx v vb vhd vhdl vim vue zig
zsh
"""
FOLDER_SUFFIXES = frozenset(f".{kind}" for kind in _KINDS.split())


def find_files(key: str, value: str | Sequence[str], survey: Survey | None = None) -> list[Path]:
    """Return the files that a path, a folder, a glob or a list of these names, each once.

    What a folder or a glob holds beside them is counted in ``survey``.  Raises ConfigError.
    """
    survey = survey or Survey()
    files: list[Path] = []
    for place in _places(value):
        try:
            found = _found(key, place, Path(place).expanduser(), survey.skipped)
        except (OSError, RuntimeError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise ConfigError(f"{key}={place}: cannot be read ({reason})") from error
        files += found
    if not files:
        raise ConfigError(f"{key}={value}: must name a file, a folder or a glob")
    files = _once(files, survey.skipped)
    survey.files += len(files)
    return files


def _places(value: str | Sequence[str]) -> Sequence[str]:
    """Return what a list ``[a.txt,'b, c.txt']`` names; any other text names itself."""
    if not isinstance(value, str):
        return value
    if not (value[:1] == "[" and value[-1:] == "]") or os.path.exists(value):
        return [value] if value else []
    words = shlex.shlex(value[1:-1], posix=True)
    words.whitespace, words.whitespace_split = ",", True
    words.escape = words.commenters = ""
    try:
        return [word.strip() for word in words]
    except ValueError:  # an apostrophe in a name
        return [word.strip() for word in value[1:-1].split(",")]


def _found(key: str, value: str, path: Path, skipped: Counter[str]) -> list[Path]:
    if path.is_dir():
        there = _walk(path, skipped)
        suffixes = {suffix for file in there if (suffix := inner_suffix(file)) in FOLDER_SUFFIXES}
        if suffixes != {".json"}:  # beside text, .json holds settings
            suffixes.discard(".json")
        files = [file for file in there if inner_suffix(file) in suffixes]
        skipped.update(_shown_suffix(file) for file in there if inner_suffix(file) not in suffixes)
    elif path.exists():
        if not path.is_file():
            raise ConfigError(f"{key}={value}: not a file")
        return [path]
    else:
        matches = sorted(map(Path, glob.glob(str(path), recursive=True)), key=_depth)
        files = [file for file in matches if file.is_file()]
        if not files:
            several = f"; several are a list, '{key}=[{value}]'" if "," in value else ""
            reason = "not a file" if matches else "no such file or folder" + several
            raise ConfigError(f"{key}={value}: {reason}")
        if len(files) < len(matches) and "**" not in value:  # which matches folders on its way
            skipped["folder"] += len(matches) - len(files)
    files = _once(files, skipped)
    reasons = {file: _reason_to_skip(key, file) for file in files}
    skipped.update(reason for reason in reasons.values() if reason)
    kept = sorted(file for file, reason in reasons.items() if reason is None)
    if not kept:
        beside = ", ".join(counted(skipped)) or "it is empty"
        raise ConfigError(
            f"{key}={value}: no text in there ({beside}); name the files, or a glob, to read others"
        )
    return kept


def _walk(root: Path, skipped: Counter[str]) -> list[Path]:
    """Return the files under ``root``; linked folders come last and are followed once."""
    files: list[Path] = []
    real, linked = [root], list[Path]()
    seen = set(root.resolve().parents)  # a link up there would lead back here
    while real or linked:
        folder = real.pop() if real else linked.pop(0)
        if folder.resolve() in seen:
            skipped["repeated folder"] += 1
            continue
        seen.add(folder.resolve())
        for path in sorted(folder.iterdir()):
            if path.name.startswith(".") or path.name in ("__MACOSX", "__pycache__"):
                skipped["hidden folder" if path.is_dir() else "hidden file"] += 1
            elif path.is_dir():
                (linked if path.is_symlink() else real).append(path)
            elif path.is_file():
                files.append(path)
            else:
                skipped["broken link" if path.is_symlink() else "special file"] += 1
    return files


def _once(files: Iterable[Path], skipped: Counter[str]) -> list[Path]:
    """Return every file by one of its names, which is not a link where it has another."""
    kept: dict[tuple[int, int], Path] = {}
    order = list(files)
    for path in sorted(order, key=Path.is_symlink):
        status = path.stat()
        if kept.setdefault((status.st_dev, status.st_ino), path) is not path:
            skipped["duplicate file"] += 1
    names = set(kept.values())
    return [path for path in dict.fromkeys(order) if path in names]


def _depth(path: Path) -> tuple[int, Path]:
    return len(path.parts), path


def _shown_suffix(path: Path) -> str:
    suffix = path.suffix.lower()
    return (inner_suffix(path) + suffix if suffix in PACKED else suffix) or "without suffix"


def _reason_to_skip(key: str, path: Path) -> str | None:
    """Return why a file that no name asks for holds no text, as git tells it: by its first 8 kB."""
    try:
        with path.open("rb") as file:
            head = file.read(8192)
    except OSError as error:
        raise ConfigError(f"{key}={path}: cannot be read ({error.strerror})") from error
    if not head:
        return "empty file"
    is_packed = path.suffix.lower() in (*BINARY, *PACKED) or head.startswith(tuple(MARKS))
    return "binary file" if b"\0" in head and not is_packed else None


class Scan(NamedTuple):
    """What is known of a file before it is read; ``size`` in bytes."""

    sha256: str
    has_end_of_text: bool
    size: int
    has_carriage_return: bool
    has_indented_line: bool
    is_plain: bool  # neither packed nor in another encoding than UTF-8


# A line that begins with white space, of which U+00A0 and U+3000 have other first bytes.
_INDENTED = re.compile(rb"[\n\r\v\f](?:[ \t\x1f]|\xc2|\xe1\x9a|\xe2\x80|\xe2\x81|\xe3\x80)")


def scan(path: Path, where: str, encoding: str | None = None) -> Scan:
    """Read a file once, for its checksum and what decides how a text is cut.

    Raises ConfigError, which ``where`` begins, for one that is empty, no text or cannot be read.
    """
    sha, found, tail, size = hashlib.sha256(), False, b"", 0
    mark, carriage_return, indented, line_end = END_OF_TEXT.encode(), False, False, b"\n"
    try:
        with path.open("rb") as file:
            first = file.read(4)
            file.seek(0)
            is_plain = not packing(path) and not first.startswith(tuple(MARKS)) and not encoding
            while chunk := file.read(CHUNK):
                sha.update(chunk)
                size += len(chunk)
                if not is_plain:
                    continue
                if b"\0" in chunk and path.suffix.lower() not in BINARY:
                    raise ConfigError(f"{where}: not a text file (it has zero bytes)")
                tail += chunk
                found = found or mark in tail
                carriage_return = carriage_return or b"\r" in chunk
                indented = indented or _INDENTED.search(line_end + chunk) is not None
                line_end = chunk[-1:]
                tail = tail[-len(mark) :]
    except OSError as error:
        raise ConfigError(f"{where}: cannot be read ({error.strerror})") from error
    if size == 0:
        raise ConfigError(f"{where}: this file is empty")
    if not is_plain and format_of(path) == "text":
        found = any(
            True for piece in itertools.islice(_around_marks(text_chunks(path, {}, encoding)), 1)
        )
    return Scan(sha.hexdigest(), found, size, carriage_return, indented, is_plain)


def cut(chunks: Iterable[str], separator: str) -> Iterator[str]:
    """Cut documents from a stream of text: ``none`` (one), ``sections``, or at a separator.

    Line ends become ``\\n``.  Blank lines around a document are dropped, and white space behind it;
    before it, too, where the separator is a mark such as ``<|endoftext|>``.
    """
    chunks, separator = unix_lines(chunks), "".join(unix_lines([separator]))
    trim = _without_blank_lines if keeps_indentation(separator) else str.strip
    if separator == "none":
        pieces: Iterator[str] = iter(["".join(chunks)])
    elif separator == "sections":
        pieces = _sections(chunks)
    else:
        pieces = split_at(chunks, separator)
    return (text for piece in pieces if (text := trim(piece)))


def keeps_indentation(separator: str) -> bool:
    """Return whether a document begins with a line, whose indentation is its own."""
    return separator in ("none", "sections") or separator.isspace()


def unix_lines(chunks: Iterable[str]) -> Iterator[str]:
    """Yield the same text with ``\\n`` for every ``\\r\\n`` and ``\\r``."""
    decoder = io.IncrementalNewlineDecoder(None, translate=True)
    for chunk in chunks:
        yield decoder.decode(chunk)
    yield decoder.decode("", final=True)


def _without_blank_lines(piece: str) -> str:
    text = piece.strip()
    blank = piece[: piece.find(text[:1])]
    return (blank + ".").splitlines()[-1][:-1] + text if text else ""


_MARK = re.compile(rf"(.)(.){re.escape(END_OF_TEXT)}(?=(.))", re.DOTALL)
_QUOTES = "\"'`“”‘’«»„()[]{}<>*_"
_ENDS = ".!?…。！？\"'”’»)\n"  # of a text
ENOUGH_MARKS, MANY_MARKS = 1000, 50  # that are looked at; without quotes in no text about them


def is_separated(chunks: Iterable[str]) -> bool:
    """Return whether ``<|endoftext|>`` stands between documents, not in sentences about it.

    Between documents it has a line of its own, or a text ends directly before it or begins directly
    behind it, without blanks, commas or quotation marks around it, in at least half of all cases;
    or it follows the end of a sentence nearly everywhere; or it is everywhere and never quoted.
    """
    between = sentences = quoted = count = 0
    for last, before, behind in itertools.islice(_around_marks(chunks), ENOUGH_MARKS):
        count += 1
        is_quoted = before in _QUOTES and behind in _QUOTES
        # scripts without spaces between words glue a mention to its sentence
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


def _around_marks(chunks: Iterable[str]) -> Iterator[tuple[str, str, str]]:
    """Yield the two characters before and the one behind every mark."""
    tail = "\n\n"
    for chunk in itertools.chain(unix_lines(chunks), ["\n"]):
        text = tail + chunk
        yield from _MARK.findall(text)
        tail = text[-len(END_OF_TEXT) - 2 :]


def _sections(chunks: Iterable[str]) -> Iterator[str]:
    buffer, in_line = "", False

    def section(start: int, end: int | None = None) -> str:
        nonlocal in_line
        text = buffer[start:end]
        if in_line:  # which was cut: its spaces indent nothing
            text = re.sub(r"\A[^\S\n]+", "", text)
        in_line = end is not None and buffer[end - 1] != "\n"
        return text

    for chunk in chunks:
        buffer += chunk
        start = 0
        while len(buffer) - start > 2 * SECTION:
            end = _section_end(buffer, start)
            yield section(start, end)
            start = end
        buffer = buffer[start:]
    end = _section_end(buffer, 0) if len(buffer) > SECTION * 3 // 2 else 0
    if end:
        yield section(0, end)
    yield section(end)


_BLANK_LINE = re.compile(r"\n[ \t]*\n")


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
