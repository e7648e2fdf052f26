"""Measure how fast training is on this machine: ``python -m tinygpt.benchmark``."""

from __future__ import annotations

import math
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tinygpt import cli, fileio
from tinygpt.config import ConfigError, RunError, key
from tinygpt.training.console import folded

USAGE = """\
tinygpt benchmark [key=value ...]

model=tiny,small        one or more of conf/model
steps=50                training steps to time, after a few that warm up
seconds=1               how long to time everything else, each
output_dir=outputs/benchmark     where bench.csv and BENCH.md go
any key of tinygpt run  data, tokenizer, batch, precision, optimizer, hardware to measure with

Each line has the median and quartiles of a measure.  training: the real Trainer with all its files.
MFU: its FLOPs over the matrix product's.  peak memory: of the process, on CUDA of the card.
bare step: the same batches, model and optimizer in a plain loop.  forward, backward: of all passes
of a step.  generation: one text.  Lightning's part of a step: CPU time, of a minimal model.
"""
COLUMNS = ("model", "measure", "median", "low", "high", "unit", "samples", "threads")
RIGHT = ("median", "low", "high", "samples", "threads")
SMALL_DATA = ["data.max_tokens=1_000_000", "data.eval_tokens=10_000"]  # the default
MINIMAL = [  # a model so small that Lightning takes a large part of a step
    *("model=tiny", "model.n_layers=1", "model.d_model=8", "model.n_heads=1"),
    *("model.max_seq_len=8", "train.batch_tokens=8", "hardware.micro_batch_size=null"),
    *("hardware.threads=1", "hardware.devices=1", "data.eval_tokens=1_000", "tokenizer=byte"),
    *("data=synthetic", "data.max_tokens=20_000"),
]
OURS = [f"train.{name}" for name in ("steps", "log_every", "eval_every", "checkpoint_every")]
GONE = {
    "measure": "everything is measured; seconds= sets how long each is timed",
    "rounds": "steps= says how many training steps to time, seconds= how long everything else",
    "baseline": "compare the bench.csv of two output folders",
    "optim.lora.rank": "it times the training of all weights",
    **dict.fromkeys([*OURS, "train.sample_tokens", "study", "run_name"], "the benchmark sets it"),
}

Row = dict[str, Any]


@dataclass
class Arguments:
    model: list[str] = key(["tiny", "small"])
    steps: int = key(50, least=1)
    seconds: float = key(1.0, least=0.001)
    output_dir: str = "outputs/benchmark"


def read(argv: Sequence[str]) -> tuple[Arguments, list[str]]:
    """Return the benchmark's own keys and the words for ``tinygpt.run``.  Raises ConfigError."""
    for item in argv:
        if why := GONE.get(item.partition("=")[0]):
            raise ConfigError(f"{item}: not a key of the benchmark; {why}")
    own = ("-", *(f"{field.name}=" for field in fields(Arguments)))
    arguments = cli.read_arguments(Arguments, [i for i in argv if i.startswith(own)], USAGE)
    if not arguments.model:
        raise ConfigError("model=: give at least one")
    return arguments, [item for item in argv if not item.startswith(own)]


def jobs(arguments: Arguments, given: Sequence[str]) -> dict[str, list[str]]:
    """Return the overrides of a run for each model and for the minimal model.

    Raises ConfigError for what ``tinygpt.run`` would refuse.
    """
    window = math.ceil(arguments.steps / 5)
    total = window * (1 + math.ceil(arguments.steps / window))  # one window warms up
    steps = [f"train.steps={total}", f"train.log_every={window}"]
    data = [] if any(item.startswith("data") for item in given) else SMALL_DATA
    found = {name: [f"model={name}", *data, *given, *steps] for name in arguments.model}
    others = [i for i in given if not i.startswith(("model.", "data", "tokenizer", "init_from"))]
    found["minimal"] = [*others, *MINIMAL, f"train.steps={20 * arguments.steps}"]
    for overrides in found.values():
        overrides += [f"train.{name}_every={10**15}" for name in ("eval", "checkpoint")]
        overrides.append("train.sample_tokens=0")
        cli.compose_config(overrides)
    return found


def measure(name: str, overrides: Sequence[str], seconds: float) -> tuple[str, list[Row]]:
    """Measure one configuration in its own process; return the environment and the rows."""
    with tempfile.TemporaryDirectory(prefix="tinygpt-") as folder:
        out, what = Path(folder, "rows.json"), "overhead" if name == "minimal" else "model"
        place = [f"output_dir={folder}", "study=benchmark", "run_name=run"]
        words = [str(out), str(seconds), what, *overrides, *place]
        command = [sys.executable, "-m", "tinygpt.measuring", *words]
        # in a new session, so that Ctrl-C reaches only this process, which then ends the other
        done = subprocess.run(command, stdout=subprocess.DEVNULL, start_new_session=True)
        if done.returncode < 0:
            raise RunError(f"model={name}: signal {-done.returncode} ended it; out of memory?")
        if done.returncode:  # the process has printed why
            raise SystemExit(done.returncode)
        found = fileio.read_json(out)
    return found["environment"], [{"model": name, **row} for row in found["rows"]]


def cells(row: Row) -> list[str]:
    """Return the cells of a row in the printed table and BENCH.md."""
    numbers = ("median", "low", "high")
    shown = {n: format(row[n], ",.0f" if abs(row[n]) >= 1000 else ".3g") for n in numbers}
    if row["samples"] == 1:
        shown |= dict.fromkeys(("low", "high", "samples", "threads"), "")
    return [str(shown.get(name, row[name])) for name in COLUMNS]


def write(folder: Path, environment: str, rows: Sequence[Row]) -> None:
    """Write bench.csv, with all digits, and BENCH.md, the printed table."""
    fileio.write_csv(folder / "bench.csv", rows, COLUMNS)
    lines = [COLUMNS, ["---:" if name in RIGHT else "---" for name in COLUMNS], *map(cells, rows)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    words = shlex.join(["python", "-m", "tinygpt.benchmark", *sys.argv[1:]])
    text = f"# Benchmark\n\n{environment}\n\n    {words}\n\n{table}\n"
    fileio.write_text(folder / "BENCH.md", text)


@cli.one_line_errors
def main() -> None:
    arguments, given = read(sys.argv[1:])
    todo, folder = jobs(arguments, given), Path(arguments.output_dir)
    fileio.check_writable("output_dir", folder)
    console, rows = Console(markup=False), list[Row]()
    with console.status("starting") as status:
        for name, overrides in todo.items():
            status.update(f"measuring {name}")
            environment, found = measure(name, overrides, arguments.seconds)
            rows += found
    write(folder, environment, rows)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in COLUMNS:
        table.add_column(name, justify="right" if name in RIGHT else "left")
    for row in rows:
        table.add_row(*cells(row))
    console.print(folded(environment, 2), highlight=False, soft_wrap=True)
    console.print(table)
    print(f"\n{folder}/BENCH.md, bench.csv")


if __name__ == "__main__":
    main()
