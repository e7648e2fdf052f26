"""Read run folders into a table with a row per run, and select the runs that can enter a law."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from tinygpt import fileio
from tinygpt.config import ConfigError, first_line
from tinygpt.config.checks import did_you_mean
from tinygpt.runs import rundir

# Configuration columns in which replicas (runs that differ only in their seed) agree.
RATES = ("learning_rate", "warmup_steps")
SETTINGS = (
    *("d_model", "n_layers", "n_heads", "d_ff", "max_seq_len", "parametrization"),
    *("vocab_size", "tokenizer", "dataset", "data_fraction", "train_tokens", "batch_tokens"),
    *("weight_decay", "optimizer", "schedule", "init_from", *RATES),
)
PLACE = ("parameters_non_embedding", "train_tokens")
# Keys that every results.json has and that laws or plots use.
TEXTS = ("status", "config_hash", "tokenizer", "tokenizer_fingerprint", "dataset")
NUMBERS = (
    *(*rundir.SIZES, "flops_6nd", "unique_train_tokens", "seed", "learning_rate", "warmup_steps"),
    *("d_model", "n_layers", "n_heads", "max_seq_len", "vocab_size", "data_fraction"),
    *("batch_tokens", "weight_decay", "total_steps", "seconds_training", "tokens_per_second"),
    *("final_val_loss", "final_val_bits_per_byte", "best_val_loss", "test_loss"),
    *("final_val_loss_standard_error", "val_tokens", "val_documents"),
)


def load_runs(*folders: str | Path) -> pd.DataFrame:
    """Read every run under ``folders`` (runs, studies, or ``outputs``), finished or not.

    The columns are the keys of ``results.json``, ``config.<key>`` for every other key in which
    the runs differ, ``error`` and ``folder``.  A run without results has no losses; its status is
    ``failed`` if it left an error, else ``unfinished``.
    """
    return pd.DataFrame(read_rows(*folders)).infer_objects()


def load_curves(*folders: str | Path) -> pd.DataFrame:
    """Read the training curves of the runs under ``folders``: a row per line of metrics."""
    return curves_of(load_runs(*folders))


def curves_of(runs: pd.DataFrame) -> pd.DataFrame:
    """Read the training curves of the runs in ``runs`` that have results.

    The columns are those of ``metrics.csv``, ``run_name study seed status``, the two parameter
    counts, and the FLOPs spent so far, ``flops_6nd`` and ``flops_exact``.  The curve of a branch
    includes that of its trunk.  The table is empty if there are no curves.
    """
    if "flops_exact" not in runs:
        return pd.DataFrame()
    runs = runs[runs["flops_exact"].notna()].set_index("folder")
    files = {folder: rundir.RunDir(Path(folder)).metrics for folder in runs.index}
    logs = {f: rundir.MetricsFile(path).columns() for f, path in files.items() if path.exists()}
    lines: dict[str, list[Any]] = {"folder": [f for f, log in logs.items() for _ in log["step"]]}
    if not lines["folder"]:
        return pd.DataFrame()
    for name in rundir.METRICS:  # empty: not measured
        lines[name] = [float(value or "nan") for log in logs.values() for value in log[name]]
    sizes = ["parameters_non_embedding", "model_parameters"]
    known = [name for name in ("run_name", "study", "seed", "status", *sizes) if name in runs]
    curves = pd.DataFrame(lines).join(runs[known], on="folder")
    for name in runs.columns.intersection(["flops_6nd", "flops_exact"]):
        curves[name] = curves["folder"].map(runs[name] / runs["train_tokens"]) * curves["tokens"]
    return curves


def comparable(
    table: pd.DataFrame, loss: str, where: str | None = None
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the runs whose final losses can enter one law, and the others with a ``reason``.

    Runs that do not meet ``where``, a condition as in ``pandas.DataFrame.query``, are left out.
    Raises ConfigError for an invalid condition, a run given twice, and losses that do not compare
    (nats per token of several tokenizers or corpora; bits per byte do).
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
    """Return why each row cannot enter a law, or "" if it can.

    The loss and the columns in ``needed`` must be positive.
    """
    reason = pd.Series("", index=table.index)
    if where is not None:
        reason[~_meets(table, where)] = f"not {where}"
    _mark_repeated(table, reason)
    for name in table:
        words = words_of(str(name))
        ended = [ENDED[word] for word in words if word in ENDED]
        is_code = bool(re.search("(exit|return)(code|status)$", "".join(words)))
        if not (ended or is_code or STATUS & set(words)):
            continue
        texts = table[name].astype(str).str.strip()
        lower = texts.str.casefold().where(table[name].notna(), "")
        if is_code and lower.str.fullmatch(r"|-?\d+([.:]\d+)?").all():
            bad = ~lower.str.fullmatch(r"|0+([.:]0+)?")
        elif ended and lower.isin(["", *TRUE, *FALSE]).all():
            bad = lower.isin(FALSE if ended[0] else TRUE)
        else:
            _mark_unfinished(table[name], reason, [] if notes is None else notes)
            continue
        reason[bad & (reason == "")] = f"{name}=" + texts
    for name in dict.fromkeys([loss, *needed]):
        if name not in table:
            continue
        reason[(reason == "") & table[name].isna()] = "no loss" if name == loss else f"no {name}"
        below = (reason == "") & (table[name] <= 0) if needed else pd.Series(False, table.index)
        if 2 * below.sum() <= (reason == "").sum():  # else the column is wrong: refused later
            reason[below] = f"{name} is not above zero"
    if not (reason == "").any():
        kinds = ", ".join(f"{count} {kind}" for kind, count in reason.value_counts().items())
        raise ConfigError(f"none of these {len(table)} runs has a final loss ({kinds})")
    return reason


# Final states as W&B, MLflow, schedulers and tinygpt call them.
FINISHED = "finished stopped_early completed complete done success succeeded ok published"
UNFINISHED = (
    "unfinished running failed fail crashed killed diverged preempted preempting error errored "
    "aborted cancelled canceled timeout oom out_of_memory pending queued scheduled interrupted "
    "stopped failure nan pruned node_fail"
)
STATUS = {"status", "state", "outcome"}  # words in the name of a status column
# Words in the names of boolean columns, and whether true is good.
ENDED = dict.fromkeys(("finished", "completed", "success", "succeeded"), True)
ENDED |= dict.fromkeys(("diverged", "failed", "crashed", "killed", "oom", "nan", "isnan"), False)
TRUE, FALSE = ("true", "yes", "1", "1.0"), ("false", "no", "0", "0.0")


def _mark_unfinished(column: pd.Series, reason: pd.Series, notes: list[str]) -> None:
    """Write the status of unfinished runs to ``reason``.

    If no status means finished (as Ray's TERMINATED), all that are not failures count as finished.
    """
    stated = column.astype(str).str.strip().where(column.notna(), f"no {column.name}")
    words, name = stated.str.casefold(), str(column.name)
    good = words.isin(FINISHED.split())
    bad = words.str.extract(r"^(\w*)", expand=False).isin(UNFINISHED.split())
    unknown = ", ".join(column[column.notna() & ~good & ~bad].astype(str).unique()[:4])
    if not (good | bad).any():
        if name.casefold() in STATUS:
            notes.append(f"status: {name} does not say how a run ended ({unknown}); all enter")
        return
    if unknown:
        meaning = "is not known as finished" if good.any() else "is taken for finished"
        notes.append(f"status: {unknown} ({name}) {meaning}")
    left_out = (~good if good.any() else bad) & (reason == "")
    reason[left_out] = stated[left_out]


def refuse_several(used: pd.DataFrame, loss: str, seed: str | None = None) -> None:
    """Raise ConfigError for losses of several tokenizers or datasets that do not compare."""
    for name, kind in (("tokenizer_fingerprint", "tokenizer"), ("dataset", "dataset")):
        if name in used and used[name].nunique() > 1 and "bits_per" not in loss and name != seed:
            shown = kind if kind in used else name
            kinds = used[shown].dropna()
            advice = "loss=final_val_bits_per_byte does"
            if "final_val_bits_per_byte" not in used:
                advice = f'where="{shown} == {kinds.iloc[0]!r}" chooses one'
            listed = ", ".join(sorted(map(str, kinds.unique())))
            raise ConfigError(
                f"runs: several {kind}s ({listed}): nats per token do not compare; {advice}"
            )


def left_out_lines(left: pd.DataFrame, total: int) -> list[str]:
    """Return a line for each reason with the rows or folders left out."""
    lines = []
    kinds = left["reason"].str.replace(
        r"^(\S.*) \S+ is better there$", r"another \1 is better at the same place", regex=True
    )
    kinds = kinds.str.replace(r"^same as row .*$", "the same as an earlier row", regex=True)
    for kind, rows in left.groupby(kinds, sort=False):
        names = list(map(str, rows.get("folder", rows.index)))
        listed = ", ".join(names[:12]) + (f" and {len(names) - 12} more" if names[12:] else "")
        word = "" if "folder" in rows else "row " if len(names) == 1 else "rows "
        lines.append(f"left out: {len(names)} of {total} ({kind}): {word}{listed}")
    return lines


def words_of(name: str) -> list[str]:
    """Return the lower-case words of a column's name after its last dot or slash."""
    last = re.split(r"[./]", name)[-1]
    return re.findall(r"[a-z]+[0-9]*", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", last).casefold())


# A condition may call only methods that inspect a column; quoted text is ignored.
_QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"|`[^`]*`")
_STR = "contains|startswith|endswith|match|fullmatch|lower|upper|strip|len"
_LOOKS = re.compile(rf"\.(str\.({_STR})|isin|isna|notna|between)\(")
# It may not hold nested or huge powers, which would take forever.
_POWERS = r"\*\*(?!\s*[-+]?[0-9]{1,3}(\.[0-9]+)?(?![0-9.]|\s*\*\*))|\)\s*\*\*(?!\s*[0-9](?![0-9]))"
_CALLS = re.compile(rf"@|__|\\|\.\s*\w+\s*\(|{_POWERS}")


def _meets(table: pd.DataFrame, where: str) -> pd.Series:
    """Return which rows meet a condition.  Raises ConfigError if it is invalid."""
    calls = _CALLS.search(_LOOKS.sub("(", _QUOTED.sub("", where)))
    if calls or "\\" in where:
        raise ConfigError(f"where={where}: {calls[0] if calls else chr(92)} has no place in it")
    try:
        met = table.eval(where, engine="python")
    except Exception as error:  # pandas raises many kinds
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
    """Return the reasons, and one for each run whose learning rate does not have the least mean
    loss at its ``place`` (columns of sizes) and settings."""
    runs, reason = table[reason == ""], reason.copy()
    settings = [name for name in dict.fromkeys([*place, *SETTINGS]) if name in runs]
    settings = [name for name in settings if name != rate and name not in RATES]
    if loss in runs and settings:
        for _, group in runs.groupby(settings, dropna=False):
            mean = group.groupby(rate, dropna=False)[loss].mean()
            if len(mean) < 2:
                continue
            best: Any = mean.idxmin()
            same = group[rate].isna() if pd.isna(best) else group[rate] == best
            reason[group.index[~same]] = f"{rate} {best:g} is better there"
    return reason


def _mark_repeated(table: pd.DataFrame, reason: pd.Series) -> None:
    """Write duplicates to ``reason``.  Raises ConfigError for a run in two folders."""
    rows = table[reason == ""]
    if {"config_hash", "folder"} <= set(table):
        known = rows[rows["config_hash"].notna()]
        twice = known[known["config_hash"].duplicated(keep=False)]
        if len(twice):
            one, other = twice[twice["config_hash"] == twice["config_hash"].iloc[0]]["folder"][:2]
            raise ConfigError(f"runs: {one} and {other} are the same run; give it once")
        return
    rows = rows[[name for name in rows if not str(name).startswith("Unnamed: ")]]
    if rows.duplicated().any():
        labels = rows.groupby(list(rows), dropna=False, sort=False).ngroup()
        first = rows.index.to_series().groupby(labels).transform("first")
        repeated = first[labels.duplicated()]
        reason[repeated.index] = "same as row " + repeated.astype(str)


def read_rows(
    *folders: str | Path, find: Callable[[Path], list[Path]] = rundir.find_runs
) -> list[dict[str, Any]]:
    """Return the rows of ``load_runs``, with None for missing values.

    ``find`` lists the runs in a folder.
    """
    runs = [rundir.RunDir(path) for folder in folders for path in find(Path(folder))]
    rows = [_outcome(run) for run in runs]
    configs = [_flat(fileio.read_yaml(r.config) if r.config.exists() else {}) for r in runs]
    for row, config in zip(rows, configs, strict=True):
        if config.get("scale") == "smoke":  # a trial of a study
            row["scale"] = "smoke"
    last = ("error", "folder")
    names = [name for name in dict.fromkeys(n for row in rows for n in row) if name not in last]
    known = {name.rsplit(".", 1)[-1] for name in (*names, *last)}
    for name in dict.fromkeys(name for config in configs for name in config):
        parts, values = name.split("."), [config.get(name) for config in configs]
        if parts[0] in rundir.NOT_SCIENCE or parts[-1] in known or len(set(map(repr, values))) < 2:
            continue
        names.append(f"config.{name}")
        for row, value in zip(rows, values, strict=True):
            row[f"config.{name}"] = value
    return [{name: row.get(name) for name in (*names, *last)} for row in rows]


def _outcome(run: rundir.RunDir) -> dict[str, Any]:
    """Return the row of a run.  Raises ConfigError for a damaged file."""
    place = {"study": run.path.parent.name, "run_name": run.path.name, "folder": str(run.path)}
    if run.results.exists():
        found = fileio.read_json(run.results)
        for name, value in found.items():
            _check_cell(run.results, name, value)
        if not rundir.is_adaptation(run.path):
            found |= {name: None for name in (*TEXTS, *NUMBERS) if name not in found}
        return {**found, **place, "error": None}
    config_hash = fileio.read_json(run.environment).get("config_hash")
    _check_cell(run.environment, "config_hash", config_hash)
    error = fileio.read_json(run.error).get("error") if run.error.exists() else None
    _check_cell(run.error, "error", error or "", ("error",))
    status = "failed" if error else "unfinished"
    return {**place, "config_hash": config_hash, "status": status, "error": error}


def _check_cell(path: Path, name: str, value: Any, texts: Sequence[str] = TEXTS) -> None:
    """Raise ConfigError unless ``value`` is the text or number that a table needs."""
    most = 2**63 if type(value) is int else math.inf  # integers fit into 64 bits
    is_number = type(value) in (int, float) and abs(value) < most
    if name in texts:
        holds, wanted = isinstance(value, str), "text"
    elif name in NUMBERS:
        holds, wanted = value is None or is_number, "number"
    else:
        holds, wanted = isinstance(value, str | bool | None) or is_number, "number or text"
    if not holds:
        raise ConfigError(f"{path}: {name}={value!r:.40}: must be a {wanted}")


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested values by their dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        nested = isinstance(value, dict)
        flat |= _flat(value, f"{prefix}{name}.") if nested else {prefix + name: value}
    return flat
