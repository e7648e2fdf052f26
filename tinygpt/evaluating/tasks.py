"""Test a model beyond its loss: on questions, facts of the embedded corpus, and samples."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch.nn.utils.rnn import pad_sequence

from tinygpt.config import ConfigError
from tinygpt.data.datamodule import IGNORED
from tinygpt.data.synthetic import RELATIONS, Entity, Grammar
from tinygpt.data.tokenizers import Tokenizer
from tinygpt.evaluating.options import Task
from tinygpt.evaluating.scoring import Machine, Text
from tinygpt.model.generate import generate
from tinygpt.model.gpt import GPT
from tinygpt.model.search import likeliest, tree_of

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Pair = tuple[list[int], list[int]]  # tokens of a prompt and of its answer
HEAD, MIDDLE = 100, 1000  # ranks of facts below which these bands end
ASKED = 64  # facts of a band


def mean_of(name: str, values: Sequence[float]) -> dict[str, float | None]:
    """Return the mean and its standard error, each None if there are too few values."""
    n = len(values)
    error = float(np.std(values, ddof=1) / np.sqrt(n)) if n > 1 else None
    return {name: float(np.mean(values)) if n else None, f"{name}_stderr": error}


def encode_pair(tokenizer: Tokenizer, prompt: str, answer: str) -> Pair:
    """Encode a prompt, as the beginning of a document, and its answer.

    A space is put in between unless either brings white space.  Both are encoded together and cut
    where the prompt, encoded alone, ends; white space at its end belongs to the answer.
    """
    if prompt and not prompt[-1].isspace() and not answer[0].isspace():
        answer = " " + answer
    bare = prompt.rstrip()
    answer = prompt[len(bare) :] + answer
    before = tokenizer.encode(bare)
    return [tokenizer.start_id, *before], tokenizer.encode(bare + answer)[len(before) :]


def score_task(model: GPT, tokenizer: Tokenizer, task: Task, machine: Machine) -> dict[str, Any]:
    """Return the accuracies with their standard errors, and counts of what did not fit.

    As in lm-evaluation-harness (Gao et al. 2021), ``accuracy`` chooses by the sum of
    log-likelihoods, ``accuracy_norm`` by that sum per byte; a cloze is right if each token is the
    likeliest, and ``nats`` is -log p.  A prompt that is too long loses its beginning; a question
    whose answer alone is longer than the context is left out.
    """
    length, unknown = model.config.max_seq_len, tokenizer.unknown_id
    asked = []
    for question in task.questions:
        pairs = [encode_pair(tokenizer, question.prompt, choice) for choice in question.choices]
        if all(0 < len(answer) <= length for _, answer in pairs):
            asked.append((question, pairs))
    flat = [pair for _, pairs in asked for pair in pairs]
    sums, greedy = likelihoods(model, flat, machine)
    ends = np.cumsum([0, *(len(pairs) for _, pairs in asked)])
    scores: dict[str, Any] = {}
    if task.questions[0].is_cloze:
        scores |= mean_of("accuracy", greedy.astype(float).tolist())
        scores |= mean_of("nats", (-sums).tolist())
    else:
        by_sum, by_byte = [], []
        for (question, _), (a, b) in zip(asked, itertools.pairwise(ends), strict=True):
            sizes = [len(choice.encode("utf-8", "replace")) for choice in question.choices]
            by_sum.append(float(sums[a:b].argmax() == question.label))
            by_byte.append(float((sums[a:b] / sizes).argmax() == question.label))
        scores |= {**mean_of("accuracy", by_sum), **mean_of("accuracy_norm", by_byte)}
        chances = [1 / len(pairs) for _, pairs in asked]
        scores["chance"] = float(np.mean(chances)) if asked else None
    scores["questions"] = len(asked)
    scores["left_out"] = len(task.questions) - len(asked)
    scores["prompts_cut"] = sum(any(len(a) + len(b) > length + 1 for a, b in p) for _, p in asked)
    scores["unknown_tokens"] = sum(token == unknown for a, b in flat for token in a + b)
    return scores


@torch.no_grad()
def likelihoods(
    model: GPT, pairs: Sequence[Pair], machine: Machine
) -> tuple[Floats, NDArray[np.bool_]]:
    """Return log p of each answer, and whether all its tokens are the likeliest, ``(n,)``.

    Batches hold pairs of about the same length.
    """
    length = model.config.max_seq_len
    texts = [(before + answer)[-length - 1 :] for before, answer in pairs]
    order = sorted(range(len(pairs)), key=lambda n: len(texts[n]), reverse=True)
    sums, greedy = np.zeros(len(pairs)), np.zeros(len(pairs), dtype=bool)
    while order:
        size = machine.rows(len(texts[order[0]]) - 1)  # by the longest that is left
        rows, order = order[:size], order[size:]
        inputs = pad_sequence([torch.tensor(texts[n][:-1]) for n in rows], batch_first=True)
        targets = torch.full_like(inputs, IGNORED)
        for row, n in enumerate(rows):
            end, answer = len(texts[n]) - 1, pairs[n][1]
            targets[row, end - len(answer) : end] = torch.tensor(answer)
        counted, targets = targets != IGNORED, targets.clamp(min=0)
        with machine.autocast():
            scores = model.scores(inputs.to(machine.device), targets.to(machine.device))
        losses, right = (values.view_as(targets).cpu() for values in scores)
        sums[rows] = -losses.double().masked_fill(~counted, 0).sum(1).numpy()
        greedy[rows] = (right | ~counted).all(1).numpy()
    return sums, greedy


def score_facts(
    model: GPT, tokenizer: Tokenizer, grammar: Grammar, machine: Machine
) -> dict[str, Any]:
    """Return the accuracy in each band of ranks, its standard error, its count, and chance.

    A question follows the opening of a story, as in training.  The answer is the likeliest of all
    attributes of its relation, each with a full stop so that none is the beginning of another.
    """

    def answer_tokens(answer: str) -> tuple[int, ...]:
        return tuple(tokenizer.encode(f"{answer}."))

    trees = {r: tree_of(answer_tokens(f" {v}") for v in grammar.values[r]) for r in RELATIONS}
    scores: dict[str, Any] = {}
    for band, facts in bands(grammar).items():
        prompts, answers = [], []
        for n, (entity, relation) in enumerate(facts):
            question, answer = grammar.queries(entity, relation)[n % 2]  # its wordings in turn
            prompt = tokenizer.encode(f"{grammar.opening} {question}")
            prompts.append([tokenizer.start_id, *prompt])
            answers.append(answer_tokens(answer))
        chosen = likeliest(model, prompts, [trees[relation] for _, relation in facts], machine)
        right = [float(path == answer) for path, answer in zip(chosen, answers, strict=True)]
        scores |= {**mean_of(band, right), f"{band}_asked": len(facts)}
    return {**scores, "chance": 1 / grammar.n_values}


def bands(grammar: Grammar) -> dict[str, list[tuple[Entity, str]]]:
    """Return facts evenly spread over the ranks of each band that is not empty.

    The higher the rank, the less often stories state the fact; held-out entities are in none.
    """
    count = grammar.config.n_facts
    limits = {"head": (0, HEAD), "middle": (HEAD, MIDDLE), "tail": (MIDDLE, count)}
    facts = {}
    for band, (first, last) in limits.items():
        last = min(last, count)
        if first < last:
            ranks = np.unique(np.linspace(first, last - 1, ASKED).astype(int)).tolist()
            pairs = [divmod(rank, len(RELATIONS)) for rank in ranks]
            facts[band] = [(grammar.entities[e], RELATIONS[r]) for e, r in pairs]
    if grammar.heldout:
        entities = grammar.heldout[:ASKED]
        facts["heldout"] = [(e, RELATIONS[n % len(RELATIONS)]) for n, e in enumerate(entities)]
    return facts


def score_samples(
    model: GPT, tokenizer: Tokenizer, text: Text, count: int, seed: int, machine: Machine
) -> dict[str, float | int | None]:
    """Return ``qualities`` of the model's text and, as ``_real``, of an equal amount of real text.

    All measures depend on the amount.  The real text is the beginning of the scored text, its
    documents cut at the same length; the rest is the reference.  Raises ConfigError if there is
    too little of it.
    """
    documents = text.documents()
    if count >= len(documents):
        line = f"samples={count}: {text.name} has {len(documents)} documents to compare with"
        raise ConfigError(f"{line}; take fewer")
    written = write(model, tokenizer, count, seed, machine)
    size = sum(map(len, written))
    real, reference = held_out(documents, size, text.length)
    if sum(map(len, real)) < size or not reference:
        line = f"samples={count}: {size} tokens, and {text.name} has {text.split.info['tokens']}"
        raise ConfigError(f"{line} to compare with; take fewer")
    ours, theirs = (qualities(some, reference, tokenizer.vocab_size) for some in (written, real))
    of_real = {f"{name}_real": value for name, value in theirs.items()}
    return {"count": count, "tokens": size, **ours, **of_real}


def write(model: GPT, tokenizer: Tokenizer, count: int, seed: int, machine: Machine) -> list[Ints]:
    """Return samples at temperature 1, each up to its end of text or the model's context."""
    generator = torch.Generator().manual_seed(seed)
    start, stop, length = tokenizer.start_id, tokenizer.eot_id, model.config.max_seq_len
    texts = []
    prompts = torch.full((count, 1), start, device=machine.device)
    for prompt in torch.split(prompts, machine.rows(length)):
        with machine.autocast():
            out = generate(
                model, prompt, length, generator=generator, stop_token=stop, start_token=start
            )
        for row in out[:, 1:].cpu().numpy():
            ends = np.flatnonzero(row == stop)
            texts.append(row[: ends[0]] if len(ends) else row)
    return texts


def held_out(documents: Sequence[Ints], size: int, length: int) -> tuple[list[Ints], list[Ints]]:
    """Return ``size`` tokens of the first documents, each cut at ``length``, and the others."""
    taken: list[Ints] = []
    for n, document in enumerate(documents):
        if size <= 0:
            return taken, list(documents[n:])
        taken.append(document[: min(length, size)])
        size -= len(taken[-1])
    return taken, []


def qualities(
    texts: Sequence[Ints], reference: Sequence[Ints], vocab_size: int
) -> dict[str, float | None]:
    """Return measures of texts, each None if no text is long enough.

    distinct_n   different n-grams over all n-grams (Li et al. 2016)
    repetition   share of 4-grams that the same text has before: seq-rep-4 of Welleck et al. 2020
    kl_unigram   KL divergence from the reference, in nats.  Its counts are smoothed by as many
    kl_bigram    pseudo-counts as the vocabulary has tokens, spread evenly; those of pairs as the
                 product of both tokens' probabilities
    """
    measures: dict[str, float | None] = {}
    for n in (1, 2, 3):
        grams = _ngrams(texts, n)
        different = len(np.unique(grams, axis=0))
        measures[f"distinct_{n}"] = different / len(grams) if len(grams) else None
    grams4 = [_ngrams([text], 4) for text in texts]
    count, new = sum(map(len, grams4)), sum(len(np.unique(some, axis=0)) for some in grams4)
    measures["repetition"] = 1 - new / count if count else None

    def counts(some: Sequence[Ints], n: int) -> pd.Series:
        codes = _ngrams(some, n) @ vocab_size ** np.arange(n)[::-1]
        return pd.Series(codes).value_counts().sort_index()

    smoothed = counts(reference, 1).reindex(range(vocab_size), fill_value=0).to_numpy() + 1
    unigram = smoothed / smoothed.sum()  # (V,)
    tokens, pairs, known = counts(texts, 1), counts(texts, 2), counts(reference, 2)
    first, second = np.divmod(pairs.index.to_numpy(), vocab_size)
    pseudo = vocab_size * (unigram[first] * unigram[second])
    seen = known.reindex(pairs.index, fill_value=0).to_numpy()
    measures["kl_unigram"] = _divergence(tokens, unigram[tokens.index.to_numpy()])
    measures["kl_bigram"] = _divergence(pairs, (seen + pseudo) / (known.sum() + vocab_size))
    return measures


def _divergence(counts: pd.Series, q: Floats) -> float | None:
    p = (counts / counts.sum()).to_numpy()
    return float((p * np.log(p / q)).sum()) if len(p) else None


def _ngrams(texts: Sequence[Ints], n: int) -> Ints:
    """Return the n-grams within each text, ``(m, n)``."""
    windows = [np.lib.stride_tricks.sliding_window_view(t, n) for t in texts if len(t) >= n]
    return np.concatenate(windows) if windows else np.zeros((0, n), dtype=np.int64)
