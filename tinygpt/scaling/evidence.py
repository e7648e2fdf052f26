"""Judge what a set of runs can show: the checklist of a plan and of finished runs.

``diagnostics`` adds the checks of the law that is fitted to them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from tinygpt.scaling.runs import PLACE, SETTINGS
from tinygpt.scaling.wording import times

# The variables of a law that a study may vary: column in results.json, and name.
VARIABLES = {
    "N": ("parameters_non_embedding", "model size"),
    "D": ("train_tokens", "training tokens"),
    "U": ("unique_train_tokens", "unique tokens"),
    "T": ("max_seq_len", "context"),
    "C": ("flops_exact", "compute"),
}
SIGNIFICANT = 0.01  # a run with a smaller p-value is an outlier
FAMILY = 0.05  # of all tests of a checklist together
FEWEST_STEPS = 100  # past warm-up
FEWEST_DOCUMENTS = 10  # of a validation set
NOISE_SHARE = 0.1  # most that the validation error may be of the spread of the losses
CLEAR = 2.0  # a meaningful difference in AICc (Burnham & Anderson 2002)
# Columns with outcomes of training, which the initial loss and the corpus's entropy are not.
OUTCOME = re.compile(
    r"^(?!initial|(\w+_)?irreducible).*(loss|perplexity|ppl|accuracy|bits_per|bpb|bpc|nll)", re.I
)
PASS, FAIL, NOT_APPLICABLE, NOT_TESTED = "pass", "fail", "not applicable", "not tested"
CHECKS = {  # id: (title, what to do if it fails)
    "three_values": ("{what} has at least three values", "More values, further apart."),
    "wide_range": ("{what} spans an order of magnitude", "Spread the values wider."),
    "equal_tokens": ("equal training tokens for all sizes", "Train all sizes on equal tokens."),
    "collinear": ("D does not go with N", "Train small models on much, large ones on little."),
    "seeds": ("at least two seeds of every setting", "Run each setting again with another `seed`."),
    "validation": (
        "the validation set is large enough",
        "Validate on more text: `data.val_fraction`, `data.eval_tokens` or `data.val_file`.",
    ),
    "validation_set": ("one validation set", "Score all runs on one validation set."),
    "spread": (
        "the losses differ by more than chance",
        "Spread the runs wider, or add seeds and validation text.",
    ),
    "steps": ("every run is trained well past its warm-up", "Train longer, or in smaller batches."),
    "no_repetition": ("no token is seen twice", "Use more text or fewer tokens, or vary both."),
    "decayed": ("every run decays to its own end", "Let each learning rate decay to its end."),
    "fair_rate": (
        "a fair learning rate for every width",
        "Sweep `optim.learning_rate` for each width, or use `model.parametrization=mup`.",
    ),
    "rate_inside": ("the best learning rate is not at the edge of its sweep", "Extend the sweep."),
    "finished": ("all runs finished", "Start the same command again: it does what is missing."),
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
    "enough_runs": (
        "at least three runs more than parameters",
        "Add runs, or drop a term (`law=`).",
    ),
    "certified": ("a certified minimum inside its bounds", "Drop a term (`law=`), or add runs."),
    "explains": ("the law explains the losses", "Spread the runs wider, or ask for another law."),
    "best_law": (
        "no other law describes these runs clearly better",
        "Ask for that one, or add runs.",
    ),
    "structure": ("the residuals have no structure", "Fit another law or a narrower range."),
    "lack_of_fit": (
        "the law leaves no more than the seeds scatter",
        "Try another law; more seeds would not help where the form is wrong.",
    ),
    "single_run": (
        "no single run sets the law",
        "Repeat it with other seeds; leave a run out only for a reason that is not its loss.",
    ),
    "alpha": (
        "alpha is known to within half of itself",
        "Spread the sizes wider, or repeat them with more seeds.",
    ),
    "beta": (
        "beta is known to within half of itself",
        "Spread the tokens wider, or repeat them with more seeds.",
    ),
    "constant": (
        "E is known to within a quarter of itself",
        "Fit a law with E (`law=`), and run larger models on more data.",
    ),
    "floor": (
        "E meets the exact floor of the corpus",
        "Run nearer to the floor, or try another law.",
    ),
    "predicts": ("runs of larger {what}, held out, are predicted", "Add runs of larger {what}."),
    "skill": (
        "held-out runs are predicted better than by the best smaller run or a plane",
        "Add runs of more sizes.",
    ),
    "distance": (
        "the prediction lies no further beyond the runs than they span",
        "Add larger runs, or read only predictions that are nearer.",
    ),
    "splits_agree": ("the ways to split a budget agree", "Add sizes around the best one."),
}
P_VALUE = "p above 5 % divided among the tests (Holm): one false alarm in twenty checklists"
THRESHOLDS = {  # by group: when a check passes, and why
    "design": {
        "three_values": "at least 3: any law goes through two",
        "wide_range": "at least ×10: over less any smooth curve is nearly straight",
        "equal_tokens": "the same for each size: else the law of size is one of tokens too",
        "collinear": "a correlation of the logs below 0.9: above, either could explain the other",
        "seeds": "at least 2: one run does not say what chance does",
        "validation": (
            f"at least {FEWEST_DOCUMENTS} documents, a standard error of at most "
            f"{100 * NOISE_SHARE:.0f} % of the losses' spread: else the law is one of these texts"
        ),
        "validation_set": "one: losses on different texts do not compare",
        "spread": "at least 5 times the noise: fifty runs alike would span 4.5 times as much",
        "steps": f"at least {FEWEST_STEPS} more: earlier losses are mostly unigram frequencies",
        "no_repetition": "at most 1 epoch: a token seen again teaches less",
        "decayed": "no constant rate: a loss before its decay lies too high",
        "fair_rate": "swept, set or transferred: the best rate changes with width",
        "rate_inside": "inside for every setting: beyond the edge may be a better one",
        "finished": "all: which runs fail is seldom left to chance",
        "recipe": "one: each recipe has a law of its own",
        "training_set": "one, or one of each size: each text has a law of its own",
        "precision": "one: rounding changes losses",
        "code_version": "one: a change of the code may change losses",
        "own_rows": "one row a run: checkpoints of a run are not independent",
        "one_variable": "one value of any other: else the law is one of that too",
        "same_task": "one of each: losses of different tasks do not compare",
        "unchosen": "none left out by an outcome: any law fits what was picked to fit",
    },
    "fit": {
        "enough_runs": "at least 3 more: fewer cannot speak against a law",
        "certified": "converged, curved upwards, at no bound: else other values may fit better",
        "explains": "R² at least 0.9 of what seeds leave: less is hardly a description",
        "best_law": f"within {CLEAR:g} AICc of the best: beyond, the other is clearly likelier",
        "structure": P_VALUE,
        "lack_of_fit": P_VALUE,
        "single_run": P_VALUE,
        "alpha": "both ends known, at most its value apart: else it may be twice that",
        "beta": "both ends known, at most its value apart: else it may be twice that",
        "constant": "both ends known, at most half of it apart: E is what is left beyond the runs",
        "floor": "the entropy inside the interval of E: outside, the form or the range is wrong",
    },
    "prediction": {
        "predicts": f"their mean error within the mean interval, and {P_VALUE}",
        "skill": "a smaller error than both: else a rule of thumb does as well",
        "distance": "at most what they span: no law was seen to hold for longer",
        "splits_agree": "intervals that overlap, sizes within ×2: else one of the ways is wrong",
    },
}


@dataclass(frozen=True)
class Check:
    """Hold a line of the checklist."""

    id: str
    group: str
    title: str
    outcome: str
    figure: str  # what was found
    threshold: str  # when it passes, and why
    advice: str  # what to do if it fails

    @property
    def passed(self) -> bool | None:
        """Return whether the check passes, or None if it does not apply or was not tested."""
        return {PASS: True, FAIL: False}.get(self.outcome)


def check(id: str, outcome: Any, figure: str, what: str = "", threshold: str = "") -> Check:
    """Return a line of the checklist; ``outcome`` may also be whether the check passes.

    ``what`` completes the title; ``threshold`` replaces the usual one.
    """
    (group,) = (group for group, rows in THRESHOLDS.items() if id in rows)
    title, advice = (text.format(what=what) for text in CHECKS[id])
    if not isinstance(outcome, str):
        outcome = PASS if outcome else FAIL
    return Check(id, group, title, outcome, figure, threshold or THRESHOLDS[group][id], advice)


# --- the runs

Verdict = tuple[Any, str]  # an outcome, or whether it passes; what was found
Rule = tuple[str, tuple[str, ...], Callable[[pd.DataFrame], Verdict]]


def check_design(runs: pd.DataFrame, law_of: Collection[str] = ()) -> list[Check]:
    """Return the checklist of ``runs``, one row per run with the columns of ``results.json``.

    ``law_of`` are the variables of the law, by default those that differ between the runs.
    """
    known = {name for name in runs if runs[name].notna().any()}
    columns = {v: name for v, (name, _) in VARIABLES.items() if name in known}
    is_repeated = {"D", "U"} <= set(columns) and _epochs(runs) > 1.001
    varied = [v for v in columns if v != "C" and runs[columns[v]].nunique() > 1]
    law_of = law_of or [v for v in varied if v != "U" or is_repeated]
    checks = []
    for v in (v for v in law_of if v in columns):
        values, what = runs[columns[v]], VARIABLES[v][1]
        points, ratio = values.nunique(), values.max() / values.min()
        id, passed = ("wide_range", ratio >= 10) if points > 2 else ("three_values", False)
        checks.append(check(id, passed, f"{points} values, {times(ratio)}", what))
    outside = {} if set(law_of) == {"N"} else {"equal_tokens": "not a law of size alone"}
    if not {"N", "D"} <= set(law_of):
        outside["collinear"] = "not a law of both"
    if "U" in law_of and is_repeated:
        outside["no_repetition"] = "a law of unique tokens says what repeating them costs"
    return [*checks, *_judged(runs, DESIGN, outside)]


def check_finished(runs: pd.DataFrame, all_runs: pd.DataFrame) -> list[Check]:
    """Return the checklist of finished runs; ``all_runs`` includes those left out."""
    return [*_judged(all_runs, OF_ALL), *_judged(runs, OF_FITTED)]


def _judged(
    runs: pd.DataFrame, rules: Sequence[Rule], outside: Mapping[str, str] | None = None
) -> Iterator[Check]:
    """Apply each rule to the runs; ``outside`` says why some rules do not apply."""
    for id, columns, judge in rules:
        missing = [c for c in columns if c not in runs or runs[c].isna().all()]
        if outside and id in outside:
            yield check(id, NOT_APPLICABLE, outside[id])
        elif missing:
            yield check(id, NOT_TESTED, f"{missing[0]} is not in the table")
        else:
            yield check(id, *judge(runs))


def _equal_tokens(runs: pd.DataFrame) -> Verdict:
    tokens = runs["train_tokens"]
    by_size = tokens.groupby(runs["parameters_non_embedding"]).agg(frozenset)
    if by_size.nunique() > 1:
        return False, f"{int(tokens.min()):,} to {int(tokens.max()):,}, by size"
    if tokens.nunique() > 1:
        return True, f"the same {tokens.nunique()} amounts for every size"
    return True, f"{int(tokens.iloc[0]):,} in every run"


def correlation(sizes: Any, tokens: Any) -> float:
    """Return the |correlation| of the logarithms of sizes and tokens."""
    return abs(float(np.corrcoef(np.log(sizes), np.log(tokens))[0, 1]))


def _collinear(runs: pd.DataFrame) -> Verdict:
    r = correlation(*(runs[name].to_numpy(float) for name in PLACE))
    return r < 0.9, f"correlation of the logs {r:.2f}"


def _seeds(runs: pd.DataFrame) -> Verdict:
    variables = [name for v, (name, _) in VARIABLES.items() if v != "C"]
    settings = [name for name in (*SETTINGS, *variables) if name in runs]
    if not settings:
        return NOT_TESTED, "the table does not say what else differs"
    least = int(runs.groupby(settings, dropna=False)["seed"].nunique().min())
    return least >= 2, f"{least}"


def _steps(runs: pd.DataFrame) -> Verdict:
    least = int((runs["total_steps"] - runs["warmup_steps"].fillna(0)).min())
    return least >= FEWEST_STEPS, f"at least {least:,} optimizer steps behind it"


def _epochs(runs: pd.DataFrame) -> float:
    return float((runs["train_tokens"] / runs["unique_train_tokens"]).max())


def _no_repetition(runs: pd.DataFrame) -> Verdict:
    shown = f"{_epochs(runs):.3g}"
    return _epochs(runs) <= 1.0, f"up to {shown} epoch{'' if shown == '1' else 's'}"


def _decayed(runs: pd.DataFrame) -> Verdict:
    if constant := int((runs["schedule"] == "constant").sum()):
        return False, f"{constant} runs at a constant rate"
    return True, "final, not best, loss counts"


def _fair_rate(runs: pd.DataFrame) -> Verdict:
    """Judge the rates; under the standard parametrization the best one falls with width."""
    if runs["d_model"].nunique() < 2:
        return NOT_APPLICABLE, "one width"
    fixed = runs[runs["parametrization"] == "standard"].groupby("d_model")["learning_rate"]
    if not len(fixed):
        return True, "transferred by mup"
    rates = fixed.agg(frozenset)
    if all(len(tried) > 1 for tried in rates) or rates.nunique() == len(rates):
        return True, "swept or set for each width"
    return False, "one rate for all widths, not transferred"


def _rate_inside(runs: pd.DataFrame) -> Verdict:
    """Judge whether the best rate lies inside the sweep at each setting with three or more."""
    names = ["parameters_non_embedding", "train_tokens", "optimizer"]
    settings = [name for name in names if name in runs]
    losses = runs.groupby([*settings, "learning_rate"])["final_val_loss"].mean().reset_index()
    groups = [one for _, one in losses.groupby(settings)] if settings else [losses]
    swept = [one.sort_values("final_val_loss")["learning_rate"] for one in groups if len(one) > 2]
    if not swept:
        return NOT_APPLICABLE, "no rate was swept here"
    edge = sum(rates.iloc[0] in (rates.min(), rates.max()) for rates in swept)
    return edge == 0, f"the best is at the edge for {edge} of {len(swept)} settings"


def _kinds(values: pd.Series) -> str:
    """List at most four values, each cut to 12 characters because fingerprints are long."""
    return ", ".join(sorted(str(value)[:12] for value in values.dropna().unique())[:4])


def _same(id: str, column: str, detail: str = "") -> Rule:
    """Return the rule that ``column`` has one value; ``detail`` is reported if it does."""

    def judge(runs: pd.DataFrame) -> Verdict:
        same = runs[column].nunique() == 1
        return same, detail if same and detail else _kinds(runs[column])

    return id, (column,), judge


def _recipe(runs: pd.DataFrame) -> Verdict:
    """Judge whether all but size, length and learning rate is the same."""
    names = ("optimizer", "schedule", "batch_tokens", "weight_decay", "parametrization")
    varied = [name for name in names if name in runs and runs[name].nunique() > 1]
    each = [f"{name} {_kinds(runs[name])}" for name in varied]
    return not varied, "; ".join(each) or "the same in every run"


def _training_set(runs: pd.DataFrame) -> Verdict:
    """Judge the texts, of which those that differ in size are prefixes of one corpus."""
    sizes = runs.groupby("data_fingerprint")["unique_train_tokens"].max()
    if len(sizes) == 1:
        return True, "all runs are trained on the same text"
    if sizes.nunique() == len(sizes):
        return NOT_APPLICABLE, f"{len(sizes)} sets, each of its own size"
    return False, f"{len(sizes)} different ones"


def _finished(runs: pd.DataFrame) -> Verdict:
    odd = runs["status"].value_counts().drop("finished", errors="ignore")
    each = ", ".join(f"{count} {status}" for status, count in odd.items())
    return not len(odd), each or "all finished"


DESIGN: Sequence[Rule] = (  # id, columns needed, function
    ("equal_tokens", PLACE, _equal_tokens),
    ("collinear", PLACE, _collinear),
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


def check_validation(
    runs: pd.DataFrame, error: float | None = None, spread: float | None = None
) -> Check:
    """Judge the validation set by its documents, and by the standard ``error`` of its loss compared
    with the ``spread`` of the losses, both relative to the loss and known only after training."""
    if "val_documents" not in runs and error is None:
        return check("validation", NOT_TESTED, "val_documents is not in the table")
    tokens, documents = (
        pd.to_numeric(runs.get(name, pd.Series(dtype=float)), errors="coerce").min()
        for name in ("val_tokens", "val_documents")
    )
    counts = {"tokens": tokens, "documents": documents}
    found = [f"{int(n):,} {what}" for what, n in counts.items() if not pd.isna(n)]
    few, is_counted = bool(documents < FEWEST_DOCUMENTS), not pd.isna(documents)
    if not is_counted and "val_documents" in runs and error is not None:
        found.append("one stream without documents, judged by its standard error alone")
        is_counted = True
    if error is None or spread is None:
        found.append("the standard error of its loss is not known")
        return check("validation", FAIL if few else NOT_TESTED, ", ".join(found))
    found.append(f"standard error {error:.2%} of the loss, spread of the losses {spread:.2%}")
    passed = not few and error <= NOISE_SHARE * spread
    outcome = NOT_TESTED if passed and not is_counted else passed
    return check("validation", outcome, ", ".join(found))


def check_choice(condition: str, loss: str, left_out: pd.DataFrame) -> Check:
    """Judge whether ``where=`` chose runs by their result, since any law fits such runs."""
    words = re.sub(r"'[^']*'|\"[^\"]*\"", " ", condition)
    names = re.findall(r"`([^`]+)`", words)
    names += re.findall(r"[^\W\d]\w*", re.sub("`[^`]+`", " ", words))
    read = [name for name in dict.fromkeys(names) if name == loss or OUTCOME.search(name)]
    gone = int((left_out["reason"] == f"not {condition}").sum())
    detail = f"where={condition}: {gone} left out"
    detail += f" by {', '.join(read)}, an outcome of training" if read and gone else ""
    return check("unchosen", not (read and gone), detail)
