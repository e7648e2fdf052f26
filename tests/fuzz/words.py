"""Words of a command line, and the files that one names: overrides, arguments, edits, questions."""

from __future__ import annotations

import contextlib

from tests.fuzz.harness import Harness, file_of
from tinygpt import cli, fit, rundir, sample
from tinygpt.adaptation import edits
from tinygpt.config import ConfigError
from tinygpt.evaluating.items import read_task


def lines(data: bytes) -> list[str]:
    """A word a line, as the system hands bytes of a command line to Python; no NUL comes there."""
    text = data.replace(b"\0", b"").decode("utf-8", "surrogateescape")
    return [line for line in text.split("\n") if line]


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
    for kind in (fit.Arguments, sample.Arguments):
        with contextlib.suppress(ConfigError):
            cli.read_arguments(kind, words, "")


def edit(data: bytes) -> None:
    found = edits.parse(data.decode("utf-8", "surrogateescape"))
    assert edits.parse(found.to_json()) == found
    assert len(found.edit_id) == len(found.text_sha256) == 64


def task(data: bytes) -> None:
    read_task(file_of("task.jsonl", data))


def prompts(data: bytes) -> None:
    sample.read_prompts(sample.Arguments(prompts=str(file_of("prompts.txt", data))))


HARNESSES = [
    Harness("overrides", "lines", overrides),
    Harness("overrides_of_a_sweep", "lines", sweep),
    Harness("arguments", "lines", arguments),
    Harness("edit", "json", edit),
    Harness("task", "jsonl", task),
    Harness("prompts", "bytes", prompts),
]
