"""Find the likeliest of many given continuations of a text, exactly, without scoring them all."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from tinygpt.model.gpt import GPT

Path = tuple[int, ...]


class Passes(Protocol):
    """Say where and how the model computes."""

    @property
    def device(self) -> torch.device: ...

    def autocast(self) -> AbstractContextManager[Any]: ...

    def rows(self, length: int) -> int:
        """Return how many sequences of ``length`` tokens one pass should hold."""


@dataclass(frozen=True)
class Tree:
    """Hold continuations as a tree: the tokens that may follow each prefix, and the full paths."""

    following: dict[Path, list[int]]
    whole: set[Path]


def tree_of(paths: Iterable[Path]) -> Tree:
    """Return the tree of ``paths``, none of which may be a prefix of another."""
    following: dict[Path, list[int]] = {}
    for path in (whole := dict.fromkeys(paths)):
        for n, token in enumerate(path):
            tokens = following.setdefault(path[:n], [])
            if token not in tokens:
                tokens.append(token)
    return Tree(following, set(whole))


def likeliest(
    model: GPT,
    prompts: Sequence[list[int]],
    trees: Sequence[Tree],
    machine: Passes,
    at_once: int = 1,
) -> list[Path]:
    """Return the likeliest full path of each tree after its prompt, exactly.

    This is best-first search: no path is likelier than its prefix, so the first full path on top
    of the heap is the likeliest.  In each pass through the model every prompt extends ``at_once``
    of its best prefixes; more than one pays if the prompts are few.
    """
    heaps: list[list[tuple[float, Path]]] = [[(0.0, ())] for _ in prompts]
    chosen: list[Path] = [()] * len(prompts)
    unanswered = list(range(len(prompts)))
    while unanswered:
        for n in unanswered:
            if heaps[n][0][1] in trees[n].whole:
                chosen[n] = heaps[n][0][1]
        unanswered = [n for n in unanswered if not chosen[n]]
        tops = [(n, *top) for n in unanswered for top in _tops(heaps[n], trees[n], at_once)]
        texts = [[*prompts[n], *path] for n, _, path in tops]
        wanted = [trees[n].following[path] for n, _, path in tops]
        for (n, nats, path), tokens, costs in zip(
            tops, wanted, _next_costs(model, texts, wanted, machine), strict=True
        ):
            for token, more in zip(tokens, costs.tolist(), strict=True):
                heapq.heappush(heaps[n], (nats + more, (*path, token)))
    return chosen


def _tops(heap: list[tuple[float, Path]], tree: Tree, count: int) -> list[tuple[float, Path]]:
    """Pop up to ``count`` of the best prefixes, stopping before the best full path."""
    found: list[tuple[float, Path]] = []
    while heap and len(found) < count and heap[0][1] not in tree.whole:
        found.append(heapq.heappop(heap))
    return found


@torch.no_grad()
def _next_costs(
    model: GPT, texts: Sequence[list[int]], wanted: Sequence[list[int]], machine: Passes
) -> list[NDArray[np.float64]]:
    """Return -log p of the wanted next tokens after each text."""
    found: list[NDArray[np.float64]] = []
    length = model.config.max_seq_len
    size = machine.rows(min(length, max(map(len, texts), default=1)))
    for first in range(0, len(texts), size):
        some = [text[-length:] for text in texts[first : first + size]]
        last = torch.tensor([len(text) - 1 for text in some])
        inputs = torch.zeros(len(some), int(last.max()) + 1, dtype=torch.int64)
        for row, text in enumerate(some):
            inputs[row, : len(text)] = torch.tensor(text)
        with machine.autocast():
            hidden = model.hidden(inputs.to(machine.device))
            logits = model.logits(hidden[torch.arange(len(some)), last])
        costs = -torch.log_softmax(logits.cpu().double(), dim=-1)
        found += [row[tokens].numpy() for row, tokens in zip(costs, wanted[first:], strict=False)]
    return found
