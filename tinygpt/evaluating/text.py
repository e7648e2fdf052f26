"""What is scored: a split of the run's own corpus, or any other text, in windows."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tinygpt import rundir
from tinygpt.config import ConfigError, CustomData
from tinygpt.data import corpora, shards
from tinygpt.data.datamodule import EvalBatches
from tinygpt.data.shards import EvalWindows, Progress, Split
from tinygpt.data.tokenizers import Tokenizer
from tinygpt.evaluating.machine import Machine
from tinygpt.evaluating.options import OtherText
from tinygpt.training.corpus import own_corpus
from tinygpt.training.session import open_data


@dataclass(frozen=True)
class Text:
    """``packed``: as in training a window holds whole documents, so that ``floor``, the exact
    entropy, can be reached."""

    name: str
    split: Split
    length: int  # of a window: the model's context
    batch_size: int
    pad: int
    packed: bool = False
    floor: float | None = None

    @property
    def info(self) -> dict[str, Any]:
        found: dict[str, Any] = self.split.info
        return found

    def batches(self, stride: int | None) -> EvalBatches:
        """Every target once; without a ``stride`` in training's own windows."""
        packed = self.packed and stride is None
        return self._batches(self.split.eval_windows(self.length, packed, stride))

    def full_windows(self) -> EvalBatches:
        """Windows of full length alone, one behind the other."""
        windows = self.split.eval_windows(self.length, whole_documents=False)
        full = windows.lengths == self.length
        return self._batches(
            EvalWindows(windows.starts[full], windows.lengths[full], windows.before[full])
        )

    def _batches(self, windows: EvalWindows) -> EvalBatches:
        return EvalBatches(
            self.split, windows, length=self.length, batch_size=self.batch_size, pad=self.pad
        )

    def documents(self) -> list[NDArray[np.int64]]:
        """The tokens of each, without the end of text."""
        more = self.split.unscored > 0  # behind that the start of the next
        return [
            np.asarray(shard[start + 1 : end - more], dtype=np.int64)
            for shard, offsets in zip(self.split.shards, self.split.offsets, strict=True)
            for start, end in itertools.pairwise(offsets)
        ]


def own_split(
    run: rundir.RunDir,
    tokenizer: Tokenizer,
    machine: Machine,
    split: str,
    cache_dir: str | None,
    progress: Progress,
) -> Text:
    """A split as the run's training had it.  Raises ConfigError where its corpus is another now."""
    config = machine.config
    instead = "; data=custom data.path=... scores any text"
    prepared = own_corpus(run, config, tokenizer, cache_dir, progress, instead)
    data = open_data(config, prepared, machine.resolved)
    if split not in data.splits:
        raise ConfigError(f"split={split}: {run.path} has none, as data.test_fraction=0")
    assert data.plan is not None
    floor = data.floor(split)
    return Text(
        name=split,
        split=data.splits[split],
        length=data.length,
        batch_size=data.plan.micro_batch_size,
        pad=tokenizer.eot_id,
        packed=floor is not None,
        floor=floor,
    )


def other_text(
    other: OtherText,
    length: int,
    tokenizer: Tokenizer,
    machine: Machine,
    cache_dir: str | None,
    progress: Progress,
) -> Text:
    """All of a file, a folder or a glob, by the run's own tokenizer."""
    assert other.path is not None
    data = CustomData(name="custom", **vars(other))
    cache = shards.cache_root(cache_dir or machine.config.cache_dir)
    corpus = corpora.open_corpus(data)
    prepared = shards.prepare_whole(corpus, data, tokenizer, cache, progress)
    return Text(
        name=other.path,
        split=prepared.split("all"),
        length=length,
        batch_size=machine.rows(length),
        pad=tokenizer.eot_id,
    )
