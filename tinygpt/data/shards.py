"""Token shards: a corpus tokenized once, kept in the cache, read by memory map.

The stages: documents → split → tokenizer → shards on disk (``train_00000.bin`` ...) with an
``index.json`` → windows of tokens.  A shard is ``eot d1 eot d2 eot ...``: every document's tokens
and the end of text behind it are targets once, the first ``eot`` is context alone.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import itertools
import math
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import filelock
import numpy as np
from numpy.typing import NDArray

from tinygpt import rundir
from tinygpt.config import ConfigError, DataConfig, TokenizerConfig
from tinygpt.data import corpora
from tinygpt.data.corpora import Corpus, Document, split_documents
from tinygpt.data.tokenizers import Ids, Tokenizer, load_tokenizer, train_tokenizer

FORMAT = 2  # of the files here; part of the cache key
SHARD_TOKENS = 100_000_000
BATCH_CHARACTERS = 1 << 20  # text of a split written at a time; a quarter of it is encoded at once
MOST_THREADS = 8  # that encode; more than these wait for the one that reads
VERIFY_BYTES = 1 << 30  # larger files are checked by their size alone
SPLITS = ("train", "val", "test")
READ = ("gpt2", "saved")  # tokenizers that are read, from files of somebody's

T = TypeVar("T")
R = TypeVar("R")
Progress = Callable[[str, int], None]  # what is being done, bytes of text so far


def cache_root(cache_dir: str | None) -> Path:
    """``cache_dir``, else ``$TINYGPT_CACHE``, else ``~/.cache/tinygpt``."""
    chosen = cache_dir or os.environ.get("TINYGPT_CACHE") or "~/.cache/tinygpt"
    return Path(chosen).expanduser()


class Split:
    """The tokens of one split: memory-mapped shards and where documents begin in them."""

    def __init__(self, folder: Path, name: str, index: dict[str, Any]) -> None:
        self.info = index["splits"][name]
        self.files = [folder / entry["file"] for entry in self.info["files"]]
        self.shards = [np.memmap(path, dtype=index["dtype"], mode="r") for path in self.files]
        offsets = np.load(folder / self.info["offsets"]["file"])
        counts = [entry["documents"] + 1 for entry in self.info["files"]]
        self.offsets = np.split(offsets, np.cumsum(counts)[:-1])  # per shard: (documents + 1,)

    def gather(self, starts: NDArray[np.int64], length: int) -> NDArray[np.int64]:
        """Tokens ``(B, length)`` from positions ``starts`` ``(B,)``; none crosses a shard."""
        ends = np.cumsum([len(shard) for shard in self.shards])
        which = np.searchsorted(ends, starts, side="right")
        out = np.empty((len(starts), length), dtype=np.int64)
        steps = np.arange(length)
        for shard in np.unique(which):
            rows = which == shard
            local = starts[rows] - (ends[shard] - len(self.shards[shard]))
            out[rows] = self.shards[shard][local[:, None] + steps]
        return out

    def train_windows(self, length: int, stride: int, fraction: float) -> TrainWindows:
        """Windows of ``length`` inputs and the token behind them, of a prefix of the documents."""
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
        """Windows in which every target counts once; the last of a shard may be short.

        ``whole_documents``: a window begins where a document does and holds whole documents, as
        many as fit; the longest must fit.  Else windows begin ``stride`` apart (null: ``length``),
        and a target counts where it stands behind the most context: in a shard's first window all
        do, in each later one those that no window before it holds.
        """
        starts, ends, counted = [], [], []
        base = 0
        for shard, offsets in zip(self.shards, self.offsets, strict=True):
            if whole_documents:
                cuts = np.array(_packed(offsets, length), dtype=np.int64)
                first, last = cuts[:-1], cuts[1:]
            else:
                step, total = stride or length, int(offsets[-1])
                windows = 1 + max(0, -(-(total - length) // step))
                first = np.arange(windows, dtype=np.int64) * step
                last = np.minimum(first + length, total)
            starts.append(base + first)
            ends.append(base + last)
            counted.append(base + np.concatenate((first[:1], last[:-1])))
            base += len(shard)
        begin = np.concatenate(starts)
        return EvalWindows(begin, np.concatenate(ends) - begin, np.concatenate(counted) - begin)


@dataclass(frozen=True)
class TrainWindows:
    starts: NDArray[np.int64]  # global positions
    used_tokens: int  # distinct targets in the windows
    dropped_tokens: int  # at the shards' ends, shorter than a window


@dataclass(frozen=True)
class EvalWindows:
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]  # targets in each
    before: NDArray[np.int64]  # the first of them, which count in the window before


def _packed(offsets: NDArray[np.int64], length: int) -> list[int]:
    cuts = [0]
    for start, end in itertools.pairwise(offsets.tolist()):
        if end - cuts[-1] > length:
            cuts.append(start)
    return [*cuts, int(offsets[-1])]


@dataclass(frozen=True)
class Prepared:
    """A tokenized corpus in the cache."""

    folder: Path
    index: dict[str, Any]
    tokenizer: Tokenizer

    def split(self, name: str) -> Split:
        return Split(self.folder, name, self.index)


def fingerprints(corpus: Corpus, tokenizer: TokenizerConfig) -> dict[str, str]:
    """What stands for the files that a configuration names, in the hash of a run."""
    content = {"data": corpus.fingerprint()}
    if tokenizer.kind in READ:
        content["tokenizer"] = train_tokenizer(tokenizer, ()).fingerprint()
    return content


def prepare(
    corpus: Corpus,
    data: DataConfig,
    tokenizer: TokenizerConfig,
    cache: Path,
    progress: Progress = lambda what, size: None,
) -> Prepared:
    """The tokenized corpus, from the cache or made now.

    Two processes that ask for the same wait for each other; what was torn is made again.  Raises
    ConfigError where the corpus does not give the splits that it should.
    """
    source = corpus.fingerprint()
    vocabulary = _tokenizer(corpus, source, data, tokenizer, cache, progress)
    sizes = [data.max_tokens, data.eval_tokens]
    key = rundir.digest([FORMAT, source, vocabulary.fingerprint(), _cutting(data), sizes])
    folder = cache / "data" / f"{data.name}-{key[:16]}"

    def tokenized(temporary: Path) -> dict[str, Any]:
        return _tokenize(corpus, data, vocabulary, temporary, progress)

    return Prepared(folder, _cached(folder, source, tokenized), vocabulary)


def prepare_whole(
    corpus: Corpus, data: DataConfig, tokenizer: Tokenizer, cache: Path, progress: Progress
) -> Prepared:
    """All of a corpus as one split, ``all``, by a tokenizer that is there; from the cache or made
    now.  Raises ConfigError where there is no text in it."""
    source = corpus.fingerprint()
    key = rundir.digest([FORMAT, source, tokenizer.fingerprint(), _cutting(data), "all"])
    folder = cache / "data" / f"{data.name}-{key[:16]}"

    def tokenized(temporary: Path) -> dict[str, Any]:
        writers = {"all": _SplitWriter(temporary, "all", tokenizer, None)}
        documents = (("all", document) for document in corpus.documents("train"))
        _write(documents, tokenizer, writers, progress)
        info = writers["all"].finish()
        if not info["documents"]:
            raise ConfigError(f"data.path={getattr(data, 'path', data.name)}: no text in it")
        return {"dtype": writers["all"].dtype.name, "splits": {"all": info}}

    return Prepared(folder, _cached(folder, source, tokenized), tokenizer)


def _cached(folder: Path, source: str, make: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """The index of the shards in ``folder``, which ``make`` writes where they are not there."""
    with _lock(folder):
        index = load_index(folder)
        if index is None:
            with rundir.replacing_folder(folder) as temporary:
                index = {"source_fingerprint": source, **make(temporary)}
                index["checksum"] = rundir.digest(index)
                rundir.write_json(temporary / "index.json", index)
    return index


def _cutting(data: DataConfig) -> list[Any]:
    """The keys that say which document is in which split; ``fraction`` only takes a prefix."""
    names = ("max_documents", "val_fraction", "test_fraction", "val_is_test")
    return [getattr(data, name, None) for name in (*names, "separator", "text_column")]


def _lock(path: Path) -> filelock.BaseFileLock:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return filelock.FileLock(f"{path}.lock")
    except OSError as error:
        raise ConfigError(f"cache_dir={path.parent.parent}: {error.strerror}") from error


def load_index(folder: Path) -> dict[str, Any] | None:
    """The index of a whole, undamaged folder of shards; None where it has to be made again."""
    try:
        index = rundir.read_json(folder / "index.json")
        rest = {name: value for name, value in index.items() if name != "checksum"}
        if index.get("checksum") != rundir.digest(rest):
            return None
        splits = [info for info in index["splits"].values() if info]
        entries = [entry for info in splits for entry in (*info["files"], info["offsets"])]
        whole = all(_is_whole(folder / e["file"], e["size"], e["sha256"]) for e in entries)
    except (ConfigError, OSError, AttributeError, KeyError, TypeError, ValueError):
        return None
    return index if whole else None


def _is_whole(path: Path, size: int, sha256: str) -> bool:
    if path.stat().st_size != size:
        return False
    return size > VERIFY_BYTES or rundir.sha256(path) == sha256


def _check_values(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": rundir.sha256(path)}


def _tokenizer(
    corpus: Corpus,
    source: str,
    data: DataConfig,
    config: TokenizerConfig,
    cache: Path,
    progress: Progress,
) -> Tokenizer:
    """Trained on the first ``train_bytes`` of the training split, whatever prefix is used later."""
    train_bytes = getattr(config, "train_bytes", None)
    if train_bytes is None:
        return train_tokenizer(config, ())
    key = rundir.digest([FORMAT, source, _cutting(data), vars(config)])
    stem = cache / "tokenizers" / f"{config.kind}-{key[:16]}"
    with _lock(stem):
        for path in stem.parent.glob(f"{stem.name}-*.json"):
            with contextlib.suppress(ConfigError):
                found = load_tokenizer(path)
                if path.stem.endswith(_short(found)):  # else damaged, and made again
                    return found
        documents = split_documents(corpus, data)
        texts = (document.text for split, document in documents if split == "train")
        say = functools.partial(progress, "reading text for the tokenizer")
        tokenizer = train_tokenizer(config, corpora.first_bytes(texts, train_bytes, say))
        tokenizer.save(stem.with_name(f"{stem.name}-{_short(tokenizer)}.json"))
    return tokenizer


def _short(tokenizer: Tokenizer) -> str:
    return tokenizer.fingerprint()[:16]


def _tokenize(
    corpus: Corpus, data: DataConfig, tokenizer: Tokenizer, folder: Path, progress: Progress
) -> dict[str, Any]:
    """Writes the shards of all splits into ``folder`` and returns the index."""
    limits = {"train": data.max_tokens, "val": data.eval_tokens, "test": data.eval_tokens}
    writers = {name: _SplitWriter(folder, name, tokenizer, limits[name]) for name in SPLITS}
    duplicates = _write(split_documents(corpus, data), tokenizer, writers, progress)
    infos = {name: writer.finish() for name, writer in writers.items()}
    if data.val_is_test:
        infos["test"] = infos["val"]
    expected = ["train", "val", *(["test"] if data.test_fraction > 0 or data.val_is_test else [])]
    for name in expected:
        if not infos[name]["documents"]:
            _refuse_empty(name, infos, data)
    return {
        "dtype": writers["train"].dtype.name,
        "vocab_size": tokenizer.vocab_size,
        "tokenizer_fingerprint": tokenizer.fingerprint(),
        "duplicates_of_validation_or_test": duplicates,
        "splits": {name: info if info["documents"] else None for name, info in infos.items()},
    }


def _write(
    documents: Iterable[tuple[str, Document]],
    tokenizer: Tokenizer,
    writers: Mapping[str, _SplitWriter],
    progress: Progress,
) -> int:
    """Every document to the writer of its split, until that for training has enough; returns how
    many were duplicates, which go to none."""
    duplicates = size = 0
    with contextlib.closing(_encoded(documents, tokenizer, writers)) as read:
        for split, document, ids in read:
            if split == "duplicate":
                duplicates += 1
                continue
            writers[split].add(document, ids)
            size += len(document.text)
            progress("tokenizing", size)
            if split == "train" and writers[split].full:
                break
    return duplicates


@dataclass
class _Part:
    """Documents in a row, as many as are encoded at once."""

    documents: list[tuple[str, Document]] = field(default_factory=list)
    failure: Exception | None = None  # of the source, behind these documents


def _encoded(
    documents: Iterable[tuple[str, Document]],
    tokenizer: Tokenizer,
    writers: Mapping[str, _SplitWriter],
) -> Generator[tuple[str, Document, Ids | None], None, None]:
    """The documents in their order with their ids, None where nobody wants them.

    Threads encode, as tiktoken leaves the interpreter to the others; the source is read at most
    two parts a thread ahead.
    """

    def encode(part: _Part) -> Iterator[Ids | None]:
        # a split that is full now is full when these come to be written
        wanted = [
            bool(document.text) and split in writers and not writers[split].full
            for split, document in part.documents
        ]
        texts = [document.text for _, document in itertools.compress(part.documents, wanted)]
        found = iter(tokenizer.encode_batch(texts))
        return (next(found) if here else None for here in wanted)

    for part, ids in _in_order(encode, _parts(documents)):
        for (split, document), one in zip(part.documents, ids, strict=True):
            yield split, document, one
        if part.failure:
            raise part.failure


def _parts(documents: Iterable[tuple[str, Document]]) -> Iterator[_Part]:
    part, size = _Part(), 0
    try:
        for split, document in documents:
            part.documents.append((split, document))
            size += len(document.text)
            if size >= BATCH_CHARACTERS // 4:
                yield part
                part, size = _Part(), 0
    except Exception as error:  # it counts only if what was read before is not enough
        part.failure = error
    yield part


def _in_order(work: Callable[[T], R], items: Iterable[T]) -> Iterator[tuple[T, R]]:
    """Every item with what ``work`` makes of it on another thread, a few at a time."""
    threads = min(MOST_THREADS, _cpus())
    waiting: collections.deque[tuple[T, Future[R]]] = collections.deque()
    with ThreadPoolExecutor(threads) as pool:
        for item in items:
            waiting.append((item, pool.submit(work, item)))
            if len(waiting) > threads:
                first, result = waiting.popleft()
                yield first, result.result()
        for first, result in waiting:
            yield first, result.result()


def _cpus() -> int:
    """Those that this process may use, where the system says."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _refuse_empty(name: str, infos: dict[str, Any], data: DataConfig) -> None:
    found = sum(info["documents"] for info in infos.values())
    words = {"train": "training", "val": "validation", "test": "test"}[name]
    mend = {
        "train": "lower data.val_fraction and data.test_fraction",
        "val": "raise data.val_fraction or give data.val_file",
        "test": "raise data.test_fraction, give data.test_file or set data.test_fraction=0",
    }[name]
    raise ConfigError(
        f"data.path={getattr(data, 'path', data.name)}: the {words} split is empty, as the corpus "
        f"has only {found} documents; {mend}, or take more text"
    )


class _SplitWriter:
    """Appends one split's documents to shards, about a megabyte of text at a time."""

    def __init__(self, folder: Path, name: str, tokenizer: Tokenizer, limit: int | None) -> None:
        self.folder, self.name, self.tokenizer, self.limit = folder, name, tokenizer, limit
        self.dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
        self.pending: list[tuple[Document, Ids]] = []
        self.pending_characters = 0
        self.full = False
        self.files: list[dict[str, Any]] = []
        self.offsets: list[NDArray[np.int64]] = []  # of the open shard, then of all
        self.shard_tokens = 0
        counts = ("documents", "tokens", "bytes", "characters", "unknown_tokens")
        self.info: dict[str, Any] = dict.fromkeys(
            (*counts, "longest_document", "empty_documents", "left_out_documents"), 0
        )
        self.nats: float | None = 0.0

    def add(self, document: Document, ids: Ids | None) -> None:
        if not document.text:
            self.info["empty_documents"] += 1
        elif self.full:
            self.info["left_out_documents"] += 1
        else:
            assert ids is not None
            self.pending.append((document, ids.astype(self.dtype)))  # not a view of many others
            self.pending_characters += len(document.text)
            if self.pending_characters >= BATCH_CHARACTERS:
                self._flush()

    def _flush(self) -> None:
        if not self.pending:
            return
        documents, encoded = [list(side) for side in zip(*self.pending, strict=True)]
        lengths = np.array([len(ids) + 1 for ids in encoded], dtype=np.int64)  # with end of text
        kept = len(encoded)
        if self.limit is not None:
            within = np.cumsum(lengths) + self.info["tokens"] >= self.limit
            if within.any():
                kept, self.full = int(within.argmax()) + 1, True
                self.info["left_out_documents"] += len(encoded) - kept
        self._write(encoded[:kept], lengths[:kept])
        self._count(documents[:kept], encoded[:kept], lengths[:kept])
        self.pending, self.pending_characters = [], 0

    def _write(self, encoded: list[Any], lengths: NDArray[np.int64]) -> None:
        end = np.array([self.tokenizer.eot_id], dtype=self.dtype)
        if not self.files or self.shard_tokens >= SHARD_TOKENS:
            self.files.append({"file": f"{self.name}_{len(self.files):05d}.bin", "documents": 0})
            self.offsets.append(np.zeros(1, dtype=np.int64))
            self.shard_tokens = 0
            self._append(end)
        self._append(np.concatenate([part for ids in encoded for part in (ids, end)]))
        self.offsets.append(self.shard_tokens + np.cumsum(lengths))
        self.shard_tokens += int(lengths.sum())
        self.files[-1]["documents"] += len(encoded)

    def _append(self, tokens: NDArray[Any]) -> None:
        path = self.folder / self.files[-1]["file"]
        with rundir.naming(path), path.open("ab") as file:
            file.write(tokens.tobytes())

    def _count(
        self, documents: list[Document], encoded: list[Any], lengths: NDArray[np.int64]
    ) -> None:
        info, unknown = self.info, self.tokenizer.unknown_id
        info["documents"] += len(documents)
        info["tokens"] += int(lengths.sum())
        info["bytes"] += sum(len(document.text.encode()) for document in documents)
        info["characters"] += sum(len(document.text) for document in documents)
        info["longest_document"] = max(info["longest_document"], int(lengths.max()))
        if unknown is not None:
            info["unknown_tokens"] += sum(int((ids == unknown).sum()) for ids in encoded)
        nats = [document.nats for document in documents]
        known = None not in nats and self.nats is not None
        self.nats = (
            self.nats + math.fsum(n for n in nats if n) if known and self.nats is not None else None
        )

    def finish(self) -> dict[str, Any]:
        """The split's entry in the index: counts, the exact floor, files with checksums."""
        self._flush()
        for entry in self.files:
            entry |= _check_values(self.folder / entry["file"])
        offsets = np.concatenate(self.offsets) if self.offsets else np.zeros(0, dtype=np.int64)
        name = f"{self.name}.offsets.npy"
        np.save(self.folder / name, offsets)
        tokens, nats = self.info["tokens"], self.nats
        return {
            **self.info,
            "irreducible_loss_exact": nats / tokens if nats is not None and tokens else None,
            "fingerprint": rundir.digest([entry["sha256"] for entry in self.files]),
            "files": self.files,
            "offsets": {"file": name, **_check_values(self.folder / name)},
        }
