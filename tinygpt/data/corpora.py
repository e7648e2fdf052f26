"""Corpora: where documents come from, and which split each belongs to.

A corpus is streamed: nothing here holds more than a chunk of a file or a batch of rows.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator
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
    """One text; ``nats`` is its exact information content −log p where the source knows it."""

    text: str
    nats: float | None = None


class Corpus(Protocol):
    """What a source of text offers.  ``own`` names the splits that it brings itself."""

    own: set[str]

    def fingerprint(self) -> str:
        """Return what changes whenever the text does, independent of where it lies."""

    def documents(self, split: str) -> Iterator[Document]:
        """Yield the documents of ``split``: ``train``, or one of ``own``."""

    def position(self) -> tuple[int, int] | None:
        """Return how many bytes have been read this time, and of how many, where one can tell."""


def open_corpus(config: DataConfig) -> Corpus:
    """Return the corpus that ``config`` names.  Raises ConfigError where it cannot be read."""
    if isinstance(config, SyntheticData):
        return SyntheticCorpus(config)
    if isinstance(config, HubData):
        return HubCorpus(config)
    assert isinstance(config, CustomData)
    return FileCorpus(config)


def split_of(text: str, val_fraction: float, test_fraction: float) -> str:
    """Return the split of a document, by a hash of its text: it never changes sides."""
    place = int.from_bytes(_short_hash(text), "big") / 2**64
    if place < val_fraction:
        return "val"
    return "test" if place < val_fraction + test_fraction else "train"


def split_documents(corpus: Corpus, config: DataConfig) -> Iterator[tuple[str, Document]]:
    """Yield every document with its split: the source's own validation and test, then the rest.

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
        if seen and document.text and _short_hash(document.text) in seen:
            yield "duplicate", document
        else:
            yield split_of(document.text, val, test), document


def _short_hash(text: str) -> bytes:
    """Hash a text; white space around it and the kind of its line ends make no other text."""
    text = text.strip().replace("\r\n", "\n").replace("\r", "\n")
    return hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()


def first_bytes(texts: Iterable[str], limit: int) -> Iterator[str]:
    """Yield whole texts until ``limit`` bytes of UTF-8 are reached."""
    size = 0
    for text in texts:
        if size >= limit:
            return
        yield text
        size += len(text.encode("utf-8", "replace"))


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
    sha, size, mark, tail, line_end = hashlib.sha256(), 0, END_OF_TEXT.encode(), b"", b"\n"
    has_mark = has_return = has_indented = False
    try:
        with path.open("rb") as file:
            marked = file.read(4).startswith(tuple(textfiles.MARKS))
            is_plain = not (textfiles.packing(path) or marked or encoding)
            file.seek(0)
            while chunk := file.read(textfiles.CHUNK):
                sha.update(chunk)
                size += len(chunk)
                if not is_plain:
                    continue
                if b"\0" in chunk and path.suffix.lower() not in textfiles.BINARY:
                    raise ConfigError(f"{where}: not a text file (it has NUL bytes)")
                tail += chunk
                has_mark = has_mark or mark in tail
                has_return = has_return or b"\r" in chunk
                has_indented = has_indented or _INDENTED.search(line_end + chunk) is not None
                line_end, tail = chunk[-1:], tail[-len(mark) :]
    except OSError as error:
        raise ConfigError(f"{where}: cannot be read ({error.strerror})") from error
    if size == 0:
        raise ConfigError(f"{where}: this file is empty")
    if not is_plain and textfiles.format_of(path) == "text":
        has_mark = any(textfiles.around_marks(textfiles.text_chunks(path, {}, encoding)))
    return Scan(sha.hexdigest(), has_mark, size, has_return, has_indented, is_plain)


class FileCorpus:
    """Files of the user's own: texts cut into documents, and tables with one document a row."""

    def __init__(self, config: CustomData) -> None:
        self.config, self.survey = config, Survey()
        self.files: dict[str, list[Path]] = {}
        self.scans: dict[Path, Scan] = {}
        for split, key in (("train", "path"), ("val", "val_file"), ("test", "test_file")):
            if (value := getattr(config, key)) is not None:
                self.files[split] = find_files(f"data.{key}", value, self.survey)
        for split, paths in self.files.items():
            key = "path" if split == "train" else f"{split}_file"
            for path in paths:
                self.scans[path] = scan(path, f"data.{key}={path}", config.encoding)
        self.own = set(self.files) - {"train"}
        self.tables = {p: Rows(p, config) for p in self.scans if textfiles.format_of(p) != "text"}
        self.choices: dict[Path, columns.Choice] = {}
        self._choose()
        self.separators = {
            path: self._separator(path) for path in self.scans if path not in self.tables
        }
        mark = config.separator
        is_mark = mark not in ("auto", "none", "sections") and self.separators
        if is_mark and not any(self._has(mark, path) for path in self.separators):
            raise ConfigError(f"data.separator={mark!r}: occurs nowhere in data.path={config.path}")
        self.read: dict[Path, int] = {}  # bytes

    def _has(self, separator: str, path: Path) -> bool:
        chunks = textfiles.unix_lines(self._chunks(path, {}))
        pieces = textfiles.split_at(chunks, "".join(textfiles.unix_lines([separator])))
        return len(list(itertools.islice(pieces, 2))) > 1

    def _choose(self) -> None:
        """Choose the text column of each table: the same in all that have the same columns."""
        asked = self.config.text_column
        alike: dict[frozenset[str], columns.Choice] = {}
        self.chosen_as_before: dict[Path, bool] = {}
        refused: dict[Path, ConfigError] = {}
        for path, rows in self.tables.items():
            head = columns.head_of(rows.read({}), asked)
            names = frozenset(name for row in head for name in row)
            if names not in alike:
                first = next(iter(self.choices.values()), None)
                try:
                    alike[names] = columns.choose(head, asked, str(path), first)
                except ConfigError as error:
                    refused[path] = error
                    continue
            self.choices[path] = alike[names]
            before = columns.chosen_before(head, self.config)
            is_named = not str(alike[names]).startswith("column_")
            self.chosen_as_before[path] = is_named and before == str(alike[names])
        if refused:
            rest = [str(path) for path in self.scans if path not in refused]
            files = f"; data.path='[{','.join(rest)}]' names those with text"
            raise ConfigError(f"{next(iter(refused.values()))}{files * (0 < len(rest) < 9)}")
        every = self.choices.values()
        self.survey.text_column = ", ".join(dict.fromkeys(map(str, every))) or None
        others = (name for choice in every for name in choice.others)
        self.survey.other_columns = list(dict.fromkeys(others))

    def _separator(self, path: Path) -> str:
        """Return where a text is cut: ``separator``, or what ``auto`` finds."""
        if self.config.separator != "auto":
            return self.config.separator
        if textfiles.has_objects(path) or textfiles.inner_suffix(path) == ".ipynb":
            kind = "lines of JSON objects; name it .jsonl to read them as rows"
            if textfiles.inner_suffix(path) == ".ipynb":
                kind = "a notebook; jupyter nbconvert --to markdown makes text of it"
            raise ConfigError(f"data.path={path}: {kind} (data.separator=none: it is a text)")
        has_mark = self.scans[path].has_end_of_text and textfiles.is_separated(
            self._chunks(path, {})
        )
        return END_OF_TEXT if has_mark else "sections"

    def fingerprint(self) -> str:
        return self._fingerprint

    @functools.cached_property
    def _fingerprint(self) -> str:
        found = {split: [self.identity(p) for p in paths] for split, paths in self.files.items()}
        return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()

    def identity(self, path: Path) -> list[Any]:
        """Return what a file's documents follow from: its content and how it is read.

        One that earlier versions cut or read as other documents has a mark, so that nothing made
        from those is taken for this.
        """
        known = self.scans[path]
        if path in self.tables:
            suffix, dialect = f".{self.tables[path].format}", self.tables[path].dialect
            is_new = not (
                path.suffix == suffix
                and (dialect is None or dialect.is_default)
                and known.is_plain
                and self.chosen_as_before[path]
            )
        else:
            suffix, separator = "", self.separators[path]
            before = END_OF_TEXT if known.has_end_of_text else "sections"
            is_new = (
                known.has_carriage_return
                or not known.is_plain
                or (self.config.separator == "auto" and separator != before)
                or (
                    known.has_indented_line
                    and textfiles.keeps_indentation(separator)
                    and any(one[0].isspace() for one in cut(self._chunks(path, {}), separator))
                )
            )
        return [known.sha256, suffix, 2] if is_new else [known.sha256, suffix]

    def documents(self, split: str) -> Iterator[Document]:
        self.read |= dict.fromkeys(self.files[split], 0)
        for path in self.files[split]:
            self.survey.formats.update(self._formats(path))
            if path in self.tables:
                choice = self.choices[path]
                tops = [name for column in choice.columns for name in columns.prefixes(column)]
                rows = self.tables[path].read(self.read, tops, texts=not choice.is_asked)
                texts = columns.texts(rows, choice, str(path), self.survey)
            else:
                texts = cut(self._chunks(path, self.read), self.separators[path])
            yield from map(Document, texts)

    def _chunks(self, path: Path, read: dict[Path, int]) -> Iterator[str]:
        return textfiles.text_chunks(path, read, self.config.encoding)

    def _formats(self, path: Path) -> list[str]:
        """Return what was detected of a file, and what was given."""
        found = [textfiles.packing(path).lstrip(".")]
        if textfiles.format_of(path) != "parquet":
            found.append(self.config.encoding or textfiles.encoding_found(path))
        if path in self.tables:
            rows = self.tables[path]
            named = {"jsonl": "JSON lines", "json": "JSON"}
            found.append(str(rows.dialect or named.get(rows.format, rows.format)))
        elif self.separators[path] == END_OF_TEXT:
            found.append(f"cut at {END_OF_TEXT}")
        elif self.separators[path] == "sections":
            found.append(f"cut into sections of about {textfiles.SECTION:,} characters")
        return [", ".join(part for part in found if part)] if any(found) else []

    def position(self) -> tuple[int, int]:
        return sum(self.read.values()), sum(known.size for known in self.scans.values())


class HubCorpus:
    """A text data set of the Hugging Face hub, streamed; or a local folder laid out like one."""

    def __init__(self, config: HubData) -> None:
        self.config, self.survey = config, Survey()
        self.where = f"data.repo={config.repo}"
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
        """Return what the hub library is to open, and the configuration's name in it.

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
        """Call the hub library; its errors become one line."""
        import datasets

        datasets.logging.set_verbosity_error()
        datasets.disable_progress_bars()
        try:
            return question(datasets)
        except (OSError, ValueError, RuntimeError) as error:
            raise self._refused(error) from error

    def _refused(self, error: Exception) -> ConfigError:
        return ConfigError(f"{self.where}: {first_line(error)}")

    def fingerprint(self) -> str:
        config = self.config
        found: dict[str, Any] = {
            "config": config.config,
            "splits": self.splits,
            "column": config.text_column,
        }
        if config.separator not in ("auto", "none"):
            found["cut"] = 2  # which rows have line ends that are cut at now is not known
        if self.local:
            files = sorted(p for p in Path(config.repo).rglob("*") if p.is_file())
            found["files"] = [fileio.sha256(p) for p in files]
        else:
            found |= {"repo": config.repo, "revision": config.revision}
        return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()

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
        config, name = self.config, self.splits[split]
        options = {"split": name, "streaming": True, "revision": config.revision}
        stream = self._ask(lambda hub: hub.load_dataset(*self._place(), **options))
        try:
            yield from stream
        except (OSError, ValueError, RuntimeError) as error:
            raise self._refused(error) from error

    def position(self) -> None:
        return None


def describe(config: DataConfig) -> str:
    """Return the name of a corpus, as results.json has it."""
    return config.repo if isinstance(config, HubData) and config.name == "hub" else config.name
