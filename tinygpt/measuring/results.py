"""Laps as rows of a table: median and quartiles of the rounds, files, an earlier file beside."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tinygpt import fileio, rundir
from tinygpt.config import ConfigError
from tinygpt.measuring.jobs import Setting
from tinygpt.measuring.statistics import quartiles, ratio_interval
from tinygpt.measuring.turns import Arm, Lap

CLOCKS = ("wall", "cpu")


@dataclass(frozen=True)
class Quantity:
    """What a lap says: an amount per second, or (``per_unit``) seconds per unit of it."""

    what: str
    unit: str
    scale: float = 1.0
    per_unit: bool = False

    def of(self, lap: Lap, clock: str) -> float:
        seconds: float = getattr(lap, clock)
        value = seconds / lap.amount if self.per_unit else lap.amount / seconds
        return self.scale * value


QUANTITIES = {  # by the name of the lap
    "train": Quantity("training", "tokens/s"),
    "gemm": Quantity("matrix product", "GFLOP/s", 1e-9),
    **{
        part: Quantity(f"step: {part}", "ms", 1e3, per_unit=True)
        for part in ("data", "forward", "backward", "optimizer", "framework")
    },
    "sdpa": Quantity("attention: sdpa", "ms", 1e3, per_unit=True),
    "manual": Quantity("attention: manual", "ms", 1e3, per_unit=True),
    "cached": Quantity("generation: cached", "tokens/s"),
    "uncached": Quantity("generation: uncached", "tokens/s"),
    "bpe": Quantity("tokenizer: bpe", "MB/s", 1e-6),
    "char": Quantity("tokenizer: char", "MB/s", 1e-6),
    "byte": Quantity("tokenizer: byte", "MB/s", 1e-6),
}


@dataclass(frozen=True)
class Place:
    """Where a row was measured; what makes no difference to it is null."""

    model: str | None
    vocab_size: int | None
    batch_size: int | None
    context: int | None
    device: str
    precision: str
    threads: int
    compile: str | None
    matmul: str | None


@dataclass(frozen=True)
class Row:
    """One line of benchmark.csv; ``low`` and ``high`` are the quartiles of the rounds."""

    what: str
    unit: str
    clock: str | None  # wall or cpu seconds; null: no time is in it
    place: Place
    samples: list[float] = field(compare=False)  # one a round

    def values(self) -> dict[str, Any]:
        median, low, high = quartiles(self.samples)
        head = {"what": self.what, "unit": self.unit, "clock": self.clock}
        numbers = {"median": median, "low": low, "high": high, "rounds": len(self.samples)}
        return {**head, **dataclasses.asdict(self.place), **numbers}

    @property
    def median(self) -> float:
        return quartiles(self.samples)[0]

    @property
    def identity(self) -> tuple[Any, ...]:
        return (self.what, self.unit, self.clock, *dataclasses.astuple(self.place))


def place_of(arm: Arm, setting: Setting, measure: str) -> Place:
    facts = arm.facts
    trains = measure in ("train", "parts", "startup")
    of_machine = measure == "gemm"
    vocab_size = facts.get("vocab_size", setting.vocab_size)
    with_batch = trains or measure == "attention"
    without_model = of_machine or measure == "tokenizer"
    return Place(
        model=None if without_model else setting.model,
        vocab_size=None if of_machine or measure == "attention" else vocab_size,
        batch_size=setting.batch_size if with_batch else None,
        context=None if without_model else setting.config.model.max_seq_len,
        device=facts["device"],
        precision=facts["precision"],
        threads=facts["threads"],
        compile=facts["compile"] if trains else None,
        matmul=facts["matmul"] if trains else None,
    )


def rows_of(arm: Arm, place: Place) -> Iterator[Row]:
    """A row for each lap of a turn and each clock."""
    for name in arm.laps[0]:
        quantity = QUANTITIES[name]
        for clock in CLOCKS:
            samples = [quantity.of(laps[name], clock) for laps in arm.laps]
            yield Row(quantity.what, quantity.unit, clock, place, samples)


def mfu_rows(arm: Arm, peak: Arm, place: Place) -> Iterator[Row]:
    """Model FLOPs utilisation: the FLOPs of training over those of the large matrix product that
    was measured in the same round."""
    flops = arm.facts["flops_per_token"]
    for clock in CLOCKS:
        samples = [
            100 * flops * _rate(laps["train"], clock) / _rate(large["gemm"], clock)
            for laps, large in zip(arm.laps, peak.laps, strict=True)
        ]
        yield Row("MFU", "%", clock, place, samples)


def _rate(lap: Lap, clock: str) -> float:
    seconds: float = getattr(lap, clock)
    return lap.amount / seconds


def memory_row(arm: Arm, place: Place) -> Row:
    """The peak of the process above what it had before there was a model; CUDA: of the device."""
    return Row("peak memory", "MB", None, place, [arm.last["peak_bytes"] / 1e6])


def read_baseline(path: Path) -> list[Row]:
    """The rows of an earlier benchmark.json, or of the folder with one.  Raises ConfigError."""
    found = fileio.read_json(_file(path))
    names = [f.name for f in dataclasses.fields(Place)]
    try:
        rows = [
            Row(
                row["what"],
                row["unit"],
                row["clock"],
                Place(**{name: row[name] for name in names}),
                [float(sample) for sample in row["samples"]],
            )
            for row in found["rows"]
        ]
        for row in rows:
            if not isinstance(row.what, str) or not isinstance(row.unit, str):
                raise TypeError(f"what={row.what!r:.40} unit={row.unit!r:.40}")
            hash(row.identity)
            measured = all(value == 0 or 1e-100 < value < 1e100 for value in row.samples)
            if not row.samples or not measured:
                raise ValueError(f"samples={row.samples!r:.40}")
        return rows
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"baseline={path}: not a benchmark.json ({error!r})") from error


def _file(path: Path) -> Path:
    return path / "benchmark.json" if path.is_dir() else path


def against(rows: Sequence[Row], baseline: Sequence[Row]) -> dict[Row, tuple[float, float, float]]:
    """Of the rows that are in both: how many times as good as before, with its 95 % interval.

    Without those of which one measured nothing: a process that took no more memory.
    """
    before = {row.identity: row for row in baseline}
    found = {}
    for row in rows:
        if row.identity in before and all([*row.samples, *before[row.identity].samples]):
            old = before[row.identity].samples
            better = (row.samples, old) if is_rate(row) else (old, row.samples)
            found[row] = ratio_interval(*better)
    return found


def is_rate(row: Row) -> bool:
    """Whether more of it is better."""
    return row.unit == "%" or row.unit.endswith("/s")


def write(
    rows: Sequence[Row],
    folder: Path,
    arguments: Mapping[str, Any],
    ratios: Mapping[Row, tuple[float, float, float]],
    name: str = "benchmark",
) -> None:
    """<name>.csv, and <name>.json, which has every round and the environment besides."""
    table = [row.values() | _ratio(ratios.get(row)) for row in rows]
    fileio.write_csv(folder / f"{name}.csv", table, list(table[0]))
    fileio.write_json(
        folder / f"{name}.json",
        {
            "environment": rundir.environment(),
            "arguments": dict(arguments),
            "rows": [v | {"samples": r.samples} for v, r in zip(table, rows, strict=True)],
        },
    )


def _ratio(found: tuple[float, float, float] | None) -> dict[str, float | None]:
    names = ("times_baseline", "times_low", "times_high")
    return dict(zip(names, found or (None, None, None), strict=True))


def by_family(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """What belongs together: the parts of a step, the kinds of attention."""
    families: dict[str, list[Row]] = {}
    for row in rows:
        families.setdefault(row.what.partition(":")[0], []).append(row)
    return families


WORDS: dict[str, Callable[[Any], str]] = {  # how a configuration is named
    "device": str,
    "precision": lambda value: f"precision {value}",
    "model": str,
    "vocab_size": lambda value: f"vocabulary {value:,}",
    "batch_size": lambda value: f"batch {value}",
    "context": lambda value: f"context {value}",
    "threads": lambda value: "1 thread" if value == 1 else f"{value} threads",
    **{
        name: lambda value, name=name: f"{name} {value}"  # type: ignore[misc]
        for name in ("compile", "matmul")
    },
}


def in_common(rows: Sequence[Row]) -> str:
    """What is the same for all rows that it makes a difference to."""
    found = {name: {getattr(row.place, name) for row in rows} - {None} for name in WORDS}
    return ", ".join(WORDS[name](*values) for name, values in found.items() if len(values) == 1)


def labels(rows: Sequence[Row]) -> Callable[[Row], str]:
    """Names a row by whatever differs among ``rows``; by its model where nothing does."""
    differing = [
        name for name in WORDS if len({getattr(row.place, name) for row in rows} - {None}) > 1
    ]

    def label(row: Row) -> str:
        values = {name: getattr(row.place, name) for name in differing or ["model"]}
        return ", ".join(WORDS[name](v) for name, v in values.items() if v is not None)

    return label


def conditions_that_differ(path: Path) -> list[str]:
    """What of the environment of an earlier benchmark.json is not as it is here."""
    before = fileio.read_json(_file(path)).get("environment", {})
    now = rundir.environment()
    names = ("platform", "processor", "cpu_count", "python", "packages")
    return [name for name in names if before.get(name) != now[name]]
