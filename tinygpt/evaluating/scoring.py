"""Compute the loss of a model on a text, with the device settings and windows of training.

On the same device the loss is the one that training recorded, to the last digit.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import math
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils import prune as pruning

from tinygpt import fileio
from tinygpt.config import Config, ConfigError, CustomData
from tinygpt.config.horizon import PASS_TOKENS
from tinygpt.data import corpora, shards
from tinygpt.data.datamodule import EvalBatches
from tinygpt.data.shards import EvalWindows, Progress, Split
from tinygpt.evaluating.options import Options
from tinygpt.model import kernels
from tinygpt.model.gpt import GPT
from tinygpt.model.kernels import token_scores
from tinygpt.runs import rundir
from tinygpt.runs.load import TrainedRun
from tinygpt.training.corpus import own_corpus
from tinygpt.training.evaluation import Scores, score
from tinygpt.training.hardware import Device, resolve_device, set_up
from tinygpt.training.session import open_data

HALF = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
TOP = 5
INT8_MAX = 127


@dataclass(frozen=True)
class Machine:
    """Hold the device and precision that a run is scored with."""

    resolved: Device
    config: Config  # of the run, with the hardware of this evaluation
    slices: int = 1  # of a batch, a thread each, as in training

    @property
    def device(self) -> torch.device:
        return torch.device(self.resolved.accelerator)

    @property
    def dtype(self) -> torch.dtype:
        """Return the type of the weights."""
        return torch.float64 if self.resolved.precision == "64" else torch.float32

    def autocast(self) -> AbstractContextManager[Any]:
        half = HALF.get(self.resolved.precision)
        return torch.autocast(self.device.type, half, enabled=half is not None, cache_enabled=False)

    def rows(self, length: int) -> int:
        """Return how many sequences of this length the model takes at once."""
        return max(1, PASS_TOKENS[self.resolved.accelerator] // length)


@contextlib.contextmanager
def as_in_training(run: rundir.RunDir, config: Config, options: Options) -> Iterator[Machine]:
    """Use the precision, threads and matrix products of the run, unless ``options`` give others.

    Raises ConfigError if this machine lacks a device or a precision.
    """
    trained = fileio.read_json(run.environment)
    on_cpu, threads, slices = trained.get("device") == "cpu", options.threads, 1
    if on_cpu:
        trained = fileio.read_json(run.environment, threads=int)
        threads = threads or min(trained["threads"], os.cpu_count() or 1)
    hardware = dataclasses.replace(
        config.hardware,
        accelerator=options.device,
        devices=1,
        num_nodes=1,
        strategy="auto",
        threads=threads,
        compile="off",
    )
    as_trained = options.precision == "auto"
    try:
        precision = trained["precision_resolved"] if as_trained else options.precision
        resolved = resolve_device(hardware, precision)
    except ConfigError as error:
        line = str(error).replace("hardware.accelerator=", "device=")
        line = line.replace("train.precision=", "precision=")
        if as_trained and "precision=" in line:
            line += f", as {run.path} was trained"
        raise ConfigError(line) from error
    before = torch.get_num_threads()
    if on_cpu and resolved.accelerator == "cpu" and resolved.precision not in HALF:
        slices = trained.get("slices", 1)
        hardware.threads = max(1, (threads or 1) // slices)
    try:
        set_up(hardware, resolved)
        if on_cpu and "matmul" in trained:
            kernels.use_onednn(trained["matmul"] == "onednn" and kernels.onednn_is_there())
        if resolved.accelerator == "cuda":
            torch.set_float32_matmul_precision("high")  # TF32, as the Trainer sets it
        yield Machine(resolved, dataclasses.replace(config, hardware=hardware), slices)
    finally:
        torch.set_num_threads(before)
        kernels.use_onednn(None)


@dataclass(frozen=True)
class Text:
    """Hold a tokenized text.  With an exact ``floor`` its windows hold whole documents."""

    name: str
    split: Split
    length: int  # of a window: the model's context
    batch_size: int
    pad: int
    floor: float | None = None  # the exact entropy in nats per token, if windows can reach it

    def batches(self, stride: int | None, only_full: bool = False) -> EvalBatches:
        """Return batches with every target once, in the windows of training if ``stride`` is None.

        ``only_full`` returns the windows of full length instead, without overlap.
        """
        whole_documents = self.floor is not None and stride is None and not only_full
        windows = self.split.eval_windows(self.length, whole_documents, stride)
        if only_full:
            full = windows.lengths == self.length
            windows = EvalWindows(windows.starts[full], windows.lengths[full], windows.before[full])
        sizes = {"length": self.length, "batch_size": self.batch_size}
        return EvalBatches(self.split, windows, pad=self.pad, **sizes)

    def documents(self) -> list[NDArray[np.int64]]:
        """Return the tokens of each document, without the end-of-text token."""
        start_tokens = self.split.unscored > 0  # then a document ends where the next one's begins
        return [
            np.asarray(shard[start + 1 : end - start_tokens], dtype=np.int64)
            for shard, offsets in zip(self.split.shards, self.split.offsets, strict=True)
            for start, end in itertools.pairwise(offsets)
        ]


def open_text(trained: TrainedRun, options: Options, machine: Machine, progress: Progress) -> Text:
    """Open the text to score: a split of the run's corpus as in training, or all of another text.

    Raises ConfigError if the run's corpus has changed, or there is nothing to score.
    """
    config, tokenizer, pad = machine.config, trained.tokenizer, trained.tokenizer.eot_id
    if options.data.path is not None:
        other = CustomData(name="custom", **vars(options.data))
        cache = shards.cache_root(options.cache_dir or config.cache_dir)
        corpus = corpora.open_corpus(other)
        prepared = shards.prepare_whole(corpus, other, tokenizer, cache, progress)
        length = config.model.max_seq_len
        return Text(options.data.path, prepared.split("all"), length, machine.rows(length), pad)
    run, name = rundir.RunDir(trained.path), options.split
    instead = "; data=custom data.path=... scores any text"
    prepared = own_corpus(run, config, tokenizer, options.cache_dir, progress, instead)
    data = open_data(config, prepared, machine.resolved)
    if name not in data.splits:
        raise ConfigError(f"split={name}: {run.path} has none, as data.test_fraction=0")
    size = data.eval_batch_size
    return Text(name, data.splits[name], data.length, size, pad, data.floor(name))


@dataclass(frozen=True)
class Positions:
    """Hold the mean loss at each position of full windows, ``(T,)``, and its standard error.

    The model has seen t tokens at position t.
    """

    loss: NDArray[np.float64]
    error: NDArray[np.float64]
    windows: int

    def bands(self) -> list[tuple[int, int, float]]:
        """Return the mean loss over positions 1, 2, 3 to 4, 5 to 8 and so on."""
        length = len(self.loss)
        ends = [2**n for n in range(length.bit_length()) if 2**n < length] + [length]
        return [
            (start + 1, end, float(self.loss[start:end].mean()))
            for start, end in itertools.pairwise([0, *ends])
        ]


def score_text(
    model: GPT, text: Text, machine: Machine, stride: int | None = None, by_position: bool = False
) -> tuple[dict[str, float], Positions | None]:
    """Return the scores of a text and, if ``by_position`` and a window is full, loss by position.

    Without a ``stride`` the scores are exactly those of training.
    """
    scores, tally = _score(model, text.batches(stride), text, machine)
    named = {
        "loss": scores.loss,
        "perplexity": scores.perplexity,
        "accuracy": scores.accuracy,
        "accuracy_top5": tally.near / tally.targets,
        "bits_per_byte": scores.bits_per_byte,
        "bits_per_char": scores.bits_per_char,
        "scored_tokens": tally.targets,
    }
    if not by_position:
        return named, None
    if text.floor is not None or stride not in (None, text.length):
        batches = text.batches(None, only_full=True)
        if not len(batches):
            return named, None
        _, tally = _score(model, batches, text, machine)
    return named, tally.positions()


def _score(model: GPT, batches: EvalBatches, text: Text, machine: Machine) -> tuple[Scores, _Tally]:
    tally, autocast = _Tally(model, text.length), machine.autocast()
    info, device, slices = text.split.info, machine.device, machine.slices
    return score(tally, batches, info, device, autocast, tally.add, slices), tally


class _Tally:
    """Wrap a model to sum, in 64 bits, what ``score`` does not report."""

    def __init__(self, model: GPT, length: int) -> None:
        self.model, self.training = model, model.training
        self.train, self.eval = model.train, model.eval
        self.near = self.targets = self.windows = 0
        self.loss, self.squares = torch.zeros(2, length, dtype=torch.float64)

    def scores(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        """Return the loss of each target, and whether it is the likeliest or among the top 5."""
        rows = self.model.scaled(self.model.hidden(tokens)).flatten(0, 1)
        weight = self.model.output_weight
        losses, right, near = token_scores(rows, weight, targets.flatten(), top=TOP)
        return losses, right.bool(), near.bool()

    def add(self, scores: tuple[Tensor, ...], counted: Tensor) -> None:
        losses, _, near = (values.view_as(counted).cpu() for values in scores)
        counted = counted.cpu()
        self.near += int((near & counted).sum())
        self.targets += int(counted.sum())
        if counted.shape[1] == len(self.loss):
            full = losses[counted.all(dim=1)].double()
            self.windows += len(full)
            self.loss += full.sum(0)
            self.squares += full.square().sum(0)

    def positions(self) -> Positions | None:
        if not (n := self.windows):
            return None
        mean = self.loss / n
        spread = (self.squares / n - mean.square()).clamp(min=0)
        error = (spread / (n - 1)).sqrt() if n > 1 else torch.full_like(mean, math.nan)
        return Positions(mean.numpy(), error.numpy(), n)


@torch.no_grad()
def quantized(model: GPT) -> tuple[GPT, int]:
    """Return a copy with the weights of linear layers rounded to int8, and its size in bytes.

    Rounding is symmetric, with one scale per row: its largest weight / 127.  Activations keep
    their precision, and the copy stores the rounded weights as floating-point numbers.
    """
    smaller, saved = copy.deepcopy(model), 0
    for layer in _linear_layers(smaller):
        weight = layer.weight
        scale = (weight.abs().amax(dim=1).float() / INT8_MAX).clamp(min=torch.finfo().tiny)
        zero = torch.zeros(len(scale), dtype=torch.int32, device=scale.device)
        rounded = torch.fake_quantize_per_channel_affine(
            weight.float(), scale, zero, 0, -INT8_MAX, INT8_MAX
        )
        weight.copy_(rounded)
        saved += weight.numel() * (weight.itemsize - 1) - scale.numel() * scale.itemsize
    return smaller, size_in_bytes(model) - saved


def pruned(model: GPT, amount: float) -> tuple[GPT, int]:
    """Return a copy whose linear layers have their smallest weights set to zero, and its size.

    ``amount`` is the share of zeros over all layers.  The size in bytes counts a bit for each
    weight, then the weights that are not zero.
    """
    smaller, saved = copy.deepcopy(model), 0
    layers = _linear_layers(smaller)
    weights = [(layer, "weight") for layer in layers]
    pruning.global_unstructured(weights, pruning.L1Unstructured, amount=amount)
    for layer in layers:
        pruning.remove(layer, "weight")  # type: ignore[no-untyped-call]
        zeros = int((layer.weight == 0).sum())
        saved += zeros * layer.weight.itemsize - layer.weight.numel() // 8
    return smaller, size_in_bytes(model) - saved


def _linear_layers(model: GPT) -> list[nn.Linear]:
    """Return the layers of attention, MLP and an untied head."""
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


def size_in_bytes(model: GPT) -> int:
    """Return the size of all parameters; tied ones count once."""
    return sum(p.numel() * p.itemsize for p in model.parameters())
