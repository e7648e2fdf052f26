"""Corpora: where documents come from, and which split each belongs to.

A corpus is streamed: nothing here holds more than a chunk of a file or a batch of rows.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from tinygpt import fileio
from tinygpt.config import ConfigError, CustomData, DataConfig, HubData, SyntheticData, first_line
from tinygpt.data import columns
from tinygpt.data.columns import prefixes
from tinygpt.data.network import require_hub
from tinygpt.data.readers import Rows, encoding_found, format_of, packing, text_chunks
from tinygpt.data.reading import (
    END_OF_TEXT,
    SECTION,
    cut,
    find_files,
    is_separated,
    keeps_indentation,
    scan,
)
from tinygpt.data.survey import Survey


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
    place = int.from_bytes(_short_hash(text), "big") / 2**64
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
        if seen and document.text and _short_hash(document.text) in seen:
            yield "duplicate", document
        else:
            yield split_of(document.text, val, test), document


def _short_hash(text: str) -> bytes:
    """Hash a text; white space around it and the kind of its line ends make no other text."""
    text = text.strip().replace("\r\n", "\n").replace("\r", "\n")
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
        self.config, self.survey = config, Survey()
        self.files = {"train": find_files("data.path", config.path, self.survey)}
        for split, key in (("val", "val_file"), ("test", "test_file")):
            value = getattr(config, key)
            if value is not None:
                self.files[split] = find_files(f"data.{key}", value, self.survey)
        self.own = set(self.files) - {"train"}
        self.scans = {
            path: scan(
                path,
                f"data.{'path' if split == 'train' else split + '_file'}={path}",
                config.encoding,
            )
            for split, paths in self.files.items()
            for path in paths
        }
        self.tables = {path: Rows(path, config) for path in self.scans if format_of(path) != "text"}
        self.choices = self._choose()
        self.separators = self._separators()

        self.read: dict[Path, int] = {}  # bytes

    def fingerprint(self) -> str:
        return self._fingerprint

    @functools.cached_property
    def _fingerprint(self) -> str:
        found = {split: [self._identity(p) for p in paths] for split, paths in self.files.items()}
        return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()

    def documents(self, split: str) -> Iterator[Document]:
        self.read |= dict.fromkeys(self.files[split], 0)
        for path in self.files[split]:
            self.survey.formats.update(self._formats(path))
            for text in self._texts(path):
                yield Document(text)

    def position(self) -> tuple[int, int]:
        return sum(self.read.values()), sum(scan.size for scan in self.scans.values())

    def _identity(self, path: Path) -> list[Any]:
        """Return what a file's documents follow from: its content and how it is read.

        A text that earlier versions cut into other documents has a mark, so that nothing made
        from those is taken for this.
        """
        known = self.scans[path]
        if path in self.tables:
            named = [known.sha256, f".{self.tables[path].format}"]
            same = path.suffix == named[1] and self._read_alike(path)
            return named if same else [*named, 2]
        separator = self.separators[path]
        before = END_OF_TEXT if known.has_end_of_text else "sections"
        is_new = (
            known.has_carriage_return
            or not known.is_plain
            or (self.config.separator == "auto" and separator != before)
            or (
                known.has_indented_line
                and keeps_indentation(separator)
                and any(text[0].isspace() for text in cut(self._chunks(path, {}), separator))
            )
        )
        return [known.sha256, "", 2] if is_new else [known.sha256, ""]

    def _separators(self) -> dict[Path, str]:
        """Return where each text is cut: ``separator``, or what ``auto`` finds."""
        found = {}
        for path, known in self.scans.items():
            found[path] = self.config.separator
            if found[path] == "auto" and path not in self.tables:
                has_mark = known.has_end_of_text and is_separated(self._chunks(path, {}))
                found[path] = END_OF_TEXT if has_mark else "sections"
        return found

    def _chunks(self, path: Path, read: dict[Path, int]) -> Iterator[str]:
        return text_chunks(path, read, self.config.encoding)

    def _texts(self, path: Path) -> Iterator[str]:
        if path not in self.tables:
            return cut(self._chunks(path, self.read), self.separators[path])
        choice = self.choices[path]
        tops = [name for column in choice.columns for name in prefixes(column)]
        rows = self.tables[path].read(self.read, tops)
        return columns.texts(rows, choice, str(path), self.survey)

    def _choose(self) -> dict[Path, columns.Choice]:
        """Choose the text column of each table: the same in all that have the same columns."""
        found: dict[Path, columns.Choice] = {}
        alike: dict[frozenset[str], columns.Choice] = {}
        self.heads_alike: dict[Path, bool] = {}
        for path, rows in self.tables.items():
            head = columns.head_of(rows.read({}), self.config.text_column)
            names = frozenset(name for row in head for name in row)
            if names not in alike:
                first = next(iter(found.values()), None)
                alike[names] = columns.choose(head, self.config.text_column, str(path), first)
            found[path] = alike[names]
            self.heads_alike[path] = columns.chosen_before(head, self.config) == str(found[path])
        every = list(found.values())
        self.survey.text_column = ", ".join(dict.fromkeys(map(str, every))) or None
        others = (name for choice in every for name in choice.others)
        self.survey.other_columns = list(dict.fromkeys(others))
        return found

    def _read_alike(self, path: Path) -> bool:
        """Return whether earlier versions read the same documents of a table."""
        dialect = self.tables[path].dialect
        is_default = dialect is None or dialect.is_default
        return is_default and self.scans[path].is_plain and self.heads_alike[path]

    def _formats(self, path: Path) -> list[str]:
        """Return what was detected of a file, and what was given."""
        found = [packing(path).lstrip(".")]
        if format_of(path) != "parquet":
            found.append(self.config.encoding or encoding_found(path))
        if path in self.tables:
            rows = self.tables[path]
            found.append(
                str(
                    rows.dialect
                    or {"jsonl": "JSON lines", "json": "JSON"}.get(rows.format, rows.format)
                )
            )
        elif self.separators[path] == END_OF_TEXT:
            found.append(f"cut at {END_OF_TEXT}")
        elif self.separators[path] == "sections":
            found.append(f"cut into sections of about {SECTION:,} characters")
        return [", ".join(part for part in found if part)] if any(found) else []


class HubCorpus:
    """A text data set of the Hugging Face hub, streamed; or a local folder laid out like one."""

    def __init__(self, config: HubData) -> None:
        self.config, self.survey = config, Survey()
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
        return ConfigError(f"data.repo={self.config.repo}: {first_line(error)}")

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
        stream = self._ask(
            lambda hub: hub.load_dataset(
                *self._place(),
                split=self.splits[split],
                streaming=True,
                revision=config.revision,
            )
        )
        rows = self._rows(iter(stream))
        where = f"data.repo={config.repo}"
        head = columns.head_of(rows, config.text_column)
        choice = columns.choose(head, config.text_column, where)
        self.survey.text_column, self.survey.other_columns = str(choice), choice.others
        texts = columns.texts(itertools.chain(head, rows), choice, where, self.survey)
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
