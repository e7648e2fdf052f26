"""What a set of runs can show, by its design: the evidence protocol of a scaling study.

The same checks read a plan before anything is trained and the table of finished runs.
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

# What a study may vary as the x of a law, in the words of results.json.
VARIABLES = {
    "parameters_non_embedding": "model size",
    "train_tokens": "training tokens",
    "max_seq_len": "context",
    "unique_train_tokens": "unique tokens",
}
# Columns of the configuration in which replicas, runs that differ in their seed alone, agree.
SETTINGS = (
    *("d_model", "n_layers", "n_heads", "d_ff", "max_seq_len", "parametrization"),
    *("vocab_size", "tokenizer", "dataset", "data_fraction", "train_tokens", "batch_tokens"),
    *("learning_rate", "weight_decay", "warmup_steps", "optimizer", "schedule"),
)


@dataclass(frozen=True)
class Check:
    """One line of the checklist."""

    name: str
    passed: bool
    detail: str


def check_design(runs: pd.DataFrame) -> list[Check]:
    """The checklist of ``runs``: a row a run, columns named as in ``results.json``."""
    varied = [name for name in VARIABLES if name in runs and runs[name].nunique() > 1]
    return [
        *(_spread(runs, name) for name in varied),
        _equal_tokens(runs),
        _seeds(runs),
        _one_validation_set(runs),
        _no_repetition(runs),
        _ends_decayed(runs),
        *_fair_rate(runs),
    ]


def _spread(runs: pd.DataFrame, name: str) -> Check:
    values = runs[name]
    points, ratio = values.nunique(), values.max() / max(1, values.min())
    detail = f"{points} values, ×{ratio:.3g}; a law needs 3, and ×10 to be trusted"
    words = VARIABLES[name]
    return (
        Check(f"{words} spans more than an order of magnitude", ratio >= 10, detail)
        if (points >= 3)
        else Check(f"{words} has at least three values", False, detail)
    )


def _equal_tokens(runs: pd.DataFrame) -> Check:
    by_size = runs.groupby("parameters_non_embedding")["train_tokens"].agg(frozenset)
    passed = by_size.nunique() == 1
    many = by_size.iloc[0]
    if passed and len(many) == 1:
        detail = f"{next(iter(many)):,} in every run"
    elif passed:
        detail = f"the same {len(many)} amounts for every size"
    else:
        detail = f"{runs['train_tokens'].min():,} to {runs['train_tokens'].max():,}, by size"
    return Check("equal training tokens for all sizes", passed, detail)


def _seeds(runs: pd.DataFrame) -> Check:
    settings = [name for name in SETTINGS if name in runs]
    least = runs.groupby(settings, dropna=False)["seed"].nunique().min()
    return Check("at least two seeds of every setting", least >= 2, f"{least}")


def _one_validation_set(runs: pd.DataFrame) -> Check:
    sets = runs["validation_fingerprint"].nunique()
    same = "all runs are scored on the same tokens"
    detail = same if sets == 1 else f"{sets} different ones: compare bits per byte with care"
    return Check("one validation set", sets == 1, detail)


def _no_repetition(runs: pd.DataFrame) -> Check:
    epochs = (runs["train_tokens"] / runs["unique_train_tokens"]).max()
    return Check("no token is seen twice", epochs <= 1.0, f"up to {epochs:.3g} epochs")


def _ends_decayed(runs: pd.DataFrame) -> Check:
    constant = (runs["schedule"] == "constant").sum()
    detail = f"{constant} runs at a constant rate" if constant else "final, not best, loss counts"
    return Check("every run decays to its own end", constant == 0, detail)


def _fair_rate(runs: pd.DataFrame) -> list[Check]:
    """Under the standard parametrization the best rate falls with width."""
    if runs["d_model"].nunique() < 2 or "parametrization" not in runs:
        return []
    fixed = runs[runs["parametrization"] == "standard"].groupby("d_model")["learning_rate"]
    if not len(fixed):
        return [Check("a fair learning rate for every width", True, "transferred by mup")]
    rates = fixed.agg(frozenset)
    swept = all(len(tried) > 1 for tried in rates) or rates.nunique() == len(rates)
    detail = "swept or set for each width" if swept else "one rate for all widths, not transferred"
    return [Check("a fair learning rate for every width", swept, detail)]
