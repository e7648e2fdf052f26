"""Tokens per second, MFU and memory on a CUDA card, for each size and vocabulary.

python experiments/speed/gpu.py                                  about ten minutes
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from tinygpt import benchmark, cli, fileio
from tinygpt.config import key
from tinygpt.measuring import results
from tinygpt.measuring.results import Row

HERE = Path(__file__).resolve().parent
USAGE = """\
python experiments/speed/gpu.py [key=value ...]

model=tiny,small,medium,large vocab_size=4096,50257 batch_size=64 precision=bf16-mixed
compile=off,on rounds=10 steps=20 seed=42
output_dir=FOLDER       where to write gpu.csv, gpu.json and gpu.md; default: beside this file
"""


@dataclass
class Arguments(benchmark.Arguments):
    measure: list[str] = key(["train", "memory"], among=("train", "memory"))  # noqa: RUF009
    model: list[str] = key(["tiny", "small", "medium", "large"])  # noqa: RUF009
    vocab_size: list[int] = key([4096, 50257], least=2)  # noqa: RUF009
    batch_size: int = key(64, least=1)
    precision: str = "bf16-mixed"
    accelerator: str = key("cuda", among=("cuda",))
    compile: list[str] = key(["off", "on"])  # noqa: RUF009
    steps: int = key(20, least=1)
    output_dir: str = str(HERE)


def measured(arguments: Arguments, console: Console) -> list[Row]:
    """One size and vocabulary after the other, so that all of its processes fit on the card."""
    rows: list[Row] = []
    for model, vocab_size in itertools.product(arguments.model, arguments.vocab_size):
        some = dataclasses.replace(arguments, model=[model], vocab_size=[vocab_size])
        found = benchmark.measure(some, console)
        benchmark.show(found, {}, console)
        rows += found
    return rows


def table(rows: Sequence[Row]) -> str:
    """A line a size and vocabulary, three columns each way of compiling, in Markdown."""
    places = [row.place for row in rows if row.what == "training"]
    ways = list(dict.fromkeys(place.compile for place in places))
    lines = list(dict.fromkeys((place.model, place.vocab_size) for place in places))
    names = ["model", "vocabulary"]
    for way in ways:
        names += [f"compile {way}: tokens/s", "MFU", "peak memory"]
    out = [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    found = {
        (row.what, row.place.model, row.place.vocab_size, row.place.compile): row.median
        for row in rows
        if row.clock != "cpu"
    }
    for model, vocab_size in lines:
        cells = [f"`{model}`", f"{vocab_size:,}"]
        for way in ways:
            rate, mfu, memory = (
                found[what, model, vocab_size, way] for what in ("training", "MFU", "peak memory")
            )
            cells += [f"{rate:,.0f}", f"{mfu:.0f} %", f"{memory / 1e3:.1f} GB"]
        out.append(f"| {' | '.join(cells)} |")
    return "\n".join(out) + "\n"


@cli.one_line_errors
def main() -> None:
    arguments = cli.read_arguments(Arguments, sys.argv[1:], USAGE)
    benchmark.settings_of(arguments)  # a mistake is found before anything is timed
    console, folder = Console(), Path(arguments.output_dir)
    rows = measured(arguments, console)
    results.write(rows, folder, vars(arguments), {}, name="gpu")
    card = rows[0].place
    text = f"{card.device}, {card.precision}, batch {arguments.batch_size} × {card.context}\n\n"
    text += table(rows)
    fileio.write_text(folder / "gpu.md", text)
    print(f"\n{text}")


if __name__ == "__main__":
    main()
