"""Draw the figures of a report; the same analysis gives the same files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from tinygpt.scaling import drawing
from tinygpt.scaling.analysis import Analysis
from tinygpt.scaling.fitting import Fit
from tinygpt.scaling.interactive import traces
from tinygpt.scaling.intervals import covariance, quantile_of
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
SHADE: Any = {"color": drawing.SKY, "alpha": 0.4, "linewidth": 0}
MANY_RUNS = 60  # points are smaller if there are more of them
FAMILY = 5  # curves of a panel at most, one for each value of the other variable
FEW_LOSSES = 5  # losses that a training curve needs at least
MANY_CURVES = 200  # if there are more, they are drawn as one image: the SVG would take megabytes


def draw(analysis: Analysis, folder: Path, story: Story | None = None) -> dict[str, Any]:
    """Write every figure that applies as PNG and SVG, and return the interactive traces of each."""
    with mpl.rc_context(drawing.STYLE):
        every = (scaling, residuals, contours, extrapolation, isoflop, frontier, curves)
        figures = {one.__name__: one(analysis) for one in every}
        figures["budget"] = story.figure() if story else None
        drawing.save(figures, folder)
    return {name: traces(figure) for name, figure in figures.items() if figure is not None}


def values(analysis: Analysis, name: str) -> Array:
    """Return a variable of the law at every run, (n,)."""
    return np.asarray(analysis.fit.table[analysis.variables[name]], dtype=float)


def losses(analysis: Analysis) -> Array:
    """Return the loss of every run, (n,)."""
    return np.asarray(analysis.fit.table[analysis.fit.loss], dtype=float)


def label(analysis: Analysis, name: str) -> str:
    """Return the axis label of a variable."""
    if name == "N" and analysis.words[name] == "parameters without embeddings":
        return "parameters N (without embeddings)"
    return drawing.LABELS.get(name, analysis.words[name])


def hover_texts(analysis: Analysis) -> list[str]:
    """Return the hover text of each run."""
    known = {name: values(analysis, name) for name in analysis.variables}
    fitted, lines = analysis.fit.predict(**known), []
    for row, loss in enumerate(losses(analysis)):
        places = [f"{analysis.words[name]} {whole(x[row])}" for name, x in known.items()]
        left = f"loss {loss:.4f}, law {fitted[row]:.4f} ({100 * (loss / fitted[row] - 1):+.2f} %)"
        lines.append("\n".join([analysis.columns.name_of(analysis.runs, row), *places, left]))
    return lines


def marker_size(analysis: Analysis) -> float:
    return 2.5 if len(analysis.fit.points) > MANY_RUNS else 4.0


def dots(
    analysis: Analysis, axes: Axes, x: Any, y: Any, texts: Sequence[str] = (), **style: Any
) -> None:
    """Draw runs with their hover texts, by default those of all runs."""
    usual: Any = {"marker": "o", "markersize": marker_size(analysis), "linestyle": "None"}
    (drawn,) = axes.plot(x, y, **(usual | style))
    drawing.HOVER[drawn] = texts or hover_texts(analysis)


def scatter(
    analysis: Analysis, axes: Axes, x: Array, y: Array, scale: float = 1.0, **style: Any
) -> None:
    """Draw all runs, each in its own colour."""
    size = scale * marker_size(analysis) ** 2
    drawing.HOVER[axes.scatter(x, y, s=size, zorder=3, **style)] = hover_texts(analysis)


def band(fit: Fit, axes: Axes, places: dict[str, Array], colour: Any) -> None:
    """Fill the 95 % interval of the law by the delta method, where there is one."""
    if fit.degrees < 1:
        return
    log_loss, slopes = fit.optimum.law.derivatives(fit.optimum.theta[None], fit.points.at(places))
    variance = np.einsum("np,pq,nq->n", slopes[0], covariance(fit), slopes[0])
    half = quantile_of(fit) * np.sqrt(np.maximum(variance, 0.0))
    low, high = np.exp(log_loss[0] - half), np.exp(log_loss[0] + half)
    x = next(iter(places.values()))
    axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0, zorder=1)


def _floors(analysis: Analysis, axes: Axes, constant: bool = True) -> None:
    """Draw the entropy of the corpus, if it is known, and the law's constant if it is in sight.

    Call this once the axes have their limits: an entropy below them is named at the edge.
    """
    style: Any = {"linewidth": 1, "zorder": 1}
    if axes.get_yscale() != "log":  # setting it again would lose the ticks
        axes.set_yscale("log")
    bottom, top = axes.get_ylim()
    if (floor := analysis.floor) is not None and floor > bottom / (top / bottom) ** 0.3:
        axes.axhline(floor, color=drawing.GREEN, linestyle="-.", label="exact floor", **style)
        axes.set_ylim(min(bottom, floor / (top / bottom) ** 0.05), top)
    elif floor is not None:
        edge: Any = {"transform": axes.transAxes, "ha": "left", "va": "bottom", "fontsize": 7}
        axes.text(0.01, 0.01, f"exact floor {number(floor)} ↓", color=drawing.GREEN, **edge)
    level = analysis.fit.parameters.get("E", 0.0) if constant else 0.0
    if len(analysis.variables) == 1 and level > 0.8 * losses(analysis).min():
        axes.axhline(level, color=drawing.GREY, linestyle=":", label="E", **style)


def scaling(analysis: Analysis) -> Figure:
    """Draw the loss against each variable, with the law."""
    names = list(analysis.variables)
    figure, panels = drawing.side_by_side(len(names))
    in_sight = [*losses(analysis), *(one.loss.estimate for one in analysis.predictions)]
    for name, axes in zip(names, panels, strict=True):
        other = next((one for one in names if one != name), None)  # gives the colours
        if other is None:
            _one_curve(analysis, axes, name)
        else:
            _family(analysis, figure, axes, name, other)
        drawing.limit(axes, np.array(in_sight))
        _floors(analysis, axes)
        drawing.log_axes(axes, label(analysis, name), analysis.columns.loss_label)
        if axes.get_legend_handles_labels()[0]:
            drawing.legend(axes, above=other is not None)
    ends = [axes.get_ylim() for axes in panels]
    for axes in panels:
        axes.set_ylim(min(low for low, _ in ends), max(high for _, high in ends))
    return figure


def _one_curve(analysis: Analysis, axes: Axes, name: str) -> None:
    """Draw the law and the runs in one variable, and the losses predicted beyond them."""
    fit, x = analysis.fit, values(analysis, name)
    ahead = max([x.max() * 1.3, *(one.place[name] for one in analysis.predictions)])
    grid = np.geomspace(x.min() / 1.3, ahead * 1.1, 200)
    band(fit, axes, {name: grid}, drawing.BLUE)
    inside, loss = grid <= x.max(), fit.predict(**{name: grid})
    axes.plot(grid[inside], loss[inside], color=drawing.BLUE, label="law")
    axes.plot(grid[~inside], loss[~inside], color=drawing.BLUE, linestyle=DASHED)
    dots(analysis, axes, x, losses(analysis), color=drawing.BLACK, zorder=3, label="runs")
    style: Any = {"fmt": "D", "color": drawing.RED, "markersize": 3.5, "capsize": 2, "zorder": 4}
    for at, one in enumerate(analysis.predictions):
        ends = [[one.run.estimate - one.run.low], [one.run.high - one.run.estimate]]
        word = "prediction of a run" if at == 0 else None
        axes.errorbar([one.place[name]], [one.loss.estimate], ends, label=word, **style)


def _family(analysis: Analysis, figure: Figure, axes: Axes, name: str, other: str) -> None:
    """Draw curves of the law at a few values of the other variable, coloured by it."""
    fit, x, by = analysis.fit, values(analysis, name), values(analysis, other)
    norm = drawing.log_norm(by)
    grid = np.geomspace(x.min() / 1.3, x.max() * 1.3, 100)
    levels = np.unique(by)
    if len(levels) > FAMILY:
        wanted = np.quantile(np.log(levels), np.linspace(0.05, 0.95, FAMILY))
        levels = np.unique([levels[np.argmin(np.abs(np.log(levels) - one))] for one in wanted])
    for value in levels:
        place = {name: grid, other: np.full_like(grid, value)}
        for third in analysis.variables.keys() - place.keys():  # at its geometric mean
            place[third] = np.full_like(grid, np.exp(np.mean(np.log(values(analysis, third)))))
        if "U" in place:  # unique tokens cannot exceed tokens
            place["U"] = np.minimum(place["U"], place["D"])
        colour = drawing.viridis(norm)(value)
        band(fit, axes, place, colour)
        axes.plot(grid, fit.predict(**place), color=colour, zorder=2)
    edge: Any = {"edgecolors": "white", "linewidths": 0.3}
    scatter(analysis, axes, x, losses(analysis), c=by, norm=norm, **edge)
    drawing.colour_bar(figure, axes, norm, drawing.LABELS.get(other, other))


def residuals(analysis: Analysis) -> Figure:
    """Draw the residuals against each variable, in units of the scatter of seeds or in %."""
    fit, names, noise = analysis.fit, list(analysis.variables), analysis.noise
    if noise:
        left, one = fit.residuals / noise.each, 1.0
        word, unit = "± 1 sd between seeds", "measured − law (sd between seeds)"
    else:
        fitted = fit.predict(**{name: values(analysis, name) for name in names})
        left = 100 * (losses(analysis) / fitted - 1)
        spread = float(np.sqrt(np.sum(fit.residuals**2) / max(1, fit.degrees)))
        one = 100 * fit.relative(spread)
        word, unit = "± 1 sd of the residuals", "measured / law − 1 (%)"
    figure, panels = drawing.side_by_side(len(names))
    for name, axes in zip(names, panels, strict=True):
        axes.axhspan(-one, one, color=drawing.GREY, alpha=0.2, linewidth=0, label=word)
        axes.axhline(0, color=drawing.GREY, linewidth=0.6)
        style: Any = {"color": drawing.BLACK}
        if other := next((one for one in names if one != name), None):
            by = values(analysis, other)
            style = {"c": by, "norm": drawing.log_norm(by)}
            drawing.colour_bar(figure, axes, style["norm"], drawing.LABELS.get(other, other))
        scatter(analysis, axes, values(analysis, name), left, **style)
        axes.set_xscale("log")
        axes.set(xlabel=label(analysis, name), ylabel=unit)
        drawing.log_ticks(axes.xaxis)
        drawing.legend(axes, above=True)
    return figure


def contours(analysis: Analysis) -> Figure | None:
    """Draw the loss over parameters and tokens, the runs, and the best split of each budget."""
    if not {"N", "D"} <= set(analysis.variables):
        return None
    fit, n, d = analysis.fit, values(analysis, "N"), values(analysis, "D")
    sizes, tokens = (np.geomspace(v.min() / 2, v.max() * 2, 80) for v in (n, d))
    mesh_n, mesh_d = np.meshgrid(sizes, tokens)
    flat = {"N": mesh_n.ravel(), "D": mesh_d.ravel()}
    flat |= {"U": flat["D"]} if "U" in analysis.variables else {}  # as for the best split
    predicted = fit.predict(**flat).reshape(mesh_n.shape)
    measured = losses(analysis)
    norm = LogNorm(min(predicted.min(), measured.min()), max(predicted.max(), measured.max()))
    figure = Figure(figsize=(drawing.COLUMN * 1.35, drawing.COLUMN * 1.1))
    axes = figure.subplots()
    levels = np.geomspace(predicted.min(), predicted.max(), 13)[1:-1]
    lines = axes.contour(mesh_n, mesh_d, predicted, levels=levels, linewidths=0.8, norm=norm)
    edge: Any = {"edgecolors": "black", "linewidths": 0.3}
    scatter(analysis, axes, n, d, 1.3, c=measured, norm=norm, **edge)
    taken = np.column_stack([n, d])
    if analysis.frontier and (path := analysis.frontier.law):
        split = np.column_stack([path.n.estimate, path.d.estimate])
        axes.plot(*split.T, color=drawing.RED, linewidth=1.4, label="least loss for its compute")
        taken = np.concatenate([taken, split])
        drawing.legend(axes, above=True)
    drawing.log_axes(axes, label(analysis, "N"), label(analysis, "D"))
    axes.set(xlim=(sizes[0], sizes[-1]), ylim=(tokens[0], tokens[-1]))
    drawing.colour_bar(figure, axes, norm, analysis.columns.loss_label)
    drawing.label_contours(axes, lines, taken)
    return figure


def extrapolation(analysis: Analysis) -> Figure | None:
    """Draw the forecast from the smaller runs, and the larger runs that were held out."""
    held = analysis.held_out
    if held is None:
        return None
    figure = Figure(figsize=(drawing.COLUMN * 1.2, drawing.COLUMN * 0.95))
    axes = figure.subplots()
    places = {name: values(analysis, name) for name in analysis.variables}
    above, measured = held.above.astype(bool), losses(analysis)
    alone = len(places) == 1
    if alone:
        ((name, x),) = places.items()
        y = measured
        grid = np.geomspace(x.min() / 1.2, x.max() * 1.2, 200)
        log_loss, half = held.below.at({name: grid}, grid)
        ends = np.exp(log_loss - half), np.exp(log_loss + half)
        axes.fill_between(grid, *ends, label=OF_A_RUN, **SHADE)
        axes.plot(grid, np.exp(log_loss), color=drawing.BLUE, label=OF_THE_FITTED)
        drawing.limit(axes, y)
    else:  # the error of each run in %, with the intervals of those held out
        log_loss, half = held.below.at(places, analysis.compute)
        x, y = analysis.compute, 100 * (measured / np.exp(log_loss) - 1)
        spread = 100 * np.sinh(half[above])
        axes.axhline(0, color=drawing.BLUE, label=OF_THE_FITTED)
        bars: Any = {"fmt": "none", "ecolor": drawing.SKY, "elinewidth": 1.2, "zorder": 1}
        axes.errorbar(x[above], 0 * spread, yerr=spread, label=OF_A_RUN, **bars)
    texts = np.array(hover_texts(analysis))
    style: Any = {"color": drawing.BLACK, "label": "runs fitted"}
    dots(analysis, axes, x[~above], y[~above], texts[~above].tolist(), **style)
    style = {"color": drawing.RED, "markerfacecolor": "white", "marker": "s", "zorder": 4}
    style |= {"markersize": marker_size(analysis) + 0.7, "label": "runs held out"}
    dots(analysis, axes, x[above], y[above], texts[above].tolist(), **style)
    if alone:
        drawing.log_axes(axes, label(analysis, name), analysis.columns.loss_label)
    else:
        axes.set(xscale="log", xlabel=drawing.LABELS["C"], ylabel="measured / predicted − 1 (%)")
        drawing.log_ticks(axes.xaxis)
    drawing.legend(axes, above=True, columns=2)
    return figure


def frontier(analysis: Analysis) -> Figure | None:
    """Draw the best parameters, tokens and loss of each budget."""
    if analysis.frontier is None or analysis.frontier.law is None:
        return None
    path, compute = analysis.frontier.law, analysis.compute
    figure, panels = drawing.side_by_side(3)
    rows = (
        (drawing.LABELS["N"], values(analysis, "N"), path.n),
        (drawing.LABELS["D"], values(analysis, "D"), path.d),
        (analysis.columns.loss_label, losses(analysis), path.loss),
    )
    style: Any = {"color": drawing.GREY, "alpha": 0.6, "label": "runs"}
    style |= {"markersize": marker_size(analysis) - 0.5}
    inside = path.flops <= compute.max()
    for axes, (word, measured, best) in zip(panels, rows, strict=True):
        dots(analysis, axes, compute, measured, **style)
        axes.fill_between(path.flops, best.low, best.high, **SHADE)
        axes.plot(path.flops[inside], best.estimate[inside], color=drawing.RED, label="best split")
        axes.plot(path.flops[~inside], best.estimate[~inside], color=drawing.RED, linestyle=DASHED)
        drawing.log_axes(axes, drawing.LABELS["C"], word)
    drawing.legend(panels[0], above=True, columns=2)
    _floors(analysis, panels[2])
    if floors := [line for line in panels[2].lines if line.get_label() == "exact floor"]:
        panels[2].legend(handles=floors, loc="lower left", bbox_to_anchor=(0, 1))
    return figure


def isoflop(analysis: Analysis) -> Figure | None:
    """Draw the loss against parameters at each budget, with its minimum."""
    every = analysis.frontier.isoflop.profiles if analysis.frontier else ()
    profiles = [one for one in every if len(np.unique(one.n)) >= 3]
    if sum(one.best is not None for one in profiles) < 2:
        return None
    figure = Figure(figsize=(drawing.COLUMN * 1.35, drawing.COLUMN * 1.05))
    axes = figure.subplots()
    norm = drawing.log_norm(np.array([one.budget for one in profiles]))
    rows = zip(values(analysis, "N"), values(analysis, "D"), hover_texts(analysis), strict=True)
    known = {(n, d): text for n, d, text in rows}
    for one in profiles:
        colour = drawing.viridis(norm)(one.budget)
        texts = [known.get(place, "") for place in zip(one.n, one.d, strict=True)]
        budget = f"{number(one.budget)} FLOPs"
        dots(analysis, axes, one.n, one.loss, texts, color=colour, label=budget)
        grid = np.geomspace(one.n.min(), one.n.max(), 100)
        axes.plot(grid, one.curve(grid), color=colour)
        if one.best:
            axes.plot(one.best[1], one.best[3], "*", color=drawing.RED, markersize=8, zorder=4)
    _floors(analysis, axes)
    drawing.log_axes(axes, label(analysis, "N"), analysis.columns.loss_label)
    drawing.colour_bar(figure, axes, norm, drawing.LABELS["C"])
    return figure


def curves(analysis: Analysis) -> Figure | None:
    """Draw the loss of each run as it trains, and the lowest of all runs at each compute."""
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
    figure, (left, right) = drawing.side_by_side(2)
    groups, sizes = known.groupby("folder"), analysis.columns.n
    style: Any = {"colors": drawing.BLUE}
    if sizes in known and known[sizes].nunique() > 1:
        size = groups[sizes].first().to_numpy(float)
        style = {"array": size, "norm": drawing.log_norm(known[sizes])}
        drawing.colour_bar(figure, right, style["norm"], "parameters N")
    word = f"{'training ' if name == 'train_loss' else ''}{analysis.columns.loss_label}"
    for axes, spent, letter in ((left, "tokens", "D"), (right, "flops_exact", "C")):
        lines = [one[[spent, name]].to_numpy() for _, one in groups]
        collection = LineCollection(lines, linewidths=0.8, alpha=0.8, **style)
        collection.set_rasterized(len(lines) > MANY_CURVES)
        drawing.HOVER[collection] = [str(name) for name in groups["run_name"].first()]
        axes.add_collection(collection)
        axes.autoscale()
        if axes is right:
            ordered = known.sort_values([spent, name])
            least = ordered[ordered[name] <= ordered[name].cummin()]
            look: Any = {"color": drawing.BLACK, "linestyle": DASHED, "label": "lowest of all"}
            axes.plot(least[spent], least[name], **look)
        _floors(analysis, axes, constant=False)
        drawing.log_axes(axes, drawing.LABELS[letter], word)
        if axes.get_legend_handles_labels()[0]:
            drawing.legend(axes)
    return figure
