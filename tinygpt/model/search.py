"""Of many given continuations of a text the likeliest, exactly, without scoring all of them."""

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
    """Where and how the model computes."""

    @property
    def device(self) -> torch.device: ...

    def autocast(self) -> AbstractContextManager[Any]: ...

    def rows(self, length: int) -> int:
        """Sequences of so many tokens that one pass takes well."""


@dataclass(frozen=True)
class Tree:
    """Continuations as tokens: what may follow a beginning, and what is whole."""

    following: dict[Path, list[int]]
    whole: set[Path]


def tree_of(paths: Iterable[Path]) -> Tree:
    """None of ``paths`` may be the beginning of another."""
    following: dict[Path, dict[int, None]] = {}
    whole = dict.fromkeys(paths)
    for path in whole:
        for n, token in enumerate(path):
            following.setdefault(path[:n], {})[token] = None
    return Tree({path: list(tokens) for path, tokens in following.items()}, set(whole))


def likeliest(
    model: GPT,
    prompts: Sequence[list[int]],
    trees: Sequence[Tree],
    machine: Passes,
    at_once: int = 1,
) -> list[Path]:
    """Of each tree the likeliest whole path behind its prompt, exactly.

    Best first: no path is likelier than its beginning, so the first whole one that comes out on
    top is the likeliest.  All prompts go one step at a time, through the model together, each with
    ``at_once`` of its best beginnings: more of them pay where the prompts are few.
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
    """Takes the best beginnings off the heap, down to its best whole path."""
    found: list[tuple[float, Path]] = []
    while heap and len(found) < count and heap[0][1] not in tree.whole:
        found.append(heapq.heappop(heap))
    return found


@torch.no_grad()
def _next_costs(
    model: GPT, texts: Sequence[list[int]], wanted: Sequence[list[int]], machine: Passes
) -> list[NDArray[np.float64]]:
    """-log p of the wanted tokens behind each text."""
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
