"""Serve batches whose order is a pure function of (seed, step).

Every epoch is a seeded permutation of the training windows, and optimizer step ``s`` takes windows
``s·B`` to ``s·B + B − 1`` of the concatenated epochs.  Devices and micro-batches only divide that
batch, so every machine and every resumed run sees the same tokens in the same order.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import KW_ONLY, dataclass

import lightning.pytorch as pl
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Sampler

from tinygpt.config import Config, ConfigError
from tinygpt.config.checks import require
from tinygpt.config.counting import count_parameters, flops_per_token
from tinygpt.config.horizon import PASS_TOKENS, Plan, derive
from tinygpt.data import corpora, shards
from tinygpt.data.shards import EvalWindows, Prepared, Split, TrainWindows

EVAL_TOKENS = 2048  # at least, per pass of an evaluation: of fewer, Lightning's part is the larger
IGNORED = -100  # the target at positions that are not scored, such as padding
Batch = tuple[Tensor, Tensor]  # inputs (B, T), targets (B, T), both int64


@dataclass(eq=False)
class TrainBatches(Dataset[Batch]):
    """Return the batch of each micro-step of this device."""

    split: Split
    windows: TrainWindows
    _: KW_ONLY
    length: int
    seed: int
    plan: Plan
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        self._epoch = functools.lru_cache(maxsize=2)(self._permutation)

    def __len__(self) -> int:
        return self.plan.total_steps * self.plan.accumulate

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        return np.random.default_rng([self.seed, epoch]).permutation(self.windows.starts)

    def starts(self, step: int) -> NDArray[np.int64]:
        """Return the positions ``(batch_size,)`` of the windows of optimizer step ``step``."""
        first, count = step * self.plan.batch_size, len(self.windows.starts)
        epochs, places = np.divmod(np.arange(first, first + self.plan.batch_size), count)
        out = np.empty(len(places), dtype=np.int64)
        for epoch in np.unique(epochs):
            rows = epochs == epoch
            out[rows] = self._epoch(int(epoch))[places[rows]]
        return out

    def __getitem__(self, index: int) -> Batch:
        step, part = divmod(index, self.plan.accumulate)
        micro = self.plan.micro_batch_size
        first = (part * self.world_size + self.rank) * micro
        starts = self.starts(step)[first : first + micro]
        tokens = torch.from_numpy(self.split.gather(starts, self.length + 1))
        return tokens[:, :-1], tokens[:, 1:]  # labels are shifted only here


@dataclass(eq=False)
class EvalBatches(Dataset[Batch]):
    """Return batches with every target of a split once; short windows are padded."""

    split: Split
    windows: EvalWindows
    _: KW_ONLY
    length: int
    batch_size: int
    pad: int

    def __len__(self) -> int:
        return -(-len(self.windows.starts) // self.batch_size)

    def __getitem__(self, index: int) -> Batch:
        rows = slice(index * self.batch_size, (index + 1) * self.batch_size)
        starts, lengths, before = self.windows.at(rows)
        inputs = np.full((len(starts), self.length), self.pad, dtype=np.int64)
        targets = np.full((len(starts), self.length), IGNORED, dtype=np.int64)
        for count in np.unique(lengths):
            same = lengths == count
            tokens = self.split.gather(starts[same], int(count) + 1)
            inputs[same, :count], targets[same, :count] = tokens[:, :-1], tokens[:, 1:]
        targets[np.arange(self.length) < before[:, None]] = IGNORED
        return torch.from_numpy(inputs), torch.from_numpy(targets)

    def __iter__(self) -> Iterator[Batch]:
        return (self[index] for index in range(len(self)))


@dataclass(eq=False)
class _Indices(Sampler[int]):
    """Call ``indices`` at each iteration; Lightning counts by ``length``."""

    length: int
    indices: Callable[[], range]

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices())

    def __len__(self) -> int:
        return self.length


class StepLoader(DataLoader[Batch]):
    """Load whole batches by index; it has no state because the step determines them."""

    def state_dict(self) -> dict[str, int]:
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        pass


class TokenData(pl.LightningDataModule):
    """Serve the corpus of a configuration, tokenized by ``prepare_data`` and opened by ``setup``.

    ``prepared`` is the tokenized corpus if the caller already has it.
    """

    prepared: Prepared  # this and the next three are set by ``setup``
    splits: dict[str, Split]
    windows: TrainWindows
    plan: Plan
    scores_all = True  # whether validation scores all windows or every k-th (``val_every``)

    def __init__(self, config: Config, prepared: Prepared | None = None) -> None:
        super().__init__()
        self.config, self.length = config, config.model.max_seq_len
        if prepared is not None:
            self._open(prepared)

    def prepare_data(self) -> None:
        """Tokenize the corpus into shards, unless the cache has them."""
        if not hasattr(self, "prepared"):
            self._prepare()

    def setup(self, stage: str | None = None) -> None:
        """Open the shards and divide the batch among the Trainer's devices."""
        if not hasattr(self, "prepared"):
            self._open(self._prepare())
        if self.trainer is None:
            self.derive_plan("cpu", devices=1)
            return
        plan = self.derive_plan(self.trainer.strategy.root_device.type, self.trainer.world_size)
        if stage == "fit":
            asked = self.trainer.accumulate_grad_batches
            require(
                asked in (1, plan.accumulate),
                f"accumulate_grad_batches={asked}: set hardware.micro_batch_size instead",
            )
            self.trainer.accumulate_grad_batches = plan.accumulate

    def _prepare(self) -> Prepared:
        config = self.config
        corpus, cache = corpora.open_corpus(config.data), shards.cache_root(config.cache_dir)
        return shards.prepare(corpus, config.data, config.tokenizer, cache)

    def _open(self, prepared: Prepared) -> None:
        data, splits = self.config.data, prepared.index["splits"]
        self.prepared = prepared
        self.splits = {name: prepared.split(name) for name, info in splits.items() if info}
        stride = data.stride or self.length
        self.windows = self.splits["train"].train_windows(self.length, stride, data.fraction)
        for name, split in self.splits.items():
            tokens = split.info["tokens"]
            windows = len(self.windows.starts) if name == "train" else tokens // self.length
            if windows == 0:
                raise ConfigError(
                    f"model.max_seq_len={self.length}: longer than the {shards.WORDS[name]} split "
                    f"of {tokens} tokens; lower it, {self._lengthen(name)}"
                )

    def _lengthen(self, name: str) -> str:
        """Return the advice that makes a split long enough: a key to raise, or more text."""
        data, info = self.config.data, self.splits[name].info
        cut = "max_tokens" if name == "train" else "eval_tokens"
        limit = getattr(data, cut)
        if limit is not None and limit <= self.length:
            return f"or raise data.{cut}={limit}"
        key, share = "fraction", data.fraction * (1 - data.val_fraction - data.test_fraction)
        if name != "train":
            key = f"{name}_fraction"
            share = getattr(data, key)
        wanted = 2 * (self.length + 1) * info["bytes"] / info["tokens"] / share
        return f"raise data.{key} or take more text, about {shards.kilobytes(wanted)} in all"

    def derive_plan(self, accelerator: str, devices: int) -> Plan:
        """Set and return ``plan``, the numbers of steps on these devices."""
        config, vocab_size = self.config, self.prepared.tokenizer.vocab_size
        rank = config.optim.lora.rank
        self.plan = derive(
            config,
            parameters=count_parameters(config.model, vocab_size).total,
            flops_per_token=flops_per_token(config.model, vocab_size, lora_rank=rank),
            windows=len(self.windows.starts),
            devices=devices,
            pass_tokens=PASS_TOKENS[accelerator],
        )
        return self.plan

    @property
    def eval_batch_size(self) -> int:
        """Return the windows per pass of an evaluation."""
        return max(self.plan.micro_batch_size, EVAL_TOKENS // self.length)

    def floor(self, split: str) -> float | None:
        """Return the irreducible loss in nats per token, known if every document fits a window."""
        info = self.splits[split].info
        exact: float | None = info["irreducible_loss_exact"]
        return exact if info["longest_document"] <= self.length else None

    def val_every(self) -> int:
        """Return k: all evaluations but the last score every k-th window, at least 16 of them.

        That bounds their cost by ``train.eval_share`` of the training, as a forward pass costs a
        third of a step.  Runs that share a trunk score all windows, as a single run does.
        """
        plan, share = self.plan, self.config.train.eval_share
        if share is None or self.config.sweep.share_trunk:
            return 1
        between = (plan.total_steps - 1) // plan.eval_steps
        tokens, windows = int(self.splits["val"].info["tokens"]), len(self.eval_batches("val", 1))
        wanted = math.ceil(between * tokens / (3 * share * plan.train_tokens))
        return max(1, min(wanted, windows // 16))

    def eval_batches(self, split: str, batch_size: int, every: int = 1) -> EvalBatches:
        """Return the batches of a split, made of every ``every``-th of its windows."""
        windows = self.splits[split].eval_windows(self.length, self.floor(split) is not None)
        return EvalBatches(
            self.splits[split],
            windows.at(slice(None, None, every)),
            length=self.length,
            batch_size=batch_size,
            pad=self.prepared.tokenizer.eot_id,
        )

    def train_dataloader(self) -> StepLoader:
        """Return the micro-batches of this device, from the Trainer's next step on."""
        rank, world_size = self._place()
        batches = TrainBatches(
            self.splits["train"],
            self.windows,
            length=self.length,
            seed=self.config.seed,
            plan=self.plan,
            rank=rank,
            world_size=world_size,
        )
        step = 0 if self.trainer is None else self.trainer.global_step
        own = range(step * self.plan.accumulate, len(batches))
        return self._loader(batches, _Indices(len(batches), lambda: own))

    def val_dataloader(self) -> StepLoader:
        """Return the validation batches: of all windows if ``scores_all``, else of some."""
        rank, world_size = self._place()
        size = self.eval_batch_size
        batches = [self.eval_batches("val", size, k) for k in (1, self.val_every())]
        count = len(batches[0])
        every = range(rank, count, world_size)
        part = range(count + rank, count + len(batches[1]), world_size)
        own = _Indices(len(every), lambda: every if self.scores_all else part)
        return self._loader(ConcatDataset(batches), own)

    def test_dataloader(self) -> StepLoader | list[StepLoader]:
        """Return the test batches, an empty list if the corpus has no test split."""
        if "test" not in self.splits:
            return []
        rank, world_size = self._place()
        batches = self.eval_batches("test", self.eval_batch_size)
        return self._loader(batches, range(rank, len(batches), world_size))

    def _place(self) -> tuple[int, int]:
        """Return this process's rank and the number of processes."""
        trainer = self.trainer
        return (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)

    def _loader(self, batches: Dataset[Batch], indices: Iterable[int]) -> StepLoader:
        trainer = self.trainer
        on_cuda = trainer is not None and trainer.strategy.root_device.type == "cuda"
        return StepLoader(batches, batch_size=None, sampler=indices, pin_memory=on_cuda)
