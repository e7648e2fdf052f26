"""An evaluation on a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tinygpt import rundir
from tinygpt.evaluating.results import OUTCOMES, compare
from tinygpt.evaluating.runs import Evaluation
from tinygpt.training.console import short

ACROSS = 5  # models that stand side by side; more are a row each
Format = Callable[[Any], str]


def _rounded(digits: int) -> Format:
    return lambda value: f"{value:,.{digits}f}"


FOUR = _rounded(4)


def _percent(value: Any) -> str:
    return f"{100 * value:.2f} %"


FORMATS: dict[str, tuple[str, Format]] = {  # what is shown of a row, in this order
    "train_tokens": ("training tokens", short),
    "loss": ("loss, nats per token", FOUR),
    "irreducible_loss_exact": ("  exact floor", FOUR),
    "perplexity": ("perplexity", _rounded(3)),
    "accuracy": ("accuracy", _percent),
    "accuracy_top5": ("  among the first 5", _percent),
    "bits_per_byte": ("bits per byte", FOUR),
    "bits_per_char": ("bits per character", FOUR),
    "size_bytes": ("size, bytes", short),
    "flops_exact": ("training FLOPs", lambda value: f"{value:.3g}"),
    "hours": ("training hours", lambda value: f"{value:.3g}"),
    "gain": ("gain on a uniform guess, nats", _rounded(3)),
    "gain_per_pflop": ("  per PFLOP", lambda value: f"{value:.3g}"),
    "gain_per_million_parameters": ("  per million parameters", lambda value: f"{value:.3g}"),
    "gain_per_hour": ("  per hour", lambda value: f"{value:.3g}"),
    "tokens_to_1_percent": ("tokens to 1 % of final loss", short),
    "steps_to_1_percent": ("steps to 1 % of final loss", _rounded(0)),
}
WORDS = {  # what is asked besides; what is not here is shown by its own name
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
WHERE_ANY = {"left_out", "prompts_cut", "unknown_tokens"}  # shown where they are not 0


def show(made: Sequence[Evaluation], paths: Sequence[Path], console: Console) -> None:
    first = made[0].scores
    stride = f"stride {first['stride']}" if first["stride"] else "windows as in training"
    is_one = len({one.scores["text_fingerprint"] for one in made}) == 1
    words = f"{first['scored_tokens']:,} tokens" if is_one else "each run by its own tokens"
    about = f"{first['text']}: {words}, {stride}"
    precision = ", ".join(dict.fromkeys(one.scores["precision"] for one in made))
    console.print(Text(f"{about}; {first['device']}, precision {precision}"))
    if not is_one:
        console.print("note: losses compare on the same tokens, bits per byte on the same text")
    begun = dict.fromkeys(one.scores["run"] for one in made if one.scores["init_from"])
    if begun:
        line = f"note: FLOPs, hours and gain of {', '.join(begun)} are without what init_from cost"
        console.print(Text(line))
    unknown = {one.scores["run"]: one.scores["unknown_tokens"] for one in made}
    for count in dict.fromkeys(filter(None, unknown.values())):
        whose = ", ".join(run for run, found in unknown.items() if found == count)
        console.print(Text(f"{count:,} characters are unknown to the tokenizer of {whose}"))
    console.print()
    whole = [one for one in made if one.is_whole]
    if len(paths) == 1 and len(made) <= ACROSS:
        _down(made, console)
    else:
        _rows(made, console)
    if len(whole) <= ACROSS:
        for name in dict.fromkeys(name for one in whole for name in one.asked):
            _asked(name, whole, console)
        _by_position(whole, console)
    if len(paths) > 1:
        _differences(paths, console)


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for n, name in enumerate(columns):
        table.add_column(Text(name), justify="right" if n else "left", overflow="fold")
    return table


def _heads(made: Sequence[Evaluation]) -> list[str]:
    """Models by what is not the same of all."""
    names = ("run", "checkpoint", "variant")
    several = [n for n in names if len({one.scores[n] for one in made if _has(one, n)}) > 1]
    return [" ".join(one.scores[n] for n in several if _has(one, n)) or "trained" for one in made]


def _has(one: Evaluation, name: str) -> bool:
    return not (name == "checkpoint" and one.scores["variant"] == "untrained")


def _down(made: Sequence[Evaluation], console: Console) -> None:
    """Metrics down the side, a column a model."""
    table = _table("", *_heads(made))
    for name, (word, shown) in FORMATS.items():
        _line(table, word, [one.scores[name] for one in made], shown)
    console.print(table)


def _line(table: Table, word: str, values: Sequence[Any], shown: Format) -> None:
    if any(value is not None for value in values):
        cells = ["" if value is None else shown(value) for value in values]
        table.add_row(Text(word), *map(Text, cells))


def _asked(name: str, made: Sequence[Evaluation], console: Console) -> None:
    """The facts, a task, or the samples with the same of real text in brackets."""
    title = {"samples": "samples (real text)", "facts": "facts of the corpus"}.get(name, name)
    pairs = list(zip(_heads(made), made, strict=True))
    table = _table(title, *(head for head, one in pairs if name in one.asked))
    found = [one.asked[name] for one in made if name in one.asked]
    for key in dict.fromkeys(key for values in found for key in values):
        is_other = key.endswith(("_stderr", "_real", "_asked"))
        if is_other or (key in WHERE_ANY and not any(values.get(key) for values in found)):
            continue
        cells = [_cell(values, key) for values in found]
        table.add_row(Text(f"  {WORDS.get(key, key.replace('_', ' '))}"), *map(Text, cells))
    console.print()
    console.print(table)


def _cell(values: dict[str, Any], key: str) -> str:
    value, error, real = (values.get(key + end) for end in ("", "_stderr", "_real"))
    if value is None:
        return ""
    if isinstance(value, int):
        return f"{value:,}"
    size, unit = (100, " %") if key in SHARES else (1, "")
    digits = 1 if key in SHARES else 3
    cell = f"{size * value:.{digits}f}"
    cell += f" ± {size * error:.{digits}f}" if error is not None else ""
    return cell + unit + (f" ({size * real:.{digits}f}{unit})" if real is not None else "")


def _by_position(made: Sequence[Evaluation], console: Console) -> None:
    bands = [one.positions.bands() if one.positions else [] for one in made]
    found = [{(start, end): loss for start, end, loss in some} for some in bands]
    rows = sorted(set().union(*found))  # of another context the last band may end elsewhere
    table = _table("loss by position", *_heads(made))
    for start, end in rows:
        word = f"  {start}" + (f" to {end}" if end > start else "")
        _line(table, word, [losses.get((start, end)) for losses in found], FOUR)
    if rows:
        console.print()
        console.print(table)


def _rows(made: Sequence[Evaluation], console: Console) -> None:
    """A row a model."""
    rows = [one.scores for one in made]
    marks = [
        name for name in ("checkpoint", "variant", "text") if len({row[name] for row in rows}) > 1
    ]
    numbers = {
        "model_parameters": ("params", short),
        "train_tokens": ("tokens", short),
        "flops_exact": ("FLOPs", lambda value: f"{value:.2g}"),
        "loss": ("loss", FOUR),
        "accuracy": ("acc.", _percent),
        "bits_per_byte": ("bits/byte", FOUR),
    }
    table = _table("run", *marks, *(word for word, _ in numbers.values()))
    for n, column in enumerate(table.columns[1:]):
        column.justify = "left" if n < len(marks) else "right"
        column.no_wrap = n >= len(marks)
    for row in rows:
        cells = [str(row[name]) for name in ("run", *marks)]
        cells += [shown(row[name]) for name, (_, shown) in numbers.items()]
        table.add_row(*map(Text, cells))
    console.print(table)


def _differences(paths: Sequence[Path], console: Console) -> None:
    """The keys in which the runs differ, a line a key where they are few."""
    table = compare(*paths)
    differing = [str(name) for name in table if name not in (*rundir.SIZES, *OUTCOMES)]
    console.print()
    if len(paths) > ACROSS:
        console.print(Text(f"they differ in {', '.join(differing) or 'nothing'}"))
        return
    shown = _table("differs", *map(str, table.index))
    for name in differing:
        shown.add_row(Text(str(name)), *(Text(_setting(value)) for value in table[name]))
    console.print(shown if differing else Text("their configurations do not differ"))


def _setting(value: Any) -> str:
    """A column that not all runs have is one of floats."""
    if value is None or value != value:
        return "–"
    return f"{value:.0f}" if isinstance(value, float) and value.is_integer() else str(value)
