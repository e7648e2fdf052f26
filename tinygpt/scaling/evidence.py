"""What a set of runs can show: the checklist of a plan before training, and of finished runs.

``diagnostics`` adds the checks of the law that is fitted to them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from tinygpt.scaling.runs import SETTINGS
from tinygpt.scaling.wording import times

# What a study may vary as the x of a law, in the words of results.json.
VARIABLES = {
    "parameters_non_embedding": "model size",
    "train_tokens": "training tokens",
    "max_seq_len": "context",
    "unique_train_tokens": "unique tokens",
}
SIGNIFICANT = 0.01  # a smaller p-value speaks against the law
FEWEST_STEPS = 100  # past warm-up; before that a loss is mostly the unigram frequencies
CLEAR = 2.0  # a difference in AICc that speaks (Burnham & Anderson 2002)
# Columns with the outcome of a training; the loss before it and the entropy of the corpus are not.
OUTCOME = re.compile(
    r"^(?!initial|(\w+_)?irreducible).*(loss|perplexity|ppl|accuracy|bits_per|bpb|bpc|nll)", re.I
)
CHECKS = {  # id: (title, what to do if it fails)
    "three_values": ("{what} has at least three values", "More values, further apart."),
    "wide_range": ("{what} spans more than an order of magnitude", "Spread the values wider."),
    "equal_tokens": ("equal training tokens for all sizes", "Train all sizes on equal tokens."),
    "seeds": ("at least two seeds of every setting", "Run each setting again with another `seed`."),
    "validation_set": ("one validation set", "Score all runs on one validation set."),
    "steps": (
        "every run is trained well past its warm-up",
        "Train longer, or in smaller batches: such a loss says how a run starts.",
    ),
    "no_repetition": ("no token is seen twice", "Use more text or fewer tokens, or vary both."),
    "decayed": ("every run decays to its own end", "Let each learning rate decay to its end."),
    "fair_rate": (
        "a fair learning rate for every width",
        "Sweep `optim.learning_rate` for each width, or use `model.parametrization=mup`.",
    ),
    "finished": ("all runs finished", "Start the same command again: it does what is missing."),
    "rate_inside": ("the best learning rate is not at the edge of its sweep", "Extend the sweep."),
    "recipe": ("one recipe", "Train all runs by one recipe, or fit each alone (`where=`)."),
    "training_set": ("one training set", "Train all runs on one corpus, or vary its size alone."),
    "precision": ("one precision", "Set `train.precision` and run the odd ones again."),
    "code_version": ("one version of the code", "Run the odd ones again with the same version."),
    "own_rows": ("every row is a run of its own", "Fit final losses alone."),
    "one_variable": ("nothing but its variable differs between the runs", "Fit both variables."),
    "same_task": ("one vocabulary, context and text", "Fit each alone (`where=`), or train again."),
    "unchosen": (
        "runs were not chosen by their loss",
        "Choose runs by what was set before they were trained; `status` shows which diverged.",
    ),
    "single_run": (
        "no single run sets the law",
        "Repeat it with other seeds; leave a run out only for a reason that is not its loss.",
    ),
    "certified": ("a certified minimum inside its bounds", "Drop a term (`law=`), or add runs."),
    "explains": (
        "the law explains the losses",
        "Spread the runs wider, add seeds where they scatter much, or ask for another law.",
    ),
    "enough_runs": (
        "at least three runs more than parameters",
        "Add runs, or drop a term (`law=`).",
    ),
    "tested": ("the law was put to a test", "Add larger runs to hold out, or second seeds."),
    "best_law": (
        "no other law describes these runs clearly better",
        "Ask for that one, or add runs.",
    ),
    "structure": ("the residuals have no structure", "Fit another law or a narrower range."),
    "lack_of_fit": (
        "the law leaves no more than the seeds scatter",
        "Try another law; more seeds would not help where the form is wrong.",
    ),
    "collinear": ("D does not go with N", "Train small models on much, large ones on little."),
    "alpha": (
        "alpha is known to within half of itself",
        "Spread the sizes wider, or repeat them with more seeds.",
    ),
    "beta": (
        "beta is known to within half of itself",
        "Spread the tokens wider, or repeat them with more seeds.",
    ),
    "constant": ("E is identified", "Run larger models on more data, near the floor of the loss."),
    "predicts": ("runs of larger {what}, held out, are predicted", "Add runs of larger {what}."),
    "skill": (
        "held-out runs are predicted better than by the best smaller run or a plane",
        "Add runs of more sizes: these predict no better than a rule of thumb.",
    ),
    "floor": (
        "E meets the exact floor of the corpus",
        "Run nearer to the floor; an E far off says that the form or the range is wrong.",
    ),
    "distance": (
        "the prediction lies no further beyond the runs than they span",
        "Add larger runs, or read only predictions that are nearer.",
    ),
    "splits_agree": ("the ways to split a budget agree", "Add sizes around the best one."),
}


@dataclass(frozen=True)
class Check:
    """A line of the checklist."""

    id: str
    title: str
    passed: bool | None  # None: it does not apply, or is not known
    detail: str
    advice: str  # what to do if it fails

    @property
    def outcome(self) -> str:
        return "n/a" if self.passed is None else "pass" if self.passed else "FAIL"


def check(id: str, passed: Any, detail: str, what: str = "") -> Check:
    """Return a line of the checklist; ``what`` completes its title."""
    title, advice = (text.format(what=what) for text in CHECKS[id])
    return Check(id, title, None if passed is None else bool(passed), detail, advice)


# --- the runs

Verdict = tuple[bool | None, str]
Rule = tuple[str, tuple[str, ...], Callable[[pd.DataFrame], Verdict]]


def check_design(runs: pd.DataFrame) -> list[Check]:
    """Return the checklist of ``runs``: a row a run, columns named as in ``results.json``."""
    varied = [name for name in VARIABLES if name in runs and runs[name].nunique() > 1]
    return [*(_spread(runs[name], VARIABLES[name]) for name in varied), *_judged(runs, DESIGN)]


def check_finished(runs: pd.DataFrame, all_runs: pd.DataFrame) -> list[Check]:
    """Return the checklist of finished runs; ``all_runs`` has those left out too."""
    return [*_judged(all_runs, OF_ALL), *_judged(runs, OF_FITTED)]


def _judged(runs: pd.DataFrame, rules: Sequence[Rule]) -> Iterator[Check]:
    for id, columns, judge in rules:
        missing = [c for c in columns if c not in runs or runs[c].isna().all()]
        passed, detail = (None, f"{missing[0]} is not in the table") if missing else judge(runs)
        yield check(id, passed, detail)


def _spread(values: pd.Series, what: str) -> Check:
    points, ratio = values.nunique(), values.max() / max(1, values.min())
    detail = f"{points} values, {times(ratio)}; a law needs 3, and ×10 to be trusted"
    if points < 3:
        return check("three_values", False, detail, what)
    return check("wide_range", ratio >= 10, detail, what)


def _equal_tokens(runs: pd.DataFrame) -> Verdict:
    tokens = runs["train_tokens"]
    by_size = tokens.groupby(runs["parameters_non_embedding"]).agg(frozenset)
    if by_size.nunique() == 1:
        many = tokens.nunique()
        one = f"{int(tokens.iloc[0]):,} in every run"
        return True, one if many == 1 else f"the same {many} amounts for every size"
    if _is_isoflop(runs):
        return None, "equal compute instead: sizes along budgets"
    return False, f"{int(tokens.min()):,} to {int(tokens.max()):,}, by size"


def _is_isoflop(runs: pd.DataFrame) -> bool:
    """Return whether the runs lie on a few budgets, several sizes on each."""
    if "flops_exact" not in runs or runs["flops_exact"].isna().any():
        return False
    logs = np.sort(np.log(runs["flops_exact"].to_numpy(dtype=float)))
    budgets = np.split(logs, np.flatnonzero(np.diff(logs) > 0.2) + 1)
    wide = max(float(np.ptp(budget)) for budget in budgets)
    return wide < 0.2 and len(budgets) > 1 and len(logs) >= 3 * len(budgets)


def _seeds(runs: pd.DataFrame) -> Verdict:
    settings = [name for name in (*SETTINGS, *VARIABLES) if name in runs]
    if not settings:
        return None, "the table does not say what else differs"
    least = int(runs.groupby(settings, dropna=False)["seed"].nunique().min())
    return least >= 2, f"{least}"


def _steps(runs: pd.DataFrame) -> Verdict:
    least = int((runs["total_steps"] - runs["warmup_steps"].fillna(0)).min())
    return least >= FEWEST_STEPS, f"at least {least:,} optimizer steps behind it"


def _no_repetition(runs: pd.DataFrame) -> Verdict:
    epochs = float((runs["train_tokens"] / runs["unique_train_tokens"]).max())
    shown = f"{epochs:.3g}"
    return epochs <= 1.0, f"up to {shown} epoch{'' if shown == '1' else 's'}"


def _decayed(runs: pd.DataFrame) -> Verdict:
    constant = int((runs["schedule"] == "constant").sum())
    line = f"{constant} runs at a constant rate" if constant else "final, not best, loss counts"
    return constant == 0, line


def _fair_rate(runs: pd.DataFrame) -> Verdict:
    """Judge the rates: under the standard parametrization the best one falls with width."""
    if runs["d_model"].nunique() < 2:
        return None, "one width"
    fixed = runs[runs["parametrization"] == "standard"].groupby("d_model")["learning_rate"]
    if not len(fixed):
        return True, "transferred by mup"
    rates = fixed.agg(frozenset)
    if all(len(tried) > 1 for tried in rates) or rates.nunique() == len(rates):
        return True, "swept or set for each width"
    return False, "one rate for all widths, not transferred"


def _rate_inside(runs: pd.DataFrame) -> Verdict:
    """Judge where the best rate lies at each size that was trained with several."""
    names = ["parameters_non_embedding", "train_tokens", "optimizer"]
    settings = [name for name in names if name in runs]
    losses = runs.groupby([*settings, "learning_rate"])["final_val_loss"].mean().reset_index()
    swept, edge = 0, 0
    for _, group in losses.groupby(settings) if settings else [((), losses)]:
        if len(group) > 2:
            swept += 1
            best = group.sort_values("final_val_loss")["learning_rate"].iloc[0]
            edge += best in (group["learning_rate"].min(), group["learning_rate"].max())
    if not swept:
        return None, "no rate was swept here"
    return edge == 0, f"the best is at the edge for {edge} of {swept} settings"


def _kinds(values: pd.Series) -> str:
    """Return at most four values; of a fingerprint its beginning."""
    return ", ".join(sorted(str(value)[:12] for value in values.dropna().unique())[:4])


def _same(id: str, column: str, detail: str = "") -> Rule:
    """Return the rule that all runs have the same value of ``column``; ``detail`` says so."""

    def judge(runs: pd.DataFrame) -> Verdict:
        same = runs[column].nunique() == 1
        return same, detail if same and detail else _kinds(runs[column])

    return id, (column,), judge


def _recipe(runs: pd.DataFrame) -> Verdict:
    """Judge everything but size, length and learning rate."""
    names = ("optimizer", "schedule", "batch_tokens", "weight_decay", "parametrization")
    varied = [name for name in names if name in runs and runs[name].nunique() > 1]
    each = [f"{name} {_kinds(runs[name])}" for name in varied]
    return not varied, "; ".join(each) or "the same in every run"


def _training_set(runs: pd.DataFrame) -> Verdict:
    """Judge the texts; sets that differ in their size alone are prefixes of one corpus."""
    sets = runs["data_fingerprint"].nunique()
    if sets == 1:
        return True, "all runs are trained on the same text"
    sizes = runs.groupby("data_fingerprint")["unique_train_tokens"].max()
    if sizes.nunique() == sets:
        return None, f"{sets} sets, each of its own size"
    return False, f"{sets} different ones"


def _finished(runs: pd.DataFrame) -> Verdict:
    odd = runs["status"].value_counts().drop("finished", errors="ignore")
    each = ", ".join(f"{count} {status}" for status, count in odd.items())
    return not len(odd), each or "all finished"


DESIGN: Sequence[Rule] = (  # id, the columns it needs, the judge
    ("equal_tokens", ("parameters_non_embedding", "train_tokens"), _equal_tokens),
    ("seeds", ("seed",), _seeds),
    _same("validation_set", "validation_fingerprint", "all are scored on the same tokens"),
    ("steps", ("total_steps", "warmup_steps"), _steps),
    ("no_repetition", ("train_tokens", "unique_train_tokens"), _no_repetition),
    ("decayed", ("schedule",), _decayed),
    ("fair_rate", ("d_model", "parametrization"), _fair_rate),
)
OF_ALL: Sequence[Rule] = (
    ("finished", ("status",), _finished),
    ("rate_inside", ("learning_rate", "final_val_loss"), _rate_inside),
)
OF_FITTED: Sequence[Rule] = (
    ("recipe", ("optimizer",), _recipe),
    ("training_set", ("data_fingerprint", "unique_train_tokens"), _training_set),
    _same("precision", "precision_resolved"),
    _same("code_version", "git_commit"),
)


def check_choice(condition: str, loss: str, left_out: pd.DataFrame) -> Check:
    """Judge a ``where=``: any law fits runs that were picked by their result."""
    words = re.sub(r"'[^']*'|\"[^\"]*\"", " ", condition)
    names = re.findall(r"`([^`]+)`", words)
    names += re.findall(r"[^\W\d]\w*", re.sub("`[^`]+`", " ", words))
    read = [name for name in dict.fromkeys(names) if name == loss or OUTCOME.search(name)]
    gone = int((left_out["reason"] == f"not {condition}").sum())
    detail = f"where={condition}: {gone} left out"
    detail += f" by {', '.join(read)}, an outcome of training" if read and gone else ""
    return check("unchosen", not (read and gone), detail)
