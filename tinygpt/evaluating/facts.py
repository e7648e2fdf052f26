"""What a model knows of the embedded corpus: its facts, asked with the corpus's own questions.

A question stands behind the opening of a story, as in training.  The answer is the likeliest of
all attributes of its relation, 1024 in the corpus, with the full stop.  Facts are
stated with a probability that falls with their rank, so the accuracy is by rank; entities that no
story mentions are there to show chance.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tinygpt.data.synthetic import RELATIONS, Entity, Grammar
from tinygpt.data.tokenizers import Tokenizer
from tinygpt.evaluating.machine import Machine
from tinygpt.evaluating.tasks import mean_of
from tinygpt.model.gpt import GPT
from tinygpt.model.search import Path, likeliest, tree_of

HEAD, MIDDLE = 100, 1000  # the last ranks of these bands
ASKED = 64  # facts of a band


def score_facts(
    model: GPT, tokenizer: Tokenizer, grammar: Grammar, machine: Machine
) -> dict[str, Any]:
    """The accuracy in each band with its standard error and how many facts were asked, by either
    question in turn; and what chance gives."""
    trees = {
        relation: tree_of(_answer(tokenizer, f" {value}") for value in grammar.values[relation])
        for relation in RELATIONS
    }
    found: dict[str, Any] = {}
    for band, facts in bands(grammar).items():
        asked = [
            (
                relation,
                tokenizer.encode(f"{grammar.opening} {question}"),
                _answer(tokenizer, answer),
            )
            for n, (entity, relation) in enumerate(facts)
            for question, answer in [grammar.queries(entity, relation)[n % 2]]
        ]
        prompts = [[tokenizer.start_id, *prompt] for _, prompt, _ in asked]
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
