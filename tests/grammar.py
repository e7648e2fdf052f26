"""The embedded corpus read back: the derivation of a story, and the entropy in closed form.

It shares the tables of the grammar with what writes the stories, and none of its ways.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from tinygpt.data.synthetic import (
    KINDS,
    OPENING_CAST,
    RELATIONS,
    TEMPLATES,
    WORDS,
    Floats,
    Grammar,
)


def smaller(
    least: int,
    most: int,
    names: int = 64,
    cast: int = 8,
    adjectives: int = 32,
    nouns: int = 32,
    words: int = 8,
    templates: int = 5,
) -> type[Grammar]:
    """A grammar of stories with ``least`` to ``most`` sentences, and less of everything else."""
    limits = {"name": names, "adjective": adjectives, **dict.fromkeys(RELATIONS, nouns)}
    less = {
        "words": {c: found[: limits.get(c, words)] for c, found in WORDS.items()},
        "templates": {kind: texts[:templates] for kind, texts in TEMPLATES.items()},
    }
    return type("Smaller", (Grammar,), {**less, "lengths": range(least, most + 1), "cast": cast})


class Choice(NamedTuple):
    """One choice of a derivation: what was chosen, and its probability given what came before."""

    kind: str
    value: str
    probability: float


class Sentence(NamedTuple):
    """A sentence that was read: its kind, relation (facts only), template and fillers."""

    kind: str
    relation: str
    template: int
    fillers: list[str]


class Reader:
    """The choices that a story of ``grammar`` was made by."""

    def __init__(self, grammar: Grammar) -> None:
        """Raises ValueError where a word has two classes or a signature two templates."""
        self.grammar = grammar
        self._class: dict[str, str] = {}
        entities = self.grammar.names[: self.grammar.n_entities]
        for word_class, words in [*self.grammar.words.items(), ("entity", entities)]:
            for word in words:
                if word in self._class:
                    raise ValueError(f"the word {word!r} has two meanings")
                self._class[word] = word_class
        self._signature: dict[tuple[str, ...], tuple[str, int]] = {}
        for kind, texts in self.grammar.templates.items():
            for index, text in enumerate(texts):
                full = re.sub("{(" + "|".join(RELATIONS) + ")}", r"{adjective} {\1}", text)
                key = tuple(re.findall(r"{\w+}|\w+|[^\w\s]", full))
                if key in self._signature or any(word in self._class for word in key):
                    raise ValueError(f"the template {text!r} is ambiguous")
                self._signature[key] = (kind, index)
        self._entity = {name: i for i, name in enumerate(entities)}
        self._value = {r: {v: i for i, v in enumerate(self.grammar.values[r])} for r in RELATIONS}

    def _read(self, text: str) -> Sentence:
        """One sentence by its signature."""
        words = re.findall(r"\w+|[^\w\s]", text)
        classes = [self._class.get(word, "") for word in words]
        key = tuple("{" + c + "}" if c else w for c, w in zip(classes, words, strict=True))
        if key not in self._signature:
            raise ValueError(f"not a sentence of this grammar: {text!r}")
        name, index = self._signature[key]
        fillers = [word for c, word in zip(classes, words, strict=True) if c]
        if name in RELATIONS:
            fillers = [fillers[0], " ".join(fillers[1:])]
        if render(self.grammar.templates[name][index], fillers) != text:
            raise ValueError(f"not a sentence of this grammar: {text!r}")
        is_fact = name in RELATIONS
        return Sentence("fact" if is_fact else name, name if is_fact else "", index, fillers)

    def parse(self, text: str) -> list[Choice]:
        """The one derivation of a story; ValueError if it has none."""
        sentences = [self._read(part) for part in re.split(r"(?<=[.!]) ", text)]
        kinds = [sentence.kind for sentence in sentences]
        length = len(sentences) - 2
        if length not in self.grammar.lengths:
            raise ValueError(f"a story cannot have {len(sentences)} sentences")
        if kinds[0] != "opening" or kinds[-1] != "closing" or not set(kinds[1:-1]) <= set(KINDS):
            raise ValueError("a story has one opening, its body and one closing sentence")
        choices = [Choice("length", str(length), 1 / len(self.grammar.lengths))]
        cast: list[str] = []
        for sentence in sentences:
            for choice in self._sentence_choices(sentence, cast):
                if choice.probability <= 0:
                    raise ValueError(f"an impossible choice: {choice.kind} {choice.value!r}")
                choices.append(choice)
        return choices

    def _sentence_choices(self, sentence: Sentence, cast: list[str]) -> Iterator[Choice]:
        """The choices of a sentence; ``cast`` grows by the names it introduces."""
        kind = sentence.kind
        if kind in KINDS:
            column = list(KINDS).index(kind)
            yield Choice("kind", kind, float(self.grammar.kind_p[len(cast), column]))
        count = len(self.grammar.templates[sentence.relation or kind])
        yield Choice("template", str(sentence.template), 1 / count)
        if kind == "fact":
            yield from self._fact_choices(sentence)
            return
        for word in sentence.fillers:
            word_class = self._class[word]
            if word_class != "name":
                yield Choice(word_class, word, 1 / len(self.grammar.words[word_class]))
            elif kind in ("opening", "intro"):
                p = 0.0 if word in cast else 1 / (len(self.grammar.words["name"]) - len(cast))
                yield Choice("name", word, p)
                cast.append(word)
            else:
                distance = len(cast) - cast.index(word) if word in cast else 0
                p = float(self.grammar.recall_p[len(cast), distance - 1]) if distance else 0.0
                yield Choice("recall", word, p)

    def _fact_choices(self, sentence: Sentence) -> Iterator[Choice]:
        name, value = sentence.fillers
        entity, relation = self._entity[name], RELATIONS.index(sentence.relation)
        fact = entity * len(RELATIONS) + relation
        p = float(self.grammar.fact_p[fact]) if fact < len(self.grammar.fact_p) else 0.0
        yield Choice("fact", f"{name} {sentence.relation}", p)
        right = self._value[sentence.relation][value] == self.grammar.truth[entity, relation]
        noise = self.grammar.config.noise_rate
        yield Choice("value", value, 1 - noise if right else noise / (self.grammar.n_values - 1))

    def nats(self, text: str) -> float:
        """-ln p of a story, from its derivation alone."""
        return -math.fsum(math.log(choice.probability) for choice in self.parse(text))


def entropy(grammar: Grammar) -> float:
    """Expected nats of a story, end of text included: ln 5 for the length, and for each sentence
    the entropy of its kind, its template and its slots: H(Zipf) + h(noise) + noise·ln 1023 for a
    fact, H(1/d, d ≤ k) for a recalled name, where the size k of the cast is the only state."""
    return math.fsum(entropy_parts(grammar).values())


def entropy_parts(grammar: Grammar) -> dict[str, float]:
    """The entropy by kind of choice, as ``Reader.parse`` names them."""
    body, closing = expected_sentences(grammar)
    fact, recall, filler, intro = body.sum(axis=0).tolist()
    nats = {c: math.log(len(words)) for c, words in grammar.words.items()}
    new_name = np.log(np.maximum(len(grammar.words["name"]) - np.arange(len(closing)), 1))
    counts = {"opening": 1, "closing": 1, "recall": recall, "filler": filler, "intro": intro}
    counts[RELATIONS[0]] = fact  # every relation has as many templates
    noise = grammar.config.noise_rate
    wrong = noise * math.log(grammar.n_values - 1) if noise else 0.0
    return {
        "length": math.log(len(grammar.lengths)),
        "kind": float(body.sum(axis=1) @ entropy_of(grammar.kind_p)),
        "template": sum(n * math.log(len(grammar.templates[kind])) for kind, n in counts.items()),
        "name": float(new_name[:OPENING_CAST].sum() + body[:, 3] @ new_name),
        "place": intro * nats["place"],
        "recall": float((body[:, 1] + closing) @ entropy_of(grammar.recall_p)),
        "deed": (recall + 1) * nats["deed"],
        "thing": filler * nats["thing"],
        "look": filler * nats["look"],
        "fact": fact * float(entropy_of(grammar.fact_p)),
        "value": fact * (float(entropy_of(np.array([noise, 1 - noise]))) + wrong),
    }


def expected_sentences(grammar: Grammar) -> tuple[Floats, Floats]:
    """Body sentences by (cast before, kind), and closings by cast, in a story on average."""
    lengths = grammar.lengths
    cast = np.zeros(grammar.cast + 1)  # the distribution of its size at a position
    cast[OPENING_CAST] = 1.0
    body, closing = np.zeros_like(grammar.kind_p), np.zeros_like(cast)
    for position in range(lengths.stop):
        here = cast[:, None] * grammar.kind_p
        body += here * min(1.0, (lengths[-1] - position) / len(lengths))
        closing += cast * (position >= lengths.start) / len(lengths)
        cast = cast - here[:, 3] + np.roll(here[:, 3], 1)
    return body, closing


def entropy_of(p: Floats) -> Floats:
    """Of the distributions along the last axis."""
    result: Floats = -(p * np.log(np.where(p > 0, p, 1.0))).sum(axis=-1)
    return result


def render(template: str, fillers: list[str]) -> str:
    rest = iter(fillers)
    return re.sub(r"{\w+}", lambda _: next(rest), template)
