"""What the tests share: real text if there is any, a small corpus, commands as users run them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
REAL_DATA = ROOT.parent / "shared" / "data"

Command = Callable[..., "subprocess.CompletedProcess[str]"]


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
def tinygpt(tmp_path: Path, cache: Path) -> Command:
    """Runs ``python -m tinygpt.<command>`` in a fresh folder; stdout and stderr come apart."""

    def run(
        command: str, *arguments: str, cwd: Path | None = None, **env: str
    ) -> subprocess.CompletedProcess[str]:
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
        "hardware.accelerator=cpu",
        "hardware.threads=1",
        *more,
    ]
