"""docs/extending.md is followed: its diffs taken, its commands typed, its error lines read."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

PAGE = ROOT / "docs" / "extending.md"
COPIED = ("tinygpt", "conf", "hydra_plugins")
SMOKE = ("train.tokens=20_000", "data.max_tokens=100_000", "data.eval_tokens=10_000")
SAID = {  # at the end of its commands, by section
    "A corpus": "of sums in",
    "A model option": "status     finished",
    "An optimizer": "3 runs: 3 finished",
    "A law": "L = 1.187 + 28.10 / (x + 1.729e6)^0.2764",
}


def section(page: Path, title: str) -> str:
    text = page.read_text().split(f"\n## {title}\n", 1)[1]
    return re.split(r"^## ", text, maxsplit=1, flags=re.M)[0]


def fenced(text: str, language: str) -> str:
    """The fenced blocks of one language, joined."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```\n", text, re.S | re.M)
    return "".join(block for kind, block in blocks if kind == language)


def take(diff: str, folder: Path) -> None:
    done = subprocess.run(
        ["git", "apply", "-"], cwd=folder, input=diff, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def copy(folder: Path) -> Path:
    for name in COPIED:
        place, to = ROOT / name, folder / name
        if place.is_dir():
            shutil.copytree(place, to, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(place, to)
    return folder


def test_the_diffs_can_be_taken_together_and_alone(tmp_path: Path) -> None:
    together = copy(tmp_path / "together")
    for title in SAID:
        diff = fenced(section(PAGE, title), "diff")
        take(diff, copy(tmp_path / title))
        take(diff, together)
    assert set(re.findall(r"^## (.*)", PAGE.read_text(), re.M)) == set(SAID)


@pytest.mark.slow
@pytest.mark.parametrize("title", SAID)
def test_a_section_does_what_it_says(title: str, tmp_path: Path, cache: Path) -> None:
    text, folder = section(PAGE, title), copy(tmp_path / "copy")
    take(fenced(text, "diff"), folder)
    env = {**os.environ, "PYTHONPATH": str(folder), "TINYGPT_CACHE": str(cache)}
    env["OMP_NUM_THREADS"] = "1"

    def typed(*words: str) -> subprocess.CompletedProcess[str]:
        program = [sys.executable, *words]
        return subprocess.run(
            program, cwd=folder, env=env, capture_output=True, text=True, check=False
        )

    said, refused = "", ""
    program = fenced(text, "python")
    assert typed("-c", program).returncode == 0
    for line in fenced(text, "sh").splitlines():
        words = shlex.split(line)[1:]
        done = typed(*words, *(SMOKE if words[1] == "tinygpt.run" else ()))
        assert done.returncode in (0, 2), f"{line}: {done.stdout}{done.stderr}"
        if done.returncode == 2:
            refused += done.stderr
        else:
            said += done.stdout
    assert SAID[title] in said
    assert refused == "".join(re.findall(r"^error: .*\n", fenced(text, ""), re.M))
