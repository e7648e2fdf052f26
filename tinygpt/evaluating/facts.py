"""What a model knows of the embedded corpus: its facts, asked with the corpus's own questions.

A question stands behind the opening of a story, as in training.  The answer is the likeliest of
all attributes of its relation, 1024 in the corpus, with the full stop.  Facts are
stated with a probability that falls with their rank, so the accuracy is by rank; entities that no
story mentions are there to show chance.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tinygpt.data.synthetic import RELATIONS, Entity, Grammar
from tinygpt.data.tokenizers import Tokenizer
from tinygpt.evaluating.machine import Machine
from tinygpt.evaluating.tasks import mean_of
from tinygpt.model.gpt import GPT

HEAD, MIDDLE = 100, 1000  # the last ranks of these bands
ASKED = 64  # facts of a band
Path = tuple[int, ...]


@dataclass(frozen=True)
class Tree:
    """The attributes of a relation as tokens: what may follow a beginning, and what is whole."""

    following: dict[Path, list[int]]
    whole: set[Path]


def score_facts(
    model: GPT, tokenizer: Tokenizer, grammar: Grammar, machine: Machine
) -> dict[str, Any]:
    """The accuracy in each band with its standard error and how many facts were asked, by either
    question in turn; and what chance gives."""
    opening = grammar.templates["opening"][0].format(name="{}").format(*grammar.words["name"])
    trees = {relation: _tree(tokenizer, grammar.values[relation]) for relation in RELATIONS}
    found: dict[str, Any] = {}
    for band, facts in bands(grammar).items():
        asked = [
            (relation, tokenizer.encode(f"{opening} {question}"), _answer(tokenizer, answer))
            for n, (entity, relation) in enumerate(facts)
            for question, answer in [grammar.queries(entity, relation)[n % 2]]
        ]
        prompts = [[tokenizer.eot_id, *prompt] for _, prompt, _ in asked]
        chosen = likeliest(model, prompts, [trees[relation] for relation, _, _ in asked], machine)
        right = np.array([path == answer for path, (*_, answer) in zip(chosen, asked, strict=True)])
        of_facts = right.reshape(len(facts), -1).mean(axis=1).tolist()
        found |= {**mean_of(band, of_facts), f"{band}_asked": len(facts)}
    return {**found, "chance": 1 / grammar.n_values}


def bands(grammar: Grammar) -> dict[str, list[tuple[Entity, str]]]:
    """Facts evenly spread over the ranks of each band; empty ones are left out."""
    count = grammar.config.n_facts
    limits = {"head": (0, HEAD), "middle": (HEAD, MIDDLE), "tail": (MIDDLE, count)}
    found = {}
    for band, (first, last) in limits.items():
        last = min(last, count)
        if first < last:
            ranks = np.unique(np.linspace(first, last - 1, ASKED).astype(int)).tolist()
            pairs = [divmod(rank, len(RELATIONS)) for rank in ranks]
            found[band] = [(grammar.entities[e], RELATIONS[r]) for e, r in pairs]
    if grammar.heldout:
        entities = grammar.heldout[:ASKED]
        found["heldout"] = [(e, RELATIONS[n % len(RELATIONS)]) for n, e in enumerate(entities)]
    return found


def _answer(tokenizer: Tokenizer, answer: str) -> Path:
    """With its full stop, so that none is the beginning of another."""
    return tuple(tokenizer.encode(f"{answer}."))


def _tree(tokenizer: Tokenizer, values: Sequence[str]) -> Tree:
    following: dict[Path, list[int]] = {}
    whole = {_answer(tokenizer, f" {value}"): None for value in values}
    for path in whole:
        for n, token in enumerate(path):
            tokens = following.setdefault(path[:n], [])
            if token not in tokens:
                tokens.append(token)
    return Tree(following, set(whole))


def likeliest(
    model: GPT, prompts: Sequence[list[int]], trees: Sequence[Tree], machine: Machine
) -> list[Path]:
    """Of each tree the likeliest whole path behind its prompt, exactly.

    Best first: no path is likelier than its beginning, so the first whole one that comes out on
    top is the likeliest.  All prompts go one step at a time, through the model together.
    """
    heaps: list[list[tuple[float, Path]]] = [[(0.0, ())] for _ in prompts]
    chosen: list[Path] = [()] * len(prompts)
    unanswered = list(range(len(prompts)))
    while unanswered:
        tops = {n: heapq.heappop(heaps[n]) for n in unanswered}
        unanswered = [n for n in unanswered if tops[n][1] not in trees[n].whole]
        for n in tops.keys() - set(unanswered):
            chosen[n] = tops[n][1]
        texts = [[*prompts[n], *tops[n][1]] for n in unanswered]
        wanted = [trees[n].following[tops[n][1]] for n in unanswered]
        for n, tokens, costs in zip(
            unanswered, wanted, _next_costs(model, texts, wanted, machine), strict=True
        ):
            nats, path = tops[n]
            for token, more in zip(tokens, costs.tolist(), strict=True):
                heapq.heappush(heaps[n], (nats + more, (*path, token)))
    return chosen


@torch.no_grad()
def _next_costs(
    model: GPT, texts: Sequence[list[int]], wanted: Sequence[list[int]], machine: Machine
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
