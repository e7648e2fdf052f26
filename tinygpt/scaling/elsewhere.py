"""Read tables of runs that other software wrote, and note what was assumed about them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from tinygpt.config import ConfigError
from tinygpt.config.checks import did_you_mean
from tinygpt.scaling.columns import Columns
from tinygpt.scaling.runs import best_rates, entering, refuse_several, words_of
from tinygpt.scaling.tables import read_cells, with_numbers
from tinygpt.scaling.units import in_nats, in_units

USUAL = {  # common names of columns, the most likely first
    "seed": "seed random_seed rng_seed rng replicate replica repeat repetition",
    "learning_rate": "peak_lr max_lr lr_peak lr_max peak_learning_rate max_learning_rate "
    "learning_rate lr base_lr base_learning_rate initial_lr init_lr",
    "run": "run_id run_name run runid runname name id folder",
    "n": "params_non_embedding non_embedding_params params n_params num_params parameters "
    "n_parameters num_parameters model_size n",
    "d": "tokens n_tokens num_tokens train_tokens training_tokens tokens_seen d",
    "loss": "val_loss validation_loss eval_loss test_loss final_loss loss",
}
WORDS = {  # words in a column's name; the first kind that matches decides
    "rates": "lr learning warmup",  # settings, unless tuned with the learning rate
    # results, times and places: not settings
    "outcomes": "loss losses ppl perplexity nll acc accuracy bpb bpc bits score metric metrics "
    "validation error grad norm time times date seconds secs hours minutes runtime "
    "duration created updated started finished start end timestamp host hostname node gpu "
    "gpus device devices machine job slurm throughput speed mfu utilization memory mem flops "
    "flop compute step iteration iter epoch second sec samples to checkpoint ckpt cost energy kwh "
    "watt watts power price index row user author note notes comment comments git "
    "commit version state status eta summary seed",
    # choices, whatever their values
    "settings": "dataset datasets data corpus corpora optimizer optim optimiser schedule scheduler "
    "tokenizer tokeniser vocab vocabulary batch bsz bs wd decay architecture arch family "
    "precision dtype activation dropout beta beta1 beta2 parametrization mup context ctx seq "
    "seqlen epochs steps iterations iters recipe mixture filter filtering language objective init",
    # labels and measurements: settings only if they are texts that recur
    "labels": "name tag tags run id uuid hash url uri path dir folder file eval val valid test",
}

STEP = (["step"], ["iter"], ["iteration"], ["checkpoint"], ["ckpt"])
EPOCHS = {"epochs", "n_epochs", "num_epochs", "num_train_epochs"}
LOSS_UNITS = {"nat", "nats", "bit", "bits", "bpb", "bpc", "ppl", "perplexity", "nats/token"}
LOSS_UNITS |= {"bits/byte", "bits per byte", "nats per token", "bits/token", "bits per token"}
KINDS = {"metric", "eval", "val", "valid", "validation", "test"}  # words for kinds of losses


@dataclass(frozen=True)
class Table:
    """Hold the runs that enter a law, the others with a ``reason``, and the assumptions."""

    runs: pd.DataFrame
    left_out: pd.DataFrame
    columns: Columns
    notes: list[str]


def read(
    path: str | Path,
    named: Mapping[str, str | None],
    loss: str,
    units: Mapping[str, float | None] | None = None,
    loss_unit: str | None = None,
    decimal: str | None = None,
    last: int | None = None,
    where: str | None = None,
) -> Table:
    """Read the runs of a table and note how its columns were interpreted.

    ``named`` gives columns by letter or kind; the other arguments are keys of ``tinygpt.fit``.
    Raises ConfigError, one line, for unreadable or ambiguous tables.
    """
    notes: list[str] = []
    cells = read_cells(Path(path), notes)
    cells.index += 1  # row 1 follows the header
    given = {name: column for name, column in named.items() if column is not None}
    given = _usual(cells, given, loss) | given
    columns, rate = find_columns(cells, given, loss)
    sizes = {k: column for k, column in given.items() if k in set("nduct") and column != "none"}
    numbers = list(filter(None, [*sizes.values(), rate]))
    table = with_numbers(cells, {columns.loss}, numbers, decimal, notes)
    found = columns.where(table) | {"loss": columns.loss}
    others = {"seed": columns.seed, "learning rate": rate}
    found |= {name: column for name, column in others.items() if column}
    notes.append(f"columns: {', '.join(f'{name} = {column}' for name, column in found.items())}")
    reason = entering(table, columns.loss, where, list(sizes.values()), notes)
    for column in sizes.values():  # losses are blank in most rows of a history
        blank = reason == f"no {column}"
        if 2 * blank.sum() > (blank | (reason == "")).sum():
            condition = f"{column if column.isidentifier() else f'`{column}`'} > 0"
            raise ConfigError(
                f"table={path}: {column} is blank in {blank.sum()} of {len(table)} rows, first in "
                f"row {blank.idxmax()}; a value that is written once for several rows must stand "
                f'in each; where="{condition}" leaves these rows out'
            )
    columns = _with_runs(table[reason == ""], columns, given, notes)
    if last is not None:
        table, reason = _averaged(table, columns, last, reason, notes)
    is_grid = {columns.n, columns.d} <= set(table)
    placed = (columns.n, columns.d, columns.u, columns.t, None if is_grid else columns.c)
    place = [column for column in placed if column and column in table]
    if "config_hash" not in table:  # the settings of tinygpt's own runs are reported elsewhere
        _refuse_varying(table[reason == ""], columns, place, rate, Path(path))
    refuse_several(table[reason == ""], columns.loss, columns.seed)
    if rate:
        reason = best_rates(table, columns.loss, reason, rate, place)
    used = table[reason == ""]
    shared = int(used.duplicated(place, keep=False).sum())
    if shared and columns.seed is None:
        notes.append(
            f"seeds: {shared} rows share {' and '.join(place)} with another; they are taken for "
            "runs of different seeds"
        )
    _check_meaning(used, columns, Path(path), notes)
    stated = {k: unit for k, unit in (units or {}).items() if unit is not None}
    table, columns = in_units(table, used, columns, sizes, stated, notes, cells)
    table, columns = in_nats(table, used, columns, loss_unit, notes)
    left = table[reason != ""].assign(reason=reason[reason != ""])
    return Table(table[reason == ""], left, columns, notes)


def _check_meaning(used: pd.DataFrame, columns: Columns, path: Path, notes: list[str]) -> None:
    """Note repeated epochs.  Raises ConfigError for losses in several units."""
    for name in map(str, used):
        values = used[name]
        times = pd.to_numeric(values, errors="coerce").max() if name.casefold() in EPOCHS else 1
        if times > 1:
            notes.append(
                f"epochs: {columns.d} is taken for all tokens read, though {name} is up to "
                f"{times:g}; columns.u= names the unique ones"
            )
        if pd.api.types.is_numeric_dtype(values):
            continue
        words = set(values.dropna().astype(str).str.strip().str.casefold())
        if len(words) > 1 and words <= LOSS_UNITS:
            raise ConfigError(
                f"table={path}: {name} says {' and '.join(sorted(words))}: losses of one unit make "
                f"a law; where=\"{name} == '{values.iloc[0]}'\" chooses"
            )


# --- columns


def find_columns(
    table: pd.DataFrame, given: Mapping[str, str], loss: str
) -> tuple[Columns, str | None]:
    """Return the given columns, else those with the names of ``results.json`` or common names, and
    the column of the learning rate.  ``none`` means no column.

    Raises ConfigError for a name that the table does not have.
    """
    off = {name for name, column in given.items() if column == "none"}
    given = {name: column for name, column in given.items() if name not in off}
    for name, column in {**given, "loss": given.get("loss", loss)}.items():
        if column not in table:
            key = f"columns.{name}" if name in given else name
            raise ConfigError(f"{key}={column}: {_there_are(table, column)}")
    seeds = [*_called(table, "seed"), *(c for c in map(str, table) if "seed" in words_of(c))]
    rates = _called(table, "learning_rate")
    usual = {"seed": next(iter(seeds), None), "learning_rate": next(iter(rates), None)}
    found = {name: column if column in table else None for name, column in vars(Columns()).items()}
    found |= {"n": Columns.n, "d": Columns.d, "loss": loss, **usual, **given}
    found |= {"n_total": None} if "n" in given else {}
    found |= dict.fromkeys(off - {"n", "d", "loss"})
    rate = found.pop("learning_rate")
    columns = Columns(**found)  # type: ignore[arg-type]
    if not {columns.n, columns.d, columns.t, columns.c} & set(table):
        raise ConfigError(
            f"columns.n: name the column of the parameters (columns.d: of the tokens); "
            f"{_there_are(table)}"
        )
    return columns, rate


def _usual(table: pd.DataFrame, given: Mapping[str, str], loss: str) -> dict[str, str]:
    """Find the loss, N and D by their common names; N and D only if both are known.

    Returns {} for a table with the names of ``results.json``.
    """
    if loss != Columns.loss or loss in table:
        return {}
    found = {name: next(iter(_called(table, name)), None) for name in ("loss", "n", "d")}
    found |= given
    if not (found["n"] and found["d"]):  # a law needs both
        found["n"] = found["d"] = None
    return {name: column for name, column in found.items() if column}


def _called(table: pd.DataFrame, what: str) -> list[str]:
    """Return the columns with common names for ``what``, the most likely first.

    Case and a prefix with a dot or slash (params.lr) do not matter, but measurements (metrics.lr)
    are excluded.  Constant columns come last.
    """
    names, found = USUAL[what].split(), []
    for column in map(str, table):
        before, _, last = column.replace("/", ".").rpartition(".")
        last = re.sub(r"\W+", "_", last.casefold()).strip("_")
        others = {"train", "training"} if what == "loss" else {"metrics", "summary", "system"}
        if last in names and not others & set(words_of(before)):
            found.append((table[column].nunique() < 2, names.index(last), column))
    return [column for *_, column in sorted(found)]


def _there_are(table: pd.DataFrame, meant: str = "") -> str:
    names = list(map(str, table))
    more = ", ..." if len(names) > 12 else ""
    near = did_you_mean(meant, names) if meant else ""
    return f"no such column; there are {', '.join(names[:12])}{more}{near}"


# --- rows that are no runs of their own


def _with_runs(
    used: pd.DataFrame, columns: Columns, given: Mapping[str, str], notes: list[str]
) -> Columns:
    """Set the column of run names if rows that share a name look like checkpoints: equal size and
    seed, different tokens.

    Adds a note if rows without names look like checkpoints.
    """
    along = next((c for c in (columns.d, columns.c, "step", "_step") if c in used), None)
    if "run" in given or along is None or "config_hash" in used:
        return columns
    if columns.run in used and used[columns.run].duplicated().any():
        columns = dataclasses.replace(columns, run=None)  # unless it is found below
    fixed = [column for column in (columns.n, columns.seed) if column and column in used]
    called = _called(used, "run")
    texts = [name for name in map(str, used) if not pd.api.types.is_numeric_dtype(used[name])]
    for name in dict.fromkeys([*called, *texts]):
        groups = used.groupby(name)
        if not used[name].duplicated().any() or used.duplicated([name, along]).any():
            continue
        if any((groups[column].nunique() > 1).any() for column in fixed):
            continue
        if name not in called:
            notes.append(
                f"runs: every row is taken for a run; if the rows of one {name} are checkpoints, "
                f"columns.run={name}"
            )
            return columns
        notes.append(
            f"runs: {len(used)} rows of {len(groups)} runs, by {name}: rows of one run are its "
            f"checkpoints (last=1 keeps the last of each; columns.run=none if {name} names no run)"
        )
        return dataclasses.replace(columns, run=name)
    if not (fixed and columns.n == fixed[0] and used.duplicated(fixed).any()):
        return columns
    for name in map(str, used):
        if words_of(name)[-1:] in STEP and name != along:
            rising = used.sort_values(along).groupby(fixed)[name]
            if all(group.is_unique and group.is_monotonic_increasing for _, group in rising):
                notes.append(
                    f"runs: every row is taken for a run, though {name} rises with {along} at each "
                    f"{columns.n}; if these are checkpoints, columns.run={columns.n}"
                )
                break
    return columns


def _averaged(
    table: pd.DataFrame, columns: Columns, last: int, reason: pd.Series, notes: list[str]
) -> tuple[pd.DataFrame, pd.Series]:
    """Give the last row of each run the mean of its ``last`` losses, and leave out the others."""
    if columns.run not in table:
        raise ConfigError(f"last={last}: needs columns.run=, the column of the run's name")
    along = next((c for c in (columns.d, columns.c) if c in table), None)
    used = table[reason == ""]
    used = used.sort_values(along, kind="stable") if along else used
    groups = used.groupby(columns.run, sort=False)
    to_end = groups.cumcount(ascending=False)
    mean = used[to_end < last].groupby(columns.run)[columns.loss].mean()
    end = used.index[to_end == 0]
    loss = table[columns.loss].astype(float)
    loss[end] = used.loc[end, columns.run].map(mean)
    reason = reason.copy()
    reason[used.index[to_end > 0]] = "averaged into the last row of its run"
    reason[used.index[to_end >= last]] = "an earlier row of its run"
    few = int((groups.size() < last).sum())
    notes.append(f"last={last}: the loss of each run is the mean of its last {last} evaluations")
    notes[-1] += f"; {few} runs have fewer" if few else ""
    return table.assign(**{columns.loss: loss}), reason


def _refuse_varying(
    used: pd.DataFrame, columns: Columns, place: list[str], rate: str | None, path: Path
) -> None:
    """Raise ConfigError if runs at one place differ in a setting other than the seed."""
    shared = used[used.duplicated(place, keep=False)]
    known = {*place, columns.c, columns.loss, columns.seed, columns.run, rate}
    settings = [
        name
        for name in map(str, used)
        if name not in known
        and (shared.groupby(place)[name].nunique(dropna=False) > 1).any()
        and _is_setting(name, used, shared, columns.seed, place, rate)
    ]
    if not settings:
        return
    name, *others = settings
    values = list(used[name].value_counts().index)
    shown = [f"{v:g}" if isinstance(v, float) else str(v)[:40] for v in values[:4]]
    also = f" (so do {', '.join(others[:3])})" if others else ""
    quoted = name if name.isidentifier() else f"`{name}`"
    is_rate = rate is None and {"lr", "learning"} & set(words_of(name))
    best = f", columns.learning_rate={name} keeps the best" if is_rate else ""
    raise ConfigError(
        f"table={path}: {name} differs between runs of the same {' and '.join(place)}: "
        f'{", ".join(shown)}{", ..." if values[4:] else ""}{also}; where="{quoted} == '
        f'{values[0]!r}" chooses{best}, columns.seed={name} takes it for a seed'
    )


def _is_setting(
    name: str,
    used: pd.DataFrame,
    shared: pd.DataFrame,
    seed: str | None,
    place: list[str],
    rate: str | None,
) -> bool:
    """Return whether a column that differs between runs at one place is a setting.

    If the words of its name do not tell, the values of a setting recur at other places, and names
    differ in more than a number.
    """
    words, whole = set(words_of(name)), re.findall("[a-z]+", name.casefold())
    kind = next((kind for kind, known in WORDS.items() if words & set(known.split())), "")
    is_text = pd.api.types.is_object_dtype(used[name]) or pd.api.types.is_string_dtype(used[name])
    if is_text and words & KINDS:  # a long table has a row for each loss
        return bool(2 * used[name].nunique() <= len(used))
    if kind == "outcomes" or (kind == "labels" and not is_text) or "metrics" in whole:
        return False
    if kind == "rates" and rate:
        return bool((shared.groupby([*place, rate])[name].nunique(dropna=False) > 1).any())
    if kind in ("settings", "rates"):
        return True
    values = used[name]
    if seed and (used.groupby(seed)[name].nunique(dropna=False) == 1).all():
        return False  # another name of the seed
    if pd.api.types.is_bool_dtype(values):
        return True
    if is_text and kind != "labels":
        return bool(2 * values.nunique() <= len(values))
    told = shared[name].astype(str).str.replace(r"\d+", "", regex=True) if is_text else shared[name]
    groups = told.groupby([shared[column] for column in place])
    sets = groups.agg(lambda v: repr(sorted(set(v))))
    if is_text:
        counts = sets[groups.nunique() > 1].value_counts()
        return bool(counts.max() > 1 and 2 * counts.max() >= counts.sum())
    if len(sets) == 1:
        return bool(values.isin(shared[name]).sum() >= 2 * shared[name].nunique())
    return bool(2 * sets.value_counts().iloc[0] >= len(sets))
