"""Tokens per second, MFU and memory on a CUDA card, for each size and vocabulary; then stacks.

python experiments/speed/gpu.py                                  about ten minutes
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from tinygpt import benchmark, cli, fileio
from tinygpt.config import Config, key
from tinygpt.measuring import results
from tinygpt.measuring.results import Row

HERE = Path(__file__).resolve().parent
USAGE = """\
python experiments/speed/gpu.py [key=value ...]

model=tiny,small,medium,large vocab_size=4096,50257 batch_size=64 precision=bf16-mixed
compile=off,whole,graphs rounds=10 steps=20 seed=42
stack=1,4,16,64 stack_batch_size=8      runs of a stack, and the sequences a step of each
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
    compile: list[str] = key(["off", "whole", "graphs"])  # noqa: RUF009
    stack: list[int] = key([1, 4, 16, 64], least=1)  # noqa: RUF009
    stack_batch_size: int = key(8, least=1)
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


def stacked_rates(arguments: Arguments) -> list[dict[str, Any]]:
    """Tokens per second of all runs of a stack together: its pass, clipping and optimizer step."""
    rows = []
    for model, vocab_size in itertools.product(arguments.model, arguments.vocab_size):
        words = [f"model={model}", f"hardware.accelerator={arguments.accelerator}"]
        config = cli.compose_config([*words, f"train.precision={arguments.precision}"])
        for size in arguments.stack:
            rate = _stacked_rate(config, vocab_size, size, arguments)
            rows.append({"model": model, "vocab_size": vocab_size, "stack": size, "rate": rate})
    return rows


def _stacked_rate(config: Config, vocab_size: int, size: int, arguments: Arguments) -> float | None:
    """The median of all rounds; None where the card has too little memory."""
    import torch

    from tinygpt.measuring.training import clock_of
    from tinygpt.model.gpt import GPT
    from tinygpt.training.calibration import AUTOCAST
    from tinygpt.training.optim import make_optimizer
    from tinygpt.training.session import open_machine
    from tinygpt.training.stacked import StackedAdamW, StackedGPT

    device = open_machine(config)
    clock, dtype = clock_of(device), AUTOCAST.get(device.precision)
    shape = (size, arguments.stack_batch_size, config.model.max_seq_len + 1)
    tokens = torch.randint(vocab_size, shape, device=device.accelerator)
    models = [GPT(config.model, vocab_size).to(device.accelerator) for _ in range(size)]
    optimizers = [make_optimizer(model, config.optim, fused=True) for model in models]
    for optimizer in optimizers:
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    stacked = StackedGPT(models)
    stepper = StackedAdamW(stacked, optimizers)

    def step() -> None:
        with torch.autocast(device.accelerator, dtype, enabled=dtype is not None):
            losses = stacked.losses(tokens[..., :-1], tokens[..., 1:])
        torch.autograd.backward(losses.sum())
        stepper.clip(config.train.grad_clip_norm)
        stepper.step()
        stepper.zero_grad()

    try:
        step()
        rates = []
        for _ in range(arguments.rounds):
            clock.start()
            for _ in range(arguments.steps):
                step()
            lap = clock.lap(arguments.steps * tokens[..., 1:].numel())
            rates.append(lap.amount / lap.wall)
    except torch.OutOfMemoryError:
        return None
    return statistics.median(rates)


def stack_table(rows: Sequence[dict[str, Any]], arguments: Arguments) -> str:
    """In Markdown: a line a size and vocabulary, a column a size of the stack."""
    names = ["model", "vocabulary", *(f"stack of {size}: tokens/s" for size in arguments.stack)]
    out = [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    for (model, vocab_size), some in itertools.groupby(
        rows, lambda row: (row["model"], row["vocab_size"])
    ):
        rates = [row["rate"] for row in some]
        cells = [
            "out of memory"
            if rate is None
            else f"{rate:,.0f}" + (f" (×{rate / rates[0]:.1f})" if rates[0] else "")
            for rate in rates
        ]
        out.append(f"| `{model}` | {vocab_size:,} | {' | '.join(cells)} |")
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
    stacks = stacked_rates(arguments)
    text += f"\nStacked, {arguments.stack_batch_size} × {card.context} a run\n\n"
    text += stack_table(stacks, arguments)
    fileio.write_json(folder / "stacks.json", stacks)
    fileio.write_text(folder / "gpu.md", text)
    print(f"\n{text}")


if __name__ == "__main__":
    main()
