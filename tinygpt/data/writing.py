"""Documents to shards on disk: encoded by threads, split by split; whole shards outlive a kill.

Whenever a shard is whole all that has been read is written out, and ``progress.json`` beside it
says how far that was.  The same happens at the same documents in every preparation, so that one
that is resumed from there ends with the same files.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import math
import os
from collections.abc import Generator, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tinygpt import fileio
from tinygpt.config import ConfigError
from tinygpt.data.corpora import Document
from tinygpt.data.library import Ids, Tokenizer

SHARD_TOKENS = 100_000_000
BATCH_CHARACTERS = 1 << 20  # text of a split written at a time; a quarter of it is encoded at once
MARK = "progress.json"
MOST_THREADS = 8  # that encode; more than these wait for the one that reads

Placed = tuple[str, Document]  # a document and its split


def write(
    documents: Iterable[Placed],
    tokenizer: Tokenizer,
    writers: Mapping[str, SplitWriter],
    folder: Path,
) -> tuple[dict[str, dict[str, Any]], int]:
    """Write every document to its split, until that for training has enough.

    Returns the splits' entries in the index, and how many documents were duplicates, which go to
    no split.  What stands in ``folder`` from a preparation that was killed is resumed: what had
    been written of ``documents`` is read once more, but not encoded.
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
            if split == "train" and writer.full:
                break
            if writer.whole > whole:
                found = {"done": done, "splits": {n: w.state() for n, w in writers.items()}}
                fileio.write_json(folder / MARK, {**found, "checksum": fileio.digest(found)})
    # until all entries are there the mark stays, and what it needs
    infos = {name: writer.finish() for name, writer in writers.items()}
    (folder / MARK).unlink(missing_ok=True)
    for writer in writers.values():
        writer.offsets.unlink(missing_ok=True)
    return infos, done["duplicates"]


def _resumed(folder: Path, writers: Mapping[str, SplitWriter]) -> dict[str, int]:
    """Return what the mark in ``folder`` counts, with every writer where it was then.

    Where there is no mark, or it is not whole or its files are not, all begins anew.
    """
    fileio.remove_torn(folder)
    try:
        found = fileio.read_json(folder / MARK)
        if found.pop("checksum", None) != fileio.digest(found):
            raise ConfigError(f"{folder / MARK}: damaged")
        for name, writer in writers.items():
            writer.resume(found["splits"][name])
        done: dict[str, int] = found["done"]
    except (ConfigError, OSError):
        for path in folder.iterdir():
            path.unlink()
        for writer in writers.values():
            writer.begin()
        return {"documents": 0, "duplicates": 0}
    return done


def _encoded(
    documents: Iterable[Placed], tokenizer: Tokenizer, writers: Mapping[str, SplitWriter]
) -> Generator[tuple[str, Document, Ids | None], None, None]:
    """Yield the documents in their order with their ids, None where they are not needed.

    Threads encode, as tiktoken leaves the interpreter to the others; the source is read at most
    two parts a thread ahead.
    """

    def encode(part: list[Placed]) -> Iterator[Ids | None]:
        # a split that is full now is full when these come to be written
        wanted = [
            bool(document.text) and split in writers and not writers[split].full
            for split, document in part
        ]
        texts = [document.text for _, document in itertools.compress(part, wanted)]
        found = iter(tokenizer.encode_batch(texts))
        return (next(found) if here else None for here in wanted)

    threads, parts = min(MOST_THREADS, _cpus()), _parts(documents)
    waiting: collections.deque[Any] = collections.deque()
    with ThreadPoolExecutor(threads) as pool:
        while True:
            for part, failure in itertools.islice(parts, threads + 1 - len(waiting)):
                waiting.append((part, failure, pool.submit(encode, part)))
            if not waiting:
                return
            part, failure, future = waiting.popleft()
            for (split, document), ids in zip(part, future.result(), strict=True):
                yield split, document, ids
            if failure:
                raise failure


def _parts(documents: Iterable[Placed]) -> Iterator[tuple[list[Placed], Exception | None]]:
    """Yield as many documents as are encoded at once, and how the source failed behind them."""
    part: list[Placed] = []
    size = 0
    failure = None
    try:
        for split, document in documents:
            part.append((split, document))
            size += len(document.text)
            if size >= BATCH_CHARACTERS // 4:
                yield part, None
                part, size = [], 0
    except Exception as error:  # it counts only if what was read before is not enough
        failure = error
    yield part, failure


def _cpus() -> int:
    """Return how many this process may use, where the system says."""
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
        """Forget all that was written."""
        self.pending: list[tuple[Document, Ids]] = []
        self.pending_characters = 0
        self.full = False
        self.files: list[dict[str, Any]] = []
        self.shard_tokens = 0
        counts = ("documents", "tokens", "bytes", "characters", "unknown_tokens")
        self.info: dict[str, Any] = dict.fromkeys(
            (*counts, "longest_document", "empty_documents", "left_out_documents"), 0
        )
        self.nats: float | None = 0.0  # null: not known of every document

    @property
    def whole(self) -> int:
        """Shards that nothing is added to any more."""
        return len(self.files) - (0 < self.shard_tokens < SHARD_TOKENS)

    def state(self) -> dict[str, Any]:
        """Return all there is to this writer; what waited is written and on the disk."""
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

    def resume(self, state: Mapping[str, Any]) -> None:
        """Take up ``state``; what was written later is cut off.  Raises OSError where less is
        there, or other than there was."""
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
        """Write what waits, up to the document with which ``limit`` is reached, and count it."""
        if not self.pending:
            return
        info, end = self.info, np.array(self.tokenizer.separator, dtype=self.dtype)
        lengths = np.array([len(ids) + len(end) for _, ids in self.pending], dtype=np.int64)
        kept = len(lengths)
        if self.limit is not None:
            reached = np.cumsum(lengths) + info["tokens"] >= self.limit
            if reached.any():
                kept, self.full = int(reached.argmax()) + 1, True
                info["left_out_documents"] += len(lengths) - kept
        lengths, texts = lengths[:kept], [document.text for document, _ in self.pending[:kept]]
        encoded = [ids for _, ids in self.pending[:kept]]
        nats = [document.nats for document, _ in self.pending[:kept]]
        self.pending, self.pending_characters = [], 0

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
        self.files[-1]["documents"] += kept

        info["documents"] += kept
        info["tokens"] += int(lengths.sum())
        info["bytes"] += sum(len(text.encode()) for text in texts)
        info["characters"] += sum(map(len, texts))
        info["longest_document"] = max(info["longest_document"], int(lengths.max()))
        if (unknown := self.tokenizer.unknown_id) is not None:
            info["unknown_tokens"] += sum(int((ids == unknown).sum()) for ids in encoded)
        if None in nats or self.nats is None:
            self.nats = None
        else:
            self.nats += math.fsum(n for n in nats if n)

    def _append(self, path: Path, values: NDArray[Any]) -> None:
        with fileio.naming(path), path.open("ab") as file:
            file.write(values.tobytes())

    def finish(self) -> dict[str, Any]:
        """Return the split's entry in the index: counts, the exact floor, files with checksums."""
        self._flush()
        for entry in self.files:
            entry |= _checksums(self.folder / entry["file"])
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
            "irreducible_loss_exact": None
            if nats is None or not tokens or unscored
            else nats / tokens,
            "fingerprint": fileio.digest([entry["sha256"] for entry in self.files]),
            "files": self.files,
            "offsets": {"file": name, **_checksums(self.folder / name)},
        }


def _checksums(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": fileio.sha256(path)}
