"""Print what a run is and does: lines, progress bars, and a summary at the end."""

from __future__ import annotations

import contextlib
import logging
import textwrap
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)

from tinygpt import fileio, signals
from tinygpt.config import Config, CustomData, DataConfig
from tinygpt.config.counting import count_parameters
from tinygpt.data.survey import many
from tinygpt.runs import rundir

if TYPE_CHECKING:  # a sweep must report mistakes without importing torch
    from tinygpt.data.datamodule import TokenData
    from tinygpt.training.hardware import Device

log = logging.getLogger("tinygpt")


def short(number: float) -> str:
    """Return a number to three digits: 1234567 → 1.23M, 999960 → 1M."""
    number = float(f"{number:.3g}")
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:g}{letter}"
    return f"{number:.0f}"


def clock(seconds: float) -> str:
    """Return seconds as minutes and seconds: 75 → 1:15."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def folded(line: str, indent: int, width: int = 80) -> str:
    """Return a line as several of at most ``width`` columns, all but the first indented.

    A longer word, such as a path, stays whole.
    """
    shape = textwrap.TextWrapper(width, subsequent_indent=" " * indent)
    shape.break_long_words = shape.break_on_hyphens = False
    return shape.fill(line)


def make_bar(console: Console) -> Progress:
    """Return the progress bar of a training."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:3.0f}%"),
        TextColumn("{task.fields[words]}", markup=False),
    )
    return Progress(*columns, console=console, transient=True, refresh_per_second=4)


class _ConsoleHandler(logging.Handler):
    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        line = record.getMessage()
        if self.console.is_terminal and len(line) > self.console.width:
            line = folded(line, 8, self.console.width)
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)


class _LogFile(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        """Raise the error; logging would print its stack."""
        with fileio.naming(Path(self.baseFilename)):
            raise


@contextlib.contextmanager
def logging_to(console: Console, run: rundir.RunDir) -> Iterator[None]:
    """Log to the console and, with times, to run.log."""
    file = _LogFile(run.log, encoding="utf-8", errors="backslashreplace")
    file.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    handlers: list[logging.Handler] = [_ConsoleHandler(console), file]
    log.setLevel(logging.INFO)
    log.propagate = False
    for handler in handlers:
        log.addHandler(handler)
    try:
        yield
    except Exception:  # the caller prints one line; the log gets the whole traceback
        with contextlib.suppress(OSError), run.log.open("a", encoding="utf-8") as trace:
            trace.write(traceback.format_exc())
        raise
    except signals.Stopped as stopped:  # the caller prints this line, too
        log.removeHandler(handlers[0])
        log.info(stopped.line)
        raise
    finally:
        for handler in handlers:
            log.removeHandler(handler)
            with contextlib.suppress(OSError):  # which has been reported
                handler.close()


@contextlib.contextmanager
def preparing(
    console: Console, data: DataConfig
) -> Iterator[Callable[[str, int, int | None], None]]:
    """Show a bar, or print a line, while a corpus is read; show nothing if it is cached."""
    description = TextColumn("{task.description}", markup=False)
    columns = (SpinnerColumn(), description, BarColumn(), DownloadColumn(), TimeRemainingColumn())
    name = Path(data.path.strip("[]")).name if isinstance(data, CustomData) else data.name
    live = console.is_interactive or console.is_jupyter  # elsewhere a bar leaves an empty line
    with Progress(
        *columns, TextColumn("left"), console=console, transient=True, disable=not live
    ) as bar:
        task, printed = bar.add_task(f"preparing {name}", total=None), False

        def show(what: str, done: int, total: int | None) -> None:
            nonlocal printed
            if not live and not printed:
                printed = True
                console.print(f"preparing {name} …", highlight=False)
            if bar.tasks[0].description != what:  # begins to measure the speed anew
                bar.reset(task, description=what)
            bar.update(task, completed=done, total=total)

        yield show


def log_beginning(
    config: Config,
    run: rundir.RunDir,
    data: TokenData,
    device: Device,
    threads: int,
    resuming: bool,
) -> None:
    """Log the model, the text, the recipe, the machine and the folder of a run."""

    from tinygpt.data import corpora
    from tinygpt.data.survey import Survey

    plan, index, tokenizer = data.plan, data.prepared.index, data.prepared.tokenizer
    assert plan is not None
    sizes = count_parameters(config.model, tokenizer.vocab_size)
    used = data.windows.used_tokens
    lines = [
        f"model   {short(sizes.total)} parameters, {short(sizes.non_embedding)} without "
        f"embeddings; vocabulary {tokenizer.vocab_size:,} ({tokenizer.kind})"
    ]
    if tokenizer.vocab_size < getattr(config.tokenizer, "vocab_size", 0):
        lines.append("note    the text is too short to learn a larger vocabulary from")
    if config.init_from is not None:
        lines.append(f"from    {config.init_from}, with its shape and its tokenizer")
    if tokenizer.convention:
        lines.append(f"text    {tokenizer.convention}")
    lines.append(f"data    {corpora.describe(config.data)}")
    if index.get("survey"):
        lines += [f"        {line}" for line in Survey.read(index["survey"]).lines()]
    notable = {
        "unknown_tokens": "unknown token",
        "empty_documents": "empty document",
        "left_out_documents": "skipped document",
    }
    for name, info in [item for item in index["splits"].items() if item[1]]:
        lines.append(
            f"        {name:<5} {many(info['documents'], 'document'):>18}, "
            f"{short(info['tokens'])} tokens, {info['bytes'] / 1e6:.3g} MB, "
            f"{short(info['characters'])} characters"
        )
        if counts := [many(info[key], words) for key, words in notable.items() if info[key]]:
            lines.append(f"{'':14}{', '.join(counts)}")
    if duplicates := index["duplicates_of_validation_or_test"]:
        copies = many(duplicates, "training document")
        lines.append(f"note    skipped {copies} also found in validation or test")
    lines += [
        f"train   {short(plan.train_tokens)} tokens ({plan.train_tokens / max(1, used):.2g} epochs "
        f"of {short(used)}) in {many(plan.total_steps, 'step')} of {config.train.batch_tokens:,}",
        f"on      {device.accelerator}"
        + (f", {device.world_size} devices" if device.world_size > 1 else "")
        + f", {many(threads, 'thread')}, precision {device.precision}",
        f"folder  {run.path}{', resuming' if resuming else ''}",
    ]
    if (every := data.val_every()) > 1:
        part = short(index["splits"]["val"]["tokens"] / every)
        lines.insert(-1, f"val     about {part} tokens in between, all at the start and the end")
    for line in lines:
        log.info("%s", line)


def report_finished(
    run: rundir.RunDir, results: dict[str, Any], console: Console
) -> dict[str, Any]:
    """Print that the run has ended before, and return its results."""
    console.print(
        f"already {results['status']}: val loss {_number(results['final_val_loss'])}; force=true "
        f"trains it again\nfolder  {run.path}",
        highlight=False,
        soft_wrap=True,
    )
    return results


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def print_summary(run: rundir.RunDir, results: dict[str, Any], console: Console) -> None:
    """Print what was trained, its losses, its folder and what to do next."""
    floor = results["irreducible_loss_exact"]
    initial, final = _number(results["initial_val_loss"]), _number(results["final_val_loss"])
    events = {"skipped step": "skipped_steps", "gradient spike": "grad_norm_spikes"}
    counts = [f", {many(results[name], what)}" for what, name in events.items() if results[name]]
    lines = {
        "trained": f"{short(results['model_parameters'])} parameters on "
        f"{short(results['train_tokens'])} tokens of {results['dataset']} in "
        f"{clock(results['seconds_training'])}, "
        f"{short(results['tokens_per_second'] or 0)} tokens/s",
        "status": results["status"] + "".join(counts),
        "val loss": f"{initial} → {final} nats per token"
        + (f", exact floor {floor:.4f}" if floor else ""),
        "": f"perplexity {_number(results['final_val_perplexity'])}, accuracy "
        f"{_number(results['final_val_accuracy'])}, bits per byte "
        f"{_number(results['final_val_bits_per_byte'])}",
        "test loss": _number(results["test_loss"]),
    }
    step, last = results["best_val_step"], results["total_steps"]
    best = run.checkpoints / "best.ckpt"
    if step is not None and step < last:  # the final loss is not the best one
        loss = f"val loss {_number(results['best_val_loss'])} at step {step}"
        if best.exists():
            lines["best"] = f"{best}: {loss}; final.ckpt is of step {last}"
        elif step == 0:
            lines["best"] = f"{loss}, before training"
    lines |= {"files": str(run.path), "next": f"tensorboard --logdir {run.path.parent.parent}"}
    console.print()
    for name, text in lines.items():
        console.print(f"{name:<10} {text}", highlight=False, markup=False, soft_wrap=True)
