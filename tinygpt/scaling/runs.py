"""Run folders → one table, a row a run."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from tinygpt import fileio, rundir
from tinygpt.checks import did_you_mean
from tinygpt.config import ConfigError, first_line

# Columns of the configuration in which replicas, runs that differ in their seed alone, agree.
RATES = ("learning_rate", "warmup_steps")
SETTINGS = (
    *("d_model", "n_layers", "n_heads", "d_ff", "max_seq_len", "parametrization"),
    *("vocab_size", "tokenizer", "dataset", "data_fraction", "train_tokens", "batch_tokens"),
    *("weight_decay", "optimizer", "schedule", "init_from", *RATES),
)
PLACE = ("parameters_non_embedding", "train_tokens")
# What results.json has for every run, and a law or a plot computes with or goes by.
TEXTS = ("status", "config_hash", "tokenizer", "tokenizer_fingerprint", "dataset")
NUMBERS = (
    *(*rundir.SIZES, "flops_6nd", "unique_train_tokens", "seed", "learning_rate", "warmup_steps"),
    *("d_model", "n_layers", "n_heads", "max_seq_len", "vocab_size", "data_fraction"),
    *("batch_tokens", "weight_decay", "total_steps", "seconds_training", "tokens_per_second"),
    *("final_val_loss", "final_val_bits_per_byte", "best_val_loss", "test_loss"),
)


def load_runs(*folders: str | Path) -> pd.DataFrame:
    """Every run under ``folders`` (runs, studies, or ``outputs``), finished or not.

    The columns are the keys of ``results.json``, then ``config.<key>`` for every other key in
    which the runs differ, then ``error`` and ``folder``.  ``status`` is ``failed`` where a run
    has only left its error, ``unfinished`` where it has begun; their losses are missing.
    """
    return pd.DataFrame(read_rows(*folders)).infer_objects()


def load_curves(*folders: str | Path) -> pd.DataFrame:
    """The training curves of the runs under ``folders``, as ``curves_of``."""
    return curves_of(load_runs(*folders))


def curves_of(runs: pd.DataFrame) -> pd.DataFrame:
    """The training curves of runs from ``load_runs`` that left results: a row a line of metrics.

    The columns of ``metrics.csv``, then of the run ``run_name study seed status`` and the two
    counts of parameters, and the FLOPs up to there, ``flops_6nd`` and ``flops_exact``.  A branch
    has the curve of its trunk up to where it began.  Empty where no run has left one.
    """
    if "flops_exact" not in runs:
        return pd.DataFrame()
    runs = runs[runs["flops_exact"].notna()].set_index("folder")
    files = {folder: rundir.RunDir(Path(folder)).metrics for folder in runs.index}
    logs = {f: rundir.MetricsFile(path).columns() for f, path in files.items() if path.exists()}
    named = {"folder": [folder for folder, log in logs.items() for _ in log["step"]]}
    if not named["folder"]:
        return pd.DataFrame()
    numbers = {name: _numbers([log[name] for log in logs.values()]) for name in rundir.METRICS}
    curves = pd.DataFrame(named | numbers)
    sizes = ["parameters_non_embedding", "model_parameters"]
    known = [name for name in ("run_name", "study", "seed", "status", *sizes) if name in runs]
    curves = curves.join(runs[known], on="folder")
    for name in runs.columns.intersection(["flops_6nd", "flops_exact"]):
        per_token = (runs[name] / runs["train_tokens"]).rename(name)
        curves[name] = curves["folder"].map(per_token) * curves["tokens"]
    return curves


def _numbers(columns: Sequence[Sequence[str]]) -> list[float]:
    """As Python wrote them, nan and inf too; empty: not measured."""
    return [float(value or "nan") for column in columns for value in column]


def comparable(
    table: pd.DataFrame, loss: str, where: str | None = None
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The runs whose final losses can stand in one law, and the others, with a ``reason``.

    ``where`` is a condition on the columns, as ``pandas.DataFrame.query`` reads it; what does not
    meet it is left out.  Raises ConfigError for a condition that cannot be read, for a run that
    is there twice, and for losses that do not compare: nats per token of several tokenizers or
    corpora (bits per byte do).
    """
    reason = entering(table, loss, where)
    refuse_several(table[reason == ""], loss)
    if "learning_rate" in table:
        reason = best_rates(table, loss, reason, "learning_rate")
    return table[reason == ""], table[reason != ""].assign(reason=reason[reason != ""])


def entering(
    table: pd.DataFrame,
    loss: str,
    where: str | None = None,
    needed: Sequence[str] = (),
    notes: list[str] | None = None,
) -> pd.Series:
    """Return for each row why it cannot enter a law; empty where it can.

    ``needed`` are columns that must be above zero besides the loss.
    """
    reason = pd.Series("", index=table.index)
    if where is not None:
        reason[~_meets(table, where)] = f"not {where}"
    _mark_twice(table, reason)
    for name in table:
        if str(name).casefold() in ("status", "state"):
            _mark_status(table[name], reason, [] if notes is None else notes)
    for name in dict.fromkeys([loss, *needed]):
        if name not in table:
            continue
        reason[(reason == "") & table[name].isna()] = "no loss" if name == loss else f"no {name}"
        below = (reason == "") & (table[name] <= 0) if needed else pd.Series(False, table.index)
        if 2 * below.sum() <= (reason == "").sum():  # else it is no such column, and is refused
            reason[below] = f"{name} is not above zero"
    if not (reason == "").any():
        kinds = ", ".join(f"{count} {one}" for one, count in reason.value_counts().items())
        raise ConfigError(f"none of these {len(table)} runs has a final loss ({kinds})")
    return reason


FINISHED = {*("finished", "stopped_early", "completed", "complete", "done", "success")}
FINISHED |= {"succeeded", "ok"}
UNFINISHED = {*("unfinished", "running", "failed", "crashed", "killed", "diverged", "preempted")}
UNFINISHED |= {"preempting", "error", "errored", "aborted", "cancelled", "canceled", "timeout"}
UNFINISHED |= {"oom", "pending", "queued", "scheduled", "interrupted", "stopped", "failure"}


def _mark_status(column: pd.Series, reason: pd.Series, notes: list[str]) -> None:
    """Leaves out what has not finished, in the words of W&B, MLflow and our own."""
    words = column.astype(str).str.strip().str.casefold()
    if not words.isin(FINISHED | UNFINISHED).any():
        kinds = ", ".join(map(str, column.dropna().unique()[:4]))
        notes.append(f"status: {column.name} says nothing of how a run ended ({kinds}); all enter")
        return
    unknown = sorted(set(column[column.notna() & ~words.isin(FINISHED | UNFINISHED)].astype(str)))
    if unknown:
        notes.append(f"status: {', '.join(unknown[:4])} ({column.name}) is not known as finished")
    ended = words.isin(FINISHED)
    stated = column.astype(str).str.strip().where(column.notna(), f"no {column.name}")
    reason[~ended & (reason == "")] = stated[~ended]


def refuse_several(used: pd.DataFrame, loss: str, seed: str | None = None) -> None:
    """Raises ConfigError for losses of several tokenizers or corpora."""
    for name in ("tokenizer_fingerprint", "dataset"):
        if name in used and used[name].nunique() > 1 and "bits_per" not in loss and name != seed:
            shown = name.split("_")[0] if name.split("_")[0] in used else name
            kinds = ", ".join(sorted(map(str, used[shown].dropna().unique())))
            way = "loss=final_val_bits_per_byte does"
            if "final_val_bits_per_byte" not in used:
                way = f'where="{shown} == {used[shown].dropna().iloc[0]!r}" chooses one'
            raise ConfigError(
                f"runs: several {name.split('_')[0]}s ({kinds}): nats per token do not compare; "
                f"{way}"
            )


def left_out_lines(left: pd.DataFrame, total: int) -> list[str]:
    """What was left out of a table, a line a reason, with the rows or the folders."""
    lines = []
    kinds = left["reason"].str.replace(
        r"^(\S.*) \S+ is better there$", r"another \1 is better at the same place", regex=True
    )
    kinds = kinds.str.replace(r"^same as row .*$", "the same as an earlier row", regex=True)
    for kind, rows in left.groupby(kinds, sort=False):
        found = list(map(str, rows.get("folder", rows.index)))
        named = ", ".join(found[:12]) + (f" and {len(found) - 12} more" if found[12:] else "")
        word = "" if "folder" in rows else "row " if len(found) == 1 else "rows "
        lines.append(f"left out: {len(found)} of {total} ({kind}): {word}{named}")
    return lines


def words_of(name: str) -> list[str]:
    """The words of a column's name behind its last point or slash, in lower case."""
    last = re.split(r"[./]", name)[-1]
    return re.findall(r"[a-z]+[0-9]*", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", last).casefold())


# In a condition nothing is called but what looks at a column; strings and names are set aside.
_QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"|`[^`]*`")
_STR = "contains|startswith|endswith|match|fullmatch|lower|upper|strip|len"
_LOOKS = re.compile(rf"\.(str\.({_STR})|isin|isna|notna|between)\(")
# Nor is there a power of a power, or one of thousands: it would have no end.
_POWERS = r"\*\*(?!\s*[-+]?[0-9]{1,3}(\.[0-9]+)?(?![0-9.]|\s*\*\*))|\)\s*\*\*(?!\s*[0-9](?![0-9]))"
_CALLS = re.compile(rf"@|__|\\|\.\s*\w+\s*\(|{_POWERS}")


def _meets(table: pd.DataFrame, where: str) -> pd.Series:
    calls = _CALLS.search(_LOOKS.sub("(", _QUOTED.sub("", where)))
    if calls or "\\" in where:
        raise ConfigError(f"where={where}: {calls[0] if calls else chr(92)} has no place in it")
    try:
        met = table.eval(where, engine="python")
    except Exception as error:  # whatever the words of the condition lead pandas to
        line = first_line(error)
        unknown = re.search(r"name '(.+?)' is not defined", line)
        nearest = did_you_mean(unknown[1], [str(name) for name in table]) if unknown else ""
        raise ConfigError(
            f"where={where}: {line}; a name with spaces stands in backticks{nearest}"
        ) from error
    if not isinstance(met, pd.Series) or met.dtype != bool:
        raise ConfigError(f"where={where}: must be a condition on the columns, as 'params > 1e6'")
    return met


def best_rates(
    table: pd.DataFrame, loss: str, reason: pd.Series, rate: str, place: Sequence[str] = PLACE
) -> pd.Series:
    """Where several learning rates were tried at one ``place`` and in one setting the best, by
    its mean loss, is the run; return the reasons with those of the others."""
    runs, reason = table[reason == ""], reason.copy()
    settings = [*place, *(name for name in SETTINGS if name not in RATES)]
    settings = [name for name in dict.fromkeys(settings) if name in runs and name != rate]
    if loss not in runs or not settings:
        return reason
    for _, group in runs.groupby(settings, dropna=False):
        mean = group.groupby(rate, dropna=False)[loss].mean()
        if len(mean) < 2:
            continue
        best: Any = mean.idxmin()
        same = group[rate].isna() if pd.isna(best) else group[rate] == best
        reason[group.index[~same]] = f"{rate} {best:g} is better there"
    return reason


def _mark_twice(table: pd.DataFrame, reason: pd.Series) -> None:
    """Leaves out a row that is there already.  Raises ConfigError for a run in two folders."""
    if {"config_hash", "folder"} <= set(table):
        known = table[table["config_hash"].notna() & (reason == "")]
        twice = known[known["config_hash"].duplicated(keep=False)]
        if len(twice):
            one, other = twice[twice["config_hash"] == twice["config_hash"].iloc[0]]["folder"][:2]
            raise ConfigError(f"runs: {one} and {other} are the same run; give it once")
        return
    rows = table[reason == ""]
    rows = rows[[name for name in rows if not str(name).startswith("Unnamed: ")]]
    if not rows.duplicated().any():
        return
    first: dict[int, Any] = {}
    labels = rows.groupby(list(rows), dropna=False, sort=False).ngroup()
    for row, label in zip(rows.index, labels, strict=True):
        if first.setdefault(label, row) != row:
            reason[row] = f"same as row {first[label]}"


def read_rows(
    *folders: str | Path, find: Callable[[Path], list[Path]] = rundir.find_runs
) -> list[dict[str, Any]]:
    """The rows of ``load_runs``, in the order of the folders' names; what is missing is None.

    ``find`` says which runs of a folder are meant.
    """
    paths = [path for folder in folders for path in find(Path(folder))]
    rows, configs = [], []
    for path in paths:
        run = rundir.RunDir(path)
        rows.append(_outcome(run))
        configs.append(_flat(fileio.read_yaml(run.config) if run.config.exists() else {}))
    columns = list(dict.fromkeys(name for row in rows for name in row))
    known = {name.rsplit(".", 1)[-1] for name in columns}
    differing = [
        name
        for name in dict.fromkeys(name for config in configs for name in config)
        if name.split(".")[0] not in rundir.NOT_SCIENCE
        and name.rsplit(".", 1)[-1] not in known
        and len({repr(config.get(name)) for config in configs}) > 1
    ]
    last = ("error", "folder")
    return [
        {
            **{name: row.get(name) for name in columns if name not in last},
            **{f"config.{name}": config.get(name) for name in differing},
            **{name: row.get(name) for name in last},
        }
        for row, config in zip(rows, configs, strict=True)
    ]


def _outcome(run: rundir.RunDir) -> dict[str, Any]:
    common = {"study": run.path.parent.name, "run_name": run.path.name, "folder": str(run.path)}
    if run.results.exists():
        return {**_results(run.results), **common, "error": None}
    begun = fileio.read_json(run.environment)
    error = fileio.read_json(run.error).get("error") if run.error.exists() else None
    for path, name, value in (
        (run.environment, "config_hash", begun.get("config_hash")),
        (run.error, "error", error or ""),
    ):
        if not isinstance(value, str):
            raise ConfigError(f"{path}: {name}={value!r:.40}: must be a text")
    status = "failed" if error else "unfinished"
    return {**common, "config_hash": begun["config_hash"], "status": status, "error": error}


def _results(path: Path) -> dict[str, Any]:
    """``results.json``; what that of a training lacks is null.  Raises ConfigError for a value
    that cannot stand in a table of numbers and texts."""
    found = fileio.read_json(path)
    for name, value in found.items():
        if name in NUMBERS:
            holds = value is None or is_number(value)
        elif name in TEXTS:
            holds = isinstance(value, str)
        else:
            holds = isinstance(value, str | bool | None) or is_number(value)
        if not holds:
            wanted = "text" if name in TEXTS else "number" if name in NUMBERS else "number or text"
            raise ConfigError(f"{path}: {name}={value!r:.40}: must be a {wanted}")
    if rundir.is_adaptation(path.parent):
        return found
    return {**found, **{name: None for name in (*TEXTS, *NUMBERS) if name not in found}}


def is_number(value: Any) -> bool:
    """Finite, and a whole one fits into 64 bits."""
    return type(value) in (int, float) and abs(value) < (2**63 if type(value) is int else math.inf)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
