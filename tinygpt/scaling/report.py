"""The report of an analysis: its words and tables, in a folder and in brief on the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from tinygpt import fileio
from tinygpt.config.settings import SMOKE
from tinygpt.scaling import document, plots, wording
from tinygpt.scaling.analysis import Analysis
from tinygpt.scaling.document import FAIL, Block, Code, Heading, Items, Paragraph, Picture, Table
from tinygpt.scaling.evidence import CLEAR, NOT_APPLICABLE, NOT_TESTED, PASS, THRESHOLDS
from tinygpt.scaling.facts import data_hash, facts, shared_trunks
from tinygpt.scaling.intervals import LEVEL
from tinygpt.scaling.laws import LAWS
from tinygpt.scaling.selection import Candidate, preferred
from tinygpt.scaling.story import Story
from tinygpt.scaling.wording import (
    UNKNOWN,
    capital,
    count,
    estimate,
    number,
    percent,
    reach,
    with_interval,
)

FORECAST = (
    "The loss is an average of laws, weighted by how well each, fitted to the smaller runs, "
    "predicted the larger. On ten public tables intervals made this way covered 93 % of the losses "
    "of larger runs, and 84 % of those of ten times the compute (`experiments/bank`)."
)
MOST_ROWS = 10  # of a table that grows with the runs
INTERVAL = f"{100 * LEVEL:.0f} % interval"
ESTIMATORS = {
    "least_squares": "least squares",
    "huber": "Huber's loss",
    "likelihood": "the likelihood of Huber's density, its scale a parameter",
}


def write(analysis: Analysis, folder: Path, story: Story | None = None) -> list[Path]:
    """Write report, figures, numbers and tables in place of those of an earlier analysis.

    ``story`` is that of a study with a budget, and comes first.
    """
    with fileio.report_lock(folder):
        fileio.remove_torn(folder, folder / "tensorboard")
        figures = plots.draw(analysis, folder, story)
        files = document.write(list(compose(analysis, figures, story)), folder)
        for name, table in (("runs.csv", analysis.runs), ("left_out.csv", analysis.left_out)):
            if len(table):
                fileio.write_text(folder / name, table.to_csv(index=False, lineterminator="\n"))
                files.append(name)
            else:
                (folder / name).unlink(missing_ok=True)
        fileio.write_json(folder / "fit.json", facts(analysis))
    files += ["fit.json", *(f"{name}.{kind}" for name in figures for kind in ("png", "svg"))]
    return [folder / name for name in files]


def show(analysis: Analysis, folder: Path, console: Console | None = None) -> None:
    """Print the most important sections, and the path of the report."""
    blocks = [*answer(analysis), *notes(analysis), *warning(analysis), *law(analysis)]
    blocks += [*selection(analysis), *checklist(analysis, brief=True), *predictions(analysis)]
    blocks += [*budgets(analysis), *next_run(analysis)]
    document.show(blocks, folder, console)


def compose(
    analysis: Analysis, figures: Sequence[str], story: Story | None = None
) -> Iterator[Block]:
    """Return the whole report, in the order it is read."""
    together = " together" if len(analysis.variables) > 1 else ""

    def pictures(*names: str) -> Iterator[Block]:
        for name in names:
            if name in figures:
                yield Picture(name, plots.CAPTIONS.get(name + together, plots.CAPTIONS[name]))

    yield from answer(analysis)
    yield from story.blocks() if story else ()
    yield from warning(analysis)
    yield from notes(analysis)
    yield from runs(analysis)
    yield from law(analysis)
    yield from pictures("scaling", "residuals")
    yield from selection(analysis)
    yield from pictures("extrapolation")
    yield from checklist(analysis)
    yield from single_runs(analysis)
    yield from predictions(analysis)
    yield from optimum(analysis)
    yield from pictures("contours", "isoflop", "frontier", "curves")
    yield from next_run(analysis)
    yield from method(analysis)
    yield Heading("Files")
    lines = ["`fit.json`: all numbers, to full precision", "`runs.csv`: the runs that were fitted"]
    lines += ["`left_out.csv`: the runs that were not, and why"] if len(analysis.left_out) else []
    lines += [f"figures, as `.png` and `.svg`: {', '.join(f'`{name}`' for name in figures)}"]
    yield Items([*lines, "`tensorboard/`: the figures for its page of images"])


def answer(analysis: Analysis) -> Iterator[Block]:
    """Return the question and the whole answer in two sentences."""
    yield Heading(analysis.question, 1)
    fit = analysis.fit
    exponents = [
        f"{name} {with_interval(fit.parameters[name], interval)}"
        for name, interval in analysis.intervals.items()
        if name in fit.law.exponents
    ]
    word = "are described by" if len(analysis.candidates) > 1 else "were fitted by"
    text = f"{count(len(analysis.runs), 'run')} {word} {fit.law.name}"
    text += f": {', '.join(exponents)}." if exponents else "."
    yield Paragraph(text + (f" {capital(analysis.verdict)}." if analysis.is_evidence else ""))
    if analysis.others:
        each = "; ".join(
            wording.differing(name, values) for name, values in analysis.others.items()
        )
        yield Paragraph(
            "These runs differ in more than the variables of the law and their seeds, and are "
            f"fitted together: {each}. If that was not meant, `where=` or another folder keeps "
            "them apart."
        )


def warning(analysis: Analysis) -> Iterator[Block]:
    """Return the checks that fail, each with what to do."""
    failed = [check for check in analysis.checks if check.passed is False]
    if analysis.is_evidence is None:
        yield Heading(capital(SMOKE))
        yield Paragraph("Runs at `scale=smoke` only try a study out, so there is no verdict.")
    elif failed:
        yield Heading("Not evidence yet")
        many = f"{len(failed)} checks fail" if len(failed) > 1 else "A check fails"
        yield Paragraph(
            f"{many}. The law below describes these runs. Fix this before relying on it:"
        )
        lines = (f"{c.title} ({c.figure}; needs {c.threshold}). {c.advice}" for c in failed)
        yield Items([f"{FAIL}: {line}" for line in lines])
    elif not analysis.is_evidence:
        yield Heading("Not evidence yet")
        yield Paragraph(
            "No check fails, but there are too few runs to hold the larger out and predict them."
        )


def notes(analysis: Analysis) -> Iterator[Block]:
    if analysis.notes:
        yield Heading("As the runs were read")
        yield Items(analysis.notes)


def runs(analysis: Analysis) -> Iterator[Block]:
    """Return the range of each variable, and of the loss."""
    fit, compute = analysis.fit, analysis.compute
    yield Heading("Runs")
    points = len({tuple(row) for row in np.stack(list(fit.points.x.values()), 1).round(12)})
    at = f"{count(len(analysis.runs), 'run')} at {count(points, 'different point')}"
    yield Paragraph(f"{at}. What they span:")
    rows = [
        [f"{name}, {analysis.words[name]}", f"`{column}`", *wording.span(fit.table[column])]
        for name, column in analysis.variables.items()
    ]
    if compute.min() < compute.max():
        rows.append(["compute (FLOPs)", "", *wording.span(compute)])
    rows.append([analysis.columns.loss_label, f"`{fit.loss}`", *wording.span(fit.table[fit.loss])])
    yield Table(["", "column", "from", "to", "ratio", "values"], rows)
    if shared := shared_trunks(analysis.runs):
        saved = number(shared.independent_flops - shared.flops)
        yield Paragraph(
            f"Training took {number(shared.flops)} FLOPs: runs that share a trunk saved "
            f"{saved} ({percent(shared.saved)}) against independent runs."
        )
    if len(analysis.left_out):
        yield Paragraph("The runs that were left out, and why, are in `left_out.csv`.")


def law(analysis: Analysis) -> Iterator[Block]:
    """Return the law with its parameters and the size of its residuals."""
    fit, source = analysis.fit, analysis.fit.law.source
    yield Heading("The law" if analysis.is_evidence else "The law, as far as it goes")
    left = fit.optimum.law  # of the law, without the terms that went to zero
    yield Code(f"{wording.formula(left)}\n{wording.equation(left, fit.parameters)}")
    letters = f"L: {analysis.columns.loss_label}; {wording.variables(analysis.words)}"
    yield Paragraph(f"{letters}. {capital(source)}.")
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
    if fit.degrees > 0:
        spread = fit.relative(float(np.sqrt(np.sum(fit.residuals**2) / fit.degrees)))
        text = f"The law leaves {percent(spread)} of the loss (standard deviation)"
        if analysis.noise:
            each = np.sort(fit.relative(analysis.noise.each, analysis.runs[fit.loss].to_numpy()))
            text += f"; runs that differ in their seed alone scatter by {percent(each[0])}"
            text += f" to {percent(each[-1])}, by their length" if each[-1] > 1.05 * each[0] else ""
        yield Paragraph(f"{text}. R² of {fit.unit}: {fit.r_squared:.4f}.")
    if not analysis.intervals:
        why = "As many parameters as runs" if fit.degrees < 1 else "All rows are of one run"
        yield Paragraph(f"{why}: there is nothing to judge an interval by.")
    if lines := list(_constant(analysis)):
        yield Paragraph(" ".join(lines))


def _parameters(analysis: Analysis) -> Table:
    header = ["", "estimate", INTERVAL]
    tables = [(analysis.fit.parameters, analysis.intervals)]
    if analysis.in_total:
        header += ["embeddings counted", INTERVAL]
        tables.append((analysis.in_total.parameters, analysis.total_intervals))
    rows = []
    for name in analysis.fit.parameters:
        row = [name]
        for values, intervals in tables:
            row += [estimate(values[name], intervals.get(name)), reach(intervals.get(name))]
        rows.append(row)
    return Table(header, rows)


def _constant(analysis: Analysis) -> Iterator[str]:
    """Judge the constant E."""
    fit, floor = analysis.fit, analysis.floor
    constant, interval = fit.parameters.get("E"), analysis.intervals.get("E")
    if constant and interval and not wording.is_set(interval.low):
        high = f"anything below {number(interval.high)}"
        other = high if np.isfinite(interval.high) else "any other"
        yield f"E is not known from these runs: {other} describes them nearly as well."
    lowest = float(fit.table[fit.loss].min())
    if constant and constant > lowest:
        yield (
            f"E lies above the lowest loss measured, {number(lowest, 4)}: runs scatter "
            "around the law, and E is where it levels off for their mean, not a bound on each."
        )
    if floor is not None:
        yield f"The entropy of the corpus is known: {number(floor, 5)}."
    if floor is not None and constant:
        side = "above" if constant > floor else "below"
        alone = constant > floor and not {"N", "D"} <= set(fit.columns)
        why = ", because the factors held fixed add to the loss" if alone else ""
        yield f"E is {percent(abs(constant / floor - 1))} {side} it{why}."


def selection(analysis: Analysis) -> Iterator[Block]:
    """Return how the laws that were tried compare."""
    if len(analysis.candidates) < 2:
        return
    yield Heading("Which law")
    yield Table(
        ["law", "formula", "Δ AICc", "held-out error", "weight in forecast"],
        [_candidate(one, analysis) for one in analysis.candidates],
    )
    ends = {one.law: one.fit.optimum.at_bound for one in analysis.candidates if one.fit}
    met = "; ".join(f"{law} ({', '.join(names)})" for law, names in ends.items() if names)
    at_bound = f" At a bound of a parameter: {met}." if met else ""
    yield Paragraph(f"{_how_clear(analysis)}{at_bound}")


def _candidate(one: Candidate, analysis: Analysis) -> list[str]:
    row = [one.law, LAWS[one.law].formula.removeprefix("L = ")]
    if one.fit is None:
        return [*row, "not fitted", "", ""]
    behind = one.aicc - analysis.candidates[0].aicc
    row.append(f"{behind:.1f}" if np.isfinite(behind) else UNKNOWN)
    errors = analysis.held_out.by_law if analysis.held_out else {}
    weights = analysis.forecast.by_law if analysis.forecast else {}
    row.append(percent(errors[one.law]) if one.law in errors else UNKNOWN)
    return [*row, f"{100 * weights[one.law]:.0f} %" if one.law in weights else UNKNOWN]


def _how_clear(analysis: Analysis) -> str:
    candidates, chosen = analysis.candidates, analysis.chosen
    best, *others = [one for one in candidates if one.fit is not None]
    if not np.isfinite(best.aicc):
        return "Too few runs to choose between laws: the first that could be fitted is shown."
    near = [one.law for one in (best, *others) if one.aicc - best.aicc < CLEAR]
    if len(near) > 1 and chosen.law in near:
        tied = ", ".join(law for law in near if law != chosen.law)
        text = f"{tied} can hardly be distinguished from {chosen.law}"
        if chosen.law == preferred(candidates).law:
            text += f": of laws within {CLEAR:g} AICc of the best the first in the list is shown."
        else:
            text += ", which was asked for."
    else:
        text = f"{best.law} is best by AICc"
        if others and np.isfinite(others[0].aicc):
            text += f", {number(others[0].aicc - best.aicc)} ahead of {others[0].law}"
        text += "." if chosen is best else f"; {chosen.law} was asked for."
    errors = analysis.held_out.by_law if analysis.held_out else {}
    least = min(errors, key=lambda law: errors[law], default=chosen.law)
    return text + (f" {least} predicts the held-out runs best." if least != chosen.law else "")


def checklist(analysis: Analysis, brief: bool = False) -> Iterator[Block]:
    """Return every check by its group, those that fail first; ``brief`` only counts what does not
    apply or was not tested, and leaves out the thresholds."""
    yield Heading("Checklist")
    order = ["fail", PASS, *([] if brief else [NOT_TESTED, NOT_APPLICABLE])]
    columns = 3 if brief else 4
    for group in THRESHOLDS:
        ours = [one for one in analysis.checks if one.group == group and one.outcome in order]
        ours.sort(key=lambda one: order.index(one.outcome))
        rows = [[c.outcome.replace("fail", FAIL), c.title, c.figure, c.threshold] for c in ours]
        if rows:
            header = ["", group, "found", "needs"][:columns]
            yield Table(header, [row[:columns] for row in rows])
    count = analysis.outcomes.count
    yield Paragraph(
        f"{count(PASS)} pass, {count('fail')} fail, {count(NOT_APPLICABLE)} not "
        f"applicable, {count(NOT_TESTED)} not tested."
    )


def single_runs(analysis: Analysis) -> Iterator[Block]:
    """Return how far each run alone moves the prediction, and the outliers."""
    yield Heading("Single runs")
    if not analysis.single:
        yield Paragraph("No run was left out in turn: there are too few, or several rows per run.")
        return
    moved = [100 * one.moved for one in analysis.single]
    reached = f"{min(moved):+.2f} to {max(moved):+.2f} %"
    where = "prediction below" if analysis.predictions else "loss at the largest run"
    text = f"Each run moves the {where} by {reached}, compared with a law fitted without it."
    outliers = [one for one in analysis.single if one.is_outlier]
    if outliers:
        yield Paragraph(f"{text} Far from the law of the others, or from the seeds beside it:")
    else:
        text += " None lies far from the law of the others, nor from its seeds. The three that"
        yield Paragraph(f"{text} move it most:")
    listed = outliers or analysis.single[:3]
    header = ["run", "from the law", "standard errors", "from its seeds", "their scatter"]
    rows = []
    for one in listed[:MOST_ROWS]:
        name = analysis.columns.name_of(analysis.runs, one.row)
        row = [name, f"{100 * one.off:+.1f} %", f"{one.errors:+.1f}", UNKNOWN, UNKNOWN]
        if one.off_siblings is not None and one.scatters is not None:
            row[3:] = [f"{100 * one.off_siblings:+.1f} %", f"×{abs(one.scatters):.1f}"]
        rows.append([*row, f"{100 * one.moved:+.2f} %", "sets the law" if one.sets_law else ""])
    yield Table([*header, "moves the prediction", ""], rows)
    if len(listed) > MOST_ROWS:
        yield Paragraph(f"And {len(listed) - MOST_ROWS} more, in `fit.json`.")


def predictions(analysis: Analysis) -> Iterator[Block]:
    """Return the predicted losses with their intervals."""
    yield Heading("Prediction")
    if analysis.unanswered:
        yield Paragraph(" ".join(analysis.unanswered))
    if not analysis.predictions:
        yield Paragraph("None: these runs cannot say how far it could be trusted.")
        return
    made = analysis.predictions
    columns = {}
    if any(one.flops is not None for one in made):
        columns["FLOPs"] = [number(one.flops) for one in made]
    for name in made[0].place:
        columns[analysis.words[name]] = [number(one.place[name]) for one in made]
    columns["loss"] = [estimate(one.run.estimate, one.run) for one in made]
    columns[f"{INTERVAL} of a run"] = [reach(one.run) for one in made]
    columns["by the law above"] = [with_interval(one.loss.estimate, one.loss) for one in made]
    yield Table(list(columns), list(zip(*columns.values(), strict=True)))
    if analysis.forecast:
        yield Paragraph(FORECAST)


def optimum(analysis: Analysis) -> Iterator[Block]:
    """Return the best split of compute between parameters and tokens, by each way to find it."""
    path = analysis.frontier
    if path is None:
        return
    yield Heading("Compute-optimal")
    if path.estimates:
        budget = f"{number(path.budget)} FLOPs:"
        yield Paragraph(f"N ~ C^a, D ~ C^b; N and D at the largest budget that was run, {budget}")
        rows = []
        for one in path.estimates:
            intervals = (one.a, one.b, one.n, one.d)
            rows.append([one.way, *(with_interval(of.estimate, of) for of in intervals)])
        yield Table(["", "a", "b", "N", "D"], rows)
        methods = "; ".join(f"{one.way}: {one.a.method}" for one in path.estimates)
        yield Paragraph(f"Intervals of the {methods}.")
    lines = [f"{FAIL}: the ways disagree on {line}." for line in path.disagreements]
    lines += [f"{way}: {reason}." for way, reason in path.missing.items()]
    if lines:
        yield Items(lines)
    yield from budgets(analysis)


def budgets(analysis: Analysis) -> Iterator[Block]:
    if analysis.budgets:
        yield Items([f"{capital(str(one))}." for one in analysis.budgets])


def next_run(analysis: Analysis) -> Iterator[Block]:
    """Return the run that would narrow the prediction most."""
    one = analysis.next_run
    if one is None or not np.isfinite(one.width_now):
        return
    yield Heading("What to run next")
    if one.width_then > 0.97 * one.width_now:
        yield Paragraph("No single run would narrow the prediction by much.")
        return
    place = ", ".join(
        f"{number(value)} {analysis.words[name]}" for name, value in one.place.items()
    )
    cost = f" ({number(one.cost)} FLOPs)" if analysis.compute.max() > 1 else ""
    yield Paragraph(
        f"A run with {place}{cost} would narrow the prediction most: its {INTERVAL} is now "
        f"{percent(one.width_now)} of the loss wide, and would be {percent(one.width_then)}."
    )


def method(analysis: Analysis) -> Iterator[Block]:
    fit, minimum = analysis.fit, analysis.fit.optimum
    yield Heading("How it was computed")
    text = f"Estimator, of {fit.unit}: {ESTIMATORS[fit.estimator]} ({fit.reason})."
    if np.isfinite(minimum.threshold):
        text += f" Threshold {number(minimum.threshold)} in {fit.unit}."
    if (weights := fit.points.weights) is not None:
        text += " Runs are weighted by the scatter of seeds at their length, and by what the law "
        text += f"leaves beside it: from {weights.min():.2g} to {weights.max():.2g}."
    methods = sorted({one.method for one in analysis.intervals.values()})
    if methods:
        text += f" Intervals of parameters: {', '.join(methods)}"
        ways = sorted({one.loss.method for one in analysis.predictions})
        text += f"; of predictions: {', '.join(ways)}." if ways else "."
    yield Paragraph(text)
    yield Paragraph(
        f"The minimum: {'' if minimum.converged else 'not '}converged from "
        f"{count(minimum.starts, 'start')}, "
        f"{count(len(minimum.basins), 'distinct minimum', 'distinct minima')}, objective "
        f"{number(minimum.objective, 6)}, gradient {number(minimum.gradient_norm, 1)}, "
        f"least eigenvalue {number(minimum.smallest_eigenvalue)}. Seed {analysis.seed}. "
        f"Data {data_hash(analysis)[:12]}."
    )
