"""Whether a law may be relied on: the checklist of a fit."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import special

from tinygpt.scaling.evidence import CLEAR, SIGNIFICANT, Check, check
from tinygpt.scaling.fitting import Fit
from tinygpt.scaling.forecast import HeldOut
from tinygpt.scaling.intervals import LEVEL, Interval
from tinygpt.scaling.noise import Noise
from tinygpt.scaling.selection import Candidate
from tinygpt.scaling.single import SingleRun
from tinygpt.scaling.wording import estimate, reach, times

NEAR_FLOOR = 0.05
MOSTLY_SEEDS = 0.5  # of the variance of the losses, from where there is little else in it
PLAIN = ("power_constant", "chinchilla")  # what other laws must be compared with


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
) -> Iterator[Check]:
    """Judge a law.

    ``size`` is what runs were held out by, ``structure`` the p-value of there being none in the
    residuals, ``floor`` the exact entropy of the corpus, ``rivals`` all laws that were tried.
    """
    yield _certified(fit)
    yield _explains(fit, noise)
    detail = f"{len(fit.points)} runs, {len(fit.optimum.law)} parameters"
    yield check("enough_runs", fit.degrees >= 3, detail)
    lack = noise.lack_of_fit if noise else None
    against = ["runs held out"] if held_out else []
    against += ["the scatter of the seeds"] if lack is not None else []
    yield check("tested", against, " and ".join(against) or "neither held-out runs nor seeds")
    yield _best_law(fit, rivals, held_out)
    if structure is None:
        yield check("structure", None, "too few points to tell")
    else:
        detail = f"second and third powers of the logs: p = {structure:.2g}"
        yield check("structure", structure >= SIGNIFICANT, detail)
    if noise is None or lack is None:
        yield check("lack_of_fit", None, "no two runs differ in their seed alone")
    else:
        scatter = f"{fit.relative(noise.scale):.2%}"
        detail = f"seeds scatter by {scatter} of the loss; lack of fit: p = {lack:.2g}"
        yield check("lack_of_fit", lack >= SIGNIFICANT, detail)
    if (r := correlation(fit)) is not None:
        yield check("collinear", r < 0.9, f"correlation of the logs {r:.2f}")
    for name in ("alpha", "beta"):
        if name in intervals:
            one = intervals[name]
            known = one.identified and one.low > 0 and one.high - one.low <= one.estimate
            yield check(name, known, _reach(one))
    if "E" in fit.optimum.at_bound:
        yield check("constant", False, "the best E is zero")
    elif "E" in intervals:
        one = intervals["E"]
        narrow = one.high - one.low <= 0.5 * one.estimate
        yield check("constant", one.identified and narrow, _reach(one))
    yield _predicts(held_out, size)
    yield _skill(held_out)
    if floor is not None and "E" in fit.law.coefficients:
        yield _floor(fit, intervals.get("E"), floor)


def _reach(one: Interval) -> str:
    return f"{estimate(one.estimate, one)}, {reach(one)}"


def correlation(fit: Fit) -> float | None:
    """Return |correlation| of log N and log D over the runs; None if the law lacks one."""
    if not {"N", "D"} <= set(fit.points.x):
        return None
    return abs(float(np.corrcoef(fit.points.x["N"], fit.points.x["D"])[0, 1]))


def _certified(fit: Fit) -> Check:
    found = fit.optimum
    basins = "1 basin" if len(found.basins) == 1 else f"{len(found.basins)} basins"
    detail = f"{basins}, gradient {found.gradient_norm:.1g}, "
    detail += f"least eigenvalue {found.smallest_eigenvalue:.2g}"
    detail += f"; at its bound: {', '.join(found.at_bound)}" if found.at_bound else ""
    detail += "" if found.converged else "; not converged"
    if found.at_bound and set(found.at_bound) <= {"rn", "rd"}:
        return check("certified", None, f"{detail}: these runs do not show repetition of N or D")
    passed = found.converged and found.smallest_eigenvalue > 0 and not found.at_bound
    return check("certified", passed, detail)


def _explains(fit: Fit, noise: Noise | None) -> Check:
    """Judge R² beside the greatest that any law could reach, which is what seeds leave: their
    scatter is pure error (Draper & Smith 1998, section 2.1).

    Where seeds make up half of the variance or more there is little to explain: the runs are no
    evidence for any law, and the reason is not the law.
    """
    if fit.degrees < 1:
        return check("explains", None, "it goes through every run")
    ceiling, share = 1.0, 0.0
    if noise:
        y = fit.points.response
        total = float(np.sum((y - y.mean()) ** 2))
        ceiling = 1.0 - noise.scale**2 * noise.degrees / total
        share = noise.scale**2 * (len(fit.points) - 1) / total
    detail = f"R² of {fit.unit} {fit.r_squared:.4f}"
    if share >= MOSTLY_SEEDS:
        detail += f", of at most {ceiling:.2f} by any law: seeds differ as much as settings do; "
        return check("explains", False, f"{detail}more seeds or a wider range is needed")
    if ceiling < 1.0:
        detail += f", of at most {ceiling:.4f} where seeds scatter so"
    return check("explains", fit.r_squared >= 0.9 * ceiling, detail)


def _best_law(fit: Fit, rivals: Sequence[Candidate], held_out: HeldOut | None) -> Check:
    own = next((c.aicc for c in rivals if c.law == fit.law.name), math.inf)
    best, *others = sorted(rivals, key=lambda c: c.aicc)
    if not math.isfinite(best.aicc):
        return check("best_law", None, "too few runs to compare laws")
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


def _predicts(held_out: HeldOut | None, size: str) -> Check:
    by = "compute" if size == "compute" else "x"
    if held_out is None:
        return check("predicts", None, "too few runs to hold any out", by)
    detail = (
        f"{held_out.runs} runs up to {times(held_out.distance)} beyond the rest"
        f"{'' if by == 'compute' else f' in {size}'}: off by "
        f"{held_out.error:.2%}, at most {held_out.worst:.2%}; {held_out.within:.0%} of them in "
        f"their 95 % interval (±{held_out.half_width:.1%} on average)"
    )
    inside = round(held_out.within * held_out.groups)
    p = float(special.bdtr(inside, held_out.groups, LEVEL))
    passed = p >= SIGNIFICANT and held_out.error <= held_out.half_width
    return check("predicts", passed, detail, by)


def _skill(held_out: HeldOut | None) -> Check:
    if held_out is None:
        return check("skill", None, "too few runs to hold any out")
    detail = (
        f"off by {held_out.error:.2%}; as the best smaller run: {held_out.best_cheaper:.2%}; "
        f"a plane through the larger half of the rest: {held_out.plane:.2%}"
    )
    return check("skill", held_out.has_skill, detail)


def _floor(fit: Fit, interval: Interval | None, floor: float) -> Check:
    found = fit.parameters["E"]
    off = found / floor - 1
    detail = f"E {found:.4f}, entropy of the corpus {floor:.4f} ({off:+.1%})"
    if not {"N", "D"} <= set(fit.columns):  # the limit of one variable alone lies higher
        above = interval is None or interval.high >= floor
        return check(
            "floor", None if above else False, f"{detail}: of one variable, the rest fixed"
        )
    if interval is not None and floor in interval:
        detail += ", inside the interval"
    return check("floor", abs(off) <= NEAR_FLOOR, detail)


def check_single_runs(single: Sequence[SingleRun], names: Sequence[str]) -> Check:
    """Judge the runs, each left out in turn; ``names`` are those of all runs."""
    if not single:
        detail = "too few runs to leave one out, or several rows of a run"
        return check("single_run", None, detail)

    def listed(each: Sequence[str], between: str) -> str:
        return between.join(each[:3]) + (f" and {len(each) - 3} more" if len(each) > 3 else "")

    setting = [
        f"{names[one.row]} ({one.off:+.1%}, {one.errors:+.1f} standard errors, off the law of "
        f"the others; moves the predicted loss by {one.moved:+.1%})"
        for one in single
        if one.sets_law
    ]
    if setting:
        return check("single_run", False, listed(setting, "; "))
    most = max(single, key=lambda one: abs(one.moved))
    detail = f"none moves the predicted loss by more than {abs(most.moved):.2%} ({names[most.row]})"
    if odd := [names[one.row] for one in single if one.is_outlier]:
        detail += f"; far from the rest without doing so: {listed(odd, ', ')}"
    return check("single_run", True, detail)


def check_distance(
    runs: Mapping[str, Any], places: Sequence[Mapping[str, float]], main: str
) -> Check:
    """Judge how far predictions lie beyond the runs, beside what these span.

    ``runs`` has the values of each variable, (n,), ``places`` those of each prediction; the title
    of the variable ``main`` is not said.
    """
    if not places:
        return check("distance", None, "nothing can be predicted")
    found = []
    for name, value in ((name, value) for place in places for name, value in place.items()):
        low, high = float(min(runs[name])), float(max(runs[name]))
        beyond, span = max(value / high, low / value, 1.0), high / low
        what = "" if name in (main, "C") else f"{name} = {value:.3g} is "
        found.append((beyond / span, beyond, span, what))
    _, beyond, span, what = max(found, key=lambda one: one[0])
    detail = f"{what}{times(beyond)} beyond; the runs span {times(span)}"
    return check("distance", beyond <= span, detail)
