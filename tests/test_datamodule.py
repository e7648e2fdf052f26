"""Batches: the order of the data is a function of (seed, step), and every token is there."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.conftest import tiny
from tinygpt import cli
from tinygpt.config import Config, ConfigError
from tinygpt.config.horizon import Plan
from tinygpt.data.corpora import open_corpus
from tinygpt.data.datamodule import IGNORED, EvalBatches, TokenData, TrainBatches
from tinygpt.data.shards import EvalWindows, TrainWindows, prepare

LENGTH = 32  # of the windows of ``tiny``


def plan(batch_size: int, micro: int, world_size: int = 1, total_steps: int = 50) -> Plan:
    return Plan(
        total_steps=total_steps,
        train_tokens=total_steps * batch_size * LENGTH,
        warmup_steps=0,
        eval_steps=10,
        checkpoint_steps=10,
        keep_steps=None,
        batch_size=batch_size,
        micro_batch_size=micro,
        accumulate=batch_size // (micro * world_size),
    )


def opened(config: Config, cache: Path) -> TokenData:
    return TokenData(
        config, prepare(open_corpus(config.data), config.data, config.tokenizer, cache)
    )


@pytest.fixture(scope="module")
def data(corpus: Path, cache: Path) -> TokenData:
    return opened(cli.compose_config(tiny(corpus)), cache)


@pytest.fixture(scope="module")
def raw(data: TokenData) -> dict[str, list[int]]:
    """The tokens of each split, read without the code under test; one shard each."""
    found = {}
    for name, info in data.prepared.index["splits"].items():
        (entry,) = info["files"]
        path = data.prepared.folder / entry["file"]
        found[name] = np.fromfile(path, dtype=data.prepared.index["dtype"]).tolist()
    return found


def batches(data: TokenData, seed: int, plan_: Plan, rank: int = 0, world: int = 1) -> TrainBatches:
    return TrainBatches(
        data.splits["train"],
        data.windows,
        length=LENGTH,
        seed=seed,
        plan=plan_,
        rank=rank,
        world_size=world,
    )


def step_tokens(data: TokenData, seed: int, step: int, size: int, micro: int, world: int) -> Tensor:
    """What all devices see in a step, pass by pass: ``(B, T + 1)``."""
    plan_ = plan(size, micro, world)
    made = [batches(data, seed, plan_, rank, world) for rank in range(world)]
    parts = []
    for part in range(plan_.accumulate):
        for device in made:
            inputs, targets = device[step * plan_.accumulate + part]
            assert inputs.shape == targets.shape == (micro, LENGTH)
            assert torch.equal(inputs[:, 1:], targets[:, :-1])  # shifted once
            parts.append(torch.cat([inputs, targets[:, -1:]], dim=1))
    return torch.cat(parts)


# Training


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    step=st.integers(0, 2000),
    micro=st.sampled_from([1, 2, 4, 8, 16, 32]),
    world=st.sampled_from([1, 2, 4]),
)
def test_a_batch_depends_on_seed_and_step_alone(
    data: TokenData, seed: int, step: int, micro: int, world: int
) -> None:
    micro = min(micro, 32 // world)
    whole = step_tokens(data, seed, step, 32, micro=32, world=1)
    assert torch.equal(step_tokens(data, seed, step, 32, micro, world), whole)


@settings(max_examples=30)
@given(count=st.integers(1, 60), size=st.integers(1, 100), seed=st.integers(0, 2**32 - 1))
def test_every_epoch_is_a_permutation_of_its_own(
    data: TokenData, count: int, size: int, seed: int
) -> None:
    """Whatever the batch: three epochs are three permutations, cut where they happen to be."""
    windows = TrainWindows(np.arange(count, dtype=np.int64) * 7, 0, 0)
    made = TrainBatches(
        data.splits["train"], windows, length=LENGTH, seed=seed, plan=plan(size, size)
    )
    steps = -(-3 * count // size)
    order = np.concatenate([made.starts(step) for step in range(steps)])
    epochs = [order[n * count : (n + 1) * count].tolist() for n in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == windows.starts.tolist()
    if count > 20:  # 20! orders
        assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
        assert epochs[0] != windows.starts.tolist()


def test_targets_are_the_tokens_behind_the_inputs(
    data: TokenData, raw: dict[str, list[int]]
) -> None:
    made = batches(data, 5, plan(8, 8))
    for step in range(20):
        starts = made.starts(step)
        inputs, targets = made[step]
        for row, start in enumerate(starts.tolist()):
            assert inputs[row].tolist() == raw["train"][start : start + LENGTH]
            assert targets[row].tolist() == raw["train"][start + 1 : start + 1 + LENGTH]


@pytest.mark.parametrize("stride", [1, 10, 32])
def test_stride_sets_the_windows_apart(
    corpus: Path, cache: Path, raw: dict[str, list[int]], stride: int
) -> None:
    data = opened(cli.compose_config(tiny(corpus, f"data.stride={stride}")), cache)
    assert data.windows.starts.tolist() == list(range(0, len(raw["train"]) - LENGTH, stride))
    tokens = len(raw["train"]) - 1
    assert data.windows.used_tokens + data.windows.dropped_tokens == tokens
    assert data.windows.dropped_tokens < stride


def loader(data: TokenData, plan_: Plan, global_step: int) -> Iterator[Any]:
    """The batches that Lightning would draw, beginning at ``global_step``."""
    made = TokenData(data.config, data.prepared)
    made.plan = plan_
    device = SimpleNamespace(root_device=torch.device("cpu"))
    made.trainer = SimpleNamespace(  # type: ignore[assignment]
        global_rank=0, world_size=1, global_step=global_step, strategy=device
    )
    found = made.train_dataloader()
    assert len(found) == plan_.total_steps * plan_.accumulate  # as Lightning counts
    return iter(found)


@pytest.mark.parametrize("step", [0, 1, 7, 12])
def test_a_resumed_loader_goes_on_at_its_step(data: TokenData, step: int) -> None:
    plan_ = plan(8, 4, total_steps=12)
    whole = list(loader(data, plan_, 0))
    assert len(whole) == 24
    rest = list(loader(data, plan_, step))
    assert len(rest) == 24 - 2 * step
    for one, other in zip(rest, whole[2 * step :], strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])


# Evaluation


@settings(max_examples=60)
@given(
    length=st.integers(1, 700),
    batch_size=st.integers(1, 9),
    split=st.sampled_from(["val", "test"]),
    packed=st.booleans(),
)
def test_every_target_is_scored_once(
    data: TokenData,
    raw: dict[str, list[int]],
    length: int,
    batch_size: int,
    split: str,
    packed: bool,
) -> None:
    longest = data.splits[split].info["longest_document"]
    length = max(length, longest) if packed else length
    windows = data.splits[split].eval_windows(length, packed)
    made = EvalBatches(data.splits[split], windows, length=length, batch_size=batch_size, pad=257)
    scored: list[int] = []
    rows = 0
    for inputs, targets in made:
        assert inputs.shape == targets.shape
        assert inputs.shape[1] == length
        assert inputs.min() >= 0  # padding can be looked up
        rows += len(inputs)
        real = targets != IGNORED
        assert (real.cummin(dim=1).values == real).all()  # padding comes behind
        assert (inputs[:, 1:][real[:, 1:]] == targets[:, :-1][real[:, 1:]]).all()
        assert (inputs[~real] == 257).all()
        scored += targets[real].tolist()
    assert scored == raw[split][1:]
    assert rows == len(windows.starts)
    assert len(made) == -(-rows // batch_size)


@pytest.fixture(scope="module")
def synthetic(cache: Path) -> TokenData:
    config = cli.compose_config(
        ["data.max_documents=400", "tokenizer=byte", "model.max_seq_len=1024", *AT_REST]
    )
    return opened(config, cache)


AT_REST = ["hardware=cpu", "train.batch_tokens=2048", "train.steps=2"]


@pytest.mark.parametrize("split", ["val", "test"])
def test_synthetic_windows_hold_whole_stories(synthetic: TokenData, split: str) -> None:
    """What the exact floor rests on: no story is scored without its beginning."""
    assert synthetic.floor(split) is not None
    info = synthetic.splits[split].info
    stories = targets_seen = 0
    for inputs, targets in synthetic.eval_batches(split, 4):
        for row, wanted in zip(inputs.tolist(), targets.tolist(), strict=True):
            real = [token for token in wanted if token != IGNORED]
            assert row[0] == 257
            assert real[-1] == 257
            stories += real.count(257)
            targets_seen += len(real)
    assert stories == info["documents"] > 5
    assert targets_seen == info["tokens"]


def test_no_floor_where_a_story_is_longer_than_the_window(synthetic: TokenData) -> None:
    config = dataclasses.replace(
        synthetic.config, model=dataclasses.replace(synthetic.config.model, max_seq_len=64)
    )
    short = TokenData(config, synthetic.prepared)
    assert short.floor("val") is None
    lengths = {inputs.shape[1] for inputs, _ in short.eval_batches("val", 4)}
    assert lengths == {64}
    windows: EvalWindows = short.eval_batches("val", 4).windows
    assert set(windows.lengths[:-1].tolist()) == {64}  # cut without a look at documents


# Splits


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["data.fraction=0.001"], r"training split .*data.fraction or .*, about 6\d\d kB in all"),
        (["data.eval_tokens=50"], r"validation split .* or raise data.eval_tokens=50"),
    ],
)
def test_a_split_shorter_than_a_window_is_refused(
    corpus: Path, cache: Path, more: list[str], words: str
) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        opened(cli.compose_config(tiny(corpus, *more, "model.max_seq_len=256")), cache)
    assert str(caught.value).startswith("model.max_seq_len=256: longer than the ")
