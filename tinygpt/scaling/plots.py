"""The figures of a report, from an analysis; the same input gives the same files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from scipy import special

from tinygpt.scaling.analysis import Analysis
from tinygpt.scaling.drawing import (
    BLACK,
    BLUE,
    COLUMN,
    GREEN,
    GREY,
    HOVER,
    LABELS,
    RED,
    SKY,
    STYLE,
    colour_bar,
    label_contours,
    legend,
    limit,
    log_axes,
    log_norm,
    log_ticks,
    save,
    side_by_side,
    viridis,
)
from tinygpt.scaling.fitting import Fit
from tinygpt.scaling.interactive import traces
from tinygpt.scaling.intervals import LEVEL, covariance
from tinygpt.scaling.laws import Array
from tinygpt.scaling.story import Story
from tinygpt.scaling.wording import number, whole

CAPTIONS = {
    "scaling": "The runs and the law, with its 95 % band; dashed: beyond the runs.",
    "scaling together": (
        "The runs and the law, with its 95 % band. Colour gives the other variable; any third one "
        "is at its geometric mean."
    ),
    "residuals": "What the law leaves unexplained. A pattern here is something it misses.",
    "contours": (
        "Lines of equal loss by the law where no token is seen twice, and the runs, coloured by "
        "their measured loss."
    ),
    "extrapolation": "The larger runs, held out, and what the smaller runs alone predict for them.",
    "isoflop": (
        "Loss against size at equal compute, a curve through each budget; stars: minima. A budget "
        "without a star has no reliable minimum; `fit.json` says why."
    ),
    "frontier": (
        "The best split of each budget by the law, with its 95 % band; dashed: beyond the runs."
    ),
    "curves": (
        "The loss of every run as it trains; dashed: the lowest loss that any run reached with "
        "that compute."
    ),
}
OF_A_RUN, OF_THE_FITTED = "95 % of single runs", "forecast from the runs fitted"
DASHED: Any = (0, (4, 2))
MANY_RUNS = 60  # more points than this are drawn smaller
FAMILY = 5  # curves of a panel at most, one for each value of the other variable
FEW_LOSSES = 5  # fewer measured losses than this make no training curve
MANY_CURVES = 200  # more training curves than this are one image


def draw(analysis: Analysis, folder: Path, story: Story | None = None) -> dict[str, Any]:
    """Write every figure that applies as PNG and SVG; return, by their names without ending, what
    makes them interactive."""
    with mpl.rc_context(STYLE):
        figures = {
            "scaling": scaling(analysis),
            "residuals": residuals(analysis),
            "contours": contours(analysis),
            "extrapolation": extrapolation(analysis),
            "isoflop": isoflop(analysis),
            "frontier": frontier(analysis),
            "curves": curves(analysis),
            "budget": story.figure() if story else None,
        }
        save(figures, folder)
    return {name: traces(figure) for name, figure in figures.items() if figure is not None}


# --- what the panels share


def values(analysis: Analysis, name: str) -> Array:
    """Return a variable of the law at every run, (n,)."""
    return np.asarray(analysis.fit.table[analysis.variables[name]], dtype=float)


def losses(analysis: Analysis) -> Array:
    return np.asarray(analysis.fit.table[analysis.fit.loss], dtype=float)


def label(analysis: Analysis, name: str) -> str:
    """Return the label of the axis of a variable."""
    if name == "N" and analysis.words[name] == "parameters without embeddings":
        return "parameters N (without embeddings)"
    return LABELS.get(name, analysis.words[name])


def said(analysis: Analysis) -> list[str]:
    """Return what is shown of each run as the reader points at it."""
    fit, measured = analysis.fit, losses(analysis)
    known = {name: values(analysis, name) for name in analysis.variables}
    fitted = fit.predict(**known)
    lines = []
    for row, loss in enumerate(measured):
        places = [f"{analysis.words[name]} {whole(x[row])}" for name, x in known.items()]
        left = f"loss {loss:.4f}, law {fitted[row]:.4f} ({100 * (loss / fitted[row] - 1):+.2f} %)"
        lines.append("\n".join([analysis.columns.name_of(analysis.runs, row), *places, left]))
    return lines


def size_of(fit: Fit) -> float:
    return 2.5 if len(fit.points) > MANY_RUNS else 4.0


def reach(fit: Fit, places: dict[str, Array]) -> Array:
    """Return half the 95 % interval of the log loss by the delta method, (n,); zeros without."""
    law, x = fit.optimum.law, fit.points.at(places)
    theta = fit.optimum.theta[None]
    if fit.degrees < 1:
        return np.zeros_like(law.log_loss(theta, x)[0])
    gradient = law.derivatives(theta, x)[1][0]
    variance = np.einsum("np,pq,nq->n", gradient, covariance(fit), gradient)
    quantile = special.stdtrit(fit.degrees, 0.5 + LEVEL / 2)
    return np.asarray(quantile * np.sqrt(np.maximum(variance, 0.0)))


def band(fit: Fit, axes: Axes, places: dict[str, Array], colour: Any, **style: Any) -> None:
    """Fill the 95 % interval of the law."""
    half, middle = reach(fit, places), fit.predict(**places)
    low, high = middle * np.exp(-half), middle * np.exp(half)
    x = next(iter(places.values()))
    axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0, zorder=1, **style)


def _floors(analysis: Analysis, axes: Axes, constant: bool = True) -> None:
    """Draw the entropy of the corpus, if it is known, and the law's constant if it is in sight.

    To be called once the axes have their limits: what lies below them is named at the edge.
    """
    style: Any = {"linewidth": 1, "zorder": 1}
    axes.set_yscale("log")
    bottom, top = axes.get_ylim()
    if (floor := analysis.floor) is not None and floor > bottom / (top / bottom) ** 0.3:
        axes.axhline(floor, color=GREEN, linestyle="-.", label="exact floor", **style)
        axes.set_ylim(min(bottom, floor / (top / bottom) ** 0.05), top)
    elif floor is not None:
        edge: Any = {"transform": axes.transAxes, "ha": "left", "va": "bottom", "fontsize": 7}
        axes.text(0.01, 0.01, f"exact floor {number(floor)} ↓", color=GREEN, **edge)
    level = analysis.fit.parameters.get("E", 0.0) if constant else 0.0
    if len(analysis.variables) == 1 and level > 0.8 * losses(analysis).min():
        axes.axhline(level, color=GREY, linestyle=":", label="E", **style)


# --- the law and the runs


def scaling(analysis: Analysis) -> Figure:
    """Draw the loss against each variable, with the law."""
    names = list(analysis.variables)
    figure, panels = side_by_side(len(names))
    # what has to be in sight: losses measured and predicted
    shown = [*losses(analysis), *(one.loss.estimate for one in analysis.predictions)]
    for name, axes in zip(names, panels, strict=True):
        other = next((one for one in names if one != name), None)  # its values are the colours
        if other is None:
            _one_curve(analysis, axes, name)
        else:
            _family(analysis, figure, axes, name, other)
        limit(axes, np.array(shown))
        _floors(analysis, axes)
        log_axes(axes, label(analysis, name), analysis.columns.loss_label)
        if axes.get_legend_handles_labels()[0]:
            legend(axes, above=other is not None)
    ends = [axes.get_ylim() for axes in panels]
    for axes in panels:
        axes.set_ylim(min(low for low, _ in ends), max(high for _, high in ends))
    return figure


def _one_curve(analysis: Analysis, axes: Axes, name: str) -> None:
    fit, x = analysis.fit, values(analysis, name)
    ahead = max([x.max() * 1.3, *(one.place[name] for one in analysis.predictions)])
    grid = np.geomspace(x.min() / 1.3, ahead * 1.1, 200)
    band(fit, axes, {name: grid}, BLUE)
    inside, loss = grid <= x.max(), fit.predict(**{name: grid})
    axes.plot(grid[inside], loss[inside], color=BLUE, label="law")
    axes.plot(grid[~inside], loss[~inside], color=BLUE, linestyle=DASHED)
    dots: Any = {"color": BLACK, "markersize": size_of(fit), "zorder": 3}
    (drawn,) = axes.plot(x, losses(analysis), "o", label="runs", **dots)
    HOVER[drawn] = said(analysis)
    for at, one in enumerate(analysis.predictions):
        ends = [[one.run.estimate - one.run.low], [one.run.high - one.run.estimate]]
        word = "prediction of a run" if at == 0 else None
        style: Any = {"fmt": "D", "color": RED, "markersize": 3.5, "capsize": 2, "zorder": 4}
        axes.errorbar([one.place[name]], [one.loss.estimate], ends, label=word, **style)


def _family(analysis: Analysis, figure: Figure, axes: Axes, name: str, other: str) -> None:
    """Draw a curve for each of some values of the other variable, coloured by it."""
    fit, x, by = analysis.fit, values(analysis, name), values(analysis, other)
    norm = log_norm(by)
    grid = np.geomspace(x.min() / 1.3, x.max() * 1.3, 100)
    levels = np.unique(by)
    if len(levels) > FAMILY:
        wanted = np.quantile(np.log(levels), np.linspace(0.05, 0.95, FAMILY))
        levels = np.unique([levels[np.argmin(np.abs(np.log(levels) - one))] for one in wanted])
    for value in levels:
        place = {name: grid, other: np.full_like(grid, value)}
        for third in analysis.variables.keys() - place.keys():  # at its geometric mean
            middle = np.exp(np.mean(np.log(values(analysis, third))))
            place[third] = np.full_like(grid, middle)
        if "U" in place and "D" in place:  # there are no more unique tokens than tokens
            place["U"] = np.minimum(place["U"], place["D"])
        colour = viridis(norm)(value)
        band(fit, axes, place, colour)
        axes.plot(grid, fit.predict(**place), color=colour, zorder=2)
    style: Any = {"c": by, "cmap": "viridis", "norm": norm, "s": size_of(fit) ** 2}
    style |= {"edgecolors": "white", "linewidths": 0.3, "zorder": 3}
    HOVER[axes.scatter(x, losses(analysis), **style)] = said(analysis)
    colour_bar(figure, axes, norm, LABELS.get(other, other))


def residuals(analysis: Analysis) -> Figure:
    """Draw the residuals against each variable: in units of the scatter between seeds at a length
    where that is known, else in per cent of the loss."""
    fit, names, noise = analysis.fit, list(analysis.variables), analysis.noise
    if noise:
        left, one = fit.residuals / noise.each, 1.0
        word, unit = "± 1 sd between seeds", "measured − law (sd between seeds)"
    else:
        fitted = fit.predict(**{name: values(analysis, name) for name in names})
        left = 100 * (losses(analysis) / fitted - 1)
        one = float(np.sqrt(np.sum(fit.residuals**2) / max(1, fit.degrees)))
        one = 100 * fit.relative(one)
        word, unit = "± 1 sd of the residuals", "measured / law − 1 (%)"
    figure, panels = side_by_side(len(names))
    for name, axes in zip(names, panels, strict=True):
        axes.axhspan(-one, one, color=GREY, alpha=0.2, linewidth=0, label=word)
        axes.axhline(0, color=GREY, linewidth=0.6)
        style: Any = {"color": BLACK}
        if other := next((one for one in names if one != name), None):
            by = values(analysis, other)
            style = {"c": by, "cmap": "viridis", "norm": log_norm(by)}
            colour_bar(figure, axes, style["norm"], LABELS.get(other, other))
        style |= {"s": size_of(fit) ** 2, "zorder": 3}
        HOVER[axes.scatter(values(analysis, name), left, **style)] = said(analysis)
        axes.set_xscale("log")
        axes.set(xlabel=label(analysis, name), ylabel=unit)
        log_ticks(axes.xaxis)
        legend(axes, above=True)
    return figure


def contours(analysis: Analysis) -> Figure | None:
    """Draw the loss over sizes and data, the runs and the best split of each budget."""
    if not {"N", "D"} <= set(analysis.variables):
        return None
    fit, n, d = analysis.fit, values(analysis, "N"), values(analysis, "D")
    sizes = np.geomspace(n.min() / 2, n.max() * 2, 80)
    tokens = np.geomspace(d.min() / 2, d.max() * 2, 80)
    mesh_n, mesh_d = np.meshgrid(sizes, tokens)
    flat = {"N": mesh_n.ravel(), "D": mesh_d.ravel()}
    flat |= {"U": flat["D"]} if "U" in analysis.variables else {}  # as for the best split
    predicted = fit.predict(**flat).reshape(mesh_n.shape)
    measured = losses(analysis)
    norm = LogNorm(min(predicted.min(), measured.min()), max(predicted.max(), measured.max()))
    colours: Any = {"cmap": "viridis", "norm": norm}
    figure = Figure(figsize=(COLUMN * 1.35, COLUMN * 1.1))
    axes = figure.subplots()
    levels = np.geomspace(predicted.min(), predicted.max(), 13)[1:-1]
    lines = axes.contour(mesh_n, mesh_d, predicted, levels=levels, linewidths=0.8, **colours)
    style: Any = {"c": measured, "s": size_of(fit) ** 2 * 1.3, **colours}
    style |= {"edgecolors": "black", "linewidths": 0.3, "zorder": 3}
    HOVER[axes.scatter(n, d, **style)] = said(analysis)
    taken = np.column_stack([n, d])
    if analysis.frontier and (path := analysis.frontier.law):
        split = np.column_stack([path.n.estimate, path.d.estimate])
        axes.plot(*split.T, color=RED, linewidth=1.4, label="least loss for its compute")
        taken = np.concatenate([taken, split])
        legend(axes, above=True)
    log_axes(axes, label(analysis, "N"), label(analysis, "D"))
    axes.set(xlim=(sizes[0], sizes[-1]), ylim=(tokens[0], tokens[-1]))
    colour_bar(figure, axes, norm, analysis.columns.loss_label)
    label_contours(axes, lines, taken)
    return figure


def extrapolation(analysis: Analysis) -> Figure | None:
    """Draw the forecast from the runs below a cut, and the runs above it that it had not seen."""
    held = analysis.held_out
    if held is None:
        return None
    figure = Figure(figsize=(COLUMN * 1.2, COLUMN * 0.95))
    axes = figure.subplots()
    places = {name: values(analysis, name) for name in analysis.variables}
    above, size, measured = held.above.astype(bool), size_of(analysis.fit), losses(analysis)
    alone = len(places) == 1
    if alone:
        ((name, x),) = places.items()
        y = measured
        grid = np.geomspace(x.min() / 1.2, x.max() * 1.2, 200)
        log_loss, half = held.below.at({name: grid}, grid)
        ends = np.exp(log_loss - half), np.exp(log_loss + half)
        axes.fill_between(grid, *ends, color=SKY, alpha=0.4, linewidth=0, label=OF_A_RUN)
        axes.plot(grid, np.exp(log_loss), color=BLUE, label=OF_THE_FITTED)
        limit(axes, y)
    else:  # by how many per cent each run is off, with the interval of those held out
        log_loss, half = held.below.at(places, analysis.compute)
        x, y = analysis.compute, 100 * (measured / np.exp(log_loss) - 1)
        spread = 100 * np.sinh(half[above])
        axes.axhline(0, color=BLUE, label=OF_THE_FITTED)
        bars: Any = {"fmt": "none", "ecolor": SKY, "elinewidth": 1.2, "zorder": 1}
        axes.errorbar(x[above], 0 * spread, yerr=spread, label=OF_A_RUN, **bars)
    solid: Any = {"color": BLACK, "markersize": size, "label": "runs fitted"}
    hollow: Any = {"color": RED, "markerfacecolor": "white", "markersize": size + 0.7}
    hollow |= {"label": "runs held out", "zorder": 4}
    for marker, these, look in (("o", ~above, solid), ("s", above, hollow)):
        (drawn,) = axes.plot(x[these], y[these], marker, **look)
        HOVER[drawn] = [text for text, here in zip(said(analysis), these, strict=True) if here]
    if alone:
        log_axes(axes, label(analysis, name), analysis.columns.loss_label)
    else:
        axes.set_xscale("log")
        log_ticks(axes.xaxis)
        axes.set(xlabel=LABELS["C"], ylabel="measured / predicted − 1 (%)")
    legend(axes, above=True, columns=2)
    return figure


# --- the best split of a budget


def frontier(analysis: Analysis) -> Figure | None:
    """Draw the best size, data and loss of each budget."""
    if analysis.frontier is None or analysis.frontier.law is None:
        return None
    path, compute = analysis.frontier.law, analysis.compute
    figure, panels = side_by_side(3)
    rows = (
        (LABELS["N"], values(analysis, "N"), path.n),
        (LABELS["D"], values(analysis, "D"), path.d),
        (analysis.columns.loss_label, losses(analysis), path.loss),
    )
    dots: Any = {"color": GREY, "markersize": size_of(analysis.fit) - 0.5, "alpha": 0.6}
    inside = path.flops <= compute.max()
    for axes, (word, measured, best) in zip(panels, rows, strict=True):
        (drawn,) = axes.plot(compute, measured, "o", label="runs", **dots)
        HOVER[drawn] = said(analysis)
        axes.fill_between(path.flops, best.low, best.high, color=SKY, alpha=0.4, linewidth=0)
        axes.plot(path.flops[inside], best.estimate[inside], color=RED, label="best split")
        axes.plot(path.flops[~inside], best.estimate[~inside], color=RED, linestyle=DASHED)
        log_axes(axes, LABELS["C"], word)
    legend(panels[0], above=True, columns=2)
    _floors(analysis, panels[2])
    if floors := [line for line in panels[2].lines if line.get_label() == "exact floor"]:
        panels[2].legend(handles=floors, loc="lower left", bbox_to_anchor=(0, 1))
    return figure


def isoflop(analysis: Analysis) -> Figure | None:
    """Draw the loss against size along each budget, with its minimum."""
    every = analysis.frontier.isoflop.profiles if analysis.frontier else ()
    profiles = [one for one in every if len(np.unique(one.n)) >= 3]
    if sum(one.best is not None for one in profiles) < 2:
        return None
    figure = Figure(figsize=(COLUMN * 1.35, COLUMN * 1.05))
    axes = figure.subplots()
    norm = log_norm(np.array([one.budget for one in profiles]))
    rows = zip(values(analysis, "N"), values(analysis, "D"), said(analysis), strict=True)
    known = {(n, d): text for n, d, text in rows}
    for one in profiles:
        colour = viridis(norm)(one.budget)
        grid = np.geomspace(one.n.min(), one.n.max(), 100)
        dots: Any = {"color": colour, "markersize": size_of(analysis.fit)}
        (drawn,) = axes.plot(one.n, one.loss, "o", label=f"{number(one.budget)} FLOPs", **dots)
        HOVER[drawn] = [known.get(place, "") for place in zip(one.n, one.d, strict=True)]
        axes.plot(grid, one.curve(grid), color=colour)
        if one.best:
            axes.plot(one.best[1], one.best[3], "*", color=RED, markersize=8, zorder=4)
    _floors(analysis, axes)
    log_axes(axes, label(analysis, "N"), analysis.columns.loss_label)
    colour_bar(figure, axes, norm, LABELS["C"])
    return figure


# --- training curves


def curves(analysis: Analysis) -> Figure | None:
    """Draw the losses of the runs as they train, and the least that any has by some compute."""
    known = analysis.curves
    if known is None or known.empty or "folder" not in analysis.runs:
        return None
    known = known[known["folder"].isin(analysis.runs["folder"]) & (known["tokens"] > 0)]
    name = analysis.fit.loss.removeprefix("final_")
    if name == "val_loss" and known.groupby("folder")[name].count().min() < FEW_LOSSES:
        name = "train_loss"
    if name not in known:
        return None
    known = known[np.isfinite(known[name]) & (known[name] > 0)]
    if known.empty:
        return None
    figure, (left, right) = side_by_side(2)
    each = [one for _, one in known.groupby("folder")]
    sizes, norm = analysis.columns.n, None
    style: Any = {"colors": BLUE}
    if sizes in known and known[sizes].nunique() > 1:
        norm = log_norm(known[sizes])
        size = np.array([float(one[sizes].iloc[0]) for one in each])
        style = {"array": size, "norm": norm, "cmap": "viridis"}
    word = f"{'training ' if name == 'train_loss' else ''}{analysis.columns.loss_label}"
    for axes, spent, letter in ((left, "tokens", "D"), (right, "flops_exact", "C")):
        lines = [one[[spent, name]].to_numpy() for one in each]
        many = LineCollection(lines, linewidths=0.8, alpha=0.8, **style)
        many.set_rasterized(len(lines) > MANY_CURVES)  # else the SVG takes megabytes
        HOVER[many] = [str(name) for name in known.groupby("folder")["run_name"].first()]
        axes.add_collection(many)
        axes.autoscale()
        if axes is right:
            ordered = known.sort_values([spent, name])
            least = ordered[ordered[name] <= ordered[name].cummin()]
            look: Any = {"color": BLACK, "linestyle": DASHED, "label": "lowest of all"}
            axes.plot(least[spent], least[name], **look)
        _floors(analysis, axes, constant=False)
        log_axes(axes, LABELS[letter], word)
        if axes.get_legend_handles_labels()[0]:
            legend(axes)
    if norm is not None:
        colour_bar(figure, right, norm, "parameters N")
    return figure
