"""Compare the runs of several recipes: the law of each, their ratios, checks and a report."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure

from tinygpt import fileio
from tinygpt.config import ConfigError
from tinygpt.config.checks import did_you_mean
from tinygpt.config.settings import SMOKE
from tinygpt.scaling import document, drawing, interactive, wording
from tinygpt.scaling.columns import choice, other_settings, varied
from tinygpt.scaling.compare import LAWS_TRIED, OF_ONE, Ratio, ratio_of
from tinygpt.scaling.document import Block, Heading, Items, Paragraph, Picture, Table
from tinygpt.scaling.elsewhere import Table as Read
from tinygpt.scaling.evidence import FAIL, NOT_TESTED, PASS, Check
from tinygpt.scaling.fitting import Fit
from tinygpt.scaling.intervals import LEVEL, Interval, intervals
from tinygpt.scaling.runs import SETTINGS, left_out_lines
from tinygpt.scaling.selection import preferred, select
from tinygpt.scaling.tables import read_cells
from tinygpt.scaling.wording import UNKNOWN, count, number, with_interval

COLUMNS = dict.fromkeys(("optim", "optim.kind"), "optimizer")
COLUMNS |= dict.fromkeys(("data", "data.name"), "dataset")
BITS = "final_val_bits_per_byte"
COLOURS = (drawing.BLUE, drawing.RED, drawing.GREEN, drawing.ORANGE, drawing.PURPLE, drawing.BLACK)
CAPTION = (
    "Left: the runs, and the least loss by the law of both at the sizes that were trained. Right: "
    f"how many times the {{what}} the reference needs for the same loss, with {100 * LEVEL:.0f} % "
    "intervals; a dot marks where the ratio is known best."
)
METHOD = (
    "One law goes through the runs of both recipes. The other recipe makes more, or less, of its "
    "tokens or of its parameters; E and the exponents are shared, but the gain may change with "
    "scale. The ratio is an average over forms of the law and over where the gain lies, by AICc. "
    "Its error comes from leaving out each place, under both recipes, in turn. How often such "
    "intervals cover the truth in simulated studies is in `experiments/compare`."
)
WORSE = "is better there"  # ends the reason for leaving out a run at another learning rate
UNKNOWABLE = 10.0  # a design that detects only larger ratios tells nothing
FAIR = "the best of three or more, not at an end: else rates are compared, not recipes"


@dataclass(frozen=True)
class Comparison:
    """Hold recipes, their ratios to a reference, and the checks of these ratios."""

    key: str
    reference: str
    sides: dict[str, Read]  # by name, the reference first
    variables: dict[str, str]  # variable of the laws -> column
    words: dict[str, str]  # variable -> its name
    laws: dict[str, tuple[Fit, dict[str, Interval]]]  # of each recipe alone
    ratios: dict[str, Ratio]  # of each other recipe
    checks: list[Check]
    notes: list[str]

    @property
    def scale(self) -> str:
        """Return the name of the horizontal axis: compute, or the x of a law in one variable."""
        return self.words.get("x", "training compute (FLOPs)")

    @property
    def what(self) -> str:
        """Return what a better recipe saves: compute, or the x of a law in one variable."""
        return self.words.get("x", "compute")

    @property
    def first(self) -> Read:
        return self.sides[self.reference]


# --- the runs


def split(table: pd.DataFrame, key: str) -> tuple[dict[str, pd.DataFrame], str]:
    """Split runs by the values of a key, the most common first; return them and the key's column.

    Raises ConfigError for a missing key or one with a single value.
    """
    last = COLUMNS.get(key, key.rsplit(".", 1)[-1])
    column = next((name for name in (key, f"config.{key}", last) if name in table), None)
    if column is None:
        several = [str(name) for name in table if 2 <= table[name].nunique() <= len(table) // 2]
        near = did_you_mean(key, [name.removeprefix("config.") for name in several])
        raise ConfigError(f"compare={key}: the runs have no such key{near}")
    values = table[column].value_counts().index
    if len(values) < 2:
        one = f" is {values[0]} in every run;" if len(values) else ""
        raise ConfigError(f"compare={key}:{one} needs at least two values")
    return {f"{value}": table[table[column] == value] for value in values}, column


def conditions(path: str, key: str, where: str | None) -> dict[str, str]:
    """Return, for each value of a column of a table file, the condition that selects its rows."""
    parts, column = split(read_cells(Path(path), []), key)
    each = {name: f"`{column}` == {part[column].iloc[0]!r}" for name, part in parts.items()}
    return {name: f"({where}) & ({one})" if where else one for name, one in each.items()}


def loss_of(parts: Mapping[str, pd.DataFrame], loss: str, notes: list[str]) -> str:
    """Return a loss that is comparable between recipes: bits per byte if tokenizers differ.

    Raises ConfigError for losses measured on different texts.
    """

    def several(name: str) -> bool:
        return len({v for part in parts.values() if name in part for v in part[name].dropna()}) > 1

    if not several("tokenizer_fingerprint"):
        if several("validation_fingerprint"):
            texts = "these runs were scored on different validation texts"
            raise ConfigError(f"compare: {texts}; train all with one data.val_file")
    elif "bits_per" not in loss:
        notes.append(f"The tokenizers differ, so the losses are in bits per byte ({BITS}).")
        return BITS
    return loss


# --- the comparison


def compare(
    sides: Mapping[str, Read], key: str, reference: str | None = None, notes: Sequence[str] = ()
) -> Comparison:
    """Compare recipes by their runs at the best learning rate of each place.

    Raises ConfigError for an unknown reference or too few runs.
    """
    names, said = list(sides), list(notes)
    if reference is None:
        reference = names[0]
        said.append(f"The reference is {reference}; `reference=` names another.")
    if reference not in names:
        raise ConfigError(f"reference={reference}: must be one of {', '.join(names)}")
    names.sort(key=lambda name: name != reference)
    first = sides[reference]
    every = pd.concat([side.runs for side in sides.values()])
    where = first.columns.where(every)
    _, variables, words = choice("auto", "auto", varied(every, where), where)
    if variables.get("x") in (where.get("U"), where.get("T"), None) and "x" in variables:
        raise ConfigError("compare: the runs differ neither in size, nor in tokens, nor in compute")
    variables = {name: column for name, column in variables.items() if name != "U"}
    ratios, checks, laws = {}, list[Check](), {}
    for name in names:
        side = sides[name]
        checks.append(check_rate(name, side, variables.values(), key))
        checks.append(check_alone(name, side, variables.values()))
        said += [*_left_out(name, side), *side.notes]
        if found := _law(side, variables):
            laws[name] = found
        if name != reference:
            loss = side.columns.loss
            ratios[name] = ratio_of(first.runs, side.runs, variables, loss, where.get("C"))
            checks += check_ratio(f"{name} and {reference}", ratios[name], first, side)
    checks.sort(key=lambda one: one.passed is not False)
    if "scale" in every and (every["scale"] == "smoke").any():
        said.insert(0, SMOKE)
    said, sides = list(dict.fromkeys(said)), {name: sides[name] for name in names}
    return Comparison(key, reference, sides, variables, words, laws, ratios, checks, said)


def _left_out(name: str, side: Read) -> list[str]:
    """Return a line for each reason that runs of a recipe were left out for."""
    left, total = side.left_out, len(side.runs) + len(side.left_out)
    if left.empty:
        return []
    worse = left["reason"].str.endswith(WORSE)
    lines = left_out_lines(left[~worse], total)
    if many := int(worse.sum()):
        lines += [f"{count(many, 'run')} at a learning rate that is not the best at its place"]
    return [f"{name}: {line}" for line in lines]


def _law(side: Read, variables: Mapping[str, str]) -> tuple[Fit, dict[str, Interval]] | None:
    """Fit the law of one recipe alone; return None if it has too few runs."""
    how: dict[str, Any] = {"loss": side.columns.loss, "estimator": "auto", **variables}
    tried = OF_ONE if "x" in variables else LAWS_TRIED
    try:
        candidates = select(side.runs, tried, same=SETTINGS, tokens=variables.get("D"), **how)
    except ConfigError:
        return None
    best = preferred(candidates).fit
    return (best, intervals(best) if best.degrees > 0 else {}) if best else None


def check_rate(name: str, side: Read, place: Any, key: str) -> Check:
    """Judge by all the rates that were tried whether a recipe was trained at its best one."""

    def made(outcome: str, figure: str, advice: str = "") -> Check:
        title = f"{name} is trained at its best learning rate"
        if advice:
            advice = f"Run {'' if key == 'studies' else f'{key}={name} '}{advice}."
        return Check("rate", "runs", title, outcome, figure, FAIR, advice)

    rate = "learning_rate"
    if rate not in side.runs or side.runs[rate].isna().any():
        return made(NOT_TESTED, "the table does not say the rates")
    left = side.left_out
    worse = [left[left["reason"].str.endswith(WORSE)]] if len(left) else []
    used, best, beyond, tried = sorted(set(side.runs[rate])), set(), [], list[set[float]]()
    every = pd.concat([side.runs, *worse])
    ends = (every[rate].min(), every[rate].max())  # beyond those of one place, another may go on
    for _, runs in every.groupby(list(place)):
        means = runs.groupby(rate)[side.columns.loss].mean()
        rates, least = means.index.to_numpy(), int(np.argmin(means))
        tried.append(set(rates.tolist()))
        if len(rates) > 2:
            best.add(float(rates[least]))
            if rates[least] in ends:
                beyond.append(rates[least] ** 2 / rates[abs(least - 1)])
    shown, swept = (", ".join(f"{one:.3g}" for one in some) for some in (used, sorted(best)))
    if not best:
        each = ",".join(f"{times * used[0]:.3g}" for times in (0.5, 1, 2))
        return made("fail", f"{shown}: never swept", f"optim.learning_rate={each} at one place")
    if beyond:
        more = ",".join(sorted({f"{one:.3g}" for one in beyond}))
        return made("fail", f"{swept}: at an end", f"optim.learning_rate={more} too")
    if not all(rates & best for rates in tried):
        figure = f"{shown} is used, {swept} is best where rates were swept"
        return made("fail", figure, f"optim.learning_rate={swept} everywhere")
    return made(PASS, f"{swept}, the best of a sweep")


def check_alone(name: str, side: Read, variables: Iterable[str]) -> Check:
    """Judge whether the runs of a recipe are of one recipe."""
    others = list(other_settings(side.runs, side.columns, variables).items())
    return Check(
        *("alone", "runs", f"the runs of {name} are of one recipe", FAIL if others else PASS),
        "; ".join(wording.differing(*one) for one in others[:3]) or "no other setting differs",
        "only size, tokens, learning rate and seed differ: else several recipes are mixed",
        "Choose runs with where=, or compare by what differs.",
    )


def check_ratio(two: str, ratio: Ratio, first: Read, side: Read) -> Iterator[Check]:
    """Yield the checks of a ratio."""
    losses = [one.runs[one.columns.loss] for one in (first, side)]
    low, high = max(each.min() for each in losses), min(each.max() for each in losses)
    yield Check(
        *("overlap", "runs", f"the losses of {two} overlap", PASS if low < high else FAIL),
        f"from {number(low, 4)} to {number(high, 4)}" if low < high else "they do not",
        "losses that both reach: else the ratio stands on the law alone",
        "Train the worse recipe longer, or the better one less.",
    )
    yield Check(
        *("pairs", "runs", f"{two} were trained at the same places"),
        PASS if ratio.pairs >= ratio.places / 2 else FAIL,
        f"{ratio.pairs} of {count(ratio.places, 'place')}",
        "at least half of them: there, errors of the law cancel in the ratio",
        "Train both at the same sizes and tokens.",
    )
    higher, p = ratio.floor
    far = wording.percent(abs(float(np.expm1(higher)))) if higher < 5 else "far"
    apart = f"{far} {'above' if higher > 0 else 'below'}"
    yield Check(
        *("floor", "fit", f"{two} have one floor E"),
        NOT_TESTED if np.isnan(p) else PASS if p > 0.05 else FAIL,
        UNKNOWN if np.isnan(p) else f"{apart} the reference's (p = {number(p, 2)})",
        "p above 5 %: on one text, all recipes have one entropy to reach",
        "Read the ratio within the range of the runs only.",
    )


# --- the report


def verdict(comparison: Comparison, name: str) -> str:
    """Say in a sentence what a recipe is worth."""
    ratio, reference, what = comparison.ratios[name], comparison.reference, comparison.what
    found = ratio.at(ratio.best_known)
    shown = with_interval(found)
    where = f"at {number(ratio.best_known, 2)} {comparison.words.get('x', 'FLOPs')}"
    if ratio.detectable > UNKNOWABLE:
        few = "these runs are too few, or too alike, to say what"
        return f"{few} {name} is worth: {shown} {where}."
    if not ratio.differs:
        text = f"no difference between {name} and {reference} is shown: {where}, the ratio of "
        text += f"{what} is {shown}; these runs can tell {number(ratio.detectable)} from 1"
    elif found.estimate > 1:
        text = f"{name} reaches the loss of {reference} with 1/{shown} of the {what}, {where}"
    else:
        inverse = Interval(1 / found.estimate, 1 / found.high, 1 / found.low, LEVEL, "")
        shown = with_interval(inverse)
        text = f"{name} needs {shown} times the {what} of {reference} for the same loss, {where}"
    if not ratio.drifts:
        return f"{text}; a change of the ratio with scale is not shown."
    turn = "rises" if ratio.exponents().estimate > 1 else "falls"
    last = with_interval(ratio.at(ratio.ends[1]))
    return f"{text}; the ratio {turn} with scale, to {last} at the end."


def compose(comparison: Comparison, live: dict[str, Any]) -> Iterator[Block]:
    """Yield the whole report in order; ``live`` makes its figure interactive."""
    yield from [*answer(comparison), Picture("compare", CAPTION.format(what=comparison.what), live)]
    yield from recipes(comparison)
    yield from checklist(comparison)
    yield Heading("How it was computed")
    yield Paragraph(METHOD)
    lines = []
    for name, ratio in comparison.ratios.items():
        top = sorted(zip(ratio.weights, ratio.models, strict=True), key=lambda one: -one[0])[:3]
        each = [f"{one.base.name}, gain in {one.gain}: {100 * part:.0f} %" for part, one in top]
        shared = f"Residuals at a place: correlation {ratio.shared:.2f}."
        lines.append(f"{name}: {'; '.join(each)}. {shared}")
    yield Items(lines)


def answer(comparison: Comparison) -> Iterator[Block]:
    """Yield the question, the verdicts and the ratios."""
    others = list(comparison.ratios)
    listed = " or ".join([", ".join(others[:-1]), others[-1]] if others[1:] else others)
    yield Heading(f"What is {listed} worth against {comparison.reference}?", 1)
    yield Items([wording.capital(verdict(comparison, name)) for name in others])
    header = ["", f"{comparison.what} at equal loss", "at the largest", "tokens at equal size"]
    rows = []
    for name, ratio in comparison.ratios.items():
        made = [ratio.at(ratio.best_known), ratio.at(ratio.ends[1]), ratio.tokens]
        cells = [with_interval(one) if one else UNKNOWN for one in [*made, ratio.exponents()]]
        rows.append([name, *cells, number(ratio.detectable)])
    yield Table([*header, "ratio of exponents", "detectable"], rows)
    yield Paragraph(
        f"A ratio of 1.4: {comparison.reference} needs 1.4 times as much. In brackets: "
        f"{100 * LEVEL:.0f} % intervals. Compute is the model's, without the optimizer's own. "
        "Detectable: the smallest ratio that would have been told from 1 four times in five."
    )


def recipes(comparison: Comparison) -> Iterator[Block]:
    """Yield the runs and the law of each recipe."""
    yield Heading("The recipes")
    header = ["", "runs", "places", "compute (FLOPs)", "losses"]
    rows, laws = [], []
    for name, side in comparison.sides.items():
        compute, losses = side.columns.compute(side.runs), side.runs[side.columns.loss]
        spans = [f"{number(v.min(), 4)} to {number(v.max(), 4)}" for v in (compute, losses)]
        places = len(side.runs.drop_duplicates(list(comparison.variables.values())))
        fit, found = comparison.laws.get(name, (None, {}))
        law = ["too few runs for a law of its own"]
        if fit:
            known = [one for one in found if one in fit.law.exponents]
            law = [f"`{wording.equation(fit.optimum.law, fit.parameters)}`"]
            law += [f"{one} {with_interval(found[one])}" for one in known]
        laws.append(f"{name} alone: {'; '.join(law)}")
        rows.append([name, str(len(side.runs)), str(places), *spans])
    yield Table(header, rows)
    yield Items([*laws, *comparison.notes])


def checklist(comparison: Comparison, brief: bool = False) -> Iterator[Block]:
    """Yield the checks, failures first; ``brief`` leaves out those that pass."""
    yield Heading("Checklist")
    passed = sum(one.passed is True for one in comparison.checks)
    yield Paragraph(f"{passed} of {len(comparison.checks)} checks pass.")
    rows = []
    for one in comparison.checks:
        if not (brief and one.passed):
            needs = one.advice if one.passed is False else f"needs {one.threshold}"
            outcome = one.outcome.replace(FAIL, document.FAIL)
            rows.append([outcome, one.title, one.figure, needs])
    if rows:
        yield Table(["", "check", "found", ""], rows)


def facts(comparison: Comparison) -> dict[str, Any]:
    """Return all numbers for compare.json."""

    def ends(one: Interval | None) -> dict[str, float] | None:
        return {"estimate": one.estimate, "low": one.low, "high": one.high} if one else None

    found = {
        name: {
            "verdict": verdict(comparison, name),
            "best_known_at": ratio.best_known,
            "largest": ratio.ends[1],
            "ratio": ends(ratio.at(ratio.best_known)),
            "ratio_at_largest": ends(ratio.at(ratio.ends[1])),
            "tokens": ends(ratio.tokens),
            "exponents": ends(ratio.exponents()),
            **{key: getattr(ratio, key) for key in ("detectable", "places", "pairs")},
            "floor": dict(zip(("log_ratio", "p"), ratio.floor, strict=True)),
        }
        for name, ratio in comparison.ratios.items()
    }
    checks = [dataclasses.asdict(one) | {"passed": one.passed} for one in comparison.checks]
    plain = {name: getattr(comparison, name) for name in ("key", "reference", "variables", "notes")}
    return {**plain, "loss": comparison.first.columns.loss, "ratios": found, "checks": checks}


def write(comparison: Comparison, folder: Path) -> None:
    """Write the report with its figure, numbers and runs to a folder."""
    with fileio.report_lock(folder):
        with rc_context(drawing.STYLE):
            figure = draw(comparison)
            drawing.save({"compare": figure}, folder)
            live = interactive.traces(figure)
        document.write(list(compose(comparison, live)), folder)
        sides = [side.runs.assign(recipe=name) for name, side in comparison.sides.items()]
        text = pd.concat(sides).to_csv(index=False, lineterminator="\n")
        fileio.write_text(folder / "runs.csv", text)
        fileio.write_json(folder / "compare.json", facts(comparison))


def show(comparison: Comparison, folder: Path) -> None:
    """Print the report without its figure, and the path of the whole report."""
    blocks = [*answer(comparison), *recipes(comparison), *checklist(comparison, brief=True)]
    document.show(blocks, folder)


def draw(comparison: Comparison) -> Figure:
    """Draw the losses and curves of all recipes, and the ratios."""
    figure, (left, right) = drawing.side_by_side(2)
    any_ratio = next(iter(comparison.ratios.values()))
    for k, (name, side) in enumerate(comparison.sides.items()):
        colour, ratio = COLOURS[k % len(COLOURS)], comparison.ratios.get(name)
        x = side.columns.size(side.runs, comparison.variables)[0]
        along = np.geomspace(x.min(), x.max(), 60)
        losses = side.runs[side.columns.loss].to_numpy(float)
        (drawn,) = left.plot(x, losses, "o", ms=2.5, color=colour, label=name)
        runs = [side.columns.name_of(side.runs, row) for row in range(len(x))]
        drawing.HOVER[drawn] = [f"{run}: {y:.4g}" for run, y in zip(runs, losses, strict=True)]
        curve = (ratio or any_ratio).curve(along, other=ratio is not None)
        left.plot(along, curve, color=colour, lw=1)
        if ratio:  # with its interval over the range of the runs
            along, best = np.geomspace(*ratio.ends, 40), ratio.best_known
            found = [ratio.at(one) for one in along]
            right.plot(along, [one.estimate for one in found], color=colour)
            ends = [one.low for one in found], [one.high for one in found]
            right.fill_between(along, *ends, color=colour, alpha=0.15, lw=0)
            right.plot([best], [ratio.at(best).estimate], "o", ms=4, color=colour)
    right.axhline(1.0, color=drawing.GREY, lw=0.8)
    needed = f"{comparison.what} that {comparison.reference} needs"
    for axes, word in ((left, comparison.first.columns.loss_label), (right, needed)):
        drawing.log_axes(axes, comparison.scale, word)
    drawing.legend(left)
    return figure
