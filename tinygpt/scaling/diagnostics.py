"""Judge whether a law can be relied on: the checklist of a fit."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
from scipy import special

from tinygpt.scaling.evidence import (
    CLEAR,
    FAIL,
    FAMILY,
    NOISE_SHARE,
    NOT_APPLICABLE,
    NOT_TESTED,
    THRESHOLDS,
    Check,
    check,
    correlation,
)
from tinygpt.scaling.fitting import Fit
from tinygpt.scaling.forecast import HeldOut
from tinygpt.scaling.intervals import LEVEL, Interval
from tinygpt.scaling.noise import Noise
from tinygpt.scaling.selection import Candidate
from tinygpt.scaling.single import SingleRun
from tinygpt.scaling.wording import count, estimate, reach, times

MANY_TIMES = 5.0  # the noise: fifty runs that differ by noise alone span 4.5 times it
PLAIN = ("power_constant", "chinchilla")  # the laws that others must be compared with

# Check -> the checks whose failure makes it fail; such a failure is counted once.
FOLLOWS = {
    "validation_set": ("same_task",),
    "training_set": ("same_task",),
    "one_variable": ("equal_tokens",),
    "certified": ("enough_runs",),
    "best_law": ("enough_runs",),
    "explains": ("spread", "lack_of_fit"),
    "alpha": ("collinear", "enough_runs", "certified"),
    "beta": ("collinear", "enough_runs", "certified"),
    "constant": ("enough_runs",),
    "floor": ("constant",),
    "distance": ("three_values", "wide_range"),
}


def count_once(checks: Sequence[Check]) -> list[Check]:
    """Sort checks by group, and mark those that fail because of another failure as not tested."""
    failed = {one.id: one.title for one in checks if one.outcome == FAIL}

    def counted(one: Check) -> Check:
        causes = [failed[id] for id in FOLLOWS.get(one.id, ()) if id in failed]
        if one.outcome != FAIL or not causes:
            return one
        return replace(one, outcome=NOT_TESTED, figure=f'{one.figure}; follows from "{causes[0]}"')

    return sorted(map(counted, checks), key=lambda one: list(THRESHOLDS).index(one.group))


def holm(p_values: Collection[float]) -> float:
    """Return the p-value up to which a hypothesis is rejected, such that all tests together reject
    a true one in at most 5 % of studies (Holm 1979)."""
    for rank, p in enumerate(sorted(p_values)):
        if p > (limit := FAMILY / (len(p_values) - rank)):
            return limit
    return FAMILY


def check_law(
    fit: Fit,
    *,
    held_out: HeldOut | None,
    size: str,
    intervals: Mapping[str, Interval],
    noise: Noise | None,
    structure: float | None,
    floor: float | None,
    rivals: Sequence[Candidate],
    single: Sequence[SingleRun],
    names: Sequence[str],
    error: float | None,
) -> Iterator[Check]:
    """Yield the checks of a law.

    ``size`` is the quantity that runs were held out by, ``structure`` the p-value of the test for
    structure in the residuals, ``floor`` the exact entropy of the corpus, ``rivals`` all laws that
    were tried, ``names`` those of the runs, ``error`` the relative standard error of validation.
    """
    lack = noise.lack_of_fit if noise else None
    moving = min((one.p for one in single if one.moves), default=1.0) if single else None
    hits = None
    if held_out:  # the p-value of so few hits by intervals that should cover 95 %
        inside = round(held_out.within * held_out.groups)
        hits = float(special.bdtr(inside, held_out.groups, LEVEL))
    tested = [p for p in (structure, lack, moving, hits) if p is not None]
    limit, joint = holm(tested), f"5 % for {len(tested)} tests together (Holm)"
    above = f"p above {limit:.3g}: {joint}"
    yield _spread(fit, noise, error)
    detail = f"{len(fit.points)} runs, {len(fit.optimum.law)} parameters"
    yield check("enough_runs", fit.degrees >= 3, detail)
    yield _certified(fit)
    yield _explains(fit, noise)
    yield _best_law(fit, rivals, held_out)
    if structure is None:
        yield check("structure", NOT_TESTED, "too few points, or several rows of a run")
    else:
        detail = f"second and third powers of the logs: p = {structure:.3g}"
        yield check("structure", structure > limit, detail, threshold=above)
    if noise is None or lack is None:
        yield check("lack_of_fit", NOT_TESTED, "no two runs differ in their seed alone")
    else:
        scatter = f"{fit.relative(noise.scale):.2%}"
        detail = f"seeds scatter by {scatter} of the loss; lack of fit: p = {lack:.3g}"
        yield check("lack_of_fit", lack > limit, detail, threshold=above)
    yield _single_runs(single, names, moving, limit, above)
    for name in ("alpha", "beta"):
        if name in fit.law.exponents:
            yield check_exponent(name, intervals.get(name))
    yield _constant(fit, intervals.get("E"), floor)
    if floor and "E" in fit.law.coefficients:
        yield _floor(fit, intervals.get("E"), floor)
    yield from _held_out(held_out, size, hits, limit, joint)


def check_exponent(name: str, one: Interval | None) -> Check:
    """Judge by its interval whether an exponent is known."""
    if one is None:
        return check(name, NOT_TESTED, "too few runs, or its term went to zero")
    known = one.identified and one.low > 0 and one.high - one.low <= one.estimate
    return check(name, known, _reach(one))


def spread_of(fit: Fit) -> float:
    """Return the range of the mean losses of the settings, relative to the loss."""
    places = [tuple(row) for row in np.stack(list(fit.points.x.values()), 1).round(9)]
    means = pd.Series(fit.points.response).groupby(pd.Series(places)).mean()
    return float(fit.relative(means.max() - means.min()))


def _spread(fit: Fit, noise: Noise | None, error: float | None) -> Check:
    """Compare the spread of the losses with the scatter of seeds and the validation error, which
    counts only if it passes the check of the validation set."""
    spread = spread_of(fit)
    if error is not None and error > NOISE_SHARE * spread:
        error = None
    if noise is None and not error:
        return check("spread", NOT_TESTED, "neither seeds nor a standard error of validation")
    kinds = {"the scatter of seeds": fit.relative(noise.scale) if noise else 0.0}
    kinds["the error of validation"] = error or 0.0
    each = math.hypot(*kinds.values())
    detail = f"settings differ by up to {spread:.2%} of the loss, {spread / each:.3g} times "
    detail += " and ".join(kind for kind, size in kinds.items() if size)
    return check("spread", spread >= MANY_TIMES * each, detail)


def _constant(fit: Fit, one: Interval | None, floor: float | None) -> Check:
    if floor is not None and floor <= 0:
        return check("constant", NOT_APPLICABLE, "the exact floor of the corpus is zero")
    if "E" not in fit.law.coefficients:
        return check("constant", False, "the law has no E: a text's loss does not go to zero")
    if "E" in fit.optimum.at_bound:
        return check("constant", False, "the best E is zero")
    if one is None:
        return check("constant", NOT_TESTED, "too few runs")
    narrow = one.high - one.low <= 0.5 * one.estimate
    return check("constant", one.identified and narrow, _reach(one))


def _reach(one: Interval) -> str:
    return f"{estimate(one.estimate, one)}, {reach(one)}"


def dependence(fit: Fit) -> float:
    """Return |correlation| of log N and log D over the runs; 0 if the law lacks one."""
    x = fit.points.x
    return correlation(np.exp(x["N"]), np.exp(x["D"])) if {"N", "D"} <= set(x) else 0.0


def _certified(fit: Fit) -> Check:
    found = fit.optimum
    detail = f"{count(len(found.basins), 'basin')}, gradient {found.gradient_norm:.1g}, "
    detail += f"least eigenvalue {found.smallest_eigenvalue:.2g}"
    detail += f"; at its bound: {', '.join(found.at_bound)}" if found.at_bound else ""
    detail += "" if found.converged else "; not converged"
    if found.at_bound and set(found.at_bound) <= {"rn", "rd"}:
        detail += ": these runs do not show repetition of N or D"
        return check("certified", NOT_TESTED, detail)
    others = set(found.at_bound) - {"E"}  # which has a check of its own
    passed = found.converged and found.smallest_eigenvalue > 0 and not others
    return check("certified", passed, detail)


def _explains(fit: Fit, noise: Noise | None) -> Check:
    """Compare R² with the greatest that any law could reach, given that the scatter of seeds is
    pure error (Draper & Smith 1998, section 2.1)."""
    if fit.degrees < 1:
        return check("explains", NOT_TESTED, "it goes through every run")
    ceiling = 1.0
    if noise:
        y = fit.points.response
        ceiling -= noise.scale**2 * noise.degrees / float(np.sum((y - y.mean()) ** 2))
    detail = f"R² of {fit.unit} {fit.r_squared:.4f}"
    detail += f", of at most {ceiling:.4f} where seeds scatter so" if ceiling < 1.0 else ""
    return check("explains", fit.r_squared >= 0.9 * ceiling, detail)


def _best_law(fit: Fit, rivals: Sequence[Candidate], held_out: HeldOut | None) -> Check:
    own = next((c.aicc for c in rivals if c.law == fit.law.name), math.inf)
    best, *others = sorted(rivals, key=lambda c: c.aicc)
    if not math.isfinite(best.aicc):
        return check("best_law", NOT_TESTED, "too few runs to compare laws")
    unjudged = [c.law for c in rivals if c.law in PLAIN and not math.isfinite(c.aicc)]
    if unjudged:
        return check("best_law", False, f"too few runs to judge {', '.join(unjudged)}")
    if best.law == fit.law.name:
        judged = [c.aicc for c in others if math.isfinite(c.aicc)]
        ahead = f", AICc by {judged[0] - best.aicc:.1f}" if judged else ""
        return check("best_law", True, f"{best.law} is the best of {len(judged) + 1}{ahead}")
    clear = own - best.aicc > CLEAR
    detail = f"{best.law} is {'' if clear else 'hardly '}better: AICc by {own - best.aicc:.1f}"
    held = held_out.by_law if held_out else {}
    if best.law in held and fit.law.name in held:
        detail += f", held-out error {held[best.law]:.2%} against {held[fit.law.name]:.2%}"
    return check("best_law", not clear, detail)


def _held_out(
    held: HeldOut | None, size: str, hits: float | None, limit: float, joint: str
) -> Iterator[Check]:
    by = "compute" if size == "compute" else "x"
    if held is None or hits is None:
        few = "too few runs to hold any out"
        yield from (check("predicts", NOT_TESTED, few, by), check("skill", NOT_TESTED, few))
        return
    beyond = f"{held.runs} runs up to {times(held.distance)} beyond the rest"
    beyond += "" if by == "compute" else f" in {size}"
    detail = (
        f"{beyond}: off by {held.error:.2%}, at most {held.worst:.2%}; {held.within:.0%} of them "
        f"in their 95 % interval (±{held.half_width:.1%} on average), p = {hits:.3g}"
    )
    threshold = f"off by no more than the average interval, and p above {limit:.3g}: {joint}"
    passed = hits > limit and held.error <= held.half_width
    yield check("predicts", passed, detail, by, threshold)
    detail = (
        f"off by {held.error:.2%}; as the best smaller run: {held.best_cheaper:.2%}; "
        f"a plane through the larger half of the rest: {held.plane:.2%}"
    )
    yield check("skill", held.has_skill, detail)


def _floor(fit: Fit, interval: Interval | None, floor: float) -> Check:
    found = fit.parameters["E"]
    detail = f"E {found:.4f}, entropy of the corpus {floor:.4f} ({found / floor - 1:+.1%})"
    if interval is None:
        return check("floor", NOT_TESTED, f"{detail}: too few runs")
    detail += f"; {reach(interval)}"
    if not {"N", "D"} <= set(fit.columns) and interval.high >= floor:  # its limit lies higher
        return check("floor", NOT_APPLICABLE, f"{detail}: of one variable, the rest fixed")
    return check("floor", floor in interval, detail)


def _single_runs(
    single: Sequence[SingleRun], names: Sequence[str], p: float | None, limit: float, above: str
) -> Check:
    """Judge the influence of each run; ``names`` are those of all runs, ``p`` is the least p-value
    of a run that moves the prediction."""
    if p is None:
        detail = "too few runs to leave one out, or several rows of a run"
        return check("single_run", NOT_TESTED, detail)

    def listed(each: Sequence[str], between: str) -> str:
        return between.join(each[:3]) + (f" and {len(each) - 3} more" if len(each) > 3 else "")

    setting = [
        f"{names[one.row]} ({one.off:+.1%}, {one.errors:+.1f} standard errors, off the law of "
        f"the others: p = {one.p:.3g}; moves the predicted loss by {one.moved:+.1%})"
        for one in single
        if one.moves and one.p <= limit
    ]
    if setting:
        return check("single_run", False, listed(setting, "; "), threshold=above)
    most = max(single, key=lambda one: abs(one.moved))
    detail = f"none moves the predicted loss by more than {abs(most.moved):.2%} ({names[most.row]})"
    detail += f", p = {p:.3g}"
    if odd := [names[one.row] for one in single if one.is_outlier]:
        detail += f"; far from the rest without doing so: {listed(odd, ', ')}"
    return check("single_run", True, detail, threshold=above)
