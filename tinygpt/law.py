"""``python -m tinygpt.law``: a law of a text within a budget, and a prediction put to the test."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Optional

from tinygpt import cli
from tinygpt.config import ConfigError, key

USAGE = """\
tinygpt law book.txt minutes=15 [key=value ...]

path=FILES              the text, path= may be left out: files, folders or globs; or
                        data=tinystories and the like
minutes=15              of training and evaluation, all told; or flops=1e17
error=0.01              stop earlier, once the prediction at the target is known to 1 %
target.flops=1e15       what to predict: the best split of so much compute; by default that of
                        ten times a test run's
seed=1                  the first of the seeds of its runs: other chances, another law
plan=true               what this would cost and could show; nothing is trained
study=NAME              where it goes, outputs/NAME; run it again to resume
any key of tinygpt run  tokenizer, batch, optimizer, hardware, launcher

It reads the text, times this machine, finds a learning rate, then chooses one run after the other:
the one that tells most of the loss at the target for its cost.  Up to a quarter of the budget goes
into the most expensive run, whose loss it predicts before it begins.
"""


OWNED = (
    *("model.d_model", "model.n_heads", "train.tokens", "train.steps", "train.epochs"),
    *("train.flops", "train.tokens_per_param", "data.fraction", "run_name", "experiment", "scale"),
    *("model.parametrization", "train.early_stopping_patience", "init_from", "plan", "fit"),
)


@dataclass
class Target:
    flops: Optional[float] = key(None, above=0.0)


@dataclass
class Arguments:
    path: list[str] = field(default_factory=list)
    minutes: Optional[float] = key(None, above=0.0)
    flops: Optional[float] = key(None, above=0.0)
    error: Optional[float] = key(None, above=0.0, below=1.0)
    target: Target = field(default_factory=Target)
    seed: int = key(1, least=0)
    plan: bool = False
    study: Optional[str] = None
    output_dir: str = "outputs"


def read(argv: Sequence[str]) -> tuple[Arguments, list[str]]:
    """Return the keys of the law and those of its runs.  Raises ConfigError."""
    names = ("target.", *(f"{one.name}=" for one in fields(Arguments)))
    own = [item for item in argv if item.startswith(("-", *names)) or "=" not in item]
    given = [item for item in argv if item not in own]
    for item in given:
        if near := get_close_matches(item.partition("=")[0], [n.strip("=") for n in names], 1, 0.8):
            raise ConfigError(f"{item}: no such key; did you mean {near[0]}?")
    arguments = cli.read_arguments(Arguments, own, USAGE, bare="path")
    check(given)
    if arguments.minutes and arguments.flops:
        raise ConfigError("minutes, flops: give one of them")
    sources = [item for item in given if item.startswith(("data=", "data.path="))]
    if arguments.path and sources:
        raise ConfigError(f"path, {sources[0]}: give one of them")
    if not arguments.path and not sources:
        raise ConfigError("path: give a text, as path=book.txt, or data=tinystories")
    if arguments.path:
        text = ",".join(arguments.path)
        is_plain = re.fullmatch(r"[A-Za-z_./~-][\w./~-]*", text)  # as the report's commands show it
        given += ["data=custom", f"data.path={text if is_plain else f'[{text}]'}"]
    return arguments, [*given, f"output_dir={arguments.output_dir}"]


def check(overrides: Sequence[str]) -> None:
    """Raise ConfigError for a key that is decided here."""
    for item in overrides:
        name = item.partition("=")[0].lstrip("+")
        if name in OWNED or name.startswith("sweep"):
            raise ConfigError(f"{item}: tinygpt.law decides this; minutes= or flops= is its budget")
        if name.startswith("schedule") and name != "schedule.warmup_steps":
            raise ConfigError(f"{item}: tinygpt.law needs schedule=wsd: lengths share a trunk")


@cli.one_line_errors
def main() -> None:
    arguments, given = read(sys.argv[1:])
    config = cli.compose_config(given)
    source = Path(arguments.path[0]).stem if arguments.path else config.data.name
    name = arguments.study or f"law-{re.sub('[^A-Za-z0-9._-]+', '-', source)}"

    cli.loading(lean=not config.callbacks)
    from rich.console import Console

    from tinygpt.sweeping.budget import find_law
    from tinygpt.sweeping.recipe import Asked

    minutes = None if arguments.flops else arguments.minutes or 15.0
    asked = Asked(
        given,
        name,
        minutes,
        arguments.flops,
        arguments.error,
        arguments.target.flops,
        arguments.plan,
        arguments.seed,
    )
    find_law(asked, arguments.output_dir, Console(markup=False))


if __name__ == "__main__":
    main()
