"""Choose documents that are new to a model; each has a context, which edits see, and a held-out
part, which is scored.

``domain_shift``: documents of any corpus.  A gap of one context length of the model follows the
document's context, then the held-out tokens in windows of that length.  ``new_facts``: a document
states a fact about an entity that the embedded corpus never mentions; the held-out part is
questions about it, of which the answers with their full stop are scored.
"""

from __future__ import annotations

import dataclasses
import hashlib
import heapq
import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tinygpt import fileio
from tinygpt.adaptation.config import DocumentsConfig
from tinygpt.config import SyntheticData
from tinygpt.config.checks import require
from tinygpt.config.horizon import PASS_TOKENS
from tinygpt.data.datamodule import IGNORED, TokenData
from tinygpt.data.shards import Progress
from tinygpt.data.synthetic import RELATIONS, STATEMENTS, Grammar
from tinygpt.data.tokenizers import Tokenizer
from tinygpt.model.gpt import GPT
from tinygpt.model.kernels import token_scores
from tinygpt.model.search import Path, Tree, likeliest, tree_of
from tinygpt.runs import rundir
from tinygpt.runs.load import TrainedRun
from tinygpt.training.corpus import own_corpus

SPLITS = ("test", "tune", "train")  # test first, so that it does not depend on the others' sizes
AT_ONCE = 64  # prefixes of answers per pass through a model


class Question(NamedTuple):
    """Hold the tokens of a prompt, its answer and all possible answers."""

    prompt: list[int]
    answer: Path
    answers: Tree


@dataclass(frozen=True)
class FullPrecision:
    """Run passes in the precision of the weights."""

    device: torch.device

    def autocast(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def rows(self, length: int) -> int:
        return max(1, PASS_TOKENS[self.device.type] // length)


@dataclass(frozen=True)
class Heldout:
    """Hold windows of tokens, (W, T) each; targets that are not scored are IGNORED."""

    inputs: Tensor
    targets: Tensor
    questions: Sequence[Question] = ()

    @property
    def tokens(self) -> int:
        """Return the number of scored targets."""
        return int((self.targets != IGNORED).sum())

    @cached_property
    def fingerprint(self) -> str:
        both = self.inputs.numpy().tobytes() + self.targets.numpy().tobytes()
        return hashlib.sha256(both).hexdigest()

    @torch.no_grad()
    def loss(self, model: GPT) -> float:
        """Return the mean loss of all scored tokens, in nats."""
        weight = model.output_weight
        rows = FullPrecision(weight.device).rows(self.inputs.shape[1])
        total = 0.0
        parts = (torch.split(x, rows) for x in (self.inputs, self.targets))
        for inputs, targets in zip(*parts, strict=True):
            scored = targets != IGNORED
            hidden = model.scaled(model.hidden(inputs.to(weight.device)))[scored.to(weight.device)]
            losses, _ = token_scores(hidden, weight, targets[scored].to(weight.device))
            total += float(losses.cpu().double().sum())
        return total / self.tokens

    def accuracy(self, model: GPT) -> float | None:
        """Return the share of questions whose likeliest answer is right; None without questions."""
        if not self.questions:
            return None
        prompts, answers, trees = zip(*self.questions, strict=True)
        machine, at_once = FullPrecision(model.output_weight.device), AT_ONCE // len(prompts)
        found = likeliest(model, prompts, trees, machine, at_once)
        return float(np.mean([path == answer for path, answer in zip(found, answers, strict=True)]))


@dataclass(frozen=True)
class Document:
    """Hold a document; ``context_ids`` begin with the token that starts every document."""

    doc_id: str
    sha256: str  # of the text
    context: str
    context_ids: list[int]
    heldout: Heldout
    split: str = ""
    unknown: int = 0  # characters that the tokenizer lacks
    oracle: Sequence[str] = ()


def _splits(config: DocumentsConfig) -> tuple[list[str], str]:
    """Return the split of each document, and the keys that set their numbers."""
    keys = [f"documents.{name}={getattr(config, name)}" for name in reversed(SPLITS)]
    return [name for name in SPLITS for _ in range(getattr(config, name))], ", ".join(keys)


def windows(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Return padded inputs and targets (W, T), shifted by a token, from ``rows`` of tokens."""
    inputs, targets = ([torch.tensor(row[at:][: len(row) - 1]) for row in rows] for at in (0, 1))
    return (
        pad_sequence(inputs, batch_first=True),
        pad_sequence(targets, batch_first=True, padding_value=IGNORED),
    )


# --- documents of a corpus


def domain_shift(
    config: DocumentsConfig, base: TrainedRun, texts: Iterator[str]
) -> tuple[list[Document], int]:
    """Return distinct documents in the order of a seeded hash, and how many were too short.

    Only those before the last document count.  Raises ConfigError if there are too few documents.
    """
    splits, keys = _splits(config)
    kept: list[tuple[str, Document]] = []
    short: list[str] = []
    seen: set[str] = set()
    for text in texts:
        sha = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
        place = fileio.digest([config.seed, sha])
        if sha in seen or (len(kept) == len(splits) and place > kept[-1][0]):
            continue
        seen.add(sha)
        found = _split(text, sha, config, base)
        if found is None:
            short.append(place)
        else:
            kept = heapq.nsmallest(len(splits), [*kept, (place, found)], key=lambda pair: pair[0])
    require(
        len(kept) == len(splits),
        f"{keys}: only {len(kept)} documents of {len(seen)} are long enough; lower these, "
        f"documents.context_tokens={config.context_tokens} or "
        f"documents.heldout_tokens={config.heldout_tokens}; or give longer documents "
        "(data.separator=none: a file is one)",
    )
    pairs = zip(kept, splits, strict=True)
    documents = [dataclasses.replace(document, split=split) for (_, document), split in pairs]
    return documents, sum(place < kept[-1][0] for place in short)


def _split(text: str, sha: str, config: DocumentsConfig, base: TrainedRun) -> Document | None:
    """Split a text into context and held-out part; return None if it is too short."""
    tokenizer, length = base.tokenizer, base.model.config.max_seq_len
    begin = config.context_tokens + length
    needed = begin + config.heldout_tokens
    size = len(text.encode("utf-8", "surrogatepass"))  # in bytes, at least one per token
    ids = tokenizer.encode(text) if size >= needed else []
    if len(ids) < needed:
        return None
    words = re.sub(r"\W+", "-", " ".join(text[:200].split()[:4])).strip("-").lower()
    context, rest = ids[: config.context_tokens], ids[begin - 1 : needed]
    rows = [rest[first : first + length + 1] for first in range(0, len(rest) - 1, length)]
    unknown = tokenizer.unknown_id
    return Document(
        doc_id=f"{words[:40]}-{sha[:6]}",
        sha256=sha,
        # a tokenizer with an unknown token has one token per character
        context=tokenizer.decode(context) if unknown is None else text[: len(context)],
        context_ids=[tokenizer.start_id, *context],
        heldout=Heldout(*windows(rows)),
        unknown=0 if unknown is None else (context + rest[1:]).count(unknown),
    )


# --- facts of the embedded corpus


def new_facts(config: DocumentsConfig, base: TrainedRun) -> list[Document]:
    """Return facts about entities that the base never saw, one entity after the other.

    Raises ConfigError if there are too few of them, or if the model's context is too short.
    """
    data, tokenizer, length = base.config.data, base.tokenizer, base.model.config.max_seq_len
    assert isinstance(data, SyntheticData)  # checked by check_adapt
    grammar = Grammar(data)
    entities, relations = len(grammar.heldout), len(RELATIONS)
    splits, keys = _splits(config)
    require(
        len(splits) <= entities * relations,
        f"{keys}: {len(splits)} facts, but the run kept {entities} entities out of its corpus "
        f"(data.heldout_entities), with {relations} facts each",
    )
    order = np.random.default_rng(config.seed).permutation(entities)
    trees = {
        relation: tree_of(_answer(tokenizer, f" {value}") for value in grammar.values[relation])
        for relation in RELATIONS
    }
    found = []
    for n, split in enumerate(splits):
        entity = grammar.heldout[order[n % entities]]
        relation = RELATIONS[(n + n // entities) % relations]
        ways = range(len(STATEMENTS[relation]))
        said = [f"{grammar.opening} {grammar.statement(entity, relation, way)}" for way in ways]
        questions = [
            Question(
                [tokenizer.start_id, *tokenizer.encode(f"{grammar.opening} {prompt}")],
                _answer(tokenizer, answer),
                trees[relation],
            )
            for prompt, answer in grammar.queries(entity, relation)
        ]
        inputs, targets = windows([[*q.prompt, *q.answer] for q in questions])
        for row, question in zip(targets, questions, strict=True):
            row[: len(question.prompt) - 1] = IGNORED
        found.append(
            Document(
                doc_id=f"{entity.name}-{relation}",
                sha256=hashlib.sha256(said[0].encode()).hexdigest(),
                context=said[0],
                context_ids=[tokenizer.start_id, *tokenizer.encode(said[0])],
                heldout=Heldout(inputs, targets, questions),
                split=split,
                oracle=said[1:],
            )
        )
    longest = max(document.heldout.inputs.shape[1] for document in found)
    require(
        longest <= length,
        f"documents.task=new_facts: a question takes {longest} tokens, and the context of the "
        f"run is model.max_seq_len={length}",
    )
    return found


def _answer(tokenizer: Tokenizer, answer: str) -> Path:
    """Encode an answer with its full stop, so that none is a prefix of another."""
    return tuple(tokenizer.encode(f"{answer}."))


def own_validation(
    base: TrainedRun,
    tokens: int,
    cache_dir: str | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Heldout:
    """Return about ``tokens`` of the base's validation split, to measure what it forgets.

    The windows are evenly spaced.  Raises ConfigError if the base's corpus has changed.
    """
    run = rundir.RunDir(base.path)
    prepared = own_corpus(run, base.config, base.tokenizer, cache_dir, progress)
    data = TokenData(base.config, prepared)
    every = data.eval_batches("val", batch_size=1)
    count = min(len(every), -(-tokens // data.length))
    chosen = [every[int(n)] for n in np.linspace(0, len(every) - 1, count).round()]
    inputs, targets = zip(*chosen, strict=True)
    return Heldout(torch.cat(inputs), torch.cat(targets))
