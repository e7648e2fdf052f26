"""Documents to shards on disk: encoded by threads, split by split; what is whole outlives a kill.

Whenever a shard is whole all that has been read is written out, and ``progress.json`` beside it
says how far that was.  The same happens at the same documents in every preparation, so that one
that goes on from there ends with the same files.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import math
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from tinygpt import fileio
from tinygpt.config import ConfigError
from tinygpt.data.corpora import Document
from tinygpt.data.tokenizers import Ids, Tokenizer

SHARD_TOKENS = 100_000_000
BATCH_CHARACTERS = 1 << 20  # text of a split written at a time; a quarter of it is encoded at once
MARK = "progress.json"
MOST_THREADS = 8  # that encode; more than these wait for the one that reads

T = TypeVar("T")
R = TypeVar("R")


def write(
    documents: Iterable[tuple[str, Document]],
    tokenizer: Tokenizer,
    writers: Mapping[str, SplitWriter],
    folder: Path,
    say: Callable[[int], None],
) -> int:
    """Every document to the writer of its split, until that for training has enough; returns how
    many were duplicates, which go to none.

    What stands in ``folder`` from a preparation that was killed is gone on with: what had been
    written of ``documents`` is read once more, but not encoded.  ``say`` is told now and then how
    many characters have been written.
    """
    done = _resumed(folder, writers)
    size = said = 0
    rest = iter(documents)
    for _, document in itertools.islice(rest, done["documents"]):
        size += len(document.text)
        said = _said(say, size, said)
    with contextlib.closing(_encoded(rest, tokenizer, writers)) as read:
        for split, document, ids in read:
            done["documents"] += 1
            if split == "duplicate":
                done["duplicates"] += 1
                continue
            writer = writers[split]
            whole = writer.whole
            writer.add(document, ids)
            size += len(document.text)
            said = _said(say, size, said)
            if split == "train" and writer.full:
                break
            if writer.whole > whole:
                _mark(folder, writers, done)
    return done["duplicates"]


def _said(say: Callable[[int], None], size: int, said: int) -> int:
    """Says ``size`` where that is much more than was said; the size that was said last."""
    if size - said < BATCH_CHARACTERS // 4:
        return said
    say(size)
    return size


def finish(folder: Path, writers: Mapping[str, SplitWriter]) -> dict[str, dict[str, Any]]:
    """The splits' entries in the index.  Until all are there the mark stays, and what it needs."""
    infos = {name: writer.finish() for name, writer in writers.items()}
    (folder / MARK).unlink(missing_ok=True)
    for writer in writers.values():
        writer.offsets.unlink(missing_ok=True)
    return infos


def _mark(folder: Path, writers: Mapping[str, SplitWriter], done: Mapping[str, int]) -> None:
    """Puts down how far it has come; all that has been written is on disk before that is."""
    states = {name: writer.state() for name, writer in writers.items()}
    found = {"done": done, "splits": states}
    fileio.write_json(folder / MARK, {**found, "checksum": fileio.digest(found)})


def _resumed(folder: Path, writers: Mapping[str, SplitWriter]) -> dict[str, int]:
    """What the mark in ``folder`` counts, with every writer where it was then.

    Where there is no mark, or it is not whole or its files are not, all begins anew.
    """
    fileio.remove_torn(folder)
    try:
        found = fileio.read_json(folder / MARK)
        if found.pop("checksum", None) != fileio.digest(found):
            raise ConfigError(f"{folder / MARK}: damaged")
        for name, writer in writers.items():
            writer.go_on(found["splits"][name])
        done: dict[str, int] = found["done"]
    except (ConfigError, OSError):
        for path in folder.iterdir():
            path.unlink()
        for writer in writers.values():
            writer.begin()
        return {"documents": 0, "duplicates": 0}
    return done


def _check_values(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": fileio.sha256(path)}


@dataclass
class _Part:
    """Documents in a row, as many as are encoded at once."""

    documents: list[tuple[str, Document]] = field(default_factory=list)
    failure: Exception | None = None  # of the source, behind these documents


def _encoded(
    documents: Iterable[tuple[str, Document]],
    tokenizer: Tokenizer,
    writers: Mapping[str, SplitWriter],
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


class SplitWriter:
    """Appends one split's documents to shards, about a megabyte of text at a time."""

    def __init__(self, folder: Path, name: str, tokenizer: Tokenizer, limit: int | None) -> None:
        self.folder, self.name, self.tokenizer, self.limit = folder, name, tokenizer, limit
        self.dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
        self.offsets = folder / f".{name}.offsets"  # as they come, so that they take no memory
        self.begin()

    def begin(self) -> None:
        """With nothing."""
        self.pending: list[tuple[Document, Ids]] = []
        self.pending_characters = 0
        self.full = False
        self.files: list[dict[str, Any]] = []
        self.shard_tokens = 0
        counts = ("documents", "tokens", "bytes", "characters", "unknown_tokens")
        self.info: dict[str, Any] = dict.fromkeys(
            (*counts, "longest_document", "empty_documents", "left_out_documents"), 0
        )
        self.nats: float | None = 0.0

    @property
    def whole(self) -> int:
        """Shards that nothing is added to any more."""
        return len(self.files) - (0 < self.shard_tokens < SHARD_TOKENS)

    def state(self) -> dict[str, Any]:
        """All there is to this writer, once what waits is written: the files are on disk."""
        self._flush()
        paths = [self.folder / entry["file"] for entry in self.files] + [self.offsets]
        there = [path for path in paths if path.exists()]
        for path in there:
            with path.open("rb") as file:
                os.fsync(file.fileno())
        return {
            "full": self.full,
            "files": self.files,
            "shard_tokens": self.shard_tokens,
            "info": self.info,
            "nats": self.nats,
            "sizes": {path.name: path.stat().st_size for path in there},
        }

    def go_on(self, state: Mapping[str, Any]) -> None:
        """From ``state``; what was written later is cut off.  Raises OSError where less is there,
        or other than there was."""
        for path in (*self.folder.glob(f"{self.name}_*.bin"), self.offsets):
            if path.name not in state["sizes"]:
                path.unlink(missing_ok=True)
        for name, size in state["sizes"].items():
            with (self.folder / name).open("rb+") as file:
                if file.seek(0, os.SEEK_END) < size:
                    raise OSError(f"{name} is shorter than it was")
                file.truncate(size)
        self.full, self.files, self.shard_tokens = (
            state[key] for key in ("full", "files", "shard_tokens")
        )
        self.info, self.nats = state["info"], state["nats"]

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
        end = len(self.tokenizer.separator)
        lengths = np.array([len(ids) + end for ids in encoded], dtype=np.int64)
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
        end = np.array(self.tokenizer.separator, dtype=self.dtype)
        if not self.files or self.shard_tokens >= SHARD_TOKENS:
            self.files.append({"file": f"{self.name}_{len(self.files):05d}.bin", "documents": 0})
            self.shard_tokens = 0
        path = self.folder / self.files[-1]["file"]
        if self.shard_tokens == 0:
            self._append(path, end[-1:])
            self._append(self.offsets, np.zeros(1, dtype=np.int64))
        self._append(path, np.concatenate([part for ids in encoded for part in (ids, end)]))
        self._append(self.offsets, self.shard_tokens + np.cumsum(lengths))
        self.shard_tokens += int(lengths.sum())
        self.files[-1]["documents"] += len(encoded)

    def _append(self, path: Path, values: NDArray[Any]) -> None:
        with fileio.naming(path), path.open("ab") as file:
            file.write(values.tobytes())

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
        name = f"{self.name}.offsets.npy"
        there = self.offsets.exists()
        offsets = np.memmap(self.offsets, np.int64, "r") if there else np.zeros(0, np.int64)
        with fileio.naming(self.folder / name):
            np.save(self.folder / name, offsets)
        tokens, nats = self.info["tokens"], self.nats
        unscored = list(self.tokenizer.unscored)  # whose nats are not counted either
        return {
            **self.info,
            **({"unscored_ids": unscored} if unscored else {}),
            "irreducible_loss_exact": nats / tokens
            if nats is not None and tokens and not unscored
            else None,
            "fingerprint": fileio.digest([entry["sha256"] for entry in self.files]),
            "files": self.files,
            "offsets": {"file": name, **_check_values(self.folder / name)},
        }
