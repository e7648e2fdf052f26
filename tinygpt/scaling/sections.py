"""The sections of a report, each as blocks: what an analysis comes to, in words and tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pandas as pd

from tinygpt.scaling import wording
from tinygpt.scaling.advice import ADVICE
from tinygpt.scaling.analysis import Analysis, Prediction
from tinygpt.scaling.document import (
    FAIL,
    Block,
    Equation,
    Heading,
    Items,
    Paragraph,
    Picture,
    Table,
)
from tinygpt.scaling.drawing import loss_label
from tinygpt.scaling.evidence import CLEAR, Check
from tinygpt.scaling.facts import data_hash, shared_trunks
from tinygpt.scaling.intervals import LEVEL, Interval
from tinygpt.scaling.laws import LAWS
from tinygpt.scaling.selection import Candidate, preferred
from tinygpt.scaling.single import SingleRun
from tinygpt.scaling.wording import count

MOST = 10  # rows of a table that can grow with the runs
WITHIN = f"{100 * LEVEL:.0f} % interval"
ESTIMATORS = {
    "least_squares": "least squares",
    "huber": "Huber's loss",
    "absolute": "least absolute deviations",
    "likelihood": "the likelihood of Huber's density, its scale a parameter",
}
CAPTIONS = {
    "scaling": "The runs and the law, with its 95 % band; dashed: beyond the runs.",
    "scaling together": (
        "The runs and the law, with its 95 % band, at some values of the other variable: its "
        "colour. What a panel does not show is at its geometric mean."
    ),
    "residuals": "What the law leaves: structure here is what it does not see.",
    "contours": (
        "Lines of equal loss by the law where no token is seen twice, and the runs, coloured by "
        "what was measured."
    ),
    "extrapolation": "The law fitted to the smaller runs predicts the larger ones, held out.",
    "isoflop": (
        "Loss against size at equal compute, a curve through each budget; stars: minima. Without a "
        "star there is none that stands; `fit.json` says why."
    ),
    "frontier": "The best split of each budget by the law, with its 95 % band; dashed: beyond.",
    "curves": "The loss of every run as it trains; dashed: the least that any has by a compute.",
}


def pictures(analysis: Analysis, figures: Sequence[str], *names: str) -> Iterator[Block]:
    together = " together" if len(analysis.variables) > 1 else ""
    for name in names:
        if name in figures:
            yield Picture(name, CAPTIONS.get(name + together, CAPTIONS[name]))


def title(analysis: Analysis) -> Iterator[Block]:
    yield Heading(analysis.question, 1)


def answer(analysis: Analysis) -> Iterator[Block]:
    """The whole in two sentences."""
    fit = analysis.fit
    exponents = [
        f"{name} {wording.estimate(fit.parameters[name], one)} ({wording.reach(one)})"
        for name, one in analysis.intervals.items()
        if name in fit.law.exponents
    ]
    word = "are described by" if len(analysis.candidates) > 1 else "were fitted by"
    text = f"{count(len(analysis.runs), 'run')} {word} {fit.law.name}"
    text += f": {', '.join(exponents)}." if exponents else "."
    if analysis.is_evidence:
        text += " Every check that applies is passed."
    yield Paragraph(text)
    if analysis.others:
        each = "; ".join(_differing(name, of) for name, of in analysis.others.items())
        yield Paragraph(
            f"These runs differ in more than this law and their seeds, and are fitted together: "
            f"{each}. Where that was not meant, `where=` or another folder keeps them apart."
        )


def _differing(setting: str, values: Mapping[str, Sequence[str]]) -> str:
    """``max_seq_len`` 256 (10 runs), 128 (1 run: its name)."""
    short = {value: value[:12] for value in values} if "fingerprint" in setting else {}
    each = [
        f"{short.get(value, value)} ({count(len(names), 'run')}"
        f"{': ' + names[0] if len(names) == 1 else ''})"
        for value, names in list(values.items())[:4]
    ]
    more = f" and {len(values) - 4} other values" if len(values) > 4 else ""
    return f"`{setting}` {', '.join(each)}{more}"


def warning(analysis: Analysis) -> Iterator[Block]:
    """What failed comes first, and what would mend it."""
    failed = [check for check in analysis.checks if check.passed is False]
    if not failed:
        return
    yield Heading("Not evidence yet")
    many = f"{len(failed)} lines of the checklist fail" if len(failed) > 1 else "A check fails"
    yield Paragraph(f"{many}. The law below describes these runs; do not build on it before:")
    yield Items([_remedy(check) for check in failed])


def _remedy(check: Check) -> str:
    default = "More values, further apart." if "values" in check.name else ""
    default = default or ("More of them." if "span" in check.name else "")
    advice = ADVICE.get(check.name, default)
    return f"{FAIL}: {check.name} ({check.detail}). {advice}".strip()


def runs(analysis: Analysis) -> Iterator[Block]:
    fit = analysis.fit
    yield Heading("Runs")
    settings = len({tuple(row) for row in np.stack(list(fit.points.x.values()), 1).round(12)})
    text = f"{count(len(analysis.runs), 'run')} at {count(settings, 'different point')}."
    yield Paragraph(f"{text} What they span:")
    rows = []
    for name, column in analysis.variables.items():
        rows.append([f"{name}, {analysis.words[name]}", f"`{column}`", *_span(fit.table[column])])
    if float(analysis.compute.min()) < float(analysis.compute.max()):
        rows.append(["compute (FLOPs)", "", *_span(pd.Series(analysis.compute))])
    rows.append([loss_label(analysis), f"`{fit.loss}`", *_span(fit.table[fit.loss])])
    yield Table(["", "column", "from", "to", "ratio", "values"], rows)
    if shared := shared_trunks(analysis.runs):
        saved = wording.number(shared.independent_flops - shared.flops)
        yield Paragraph(
            f"Training took {wording.number(shared.flops)} FLOPs: runs that share a trunk saved "
            f"{saved} ({wording.percent(shared.saved)}) against independent runs."
        )
    if len(analysis.left_out):
        yield Paragraph("The runs that were left out, and why, are in `left_out.csv`.")


def notes(analysis: Analysis) -> Iterator[Block]:
    """What was assumed and left out as the runs were read."""
    if analysis.notes:
        yield Heading("As the runs were read")
        yield Items(analysis.notes)


def _span(values: pd.Series) -> list[str]:
    low, high = float(values.min()), float(values.max())
    ends = [wording.whole(low), wording.whole(high)]
    return [*ends, f"×{wording.number(high / low)}", str(values.nunique())]


def law(analysis: Analysis) -> Iterator[Block]:
    fit = analysis.fit
    yield Heading("The law" if analysis.is_evidence else "The law, as far as it goes")
    yield Equation(
        f"{wording.formula(fit.optimum.law)}\n{wording.equation(fit.optimum.law, fit.parameters)}"
    )
    where = wording.variables(analysis.words)
    source = fit.law.source
    yield Paragraph(f"L: {loss_label(analysis)}; {where}. {source[0].upper()}{source[1:]}.")
    met = list(fit.bounds_met.values())
    if analysis.in_total:
        met += [f"embeddings counted, {line}" for line in analysis.in_total.bounds_met.values()]
    if met:
        yield Paragraph(" ".join(f"{line}." for line in met))
    yield _parameters(analysis)
    if analysis.intervals:
        yield Paragraph(
            "The same numbers twice: with four digits above, which draw the curve together, and "
            "here rounded to what each interval supports."
        )
    spread = fit.relative(float(np.sqrt(np.sum(fit.residuals**2) / max(1, fit.degrees))))
    left = f"The law leaves {wording.percent(spread)} of the loss (standard deviation)"
    if analysis.noise:
        scatter = fit.relative(analysis.noise.scale)
        left += f"; runs that differ in their seed alone {wording.percent(scatter)}"
    if fit.degrees > 0:
        yield Paragraph(f"{left}. R² of {fit.unit}: {fit.r_squared:.4f}.")
    if not analysis.intervals:
        yield Paragraph("As many parameters as runs: there is nothing to judge an interval by.")
    yield from _floor(analysis)


def _parameters(analysis: Analysis) -> Table:
    total = analysis.in_total
    header = ["", "estimate", WITHIN]
    header += ["embeddings counted", WITHIN] if total else []
    rows = []
    for name, value in analysis.fit.parameters.items():
        row = [name, *_estimated(value, analysis.intervals.get(name))]
        if total:
            row += _estimated(total.parameters[name], analysis.total_intervals.get(name))
        rows.append(row)
    return Table(header, rows)


def _estimated(value: float, interval: Interval | None) -> list[str]:
    return [wording.estimate(value, interval), wording.reach(interval)]


def _floor(analysis: Analysis) -> Iterator[Block]:
    """What is to be thought of E."""
    constant, interval = analysis.fit.parameters.get("E"), analysis.intervals.get("E")
    lines = []
    if constant and interval and not wording.is_set(interval.low):
        high = f"anything below {wording.number(interval.high, 3)}"
        reach = high if np.isfinite(interval.high) else "any other"
        lines.append(f"E is not known from these runs: {reach} describes them nearly as well.")
    lowest = float(analysis.fit.table[analysis.fit.loss].min())
    if constant and constant > lowest:
        lines.append(
            f"E lies above the lowest loss measured, {wording.number(lowest, 4)}: runs scatter "
            "around the law, and E is where it levels off for their mean, not a bound on each."
        )
    if analysis.floor is not None:
        lines.append(f"The entropy of the corpus is known: {wording.number(analysis.floor, 5)}.")
    if analysis.floor is not None and constant:
        off = constant / analysis.floor - 1
        text = f"E is {wording.percent(abs(off))} {'above' if off > 0 else 'below'} it"
        alone = not {"N", "D"} <= set(analysis.fit.columns)
        text += ", as what is held fixed leaves its part." if alone and off > 0 else "."
        lines.append(text)
    if lines:
        yield Paragraph(" ".join(lines))


def selection(analysis: Analysis) -> Iterator[Block]:
    if len(analysis.candidates) < 2:
        return
    yield Heading("Which law")
    yield Table(
        ["law", "formula", "Δ AICc", "held-out error", "within 95 %"],
        [_candidate(one, analysis.candidates[0]) for one in analysis.candidates],
    )
    ends = {one.law: one.fit.optimum.at_bound for one in analysis.candidates if one.fit}
    met = "; ".join(f"{law} ({', '.join(names)})" for law, names in ends.items() if names)
    at_bound = f" At a bound of a parameter: {met}." if met else ""
    yield Paragraph(f"{_how_clear(analysis)}{at_bound}")


def _candidate(one: Candidate, best: Candidate) -> list[str]:
    formula = LAWS[one.law].formula.removeprefix("L = ")
    if one.fit is None:
        return [one.law, formula, "not fitted", "", ""]
    behind = one.aicc - best.aicc
    distance = f"{behind:.1f}" if np.isfinite(behind) else wording.UNKNOWN
    if one.held_out is None:
        return [one.law, formula, distance, wording.UNKNOWN, wording.UNKNOWN]
    within = f"{100 * one.held_out.within:.0f} %"
    return [one.law, formula, distance, wording.percent(one.held_out.error), within]


def _how_clear(analysis: Analysis) -> str:
    candidates, chosen = analysis.candidates, analysis.chosen
    best = candidates[0]
    fitted = [one for one in candidates if one.fit is not None]
    if not np.isfinite(best.aicc):
        return "Too few runs to choose between laws: the first that could be fitted stands."
    near = [one.law for one in fitted[1:] if one.aicc - best.aicc < CLEAR]
    if near and chosen.law in (best.law, *near):
        others = [law for law in (best.law, *near) if law != chosen.law]
        text = f"{', '.join(others)} can hardly be told from {chosen.law}"
        if chosen.law == preferred(candidates).law:
            text += f": of laws within {CLEAR:g} AICc of the best the first in the list is shown."
        else:
            text += ", which was asked for."
    elif chosen is not best:
        gap = wording.number(chosen.aicc - best.aicc)
        text = f"{chosen.law} was asked for; {best.law} is better by AICc, by {gap}."
    elif len(fitted) > 1 and np.isfinite(fitted[1].aicc):
        gap = wording.number(fitted[1].aicc - best.aicc)
        text = f"{best.law} is best by AICc, {gap} ahead of {fitted[1].law}."
    else:
        text = f"{best.law} is the only law that these runs can judge."
    held = [one for one in fitted if one.held_out is not None]
    if held:
        least = min(held, key=lambda one: one.held_out.error if one.held_out else np.inf)
        if least is not chosen:
            text += f" The held-out runs are predicted best by {least.law}."
    return text


def checklist(analysis: Analysis, brief: bool = False) -> Iterator[Block]:
    """What failed first; ``brief`` only counts what does not apply."""
    yield Heading("Checklist")
    kinds = {FAIL: False, "pass": True, "n/a": None}
    rows = [
        [word, one.name, one.detail]
        for word, passed in kinds.items()
        for one in analysis.checks
        if (None if one.passed is None else bool(one.passed)) is passed
        and not (brief and passed is None)
    ]
    yield Table(["", "check", "found"], rows)
    none = sum(check.passed is None for check in analysis.checks)
    failed = sum(check.passed is not None and not check.passed for check in analysis.checks)
    passed = len(analysis.checks) - none - failed
    yield Paragraph(f"{passed} pass, {failed} fail, {none} not applicable.")


def single_runs(analysis: Analysis) -> Iterator[Block]:
    """What each run alone does to the prediction, and which lie far from the rest."""
    yield Heading("Single runs")
    if not analysis.single:
        yield Paragraph("Not left out one by one: too few of them, or several rows of a run.")
        return
    ends = [100 * one.moved for one in analysis.single]
    where = "prediction below" if analysis.predictions else "loss at the largest run"
    text = f"Beside a law fitted without it, each run moves the {where}: by {min(ends):+.2f} to"
    text += f" {max(ends):+.2f} %."
    odd = [one for one in analysis.single if one.is_outlier]
    if not odd:
        text += " None lies far from the law of the others, nor from its seeds. The three that"
        yield Paragraph(f"{text} move it most:")
    else:
        yield Paragraph(f"{text} Far from the law of the others, or from the seeds beside it:")
    named = odd or analysis.single[:3]
    header = ["run", "from the law", "standard errors", "from its seeds", "their scatter"]
    header += ["moves the prediction", ""]
    yield Table(header, [_single_run(analysis, one) for one in named[:MOST]])
    if len(named) > MOST:
        yield Paragraph(f"And {len(named) - MOST} more, in `fit.json`.")


def _single_run(analysis: Analysis, one: SingleRun) -> list[str]:
    beside = [wording.UNKNOWN, wording.UNKNOWN]
    if one.off_siblings is not None and one.scatters is not None:
        beside = [f"{100 * one.off_siblings:+.1f} %", f"×{abs(one.scatters):.1f}"]
    return [
        analysis.columns.name_of(analysis.runs, one.row),
        f"{100 * one.off:+.1f} %",
        f"{one.errors:+.1f}",
        *beside,
        f"{100 * one.moved:+.2f} %",
        "sets the law" if one.sets_law else "",
    ]


def predictions(analysis: Analysis) -> Iterator[Block]:
    yield Heading("Prediction")
    if analysis.unanswered:
        yield Paragraph(" ".join(analysis.unanswered))
    if not analysis.predictions:
        yield Paragraph("None: these runs cannot say how far it could be trusted.")
        return
    names = list(analysis.predictions[0].place)
    flops = any(one.flops is not None for one in analysis.predictions)
    header = [*(["FLOPs"] if flops else []), *(analysis.words[name] for name in names)]
    header += ["loss", f"{WITHIN} of the law", "of a single run"]
    yield Table(header, [_prediction(one, names, flops) for one in analysis.predictions])


def _prediction(one: Prediction, names: Sequence[str], flops: bool) -> list[str]:
    place = [wording.number(one.place[name]) for name in names]
    found = [wording.estimate(one.loss.estimate, one.loss), wording.reach(one.loss)]
    return [*([wording.number(one.flops)] if flops else []), *place, *found, wording.reach(one.run)]


def optimum(analysis: Analysis) -> Iterator[Block]:
    path = analysis.frontier
    if path is None:
        return
    yield Heading("Compute-optimal")
    if path.estimates:
        yield Paragraph(
            "N ~ C^a, D ~ C^b; N and D at the largest budget that was run, "
            f"{wording.number(path.budget)} FLOPs:"
        )
        rows = [[one.way, *map(_reached, (one.a, one.b, one.n, one.d))] for one in path.estimates]
        yield Table(["", "a", "b", "N", "D"], rows)
    notes = [f"{FAIL}: the ways disagree on {line}." for line in path.disagreements]
    notes += [f"{way}: {reason}." for way, reason in path.missing.items()]
    if notes:
        yield Items(notes)
    yield from budgets(analysis)


def _reached(one: Interval) -> str:
    return f"{wording.estimate(one.estimate, one)} ({wording.reach(one)})"


def budgets(analysis: Analysis) -> Iterator[Block]:
    """What was asked for with ``budgets=``."""
    lines = [str(one) for one in analysis.budgets]
    if lines:
        yield Items([f"{line[0].upper()}{line[1:]}." for line in lines])


def next_run(analysis: Analysis) -> Iterator[Block]:
    one = analysis.next_run
    if one is None or not np.isfinite(one.width_now):
        return
    if one.width_then > 0.97 * one.width_now:
        yield Heading("What to run next")
        yield Paragraph("No single run would narrow the prediction by much.")
        return
    yield Heading("What to run next")
    place = ", ".join(
        f"{wording.number(value)} {analysis.words[name]}" for name, value in one.place.items()
    )
    cost = f" ({wording.number(one.cost)} FLOPs)" if analysis.compute.max() > 1 else ""
    yield Paragraph(
        f"A run with {place}{cost} would narrow the prediction most: its {WITHIN} is now "
        f"{wording.percent(one.width_now)} of the loss wide, and would be "
        f"{wording.percent(one.width_then)}."
    )


def method(analysis: Analysis) -> Iterator[Block]:
    fit, found = analysis.fit, analysis.fit.optimum
    yield Heading("How it was computed")
    text = f"Estimator, of {fit.unit}: {ESTIMATORS[fit.estimator]} ({fit.reason})."
    if np.isfinite(found.threshold):
        text += f" Threshold {wording.number(found.threshold)} in {fit.unit}."
    methods = sorted({one.method for one in analysis.intervals.values()})
    if methods:
        text += f" Intervals of parameters: {', '.join(methods)}"
        ways = sorted({one.loss.method for one in analysis.predictions})
        text += f"; of predictions: {', '.join(ways)}." if ways else "."
    yield Paragraph(text)
    state = "converged" if found.converged else "not converged"
    yield Paragraph(
        f"The minimum: {state} from {count(found.starts, 'start')}, "
        f"{count(len(found.basins), 'distinct minimum', 'distinct minima')}, objective "
        f"{wording.number(found.objective, 6)}, gradient {wording.number(found.gradient_norm, 1)}, "
        f"least eigenvalue {wording.number(found.smallest_eigenvalue)}. Seed {analysis.seed}. "
        f"Data {data_hash(analysis)[:12]}."
    )


def files(analysis: Analysis, figures: Sequence[str]) -> Iterator[Block]:
    yield Heading("Files")
    lines = ["`fit.json`: all numbers, to full precision", "`runs.csv`: the runs that were fitted"]
    if len(analysis.left_out):
        lines.append("`left_out.csv`: the runs that were not, and why")
    lines.append("figures, as `.png` and `.svg`: " + ", ".join(f"`{name}`" for name in figures))
    lines.append("`tensorboard/`: the figures for its page of images")
    yield Items(lines)
