"""What the tests share: real text if there is any, a small corpus, commands as users run them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import settings

from tests import warm

ROOT = Path(__file__).resolve().parent.parent
REAL_DATA = ROOT.parent / "shared" / "data"
OPTIMIZERS = sorted(path.stem for path in (ROOT / "conf/optim").glob("*.yaml"))

# Without fork (on Windows) nothing can be killed half way, and commands start cold.
collect_ignore_glob = [] if hasattr(os, "fork") else ["f*/*", "test_resume.py", "test_signals.py"]

settings.register_profile("tinygpt", deadline=None)  # machines are busy at times
settings.load_profile("tinygpt")

Command = Callable[..., "subprocess.CompletedProcess[str]"]
Starts = Callable[..., warm.Process]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Small tensors are no faster on two threads, and results are compared bit for bit."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One data cache for the whole session, as a user has."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of 400 short documents that differ, written out once."""
    path = tmp_path_factory.mktemp("corpus") / "stories.txt"
    animals = ("cat", "dog", "hen", "fox", "cow")
    places = ("barn", "wood", "hill", "town")
    stories = [
        f"Story {n}. The {animals[n % 5]} went to the {places[n % 4]} and saw {n * n} birds there. "
        f"Then it came home, ate {n % 7} plums and slept until the {animals[n % 3]} woke it."
        for n in range(400)
    ]
    path.write_text("\n<|endoftext|>\n".join(stories))
    return path


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real text; tests that need it are skipped where it is absent."""
    if not REAL_DATA.is_dir():
        pytest.skip("no real text beside the project")
    return REAL_DATA


@pytest.fixture
def start(tmp_path: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Starts:
    """Starts ``tinygpt.<command>`` in a fresh folder, from a parent that is warm."""

    def start(
        command: str, *words: str, cwd: Path | None = None, within: warm.Within | None = None
    ) -> warm.Process:
        if not hasattr(os, "fork"):
            pytest.skip("sends signals to a forked command")
        said = tmp_path_factory.mktemp("said") / command
        env = {"TINYGPT_CACHE": str(cache)}
        return warm.Process(command, words, cwd or tmp_path, said, env, within)

    return start


@pytest.fixture
def tinygpt(tmp_path: Path, cache: Path, start: Starts) -> Command:
    """Runs ``python -m tinygpt.<command>`` in a fresh folder; stdout and stderr come apart.

    It begins cold where the environment is another, and where Lightning starts it again.
    """

    def run(
        command: str, *arguments: str, cwd: Path | None = None, **env: str
    ) -> subprocess.CompletedProcess[str]:
        is_ddp = any(word.startswith("hardware.devices=") for word in arguments)
        if hasattr(os, "fork") and not env and not is_ddp and warm.is_as_at_start():
            return start(command, *arguments, cwd=cwd).completed()
        return subprocess.run(
            [sys.executable, "-m", f"tinygpt.{command}", *arguments],
            cwd=cwd or tmp_path,
            env={**os.environ, "TINYGPT_CACHE": str(cache), "OMP_NUM_THREADS": "1", **env},
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )

    return run


class Layout(NamedTuple):
    """How a shipped corpus lies on the hub: files by split, the column of the text, others."""

    repo: str
    files: dict[str, list[str]]
    column: str = "text"
    others: tuple[str, ...] = ()
    readme: str = ""


TRAIN = {"train": ["data/train-00000-of-00001.parquet"]}
TRAIN_TEST = {**TRAIN, "test": ["data/test-00000-of-00001.parquet"]}
SAMPLE = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/*/*
- config_name: sample-10BT
  data_files:
  - split: train
    path: sample/10BT/*
---
"""
LAYOUTS = {
    "tinystories": Layout(
        "roneneldan/TinyStories",
        {**TRAIN, "validation": ["data/validation-00000-of-00001.parquet"]},
    ),
    "ag_news": Layout("fancyzhx/ag_news", TRAIN_TEST, others=("label",)),
    "cnn_articles": Layout("AyoubChLin/CNN_News_Articles_2011-2022", TRAIN_TEST, others=("label",)),
    "openwebtext": Layout(
        "vietgpt/openwebtext_en",
        {"train": [f"data/train-0000{n}-of-00003.parquet" for n in range(3)]},
    ),
    "wikipedia": Layout(
        "lucadiliello/english_wikipedia",
        {"train": [f"data/train-0000{n}-of-00002.parquet" for n in range(2)]},
        "maintext",
        ("filename", "source_domain", "title", "url"),
    ),
    "gutenberg": Layout("Navanjana/Gutenberg_books", TRAIN, "paragraph", ("book_name",)),
    "enron": Layout("snoop2head/enron_aeslc_emails", TRAIN),
    "transweb_edu": Layout(
        "britllm/TransWeb-Edu-English",
        {"train": [f"data/train-0000{n}-of-00002.jsonl" for n in range(2)]},
        others=("id", "url"),
    ),
    "fineweb_edu": Layout(
        "HuggingFaceFW/fineweb-edu",
        {"train": ["sample/10BT/000_00000.parquet", "sample/10BT/001_00000.parquet"]},
        others=("id", "dump", "url"),
        readme=SAMPLE,
    ),
}


def lay_out(folder: Path, layout: Layout, texts: dict[str, list[str]]) -> Path:
    """Writes ``texts``, by split, into ``folder`` as the hub has it; returns the repository."""
    repo = folder / layout.repo
    for split, names in layout.files.items():
        size = -(-len(texts[split]) // len(names))
        for n, name in enumerate(names):
            rows = [
                {**{other: f"{other} " * 50 for other in layout.others}, layout.column: text}
                for text in texts[split][n * size : (n + 1) * size]
            ]
            write_rows(repo / name, rows)
    if layout.readme:
        write_rows(
            repo / "data" / "CC-MAIN-2013-20" / "train-00000-of-00001.parquet", [{"text": "?"}]
        )
        (repo / "README.md").write_text(layout.readme)
    return repo


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def tiny(corpus: Path, *more: str) -> list[str]:
    """Arguments of a run that takes a second: a minute model on the small corpus."""
    return [
        "data=custom",
        f"data.path={corpus}",
        "data.val_fraction=0.1",
        "data.test_fraction=0.1",
        "tokenizer=byte",
        "model.d_model=16",
        "model.n_heads=2",
        "model.n_layers=1",
        "model.max_seq_len=32",
        "train.batch_tokens=256",
        "train.steps=12",
        "train.sample_tokens=20",
        "train.eval_share=null",  # every evaluation scores all, so that losses compare
        "hardware.accelerator=cpu",
        "hardware.threads=1",
        *more,
    ]
