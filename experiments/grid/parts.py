"""What the loss above the floor of the embedded corpus is spent on: recalled names, answers.

    python experiments/grid/parts.py outputs/grid-laptop/RUN ...       seconds a run

Whole validation stories, each from its own beginning.  A recalled name costs ln 64 = 4.16 nats who
does not look back; an answer ln 1024 = 6.93 who does not know the fact.
"""

from __future__ import annotations

import itertools
import math
import re
import sys
from pathlib import Path

import numpy as np
import torch

from tinygpt.config import SyntheticData
from tinygpt.data.corpora import open_corpus, split_documents
from tinygpt.data.synthetic import Grammar
from tinygpt.runs.load import TrainedRun, load_run

STORIES = 1000
OF_A_KIND = {
    "recalled names": r"(?:Then|Now it was|At last|In the end)( \w+)",
    "answers": r"(?: is| has| owns| keeps| eats| feeds| cooks| lives in| sleeps in|\?|\? In) [aA]n?"
    r"( \w+ \w+)\.",
}


@torch.no_grad()
def losses(run: TrainedRun, text: str) -> tuple[list[int], np.ndarray]:
    """Where each token ends, in characters, and its loss in nats; the end of text last."""
    end, ids = run.tokenizer.eot_id, run.tokenizer.encode(text)
    tokens = torch.tensor([[end, *ids, end]])
    log_p = run.model(tokens[:, :-1]).log_softmax(-1)
    nats = -log_p.gather(-1, tokens[:, 1:, None])[0, :, 0].numpy()
    ends = itertools.accumulate(len(run.tokenizer.decode([token])) for token in ids)
    return [*ends, len(text)], nats


def recalls(story: str, names: set[str]) -> list[float]:
    """-log p of each recalled name: of the k introduced, the d-th last has one as 1/d."""
    cast: list[str] = []
    nats = []
    for found in re.finditer(r"\w+", story):
        name = found[0]
        if name in cast:
            sizes = range(1, len(cast) + 1)
            nats.append(math.log((len(cast) - cast.index(name)) * sum(1 / d for d in sizes)))
        elif name in names:
            cast.append(name)
    return nats


def answer(grammar: Grammar) -> float:
    """The entropy of an answer, in nats: right, or one of the others."""
    noise, others = grammar.config.noise_rate, grammar.n_values - 1
    return -(1 - noise) * math.log(1 - noise) - (noise * math.log(noise / others) if noise else 0.0)


def main() -> None:
    for folder in sys.argv[1:]:
        run = load_run(Path(folder))
        data = run.config.data
        assert isinstance(data, SyntheticData)
        documents = split_documents(open_corpus(data), data)
        stories = [
            d.text for split, d in itertools.islice(documents, 20 * STORIES) if split == "val"
        ]
        spent: dict[str, list[float]] = {kind: [] for kind in OF_A_KIND}
        exact: dict[str, list[float]] = {kind: [] for kind in OF_A_KIND}
        grammar = Grammar(data)
        names = set(grammar.words["name"])
        all_nats: list[float] = []
        for story in stories:
            ends, nats = losses(run, story)
            all_nats.extend(nats)
            for kind, pattern in OF_A_KIND.items():
                for found in re.finditer(pattern, story):
                    inside = [found.start(1) < at <= found.end(1) for at in ends[:-1]]
                    spent[kind].append(float(nats[:-1][inside].sum()))
            exact["recalled names"] += recalls(story, names)
        exact["answers"].append(answer(grammar))
        print(
            f"{Path(folder).name}: {np.mean(all_nats):.4f} nats per token of {len(stories)} stories"
        )
        for kind in OF_A_KIND:
            each, best = np.mean(spent[kind]), np.mean(exact[kind])
            above = (each - best) * len(spent[kind]) / len(all_nats)
            print(f"  {kind}: {each:.2f} nats each, {best:.2f} by the grammar: {above:.3f} a token")


if __name__ == "__main__":
    main()
