"""Generate the embedded corpus: tiny stories from a seeded grammar with a known entropy.

The grammar
-----------
Every choice has a stated probability; names in angle brackets are drawn:

    story    = opening, n body sentences, closing         n uniform on 8..12
    opening  = Once <name> , <name> and <name> met ...    names uniform, none twice
    body     = fact 60 % | recall 20 % | filler 10 % | intro 10 % (none once the cast is full)
    fact     = <entity> owns a <adjective tool> ...       three statements, two questions a relation
    recall   = Then <name> <deed>                         a name that was introduced in this story
    filler   = The <thing> was <look>                     uniform
    intro    = From the <place> came <name>               uniform among the names not yet used
    closing  = At last <name> <deed> and went home        recalled like the above; the story is over

*Facts.*  Fact r of ``n_facts`` is stated with probability proportional to r^-``zipf_exponent``,
a long tail that larger models and more data learn more of.  It is relation (r-1) mod 4 of an
invented entity.  Its true attribute, one of 32·32 pairs of adjective and noun, depends on
``corpus_seed``.  A statement is wrong with probability ``noise_rate`` and then shows one of the
other 1023, uniformly.

*Recall.*  The d-th last name introduced has probability proportional to 1/d.  That costs about 1.1
nats for a model that sees the story's beginning and ln 64 = 4.2 for one that does not.

Every story has exactly one derivation, because word classes, templates and names in a cast are
distinct.  Hence its information content is the sum of -ln p over its choices, including its length
and closing sentence, and the mean over stories is the irreducible loss.  ``tests/grammar.py``
parses stories and computes that mean.

Literature: Hutter 2021 (Learning curve theory) gets power laws in D from Zipf-distributed items
to be memorised; Michaud et al. 2023 (The quantization model of neural scaling) in N as well, from
skills learned in the order of their use; Cagnetta et al. 2024 (How deep neural networks learn
compositional data: the random hierarchy model) control a learning task by a generative grammar.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tinygpt.config import SyntheticData

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

LEXICON = """
name: Anna Amy Alice Ben Beth Bob Clara Carl Cora Daisy Dan Dora Ella Emma Erik Eva Finn Flora Fred
    Grace Greta Hanna Henry Hugo Ida Ivan Iris Jack Jane John Jonas Julia Karl Kate Kim Lily Leo
    Lucy Mark Mary Max Mia Mira Nick Nina Nora Olga Oscar Owen Paul Peter Polly Rosa Ruth Sam Sara
    Simon Sophie Tom Tess Theo Vera Will Zoe
place: mill well bridge forest market harbour meadow castle
deed: laughed sang danced smiled waved rested cried whistled
thing: sun wind river sky moon grass snow night
look: bright calm quiet strange
adjective: red blue green black white brown pink golden silver big small tall round flat long short
    thin thick soft hard new rare fine plain pretty funny sweet clean dark pale dry magic
tool: lamp drum rope bell knife cup pot pan axe net ring coin book pen map key flute harp clock
    chest boat cart sled spade fork spoon hat coat boot scarf kite doll
beast: dog cat cow goat sheep pig horse hen duck goose fox wolf bear deer hare mouse rat frog toad
    snake fish crab seal whale bird crow swan lark mole bee moth bat
dish: pie cake bread soup stew roast bun tart jam plum pear fig bean pea corn nut rice cheese tea
    milk cream wine leek root leaf herb seed grain broth mash roll date
house: hut cabin barn tower tent cave cottage hall palace shed loft villa farm inn lodge fort temple
    chapel cellar nest den burrow wagon ship raft stable kitchen attic room yard tree stone
"""
WORDS = {head: words.split() for head, words in re.findall(r"(\w+):((?:\s+\w+\b(?!:))+)", LEXICON)}
RELATIONS = ("tool", "beast", "dish", "house")  # an entity has one attribute of each
STATEMENTS: dict[str, tuple[str, ...]] = {
    "tool": (
        "{entity} owns a {tool}.",
        "The treasure of {entity} is a {tool}.",
        "They knew that {entity} has a {tool}.",
    ),
    "beast": (
        "{entity} keeps a {beast}.",
        "The friend of {entity} is a {beast}.",
        "They knew that {entity} feeds a {beast}.",
    ),
    "dish": (
        "{entity} eats a {dish}.",
        "The supper of {entity} is a {dish}.",
        "They knew that {entity} cooks a {dish}.",
    ),
    "house": (
        "{entity} lives in a {house}.",
        "The home of {entity} is a {house}.",
        "They knew that {entity} sleeps in a {house}.",
    ),
}
QUERIES: dict[str, tuple[str, ...]] = {  # the attribute comes last, so that a prompt can ask for it
    "tool": ("What does {entity} own? A {tool}.", "Which treasure has {entity}? A {tool}."),
    "beast": ("What does {entity} keep? A {beast}.", "Which friend has {entity}? A {beast}."),
    "dish": ("What does {entity} eat? A {dish}.", "Which supper has {entity}? A {dish}."),
    "house": ("Where does {entity} live? In a {house}.", "Which home has {entity}? A {house}."),
}
OTHERS: dict[str, tuple[str, ...]] = {  # templates of a kind have the same slots in order
    "opening": (
        "Once {name}, {name} and {name} met.",
        "One day {name} went out with {name} and {name}.",
    ),
    "recall": ("Then {name} {deed}.", "Now it was {name} who {deed}."),
    "filler": ("The {thing} was {look}.", "How the {thing} looked so {look}!"),
    "intro": ("From the {place} came {name}.", "Near the {place} they saw {name}."),
    "closing": ("At last {name} {deed} and went home.", "In the end {name} {deed} and slept."),
}
TEMPLATES = {**OTHERS, **{r: STATEMENTS[r] + QUERIES[r] for r in RELATIONS}}
KINDS = {"fact": 0.6, "recall": 0.2, "filler": 0.1, "intro": 0.1}  # intro must be last
OPENING_CAST = 3
RECALL_EXPONENT = 1.0
SYLLABLES = [  # "ger" and "per" would make words: Ginger, Temper
    c + v + "mkslrn"[(i + j) % 6]
    for (i, c), (j, v) in product(enumerate("bdfgjklmnprtvz"), enumerate("aeiou"))
    if c + v not in ("ge", "pe")
]
BLOCK = 1024  # stories drawn from one random stream
MAX_SLOTS = 3


class Entity(NamedTuple):
    """Hold an invented being and its true attributes, by relation."""

    name: str
    attributes: dict[str, str]


class Grammar:
    """Generate the facts and stories that ``config`` determines."""

    words = WORDS  # tests reduce these four
    templates = TEMPLATES
    lengths = range(8, 13)  # sentences of the body
    cast = 8  # names in one story, at most

    def __init__(self, config: SyntheticData) -> None:
        self.config = config
        self.values = {
            r: [" ".join(pair) for pair in product(self.words["adjective"], self.words[r])]
            for r in RELATIONS
        }
        self.n_values = len(self.values["tool"])
        weights = np.arange(1, config.n_facts + 1, dtype=np.float64) ** -config.zipf_exponent
        self.fact_p: Floats = weights / weights.sum()
        kinds = np.tile(list(KINDS.values()), (self.cast + 1, 1))
        kinds[self.cast, -1] = 0.0
        # probabilities of sentence kinds and of recall distances, for a cast of size k
        self.kind_p: Floats = kinds / kinds.sum(axis=1, keepdims=True)  # (k, kind)
        distance = np.arange(1, self.cast + 1, dtype=np.float64) ** -RECALL_EXPONENT
        recall = np.tril(np.ones((self.cast + 1, self.cast)), -1) * distance
        self.recall_p: Floats = recall / np.maximum(recall.sum(axis=1, keepdims=True), 1e-300)
        self._make_table()
        self._make_pieces()

    def _rng(self, *key: int) -> np.random.Generator:
        # only uniform doubles are drawn, whose stream is the same in all numpy versions
        seeds = np.random.SeedSequence((self.config.corpus_seed, *key))
        return np.random.Generator(np.random.Philox(seeds))

    def _make_table(self) -> None:
        """Draw the names and true attributes of all entities, the held-out ones last."""
        self.n_entities = -(-self.config.n_facts // len(RELATIONS))
        total = self.n_entities + self.config.heldout_entities
        syllables = 2
        while len(SYLLABLES) ** syllables < total:
            syllables += 1
        rng = self._rng(0)
        order = np.argsort(rng.random(len(SYLLABLES) ** syllables), kind="stable")[:total]
        digits = np.stack(np.unravel_index(order, (len(SYLLABLES),) * syllables), axis=1)
        self.names = ["".join(SYLLABLES[i] for i in row).capitalize() for row in digits.tolist()]
        self.truth: Ints = np.floor(rng.random((total, len(RELATIONS))) * self.n_values).astype(int)

    def _make_pieces(self) -> None:
        """Number all strings that stories are joined from."""
        pieces = [""]
        self._base: dict[str, int] = {}
        slots = {c: words for c, words in self.words.items() if c not in RELATIONS}
        for word_class, words in {**slots, **self.values, "entity": self.names}.items():
            self._base[word_class] = len(pieces)
            pieces += words
        self._literals: dict[str, Ints] = {}  # (template, MAX_SLOTS + 1)
        for kind, texts in self.templates.items():
            literals = np.zeros((len(texts), MAX_SLOTS + 1), dtype=np.int64)
            for index, text in enumerate(texts):
                space = "" if kind == "opening" else " "
                for column, literal in enumerate(re.split(r"{\w+}", space + text)):
                    literals[index, column] = len(pieces)
                    pieces.append(literal)
            self._literals[kind] = literals
        self._pieces = np.array(pieces, dtype=object)

    def stories(self, start: int = 0) -> Iterator[tuple[str, float]]:
        """Yield stories from number ``start`` on, without end, each with its -ln p in nats."""
        first, skip = divmod(start, BLOCK)
        blocks = (zip(*self._block(block), strict=True) for block in itertools.count(first))
        return itertools.islice(itertools.chain.from_iterable(blocks), skip, None)

    def _block(self, block: int) -> tuple[list[str], list[float]]:
        """Return the texts and nats of the stories of a block."""
        rng, lengths = self._rng(1, block), self.lengths
        positions = lengths[-1] + 2
        length = lengths[0] + (rng.random(BLOCK) * len(lengths)).astype(int)
        kinds, casts, nats = self._draw_kinds(rng, length)
        order = np.argsort(rng.random((BLOCK, len(self.words["name"]))), axis=1, kind="stable")
        draw = _Draw(
            u=rng.random((BLOCK, positions, 4)).reshape(-1, 4),
            casts=casts.ravel(),
            names=np.repeat(order[:, : self.cast], positions, axis=0),
            ids=np.zeros((BLOCK * positions, 2 * MAX_SLOTS + 1), dtype=np.int64),
            nats=nats.ravel(),
        )
        flat = kinds.ravel()
        self._write_facts(draw, np.flatnonzero(flat == 0))
        for index, kind in enumerate((*KINDS, "opening", "closing")):
            if kind != "fact":
                self._write(draw, np.flatnonzero(flat == index), kind)
        rows = self._pieces[draw.ids.reshape(BLOCK, -1)].tolist()
        total = draw.nats.reshape(BLOCK, -1).sum(axis=1) + math.log(len(lengths))
        return ["".join(row) for row in rows], total.tolist()

    def _draw_kinds(self, rng: np.random.Generator, length: Ints) -> tuple[Ints, Ints, Floats]:
        """Draw the kind of each sentence (4 opening, 5 closing, -1 none); also return the size of
        the cast before it and -ln p."""
        positions = self.lengths[-1] + 2
        kinds = np.full((BLOCK, positions), -1)
        casts = np.zeros((BLOCK, positions), dtype=np.int64)
        nats = np.zeros((BLOCK, positions))
        kinds[:, 0] = len(KINDS)
        cumulative = np.cumsum(self.kind_p, axis=1)[:, :-1]
        cumulative[self.cast, -1] = 1.0  # 0.999.. would add a name to a full cast
        cost = -_log(self.kind_p)
        cast = np.full(BLOCK, OPENING_CAST)
        for position in range(1, positions):
            kind = (rng.random(BLOCK)[:, None] >= cumulative[cast]).sum(axis=1)
            casts[:, position] = cast
            kinds[:, position] = np.where(position <= length, kind, -1)
            nats[:, position] = np.where(position <= length, cost[cast, kind], 0.0)
            cast = cast + (kinds[:, position] == len(KINDS) - 1)
        kinds[np.arange(BLOCK), length + 1] = len(KINDS) + 1
        return kinds, casts, nats

    def _write_facts(self, draw: _Draw, rows: Ints) -> None:
        u, noise, count = draw.u[rows], self.config.noise_rate, self.n_values
        cumulative = np.cumsum(self.fact_p)
        fact = np.searchsorted(cumulative / cumulative[-1], u[:, 1], side="right")
        entity, relation = np.divmod(fact, len(RELATIONS))
        wrong = u[:, 3] < noise
        shift = wrong * (1 + (u[:, 2] * (count - 1)).astype(int))
        value = (self.truth[entity, relation] + shift) % count
        log_value = np.where(wrong, _log(noise / (count - 1)), _log(1 - noise))
        draw.nats[rows] -= _log(self.fact_p)[fact] + log_value
        for index, name in enumerate(RELATIONS):
            mine = relation == index
            slots = [self._base["entity"] + entity[mine], self._base[name] + value[mine]]
            self._put(draw, rows[mine], name, slots)

    def _write(self, draw: _Draw, rows: Ints, kind: str) -> None:
        u, cast, names = draw.u[rows], draw.casts[rows], draw.names[rows]
        slots = []
        for index, slot in enumerate(re.findall(r"{(\w+)}", self.templates[kind][0])):
            words = len(self.words[slot])
            if slot != "name":
                chosen = (u[:, 1 + index] * words).astype(int)
                draw.nats[rows] += math.log(words)
            elif kind in ("opening", "intro"):
                place = cast + (index if kind == "opening" else 0)
                chosen = names[np.arange(len(rows)), place]
                draw.nats[rows] += np.log(words - place)
            else:
                cumulative = np.cumsum(self.recall_p, axis=1)[cast, :-1]
                back = (u[:, 1 + index, None] >= cumulative).sum(axis=1)
                back = np.minimum(back, cast - 1)  # if the last sum is 0.999..
                chosen = names[np.arange(len(rows)), cast - 1 - back]
                draw.nats[rows] -= _log(self.recall_p)[cast, back]
            slots.append(self._base[slot] + chosen)
        self._put(draw, rows, kind, slots)

    def _put(self, draw: _Draw, rows: Ints, kind: str, slots: list[Ints]) -> None:
        """Draw a template for each row and fill in the slots."""
        literals = self._literals[kind]
        draw.ids[rows, 0::2] = literals[(draw.u[rows, 0] * len(literals)).astype(int)]
        for index, slot in enumerate(slots):
            draw.ids[rows, 2 * index + 1] = slot
        draw.nats[rows] += math.log(len(literals))

    @cached_property
    def entities(self) -> list[Entity]:
        """Return the entities of the stories, the most frequent first."""
        return [self._attributes(i) for i in range(self.n_entities)]

    @cached_property
    def heldout(self) -> list[Entity]:
        """Return the entities that no story mentions."""
        return [self._attributes(i) for i in range(self.n_entities, len(self.names))]

    def _attributes(self, index: int) -> Entity:
        row = self.truth[index].tolist()
        return Entity(
            self.names[index], {r: self.values[r][v] for r, v in zip(RELATIONS, row, strict=True)}
        )

    @property
    def opening(self) -> str:
        """Return the opening of a story, as the context of a fact or a question."""
        return _render(self.templates["opening"][0], self.words["name"])

    def statement(self, entity: Entity, attribute: str, template: int = 0) -> str:
        """Return the true statement from template ``STATEMENTS[attribute][template]``."""
        text = STATEMENTS[attribute][template]
        return _render(text, [entity.name, entity.attributes[attribute]])

    def queries(self, entity: Entity, attribute: str) -> list[tuple[str, str]]:
        """Return (prompt, answer) for each template of ``QUERIES``; answers begin with a space."""
        prompts = [text.split(" {" + attribute)[0] for text in QUERIES[attribute]]
        answer = " " + entity.attributes[attribute]
        return [(prompt.replace("{entity}", entity.name), answer) for prompt in prompts]


@dataclass
class _Draw:
    """Hold a block while it is written, one sentence per row."""

    u: Floats  # (rows, 4): template, two slots, noise
    casts: Ints  # (rows,): names introduced before
    names: Ints  # (rows, cast): in the order in which they are introduced
    ids: Ints  # (rows, pieces): strings to join
    nats: Floats  # (rows,)


def _render(template: str, fillers: list[str]) -> str:
    rest = iter(fillers)
    return re.sub(r"{\w+}", lambda _: next(rest), template)


def _log(p: Floats | float) -> Floats:
    with np.errstate(divide="ignore"):
        return np.log(np.asarray(p, dtype=np.float64))
