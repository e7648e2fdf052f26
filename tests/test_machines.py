"""What docs/machines.md says to type: it can be had, and where the machine is there, it works."""

from __future__ import annotations

import re
import shlex

import pytest
import torch

from tests.conftest import ROOT, Command
from tests.test_engines import needs_ray, needs_slurm
from tests.test_extending import fenced, section
from tinygpt import cli

PAGE = ROOT / "docs" / "machines.md"
SECTIONS = re.findall(r"^## (.*)", PAGE.read_text(), re.M)
SMOKE = ("train.tokens=20_000", "data.max_tokens=100_000", "data.eval_tokens=10_000")
# What a section's machine has and the one that tests may lack.
ELSEWHERE = ("hardware", "launcher.gpus", "launcher.part", "launcher.addr")


def commands(title: str) -> list[list[str]]:
    """The words behind ``python -m tinygpt.run``, in shells and in notebooks' cells."""
    text = section(PAGE, title)
    lines = [*fenced(text, "sh").splitlines(), *fenced(text, "").splitlines()]
    return [
        shlex.split(line.partition("-m tinygpt.run")[2]) for line in lines if "tinygpt.run" in line
    ]


@pytest.mark.parametrize("title", SECTIONS)
def test_every_command_can_be_composed(title: str) -> None:
    assert commands(title)
    for words in commands(title):
        cli.compose_config(words)


@pytest.mark.slow
@pytest.mark.parametrize(
    "title",
    [
        "On a laptop",
        pytest.param("On Slurm", marks=needs_slurm),
        pytest.param("On Ray", marks=needs_ray),
    ],
)
def test_a_section_typed(tinygpt: Command, title: str) -> None:
    for words in commands(title):
        words = [word for word in words if not word.startswith((*ELSEWHERE, "scale="))]
        words = [word.replace("cpus=4", "cpus=1") for word in words]
        more = ["scale=smoke", "hardware.threads=1"] if "experiment=width" in words else SMOKE
        done = tinygpt("run", *words, *more)
        assert done.returncode == 0, f"{' '.join(words)}: {done.stdout}{done.stderr}"
        if "plan=true" not in words:  # the same command goes on: here nothing is left
            again = tinygpt("run", *words, *more)
            assert re.search("already finished|finished before", again.stdout), again.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU")
def test_without_a_gpu_it_says_so(tinygpt: Command) -> None:
    done = tinygpt("run", *commands("On a GPU")[0])
    assert done.returncode == 2
    assert done.stderr.split("; usable")[0] in fenced(section(PAGE, "On a GPU"), "")
