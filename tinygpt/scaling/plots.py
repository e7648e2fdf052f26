"""The figures of a report, from an analysis; the same input gives the same files.

Colours tell categories by Okabe and Ito's palette, ordered values by viridis.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from tinygpt.scaling import curves
from tinygpt.scaling.analysis import Analysis
from tinygpt.scaling.drawing import (
    BLACK,
    BLUE,
    COLUMN,
    GREEN,
    GREY,
    LABELS,
    RED,
    SKY,
    STYLE,
    band,
    colour_bar,
    is_joint,
    label,
    legend,
    limit,
    log_axes,
    log_norm,
    log_ticks,
    loss_label,
    losses,
    reach,
    save,
    side_by_side,
    size_of,
    values,
    viridis,
)
from tinygpt.scaling.laws import Array
from tinygpt.scaling.selection import HeldOut

OF_A_RUN, OF_THE_FITTED = "95 % of single runs", "law of the runs fitted"
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
CURVES = 5  # at most so many, one for each value of the other variable


def draw(analysis: Analysis, folder: Path) -> list[str]:
    """Writes every figure that applies as PNG and SVG; the names of those, without ending."""
    with mpl.rc_context(STYLE):
        figures = {
            "scaling": scaling(analysis),
            "residuals": residuals(analysis),
            "contours": contours(analysis),
            "extrapolation": extrapolation(analysis),
            "isoflop": isoflop(analysis),
            "frontier": frontier(analysis),
            "curves": curves.draw(analysis),
        }
        return save(figures, folder)


# --- the law and the runs


def scaling(analysis: Analysis) -> Figure:
    """Loss against each variable, with the law."""
    names = list(analysis.variables)
    figure, panels = side_by_side(len(names))
    for name, axes in zip(names, panels, strict=True):
        other = _other(name, names)
        if other is None:
            _one_curve(analysis, axes, name)
        else:
            _family(analysis, figure, axes, name, other)
        _floors(analysis, axes)
        limit(axes, _levels_of_loss(analysis))
        log_axes(axes, label(analysis, name), loss_label(analysis))
        if axes.get_legend_handles_labels()[0]:
            legend(axes, above=other is not None)
    _share_loss(panels)
    return figure


def _one_curve(analysis: Analysis, axes: Axes, name: str) -> None:
    fit, x = analysis.fit, values(analysis, name)
    ahead = max([x.max() * 1.3, *(one.place[name] for one in analysis.predictions)])
    grid = np.geomspace(x.min() / 1.3, ahead * 1.1, 200)
    band(fit, axes, {name: grid}, BLUE)
    inside = grid <= x.max()
    loss = fit.predict(**{name: grid})
    axes.plot(grid[inside], loss[inside], color=BLUE, label="law")
    axes.plot(grid[~inside], loss[~inside], color=BLUE, linestyle=(0, (4, 2)))
    axes.plot(
        x, losses(analysis), "o", color=BLACK, markersize=size_of(fit), label="runs", zorder=3
    )
    for number, one in enumerate(analysis.predictions):
        wide = [[one.run.estimate - one.run.low], [one.run.high - one.run.estimate]]
        axes.errorbar(
            *([one.place[name]], [one.loss.estimate], wide),
            fmt="D",
            color=RED,
            markersize=3.5,
            capsize=2,
            zorder=4,
            label="prediction of a run" if number == 0 else None,
        )


def _family(analysis: Analysis, figure: Figure, axes: Axes, name: str, other: str) -> None:
    """One curve for each of some values of the other variable, coloured by it."""
    fit, x, colours = analysis.fit, values(analysis, name), values(analysis, other)
    norm = log_norm(colours)
    grid = np.geomspace(x.min() / 1.3, x.max() * 1.3, 100)
    for value in _levels(colours):
        place = _place(analysis, {name: grid, other: np.full_like(grid, value)})
        colour = viridis(norm)(value)
        band(fit, axes, place, colour)
        axes.plot(grid, fit.predict(**place), color=colour, zorder=2)
    axes.scatter(
        *(x, losses(analysis)),
        c=colours,
        cmap="viridis",
        norm=norm,
        s=size_of(fit) ** 2,
        zorder=3,
        edgecolors="white",
        linewidths=0.3,
    )
    colour_bar(figure, axes, norm, LABELS.get(other, other))


def _place(analysis: Analysis, given: dict[str, Array]) -> dict[str, Array]:
    """With the variables that a panel does not show at their middle."""
    size = len(next(iter(given.values())))
    place = dict(given)
    for name in analysis.variables:
        if name not in place:
            middle = float(np.exp(np.mean(np.log(values(analysis, name)))))
            place[name] = np.full(size, middle)
    if "U" in place and "D" in place:  # there are no more unique tokens than tokens
        place["U"] = np.minimum(place["U"], place["D"])
    return place


def _floors(analysis: Analysis, axes: Axes) -> None:
    """The entropy of the corpus, where it is known, and the law's constant if it is in sight."""
    if analysis.floor is not None:
        axes.axhline(
            analysis.floor, color=GREEN, linestyle="-.", linewidth=1, label="exact floor", zorder=1
        )
    constant = analysis.fit.parameters.get("E", 0.0)
    if len(analysis.variables) == 1 and constant > 0.8 * losses(analysis).min():
        axes.axhline(constant, color=GREY, linestyle=":", linewidth=1, label="E", zorder=1)


def _levels_of_loss(analysis: Analysis) -> Array:
    """What has to be in sight: measured and predicted losses, the floor."""
    known = [] if analysis.floor is None else [analysis.floor]
    predicted = [one.loss.estimate for one in analysis.predictions]
    return np.array([*losses(analysis), *known, *predicted])


def residuals(analysis: Analysis) -> Figure:
    """What the law leaves, against each variable."""
    fit, names = analysis.fit, list(analysis.variables)
    fitted = fit.predict(**{name: values(analysis, name) for name in names})
    left = 100 * (losses(analysis) / fitted - 1)
    spread = float(np.sqrt(np.sum(fit.residuals**2) / max(1, fit.degrees)))
    noise = fit.relative(analysis.noise.scale if analysis.noise else spread)
    word = "± 1 sd between seeds" if analysis.noise else "± 1 sd of the residuals"
    figure, panels = side_by_side(len(names))
    for name, axes in zip(names, panels, strict=True):
        other = _other(name, names)
        axes.axhspan(-100 * noise, 100 * noise, color=GREY, alpha=0.2, linewidth=0, label=word)
        axes.axhline(0, color=GREY, linewidth=0.6)
        style: dict[str, Any] = {"color": BLACK}
        if other is not None:
            colours = values(analysis, other)
            style = {"c": colours, "cmap": "viridis", "norm": log_norm(colours)}
            colour_bar(figure, axes, style["norm"], LABELS.get(other, other))
        axes.scatter(values(analysis, name), left, s=size_of(fit) ** 2, zorder=3, **style)
        axes.set_xscale("log")
        axes.set_xlabel(label(analysis, name))
        axes.set_ylabel("measured / law − 1 (%)")
        log_ticks(axes.xaxis)
        legend(axes, above=True)
    return figure


def contours(analysis: Analysis) -> Figure | None:
    """The loss over sizes and data, the runs and the best split of each budget."""
    if not is_joint(analysis):
        return None
    fit, n, d = analysis.fit, values(analysis, "N"), values(analysis, "D")
    sizes = np.geomspace(n.min() / 2, n.max() * 2, 80)
    tokens = np.geomspace(d.min() / 2, d.max() * 2, 80)
    mesh_n, mesh_d = np.meshgrid(sizes, tokens)
    flat = {"N": mesh_n.ravel(), "D": mesh_d.ravel()}
    flat |= {"U": flat["D"]} if "U" in analysis.variables else {}  # as the best split has it
    found = fit.predict(**flat).reshape(mesh_n.shape)
    measured = losses(analysis)
    norm = LogNorm(min(found.min(), measured.min()), max(found.max(), measured.max()))
    figure = Figure(figsize=(COLUMN * 1.35, COLUMN * 1.1))
    axes = figure.subplots()
    levels = np.geomspace(found.min(), found.max(), 13)[1:-1]
    lines = axes.contour(
        mesh_n, mesh_d, found, levels=levels, cmap="viridis", norm=norm, linewidths=0.8
    )
    axes.clabel(lines, fmt="%.3g", fontsize=6, inline_spacing=2)
    shown = {"c": measured, "cmap": "viridis", "norm": norm, "s": size_of(fit) ** 2 * 1.3}
    axes.scatter(n, d, **shown, edgecolors="black", linewidths=0.3, zorder=3)  # type: ignore[arg-type]
    if analysis.frontier is not None:
        path = analysis.frontier
        axes.plot(path.n, path.d, color=RED, linewidth=1.4, label="least loss for its compute")
        legend(axes, above=True)
    log_axes(axes, label(analysis, "N"), label(analysis, "D"))
    axes.set(xlim=(sizes[0], sizes[-1]), ylim=(tokens[0], tokens[-1]))
    colour_bar(figure, axes, norm, loss_label(analysis))
    return figure


def extrapolation(analysis: Analysis) -> Figure | None:
    """The law fitted below a cut in compute, and the runs above it that it had not seen."""
    held = analysis.chosen.held_out
    if held is None:
        return None
    figure = Figure(figsize=(COLUMN * 1.2, COLUMN * 0.95))
    axes = figure.subplots()
    if len(analysis.variables) == 1:
        (name,) = analysis.variables
        x, y = values(analysis, name), losses(analysis)
        grid = np.geomspace(x.min() / 1.2, x.max() * 1.2, 200)
        band(held.below, axes, {name: grid}, SKY, new_run=True, label=OF_A_RUN)
        axes.plot(grid, held.below.predict(**{name: grid}), color=BLUE, label=OF_THE_FITTED)
        limit(axes, y)
    else:
        x, y = analysis.compute, _off(analysis, held, axes)
    above, size = held.above.astype(bool), size_of(analysis.fit)
    axes.plot(x[~above], y[~above], "o", color=BLACK, markersize=size, label="runs fitted")
    hollow: dict[str, Any] = {"color": RED, "markerfacecolor": "white", "markersize": size + 0.7}
    axes.plot(x[above], y[above], "s", **hollow, label="runs held out", zorder=4)
    if len(analysis.variables) == 1:
        log_axes(axes, label(analysis, name), loss_label(analysis))
    else:
        axes.set_xscale("log")
        log_ticks(axes.xaxis)
        axes.set(xlabel=LABELS["C"], ylabel="measured / predicted − 1 (%)")
    legend(axes, above=True, columns=2)
    return figure


def _off(analysis: Analysis, held: HeldOut, axes: Axes) -> Array:
    """By how many per cent each run is off, with the interval of those held out."""
    places = {name: values(analysis, name) for name in analysis.variables}
    above = held.above.astype(bool)
    spread = 100 * reach(held.below, {name: v[above] for name, v in places.items()}, new_run=True)
    axes.axhline(0, color=BLUE, label=OF_THE_FITTED)
    bars: dict[str, Any] = {"fmt": "none", "ecolor": SKY, "elinewidth": 1.2, "zorder": 1}
    axes.errorbar(analysis.compute[above], 0 * spread, yerr=spread, **bars, label=OF_A_RUN)
    off: Array = 100 * (losses(analysis) / held.below.predict(**places) - 1)
    return off


def frontier(analysis: Analysis) -> Figure | None:
    """The best size, data and loss of each budget."""
    if analysis.frontier is None or analysis.frontier.law is None:
        return None
    path = analysis.frontier.law
    figure, panels = side_by_side(3)
    runs = (values(analysis, "N"), values(analysis, "D"), losses(analysis))
    best = (path.n, path.d, path.loss)
    words = (LABELS["N"], LABELS["D"], loss_label(analysis))
    dots: dict[str, Any] = {"color": GREY, "markersize": size_of(analysis.fit) - 0.5, "alpha": 0.6}
    for axes, points, line, word in zip(panels, runs, best, words, strict=True):
        axes.plot(analysis.compute, points, "o", **dots, label="runs")
        inside = path.flops <= analysis.compute.max()
        axes.fill_between(path.flops, line.low, line.high, color=SKY, alpha=0.4, linewidth=0)
        axes.plot(path.flops[inside], line.estimate[inside], color=RED, label="best split")
        axes.plot(path.flops[~inside], line.estimate[~inside], color=RED, linestyle=(0, (4, 2)))
        log_axes(axes, LABELS["C"], word)
    legend(panels[0], above=True, columns=2)
    _floors(analysis, panels[2])
    if analysis.floor is not None:
        panels[2].legend(handles=panels[2].lines[-1:], loc="lower left", bbox_to_anchor=(0, 1))
    return figure


def isoflop(analysis: Analysis) -> Figure | None:
    """Loss against size along each budget, with the minima that stand."""
    found = analysis.frontier.isoflop.profiles if analysis.frontier else ()
    profiles = [one for one in found if len(np.unique(one.n)) >= 3]
    if sum(one.best is not None for one in profiles) < 2:
        return None
    figure = Figure(figsize=(COLUMN * 1.35, COLUMN * 1.05))
    axes = figure.subplots()
    norm = log_norm(np.array([one.budget for one in profiles]))
    for one in profiles:
        colour = viridis(norm)(one.budget)
        grid = np.geomspace(one.n.min(), one.n.max(), 100)
        axes.plot(one.n, one.loss, "o", color=colour, markersize=size_of(analysis.fit))
        axes.plot(grid, one.curve(grid), color=colour)
        if one.best:
            axes.plot(one.best[1], one.best[3], "*", color=RED, markersize=8, zorder=4)
    _floors(analysis, axes)
    log_axes(axes, label(analysis, "N"), loss_label(analysis))
    colour_bar(figure, axes, norm, LABELS["C"])
    return figure


def _other(name: str, names: list[str]) -> str | None:
    """The variable whose values colour the panel of ``name``."""
    rest = [one for one in names if one != name]
    return rest[0] if rest else None


def _levels(found: Array) -> Array:
    """Some of the values, all if they are few."""
    distinct = np.unique(found)
    if len(distinct) <= CURVES:
        return distinct
    wanted = np.quantile(np.log(distinct), np.linspace(0.05, 0.95, CURVES))
    nearest = [distinct[np.argmin(np.abs(np.log(distinct) - one))] for one in wanted]
    return np.unique(nearest)


def _share_loss(panels: list[Axes]) -> None:
    ends = [axes.get_ylim() for axes in panels]
    for axes in panels:
        axes.set_ylim(min(low for low, _ in ends), max(high for _, high in ends))
