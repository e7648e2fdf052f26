"""Corpora: where documents come from, and which split each belongs to.

A corpus is streamed: nothing here holds more than a chunk of a file or a batch of rows.
"""

from __future__ import annotations

import csv
import glob
import hashlib
import io
import itertools
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from tinygpt import rundir
from tinygpt.config import ConfigError, CustomData, DataConfig, HubData, SyntheticData
from tinygpt.data.network import require_hub

END_OF_TEXT = "<|endoftext|>"
SECTION = 2000  # characters: about the length of a document cut from a long text
BINARY = (".parquet", ".arrow", ".gz", ".zst")
CHUNK = 1 << 20  # bytes read at a time
HEAD_CELLS = 1 << 17  # of rows that are looked at to choose the text column
ROWS = (".jsonl", ".csv", ".parquet")
TEXT_SUFFIXES = (".txt", *ROWS)


class Document(NamedTuple):
    """One text; ``nats`` is its exact information content −log p where the source knows it."""

    text: str
    nats: float | None = None


class Corpus(Protocol):
    """What a source of text offers.  ``own`` names the splits that it brings itself."""

    own: set[str]

    def fingerprint(self) -> str:
        """Changes whenever the text does; independent of where it lies."""

    def documents(self, split: str) -> Iterator[Document]:
        """The documents of ``split``: ``train``, or one of ``own``."""

    def position(self) -> tuple[int, int] | None:
        """How many bytes of it have been read this time, and of how many, where one can tell."""


def open_corpus(config: DataConfig) -> Corpus:
    """The corpus that ``config`` names.  Raises ConfigError where it cannot be read."""
    if isinstance(config, SyntheticData):
        return SyntheticCorpus(config)
    if isinstance(config, HubData):
        return HubCorpus(config)
    assert isinstance(config, CustomData)
    return FileCorpus(config)


def split_of(text: str, val_fraction: float, test_fraction: float) -> str:
    """``train``, ``val`` or ``test``, by a hash of the document: it never changes sides."""
    number = int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "big")
    place = number / 2**64
    if place < val_fraction:
        return "val"
    return "test" if place < val_fraction + test_fraction else "train"


def split_documents(corpus: Corpus, config: DataConfig) -> Iterator[tuple[str, Document]]:
    """Every document with its split: the source's own validation and test first, then the rest.

    A training document that stands in the source's own validation or test text too is given the
    split ``duplicate``, so that it can be counted and kept out of training.
    """
    seen: set[bytes] = set()
    for split in ("val", "test"):
        if split in corpus.own:
            for document in corpus.documents(split):
                seen.add(_short_hash(document.text))
                yield split, document
    val = 0.0 if "val" in corpus.own else config.val_fraction
    test = 0.0 if "test" in corpus.own or config.val_is_test else config.test_fraction
    for document in itertools.islice(corpus.documents("train"), config.max_documents):
        if seen and _short_hash(document.text) in seen:
            yield "duplicate", document
        else:
            yield split_of(document.text, val, test), document


def _short_hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()


def first_bytes(
    texts: Iterable[str], limit: int, progress: Callable[[int], None] = lambda size: None
) -> Iterator[str]:
    """Whole texts until ``limit`` bytes of UTF-8 are reached."""
    size = 0
    for text in texts:
        if size >= limit:
            return
        yield text
        size += len(text.encode("utf-8", "replace"))
        progress(size)


class SyntheticCorpus:
    """Stories from the embedded grammar, as many as are asked for."""

    def __init__(self, config: SyntheticData) -> None:
        if config.max_tokens is None and config.max_documents is None:
            raise ConfigError("data.max_tokens=null: the embedded corpus is endless; give a number")
        self.config = config
        self.own: set[str] = set()

    def fingerprint(self) -> str:
        names = ("corpus_seed", "n_facts", "zipf_exponent", "noise_rate", "heldout_entities")
        keys = {name: getattr(self.config, name) for name in names}
        first = next(self.documents("train")).text  # changes with the grammar itself
        return hashlib.sha256(json.dumps([keys, first], sort_keys=True).encode()).hexdigest()

    def documents(self, split: str) -> Iterator[Document]:
        from tinygpt.data.synthetic import Grammar

        return (Document(text, nats) for text, nats in Grammar(self.config).stories())

    def position(self) -> None:
        return None


class FileCorpus:
    """Files of the user's own: .txt cut into documents, one document a row otherwise."""

    def __init__(self, config: CustomData) -> None:
        self.config = config
        self.files = {"train": find_files("data.path", config.path)}
        for split, key in (("val", "val_file"), ("test", "test_file")):
            value = getattr(config, key)
            if value is not None:
                self.files[split] = find_files(f"data.{key}", value)
        self.own = set(self.files) - {"train"}
        self.scans = {
            path: _scan(path, f"data.{'path' if split == 'train' else split + '_file'}={path}")
            for split, paths in self.files.items()
            for path in paths
        }

        self.read: dict[Path, int] = {}  # bytes

    def fingerprint(self) -> str:
        found = {  # the suffix says how a file is read
            split: [[self.scans[p].sha256, p.suffix if p.suffix in ROWS else ""] for p in paths]
            for split, paths in self.files.items()
        }
        return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()

    def documents(self, split: str) -> Iterator[Document]:
        self.read |= dict.fromkeys(self.files[split], 0)
        for path in self.files[split]:
            for text in self._texts(path):
                yield Document(text)

    def position(self) -> tuple[int, int]:
        return sum(self.read.values()), sum(scan.size for scan in self.scans.values())

    def _texts(self, path: Path) -> Iterator[str]:
        if path.suffix in ROWS:
            rows = {".jsonl": _jsonl_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}
            found = rows[path.suffix](path, self.read)
            return text_of_rows(found, self.config.text_column, str(path))
        separator = self.config.separator
        if separator == "auto":
            separator = END_OF_TEXT if self.scans[path].has_end_of_text else "sections"
        return cut(_text_chunks(path, self.read), separator)


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


class _Scan(NamedTuple):
    sha256: str
    has_end_of_text: bool
    size: int


def _scan(path: Path, where: str) -> _Scan:
    """One pass over a file: its hash, its separator, and whether it is text at all."""
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
    return _Scan(sha.hexdigest(), found, size)


def _text_chunks(path: Path, read: dict[Path, int]) -> Iterator[str]:
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
    """The text column of each row; ``auto`` looks at the first hundred, at fewer wide ones."""
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
    """``column``, or for ``auto``: ``text``, else the text column with the most characters."""
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


def _jsonl_rows(path: Path, read: dict[Path, int]) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(_split_stream(_text_chunks(path, read), "\n"), start=1):
        if not line.strip():
            continue
        try:
            row = rundir.parse_json(line)
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


def _csv_rows(path: Path, read: dict[Path, int]) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(sys.maxsize)
    lines = (line + "\n" for line in _split_stream(_text_chunks(path, read), "\n"))
    try:
        rows = csv.DictReader(lines, strict=True)
        for row in rows:
            if any(row.pop(None, ())):
                # a text with a comma, unquoted: its end is not dropped unheard
                raise csv.Error(f"line {rows.line_num} has more values than columns")
            yield dict(row)
    except csv.Error as error:
        raise ConfigError(f"data.path={path}: not readable as CSV ({error})") from error


def _parquet_rows(path: Path, read: dict[Path, int]) -> Iterator[dict[str, Any]]:
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


class HubCorpus:
    """A text data set of the Hugging Face hub, streamed; or a local folder laid out like one."""

    def __init__(self, config: HubData) -> None:
        self.config = config
        self.local = Path(config.repo).is_dir()
        if not self.local:
            require_hub(config.repo)
        self.splits = self._own_splits()
        self.own = set(self.splits) - {"train"}

    def _own_splits(self) -> dict[str, str]:
        there = self._ask(lambda hub: hub.get_dataset_split_names(*self._place()))
        chosen = {"train": self.config.split}
        wanted = {"val": self.config.val_split, "test": self.config.test_split}
        for split, name in wanted.items():
            standard = "validation" if split == "val" else "test"
            if name == "auto" and standard in there and standard != self.config.split:
                chosen[split] = standard
            elif name not in (None, "auto"):
                chosen[split] = str(name)
        for split, name in chosen.items():
            key = "split" if split == "train" else f"{split}_split"
            if name not in there:
                raise ConfigError(f"data.{key}={name}: no such split; there are {', '.join(there)}")
        return chosen

    def _place(self) -> tuple[str, str | None]:
        """What the hub library is to open, and the configuration's name in it.

        Only a README.md says what configurations there are.  In a local folder without one, as
        the hub's own parquet branch comes, a configuration is the sub-folder of its name.
        """
        repo, name = self.config.repo, self.config.config
        if self.local and name is not None and not Path(repo, "README.md").exists():
            folder = Path(repo, name)
            if folder.is_dir():
                return str(folder), None
        return repo, name

    def _ask(self, question: Callable[[Any], Any]) -> Any:
        """Calls the hub library and makes whatever it raises one line."""
        import datasets

        datasets.logging.set_verbosity_error()
        datasets.disable_progress_bars()
        try:
            return question(datasets)
        except (OSError, ValueError, RuntimeError) as error:
            raise self._refused(error) from error

    def _refused(self, error: Exception) -> ConfigError:
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        return ConfigError(f"data.repo={self.config.repo}: {line}")

    def fingerprint(self) -> str:
        config = self.config
        found: dict[str, Any] = {
            "config": config.config,
            "splits": self.splits,
            "column": config.text_column,
        }
        if self.local:
            files = sorted(p for p in Path(config.repo).rglob("*") if p.is_file())
            found["files"] = [rundir.sha256(p) for p in files]
        else:
            found |= {"repo": config.repo, "revision": config.revision}
        return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()

    def documents(self, split: str) -> Iterator[Document]:
        config = self.config
        stream = self._ask(
            lambda hub: hub.load_dataset(
                *self._place(),
                split=self.splits[split],
                streaming=True,
                revision=config.revision,
            )
        )
        rows = self._rows(iter(stream))
        texts = text_of_rows(rows, config.text_column, f"data.repo={config.repo}")
        if config.separator not in ("auto", "none"):
            texts = cut((text + "\n" for text in texts), config.separator)
        return (Document(text) for text in texts)

    def position(self) -> None:
        return None

    def _rows(self, stream: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        try:
            yield from stream
        except (OSError, ValueError, RuntimeError) as error:
            raise self._refused(error) from error


def describe(config: DataConfig) -> str:
    """The name of a corpus, as results.json has it."""
    return config.repo if isinstance(config, HubData) and config.name == "hub" else config.name
