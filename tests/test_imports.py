"""Who may import whom (design: the house), read off the syntax tree of every file."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

PACKAGE = ROOT / "tinygpt"
COMMANDS = {"run", "fit", "evaluate", "sample", "export", "adapt", "tokenizer", "benchmark", "law"}
SHARED = {
    "config",
    "fileio",
    "metrics",
    "rundir",
    "signals",
    "streams",
}  # everything may import these
BELOW = SHARED | {"data", "pretrained", "model", "training", "load", "adaptation", "scaling"}
# What of our own each part may import besides SHARED and itself.
ALLOWED: dict[str, set[str]] = {
    "config": set(),
    "fileio": set(),
    "rundir": set(),
    "signals": set(),
    "streams": set(),
    "data": set(),
    "model": set(),
    "training": {"data", "model", "load", "pretrained"},
    "pretrained": {"data", "model"},
    "load": {"data", "model", "pretrained"},
    "adaptation": {"training", "model", "data", "load", "scaling"},
    "scaling": set(),
    "metrics": set(),
    "words": set(),
    "arguments": {"words"},
    "cli": BELOW | {"words", "arguments"},
    "sweeping": BELOW | {"cli", "words"},
    "measuring": BELOW | {"cli"},
    "evaluating": {"data", "model", "load", "training", "scaling"},
    **{command: BELOW | {"cli", "sweeping", "measuring", "evaluating"} for command in COMMANDS},
    "__main__": {"completion"},
    "completion": {"cli", "words"},
}
TORCH = {"torch", "lightning", "pytorch_lightning", "torchmetrics", "transformers", "accelerate"}
TORCH_FREE = {"pretrained", "cli", "words", "scaling", *SHARED}
USES_HYDRA = COMMANDS | {"cli", "words", "sweeping"}
OWN_TEST = {PACKAGE / "__init__.py", PACKAGE / "runs" / "__init__.py"}
FILES = sorted(set(PACKAGE.rglob("*.py")) - OWN_TEST)


def imported(tree: ast.AST) -> Iterator[str]:
    """Dotted names of all imports, those inside functions too; of ours with the name taken."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            ours = module in ("tinygpt", "tinygpt.runs")
            yield from ([f"{module}.{a.name}" for a in node.names] if ours else [module])


def part_of(path: Path) -> str:
    """Return the folder, ``training``, or the file: ``cli``, and in runs/ ``rundir``."""
    first, *rest = path.relative_to(PACKAGE).parts
    return (rest[0] if first == "runs" else first).removesuffix(".py")


def violations(part: str, source: str) -> list[str]:
    """What ``source``, a file of ``part``, imports against the rules."""
    found = []
    for name in imported(ast.parse(source)):
        top, _, rest = name.partition(".")
        first, _, second = rest.partition(".")
        ours = second.split(".")[0] if first == "runs" else first
        forbidden = (
            (top == "" and "relative import")
            or (top == "tinygpt" and ours not in ALLOWED[part] | SHARED | {part} and "not below it")
            or (top == "hydra" and part not in USES_HYDRA and "Hydra is for commands")
            or (top in TORCH and part in TORCH_FREE and "must be free of torch")
            or (
                part == "config"
                and top not in {*sys.stdlib_module_names, "omegaconf", "tinygpt"}
                and "omegaconf at most"
            )
        )
        if forbidden:
            found.append(f"{part} imports {name}: {forbidden}")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_file_keeps_the_rules(path: Path) -> None:
    part = part_of(path)
    assert part in ALLOWED, f"{part}: say in ALLOWED what it may import"
    assert violations(part, path.read_text()) == []


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ("model", "from tinygpt.data import corpora"),
        ("model", "import tinygpt.training.optim"),
        ("data", "from tinygpt.model.gpt import GPT"),
        ("training", "from tinygpt import scaling"),
        ("training", "def f():\n    import hydra"),
        ("rundir", "import torch.nn as nn"),
        ("config", "import lightning.pytorch as pl"),
        ("scaling", "def f():\n    from torch import nn"),
        ("scaling", "from tinygpt.model import gpt"),
        ("config", "import numpy as np"),
        ("config", "from tinygpt import run"),
        ("cli", "from tinygpt.run import job"),
        ("cli", "import torch"),
        ("sweeping", "import tinygpt.run"),
        ("run", "import tinygpt.fit"),
        ("adaptation", "from tinygpt.evaluating import tasks"),
        ("evaluating", "from tinygpt.adaptation import inner"),
        ("data", "from . import shards"),
        ("data", "from ..model import gpt"),
    ],
)
def test_the_check_sees_a_breach(part: str, source: str) -> None:
    assert len(violations(part, source)) == 1


def test_no_drawer_for_odds_and_ends() -> None:
    names = {part for path in FILES for part in path.relative_to(PACKAGE).with_suffix("").parts}
    assert not names & {"utils", "util", "helpers", "common", "core", "misc"}


# --- what a command loads before it has anything to do; in seconds of CPU: torch and Lightning 10,
# --- the law's libraries 1, those of the data a half

LAW = {"pandas", "scipy", "matplotlib", "sklearn"}
DATA = {"numpy", "tokenizers", "tiktoken", "datasets", "pyarrow"}
HEAVY = TORCH | LAW | DATA | {"tensorboard", "mlflow", "joblib", "optuna", "ray", "submitit"}
RUN_AS_A_COMMAND = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_module(f"tinygpt.{sys.argv[0]}", run_name="__main__", alter_sys=True)
except SystemExit as left:
    print("exit", left.code or 0)
print("loaded", *{name.split(".")[0] for name in sys.modules})
"""


@pytest.mark.parametrize(
    ("words", "needed"),
    [
        ("run --help", set()),
        ("run --cfg job model.d_model=32", set()),
        ("run model.d_model=abc", set()),
        ("run data=nope", set()),
        ("run --multirun seed=1,2 model.d_model=-1", set()),
        ("run experiment=width model.d_modle=3", set()),
        ("run --multirun seed=1,2 data=custom data.path=nowhere", DATA - {"datasets"}),
        ("adapt --help", set()),
        ("adapt rnu=outputs", set()),
        ("adapt run=nowhere data=synthetic", set()),
        ("adapt --multirun experiment=adaptation run=nowhere inner.lora.rnak=4,8", set()),
        ("fit --help", set()),
        ("fit rnus=outputs", set()),
        ("fit runs=nowhere", set()),
        ("export --help", set()),
        ("export chekpoint=best", set()),
        ("export run=nowhere to=x", set()),
        ("export run=. to=.", set()),
        ("fit runs=.", LAW - {"matplotlib", "sklearn"} | DATA - {"datasets"}),
        ("evaluate --help", set()),
        ("evaluate rnus=outputs", set()),
        ("evaluate runs=nowhere", set()),
        ("evaluate runs=. prune=2", set()),
        ("evaluate runs=. data=custom", set()),
        ("evaluate runs=. task=nowhere", set()),
        ("tokenizer --help", DATA - {"datasets"}),
        ("sample --help", set()),
        ("sample run=. top_p=2", set()),
        ("sample run=nowhere", set()),
    ],
)
def test_a_command_starts_without_what_it_does_not_need(
    words: str, needed: set[str], tmp_path: Path
) -> None:
    program = [sys.executable, "-c", RUN_AS_A_COMMAND, *words.split()]
    done = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.rpartition("loaded ")[2].split())
    assert "tinygpt" in loaded
    assert loaded & (HEAVY - needed) == set()
    fails = not ("--help" in words or "--cfg" in words)
    assert ("exit 2" in done.stdout) == fails
    assert done.stderr.count("\n") == fails


@pytest.mark.parametrize("own", [False, True])
def test_training_starts_without_what_only_users_need(own: bool, tmp_path: Path) -> None:
    """Lightning's torchmetrics imports them; only a callback of the user's own may need them."""
    (tmp_path / "mine.py").write_text("from lightning.pytorch import Callback as Mine")
    words = ["run", "trainer.fast_dev_run=true", "data.max_tokens=20_000", "tokenizer=byte"]
    words += ["data.eval_tokens=1_000", f"cache_dir={tmp_path}"]
    words += ["+callbacks.x._target_=mine.Mine"] if own else []
    program = [sys.executable, "-c", RUN_AS_A_COMMAND, *words]
    done = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True, check=True)
    said, _, names = done.stdout.rpartition("loaded ")
    assert "fast_dev_run: one step done" in said
    loaded = set(names.split()) & {"scipy", "matplotlib", "transformers"}
    assert ("matplotlib" in loaded) == own
    assert not loaded or own


def test_the_package_itself_imports_nothing() -> None:
    program = (
        "import sys; before = set(sys.modules); import tinygpt; print(*set(sys.modules) - before)"
    )
    out = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    outside = {name.split(".")[0] for name in out.stdout.split()} - set(sys.stdlib_module_names)
    assert outside == {"tinygpt"}
    assert not [name for name in out.stdout.split() if name.startswith("tinygpt.")]
