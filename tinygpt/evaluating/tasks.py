"""Questions answered by likelihood, as lm-evaluation-harness (Gao et al. 2021) has it.

A prompt begins a document, as in training.  Between a prompt and what follows stands a space,
unless one of them brings white space there.  The two are encoded together and cut where the
prompt, encoded alone, ends; white space at the prompt's end belongs to what follows.  Of what is
longer than the context the prompt loses its beginning; an answer that is longer by itself leaves
the question out.  Both are counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tinygpt.data.datamodule import IGNORED
from tinygpt.data.tokenizers import Tokenizer
from tinygpt.evaluating.items import Item, Task
from tinygpt.evaluating.machine import Machine
from tinygpt.model.gpt import GPT

Floats = NDArray[np.float64]
Pair = tuple[list[int], list[int]]  # tokens: what is read, what then follows


def encode_pair(tokenizer: Tokenizer, prompt: str, answer: str) -> Pair:
    """Prompt, as a document begins, and answer, encoded together and cut."""
    if prompt and not prompt[-1].isspace() and not answer[0].isspace():
        answer = " " + answer
    bare = prompt.rstrip()
    answer = prompt[len(bare) :] + answer
    before = tokenizer.encode(bare)
    return [tokenizer.start_id, *before], tokenizer.encode(bare + answer)[len(before) :]


def score_task(model: GPT, tokenizer: Tokenizer, task: Task, machine: Machine) -> dict[str, Any]:
    """Accuracies with their standard errors; what was cut or left out, and unknown characters."""
    encoded = [
        [encode_pair(tokenizer, item.prompt, choice) for choice in item.choices]
        for item in task.items
    ]
    length = model.config.max_seq_len
    fits = [all(0 < len(answer) <= length for _, answer in pairs) for pairs in encoded]
    kept = [n for n, fit in enumerate(fits) if fit]
    pairs = [pair for n in kept for pair in encoded[n]]
    loglikelihood, greedy = likelihoods(model, pairs, machine)
    ends = np.cumsum([len(encoded[n]) for n in kept])
    items = [task.items[n] for n in kept]
    say = _cloze if task.is_cloze else _multiple_choice
    unknown = tokenizer.unknown_id
    return {
        **say(items, np.split(loglikelihood, ends[:-1]), np.split(greedy, ends[:-1])),
        "questions": len(kept),
        "left_out": len(task.items) - len(kept),
        "prompts_cut": sum(any(len(a) + len(b) - 1 > length for a, b in encoded[n]) for n in kept),
        "unknown_tokens": sum((before + answer).count(unknown) for before, answer in pairs)
        if unknown is not None
        else 0,
    }


def _cloze(items: Sequence[Item], sums: Sequence[Floats], greedy: Sequence[Any]) -> dict[str, Any]:
    """``accuracy``: each token of the answer is the likeliest; ``nats``: -log p of an answer."""
    right = [float(found[0]) for found in greedy]
    nats = [-float(found[0]) for found in sums]
    return {**mean_of("accuracy", right), **mean_of("nats", nats)}


def _multiple_choice(
    items: Sequence[Item], sums: Sequence[Floats], greedy: Sequence[Any]
) -> dict[str, Any]:
    """``accuracy`` by the sum of the log-likelihoods, ``accuracy_norm`` by the sum for each byte
    of the choice."""
    by_sum, by_byte = [], []
    for item, found in zip(items, sums, strict=True):
        sizes = np.array([len(choice.encode("utf-8", "replace")) for choice in item.choices])
        by_sum.append(float(found.argmax() == item.label))
        by_byte.append(float((found / sizes).argmax() == item.label))
    chance = float(np.mean([1 / len(item.choices) for item in items])) if items else None
    return {
        **mean_of("accuracy", by_sum),
        **mean_of("accuracy_norm", by_byte),
        "chance": chance,
    }


def mean_of(name: str, values: Sequence[float]) -> dict[str, float | None]:
    """The mean and its standard error, from the sample's standard deviation; null: too few."""
    n = len(values)
    error = float(np.std(values, ddof=1) / np.sqrt(n)) if n > 1 else None
    return {name: float(np.mean(values)) if n else None, f"{name}_stderr": error}


@torch.no_grad()
def likelihoods(
    model: GPT, pairs: Sequence[Pair], machine: Machine
) -> tuple[Floats, NDArray[np.bool_]]:
    """Of each pair log p of what follows, ``(n,)``, and whether each token of it is the likeliest.

    Pairs of about the same length go through the model together.
    """
    length = model.config.max_seq_len
    texts = [(before + answer)[-length - 1 :] for before, answer in pairs]
    order = sorted(range(len(pairs)), key=lambda n: len(texts[n]), reverse=True)
    sums, greedy = np.zeros(len(pairs)), np.zeros(len(pairs), dtype=bool)
    first = 0
    while first < len(order):
        width = len(texts[order[first]]) - 1  # the longest that is left
        rows = order[first : first + machine.rows(width)]
        inputs = np.zeros((len(rows), width), dtype=np.int64)
        targets = np.full((len(rows), width), IGNORED, dtype=np.int64)
        for row, n in enumerate(rows):
            text, answer = texts[n], pairs[n][1]
            end = len(text) - 1
            inputs[row, :end] = text[:-1]
            targets[row, end - len(answer) : end] = answer
        wanted = torch.from_numpy(targets).to(machine.device)
        with machine.autocast():
            found = model.scores(torch.from_numpy(inputs).to(machine.device), wanted.clamp(min=0))
        losses, right = (values.view_as(wanted).cpu() for values in found)
        counted = wanted.cpu() != IGNORED
        sums[rows] = -losses.double().masked_fill(~counted, 0).sum(1).numpy()
        greedy[rows] = (right | ~counted).all(1).numpy()
        first += len(rows)
    return sums, greedy
