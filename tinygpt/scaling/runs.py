"""Run folders → one table, a row a run."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
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
MOST_COLUMNS = 10_000  # of a table from elsewhere
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


def read_table(path: str | Path) -> pd.DataFrame:
    """A table of runs from elsewhere, CSV or parquet.  Raises ConfigError if it cannot be read."""
    path = Path(path)
    kind = path.suffix.lower()
    if kind not in (".csv", ".parquet"):
        raise ConfigError(f"table={path}: must be a .csv or a .parquet file")
    try:
        found = pd.read_parquet(path) if kind == ".parquet" else pd.read_csv(path)
        words = {name: list(found[name]) for name in found if found[name].dtype.kind == "O"}
    except Exception as error:  # whatever broken bytes lead the libraries to
        reason = getattr(error, "strerror", None) or first_line(error)
        raise ConfigError(f"table={path}: cannot be read ({reason})") from error
    if kind == ".csv" and not isinstance(found.index, pd.RangeIndex):  # pandas shifts the columns
        raise ConfigError(f"table={path}: has more values in a row than columns in its first line")
    if found.empty:
        raise ConfigError(f"table={path}: has no rows")
    if len(found.columns) > MOST_COLUMNS:
        raise ConfigError(
            f"table={path}: has {len(found.columns)} columns; at most {MOST_COLUMNS} are read"
        )
    for name, values in words.items():
        if any(isinstance(value, list | dict | np.ndarray) for value in values):
            raise ConfigError(f"table={path}: {name} holds lists or tables, no numbers or texts")
    return found


def comparable(
    table: pd.DataFrame, loss: str, where: str | None = None
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The runs whose final losses can stand in one law, and the others, with a ``reason``.

    ``where`` is a condition on the columns, as ``pandas.DataFrame.query`` reads it; what does not
    meet it is left out.  Raises ConfigError for a condition that cannot be read, for a run that
    is there twice, and for losses that do not compare: nats per token of several tokenizers or
    corpora (bits per byte do).
    """
    reason = pd.Series("", index=table.index)
    if where is not None:
        reason[~_meets(table, where)] = f"not {where}"
    _refuse_twice(table[reason == ""])
    if "status" in table:
        ended = table["status"].isin(["finished", "stopped_early"])
        reason[~ended & (reason == "")] = table["status"][~ended].astype(str)
    if loss in table:
        reason[(reason == "") & table[loss].isna()] = "no loss"
    used, left = table[reason == ""], table[reason != ""]
    if not len(used):
        raise ConfigError(f"none of these {len(table)} runs has a final loss")
    for name in ("tokenizer_fingerprint", "dataset"):
        if name in used and used[name].nunique() > 1 and "bits_per" not in loss:
            shown = name.split("_")[0] if name.split("_")[0] in used else name
            kinds = ", ".join(sorted(map(str, used[shown].unique())))
            raise ConfigError(
                f"runs: several {name.split('_')[0]}s ({kinds}): nats per token do not compare; "
                "loss=final_val_bits_per_byte does"
            )
    reason = reason.mask(
        reason == "", _slower_rates(used, loss).reindex(table.index, fill_value="")
    )
    used, left = table[reason == ""], table[reason != ""]
    return used, left.assign(reason=reason[reason != ""])


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


def _slower_rates(runs: pd.DataFrame, loss: str) -> pd.Series:
    """Where several learning rates were tried in one setting the best is its run, by its mean."""
    reason = pd.Series("", index=runs.index)
    settings = [name for name in SETTINGS if name in runs and name not in RATES]
    if "learning_rate" not in runs or loss not in runs or not settings:
        return reason
    for _, group in runs.groupby(settings, dropna=False):
        mean = group.groupby("learning_rate")[loss].mean()
        if len(mean) > 1:  # none is known of a run from elsewhere
            best = mean.idxmin()
            others = group.index[group["learning_rate"] != best]
            reason[others] = f"learning_rate {best:g} is better there"
    return reason


def _refuse_twice(table: pd.DataFrame) -> None:
    if {"config_hash", "folder"} <= set(table):
        known = table[table["config_hash"].notna()]
        twice = known[known["config_hash"].duplicated(keep=False)]
        if len(twice):
            one, other = twice[twice["config_hash"] == twice["config_hash"].iloc[0]]["folder"][:2]
            raise ConfigError(f"runs: {one} and {other} are the same run; give it once")
    else:
        twice = table[table.duplicated(keep=False)]
        if len(twice):
            rows = [str(i) for i in twice.index[(twice == twice.iloc[0]).all(axis=1)][:2]]
            raise ConfigError(f"table: rows {' and '.join(rows)} are the same; give it once")


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
