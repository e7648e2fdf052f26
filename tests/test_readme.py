"""What README.md and docs/ say to type, page by page, typed; at smoke scale."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.conftest import ROOT, Command

# Whose commands are typed here, and whose elsewhere.
PAGES = ["README.md", *(f"docs/{page}.md" for page in ("adaptation", "data", "laws", "models"))]
PAGES += [f"docs/{page}.md" for page in ("cheatsheet", "how-much-text", "questions", "runs")]
PAGES += ["docs/start.md", "docs/sweeps.md"]
ELSEWHERE = {"docs/extending.md": "test_extending.py", "docs/machines.md": "test_machines.py"}
NOT_OURS = (
    "git clone ",
    "make ",
    ". .venv",
    "python -m venv",
    "pip install",
    "python -m pytest",
    "tensorboard ",
)

EVALUATED = "data.eval_tokens=4_000"
SMOKE = ("train.tokens=6_000", "data.val_fraction=0.25", "hardware.threads=1", EVALUATED)
BENCHMARK = ("model=tiny", "steps=1", "seconds=0.01", "hardware.threads=1")
ADAPT = (
    *("documents.train=1", "documents.tune=1", "documents.test=1", "documents.context_tokens=40"),
    *("documents.heldout_tokens=300", "documents.forgetting_tokens=300", "inner.inner_steps=[2]"),
    *("tuning.learning_rates=[3e-3]", "outer.iterations=1", "seed=1"),
    *("outer.samples=1", "outer.steps=2", "policy.max_edit_tokens=8", "hardware.threads=1"),
)
SMALL = {"tinygpt.run": SMOKE, "tinygpt.adapt": ADAPT, "tinygpt.benchmark": BENCHMARK}
SMALL["tinygpt.law"] = ("plan=true", "hardware.threads=1")


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of a page."""
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(), re.S | re.M)


def commands(page: str) -> list[list[str]]:
    """The words behind ``python -m tinygpt.`` of each line; raises AssertionError at any other."""
    lines = "".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    ours = [line for line in lines if line.strip() and not line.startswith(NOT_OURS)]
    for line in ours:
        assert line.startswith("python -m tinygpt."), line
    return [shlex.split(line, comments=True)[2:] for line in ours]


def at_smoke_scale(words: list[str]) -> list[str]:
    words = [word.replace("-laptop", "-smoke") for word in words]
    words = [word for word in words if not word.startswith(("train.tokens=", "train.epochs="))]
    if any(word.startswith("experiment=") for word in words):
        words += [] if "scale=smoke" in words else ["scale=smoke"]
        return [*words, *(ADAPT if words[0] == "tinygpt.adapt" else (EVALUATED,))]
    return [*words, *(word for word in SMALL.get(words[0], ()) if word not in words)]


@pytest.fixture
def folder(tmp_path: Path, corpus: Path) -> Path:
    """Where the texts are that the pages name: files, and folders of books and of stories."""
    text = "\n<|endoftext|>\n".join(corpus.read_text().replace("birds", f"b{i}") for i in range(3))
    for place in ("book.txt", "stories.txt", "stories/a.txt"):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).write_text(text)
    (tmp_path / "books").mkdir()
    for number in range(5):
        text = corpus.read_text().replace("<|endoftext|>", "").replace("birds", f"birds{number}")
        (tmp_path / "books" / f"{number}.txt").write_text(text)
    return tmp_path


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # Lightning's own are for its users
@pytest.mark.parametrize("page", PAGES)
def test_a_page(page: str, tinygpt: Command, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = ["model.d_model=32"] if page == "docs/adaptation.md" else []
    if page == "docs/adaptation.md":  # it goes on with a run of docs/models.md
        stories = "run model=small data=custom data.path=stories.txt tokenizer.vocab_size=600"
        assert tinygpt(*stories.split(), "run_name=stories", *narrow, *SMOKE).returncode == 0
    typed = commands(page)
    assert typed or blocks(page, "python")
    for words in typed:
        words = at_smoke_scale(words)
        words += narrow if words[0] == "tinygpt.run" else []
        done = tinygpt(words[0].removeprefix("tinygpt."), *words[1:])
        assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
    monkeypatch.chdir(folder)
    for program in blocks(page, "python"):
        exec(program.replace("-laptop", "-smoke"), {})


def test_every_page_is_typed() -> None:
    pages = {str(page.relative_to(ROOT)) for page in (ROOT / "docs").glob("*.md")} | {"README.md"}
    silent = {page for page in pages if not blocks(page, "sh")}
    assert pages - silent == {*PAGES, *ELSEWHERE}
    for page, test in ELSEWHERE.items():
        assert Path(page).name in (ROOT / "tests" / test).read_text()


def test_links_lead_somewhere() -> None:
    for page in [
        ROOT / "README.md",
        *(ROOT / "docs").glob("*.md"),
        *ROOT.glob("experiments/**/*.md"),
    ]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
