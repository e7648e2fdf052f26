"""``python -m tinygpt.benchmark``: how fast it is on this machine."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from rich.console import Console
from rich.status import Status
from rich.table import Table

from tinygpt import cli
from tinygpt.config import PRECISIONS, ConfigError, key
from tinygpt.measuring import results
from tinygpt.measuring.jobs import Job, Setting, token_folders
from tinygpt.measuring.results import Row
from tinygpt.measuring.statistics import quartiles
from tinygpt.measuring.turns import Arm, in_turns, opened

MEASURES = ("train", "parts", "memory", "attention", "generation", "tokenizer", "startup")
VARIED = ("model", "vocab_size", "threads", "compile")
STARTS = 3  # rounds of starting a process, at most: each takes seconds
USAGE = f"""\
python -m tinygpt.benchmark [key=value ...]

measure=all             {",".join(MEASURES)}
model=tiny,small vocab_size=4096 batch_size=8 max_seq_len=null    null: the model's own context
threads=1 compile=off   as hardware.* of tinygpt.run
                        of these four lists, every combination: model vocab_size threads compile
precision=auto accelerator=auto
rounds=10 steps=5       a round: so many steps of each configuration, in turns
baseline=PATH           an earlier benchmark.json, or its folder, to compare with
seed=42 output_dir=outputs/benchmark

Random tokens; the real Trainer with all its callbacks, a process a configuration.  train: tokens
per second and MFU, against a large matrix product measured in the same round.  parts: a step's
data, forward, backward, optimizer, and framework (all the rest).  memory: the peak above what the
process had without a model.  attention: sdpa and manual.  generation: with and without the cache.
tokenizer: encoding.  startup: from the command to the end of the first step.
"""


@dataclass
class Arguments:
    measure: list[str] = key(["all"], among=("all", *MEASURES))  # noqa: RUF009
    model: list[str] = key(["tiny", "small"])  # noqa: RUF009
    vocab_size: list[int] = key([4096], least=2)  # noqa: RUF009
    batch_size: int = key(8, least=1)
    max_seq_len: Optional[int] = key(None, least=1)
    precision: str = key("auto", among=PRECISIONS)
    accelerator: str = "auto"
    threads: list[int] = key([1], least=1)  # noqa: RUF009
    compile: list[str] = key(["off"])  # noqa: RUF009
    rounds: int = key(10, least=1)
    steps: int = key(5, least=1)
    baseline: Optional[str] = None
    seed: int = key(42, least=0)
    output_dir: str = "outputs/benchmark"


def settings_of(arguments: Arguments) -> list[Setting]:
    """Every combination.  Raises ConfigError for what cannot be trained."""
    combinations = itertools.product(*(getattr(arguments, name) for name in VARIED))
    found = [
        Setting(
            **dict(zip(VARIED, values, strict=True)),
            batch_size=arguments.batch_size,
            max_seq_len=arguments.max_seq_len,
            precision=arguments.precision,
            accelerator=arguments.accelerator,
            seed=arguments.seed,
        )
        for values in combinations
    ]
    for setting in found:
        setting.config  # noqa: B018
    return found


def distinct(settings: Iterable[Setting], *names: str) -> list[Setting]:
    """One setting for each combination of these alone; not compiled."""
    first: dict[tuple[object, ...], Setting] = {}
    for setting in settings:
        first.setdefault(tuple(getattr(setting, name) for name in names), setting)
    return [dataclasses.replace(setting, compile="off") for setting in first.values()]


class Bench:
    """What the measures share: how much is measured, of what, and what is said meanwhile."""

    def __init__(
        self,
        arguments: Arguments,
        settings: Sequence[Setting],
        tokens_of: Callable[[Setting], str],
    ) -> None:
        self.arguments, self.settings, self.tokens_of = arguments, settings, tokens_of

    def measured(self, names: Sequence[str], status: Status) -> Iterator[Row]:
        for name, settings, rounds in self._plan(names):
            if name == "startup":
                yield from self._startup(settings, rounds, status)
                continue
            jobs = [(name, setting) for setting in settings]
            if name == "train" and "train" in names:
                jobs += [("gemm", setting) for setting in distinct(settings, "threads")]
            with self._in_turns(jobs, rounds, status) as arms:
                yield from self._rows(jobs, arms, names)

    def _plan(self, names: Sequence[str]) -> Iterator[tuple[str, Sequence[Setting], int]]:
        """Which process, for which settings, for how many rounds."""
        every, rounds = self.settings, self.arguments.rounds
        if "train" in names or "memory" in names:
            yield "train", every, rounds if "train" in names else 1
        plan = {
            "parts": (every, rounds),
            "attention": (distinct(every, "model", "threads"), rounds),
            "generation": (distinct(every, "model", "vocab_size", "threads"), rounds),
            "tokenizer": (distinct(every, "vocab_size", "threads"), rounds),
            "startup": (every, min(rounds, STARTS)),
        }
        yield from ((name, *plan[name]) for name in plan if name in names)

    @contextmanager
    def _in_turns(
        self, jobs: Sequence[tuple[str, Setting]], rounds: int, status: Status
    ) -> Iterator[list[Arm]]:
        commands = {
            f"{name} of {setting.model}, {n}": self._job(name, setting).command
            for n, (name, setting) in enumerate(jobs)
        }
        what = jobs[0][0]
        status.update(f"{what}: starting {len(jobs)} processes")
        with opened(commands) as arms:
            say = f"{what}: round {{}} of {rounds}"
            in_turns(arms, rounds, self.arguments.steps, lambda n: status.update(say.format(n)))
            yield arms

    def _job(self, name: str, setting: Setting, warmup: int = 3) -> Job:
        return Job(name, setting.overrides, self.tokens_of(setting), warmup)

    def _rows(
        self, jobs: Sequence[tuple[str, Setting]], arms: Sequence[Arm], names: Sequence[str]
    ) -> Iterator[Row]:
        pairs = list(zip(jobs, arms, strict=True))
        peaks = {setting.threads: arm for (name, setting), arm in pairs if name == "gemm"}
        for (name, setting), arm in pairs:
            place = results.place_of(arm, setting, name)
            if name != "train" or "train" in names:
                yield from results.rows_of(arm, place)
            if name == "train" and "train" in names:
                yield from results.mfu_rows(arm, peaks[setting.threads], place)
            if name == "train" and "memory" in names:
                yield results.memory_row(arm, place)

    def _startup(self, settings: Sequence[Setting], rounds: int, status: Status) -> Iterator[Row]:
        """New processes, each until it has made its first step."""
        found: dict[Setting, list[Arm]] = {setting: [] for setting in settings}
        for n in range(rounds):
            status.update(f"startup: round {n + 1} of {rounds}")
            for setting in settings:
                with opened({"startup": self._job("train", setting, warmup=1).command}) as arms:
                    found[setting] += arms
        for setting, arms in found.items():
            place = results.place_of(arms[0], setting, "startup")
            wall = [arm.seconds_to_ready for arm in arms]
            cpu = [float(arm.facts["cpu_seconds"]) for arm in arms]
            yield Row("first step", "s", "wall", place, wall)
            yield Row("first step", "s", "cpu", place, cpu)


def measure(arguments: Arguments, console: Console) -> list[Row]:
    settings = settings_of(arguments)
    names = MEASURES if "all" in arguments.measure else arguments.measure
    with token_folders() as tokens_of, console.status("starting") as status:
        return list(Bench(arguments, settings, tokens_of).measured(names, status))


def show(
    rows: Sequence[Row], ratios: Mapping[Row, tuple[float, float, float]], console: Console
) -> None:
    """A line a quantity and configuration: the median by wall time; half the distance of the
    quartiles and the median by CPU time, or beside a baseline how many times as good it is."""
    cpu = {row.identity: row for row in rows if row.clock == "cpu"}
    table = Table(box=None, pad_edge=False, header_style="bold")
    last = ("× baseline",) if ratios else ("spread", "by CPU time")
    for name in ("", "", "median", "", *last):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for family in results.by_family(row for row in rows if row.clock != "cpu").values():
        label = results.labels(family)
        for row in family:
            median, low, high = quartiles(row.samples)
            cells = [row.what, label(row), number(median), row.unit]
            if ratios:
                times = ratios.get(row)
                cells += ["{:.2f} ({:.2f} to {:.2f})".format(*times)] if times else []
            else:
                twin = cpu.get((row.what, row.unit, "cpu", *row.identity[3:]))
                cells.append(f"±{(high - low) / 2 / median:.1%}" if len(row.samples) > 1 else "")
                cells.append(number(twin.median) if twin else "")
            table.add_row(*cells)
    console.print(results.in_common(rows), highlight=False)
    console.print(table)


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


@cli.one_line_errors
def main() -> None:
    arguments = cli.read_arguments(Arguments, sys.argv[1:], USAGE)
    for name in ("measure", *VARIED):
        if not getattr(arguments, name):
            raise ConfigError(f"{name}=: give at least one")
    baseline = results.read_baseline(Path(arguments.baseline)) if arguments.baseline else []
    console, folder = Console(markup=False), Path(arguments.output_dir)
    rows = measure(arguments, console)
    ratios = results.against(rows, baseline)
    results.write(rows, folder, vars(arguments), ratios)
    show(rows, ratios, console)
    if arguments.baseline:
        _note(Path(arguments.baseline), ratios, console)
    from tinygpt.measuring.figure import draw

    draw(rows, folder / "benchmark.png")
    print(f"\n{folder}/benchmark.csv, benchmark.json, benchmark.png")


def _note(
    baseline: Path, ratios: Mapping[Row, tuple[float, float, float]], console: Console
) -> None:
    """Says where the comparison may not mean what it seems to."""
    if not ratios:
        console.print(f"note: nothing in {baseline} was measured alike", soft_wrap=True)
    elif odd := results.conditions_that_differ(baseline):
        console.print(f"note: the baseline has another {', '.join(odd)}", soft_wrap=True)


if __name__ == "__main__":
    main()
