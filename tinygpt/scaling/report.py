"""Write the report of an analysis into a folder, and its main sections to the terminal."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from tinygpt import fileio
from tinygpt.scaling import document, plots, wording
from tinygpt.scaling.analysis import Analysis
from tinygpt.scaling.document import Block, Code, Folded, Heading, Items, Paragraph, Picture, Table
from tinygpt.scaling.evidence import CLEAR, NOT_APPLICABLE, NOT_TESTED, PASS, THRESHOLDS
from tinygpt.scaling.facts import data_hash, facts
from tinygpt.scaling.intervals import LEVEL
from tinygpt.scaling.laws import LAWS
from tinygpt.scaling.measured import measured, next_run, runs
from tinygpt.scaling.selection import preferred
from tinygpt.scaling.story import Story
from tinygpt.scaling.wording import UNKNOWN, count, number, percent, with_interval

FORECAST = (
    "Each predicted loss is an average over laws, weighted by how well each of them, fitted to the "
    "smaller runs, predicts the larger ones. On ten public tables, intervals made this way covered "
    "93 % of the losses of larger runs, and 84 % of those at ten times the compute "
    "(`experiments/bank`)."
)
MOST_ROWS = 10  # of a table that grows with the runs
INTERVAL = f"{100 * LEVEL:.0f} % interval"
ESTIMATORS = {
    "least_squares": "least squares",
    "huber": "Huber's loss",
    "likelihood": "the likelihood of Huber's density, with its scale as a parameter",
}


def write(
    analysis: Analysis,
    folder: Path,
    story: Story | None = None,
    table: str | None = None,
    source: Sequence[str] | None = None,
) -> None:
    """Write the report, figures and tables, and replace those of an earlier analysis.

    ``story`` is the record of a study with a budget, ``table`` the file that the runs come from.
    ``source``, the table or the runs, is kept in fit.json if the folder does not lie within them.
    """
    with fileio.report_lock(folder):
        fileio.remove_torn(folder, folder / "tensorboard")
        figures = plots.draw(analysis, folder, story)
        document.write(list(compose(analysis, figures, story, table, folder)), folder)
        for name, runs in (("runs.csv", analysis.runs), ("left_out.csv", analysis.left_out)):
            if len(runs):
                fileio.write_text(folder / name, runs.to_csv(index=False, lineterminator="\n"))
            else:
                (folder / name).unlink(missing_ok=True)
        kept_source = {"source": list(source)} if source else {}
        fileio.write_json(folder / "fit.json", facts(analysis) | kept_source)


def show(
    analysis: Analysis, folder: Path, console: Console | None = None, table: str | None = None
) -> None:
    """Print the main sections, and the path of the report."""
    blocks = [Heading(analysis.question, 1), *measured(analysis, table), *verdict(analysis)]
    blocks += [*predictions(analysis), *law(analysis), *selection(analysis), *budgets(analysis)]
    blocks += [*next_run(analysis), *checklist(analysis), *notes(analysis)]
    document.show(blocks, folder, console)


def compose(
    analysis: Analysis,
    figures: Mapping[str, Any],
    story: Story | None = None,
    table: str | None = None,
    folder: Path | None = None,
) -> Iterator[Block]:
    """Yield the blocks of the report, which goes into ``folder``."""
    together = " together" if len(analysis.variables) > 1 else ""

    def pictures(*names: str) -> Iterator[Block]:
        for name in names:
            if name in figures:
                caption = plots.CAPTIONS.get(name + together, plots.CAPTIONS[name])
                yield Picture(name, caption, figures[name])

    yield from (Heading(analysis.question, 1), *measured(analysis, table), *verdict(analysis))
    yield from (*predictions(analysis, story), *pictures("scaling", "extrapolation"))
    yield from (*law(analysis), *selection(analysis), *optimum(analysis))
    yield from (*pictures("contours", "isoflop", "frontier"), *next_run(analysis))
    yield from story.decisions(figures.get("budget")) if story else ()
    yield from (Heading("Residuals"), *pictures("residuals"), *single_runs(analysis))
    yield from (*runs(analysis, folder), *pictures("curves"))
    yield from (*checklist(analysis), *notes(analysis), *method(analysis))
    yield Heading("Files")
    lines = ["`fit.json`: all numbers, to full precision", "`runs.csv`: the runs that were fitted"]
    lines += ["`left_out.csv`: the runs that were not, and why"] if len(analysis.left_out) else []
    lines += [f"figures, as `.png` and `.svg`: {', '.join(f'`{name}`' for name in figures)}"]
    yield Items([*lines, "`tensorboard/`: the figures, for TensorBoard"])


def verdict(analysis: Analysis) -> Iterator[Block]:
    """Yield the answer in one sentence, and what to know before relying on it."""
    yield Heading("Verdict")
    fit = analysis.fit
    exponents = [name for name in analysis.intervals if name in fit.law.exponents]
    word = "are described by" if len(analysis.candidates) > 1 else "were fitted by"
    text = f"{count(len(analysis.runs), 'run')} {word} the law `{fit.law.name}`"
    text += "".join(f", {name} {with_interval(analysis.intervals[name])}" for name in exponents)
    yield Paragraph(f"{text}; **{analysis.verdict}**.")
    if analysis.is_evidence is None:
        yield Paragraph("Runs at `scale=smoke` only test that a study works.")
    elif failed := [check for check in analysis.checks if check.passed is False]:
        titles = "; ".join(f"“{check.title}”" for check in failed)
        word = "Failed checks" if len(failed) > 1 else "The failed check"
        yield Paragraph(f"{word}, with [what to do](#checklist): {titles}.")
    elif not analysis.is_evidence:
        yield Paragraph("There are too few runs to hold the larger ones out and predict them.")
    if analysis.others:
        each = "; ".join(wording.differing(*other) for other in analysis.others.items())
        yield Paragraph(
            "These runs differ in more than the variables of the law and their seeds, but are "
            f"fitted together: {each}. If that was not intended, separate them with `where=` or "
            "put them into different folders."
        )


def notes(analysis: Analysis) -> Iterator[Block]:
    if analysis.notes:
        yield Heading("How the runs were read")
        yield Items(analysis.notes)


def law(analysis: Analysis) -> Iterator[Block]:
    """Yield the law, its parameters and the size of its residuals."""
    fit, source = analysis.fit, analysis.fit.law.source
    yield Heading("The law" if analysis.is_evidence else "The law, as far as it goes")
    reduced = fit.optimum.law  # without the terms that went to zero
    yield Code(f"{wording.formula(reduced)}\n{wording.equation(reduced, fit.parameters)}")
    letters = f"L: {analysis.columns.loss_label}; {wording.variables(analysis.words)}"
    yield Paragraph(f"{letters}. {wording.capital(source)}.")
    at_bound = list(fit.bounds_met.values())
    header, fits = ["", "estimate", INTERVAL], [(fit.parameters, analysis.intervals)]
    if total := analysis.in_total:
        at_bound += [f"embeddings counted, {line}" for line in total.bounds_met.values()]
        header += ["embeddings counted", INTERVAL]
        fits.append((total.parameters, analysis.total_intervals))
    if at_bound:
        yield Paragraph(" ".join(f"{line}." for line in at_bound))
    rows = [[name] for name in fit.parameters]
    for row, (parameters, intervals) in itertools.product(rows, fits):
        interval = intervals.get(row[0])
        row += [wording.estimate(parameters[row[0]], interval), wording.reach(interval)]
    yield Table(header, rows)
    if analysis.intervals:
        yield Paragraph(
            "The formula gives four digits of each number, enough to draw the curve; the table "
            "rounds them to what each interval supports."
        )
    if fit.degrees > 0:
        spread = fit.relative(float(np.sqrt(np.sum(fit.residuals**2) / fit.degrees)))
        text = f"The residuals have a standard deviation of {percent(spread)} of the loss"
        if analysis.noise:
            each = np.sort(fit.relative(analysis.noise.each, analysis.runs[fit.loss].to_numpy()))
            text += f"; runs that differ only in their seed scatter by {percent(each[0])}"
            if each[-1] > 1.05 * each[0]:
                text += f" to {percent(each[-1])}, depending on their length"
        yield Paragraph(f"{text}. R² of {fit.unit}: {fit.r_squared:.4f}.")
    if not analysis.intervals:
        why = "As many parameters as runs" if fit.degrees < 1 else "All rows belong to one run"
        yield Paragraph(f"{why}: there is nothing to judge an interval by.")
    if text := " ".join(_constant(analysis)):
        yield Paragraph(text)


def _constant(analysis: Analysis) -> Iterator[str]:
    """Yield sentences on the constant E: its interval, the lowest loss, the exact entropy."""
    fit, floor = analysis.fit, analysis.floor
    constant, interval = fit.parameters.get("E"), analysis.intervals.get("E")
    if constant and interval and not wording.is_set(interval.low):
        is_bounded = np.isfinite(interval.high)
        other = f"anything below {number(interval.high)}" if is_bounded else "any other value"
        yield f"E is not known from these runs: {other} describes them nearly as well."
    lowest = float(fit.table[fit.loss].min())
    if constant and constant > lowest:
        yield f"E lies above the lowest loss measured, {number(lowest, 4)}: runs scatter around"
        yield "the law, and E is where it levels off for their mean, not a bound on each."
    if floor is not None:
        yield f"The entropy of the corpus is known: {number(floor, 5)}."
    if floor is not None and constant:
        side = "above" if constant > floor else "below"
        alone = constant > floor and not {"N", "D"} <= set(fit.columns)
        why = ", because the factors held fixed add to the loss" if alone else ""
        yield f"E is {percent(abs(constant / floor - 1))} {side} it{why}."


def selection(analysis: Analysis) -> Iterator[Block]:
    """Yield a comparison of the laws that were tried."""
    if len(analysis.candidates) < 2:
        return
    errors = analysis.held_out.by_law if analysis.held_out else {}
    weights = analysis.forecast.by_law if analysis.forecast else {}
    rows, at_bound = [], []
    for one in analysis.candidates:
        row = [one.law, LAWS[one.law].formula.removeprefix("L = ")]
        if one.fit is None:
            rows.append([*row, "not fitted", "", ""])
            continue
        behind = one.aicc - analysis.candidates[0].aicc
        row.append(f"{behind:.1f}" if np.isfinite(behind) else UNKNOWN)
        row.append(percent(errors[one.law]) if one.law in errors else UNKNOWN)
        weight = f"{100 * weights[one.law]:.0f} %" if one.law in weights else UNKNOWN
        rows.append([*row, weight])
        if names := one.fit.optimum.at_bound:
            at_bound.append(f"{one.law} ({', '.join(names)})")
    yield Heading("Which law")
    yield Table(["law", "formula", "Δ AICc", "held-out error", "weight in forecast"], rows)
    bounds = [f"At a bound of a parameter: {'; '.join(at_bound)}."] if at_bound else []
    yield Paragraph(" ".join([_how_clear(analysis, errors), *bounds]))


def _how_clear(analysis: Analysis, errors: Mapping[str, float]) -> str:
    """Return how far the best law is ahead; ``errors`` are those on the held-out runs, by law."""
    candidates, chosen = analysis.candidates, analysis.chosen
    best, *others = [one for one in candidates if one.fit is not None]
    if not np.isfinite(best.aicc):
        return "Too few runs to choose between laws: the first that could be fitted is shown."
    near = [one.law for one in (best, *others) if one.aicc - best.aicc < CLEAR]
    if len(near) > 1 and chosen.law in near:
        tied = ", ".join(law for law in near if law != chosen.law)
        text = f"{tied} can hardly be distinguished from {chosen.law}"
        if chosen.law == preferred(candidates).law:
            text += f"; of the laws within {CLEAR:g} AICc of the best, the first listed is shown."
        else:
            text += ", which was asked for."
    else:
        text = f"{best.law} is best by AICc"
        if others and np.isfinite(others[0].aicc):
            text += f", {number(others[0].aicc - best.aicc)} ahead of {others[0].law}"
        text += "." if chosen is best else f"; {chosen.law} was asked for."
    least = min(errors, key=lambda law: errors[law], default=chosen.law)
    return text + (f" {least} predicts the held-out runs best." if least != chosen.law else "")


def checklist(analysis: Analysis) -> Iterator[Block]:
    """Yield the checks that fail, each with advice, then the others, folded."""
    yield Heading("Checklist")
    many = analysis.outcomes.count
    yield Paragraph(
        f"{many(PASS)} pass, {many('fail')} fail, {many(NOT_APPLICABLE)} not "
        f"applicable, {many(NOT_TESTED)} not tested."
    )
    if failed := [one for one in analysis.checks if one.passed is False]:
        lines = (f"{c.title} ({c.figure}; needs {c.threshold}). {c.advice}" for c in failed)
        yield Items([f"{document.FAIL}: {line}" for line in lines])
    folds = [("Checks that pass", [PASS])]
    folds += [("Not tested, or not applicable", [NOT_TESTED, NOT_APPLICABLE])]
    for title, outcomes in folds:
        tables = []
        for group in THRESHOLDS:
            checks = [c for c in analysis.checks if c.group == group and c.outcome in outcomes]
            checks.sort(key=lambda c: outcomes.index(c.outcome))
            rows = [[c.outcome, c.title, c.figure, c.threshold] for c in checks]
            tables += [Table(["", group, "found", "needs"], rows)] if rows else []
        if tables:
            yield Folded(f"{title} ({sum(len(table.rows) for table in tables)})", tables)


def single_runs(analysis: Analysis) -> Iterator[Block]:
    """Yield how far each run alone moves the prediction, and the outliers."""
    if not analysis.single:
        yield Paragraph("Runs were not left out in turn: too few, or several rows per run.")
        return
    moved = [100 * one.moved for one in analysis.single]
    reached = f"{min(moved):+.2f} to {max(moved):+.2f} %"
    what = "prediction" if analysis.predictions else "loss at the largest run"
    text = f"Each run moves the {what} by {reached}, compared with a law fitted without it."
    outliers = [one for one in analysis.single if one.is_outlier]
    far = "far from the law of the others or from other seeds"
    what = f"These lie {far}:" if outliers else f"None lies {far}. The three that move it most:"
    yield Paragraph(f"{text} {what}")
    header = ["run", "from the law", "standard errors", "from its seeds", "their scatter"]
    listed, rows = outliers or analysis.single[:3], []
    for one in listed[:MOST_ROWS]:
        name = Path(analysis.columns.name_of(analysis.runs, one.row)).name
        seeds = [UNKNOWN, UNKNOWN]
        if one.off_siblings is not None and one.scatters is not None:
            seeds = [f"{100 * one.off_siblings:+.1f} %", f"×{abs(one.scatters):.1f}"]
        row = [name, f"{100 * one.off:+.1f} %", f"{one.errors:+.1f}", *seeds]
        rows.append([*row, f"{100 * one.moved:+.2f} %", "sets the law" if one.sets_law else ""])
    yield Table([*header, "moves the prediction", ""], rows)
    if len(listed) > MOST_ROWS:
        yield Paragraph(f"And {len(listed) - MOST_ROWS} more, in `fit.json`.")


def predictions(analysis: Analysis, story: Story | None = None) -> Iterator[Block]:
    """Yield how well larger runs were predicted, then the losses predicted beyond the runs."""
    yield Heading("Prediction")
    yield from story.test() if story else ()
    if held := analysis.held_out:
        were = "largest run was" if held.runs == 1 else f"{held.runs} larger runs were"
        yield Paragraph(
            f"The {were} held out and predicted from the smaller runs alone, up to "
            f"{wording.times(held.distance)} beyond them. The predictions are off by "
            f"{percent(held.error)} on average and {percent(held.worst)} at most, and "
            f"{100 * held.within:.0f} % of the runs lie within their {INTERVAL}."
        )
    if analysis.unanswered:
        yield Paragraph(" ".join(analysis.unanswered))
    if not analysis.predictions:
        yield Paragraph(
            "No loss beyond the runs is predicted: nothing shows how far to trust a prediction."
        )
        return
    made, names = analysis.predictions, list(analysis.predictions[0].place)
    costs = ["FLOPs"] if any(one.flops is not None for one in made) else []
    rows = []
    for one in made:
        values = [one.flops] * len(costs) + [one.place[name] for name in names]
        loss = [wording.estimate(one.run.estimate, one.run), wording.reach(one.run)]
        rows.append([*map(number, values), *loss, with_interval(one.loss)])
    rows = [row for i, row in enumerate(rows) if row not in rows[:i]]  # asked for, and the default
    header = [*costs, *(analysis.words[name] for name in names)]
    yield Table([*header, "loss", f"{INTERVAL} of a run", "by the law alone"], rows)


def optimum(analysis: Analysis) -> Iterator[Block]:
    """Yield the best split of compute between parameters and tokens, by each method."""
    path = analysis.frontier
    if path is None:
        return
    yield Heading("Compute-optimal")
    if path.estimates:
        largest = f"the largest budget that was run, {number(path.budget)} FLOPs"
        yield Paragraph(f"N ~ C^a, D ~ C^b; N and D at {largest}:")
        rows = [[e.way, *map(with_interval, (e.a, e.b, e.n, e.d))] for e in path.estimates]
        yield Table(["", "a", "b", "N", "D"], rows)
        methods = "; ".join(f"{one.way}: {one.a.method}" for one in path.estimates)
        yield Paragraph(f"Intervals of the {methods}.")
    lines = [f"{document.FAIL}: the methods disagree on {line}." for line in path.disagreements]
    if lines := lines + [f"{way}: {reason}." for way, reason in path.missing.items()]:
        yield Items(lines)
    yield from budgets(analysis)


def budgets(analysis: Analysis) -> Iterator[Block]:
    if analysis.budgets:
        yield Items([f"{wording.capital(str(one))}." for one in analysis.budgets])


def method(analysis: Analysis) -> Iterator[Block]:
    fit, minimum = analysis.fit, analysis.fit.optimum
    yield Heading("How it was computed")
    text = f"Estimator for residuals of {fit.unit}: {ESTIMATORS[fit.estimator]} ({fit.reason})."
    if np.isfinite(minimum.threshold):
        text += f" Threshold {number(minimum.threshold)} in {fit.unit}."
    weights = fit.points.weights
    if weights is not None and weights.max() > 1.01 * weights.min():
        text += " Runs are weighted by the scatter of seeds at their length, and by what the law "
        text += f"leaves unexplained; weights run from {weights.min():.2g} to {weights.max():.2g}."
    if analysis.intervals:
        methods = ", ".join(sorted({one.method for one in analysis.intervals.values()}))
        predicted = ", ".join(sorted({one.loss.method for one in analysis.predictions}))
        text += f" Intervals of parameters: {methods}"
        text += f"; of predictions: {predicted}." if predicted else "."
    yield Paragraph(text)
    if analysis.forecast and analysis.predictions:
        yield Paragraph(FORECAST)
    yield Paragraph(
        f"The solver {'converged' if minimum.converged else 'did not converge'}: "
        f"{count(minimum.starts, 'start')}, "
        f"{count(len(minimum.basins), 'distinct minimum', 'distinct minima')}, objective "
        f"{number(minimum.objective, 6)}, gradient {number(minimum.gradient_norm, 1)}, "
        f"smallest eigenvalue {number(minimum.smallest_eigenvalue)}. Seed {analysis.seed}. "
        f"Data {data_hash(analysis)[:12]}."
    )
