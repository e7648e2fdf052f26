"""Runs from elsewhere: which columns of a table say what, in which units, and what was assumed."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tinygpt.checks import did_you_mean
from tinygpt.config import ConfigError
from tinygpt.scaling.columns import Columns
from tinygpt.scaling.runs import best_rates, entering, refuse_several, words_of
from tinygpt.scaling.tables import read_cells, with_numbers

SEEDS = ("seed", "random_seed", "rng_seed", "rng", "replicate", "replica", "repeat", "repetition")
RATES = (
    *("peak_lr", "max_lr", "lr_peak", "lr_max", "peak_learning_rate", "max_learning_rate"),
    *("learning_rate", "lr", "base_lr", "base_learning_rate", "initial_lr", "init_lr"),
)
RUNS = ("run_id", "run_name", "run", "runid", "runname", "name", "id")
SCALES = {1e3: "k thousand thousands", 1e6: "m mm million millions"}
SCALES |= {1e9: "b bn g billion billions", 1e12: "t tn trillion trillions"}
COMPUTE = {  # FLOPs in one of a name without its signs, as pflopdays
    8.64e19: r"p(eta)?f(lops?)?s?days?",
    8.64e16: r"t(era)?f(lops?)?s?days?",
    1e21: "z(etta)?flops?",
    1e18: "e(xa)?flops?",
    1e15: "p(eta)?flops?",
    1e12: "t(era)?flops?",
    1e9: "g(iga)?flops?",
}
# A table does not say so plainly, but the words of a column's name do: what a run came to, or
# where and when it ran, is no setting; these settings are, whatever their values.
_OUTCOMES = (
    "loss losses ppl perplexity nll acc accuracy bpb bpc bits score metric metrics eval val "
    "valid validation test error grad norm time times date seconds secs hours minutes runtime "
    "duration created updated started finished start end timestamp host hostname node gpu "
    "gpus device devices machine job slurm throughput speed mfu utilization memory mem flops "
    "flop compute step steps iteration iterations iter epoch checkpoint ckpt cost energy kwh "
    "watt watts power price index row user author note notes comment comments tag tags git "
    "commit version state status lr rate learning warmup eta summary "
)
OUTCOMES = set(_OUTCOMES.split())
_SETTINGS = (
    "dataset datasets data corpus corpora optimizer optim optimiser schedule scheduler "
    "tokenizer tokeniser vocab vocabulary batch bsz bs wd decay architecture arch family "
    "precision dtype activation dropout beta beta1 beta2 parametrization mup context ctx seq "
    "seqlen epochs recipe mixture filter filtering language objective init "
)
SETTINGS = set(_SETTINGS.split())
IDENTITY = {"name", "run", "id", "uuid", "hash", "url", "uri", "path", "dir", "folder", "file"}
LARGEST = 20.0  # loss of a token: a guess among 5e8 of them


@dataclass
class Reading:
    """What the command line says of a table."""

    columns: Mapping[str, str | None]
    loss: str
    units: Mapping[str, float | None] = field(default_factory=dict)
    loss_unit: str | None = None
    decimal: str | None = None
    last: int | None = None
    where: str | None = None


@dataclass(frozen=True)
class Table:
    """The runs that enter a law, the others with a ``reason``, and what was assumed."""

    runs: pd.DataFrame
    left_out: pd.DataFrame
    columns: Columns
    notes: list[str]


def read(path: str | Path, asked: Reading) -> Table:
    """Read the runs of a table and say what was taken for what.

    Raises ConfigError, one line, for what cannot be read or has more than one reading.
    """
    notes: list[str] = []
    cells = read_cells(Path(path), notes)
    cells.index += 1  # row 1 is the first below the header
    given = {name: column for name, column in asked.columns.items() if column is not None}
    columns, rate = find_columns(cells, given, asked.loss)
    named = [given[name] for name in "nduct" if name in given] + ([rate] if rate else [])
    table = with_numbers(cells, {columns.loss}, named, asked.decimal, notes)
    notes.append(_said(table, columns, rate))
    place = [c for c in (columns.n, columns.d, columns.u, columns.t) if c and c in table]
    place = place if {columns.n, columns.d} & set(table) else [*place, str(columns.c)]
    if columns.c in table and not {columns.n, columns.d} <= set(table):
        place = list(dict.fromkeys([*place, str(columns.c)]))
    needed = [given[name] for name in "nduct" if name in given]
    reason = entering(table, columns.loss, asked.where, needed, notes)
    columns = _with_runs(table, columns, given, reason, notes)
    table, reason = _averaged(table, columns, asked.last, reason, notes)
    used = table[reason == ""]
    if "config_hash" not in table:  # a run of our own says its settings, and they are named
        _refuse_varying(used, columns, place, rate, Path(path))
    refuse_several(used, columns.loss, columns.seed)
    if rate:
        reason = best_rates(table, columns.loss, reason, rate, place)
    used = table[reason == ""]
    _note_seeds(used, columns, place, notes)
    table, columns = _in_units(table, used, columns, given, asked, notes)
    left = table[reason != ""].assign(reason=reason[reason != ""])
    return Table(table[reason == ""], left, columns, notes)


# --- columns


def find_columns(
    table: pd.DataFrame, given: Mapping[str, str], loss: str
) -> tuple[Columns, str | None]:
    """Return the columns that were named, else those of ``results.json`` or of the common names
    that are there, and the column of the learning rate.

    Raises ConfigError for a name that the table has not.
    """
    off = {name for name, column in given.items() if column == "none"}
    given = {name: column for name, column in given.items() if name not in off}
    for name, column in given.items():
        if column not in table:
            raise ConfigError(f"columns.{name}={column}: {_there_are(table, column)}")
    loss = given.get("loss", loss)
    if loss not in table:
        raise ConfigError(f"loss={loss}: {_there_are(table, loss)}")
    rate = given.get("learning_rate") or next(iter(_called(table, RATES)), None)
    seed = next(iter(_called(table, SEEDS)), None) or next(
        (name for name in map(str, table) if "seed" in words_of(name)), None
    )
    default = {**dataclasses.asdict(Columns(loss=loss)), "seed": seed}
    optional = {k: v if v in table else None for k, v in default.items() if k not in ("n", "d")}
    named = {k: v for k, v in given.items() if k != "learning_rate"}
    columns = Columns(**{**default, **optional, "loss_unit": default["loss_unit"], **named})
    if "n" in given:
        columns = dataclasses.replace(columns, n_total=None)
    nothing: dict[str, Any] = dict.fromkeys(off & {"u", "t", "c", "seed", "run"})
    columns = dataclasses.replace(columns, **nothing)
    if not {columns.n, columns.d, columns.t, columns.c} & set(table):
        raise ConfigError(
            f"columns.n: name the column of the parameters (columns.d: of the tokens); "
            f"{_there_are(table)}"
        )
    return columns, None if "learning_rate" in off else rate


def _called(table: pd.DataFrame, names: Sequence[str]) -> list[str]:
    """The columns of these names, those first that stand first in ``names``.

    The case does not matter, nor what stands before a point or slash, as in params.lr, but what
    was measured (metrics.lr) is not meant.
    """
    found = []
    for column in map(str, table):
        before, _, last = re.sub(r"[/]", ".", column).rpartition(".")
        last = re.sub(r"\W+", "_", last.strip().casefold())
        if last in names and not {"metrics", "summary", "system"} & set(words_of(before)):
            found.append((names.index(last), column))
    return [column for _, column in sorted(found)]


def _there_are(table: pd.DataFrame, meant: str = "") -> str:
    names = [str(name) for name in table]
    more = ", ..." if len(names) > 12 else ""
    near = did_you_mean(meant, names) if meant else ""
    return f"no such column; there are {', '.join(names[:12])}{more}{near}"


def _said(table: pd.DataFrame, columns: Columns, rate: str | None) -> str:
    found = {**columns.where(table), "loss": columns.loss, "seed": columns.seed}
    found["learning rate"] = rate
    return "columns: " + ", ".join(f"{k} = {v}" for k, v in found.items() if v)


def _with_runs(
    table: pd.DataFrame, columns: Columns, given: Mapping[str, str], reason: pd.Series,
    notes: list[str],
) -> Columns:  # fmt: skip
    """The columns with that of the run's name, where rows share one as checkpoints of a run do:
    one size and one seed, and different tokens."""
    used = table[reason == ""]
    if columns.run in table or given.get("run") == "none":
        return columns
    along = next((c for c in (columns.d, columns.c, "step", "_step") if c in table), None)
    fixed = [c for c in (columns.n, columns.seed) if c and c in table]
    texts = [str(c) for c in table if not pd.api.types.is_numeric_dtype(table[c])]
    called = _called(table, RUNS)
    for name in [*called, *(c for c in texts if c not in called)]:
        groups = used.groupby(name)
        repeated = used[name].duplicated().any() and along is not None
        if not repeated or any((groups[c].nunique() > 1).any() for c in fixed):
            continue
        if used.duplicated([name, along]).any():
            continue
        if name not in called:
            notes.append(
                f"runs: every row is taken for a run; if the rows of one {name} are checkpoints, "
                f"columns.run={name}"
            )
            break
        count = used[name].nunique()
        notes.append(
            f"runs: {len(used)} rows of {count} runs, by {name}: rows of one run are its "
            "checkpoints (last=1 keeps the last of each; columns.run=none: it names no run)"
        )
        return dataclasses.replace(columns, run=name)
    return columns


def _averaged(
    table: pd.DataFrame, columns: Columns, last: int | None, reason: pd.Series, notes: list[str]
) -> tuple[pd.DataFrame, pd.Series]:
    """With ``last``, the last row of each run, its loss the mean of so many evaluations."""
    if last is None:
        return table, reason
    if columns.run not in table:
        raise ConfigError(f"last={last}: needs columns.run=, the column of the run's name")
    along = next((c for c in (columns.d, columns.c) if c in table), None)
    used = table[reason == ""]
    if along:
        used = used.sort_values(along, kind="stable")
    groups = used.groupby(columns.run, sort=False)
    place = groups.cumcount(ascending=False)
    mean = used[place < last].groupby(columns.run)[columns.loss].mean()
    end = used.index[place == 0]
    loss = table[columns.loss].astype(float)
    loss[end] = used.loc[end, columns.run].map(mean)
    reason = reason.copy()
    reason[used.index[(place > 0) & (place < last)]] = "averaged into the last row of its run"
    reason[used.index[place >= last]] = "an earlier row of its run"
    few = int((groups.size() < last).sum())
    notes.append(
        f"last={last}: the loss of each run is the mean of its last {last} evaluations"
        + (f"; {few} runs have fewer" if few else "")
    )
    return table.assign(**{columns.loss: loss}), reason


def _refuse_varying(
    used: pd.DataFrame, columns: Columns, place: list[str], rate: str | None, path: Path
) -> None:
    """Raises ConfigError where runs at one place differ in a setting: it is no seed."""
    size = used.groupby(place)[columns.loss].transform("size")
    shared = used[size > 1]
    if not len(shared):
        return
    known = {*place, columns.c, columns.loss, columns.seed, columns.run, rate}
    skipped = [name for name in map(str, used) if "seed" in words_of(name) or name in known]
    differing = [
        name
        for name in used.columns.difference(skipped, sort=False)
        if (shared.groupby(place)[name].nunique(dropna=False) > 1).any()
    ]
    settings = [name for name in differing if _is_setting(name, used, shared, columns, place)]
    if settings:
        name = settings[0]
        counts = used[name].value_counts()
        values = ", ".join(map(_shown, counts.index[:4])) + (", ..." if len(counts) > 4 else "")
        also = f" (so do {', '.join(settings[1:4])})" if settings[1:] else ""
        raise ConfigError(
            f"table={path}: {name} differs between runs of the same "
            f'{" and ".join(place)}: {values}{also}; where="{_name(name)} == '
            f'{counts.index.tolist()[0]!r}" chooses, columns.seed={name} takes it for a seed'
        )


def _note_seeds(used: pd.DataFrame, columns: Columns, place: list[str], notes: list[str]) -> None:
    """Says that runs at one place are taken for seeds where no column tells."""
    shared = int(used.duplicated(place, keep=False).sum())
    if shared and columns.seed is None:
        notes.append(
            f"seeds: {shared} rows share {' and '.join(place)} with another; they are taken for "
            "runs of different seeds"
        )


def _is_setting(
    name: str, used: pd.DataFrame, shared: pd.DataFrame, columns: Columns, place: list[str]
) -> bool:
    """Whether a column that differs between runs at one place was chosen, and not measured.

    By its words, else by its values: those of a setting come back at other places.
    """
    words, whole = set(words_of(name)), set(re.findall("[a-z]+", name.casefold()))
    if (words & OUTCOMES) - {"eval", "val", "valid", "test"} or "metrics" in whole:
        return False
    if words & SETTINGS:
        return True
    if words & (IDENTITY | OUTCOMES):
        return False
    values = used[name]
    if columns.seed and (used.groupby(columns.seed)[name].nunique(dropna=False) == 1).all():
        return False  # a name of the seed
    if pd.api.types.is_bool_dtype(values):
        return True
    if not pd.api.types.is_numeric_dtype(values):
        return bool(2 * values.nunique() <= len(values))
    sets = shared.groupby(place)[name].agg(lambda v: repr(sorted(set(v))))
    if len(sets) == 1:
        return bool(values.isin(shared[name]).sum() >= 2 * shared[name].nunique())
    return bool(sets.value_counts().iloc[0] >= 0.5 * len(sets))


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)[:40]


def _name(column: str) -> str:
    return column if column.isidentifier() else f"`{column}`"


# --- units


def _in_units(
    table: pd.DataFrame, used: pd.DataFrame, columns: Columns, given: Mapping[str, str],
    asked: Reading, notes: list[str],
) -> tuple[pd.DataFrame, Columns]:  # fmt: skip
    """The table with columns in parameters, tokens, FLOPs and nats, where its own are in others.

    Raises ConfigError where it must be said which.
    """
    named = {k: getattr(columns, k) for k in "ndc" if k in given and given[k] != "none"}
    units = _units(used, named, asked, notes)
    if columns.u in table and "u" in given:  # counted as the tokens are
        named["u"], units["u"] = columns.u, asked.units.get("u") or units.get("d", 1.0)
    for key, unit in units.items():
        if unit != 1:
            column = f"{named[key]} × {unit:g}"
            table = table.assign(**{column: table[named[key]] * unit})
            columns = dataclasses.replace(columns, **{key: column})
    if columns.d not in table and columns.n in table and columns.c in table:
        column = f"{columns.c} / (6 {columns.n})"
        notes.append(f"tokens: D = {column}, by C = 6 N D")
        table = table.assign(**{column: (table[columns.c] / (6 * table[columns.n])).round()})
        columns = dataclasses.replace(columns, d=column)
    return _in_nats(table, used, columns, asked.loss_unit, notes)


def _units(
    used: pd.DataFrame, named: Mapping[str, str], asked: Reading, notes: list[str]
) -> dict[str, float]:
    """What one of each named column is: parameters, tokens, FLOPs."""
    middle = {key: float(used[column].median()) for key, column in named.items()}
    stated = {key: unit for key in named if (unit := asked.units.get(key)) is not None}
    plain = {key: stated.get(key, 1.0) for key in named}
    for key, unit in stated.items():
        if unit != 1:
            notes.append(f"units: {named[key]} is in {unit:g}, as given")
    if not named or _plausible(used, named, plain, stated):
        _note_compute(used, named, plain, notes)
        return plain
    by_name = {k: stated.get(k) or _unit_of(k, column) or 1.0 for k, column in named.items()}
    ways = [by_name] if _plausible(used, named, by_name, stated) else []
    if not ways and set(named) == {"n", "d", "c"}:
        alone = {key: column for key, column in named.items() if key != "c"}
        sound = _plausible(used, alone, plain, stated)  # then only the compute is in question
        counts, flops = (1.0,) if sound else (1.0, 1e3, 1e6, 1e9, 1e12), (1.0, *COMPUTE)
        choices = [
            [stated[k]] if k in stated else flops if k == "c" else counts[: 4 + (k == "d")]
            for k in named
        ]
        found = [dict(zip(named, one, strict=True)) for one in itertools.product(*choices)]
        found = [one for one in found if _plausible(used, named, one, stated, 3)]
        changes = [sum(unit != 1 for unit in one.values()) for one in found]
        ways = [w for w, n in zip(found, changes, strict=True) if n == min(changes)]
    if len(ways) == 1:
        why = "by their names" if ways[0] == by_name else "for then C is about 6 N D"
        said = [f"{named[k]} is in {_in_words(k, u)}" for k, u in ways[0].items() if u != plain[k]]
        notes.append(f"units: {', '.join(said)}, {why}")
        return ways[0]
    raise ConfigError(_unclear(used, named, middle))


def _plausible(
    used: pd.DataFrame,
    named: Mapping[str, str],
    units: Mapping[str, float],
    stated: Mapping[str, float],
    factor: float = 30,
) -> bool:
    """Whether these are counts of parameters, tokens and FLOPs that go together, C with 6 N D to
    a factor."""
    value = {key: used[column].astype(float) * units[key] for key, column in named.items()}
    for key, least in (("n", 1e3), ("d", 1e3), ("c", 1e6)):
        if key in value and key not in stated and value[key].median() < least:
            return False
    if "d" not in value and {"n", "c"} <= set(value):
        value["d"] = value["c"] / (6 * value["n"])
    if {"n", "d"} <= set(value) and not {"n", "d"} <= set(stated):
        ratio = float((value["d"] / value["n"]).median())
        if not 0.1 <= ratio <= 1e4:
            return False
    if len(named) == 3 and "c" not in stated:
        return bool(1 / factor <= _beside_6nd(value) <= factor)
    return True


def _beside_6nd(value: Mapping[str, pd.Series]) -> float:
    return float((value["c"] / (6 * value["n"] * value["d"])).median())


def _note_compute(
    used: pd.DataFrame, named: Mapping[str, str], units: Mapping[str, float], notes: list[str]
) -> None:
    if set(named) == {"n", "d", "c"}:
        times = _beside_6nd({k: used[column] * units[k] for k, column in named.items()})
        if not 1 / 3 <= times <= 3:
            notes.append(f"compute: {named['c']} is {times:.2g} times 6 N D (the median)")


def _unit_of(key: str, column: str) -> float | None:
    """What a column's name says that it counts in, as params_m, tokens (B) or pf-days."""
    if key == "c":
        name = re.sub("[^a-z]", "", column.casefold())
        return next((unit for unit, form in COMPUTE.items() if re.search(form + "$", name)), None)
    words = re.findall("[a-z]+", column.casefold())
    return next(
        (u for u, names in SCALES.items() if words[1:] and words[-1] in names.split()), None
    )


def _in_words(key: str, unit: float) -> str:
    if key == "c":
        return {8.64e19: "PFLOP-days", 8.64e16: "TFLOP-days"}.get(unit, f"{unit:g} FLOPs")
    return SCALES[unit].split()[-1] if unit in SCALES else f"{unit:g}"


def _unclear(used: pd.DataFrame, named: Mapping[str, str], middle: Mapping[str, float]) -> str:
    """What does not go together, and the keys that settle it."""
    first = next(iter(named))
    keys = " ".join(
        f"units.{k}={v}" for k, v in (("n", "1e6"), ("d", "1e9"), ("c", "8.64e19")) if k in named
    )
    as_it_is = " ".join(f"units.{k}=1" for k in named)
    values = ", ".join(f"{named[k]} {v:.3g}" for k, v in middle.items())
    said = f"the medians are {values}"
    if {"n", "d"} <= set(named):
        said += f", so D/N is {float((used[named['d']] / used[named['n']]).median()):.2g}"
    if {"n", "d", "c"} <= set(named):
        said += f" and C / 6ND {_beside_6nd({k: used[c] for k, c in named.items()}):.2g}"
    kinds = {"n": "parameters", "d": "tokens", "c": "FLOPs"}
    return (
        f"columns.{first}={named[first]}: {said}; if these are not plain counts of "
        f"{', '.join(kinds[k] for k in named)}, say in what they are, as {keys}; "
        f"if they are, {as_it_is}"
    )


def _in_nats(
    table: pd.DataFrame, used: pd.DataFrame, columns: Columns, unit: str | None, notes: list[str]
) -> tuple[pd.DataFrame, Columns]:
    """Perplexities become losses.  Raises ConfigError for values that are neither."""
    loss, words = columns.loss, set(words_of(columns.loss))
    is_perplexity = bool({"ppl", "perplexity"} & words) and not {"log", "nll", "loss"} & words
    if unit == "perplexity" or (unit is None and is_perplexity):
        column = f"log({loss})"
        notes.append(f"loss: {loss} is a perplexity; its logarithm is fitted")
        table = table.assign(**{column: np.log(table[loss].where(table[loss] > 0))})
        if (table[column][used.index] <= 0).any():
            row = used.index[table[column][used.index] <= 0][0]
            raise ConfigError(f"{loss}={table[loss][row]:g}: row {row}: no perplexity is below 1")
        return table, dataclasses.replace(columns, loss=column)
    if unit is None and (used[loss] > LARGEST).any():
        row = used.index[used[loss] > LARGEST][0]
        raise ConfigError(
            f"{loss}={used[loss][row]:g}: row {row}: too large for a loss per token; "
            "loss_unit=perplexity takes the logarithm of perplexities, where= leaves rows out, and "
            "loss_unit= with the unit in words says that it is right"
        )
    return table, dataclasses.replace(columns, loss_unit=unit or columns.loss_unit)
