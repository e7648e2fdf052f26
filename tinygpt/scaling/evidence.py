"""What a set of runs can show: the evidence protocol of a scaling study.

``check_design`` reads a plan before anything is trained, or the table of finished runs;
``check_fit`` reads the law that was fitted to them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy import special

from tinygpt.scaling.runs import SETTINGS

if TYPE_CHECKING:
    from tinygpt.scaling.fitting import Fit
    from tinygpt.scaling.intervals import Interval
    from tinygpt.scaling.selection import Candidate, HeldOut, Noise

# What a study may vary as the x of a law, in the words of results.json.
VARIABLES = {
    "parameters_non_embedding": "model size",
    "train_tokens": "training tokens",
    "max_seq_len": "context",
    "unique_train_tokens": "unique tokens",
}
SIGNIFICANT = 0.01  # a smaller p-value speaks against the law
NEAR_FLOOR = 0.05
MOSTLY_SEEDS = 0.5  # of the variance of the losses, from where there is little else in it
LEVEL = 0.95  # of the intervals that held-out runs should lie in
PLAIN = ("power_constant", "chinchilla")  # what other laws must be compared with
CLEAR = 2.0  # a difference in AICc that speaks (Burnham & Anderson 2002)


@dataclass(frozen=True)
class Check:
    """One line of the checklist."""

    name: str
    passed: bool | None  # None: does not apply, or cannot be told
    detail: str


@dataclass(frozen=True)
class Distance:
    """How far a prediction lies beyond the runs, beside what they span: both are factors."""

    beyond: float
    span: float
    what: str = ""  # "N = 1e12 is ", of one variable of several


def check_design(runs: pd.DataFrame) -> list[Check]:
    """The checklist of ``runs``: a row a run, columns named as in ``results.json``."""
    spreads = [_spread(runs, name) for name in VARIABLES if _varies(runs, name)]
    return [*spreads, *_judged(runs, _DESIGN)]


def check_finished(runs: pd.DataFrame, all_runs: pd.DataFrame) -> list[Check]:
    """What can be told of runs that are over; ``all_runs`` are those that were left out too."""
    return [*_judged(all_runs, _OF_ALL), *_judged(runs, _OF_FITTED)]


Verdict = tuple[bool | None, str]
Rule = tuple[str, tuple[str, ...], Callable[[pd.DataFrame], Verdict]]


def _judged(runs: pd.DataFrame, rules: Sequence[Rule]) -> Iterator[Check]:
    for name, columns, judge in rules:
        missing = [c for c in columns if c not in runs or runs[c].isna().all()]
        passed, detail = (None, f"{missing[0]} is not in the table") if missing else judge(runs)
        yield Check(name, passed, detail)


def _varies(runs: pd.DataFrame, name: str) -> bool:
    return name in runs and runs[name].nunique() > 1


def _spread(runs: pd.DataFrame, name: str) -> Check:
    values = runs[name]
    points, ratio = values.nunique(), values.max() / max(1, values.min())
    detail = f"{points} values, {_times(ratio)}; a law needs 3, and ×10 to be trusted"
    words = VARIABLES[name]
    if points < 3:
        return Check(f"{words} has at least three values", False, detail)
    return Check(f"{words} spans more than an order of magnitude", bool(ratio >= 10), detail)


def _times(ratio: float) -> str:
    return f"×{ratio:,.0f}" if ratio >= 100 else f"×{ratio:.3g}"


def _equal_tokens(runs: pd.DataFrame) -> Verdict:
    by_size = runs.groupby("parameters_non_embedding")["train_tokens"].agg(frozenset)
    passed = bool(by_size.nunique() == 1)
    many = by_size.iloc[0]
    if passed and len(many) == 1:
        return passed, f"{int(next(iter(many))):,} in every run"
    if passed:
        return passed, f"the same {len(many)} amounts for every size"
    if _is_isoflop(runs):
        return None, "equal compute instead: sizes along budgets"
    return (
        passed,
        f"{int(runs['train_tokens'].min()):,} to {int(runs['train_tokens'].max()):,}, by size",
    )


def _is_isoflop(runs: pd.DataFrame) -> bool:
    """Whether the runs lie on a few budgets, several sizes on each."""
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


def _one_validation_set(runs: pd.DataFrame) -> Verdict:
    sets = runs["validation_fingerprint"].nunique()
    same = "all runs are scored on the same tokens"
    return sets == 1, same if sets == 1 else f"{sets} different ones: compare with care"


def _no_repetition(runs: pd.DataFrame) -> Verdict:
    epochs = float((runs["train_tokens"] / runs["unique_train_tokens"]).max())
    shown = f"{epochs:.3g}"
    return epochs <= 1.0, f"up to {shown} epoch{'' if shown == '1' else 's'}"


def _ends_decayed(runs: pd.DataFrame) -> Verdict:
    constant = int((runs["schedule"] == "constant").sum())
    return constant == 0, (
        f"{constant} runs at a constant rate" if constant else "final, not best, loss counts"
    )


def _fair_rate(runs: pd.DataFrame) -> Verdict:
    """Under the standard parametrization the best rate falls with width."""
    if runs["d_model"].nunique() < 2:
        return None, "one width"
    fixed = runs[runs["parametrization"] == "standard"].groupby("d_model")["learning_rate"]
    if not len(fixed):
        return True, "transferred by mup"
    rates = fixed.agg(frozenset)
    swept = all(len(tried) > 1 for tried in rates) or rates.nunique() == len(rates)
    return swept, (
        "swept or set for each width" if swept else "one rate for all widths, not transferred"
    )


def _rate_inside(runs: pd.DataFrame) -> Verdict:
    """Of sizes at which several rates were tried: whether the best is not the last one tried."""
    swept, edge = 0, 0
    names = ["parameters_non_embedding", "train_tokens", "optimizer"]
    settings = [name for name in names if name in runs]
    for _, group in runs.groupby(settings) if settings else [((), runs)]:
        mean = group.groupby("learning_rate")["final_val_loss"].mean()
        if len(mean) > 2:
            swept += 1
            edge += mean.idxmin() in (mean.index.min(), mean.index.max())
    if not swept:
        return None, "no rate was swept here"
    return edge == 0, f"the best is at the edge for {edge} of {swept} settings"


def _one_of(column: str) -> Callable[[pd.DataFrame], Verdict]:
    def judge(runs: pd.DataFrame) -> Verdict:
        kinds = sorted(map(str, runs[column].dropna().unique()))
        return len(kinds) == 1, kinds[0] if len(kinds) == 1 else f"{', '.join(kinds[:4])}"

    return judge


def _one_recipe(runs: pd.DataFrame) -> Verdict:
    """Apart from size, length and rate."""
    kinds = {
        name: sorted(map(str, runs[name].dropna().unique()))
        for name in ("optimizer", "schedule", "batch_tokens", "weight_decay", "parametrization")
        if name in runs and runs[name].nunique() > 1
    }
    varied = "; ".join(f"{name} {', '.join(values[:4])}" for name, values in kinds.items())
    return not kinds, varied or "the same in every run"


def _one_training_set(runs: pd.DataFrame) -> Verdict:
    """Sets that differ in their size alone are the beginnings of one corpus."""
    sets = runs["data_fingerprint"].nunique()
    if sets == 1:
        return True, "all runs are trained on the same text"
    sizes = runs.groupby("data_fingerprint")["unique_train_tokens"].max()
    if sizes.nunique() == sets:
        return None, f"{sets} sets, each of its own size"
    return False, f"{sets} different ones"


def _all_ended(runs: pd.DataFrame) -> Verdict:
    odd = runs["status"].value_counts().drop("finished", errors="ignore")
    return not len(odd), (
        ", ".join(f"{count} {status}" for status, count in odd.items()) or "all finished"
    )


_DESIGN: Sequence[Rule] = (
    (
        "equal training tokens for all sizes",
        ("parameters_non_embedding", "train_tokens"),
        _equal_tokens,
    ),
    ("at least two seeds of every setting", ("seed",), _seeds),
    ("one validation set", ("validation_fingerprint",), _one_validation_set),
    ("no token is seen twice", ("train_tokens", "unique_train_tokens"), _no_repetition),
    ("every run decays to its own end", ("schedule",), _ends_decayed),
    ("a fair learning rate for every width", ("d_model", "parametrization"), _fair_rate),
)
_OF_ALL: Sequence[Rule] = (
    ("all runs came to their end", ("status",), _all_ended),
    (
        "the best learning rate is not at the edge of its sweep",
        ("learning_rate", "final_val_loss"),
        _rate_inside,
    ),
)
_OF_FITTED: Sequence[Rule] = (
    ("one recipe", ("optimizer",), _one_recipe),
    ("one training set", ("data_fingerprint", "unique_train_tokens"), _one_training_set),
    ("one precision", ("precision_resolved",), _one_of("precision_resolved")),
    ("one version of the code", ("git_commit",), _one_of("git_commit")),
)


# --- the law


def check_fit(
    fit: Fit,
    held_out: HeldOut | None,
    size: str,
    intervals: Mapping[str, Interval],
    noise: Noise | None,
    structure: float | None,
    floor: float | None,
    distance: Distance | None,
    rivals: Sequence[Candidate],
) -> list[Check]:
    """The checklist of a law.

    ``size`` is what runs were held out by, ``structure`` the p-value of there being none in the
    residuals, ``floor`` the exact entropy of the corpus, ``distance`` how far beyond the runs the
    predictions lie, ``rivals`` all laws that were tried.
    """
    return [
        _certified(fit),
        _explains(fit, noise),
        _enough(fit),
        _tested(held_out, noise),
        _unrivalled(fit, rivals),
        _shapeless(structure),
        _no_lack_of_fit(fit, noise),
        *_not_collinear(fit),
        *_falls(intervals),
        *_constant_identified(fit, intervals),
        _predicts(held_out, size),
        *_meets_floor(fit, intervals, floor),
        _distance(distance),
    ]


def _explains(fit: Fit, noise: Noise | None) -> Check:
    """R² beside the greatest that any law could reach, which is what seeds leave: their scatter is
    pure error (Draper & Smith 1998, section 2.1).

    Where seeds make up half of the variance or more there is little to explain: the runs are no
    evidence for any law, and the reason is not the law.
    """
    name = "the law explains the losses"
    if fit.degrees < 1:
        return Check(name, None, "it goes through every run")
    ceiling, share = 1.0, 0.0
    if noise:
        y = fit.points.response
        total = float(np.sum((y - y.mean()) ** 2))
        ceiling = 1.0 - noise.scale**2 * noise.degrees / total
        share = noise.scale**2 * (len(fit.points) - 1) / total
    detail = f"R² of {fit.unit} {fit.r_squared:.4f}"
    if share >= MOSTLY_SEEDS:
        detail += f", of at most {ceiling:.2f} by any law: seeds differ as much as settings do; "
        return Check(name, False, f"{detail}more seeds or a wider range is needed")
    if ceiling < 1.0:
        detail += f", of at most {ceiling:.4f} where seeds scatter so"
    return Check(name, fit.r_squared >= 0.9 * ceiling, detail)


def _enough(fit: Fit) -> Check:
    detail = f"{len(fit.points)} runs, {len(fit.optimum.law)} parameters"
    return Check("at least three runs more than parameters", fit.degrees >= 3, detail)


def _tested(held_out: HeldOut | None, noise: Noise | None) -> Check:
    name = "the law was put to a test"
    against = ["runs held out"] if held_out else []
    against += ["the scatter of the seeds"] if noise and noise.lack_of_fit is not None else []
    return Check(name, bool(against), " and ".join(against) or "neither held-out runs nor seeds")


def _certified(fit: Fit) -> Check:
    found = fit.optimum
    name = "a certified minimum inside its bounds"
    bound = f"; at its bound: {', '.join(found.at_bound)}" if found.at_bound else ""
    basins = "1 basin" if len(found.basins) == 1 else f"{len(found.basins)} basins"
    detail = (
        f"{basins}, gradient {found.gradient_norm:.1g}, "
        f"least eigenvalue {found.smallest_eigenvalue:.2g}{bound}"
    )
    detail += "" if found.converged else "; not converged"
    passed = found.converged and found.smallest_eigenvalue > 0 and not found.at_bound
    if found.at_bound and set(found.at_bound) <= {"rn", "rd"}:
        return Check(name, None, f"{detail}: repetition of N or D is not shown by these runs")
    return Check(name, passed, detail)


def _unrivalled(fit: Fit, rivals: Sequence[Candidate]) -> Check:
    name = "no other law describes these runs clearly better"
    own = next((c.aicc for c in rivals if c.law == fit.law.name), math.inf)
    best = min(rivals, key=lambda c: c.aicc)
    if not math.isfinite(best.aicc):
        return Check(name, None, "too few runs to compare laws")
    unjudged = [c.law for c in rivals if c.law in PLAIN and not math.isfinite(c.aicc)]
    scored = sum(math.isfinite(c.aicc) for c in rivals)
    if unjudged:
        return Check(name, False, f"too few runs to judge {', '.join(unjudged)}")
    if best.law == fit.law.name:
        others = sorted(c.aicc for c in rivals if c.law != best.law)
        ahead = f", AICc by {others[0] - best.aicc:.1f}" if scored > 1 else ""
        return Check(name, True, f"{best.law} is the best of {scored}{ahead}")
    clear = own - best.aicc > CLEAR
    detail = f"{best.law} is {'' if clear else 'hardly '}better: AICc by {own - best.aicc:.1f}"
    held = {c.law: c.held_out.error for c in rivals if c.held_out}
    if best.law in held and fit.law.name in held:
        detail += f", held-out error {held[best.law]:.2%} against {held[fit.law.name]:.2%}"
    return Check(name, not clear, detail)


def _shapeless(p: float | None) -> Check:
    name = "the residuals have no structure"
    if p is None:
        return Check(name, None, "too few points to tell")
    return Check(name, p >= SIGNIFICANT, f"second and third powers of the logs: p = {p:.2g}")


def _no_lack_of_fit(fit: Fit, noise: Noise | None) -> Check:
    name = "the law leaves no more than the seeds scatter"
    if noise is None or noise.lack_of_fit is None:
        return Check(name, None, "no two runs differ in their seed alone")
    detail = (
        f"seeds scatter by {fit.relative(noise.scale):.2%} of the loss; "
        f"lack of fit: p = {noise.lack_of_fit:.2g}"
    )
    return Check(name, noise.lack_of_fit >= SIGNIFICANT, detail)


def correlation(fit: Fit) -> float | None:
    """Of log N and log D, its size; None where the law has not both."""
    if not {"N", "D"} <= set(fit.points.x):
        return None
    return abs(float(np.corrcoef(fit.points.x["N"], fit.points.x["D"])[0, 1]))


def _not_collinear(fit: Fit) -> Iterator[Check]:
    r = correlation(fit)
    if r is not None:
        yield Check("D does not go with N", r < 0.9, f"correlation of the logs {r:.2f}")


def _falls(intervals: Mapping[str, Interval]) -> Iterator[Check]:
    """The exponents that say how fast a term falls are above zero, with their intervals."""
    for name in ("alpha", "beta"):
        if name in intervals:
            one = intervals[name]
            yield Check(f"{name} is above zero", one.low > 0, _reach(one))


def _reach(one: Interval) -> str:
    """The estimate and its interval; an end that the data do not set is said to be open."""
    low = "open" if one.low in (0.0, -math.inf) else f"{one.low:.3f}"
    high = "open" if one.high == math.inf else f"{one.high:.3f}"
    return f"{one.estimate:.3f}, {low} to {high}"


def _constant_identified(fit: Fit, intervals: Mapping[str, Interval]) -> Iterator[Check]:
    if "E" not in fit.law.coefficients:
        return
    name = "E is identified"
    if "E" in fit.optimum.at_bound:
        yield Check(name, False, "the best E is zero")
    elif "E" in intervals:
        one = intervals["E"]
        wide = one.high - one.low > 0.5 * one.estimate
        yield Check(name, one.identified and not wide, _reach(one))


def _predicts(held_out: HeldOut | None, size: str) -> Check:
    by_compute = size == "compute"
    name = "runs of larger x, held out, are predicted"
    if by_compute:
        name = "runs of larger compute, held out, are predicted"
    if held_out is None:
        return Check(name, None, "too few runs to hold any out")
    detail = (
        f"{held_out.runs} runs up to {_times(held_out.distance)} beyond the rest"
        f"{'' if by_compute else f' in {size}'}: off by "
        f"{held_out.error:.2%}, at most {held_out.worst:.2%}; {held_out.within:.0%} of them in "
        f"their 95 % interval (±{held_out.half_width:.1%} on average)"
    )
    inside = round(held_out.within * held_out.runs)
    p = float(special.bdtr(inside, held_out.runs, LEVEL))
    return Check(name, p >= SIGNIFICANT, detail)


def _meets_floor(
    fit: Fit, intervals: Mapping[str, Interval], floor: float | None
) -> Iterator[Check]:
    if floor is None or "E" not in fit.law.coefficients:
        return
    name = "E meets the exact floor of the corpus"
    found = fit.parameters["E"]
    off = found / floor - 1
    detail = f"E {found:.4f}, entropy of the corpus {floor:.4f} ({off:+.1%})"
    if not {"N", "D"} <= set(fit.columns):  # the limit of one variable alone lies higher
        above = "E" not in intervals or intervals["E"].high >= floor
        yield Check(name, None if above else False, f"{detail}: of one variable, the rest fixed")
        return
    if "E" in intervals and floor in intervals["E"]:
        detail += ", inside the interval"
    yield Check(name, abs(off) <= NEAR_FLOOR, detail)


def _distance(one: Distance | None) -> Check:
    name = "the prediction lies no further beyond the runs than they span"
    if one is None:
        return Check(name, None, "nothing can be predicted")
    detail = f"{one.what}{_times(one.beyond)} beyond; the runs span {_times(one.span)}"
    return Check(name, bool(one.beyond <= one.span), detail)
