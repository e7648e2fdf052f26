"""What a run says: lines, a bar, the table at its end."""

from __future__ import annotations

import contextlib
import logging
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)

from tinygpt import fileio, rundir, signals

log = logging.getLogger("tinygpt")


def short(number: float) -> str:
    """1234567 → 1.23M."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.0f}"


def clock(seconds: float) -> str:
    """75 → 1:15."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def make_bar(console: Console) -> Progress:
    """Redrawn four times a second by its own thread, whatever the speed of the steps."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TextColumn("{task.fields[loss]}  {task.fields[speed]}", markup=False),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        refresh_per_second=4,
    )


class _ConsoleHandler(logging.Handler):
    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        self.console.print(record.getMessage(), markup=False, highlight=False, soft_wrap=True)


class _LogFile(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        """A line that cannot be written is an error as any other; logging would show its stack."""
        with fileio.naming(Path(self.baseFilename)):
            raise


@contextlib.contextmanager
def logging_to(console: Console, run: rundir.RunDir) -> Iterator[None]:
    """What is said goes to the console and, with the time, to run.log."""
    file = _LogFile(run.log, encoding="utf-8", errors="backslashreplace")
    file.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    handlers: list[logging.Handler] = [_ConsoleHandler(console), file]
    log.setLevel(logging.INFO)
    log.propagate = False
    for handler in handlers:
        log.addHandler(handler)
    try:
        yield
    except Exception:  # who called says it in a line; the log has the whole of it
        with contextlib.suppress(OSError), run.log.open("a", encoding="utf-8") as trace:
            trace.write(traceback.format_exc())
        raise
    except signals.Stopped as stopped:  # the same
        log.removeHandler(handlers[0])
        log.info(stopped.line)
        raise
    finally:
        for handler in handlers:
            log.removeHandler(handler)
            with contextlib.suppress(OSError):  # which has been said
                handler.close()


@contextlib.contextmanager
def preparing(console: Console) -> Iterator[Callable[[str, int, int | None], None]]:
    """A bar while the corpus is read; nothing where it comes from the cache."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
    )
    seen = console.is_interactive or console.is_jupyter  # elsewhere it leaves an empty line
    with Progress(*columns, console=console, transient=True, disable=not seen) as bar:
        task = bar.add_task("preparing data", total=None)

        def show(what: str, done: int, total: int | None) -> None:
            if bar.tasks[0].description != what:  # of another speed
                bar.reset(task, description=what)
            bar.update(task, completed=done, total=total)

        yield show


def report_finished(
    run: rundir.RunDir, results: dict[str, Any], console: Console
) -> dict[str, Any]:
    console.print(
        f"already {results['status']}: {run.path} (val loss {_number(results['final_val_loss'])}); "
        "force=true trains anew",
        highlight=False,
        soft_wrap=True,
    )
    return results


def _best(run: rundir.RunDir, results: dict[str, Any]) -> dict[str, str]:
    """Return a line about the best checkpoint of a run that ended behind it."""
    step, last, path = (
        results["best_val_step"],
        results["total_steps"],
        run.checkpoints / "best.ckpt",
    )
    loss = f"val loss {_number(results['best_val_loss'])} at step {step}"
    if step is None or step >= last:
        return {}
    if not path.exists():
        return {"best": f"{loss}, before training"} if step == 0 else {}
    return {"best": f"{path}: {loss}; final.ckpt is of step {last}"}


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def print_summary(run: rundir.RunDir, results: dict[str, Any], console: Console) -> None:
    """What was trained, on what, to which loss, where it is, what to try next."""
    floor = results["irreducible_loss_exact"]
    initial, final = _number(results["initial_val_loss"]), _number(results["final_val_loss"])
    speed = short(results["tokens_per_second"] or 0)
    seen = {"steps skipped": "skipped_steps", "spikes of the gradient": "grad_norm_spikes"}
    counts = [f", {words}: {results[name]}" for words, name in seen.items() if results[name]]
    lines = {
        "trained": f"{short(results['model_parameters'])} parameters on "
        f"{short(results['train_tokens'])} tokens of {results['dataset']} in "
        f"{clock(results['seconds_training'])}, {speed} tokens/s",
        "status": results["status"] + "".join(counts),
        "val loss": f"{initial} → {final} nats per token"
        + (f", exact floor {floor:.4f}" if floor else ""),
        "": f"perplexity {_number(results['final_val_perplexity'])}, accuracy "
        f"{_number(results['final_val_accuracy'])}, bits per byte "
        f"{_number(results['final_val_bits_per_byte'])}",
        "test loss": _number(results["test_loss"]),
        **_best(run, results),
        "files": str(run.path),
        "next": f"tensorboard --logdir {run.path.parent.parent}",
    }
    console.print()
    for name, text in lines.items():
        console.print(f"{name:<10} {text}", highlight=False, markup=False, soft_wrap=True)
