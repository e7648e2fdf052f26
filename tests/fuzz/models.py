"""A Hugging Face folder as what a run begins from: config.json and weights."""

from __future__ import annotations

import copy
import dataclasses
import functools
import shutil
from pathlib import Path
from unittest import mock

import torch

from tests.fuzz.harness import SEEDS, Harness, scratch
from tinygpt import cli
from tinygpt.config import Config, checks
from tinygpt.config.counting import padded_vocab
from tinygpt.data.huggingface import open_tokenizer
from tinygpt.model.gpt import GPT
from tinygpt.runs import pretrained
from tinygpt.runs.load import initial_weights

GPT2 = SEEDS.parent / "gpt2"  # a minute one, with its tokenizer


@functools.cache
def copied(name: str) -> Path:
    return shutil.copytree(GPT2, scratch() / name)


@functools.cache
def composed() -> Config:
    return cli.compose_config([])


# Neither the tokenizer, which is another harness's, nor the shape of most inputs varies.
tokenizer = functools.cache(open_tokenizer)
SHAPES: dict[str, GPT] = {}


def begin(folder: Path) -> None:
    """As a run does: shape and tokenizer, then the weights."""
    config = dataclasses.replace(
        composed(), init_from=str(folder), model=copy.copy(composed().model)
    )
    with mock.patch.object(pretrained, "open_tokenizer", tokenizer):
        pretrained.adopt(config, [])
    checks.check(config)
    weights = initial_weights(config, 258)
    assert weights is not None
    rows = padded_vocab(258, config.model.pad_vocab_to_multiple)
    shape = f"{config.model} {rows}"
    if shape not in SHAPES:
        SHAPES.clear()
        with torch.device("meta"):
            SHAPES[shape] = GPT(config.model, rows)
    SHAPES[shape].load_state_dict(weights, assign=True)


def config(data: bytes) -> None:
    folder = copied("config_json")
    (folder / "config.json").write_bytes(data)
    begin(folder)


def weights(data: bytes) -> None:
    folder = copied("weights")
    (folder / "model.safetensors").write_bytes(data)
    begin(folder)


def parts(data: bytes) -> None:
    folder = copied("parts")
    if not (folder / "whole.safetensors").exists():
        (folder / "model.safetensors").rename(folder / "whole.safetensors")
    (folder / "model.safetensors.index.json").write_bytes(data)
    begin(folder)


HARNESSES = [
    Harness("model_config", "json", config),
    Harness("model_weights", "safetensors", weights),
    Harness("model_index", "json", parts),
]
