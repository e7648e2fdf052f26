"""A short round of fuzzing for every reader; ``make fuzz`` goes on for longer."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from tests.fuzz import rounds
from tests.fuzz.__main__ import harnesses
from tests.fuzz.harness import Harness
from tests.fuzz.mutations import KINDS, mutated

HARNESSES: list[Harness] = harnesses()


@pytest.mark.parametrize("harness", HARNESSES, ids=lambda harness: harness.name)
def test_what_was_trouble_once_is_answered(harness: Harness) -> None:
    """And one input at least is taken, or there would be nothing to damage."""
    taken = [not harness.refuses(data) for data in harness.seeds()]
    assert any(taken)


def short_round(harness: Harness, executions: int) -> None:
    random = Random(harness.name)
    seeds = harness.seeds()
    for _ in range(executions):
        harness.refuses(mutated(random.choice(seeds), random, harness.kind))


@pytest.mark.parametrize("harness", HARNESSES, ids=lambda harness: harness.name)
def test_damage_is_answered_in_a_line(harness: Harness) -> None:
    short_round(harness, 20)


@pytest.mark.slow
@pytest.mark.parametrize("harness", HARNESSES, ids=lambda harness: harness.name)
def test_much_damage_is_answered_in_a_line(harness: Harness) -> None:
    short_round(harness, 200)  # `make fuzz` does more


def test_rounds_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Quiet is what came behind the last finding."""
    monkeypatch.setattr(rounds, "ROUNDS", tmp_path / "rounds.csv")
    for name, findings, quiet in (("a", 0, 60), ("b", 0, 60), ("a", 2, 15), ("a", 0, 60)):
        rounds.record(rounds.Round(name, "now", 60, 1000, 3, findings, quiet, 0.5, 600))
    assert rounds.total("a") == (3000, 3.0, 1.25, 9, 2)
    assert rounds.total("none") == (0, 0.0, 0.0, 0, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_damage_depends_on_the_seed_alone(kind: str) -> None:
    seed = next(one for one in HARNESSES if one.kind == kind).seeds()[0]
    once = [mutated(seed, random, kind) for random in [Random(0)] for _ in range(9)]
    again = [mutated(seed, random, kind) for random in [Random(0)] for _ in range(9)]
    assert once == again
    assert len({seed, *once}) > 5
