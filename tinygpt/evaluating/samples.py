"""The quality of text that a model writes, beside as much real text.

Each sample begins a document and goes on, at temperature 1, to the end of text or for a context's
length.  On tokens:

distinct_n        different n-grams over all n-grams of the samples (Li et al. 2016)
repetition        n-grams of four that the same sample has before, over all of it: seq-rep-4 of
                  Welleck et al. 2020
kl_unigram        KL divergence of the samples' distribution from that of the reference text, in
kl_bigram         nats.  The reference is smoothed by as many pseudo-counts as the vocabulary has
                  tokens, spread evenly; of pairs as the product of both tokens' probabilities.

All of these depend on the amount of text: so the real text beside the samples is as many tokens
of the scored text, from its beginning, documents cut at the same length; the reference is the rest.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from tinygpt.config import ConfigError
from tinygpt.data.tokenizers import Tokenizer
from tinygpt.evaluating.machine import Machine
from tinygpt.evaluating.text import Text
from tinygpt.model.generate import generate
from tinygpt.model.gpt import GPT

Ints = NDArray[np.int64]
LENGTHS = (1, 2, 3)  # of the n-grams of distinct_n


def score_samples(
    model: GPT, tokenizer: Tokenizer, text: Text, count: int, seed: int, machine: Machine
) -> dict[str, float | int | None]:
    """Of the model's text, and ``_real`` of as much real text.  Raises ConfigError where there is
    too little of that."""
    documents = text.documents()
    if count >= len(documents):
        raise ConfigError(
            f"samples={count}: {text.name} has {len(documents)} documents to compare with; take "
            "fewer"
        )
    written = write(model, tokenizer, count, seed, machine)
    size = sum(map(len, written))
    real, rest = held_out(documents, size, text.length)
    if sum(map(len, real)) < size or not rest:
        raise ConfigError(
            f"samples={count}: {size} tokens, and {text.name} has {text.info['tokens']} to compare "
            "with; take fewer"
        )
    reference = Reference(rest, tokenizer.vocab_size)
    return {
        "count": count,
        "tokens": size,
        **qualities(written, reference),
        **{f"{name}_real": value for name, value in qualities(real, reference).items()},
    }


def write(model: GPT, tokenizer: Tokenizer, count: int, seed: int, machine: Machine) -> list[Ints]:
    """Samples, without the ends of text."""
    generator = torch.Generator().manual_seed(seed)
    length, found = model.config.max_seq_len, []
    for first in range(0, count, machine.rows(length)):
        rows = min(machine.rows(length), count - first)
        prompt = torch.full((rows, 1), tokenizer.start_id, device=machine.device)
        with machine.autocast():
            out = generate(
                model,
                prompt,
                length,
                generator=generator,
                stop_token=tokenizer.eot_id,
                start_token=tokenizer.start_id,
            )
        for row in out[:, 1:].cpu().numpy():
            ends = np.flatnonzero(row == tokenizer.eot_id)
            found.append(row[: ends[0]] if len(ends) else row)
    return found


def held_out(documents: Sequence[Ints], size: int, length: int) -> tuple[list[Ints], list[Ints]]:
    """``size`` tokens from the first documents, each cut at ``length``; and the other documents."""
    taken: list[Ints] = []
    for n, document in enumerate(documents):
        if size <= 0:
            return taken, list(documents[n:])
        taken.append(document[: min(length, size)])
        size -= len(taken[-1])
    return taken, []


class Reference:
    """A text's distributions of tokens and of pairs, smoothed."""

    def __init__(self, texts: Sequence[Ints], vocab_size: int) -> None:
        self.vocab_size = vocab_size
        counts = np.bincount(np.concatenate(texts), minlength=vocab_size)
        self.unigram = (counts + 1) / (counts.sum() + vocab_size)  # (V,)
        self.pairs, self.counts = np.unique(self._codes(texts), return_counts=True)

    def _codes(self, texts: Sequence[Ints]) -> Ints:
        pairs = ngrams(texts, 2)
        codes: Ints = pairs[:, 0] * self.vocab_size + pairs[:, 1]
        return codes

    def kl_unigram(self, texts: Sequence[Ints]) -> float:
        tokens, counts = np.unique(np.concatenate(texts), return_counts=True)
        p = counts / counts.sum()
        return float((p * np.log(p / self.unigram[tokens])).sum())

    def kl_bigram(self, texts: Sequence[Ints]) -> float:
        codes, counts = np.unique(self._codes(texts), return_counts=True)
        p = counts / counts.sum()
        place = np.searchsorted(self.pairs, codes).clip(max=len(self.pairs) - 1)
        seen = np.where(self.pairs[place] == codes, self.counts[place], 0)
        first, second = np.divmod(codes, self.vocab_size)
        prior = self.unigram[first] * self.unigram[second]
        q = (seen + self.vocab_size * prior) / (self.counts.sum() + self.vocab_size)
        return float((p * np.log(p / q)).sum())


def qualities(texts: Sequence[Ints], reference: Reference) -> dict[str, float | None]:
    """What no text is long enough for is None."""
    grams = {n: ngrams(texts, n) for n in LENGTHS}
    some = len(grams[2]) > 0
    return {
        **{f"distinct_{n}": distinct(found) for n, found in grams.items()},
        "repetition": repetition(texts),
        "kl_unigram": reference.kl_unigram(texts) if len(grams[1]) else None,
        "kl_bigram": reference.kl_bigram(texts) if some else None,
    }


def ngrams(texts: Sequence[Ints], n: int) -> Ints:
    """(m, n): those of each text; none goes from one to the next."""
    windows = [np.lib.stride_tricks.sliding_window_view(t, n) for t in texts if len(t) >= n]
    return np.concatenate(windows) if windows else np.zeros((0, n), dtype=np.int64)


def distinct(grams: Ints) -> float | None:
    """The share of n-grams, (m, n), that are different ones (Li et al. 2016)."""
    return len(np.unique(grams, axis=0)) / len(grams) if len(grams) else None


def repetition(texts: Sequence[Ints]) -> float | None:
    """Of all 4-grams the share of those that their text has before."""
    grams = [ngrams([text], 4) for text in texts]
    count = sum(map(len, grams))
    new = sum(len(np.unique(found, axis=0)) for found in grams)
    return 1 - new / count if count else None
