"""Encode documents in threads and write them to shards, resuming after a kill.

Whenever a shard is full, everything read so far is written out and ``progress.json`` records how
much that was.  This happens at the same documents in every preparation, so a resumed one writes
the same files.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import math
import os
from collections.abc import Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tinygpt import fileio
from tinygpt.config import ConfigError
from tinygpt.data.corpora import Document
from tinygpt.data.library import Ids, Tokenizer

SHARD_TOKENS = 100_000_000
BATCH_CHARACTERS = 1 << 20  # written at a time; a quarter of that is encoded at a time
MARK = "progress.json"
MOST_THREADS = 8  # more would wait for the thread that reads
COUNTS = (
    *("documents", "tokens", "bytes", "characters", "unknown_tokens"),
    *("longest_document", "empty_documents", "left_out_documents"),
)

Placed = tuple[str, Document]  # a document and its split
Encoded = tuple[str, Document, Ids | None]  # and its ids if they are needed


def write(
    documents: Iterable[Placed],
    tokenizer: Tokenizer,
    writers: Mapping[str, SplitWriter],
    folder: Path,
) -> tuple[dict[str, dict[str, Any]], int]:
    """Write every document to its split until the training split is full.

    Returns the splits' entries in the index, and the number of duplicates, which go to no split.
    A killed preparation resumes from the mark in ``folder``; documents already written are read
    again but not encoded.
    """
    done = _resumed(folder, writers)
    rest = iter(documents)
    collections.deque(itertools.islice(rest, done["documents"]), maxlen=0)
    with contextlib.closing(_encoded(rest, tokenizer, writers)) as encoded:
        for split, document, ids in encoded:
            done["documents"] += 1
            if split == "duplicate":
                done["duplicates"] += 1
                continue
            writer = writers[split]
            whole = writer.whole
            writer.add(document, ids)
            if split == "train" and writer.written.full:
                break
            if writer.whole > whole:
                found = {"done": done, "splits": {n: w.state() for n, w in writers.items()}}
                fileio.write_json(folder / MARK, {**found, "checksum": fileio.digest(found)})
    # only now, because a kill before this needs the mark
    infos = {name: writer.finish() for name, writer in writers.items()}
    for path in (folder / MARK, *(writer.offsets for writer in writers.values())):
        path.unlink(missing_ok=True)
    return infos, done["duplicates"]


def _resumed(folder: Path, writers: Mapping[str, SplitWriter]) -> dict[str, int]:
    """Restore the writers from the mark in ``folder`` and return its counts.

    Starts over if the mark or its files are missing or damaged.
    """
    fileio.remove_torn(folder)
    try:
        found = fileio.read_json(folder / MARK)
        if found.pop("checksum", None) != fileio.digest(found):
            raise ConfigError(f"{folder / MARK}: damaged")
        for name, writer in writers.items():
            writer.resume(**found["splits"][name])
        return dict(found["done"])
    except (ConfigError, OSError):
        for path in folder.iterdir():
            path.unlink()
        for writer in writers.values():
            writer.written = Written()
        return {"documents": 0, "duplicates": 0}


def _encoded(
    documents: Iterable[Placed], tokenizer: Tokenizer, writers: Mapping[str, SplitWriter]
) -> Generator[Encoded, None, None]:
    """Yield the documents in order with their ids, None where they are not needed.

    Threads encode, since tiktoken releases the GIL, at most one part per thread ahead.
    """

    def encode(part: list[Placed] | Exception) -> list[Encoded]:
        if isinstance(part, Exception):
            raise part
        # a split that is full now is also full when these are written
        wanted = [
            bool(document.text) and split in writers and not writers[split].written.full
            for split, document in part
        ]
        texts = [document.text for _, document in itertools.compress(part, wanted)]
        ids = iter(tokenizer.encode_batch(texts))
        return [(*one, next(ids) if here else None) for one, here in zip(part, wanted, strict=True)]

    threads = min(MOST_THREADS, _cpus())
    waiting: collections.deque[Future[list[Encoded]]] = collections.deque()
    with ThreadPoolExecutor(threads) as pool:
        for part in _parts(documents):
            waiting.append(pool.submit(encode, part))
            if len(waiting) > threads:
                yield from waiting.popleft().result()
        for future in waiting:
            yield from future.result()


def _parts(documents: Iterable[Placed]) -> Iterator[list[Placed] | Exception]:
    """Yield the documents in parts to encode, and last the source's error if it fails, which
    counts only if the documents before it are not enough."""
    part: list[Placed] = []
    size, failure = 0, list[Exception]()
    try:
        for split, document in documents:
            part.append((split, document))
            size += len(document.text)
            if size >= BATCH_CHARACTERS // 4:
                yield part
                part, size = [], 0
    except Exception as error:
        failure.append(error)
    yield part
    yield from failure


def _cpus() -> int:
    """Return the number of CPUs that this process may use."""
    known = getattr(os, "sched_getaffinity", None)
    return len(known(0)) if known else os.cpu_count() or 1


@dataclass
class Written:
    """Hold the counts and files of a split; all files but the last are full shards."""

    full: bool = False  # ``limit`` is reached
    files: list[dict[str, Any]] = field(default_factory=list)
    shard_tokens: int = 0  # in the last file
    info: dict[str, Any] = field(default_factory=lambda: dict.fromkeys(COUNTS, 0))
    nats: float | None = 0.0  # None: some document's are unknown


class SplitWriter:
    """Append one split's documents to shards, about a megabyte of text at a time."""

    def __init__(self, folder: Path, name: str, tokenizer: Tokenizer, limit: int | None) -> None:
        self.folder, self.name, self.tokenizer, self.limit = folder, name, tokenizer, limit
        self.dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
        self.offsets = folder / f".{name}.offsets"  # on disk, to save memory
        self.written = Written()
        self.pending: list[tuple[Document, Ids]] = []
        self.pending_characters = 0

    @property
    def whole(self) -> int:
        """Return the number of full shards."""
        return len(self.written.files) - (0 < self.written.shard_tokens < SHARD_TOKENS)

    def state(self) -> dict[str, Any]:
        """Return the state of this writer after flushing everything to the disk."""
        self._flush()
        paths = [self.folder / entry["file"] for entry in self.written.files] + [self.offsets]
        sizes = {}
        for path in filter(Path.exists, paths):
            with path.open("rb") as file:
                os.fsync(file.fileno())
            sizes[path.name] = path.stat().st_size
        return {**vars(self.written), "sizes": sizes}

    def resume(self, sizes: Mapping[str, int], **written: Any) -> None:
        """Restore a state, cutting off what was written later.  Raises OSError if a file is missing
        or shorter."""
        for path in (*self.folder.glob(f"{self.name}_*.bin"), self.offsets):
            if path.name not in sizes:
                path.unlink(missing_ok=True)
        for name, size in sizes.items():
            with (self.folder / name).open("rb+") as file:
                if file.seek(0, os.SEEK_END) < size:
                    raise OSError(f"{name} is shorter than it was")
                file.truncate(size)
        self.written = Written(**written)

    def add(self, document: Document, ids: Ids | None) -> None:
        """Write a document, now or with later ones, or count it as empty or left out."""
        if not document.text:
            self.written.info["empty_documents"] += 1
        elif self.written.full:
            self.written.info["left_out_documents"] += 1
        else:
            assert ids is not None
            self.pending.append((document, ids.astype(self.dtype)))  # not a view of many others
            self.pending_characters += len(document.text)
            if self.pending_characters >= BATCH_CHARACTERS:
                self._flush()

    def _flush(self) -> None:
        """Write and count pending documents, up to the one that reaches ``limit``."""
        if not self.pending:
            return
        written, info = self.written, self.written.info
        end = np.array(self.tokenizer.separator, dtype=self.dtype)
        lengths = np.array([len(ids) + len(end) for _, ids in self.pending], dtype=np.int64)
        kept = len(lengths)
        if self.limit is not None:
            reached = np.cumsum(lengths) + info["tokens"] >= self.limit
            if reached.any():
                kept, written.full = int(reached.argmax()) + 1, True
                info["left_out_documents"] += len(lengths) - kept
        lengths, (documents, encoded) = lengths[:kept], zip(*self.pending[:kept], strict=True)
        self.pending, self.pending_characters = [], 0

        if not written.files or written.shard_tokens >= SHARD_TOKENS:
            name = f"{self.name}_{len(written.files):05d}.bin"
            written.files.append({"file": name, "documents": 0})
            written.shard_tokens = 0
        path = self.folder / written.files[-1]["file"]
        if written.shard_tokens == 0:
            self._append(path, end[-1:])
            self._append(self.offsets, np.zeros(1, dtype=np.int64))
        self._append(path, np.concatenate([part for ids in encoded for part in (ids, end)]))
        self._append(self.offsets, written.shard_tokens + np.cumsum(lengths))
        written.shard_tokens += int(lengths.sum())
        written.files[-1]["documents"] += kept

        info["documents"] += kept
        info["tokens"] += int(lengths.sum())
        info["bytes"] += sum(len(document.text.encode()) for document in documents)
        info["characters"] += sum(len(document.text) for document in documents)
        info["longest_document"] = max(info["longest_document"], int(lengths.max()))
        if (unknown := self.tokenizer.unknown_id) is not None:
            info["unknown_tokens"] += sum(int((ids == unknown).sum()) for ids in encoded)
        nats = [document.nats for document in documents if document.nats is not None]
        if written.nats is not None:
            written.nats = written.nats + math.fsum(nats) if len(nats) == kept else None

    def _append(self, path: Path, values: NDArray[Any]) -> None:
        with fileio.naming(path), path.open("ab") as file:
            file.write(values.tobytes())

    def finish(self) -> dict[str, Any]:
        """Return the split's entry in the index: counts, irreducible loss, files, checksums."""
        self._flush()
        files, info, nats = self.written.files, self.written.info, self.written.nats
        for entry in files:
            entry |= _checksums(self.folder / entry["file"])
        name = f"{self.name}.offsets.npy"
        there = self.offsets.exists()
        offsets = np.memmap(self.offsets, np.int64, "r") if there else np.zeros(0, np.int64)
        with fileio.naming(self.folder / name):
            np.save(self.folder / name, offsets)
        tokens = info["tokens"]
        unscored = list(self.tokenizer.unscored)
        is_scored = tokens > 0 and not unscored
        return {
            **info,
            **({"unscored_ids": unscored} if unscored else {}),
            "irreducible_loss_exact": nats / tokens if nats is not None and is_scored else None,
            "fingerprint": fileio.digest([entry["sha256"] for entry in files]),
            "files": files,
            "offsets": {"file": name, **_checksums(self.folder / name)},
        }


def _checksums(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": fileio.sha256(path)}
