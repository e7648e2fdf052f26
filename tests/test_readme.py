"""What the README says to type, section by section, typed; at smoke scale."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.conftest import ROOT, Command

SMOKE = ("train.tokens=20_000", "data.val_fraction=0.25", "hardware.threads=1")


def blocks(section: str, language: str) -> list[str]:
    """The fenced blocks of a section."""
    text = (ROOT / "README.md").read_text()
    body = re.split(r"^## ", text.split(f"## {section}\n", 1)[1], maxsplit=1, flags=re.M)[0]
    return re.findall(rf"^```{language}\n(.*?)^```", body, re.S | re.M)


def commands(section: str) -> list[list[str]]:
    """The words behind ``python -m tinygpt.`` of each line."""
    lines = "".join(blocks(section, "sh")).splitlines()
    return [shlex.split(line, comments=True)[2:] for line in lines if "tinygpt" in line]


@pytest.fixture
def folder(tmp_path: Path, corpus: Path) -> Path:
    """Where the README's texts are: a file, and folders of books and of stories."""
    for place in (tmp_path / "stories.txt", tmp_path / "books/a.txt", tmp_path / "stories/a.txt"):
        place.parent.mkdir(exist_ok=True)
        place.write_text(corpus.read_text())
    return tmp_path


def type_in(tinygpt: Command, words: list[str], *more: str) -> str:
    """Raises AssertionError where a command fails; what it prints."""
    done = tinygpt(words[0].removeprefix("tinygpt."), *words[1:], *more)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
    return done.stdout


@pytest.mark.slow
def test_using_what_was_trained(
    tinygpt: Command, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed = commands("Using what was trained")
    assert len(typed) == 6
    for words in typed:
        horizon = any(word.startswith("train.tokens=") for word in words)
        type_in(tinygpt, words, *(SMOKE[horizon:] if words[0] == "tinygpt.run" else ()))
    files = {path.name for path in (folder / "outputs/runs/stories/evaluation").iterdir()}
    assert {"evaluation_results.csv", "loss_by_position.png"} <= files
    (program,) = blocks("Using what was trained", "python")
    monkeypatch.chdir(folder)
    exec(program, {})


ADAPT = (
    *("documents.train=1", "documents.tune=1", "documents.test=2", "documents.context_tokens=40"),
    *("documents.heldout_tokens=300", "documents.forgetting_tokens=300", "inner.inner_steps=[1,3]"),
    *("tuning.learning_rates=[3e-3]", "tuning.directives=1", "outer.iterations=1"),
    *("outer.samples=1", "outer.steps=2", "policy.max_edit_tokens=8", "hardware.threads=1"),
)


@pytest.mark.slow
def test_adapting_to_new_text(tinygpt: Command, folder: Path, corpus: Path) -> None:
    stories = "run model=small data=custom data.path=stories.txt tokenizer.vocab_size=600"
    type_in(tinygpt, [*stories.split(), "run_name=stories"], *SMOKE)
    for number in range(5):
        text = corpus.read_text().replace("<|endoftext|>", "").replace("birds", f"birds{number}")
        (folder / "books" / f"{number}.txt").write_text(text)
    typed = commands("Adapting to new text")
    assert len(typed) == 6
    for words in typed:
        words = [word.replace("-laptop", "-smoke") for word in words]
        more = {"tinygpt.run": SMOKE, "tinygpt.adapt": ADAPT}.get(words[0], ())
        more = ("scale=smoke", *ADAPT) if "experiment=adaptation" in words else more
        said = type_in(tinygpt, words, *more)
    assert "self-editing" in said.lower()
    assert (folder / "outputs/adaptation-smoke/fit/adaptation_laws.png").exists()


@pytest.mark.slow
def test_sweeps_and_their_laws(tinygpt: Command, folder: Path) -> None:
    typed = commands("Sweeps") + commands("From runs to a law")
    assert len(typed) == 5
    for words in typed:
        words = [word.replace("-laptop", "-smoke") for word in words]
        smoke = words[0] == "tinygpt.run" and "scale=smoke" not in words
        type_in(tinygpt, words, *(["scale=smoke"] if smoke else []))
    assert (folder / "outputs/width-smoke/sweep_summary.csv").exists()
    assert (folder / "outputs/grid-smoke/fit/report.html").exists()


@pytest.mark.slow
def test_your_own_text(tinygpt: Command, folder: Path) -> None:
    (words,) = commands("Your own text")
    assert "val loss" in type_in(tinygpt, words, *SMOKE)
