"""Read the documents of a corpus and assign each to a split.

Corpora are streamed: nothing here holds more than a chunk of a file or a batch of rows.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from tinygpt import fileio
from tinygpt.config import ConfigError, CustomData, DataConfig, HubData, SyntheticData, first_line
from tinygpt.data import columns, textfiles
from tinygpt.data.files import find_files
from tinygpt.data.network import require_hub
from tinygpt.data.readers import Rows
from tinygpt.data.survey import Survey
from tinygpt.data.textfiles import END_OF_TEXT, cut


class Document(NamedTuple):
    """Hold a text and, if the source knows it, its information content -log p in nats."""

    text: str
    nats: float | None = None


class Corpus(Protocol):
    """Define a source of documents; ``own`` names the held-out splits that it provides."""

    own: set[str]

    def fingerprint(self) -> str:
        """Return a hash that depends on the text, not on its location."""

    def documents(self, split: str) -> Iterator[Document]:
        """Yield the documents of ``split``: ``train``, or one of ``own``."""

    def position(self) -> tuple[int, int] | None:
        """Return the bytes read so far and the total, or None if unknown."""
        return None


def open_corpus(config: DataConfig) -> Corpus:
    """Return the corpus of ``config``.  Raises ConfigError if it cannot be read."""
    if isinstance(config, SyntheticData):
        return SyntheticCorpus(config)
    if isinstance(config, HubData):
        return HubCorpus(config)
    assert isinstance(config, CustomData)
    return FileCorpus(config)


def split_of(text: str, val_fraction: float, test_fraction: float) -> str:
    """Return the split of a document, which depends only on a hash of its text."""
    place = int.from_bytes(_short_hash(text), "big") / 2**64
    if place < val_fraction:
        return "val"
    return "test" if place < val_fraction + test_fraction else "train"


def split_documents(corpus: Corpus, config: DataConfig) -> Iterator[tuple[str, Document]]:
    """Yield every document with its split: the source's own validation and test splits first.

    A later document whose text is also in one of those has the split ``duplicate``.
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
        if seen and document.text and _short_hash(document.text) in seen:
            yield "duplicate", document
        else:
            yield split_of(document.text, val, test), document


def _short_hash(text: str) -> bytes:
    """Hash a text, ignoring surrounding white space and the kind of line ends."""
    text = text.strip().replace("\r\n", "\n").replace("\r", "\n")
    return hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()


def _sha256(values: Any) -> str:
    # not fileio.digest, whose JSON has no spaces: fingerprints must match those of old runs
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def first_bytes(texts: Iterable[str], limit: int) -> Iterator[str]:
    """Yield whole texts until ``limit`` bytes of UTF-8 are reached."""
    size = 0
    for text in texts:
        if size >= limit:
            return
        yield text
        size += len(text.encode("utf-8", "replace"))


class SyntheticCorpus(Corpus):
    """Yield stories from the embedded grammar."""

    def __init__(self, config: SyntheticData) -> None:
        if config.max_tokens is None and config.max_documents is None:
            raise ConfigError("data.max_tokens=null: the embedded corpus is endless; give a number")
        self.config = config
        self.own: set[str] = set()

    def fingerprint(self) -> str:
        names = ("corpus_seed", "n_facts", "zipf_exponent", "noise_rate", "heldout_entities")
        first = next(self.documents("train")).text  # changes with the grammar itself
        return _sha256([{name: getattr(self.config, name) for name in names}, first])

    def documents(self, split: str) -> Iterator[Document]:
        from tinygpt.data.synthetic import Grammar

        return (Document(text, nats) for text, nats in Grammar(self.config).stories())


class FileCorpus:
    """Read the user's files: texts, cut into documents, and tables, one document per row."""

    def __init__(self, config: CustomData) -> None:
        self.config, self.survey = config, Survey()
        found: dict[str, list[Path]] = {}
        for split, key in (("train", "path"), ("val", "val_file"), ("test", "test_file")):
            if (value := getattr(config, key)) is not None:
                found[split] = find_files(f"data.{key}", value, self.survey)
        sources: dict[Path, Source] = {}  # a file may be in two splits
        for split, paths in found.items():
            key = "path" if split == "train" else f"{split}_file"
            sources |= {path: Source(path, f"data.{key}={path}", config) for path in paths}
        self.files = {split: [sources[p] for p in paths] for split, paths in found.items()}
        self.sources, self.own = list(sources.values()), set(found) - {"train"}
        self._choose_columns()
        texts = [source for source in self.sources if source.rows is None]
        for source in texts:
            source.choose_separator()
        mark = config.separator
        is_mark = mark not in ("auto", "none", "sections") and texts
        if is_mark and not any(source.has(mark) for source in texts):
            raise ConfigError(f"data.separator={mark!r}: occurs nowhere in data.path={config.path}")
        self.read: dict[Path, int] = {}  # bytes

    def _choose_columns(self) -> None:
        """Choose the text column of each table; tables with the same columns share it."""
        asked = self.config.text_column
        alike: dict[frozenset[str], columns.Choice] = {}
        refused: dict[Path, ConfigError] = {}
        for source in self.sources:
            if source.rows is None:
                continue
            head = columns.head_of(source.rows.read({}), asked)
            names = frozenset(name for row in head for name in row)
            if names not in alike:
                first = next(iter(alike.values()), None)
                try:
                    alike[names] = columns.choose(head, asked, str(source.path), first)
                except ConfigError as error:
                    refused[source.path] = error
                    continue
            choice = source.choice = alike[names]
            source.is_column_new = str(choice).startswith("column_") or (
                columns.chosen_before(head, asked) != str(choice)
            )
        if refused:
            rest = [str(source.path) for source in self.sources if source.path not in refused]
            files = f"; data.path='[{','.join(rest)}]' names those with text"
            raise ConfigError(f"{next(iter(refused.values()))}{files * (0 < len(rest) < 9)}")
        self.survey.text_column = ", ".join(dict.fromkeys(map(str, alike.values()))) or None
        others = (name for choice in alike.values() for name in choice.others)
        self.survey.other_columns = list(dict.fromkeys(others))

    def fingerprint(self) -> str:
        return self._fingerprint

    @functools.cached_property
    def _fingerprint(self) -> str:
        return _sha256({split: [s.identity() for s in own] for split, own in self.files.items()})

    def documents(self, split: str) -> Iterator[Document]:
        self.read |= {source.path: 0 for source in self.files[split]}
        for source in self.files[split]:
            self.survey.formats.update(source.formats())
            yield from map(Document, source.texts(self.read, self.survey))

    def position(self) -> tuple[int, int]:
        return sum(self.read.values()), sum(source.size for source in self.sources)


# An indented line; U+00A0, U+3000 and other wide spaces begin with the bytes from \xc2 on.
_INDENTED = re.compile(rb"[\n\r\v\f](?:[ \t\x1f]|\xc2|\xe1\x9a|\xe2\x80|\xe2\x81|\xe3\x80)")


class Source:
    """Read one file: a table (``rows``, ``choice``) or a text (``separator``)."""

    choice: columns.Choice
    is_column_new = False  # version 0.1 chose another
    separator: str

    def __init__(self, path: Path, where: str, config: CustomData) -> None:
        """Scan the file for its checksum and the marks in it.

        Raises ConfigError, beginning with ``where``, if it is empty, binary or unreadable.
        """
        self.path, self.config, self.size = path, config, 0
        self.has_mark = self.has_return = self.has_indented = False
        sha, mark, tail, line_end = hashlib.sha256(), END_OF_TEXT.encode(), b"", b"\n"
        try:
            with path.open("rb") as file:
                marked = file.read(4).startswith(tuple(textfiles.MARKS))
                self.is_plain = not (textfiles.packing(path) or marked or config.encoding)
                file.seek(0)
                while chunk := file.read(textfiles.CHUNK):
                    sha.update(chunk)
                    self.size += len(chunk)
                    if not self.is_plain:
                        continue
                    if b"\0" in chunk and path.suffix.lower() not in textfiles.BINARY:
                        raise ConfigError(f"{where}: not a text file (it has NUL bytes)")
                    tail += chunk
                    self.has_mark |= mark in tail
                    self.has_return |= b"\r" in chunk
                    self.has_indented |= _INDENTED.search(line_end + chunk) is not None
                    line_end, tail = chunk[-1:], tail[-len(mark) :]
        except OSError as error:
            raise ConfigError(f"{where}: cannot be read ({error.strerror})") from error
        if self.size == 0:
            raise ConfigError(f"{where}: this file is empty")
        self.sha256 = sha.hexdigest()
        self.rows = None if textfiles.format_of(path) == "text" else Rows(path, config)
        if self.rows is None and not self.is_plain:
            self.has_mark = any(textfiles.around_marks(self._chunks({})))

    def _chunks(self, read: dict[Path, int]) -> Iterator[str]:
        return textfiles.text_chunks(self.path, read, self.config.encoding)

    def choose_separator(self) -> None:
        """Set ``separator`` to ``data.separator``, or detect it if that is ``auto``."""
        self.separator = self.config.separator
        if self.separator != "auto":
            return
        kind = "lines of JSON objects; name it .jsonl to read them as rows"
        if is_notebook := textfiles.inner_suffix(self.path) == ".ipynb":
            kind = "a notebook; jupyter nbconvert --to markdown makes text of it"
        if is_notebook or textfiles.has_objects(self.path):
            raise ConfigError(f"data.path={self.path}: {kind} (data.separator=none: it is a text)")
        is_separated = self.has_mark and textfiles.is_separated(self._chunks({}))
        self.separator = END_OF_TEXT if is_separated else "sections"

    def has(self, separator: str) -> bool:
        """Return whether the separator occurs in the text."""
        chunks = textfiles.unix_lines(self._chunks({}))
        pieces = textfiles.split_at(chunks, "".join(textfiles.unix_lines([separator])))
        return len(list(itertools.islice(pieces, 2))) > 1

    def identity(self) -> list[Any]:
        """Return what determines the documents: checksum, format, and 2 where version 0.1 would
        have made other documents of them."""
        if self.rows is not None:
            suffix, dialect = f".{self.rows.format}", self.rows.dialect
            is_usual = self.path.suffix == suffix and (dialect is None or dialect.is_default)
            is_new = not (is_usual and self.is_plain) or self.is_column_new
        else:
            suffix, before = "", END_OF_TEXT if self.has_mark else "sections"
            is_new = (
                self.has_return
                or not self.is_plain
                or (self.config.separator == "auto" and self.separator != before)
            )
            if not is_new and self.has_indented and textfiles.keeps_indentation(self.separator):
                is_new = any(one[0].isspace() for one in cut(self._chunks({}), self.separator))
        return [self.sha256, suffix, 2] if is_new else [self.sha256, suffix]

    def texts(self, read: dict[Path, int], survey: Survey) -> Iterator[str]:
        """Yield the documents, counting bytes in ``read`` and skipped values in ``survey``."""
        if self.rows is None:
            return cut(self._chunks(read), self.separator)
        tops = [name for column in self.choice.columns for name in columns.prefixes(column)]
        rows = self.rows.read(read, tops, texts=not self.choice.is_asked)
        return columns.texts(rows, self.choice, str(self.path), survey)

    def formats(self) -> list[str]:
        """Return a description of the file's format, as a list of at most one string."""
        found = [textfiles.packing(self.path).lstrip(".")]
        if self.rows is None or self.rows.format != "parquet":
            found.append(self.config.encoding or textfiles.encoding_found(self.path))
        if self.rows is not None:
            named = {"jsonl": "JSON lines", "json": "JSON", "parquet": "parquet"}
            found.append(str(self.rows.dialect or named[self.rows.format]))
        elif self.separator == END_OF_TEXT:
            found.append(f"cut at {END_OF_TEXT}")
        elif self.separator == "sections":
            found.append(f"cut into sections of about {textfiles.SECTION:,} characters")
        return [", ".join(filter(None, found))] if any(found) else []


class HubCorpus(Corpus):
    """Stream a text data set from the Hugging Face hub or a local folder laid out like one."""

    def __init__(self, config: HubData) -> None:
        self.config, self.survey = config, Survey()
        self.where = f"data.repo={config.repo}"
        self.local = Path(config.repo).is_dir()
        if not self.local:
            require_hub(config.repo)
        self.splits = self._own_splits()
        self.own = set(self.splits) - {"train"}

    def _own_splits(self) -> dict[str, str]:
        with self._library() as hub:
            there = hub.get_dataset_split_names(*self._place())
        chosen = {"train": ("split", self.config.split)}
        for split, standard in (("val", "validation"), ("test", "test")):
            key = f"{split}_split"
            name = getattr(self.config, key)
            if name == "auto":
                name = standard if standard in there and standard != self.config.split else None
            if name is not None:
                chosen[split] = key, name
        for key, name in chosen.values():
            if name not in there:
                raise ConfigError(f"data.{key}={name}: no such split; there are {', '.join(there)}")
        return {split: name for split, (_, name) in chosen.items()}

    def _place(self) -> tuple[str, str | None]:
        """Return the path and the configuration's name for ``datasets``.

        A local copy of the hub's parquet branch has no README.md: there the name is a sub-folder.
        """
        repo, name = self.config.repo, self.config.config
        folder = Path(repo, name or "")
        is_folder = self.local and name is not None and folder.is_dir()
        if is_folder and not Path(repo, "README.md").exists():
            return str(folder), None
        return repo, name

    @contextlib.contextmanager
    def _library(self) -> Iterator[Any]:
        """Yield the ``datasets`` library, and turn its errors into one line."""
        import datasets

        datasets.logging.set_verbosity_error()
        datasets.disable_progress_bars()
        try:
            yield datasets
        except (OSError, ValueError, RuntimeError) as error:
            raise ConfigError(f"{self.where}: {first_line(error)}") from error

    def fingerprint(self) -> str:
        config, found = self.config, dict[str, Any]()
        found |= {"config": config.config, "splits": self.splits, "column": config.text_column}
        if config.separator not in ("auto", "none"):
            found["cut"] = 2  # version 0.1 cut at other line ends
        if self.local:
            files = sorted(filter(Path.is_file, Path(config.repo).rglob("*")))
            found["files"] = [*map(fileio.sha256, files)]
        else:
            found |= {"repo": config.repo, "revision": config.revision}
        return _sha256(found)

    def documents(self, split: str) -> Iterator[Document]:
        config = self.config
        rows = self._rows(split)
        head = columns.head_of(rows, config.text_column)
        choice = columns.choose(head, config.text_column, self.where)
        self.survey.text_column, self.survey.other_columns = str(choice), choice.others
        texts = columns.texts(itertools.chain(head, rows), choice, self.where, self.survey)
        if config.separator not in ("auto", "none"):
            texts = cut((text + "\n" for text in texts), config.separator)
        return map(Document, texts)

    def _rows(self, split: str) -> Iterator[dict[str, Any]]:
        options = {"split": self.splits[split], "revision": self.config.revision}
        with self._library() as hub:
            yield from hub.load_dataset(*self._place(), streaming=True, **options)


def describe(config: DataConfig) -> str:
    """Return the name of a corpus for results.json."""
    return config.repo if isinstance(config, HubData) and config.name == "hub" else config.name
