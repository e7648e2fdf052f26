"""Words of a command line, and the files that one names: overrides, arguments, edits, questions."""

from __future__ import annotations

import dataclasses

from hydra.core.override_parser.overrides_parser import OverridesParser

from tests.fuzz.harness import Harness, file_of
from tinygpt import cli, fileio, fit, sample
from tinygpt.adaptation import edits
from tinygpt.adaptation.policies import ReplayPolicy
from tinygpt.evaluating.options import read_task
from tinygpt.runs import rundir

LINE = 1 << 10  # bytes: the time goes with the length; tests/test_bad_input.py has a long one


def lines(data: bytes) -> list[str]:
    """A word a line, as the system hands bytes of a command line to Python; no NUL comes there."""
    text = data.replace(b"\0", b"").decode("utf-8", "surrogateescape")
    return [line for line in text.split("\n") if line]


def override_words(data: bytes) -> None:
    """By themselves: composing what they ask for takes a hundred times as long."""
    words = lines(data)
    with cli.in_one_line(words, cli.RUN):
        [cli._is_plain_value(item) for item in OverridesParser.create().parse_overrides(words)]
        cli.sweep_name(cli.RUN, words)
    rundir.run_name(words, "0" * 64)


def overrides(data: bytes) -> None:
    words = lines(data)
    config = cli.compose_config(words)
    rundir.run_name(words, rundir.config_hash(config, {}))


def sweep(data: bytes) -> None:
    words = lines(data)
    if cli.sweeps(cli.RUN, words, multirun=True):
        cli.sweep_name(cli.RUN, words)


def arguments(data: bytes) -> None:
    words = [word for word in lines(data) if word not in ("-h", "--help")]
    kind = (fit.Arguments, sample.Arguments)[len(words) % 2]  # one at a time: twice as many inputs
    cli.read_arguments(kind, words, "")


def edit(data: bytes) -> None:
    try:
        values = fileio.parse_json(data.decode("utf-8", "surrogateescape"))
    except ValueError:
        return
    found = edits.read(values)
    assert edits.read(dataclasses.asdict(found)) == found
    assert len(found.edit_id) == 64


def replayed(data: bytes) -> None:
    """Edits that were written before."""
    ReplayPolicy(str(file_of("edits.jsonl", data)))


def task(data: bytes) -> None:
    read_task(file_of("task.jsonl", data))


def prompts(data: bytes) -> None:
    sample.read_prompts(sample.Arguments(prompts=str(file_of("prompts.txt", data))))


HARNESSES = [
    Harness("override_words", "lines", override_words, seeds_of="overrides", largest=LINE),
    Harness("overrides", "lines", overrides, largest=LINE),
    Harness("overrides_of_a_sweep", "lines", sweep, largest=LINE),
    Harness("arguments", "lines", arguments, largest=LINE),
    Harness("edit", "json", edit),
    Harness("edits", "jsonl", replayed),
    Harness("task", "jsonl", task),
    Harness("prompts", "bytes", prompts),
]
