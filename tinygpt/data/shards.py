"""Tokenize a corpus once into shards in the cache, and read them by memory map.

Shards (``train_00000.bin`` ...) and an ``index.json`` hold the tokens of each split; windows of
tokens are cut from them.  A shard is ``eot d1 eot d2 eot ...``: every token but the first is a
target once.  With a tokenizer that begins documents with a token of its own it is
``bos d1 eot bos d2 eot bos ...``.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import filelock
import numpy as np
from numpy.typing import NDArray

from tinygpt import fileio
from tinygpt.config import ConfigError, DataConfig, SavedTokenizer, TokenizerConfig
from tinygpt.data import corpora
from tinygpt.data.corpora import Corpus, split_documents
from tinygpt.data.huggingface import open_tokenizer
from tinygpt.data.survey import Survey, counted
from tinygpt.data.tokenizers import Tokenizer, load_tokenizer, train_tokenizer
from tinygpt.data.writing import BATCH_CHARACTERS, Placed, SplitWriter, write

FORMAT = 3  # of the files here; part of the cache key
VERIFY_BYTES = 1 << 30  # of larger files only the size is checked
WORDS = {"train": "training", "val": "validation", "test": "test"}
CHANCE = 3.0  # a split with this many expected documents has one with 95 % probability
READ = ("gpt2", "saved")  # tokenizers that are read from files, not trained

Progress = Callable[[str, int, int | None], None]  # what is being done, bytes so far, total bytes


def cache_root(cache_dir: str | None) -> Path:
    """Return ``cache_dir``, else ``$TINYGPT_CACHE``, else ``~/.cache/tinygpt``."""
    chosen = cache_dir or os.environ.get("TINYGPT_CACHE") or "~/.cache/tinygpt"
    return Path(chosen).expanduser()


class TrainWindows(NamedTuple):
    """Hold the positions (W,) of the training windows."""

    starts: NDArray[np.int64]  # counted through all shards
    used_tokens: int  # distinct targets in the windows
    dropped_tokens: int  # targets at the shards' ends that do not fill a window


class EvalWindows(NamedTuple):
    """Hold the windows of validation or test, (W,) each."""

    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]  # targets in each
    before: NDArray[np.int64]  # leading targets that are scored in the window before

    def at(self, rows: slice | NDArray[np.bool_]) -> EvalWindows:
        return EvalWindows(*(part[rows] for part in self))


class Split:
    """Read the tokens of one split: memory-mapped shards with the offsets of documents."""

    def __init__(self, folder: Path, name: str, index: dict[str, Any]) -> None:
        self.info = index["splits"][name]
        self.files = [folder / entry["file"] for entry in self.info["files"]]
        self.shards = [np.memmap(path, dtype=index["dtype"], mode="r") for path in self.files]
        offsets = np.load(folder / self.info["offsets"]["file"])
        counts = [entry["documents"] + 1 for entry in self.info["files"]]
        self.offsets = np.split(offsets, np.cumsum(counts)[:-1])  # per shard: (documents + 1,)
        # unscored tokens after each document; if there are any, documents are scored one by one
        self.unscored = len(self.info.get("unscored_ids", ()))

    def gather(self, starts: NDArray[np.int64], length: int) -> NDArray[np.int64]:
        """Return the tokens ``(B, length)`` at positions ``starts`` ``(B,)``."""
        ends = np.cumsum([len(shard) for shard in self.shards])
        which = np.searchsorted(ends, starts, side="right")
        out = np.empty((len(starts), length), dtype=np.int64)
        for shard in np.unique(which):
            rows = which == shard
            local = starts[rows] - (ends[shard] - len(self.shards[shard]))
            out[rows] = self.shards[shard][local[:, None] + np.arange(length)]
        return out

    def train_windows(self, length: int, stride: int, fraction: float) -> TrainWindows:
        """Return windows of ``length`` inputs and a last target from a prefix of the documents."""
        documents = max(1, round(fraction * self.info["documents"]))
        starts: list[NDArray[np.int64]] = []
        dropped = used = base = 0
        for shard, offsets in zip(self.shards, self.offsets, strict=True):
            taken = min(documents, len(offsets) - 1)
            tokens = int(offsets[taken])  # targets in the prefix of this shard
            count = max(0, (tokens - length) // stride + 1)
            starts.append(base + np.arange(count, dtype=np.int64) * stride)
            covered = (count - 1) * stride + length if count else 0
            used, dropped = used + covered, dropped + tokens - covered
            documents, base = documents - taken, base + len(shard)
        return TrainWindows(np.concatenate(starts), used, dropped)

    def eval_windows(
        self, length: int, whole_documents: bool, stride: int | None = None
    ) -> EvalWindows:
        """Return windows that score every target once; the last of a shard may be short.

        With ``whole_documents`` a window holds as many whole documents as fit, and the longest
        must fit.  Otherwise windows begin ``stride`` apart (default ``length``), and a window
        scores the targets that no earlier one holds.  Documents that begin with a token of their
        own are scored one by one, as ``transformers`` does.
        """
        parts: list[tuple[NDArray[np.int64], ...]] = []
        base = 0
        for shard, offsets in zip(self.shards, self.offsets, strict=True):
            if whole_documents:
                cuts = _packed(offsets, length)
                first, last = cuts[:-1], cuts[1:]
            else:
                cuts = offsets if self.unscored else offsets[[0, -1]]
                begin, end = cuts[:-1], cuts[1:] - self.unscored  # (D,)
                step, used = stride or length, end > begin
                begin, end = begin[used], end[used]
                windows = 1 + np.maximum(0, -(-(end - begin - length) // step))
                which = np.repeat(np.arange(len(begin)), windows)  # (W,)
                number = np.arange(len(which)) - (np.cumsum(windows) - windows)[which]
                first = begin[which] + number * step
                last = np.minimum(first + length, end[which])
            seen = np.concatenate((first[:1], last[:-1]))
            parts.append((base + first, last - first, np.maximum(seen - first, 0)))
            base += len(shard)
        return EvalWindows(*(np.concatenate(part) for part in zip(*parts, strict=True)))


def _packed(offsets: NDArray[np.int64], length: int) -> NDArray[np.int64]:
    """Return the cuts (W + 1,) between windows of as many whole documents as fit."""
    cuts = [0]
    for start, end in itertools.pairwise(offsets.tolist()):
        if end - cuts[-1] > length:
            cuts.append(start)
    return np.array([*cuts, offsets[-1]], dtype=np.int64)


@dataclass(frozen=True)
class Prepared:
    """Hold a tokenized corpus in the cache."""

    folder: Path
    index: dict[str, Any]
    tokenizer: Tokenizer

    def split(self, name: str) -> Split:
        return Split(self.folder, name, self.index)


def fingerprints(corpus: Corpus, tokenizer: TokenizerConfig) -> dict[str, str]:
    """Return fingerprints of the corpus and tokenizer files, for the configuration's hash."""
    content = {"data": corpus.fingerprint()}
    if tokenizer.kind in READ:
        content["tokenizer"] = _untrained(tokenizer).fingerprint()
    return content


def prepare(
    corpus: Corpus,
    data: DataConfig,
    tokenizer: TokenizerConfig,
    cache: Path,
    progress: Progress = lambda what, done, total: None,
) -> Prepared:
    """Return the tokenized corpus, from the cache or made now.

    A lock makes processes wait for each other.  Damaged files are made again, and a killed
    preparation resumes after its last whole shard.  Raises ConfigError if a split stays empty.
    """
    work = _Preparation(corpus, data, cache, progress)
    vocabulary = work.vocabulary(tokenizer)
    made = work.cached(vocabulary, [data.max_tokens, data.eval_tokens], work.tokenize_splits)
    survey = getattr(corpus, "survey", None)
    if survey is not None:  # other files may lie beside the text now
        made.index["survey"] |= {"files": survey.files, "skipped": dict(survey.skipped)}
    return made


def prepare_whole(
    corpus: Corpus, data: DataConfig, tokenizer: Tokenizer, cache: Path, progress: Progress
) -> Prepared:
    """Return a corpus tokenized as one split, ``all``.  Raises ConfigError if it has no text."""
    work = _Preparation(corpus, data, cache, progress)
    return work.cached(tokenizer, "all", work.tokenize_all)


@dataclass
class _Preparation:
    """Tokenize a corpus into the cache."""

    corpus: Corpus
    data: DataConfig
    cache: Path
    progress: Progress

    def __post_init__(self) -> None:
        self.source = self.corpus.fingerprint()

    @property
    def cutting(self) -> list[Any]:
        """Return the keys that determine the documents of each split."""
        names = ("max_documents", "val_fraction", "test_fraction", "val_is_test")
        keys = [getattr(self.data, name, None) for name in (*names, "separator", "text_column")]
        decoding = [getattr(self.data, name, None) for name in ("encoding", "delimiter", "header")]
        return keys if decoding == [None] * 3 else keys + decoding  # the first: as in old caches

    @property
    def place(self) -> str:
        return f"data.path={getattr(self.data, 'path', self.data.name)}"

    def cached(
        self, tokenizer: Tokenizer, part: Any, make: Callable[[Path, Tokenizer], dict[str, Any]]
    ) -> Prepared:
        """Return the cached shards, which ``make`` writes if they are missing."""
        parts = [FORMAT, self.source, tokenizer.fingerprint(), self.cutting, part]
        folder = self.cache / "data" / f"{self.data.name}-{fileio.digest(parts)[:16]}"
        with _lock(folder):
            index = load_index(folder)
            if index is None:
                with fileio.replacing_folder(folder, kept=True) as temporary:
                    index = {"source_fingerprint": self.source, **make(temporary, tokenizer)}
                    index["checksum"] = fileio.digest(index)
                    fileio.write_json(temporary / "index.json", index)
        return Prepared(folder, index, tokenizer)

    def vocabulary(self, config: TokenizerConfig) -> Tokenizer:
        """Return the tokenizer, trained on the first ``train_bytes`` of the training split
        whatever ``data.fraction``."""
        train_bytes = getattr(config, "train_bytes", None)
        if train_bytes is None:
            return _untrained(config)
        key = fileio.digest([FORMAT, self.source, self.cutting, vars(config)])
        stem = self.cache / "tokenizers" / f"{config.kind}-{key[:16]}"
        with _lock(stem):
            for path in stem.parent.glob(f"{stem.name}-*.json"):
                with contextlib.suppress(ConfigError):
                    found = load_tokenizer(path)
                    if path.stem.endswith(found.fingerprint()[:16]):  # otherwise damaged
                        return found
            for path in stem.parent.glob(f".{stem.name}-*.tmp"):  # of a killed process
                path.unlink()
            documents = split_documents(self.corpus, self.data)
            placed = self.reported(documents, "reading text for the tokenizer")
            texts = (document.text for split, document in placed if split == "train")
            tokenizer = train_tokenizer(config, corpora.first_bytes(texts, train_bytes))
            tokenizer.save(stem.with_name(f"{stem.name}-{tokenizer.fingerprint()[:16]}.json"))
        return tokenizer

    def reported(self, documents: Iterator[Placed], what: str = "tokenizing") -> Iterator[Placed]:
        """Yield the documents, and report the source's position or the characters so far."""
        size = told = 0
        for split, document in documents:
            size += len(document.text)
            if size - told >= BATCH_CHARACTERS // 4:
                done, total = self.corpus.position() or (size, None)
                self.progress(what, done, total)
                told = size
            yield split, document

    def tokenize_all(self, folder: Path, tokenizer: Tokenizer) -> dict[str, Any]:
        """Write one split and return the index."""
        writers = {"all": SplitWriter(folder, "all", tokenizer, None)}
        documents = (("all", document) for document in self.corpus.documents("train"))
        infos, _ = write(self.reported(documents), tokenizer, writers, folder)
        if not infos["all"]["documents"]:
            raise ConfigError(f"{self.place}: no text in it")
        return {"dtype": writers["all"].dtype.name, "splits": infos}

    def tokenize_splits(self, folder: Path, tokenizer: Tokenizer) -> dict[str, Any]:
        """Write the shards of all splits and return the index."""
        data = self.data
        limits = {"train": data.max_tokens, "val": data.eval_tokens, "test": data.eval_tokens}
        writers = {name: SplitWriter(folder, name, tokenizer, limits[name]) for name in WORDS}
        survey: Survey | None = getattr(self.corpus, "survey", None)
        if survey is not None:
            survey.restart()  # training a tokenizer may have counted the same text
        documents = self.reported(split_documents(self.corpus, data))
        infos, duplicates = write(documents, tokenizer, writers, folder)
        if survey is not None:
            survey.empty_documents = sum(info["empty_documents"] for info in infos.values())
            kept = (info["documents"] + info["left_out_documents"] for info in infos.values())
            survey.documents = sum(kept) + duplicates
        if data.val_is_test:
            infos["test"] = infos["val"]
        for name, info in infos.items():
            is_asked = name != "test" or data.test_fraction > 0 or data.val_is_test
            if is_asked and not info["documents"]:
                self.refuse_empty(name, infos, survey)
        return {
            "dtype": writers["train"].dtype.name,
            "vocab_size": tokenizer.vocab_size,
            "tokenizer_fingerprint": tokenizer.fingerprint(),
            "duplicates_of_validation_or_test": duplicates,
            "survey": survey.facts() if survey else None,
            "splits": {name: info if info["documents"] else None for name, info in infos.items()},
        }

    def refuse_empty(self, name: str, infos: dict[str, Any], survey: Survey | None) -> None:
        """Raise ConfigError, with the amount of text that would fill every split."""
        remedy = {
            "train": "lower data.val_fraction and data.test_fraction",
            "val": "raise data.val_fraction or give data.val_file",
            "test": "raise data.test_fraction, give data.test_file or set data.test_fraction=0",
        }[name]
        needed, found = "", sum(info["documents"] for info in infos.values())
        if found:
            val, test = self.data.val_fraction, self.data.test_fraction
            size = sum(info["bytes"] for info in infos.values()) / found
            least = min(share for share in (val, test, 1 - val - test) if share > 0)
            needed = f", about {kilobytes(CHANCE * size / least)} in documents of that size"
        skipped = ", ".join(counted(survey.skipped)) if survey else ""
        beside = f" (skipped {skipped})" if skipped else ""
        raise ConfigError(
            f"{self.place}: the {WORDS[name]} split is empty, as the corpus has only {found} "
            f"document{'s' * (found != 1)}{beside}; {remedy}, or take more text{needed}"
        )


def _untrained(config: TokenizerConfig) -> Tokenizer:
    if isinstance(config, SavedTokenizer):
        return open_tokenizer("tokenizer.path", config.path)
    return train_tokenizer(config, ())


def _lock(path: Path) -> filelock.BaseFileLock:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return filelock.FileLock(f"{path}.lock")
    except OSError as error:
        raise ConfigError(f"cache_dir={path.parent.parent}: {error.strerror}") from error


def load_index(folder: Path) -> dict[str, Any] | None:
    """Return the index of a folder of shards, or None if it is incomplete or damaged."""
    try:
        index = fileio.read_json(folder / "index.json")
        rest = {name: value for name, value in index.items() if name != "checksum"}
        if index.get("checksum") != fileio.digest(rest):
            return None
        for info in filter(None, index["splits"].values()):
            for entry in (*info["files"], info["offsets"]):
                path, size = folder / entry["file"], entry["size"]
                is_same = path.stat().st_size == size
                if not is_same or (size <= VERIFY_BYTES and fileio.sha256(path) != entry["sha256"]):
                    return None
    except (ConfigError, OSError, AttributeError, KeyError, TypeError, ValueError):
        return None
    return index


def kilobytes(size: float) -> str:
    """Format a number of bytes for a message."""
    return f"{max(1.0, size / 1000):,.0f} kB"
