"""The same work by tinygpt's Trainer, by a plain PyTorch loop and by a transformers loop.

python experiments/speed/compare.py model=small batch_size=8 vocab_size=50257
python experiments/speed/compare.py suite=true          every case of the README, half an hour
"""

from __future__ import annotations

import csv
import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import numpy as np
from rich.console import Console
from rich.table import Table

from tinygpt import cli, fileio, rundir
from tinygpt.config import RunError, key
from tinygpt.measuring.jobs import Job, Setting, token_folders
from tinygpt.measuring.statistics import median_interval
from tinygpt.measuring.turns import Arm, Lap, in_turns, opened

HERE = Path(__file__).resolve().parent
RIVALS = ("plain", "transformers")
USAGE = """\
python experiments/speed/compare.py [key=value ...]

model=tiny batch_size=16 max_seq_len=null vocab_size=4096    the work; null: the model's own context
precision=32            or bf16-mixed
threads=1               of all
compile=off micro_batch_size=null    of tinygpt, as its hardware.*
rival_allocator=system  of the others; keep: what is freed is kept, as tinygpt does
steps=4 rounds=30       a round: so many steps by each, in turns
overhead=true           instead: what Lightning adds to a step of a nearly empty model
suite=true              instead: all cases of the README; the hardware options are for all of them
seed=42
output_dir=FOLDER       where to write results.csv, results.json, speed.png
                        (suite: beside this file; else nothing is written)
"""


@dataclass
class Arguments:
    model: str = "tiny"
    batch_size: int = key(16, least=1)
    max_seq_len: Optional[int] = key(None, least=1)
    vocab_size: int = key(4096, least=2)
    precision: str = key("32", among=("32", "bf16-mixed"))
    threads: int = key(1, least=1)
    compile: str = "off"
    rival_allocator: str = key("system", among=("system", "keep"))
    micro_batch_size: Optional[int] = key(None, least=1)
    steps: int = key(4, least=1)
    rounds: int = key(30, least=1)
    overhead: bool = False
    suite: bool = False
    seed: int = key(42, least=0)
    output_dir: Optional[str] = None


@dataclass(frozen=True)
class Case:
    """Work, how much of it is a turn, and what was promised of it."""

    setting: Setting
    rival_allocator: str
    steps: int
    target: float | None = None  # tokens per CPU second over the plain loop's


def suite(arguments: Arguments) -> list[Case]:
    """Four sizes at two vocabularies, and one sequence a step; a turn takes a second or two."""
    cases = [
        *(("tiny", 16, 4096, 4, 1.05), ("small", 8, 4096, 4, 1.10)),
        *(("medium", 4, 4096, 2, 1.05), ("large", 2, 4096, 1, None)),
        *(("tiny", 16, 50257, 1, None), ("small", 8, 50257, 1, 1.4)),
        *(("medium", 4, 50257, 1, None), ("large", 2, 50257, 1, None)),
        ("tiny", 1, 4096, 50, 1.2),
    ]
    found = []
    for model, batch_size, vocab_size, steps, target in cases:
        setting = dataclasses.replace(
            setting_of(arguments),
            model=model,
            batch_size=batch_size,
            vocab_size=vocab_size,
            max_seq_len=None,
        )
        found.append(Case(setting, arguments.rival_allocator, steps, target))
    return found


def setting_of(arguments: Arguments) -> Setting:
    names = {field.name for field in dataclasses.fields(Setting)}
    given = {name: value for name, value in vars(arguments).items() if name in names}
    # the embedded corpus is not read; metrics.csv is what the run writes while it is timed
    return Setting(**given, accelerator="cpu", more=("tokenizer=byte", "logger=csv"))


def nearly_empty(arguments: Arguments) -> Setting:
    shape = ("d_model=8", "n_layers=1", "n_heads=1")
    more = (*setting_of(arguments).more, *(f"model.{item}" for item in shape))
    return dataclasses.replace(
        setting_of(arguments),
        model="tiny",
        batch_size=1,
        max_seq_len=8,
        vocab_size=16,
        more=more,
    )


def measure(
    setting: Setting,
    rivals: Sequence[str],
    keeps: bool,
    rounds: int,
    steps: int,
    console: Console,
) -> dict[str, Arm]:
    """All arms with their laps, after it is proved that they do the same work.

    ``keeps``: whether the rivals keep freed memory, as tinygpt does.
    """
    with token_folders() as tokens_of:
        tokens = tokens_of(setting)
        commands = {"tinygpt": Job("train", setting.overrides, tokens, probe=True).command}
        for name in rivals:
            job = {"arm": name, "overrides": setting.overrides, "tokens": tokens, "keeps": keeps}
            commands[name] = [sys.executable, str(HERE / "arms.py"), json.dumps(job)]
        with console.status("starting") as status, opened(commands) as arms:
            check_same_work(arms)
            in_turns(arms, rounds, steps, lambda n: status.update(f"round {n} of {rounds}"))
        return {arm.name: arm for arm in arms}


def check_same_work(arms: Sequence[Arm]) -> None:
    """The same number of parameters, and from the same weights the same loss of the same batch."""
    first = arms[0].facts
    for arm in arms[1:]:
        off = abs(arm.facts["probe_loss"] - first["probe_loss"])
        if arm.facts["parameters"] != first["parameters"] or not off < 1e-4:
            raise RunError(f"{arm.name} does not do the same work: {arm.facts}, tinygpt: {first}")


def laps_of(arm: Arm) -> list[Lap]:
    return [laps["train"] for laps in arm.laps]


def rates(arm: Arm, clock: str) -> list[float]:
    """Tokens per second of each round, by ``cpu`` or ``wall``."""
    return [lap.amount / getattr(lap, clock) for lap in laps_of(arm)]


def work_of(setting: Setting, steps: int) -> dict[str, Any]:
    """All that says what is computed, so that another program can be timed beside it."""
    model = setting.config.model
    return {
        "model": setting.model,
        "n_layers": model.n_layers,
        "d_model": model.d_model,
        "n_heads": model.n_heads,
        "batch_size": setting.batch_size,
        "context": model.max_seq_len,
        "vocab_size": setting.vocab_size,
        "steps": steps,
        "precision": setting.precision,
        "threads": setting.threads,
    }


def compare(case: Case, rounds: int, console: Console) -> list[dict[str, Any]]:
    """A row for each rival and clock, with the ratio of every round in it."""
    setting = case.setting
    keeps = case.rival_allocator == "keep"
    arms = measure(setting, RIVALS, keeps, rounds, case.steps, console)
    ours = arms["tinygpt"]
    facts = {
        name: ours.facts[name] for name in ("parameters", "micro_batch_size", "compile", "matmul")
    }
    facts["rival_allocator"] = case.rival_allocator
    rows = []
    for name in RIVALS:
        for clock in ("cpu", "wall"):
            mine, theirs = rates(ours, clock), rates(arms[name], clock)
            ratios = [a / b for a, b in zip(mine, theirs, strict=True)]
            ratio, low, high = median_interval(ratios)
            rows.append(
                {
                    **work_of(setting, case.steps),
                    **facts,
                    "rival": name,
                    "clock": clock,
                    "rounds": rounds,
                    "tinygpt_tokens_per_second": float(np.median(mine)),
                    "rival_tokens_per_second": float(np.median(theirs)),
                    "ratio": ratio,
                    "low": low,
                    "high": high,
                    "target": target_of(case, name),
                    "ratios": ratios,
                }
            )
    return rows


def target_of(case: Case, rival: str) -> float | None:
    return 1.2 if rival == "transformers" else case.target


def overhead(arguments: Arguments, console: Console) -> list[dict[str, Any]]:
    """Milliseconds that a step through the Trainer takes more than one of our own raw loop."""
    setting, steps = nearly_empty(arguments), 100
    arms = measure(setting, ["raw"], True, arguments.rounds, steps, console)
    rows = []
    for clock in ("cpu", "wall"):
        pairs = zip(laps_of(arms["tinygpt"]), laps_of(arms["raw"]), strict=True)
        more = [(getattr(a, clock) - getattr(b, clock)) / steps * 1e3 for a, b in pairs]
        median, low, high = median_interval(more)
        rows.append({"clock": clock, "ms_per_step": median, "low": low, "high": high})
    return rows


def show(rows: list[dict[str, Any]], console: Console) -> None:
    first = rows[0]
    console.print(
        f"{first['model']}: {first['n_layers']} layers of {first['d_model']}, "
        f"{first['n_heads']} heads, {first['parameters']:,} parameters; "
        f"batch {first['batch_size']} × context {first['context']}; vocabulary "
        f"{first['vocab_size']:,}; {first['steps']} steps × {first['rounds']} rounds; precision "
        f"{first['precision']}; {first['threads']} thread(s); tinygpt: compile "
        f"{first['compile']}, matmul {first['matmul']}, "
        f"{first['micro_batch_size']} sequences a pass; the others: allocator "
        f"{first['rival_allocator']}",
        highlight=False,
        soft_wrap=True,
    )
    table = Table(box=None, pad_edge=False, header_style="bold")
    names = ("rival", "tokens per", "tinygpt", "rival's", "ratio", "95 %", "target")
    for n, name in enumerate(names):
        table.add_column(name, justify="left" if n < 2 else "right", no_wrap=True)
    for row in rows:
        per = "CPU second" if row["clock"] == "cpu" else "second"
        table.add_row(
            row["rival"] if row["clock"] == "cpu" else "",
            per,
            f"{row['tinygpt_tokens_per_second']:,.0f}",
            f"{row['rival_tokens_per_second']:,.0f}",
            f"{row['ratio']:.3f}",
            f"{row['low']:.3f} to {row['high']:.3f}",
            f"{row['target']:g}" if row["target"] and row["clock"] == "cpu" else "",
        )
    console.print(table)
    console.print()


def show_overhead(rows: list[dict[str, Any]], console: Console) -> None:
    for row in rows:
        console.print(
            f"Lightning's part of a step, {row['clock']}: {row['ms_per_step']:.2f} ms "
            f"(95 % {row['low']:.2f} to {row['high']:.2f})",
            highlight=False,
        )


def write(rows: list[dict[str, Any]], more: list[dict[str, Any]], folder: Path) -> None:
    environment = rundir.environment()
    fileio.write_json(
        folder / "results.json", {"environment": environment, "cases": rows, "overhead": more}
    )
    if not rows:
        return
    names = [name for name in rows[0] if name != "ratios"]
    with (
        fileio.replacing(folder / "results.csv") as temporary,
        temporary.open("w", newline="", encoding="utf-8") as file,
    ):
        table = csv.DictWriter(file, names, extrasaction="ignore")
        table.writeheader()
        table.writerows(rows)
    from drawing import draw

    draw(rows, folder / "speed.png")


@cli.one_line_errors
def main() -> None:
    arguments = cli.read_arguments(Arguments, sys.argv[1:], USAGE)
    console = Console()
    cases: list[Case] = []
    if arguments.suite:
        cases = suite(arguments)
    elif not arguments.overhead:
        cases = [Case(setting_of(arguments), arguments.rival_allocator, arguments.steps)]
    for case in cases:
        case.setting.overrides  # noqa: B018  # a mistake is found before anything is timed
    folder = Path(arguments.output_dir) if arguments.output_dir else None
    folder = folder or (HERE if arguments.suite else None)
    rows: list[dict[str, Any]] = []
    more: list[dict[str, Any]] = []
    for case in cases:
        found = compare(case, arguments.rounds, console)
        show(found, console)
        rows += found
        if folder:
            write(rows, more, folder)
    if arguments.suite or arguments.overhead:
        more = overhead(arguments, console)
        show_overhead(more, console)
    if folder:
        write(rows, more, folder)


if __name__ == "__main__":
    main()
