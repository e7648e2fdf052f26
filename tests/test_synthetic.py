"""The embedded corpus: every story parses back to its choices, and the entropy is exact."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from tests.grammar import Choice, Reader, entropy, entropy_parts, render, smaller
from tinygpt.config import SyntheticData
from tinygpt.data.synthetic import (
    BLOCK,
    OTHERS,
    QUERIES,
    RELATIONS,
    STATEMENTS,
    SYLLABLES,
    WORDS,
    Grammar,
)

SMALL = SyntheticData(n_facts=40, zipf_exponent=1.0, noise_rate=0.2, heldout_entities=3)
# Few enough stories to write them all down.
TINY = smaller(1, 2, names=4, cast=4, adjectives=1, nouns=2, words=2, templates=1)

FIRST_STORY = (  # of SMALL: a change of it is a change of every corpus
    "Once Beth, Fred and Amy met. Which treasure has Ginzil? A small sled. They knew that "
    "Ginzil feeds a thin toad. Now it was Amy who smiled. Renlis owns a tall scarf. Renlis "
    "lives in a pale den. Now it was Fred who laughed. What does Ruszes eat? A short soup. Then"
    " Fred laughed. Now it was Beth who danced. The treasure of Ruszes is a brown axe. What "
    "does Ruszes keep? A clean wolf. In the end Beth laughed and slept."
)


@pytest.fixture(scope="module")
def grammar() -> Grammar:
    return Grammar(SyntheticData())


@pytest.fixture(scope="module")
def small() -> Grammar:
    return Grammar(SMALL)


def take(grammar: Grammar, count: int, start: int = 0) -> list[tuple[str, float]]:
    return list(itertools.islice(grammar.stories(start), count))


def choices(grammar: Grammar, count: int) -> Iterator[Choice]:
    reader = Reader(grammar)
    for text, _ in take(grammar, count):
        yield from reader.parse(text)


# One derivation, and its probability


def test_the_parse_gives_the_nats_of_the_generator(grammar: Grammar) -> None:
    reader = Reader(grammar)
    for text, nats in take(grammar, 2 * BLOCK):
        assert reader.nats(text) == pytest.approx(nats, abs=1e-9)


@settings(max_examples=15, suppress_health_check=list(HealthCheck))
@given(
    config=st.builds(
        SyntheticData,
        corpus_seed=st.integers(0, 2**40),
        n_facts=st.integers(1, 30_000),
        zipf_exponent=st.floats(0, 2),
        noise_rate=st.sampled_from([0.0, 0.01, 0.5, 0.99]),
    ),
    least=st.integers(1, 4),
    extra=st.integers(0, 3),
    cast=st.integers(3, 6),
    words=st.integers(2, 8),
    templates=st.integers(1, 5),
)
def test_any_knobs_give_stories_that_parse(
    config: SyntheticData, least: int, extra: int, cast: int, words: int, templates: int
) -> None:
    made = smaller(least, least + extra, 6, cast, words, words, words, templates)
    grammar = made(config)
    assert entropy(grammar) > 0
    reader = Reader(grammar)
    for text, nats in take(grammar, 60):
        parsed = reader.parse(text)
        assert nats == pytest.approx(-sum(math.log(c.probability) for c in parsed), abs=1e-9)


def test_the_probabilities_of_all_stories_of_a_tiny_grammar_add_up_to_one() -> None:
    config = SyntheticData(n_facts=3, noise_rate=0.3, heldout_entities=0)
    grammar = TINY(config)
    names = WORDS["name"][:4]
    values = {r: [f"red {noun}" for noun in WORDS[r][:2]] for r in RELATIONS}

    def sentences(kind: str, *slots: list[str]) -> list[str]:
        return [render(OTHERS[kind][0], [*fill]) for fill in itertools.product(*slots)]

    deeds, places = WORDS["deed"][:2], WORDS["place"][:2]
    body = sentences("recall", names, deeds) + sentences("intro", places, names)
    body += sentences("filler", WORDS["thing"][:2], WORDS["look"][:2])
    body += [
        render(STATEMENTS[r][0], [grammar.entities[0].name, v])
        for r in RELATIONS
        for v in values[r]
    ]
    openings = [render(OTHERS["opening"][0], [*p]) for p in itertools.permutations(names, 3)]
    total = mean = 0.0
    reader = Reader(grammar)
    for length in (1, 2):
        for middle in itertools.product(body, repeat=length):
            for closing in sentences("closing", names, deeds):
                # The opening's names are exchangeable up to renaming: all six orders of all
                # four choices have one probability in total, so one opening stands for 24.
                story = " ".join([openings[0], *middle, closing])
                try:
                    nats = reader.nats(story)
                except ValueError:
                    continue
                total += len(openings) * math.exp(-nats)
                mean += len(openings) * math.exp(-nats) * nats
    assert total == pytest.approx(1.0, abs=1e-12)
    assert mean == pytest.approx(entropy(grammar), abs=1e-12)


def test_a_story_has_the_probability_that_the_docstring_says() -> None:
    grammar = Grammar(SyntheticData(n_facts=1, noise_rate=0.1))
    name, attributes = grammar.entities[0]
    story = f"Once Anna, Ben and Zoe met. {name} owns a {attributes['tool']}. "
    story += "Then Zoe sang. From the mill came Amy. Then Amy sang. The sun was calm. "
    story += "Now it was Zoe who sang. The sky was calm. Then Anna sang. "
    story += "At last Anna laughed and went home."
    recalls = [(1, 3), (1, 4), (2, 4), (4, 4), (4, 4)]
    p = 1 / 5 * 1 / 2 / 64 / 63 / 62 * (0.6 / 5 * 0.9) * 0.2**4 * 0.1**3
    p *= math.prod((1 / d) / sum(1 / i for i in range(1, k + 1)) for d, k in recalls)
    p *= (1 / 2 / 8) ** 5 * (1 / 2 / 8 / 61) * (1 / 2 / 8 / 4) ** 2
    assert Reader(grammar).nats(story) == pytest.approx(-math.log(p), abs=1e-9)


def test_what_is_not_of_the_grammar_is_refused(small: Grammar) -> None:
    text, _ = take(small, 1)[0]
    opening, *body, closing = re.split(r"(?<=[.!]) ", text)
    cast = [name for name in WORDS["name"] if name in opening]
    stranger = next(name for name in WORDS["name"] if name not in text)
    entity = small.heldout[0]
    bad = [
        "",
        "Once upon a time.",
        text + "\n",
        " " + text,
        text + " ",
        text[:-1],
        text.replace(". ", ".  ", 1),
        text.replace(",", " ,", 1),
        text + " " + closing,
        opening + " " + text,
        " ".join([opening, *body]),
        " ".join([*body, closing]),
        " ".join([opening, closing]),
        " ".join([opening, *body * 3, closing]),
        " ".join([opening, *body[:-1], opening, closing]),
        " ".join([opening, *body[:-1], f"Then {stranger} sang.", closing]),
        " ".join([opening, *body[:-1], f"From the mill came {cast[0]}.", closing]),
        " ".join([opening, *body[:-1], small.statement(entity, "tool"), closing]),
        " ".join([opening, *body[:-1], "Then the mill sang.", closing]),
        text.replace(cast[1], cast[0]),
    ]
    reader = Reader(small)
    for story in bad:
        with pytest.raises(ValueError, match=r"sentence|story|impossible"):
            reader.parse(story)


def test_no_word_has_two_meanings() -> None:
    literal = " ".join(
        text for texts in (OTHERS, STATEMENTS, QUERIES) for kind in texts.values() for text in kind
    )
    words = [word for words in WORDS.values() for word in words]
    words += sorted(set(re.findall(r"[A-Za-z]+", re.sub(r"{\w+}", "", literal))))
    assert len(words) == len(set(words))
    assert all(len(WORDS[c]) == 32 for c in ("adjective", *RELATIONS))
    name = re.compile(f"({'|'.join(SYLLABLES)}){{2,}}")  # of any entity, whatever the seed
    assert not [word for word in words if name.fullmatch(word.lower())]


# Its distributions


@pytest.mark.parametrize(
    ("config", "made"),
    [
        (SyntheticData(), Grammar),
        (SMALL, Grammar),
        (SMALL, smaller(0, 9, names=5, cast=4, adjectives=2, nouns=3, words=3, templates=2)),
        (SyntheticData(n_facts=7, noise_rate=0.9), smaller(3, 3, 3, 3, 4, 4, 2, 1)),
        (SyntheticData(n_facts=1, noise_rate=0.0), smaller(20, 30)),
    ],
)
def test_the_mean_over_stories_is_the_closed_form(
    config: SyntheticData, made: type[Grammar]
) -> None:
    grammar = made(config)
    nats = np.array([nats for _, nats in take(grammar, 20_000)])
    error = nats.std() / math.sqrt(len(nats))
    assert abs(nats.mean() - entropy(grammar)) < 4 * error


def test_each_part_of_the_entropy_is_that_of_its_choices(small: Grammar) -> None:
    parts, reader = entropy_parts(small), Reader(small)
    count = 3000
    rows = []
    for text, _ in take(small, count):
        row = dict.fromkeys(parts, 0.0)
        for choice in reader.parse(text):
            row[choice.kind] -= math.log(choice.probability)
        rows.append([row[kind] for kind in parts])
    found = np.array(rows)
    error = found.std(axis=0) / math.sqrt(count)
    assert np.all(np.abs(found.mean(axis=0) - list(parts.values())) < 4 * error + 1e-9)
    assert set(parts) == {choice.kind for choice in choices(small, 50)}


# A corpus


def test_a_corpus_is_a_function_of_its_seed() -> None:
    def of(seed: int) -> list[tuple[str, float]]:
        return take(Grammar(SyntheticData(corpus_seed=seed)), 100)

    assert of(3) == of(3)
    assert not {text for text, _ in of(3)} & {text for text, _ in of(4)}
    assert Grammar(SyntheticData(corpus_seed=3)).names != Grammar(SyntheticData()).names


def test_the_stories_of_seed_0_never_change(small: Grammar) -> None:
    text, nats = take(small, 1)[0]
    assert text == FIRST_STORY
    assert nats == pytest.approx(95.38984108360776, abs=1e-9)


def test_stories_from_a_number_on_are_those_of_the_sequence(small: Grammar) -> None:
    assert take(small, 5, start=BLOCK - 2) == take(small, BLOCK + 3)[BLOCK - 2 :]


def test_heldout_entities_occur_in_no_story(small: Grammar) -> None:
    words = {word for text, _ in take(small, 5000) for word in re.findall(r"\w+", text)}
    heldout = {entity.name for entity in small.heldout}
    assert len(heldout) == 3
    assert not heldout & words
    assert {entity.name for entity in small.entities} <= words


@pytest.mark.parametrize("n_facts", [1, 4096, 16384, 40_000])
def test_all_entities_have_names_of_their_own(n_facts: int) -> None:
    grammar = Grammar(SyntheticData(n_facts=n_facts))
    everyone = grammar.entities + grammar.heldout
    assert len({entity.name for entity in everyone}) == len(everyone) == -(-n_facts // 4) + 64
    assert all(re.fullmatch("[A-Z][a-z]{5,8}", entity.name) for entity in everyone)


def test_statements_and_queries_of_an_entity(small: Grammar) -> None:
    opening, *body, closing = re.split(r"(?<=[.!]) ", take(small, 1)[0][0])
    for relation in RELATIONS:
        entity = small.entities[0]
        texts = [small.statement(entity, relation, t) for t in range(len(STATEMENTS[relation]))]
        texts += [prompt + answer + "." for prompt, answer in small.queries(entity, relation)]
        assert len(set(texts)) == 5
        for text in texts:  # just as the stories have them
            parsed = Reader(small).parse(" ".join([opening, *body[:-1], text, closing]))
            assert Choice("value", entity.attributes[relation], 0.8) in parsed
    unseen = small.heldout[0]
    assert unseen.name in small.statement(unseen, "dish", 2)
    assert all(a == " " + unseen.attributes["dish"] for _, a in small.queries(unseen, "dish"))


def test_stories_are_one_plain_paragraph_that_fits_a_window(grammar: Grammar) -> None:
    texts = [text for text, _ in take(grammar, 6000)]
    assert all(re.fullmatch(r"[A-Za-z ,.?!]+", text) for text in texts)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)

    lengths = [len(tokenizer.encode(text).ids) + 1 for text in texts]
    assert 85 < np.mean(lengths) < 135
    assert max(lengths) < 200
