"""Report evaluations in files, in tables on a terminal of 80 columns, and in figures."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tinygpt import fileio
from tinygpt.evaluating.options import find, names_of
from tinygpt.runs import rundir
from tinygpt.scaling import drawing
from tinygpt.scaling.runs import SETTINGS, load_runs
from tinygpt.training.console import short

if TYPE_CHECKING:
    from tinygpt.evaluating.runs import Evaluation

VALIDATION = ("final_val_loss", "final_val_bits_per_byte", "final_val_accuracy")
OUTCOMES = ("status", *VALIDATION, "test_loss")


def compare(*runs: str | Path) -> pd.DataFrame:
    """Return one row per run with its size, budget, losses, and the keys in which runs differ.

    All values are those that the runs recorded.  ``runs`` are run folders or folders of runs.
    Raises ConfigError.
    """
    table = load_runs(*runs)
    if table.empty:
        find(runs)  # raises an error that says why
    names = names_of([Path(folder) for folder in table["folder"]])
    known = [name for name in (*rundir.SIZES, *OUTCOMES) if name in table]
    settings = ["seed", *(name for name in SETTINGS if name not in rundir.SIZES)]
    settings += [str(name) for name in table if str(name).startswith("config.")]
    differing = [name for name in settings if name in table and table[name].map(repr).nunique() > 1]
    shown = table[[*known, *differing]].set_axis(pd.Index(names, name="run"))
    return shown.rename(columns=lambda name: str(name).removeprefix("config."))


DEFINITIONS = {
    "loss": "nats per token, every target of the text once",
    "accuracy": "share of targets that are the likeliest token; _top5: one of the five likeliest",
    "bits_per_byte": "of the text, ends of documents included in the bits",
    "gain": "ln(vocabulary) - loss: nats per token below a uniform guess",
    "gain_per_pflop": "gain / (exact training FLOPs up to the checkpoint / 1e15)",
    "gain_per_million_parameters": "gain / (all parameters / 1e6)",
    "gain_per_hour": "gain / hours of training up to the checkpoint, on the run's own machine",
    "tokens_to_1_percent": "training tokens at the run's first evaluation whose validation loss is "
    "within 1 % of its last one",
    "by_position": "mean loss at each position of windows of full length, without overlap",
    "int8": "weights of all linear layers rounded to int8, one scale per row; nothing else",
    "pruned": "that share of the weights of all linear layers set to zero, the smallest of all",
    "size_bytes": "all parameters, tied ones once; int8: with the scales; pruned: a bit for each "
    "weight of a linear layer, then those that are not zero",
}


def write(
    made: Sequence[Evaluation], folder: Path, arguments: dict[str, Any], refused: Sequence[str]
) -> list[Path]:
    """Write evaluation_results.csv and .json; ``refused`` has a line for each run not scored.

    A value that is not finite becomes an empty field and null.
    """
    columns = list(dict.fromkeys(name for one in made for name in one.row))
    rows = [{name: _finite(one.row.get(name)) for name in columns} for one in made]
    paths = [folder / "evaluation_results.csv", folder / "evaluation_results.json"]
    fileio.write_csv(paths[0], rows, columns)
    for row, one in zip(rows, made, strict=True):
        row["by_position"] = one.positions and {
            "windows": one.positions.windows,
            "loss": [_finite(value) for value in one.positions.loss.tolist()],
            "standard_error": [_finite(value) for value in one.positions.error.tolist()],
        }
    results = {
        "definitions": DEFINITIONS,
        "arguments": arguments,
        "environment": rundir.environment(),
        "results": rows,
        "not_scored": list(refused),
    }
    fileio.write_json(paths[1], results)
    return paths


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


ACROSS = 5  # models side by side; if there are more, each gets a row
METRICS = {  # name and format of each value shown; those without a format as 1.23M
    "train_tokens": ("training tokens", ""),
    "loss": ("loss, nats per token", ",.4f"),
    "irreducible_loss_exact": ("  exact floor", ",.4f"),
    "perplexity": ("perplexity", ",.3f"),
    "accuracy": ("accuracy", ".2%"),
    "accuracy_top5": ("  among the first 5", ".2%"),
    "bits_per_byte": ("bits per byte", ",.4f"),
    "bits_per_char": ("bits per character", ",.4f"),
    "size_bytes": ("size, bytes", ""),
    "flops_exact": ("training FLOPs", ".3g"),
    "hours": ("training hours", ".3g"),
    "gain": ("gain on a uniform guess, nats", ",.3f"),
    "gain_per_pflop": ("  per PFLOP", ".3g"),
    "gain_per_million_parameters": ("  per million parameters", ".3g"),
    "gain_per_hour": ("  per hour", ".3g"),
    "tokens_to_1_percent": ("tokens to 1 % of final loss", ""),
    "steps_to_1_percent": ("steps to 1 % of final loss", ",.0f"),
}
IN_A_ROW = {
    "model_parameters": ("params", ""),
    "train_tokens": ("tokens", ""),
    "flops_exact": ("FLOPs", ".2g"),
    "loss": ("loss", ",.4f"),
    "accuracy": ("acc.", ".2%"),
    "bits_per_byte": ("bits/byte", ",.4f"),
}
LABELS = {  # of facts, tasks and samples; other names are shown as they are
    "head": "head: ranks to 100",
    "middle": "middle: to 1,000",
    "tail": "tail: beyond",
    "heldout": "not in the corpus",
    "accuracy_norm": "accuracy by bytes",
    "nats": "nats per answer",
    "left_out": "left out: too long",
    "prompts_cut": "prompts cut",
}
SHARES = {"accuracy", "accuracy_norm", "head", "middle", "tail", "heldout", "chance", "repetition"}
UNLESS_ZERO = {"left_out", "prompts_cut", "unknown_tokens"}


def show(made: Sequence[Evaluation], console: Console) -> None:
    """Print the models of one run side by side, of several runs in rows, and how runs differ."""
    _show_notes(made, console)
    whole = [one for one in made if one.is_whole]
    folders = list(dict.fromkeys(one.scores["folder"] for one in made))
    if len(folders) == 1 and len(made) <= ACROSS:
        rows = [
            [word, *(_number(one.scores[name], spec) for one in made)]
            for name, (word, spec) in METRICS.items()
            if any(one.scores[name] is not None for one in made)
        ]
        _print(console, ["", *_heads(made)], rows)
    else:
        scores = [one.scores for one in made]
        marks = ["run", *_varying(scores, "checkpoint", "variant", "text")]
        rows = [
            [str(row[mark]) for mark in marks]
            + [_number(row[name], spec) for name, (_, spec) in IN_A_ROW.items()]
            for row in scores
        ]
        heads = [*marks, *(word for word, _ in IN_A_ROW.values())]
        _print(console, heads, rows, len(marks), no_wrap=True)
    if len(whole) <= ACROSS:
        for name in dict.fromkeys(name for one in whole for name in one.asked):
            _show_asked(name, whole, console)
        _show_positions(whole, console)
    if len(folders) > 1:
        _show_differences(folders, console)


def _show_notes(made: Sequence[Evaluation], console: Console) -> None:
    first = made[0].scores
    stride = f"stride {first['stride']}" if first["stride"] else "windows as in training"
    is_one = len({one.scores["text_fingerprint"] for one in made}) == 1
    words = f"{first['scored_tokens']:,} tokens" if is_one else "each run by its own tokens"
    precision = ", ".join(dict.fromkeys(one.scores["precision"] for one in made))
    about = f"{first['text']}: {words}, {stride}; {first['device']}, precision {precision}"
    console.print(Text(about))
    if not is_one:
        console.print("note: compare losses on the same tokens, bits per byte on the same text")
    continued = dict.fromkeys(one.scores["run"] for one in made if one.scores["init_from"])
    if continued:
        names = ", ".join(continued)
        console.print(Text(f"note: FLOPs, hours and gain of {names} exclude the cost of init_from"))
    unknown = {one.scores["run"]: one.scores["unknown_tokens"] for one in made}
    for count in dict.fromkeys(filter(None, unknown.values())):
        whose = ", ".join(run for run, found in unknown.items() if found == count)
        console.print(Text(f"{count:,} characters are unknown to the tokenizer of {whose}"))
    console.print()


def _show_asked(name: str, whole: Sequence[Evaluation], console: Console) -> None:
    """Print facts, a task or samples, the latter with the measures of real text in brackets."""
    title = {"samples": "samples (real text)", "facts": "facts of the corpus"}.get(name, name)
    heads = [h for h, one in zip(_heads(whole), whole, strict=True) if name in one.asked]
    columns = [one.asked[name] for one in whole if name in one.asked]
    rows = []
    for key in dict.fromkeys(key for values in columns for key in values):
        is_part = key.endswith(("_stderr", "_real", "_asked"))  # of the cell of another key
        if is_part or (key in UNLESS_ZERO and not any(values.get(key) for values in columns)):
            continue
        label = LABELS.get(key, key.replace("_", " "))
        rows.append([f"  {label}", *(_measure(values, key) for values in columns)])
    console.print()
    _print(console, [title, *heads], rows)


def _measure(values: dict[str, Any], key: str) -> str:
    value, error, real = (values.get(key + end) for end in ("", "_stderr", "_real"))
    if value is None or isinstance(value, int):
        return _number(value, ",")
    size, unit, spec = (100, " %", ".1f") if key in SHARES else (1, "", ".3f")
    cell = f"{size * value:{spec}}"
    cell += f" ± {size * error:{spec}}" if error is not None else ""
    return cell + unit + (f" ({size * real:{spec}}{unit})" if real is not None else "")


def _show_positions(whole: Sequence[Evaluation], console: Console) -> None:
    bands = [one.positions.bands() if one.positions else [] for one in whole]
    losses = [{(start, end): loss for start, end, loss in some} for some in bands]
    rows = []
    for start, end in sorted(set().union(*losses)):  # contexts may differ in their last band
        label = f"  {start} to {end}" if end > start else f"  {start}"
        rows.append([label, *(_number(some.get((start, end)), ",.4f") for some in losses)])
    if rows:
        console.print()
        _print(console, ["loss by position", *_heads(whole)], rows)


def _show_differences(folders: Sequence[str], console: Console) -> None:
    """Print the keys in which the runs differ, with their values if there are few runs."""
    table = compare(*folders)
    table = table.drop(columns=[*rundir.SIZES, *OUTCOMES], errors="ignore")
    console.print()
    if len(folders) > ACROSS:
        console.print(Text(f"they differ in {', '.join(map(str, table)) or 'nothing'}"))
    elif table.empty:
        console.print(Text("their configurations do not differ"))
    else:
        rows = [[str(name), *map(_setting, table[name])] for name in table]
        _print(console, ["differs", *map(str, table.index)], rows)


def _setting(value: Any) -> str:
    """Return a value as it was set; pandas turns integers into floats if some runs lack them."""
    if value is None or value != value:
        return "–"
    return f"{value:.0f}" if isinstance(value, float) and value.is_integer() else str(value)


def _number(value: Any, spec: str) -> str:
    if value is None:
        return ""
    return f"{value:{spec}}".replace("%", " %") if spec else short(value)


def _heads(made: Sequence[Evaluation]) -> list[str]:
    """Return names of models, made of what differs between them."""
    rows = [dict(one.scores) for one in made]
    for row in rows:
        if row["variant"] == "untrained":
            del row["checkpoint"]
    names = _varying(rows, "run", "checkpoint", "variant")
    return [" ".join(row[n] for n in names if n in row) or "trained" for row in rows]


def _varying(rows: Sequence[dict[str, Any]], *names: str) -> list[str]:
    """Return the names whose values differ between the rows that have them."""
    return [name for name in names if len({row[name] for row in rows if name in row}) > 1]


def _print(
    console: Console,
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    left: int = 1,
    no_wrap: bool = False,
) -> None:
    """Print a table in which all columns but the first ``left`` ones hold numbers."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in heads[:left]:
        table.add_column(Text(name), overflow="fold")
    for name in heads[left:]:
        table.add_column(Text(name), justify="right", overflow="fold", no_wrap=no_wrap)
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)


COLOURS = [drawing.BLUE, drawing.ORANGE, drawing.GREEN]
COLOURS += [drawing.PURPLE, drawing.SKY, drawing.RED]
RING: Any = {"markersize": 8, "fillstyle": "none"}
MOST_NAMED = 16  # runs in a legend; if there are more, it is left out
MARKS = 40  # points of a line by position; neighbours are averaged to get no more


def draw(made: Sequence[Evaluation], folder: Path) -> list[Path]:
    """Draw the figures that have data, and return their paths."""
    whole = [one for one in made if one.is_whole]
    figures = {
        "loss_by_position": (_draw_positions, any(one.positions for one in whole)),
        "comparison": (_draw_costs, len({one.scores["run"] for one in made}) > 1),
        "convergence": (_draw_curves, any(len(_validation(one)) > 1 for one in whole)),
    }
    paths = [folder / f"{name}.png" for name, (_, is_drawn) in figures.items() if is_drawn]
    with mpl.rc_context(drawing.STYLE):
        for path in paths:
            width = drawing.PAGE if path.stem == "comparison" else 1.4 * drawing.COLUMN
            figure = Figure(figsize=(width, 0.9 * drawing.COLUMN))
            figures[path.stem][0](figure, whole)
            with fileio.replacing(path) as temporary:
                figure.savefig(temporary, format="png")
    return paths


def _draw_positions(figure: Figure, made: Sequence[Evaluation]) -> None:
    lasts = {one.scores["run"]: one for one in made}
    made = [one for one in (lasts.values() if len(lasts) > 1 else made) if one.positions]
    names = _varying([one.scores for one in made], "run", "checkpoint")
    axes = _coloured(figure.subplots(), len(made))
    for one in made:
        assert one.positions is not None
        loss, error = one.positions.loss, one.positions.error
        edges = np.unique(np.geomspace(1, len(loss) + 1, MARKS).round().astype(int)) - 1
        parts = list(itertools.pairwise(edges))
        x = [np.sqrt((a + 1) * b) for a, b in parts]
        y = np.array([loss[a:b].mean() for a, b in parts])
        half = np.array([np.sqrt(np.square(error[a:b]).sum()) / (b - a) for a, b in parts])
        label = " ".join(str(one.scores[name]) for name in names)
        (line,) = axes.plot(x, y, "-o", markersize=2, label=label)
        axes.fill_between(x, y - half, y + half, color=line.get_color(), alpha=0.25, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("position in the context (tokens seen)")
    axes.set_ylabel("loss (nats per token) ± standard error")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    if len(made) > 1:
        _legend(axes, len(made))


def _draw_costs(figure: Figure, made: Sequence[Evaluation]) -> None:
    columns = {"model_parameters": "parameters", "flops_exact": "training compute (FLOPs)"}
    runs = list(dict.fromkeys(one.scores["run"] for one in made))
    for axes, (column, label) in zip(figure.subplots(1, 2), columns.items(), strict=True):
        _coloured(axes, len(runs))
        for run in runs:
            scores = [one.scores for one in made if one.scores["run"] == run]
            points = sorted((row[column], row["loss"]) for row in scores)
            axes.plot(*zip(*points, strict=True), "-o", markersize=4, label=run)
        drawing.log_axes(axes, label, "loss (nats per token)")
    _legend(axes, len(runs))


def _draw_curves(figure: Figure, made: Sequence[Evaluation]) -> None:
    """Draw validation losses in training, with a ring where they come within 1 % of the last."""
    runs = list({one.scores["run"]: one for one in made}.values())
    axes = _coloured(figure.subplots(), len(runs))
    for one in runs:
        curve = {tokens: loss for tokens, loss in _validation(one).items() if tokens > 0}
        label = one.scores["run"] if len(runs) > 1 else "validation loss"
        (line,) = axes.plot([*curve], [*curve.values()], "-o", markersize=2, label=label)
        if near := one.scores["tokens_to_1_percent"]:
            axes.plot(near, curve[near], "o", color=line.get_color(), **RING)
    axes.plot([], [], "o", color=drawing.GREY, label="within 1 % of its last", **RING)
    floors = {one.scores["irreducible_loss_exact"] for one in runs}
    if len(floors) == 1 and None not in floors and made[0].scores["text"] == "val":
        axes.axhline(floors.pop(), color=drawing.GREY, linestyle="--", label="exact floor")
    axes.set(xlabel="training tokens", ylabel="validation loss (nats per token)", yscale="log")
    drawing.log_ticks(axes.yaxis)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1e6:g}M")
    _legend(axes, len(runs))


def _validation(one: Evaluation) -> dict[float, float]:
    """Return the validation loss of training by the tokens seen."""
    return {row["tokens"]: row["val_loss"] for row in one.curve if "val_loss" in row}


def _coloured(axes: Axes, lines: int) -> Axes:
    colours = COLOURS
    if lines > len(COLOURS):
        colours = [to_hex(c) for c in mpl.colormaps["viridis"](np.linspace(0, 1, lines))]
    axes.set_prop_cycle(color=colours)
    return axes


def _legend(axes: Axes, lines: int) -> None:
    """Put a short legend into the emptiest corner, a longer one beside the axes."""
    if lines <= len(COLOURS):
        drawing.legend(axes)
    elif lines <= MOST_NAMED:
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), borderaxespad=0.2)
