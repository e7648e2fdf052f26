"""What the figures share: style, colours, axes, the band about a law.

Colours tell categories by Okabe and Ito's palette, ordered values by viridis.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator
from scipy import special

from tinygpt import fileio
from tinygpt.scaling.analysis import Analysis
from tinygpt.scaling.fitting import Fit
from tinygpt.scaling.intervals import LEVEL, covariance
from tinygpt.scaling.laws import Array

BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, RED, PURPLE = (
    *("#000000", "#E69F00", "#56B4E9", "#009E73"),
    *("#F0E442", "#0072B2", "#D55E00", "#CC79A7"),
)
GREY = "#777777"
COLUMN, PAGE = 3.4, 7.0  # inches
STYLE: Any = {
    "font.size": 8,
    "axes.labelsize": 8,
    "legend.fontsize": 7,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "axes.linewidth": 0.6,
    "lines.linewidth": 1.2,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.handlelength": 1.6,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 200,
    "svg.hashsalt": "tinygpt",  # else the ids in the file are random
}
LABELS = {
    "N": "parameters N",
    "D": "training tokens D",
    "U": "unique tokens",
    "T": "context length (tokens)",
    "C": "training compute (FLOPs)",
}
MANY = 60  # more points than this are drawn smaller


def save(figures: Mapping[str, Figure | None], folder: Path) -> list[str]:
    """As PNG and SVG, within ``STYLE``; the names of those there are.  Earlier others go."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        if figure is not None:
            _save(figure, folder / name)
            continue
        for ending in (".png", ".svg"):
            (folder / name).with_suffix(ending).unlink(missing_ok=True)
    return [name for name, figure in figures.items() if figure is not None]


def _save(figure: Figure, stem: Path) -> None:
    nothing: Mapping[str, Any] = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}
    engine = figure.get_layout_engine()
    assert engine is not None
    engine.execute(figure)
    figure.set_layout_engine("none")  # laid out once; each format would do it again
    for kind, metadata in nothing.items():
        with fileio.replacing(stem.with_suffix(f".{kind}")) as path:
            figure.savefig(path, format=kind, metadata=metadata)


def write_png(figure: Figure, path: Path) -> None:
    """Into a folder that is made where it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with fileio.replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def label(analysis: Analysis, name: str) -> str:
    """What an axis of this variable says."""
    if name in LABELS:
        word = LABELS[name]
        without = name == "N" and analysis.words[name] == "parameters without embeddings"
        return "parameters N (without embeddings)" if without else word
    return analysis.words[name]


def loss_label(analysis: Analysis) -> str:
    return analysis.columns.loss_label


def values(analysis: Analysis, name: str) -> Array:
    found: Array = analysis.fit.table[analysis.variables[name]].to_numpy(dtype=float)
    return found


def losses(analysis: Analysis) -> Array:
    found: Array = analysis.fit.table[analysis.fit.loss].to_numpy(dtype=float)
    return found


def is_joint(analysis: Analysis) -> bool:
    return {"N", "D"} <= set(analysis.variables)


def reach(fit: Fit, places: Mapping[str, Array], new_run: bool = False) -> Array:
    """Half the 95 % interval of the log loss by the delta method, (n,); zeros without one."""
    law, x = fit.optimum.law, fit.points.at(places)
    theta = fit.optimum.theta[None]
    if fit.degrees < 1:
        return np.zeros_like(law.log_loss(theta, x)[0])
    gradient = law.derivatives(theta, x).gradient[0]
    variance = np.einsum("np,pq,nq->n", gradient, covariance(fit), gradient)
    scatter = fit.relative(fit.scale, fit.predict(**places)) if new_run else 0.0
    variance = np.maximum(variance, 0.0) + scatter**2
    found: Array = special.stdtrit(fit.degrees, 0.5 + LEVEL / 2) * np.sqrt(variance)
    return found


def band(
    fit: Fit,
    axes: Axes,
    places: dict[str, Array],
    colour: Any,
    new_run: bool = False,
    label: str | None = None,
) -> None:
    half, middle = reach(fit, places, new_run), fit.predict(**places)
    low, high = middle * np.exp(-half), middle * np.exp(half)
    x = next(iter(places.values()))
    axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0, label=label, zorder=1)


def size_of(fit: Fit) -> float:
    return 2.5 if len(fit.points) > MANY else 4.0


def log_norm(found: Array) -> Normalize:
    return LogNorm(found.min(), found.max() if found.max() > found.min() else found.min() * 2)


def viridis(norm: Normalize) -> Any:
    return ScalarMappable(norm, "viridis").to_rgba


def colour_bar(figure: Figure, axes: Axes, norm: Normalize, word: str) -> None:
    bar = figure.colorbar(ScalarMappable(norm, "viridis"), ax=axes, pad=0.02, aspect=30)
    bar.set_label(word)
    bar.outline.set_linewidth(0.4)
    log_ticks(bar.ax.yaxis)


def side_by_side(count: int) -> tuple[Figure, list[Axes]]:
    """Side by side, three to a row; one alone is a column wide."""
    across = min(count, 3)
    width = COLUMN * 1.2 if count == 1 else PAGE
    height = {1: COLUMN * 0.9, 2: 2.7, 3: 2.2}[across]
    figure = Figure(figsize=(width, height * -(-count // across)))
    return figure, panels(figure, count, across)


def panels(figure: Figure, count: int, across: int) -> list[Axes]:
    """So many, ``across`` to a row."""
    grid = figure.subplots(-(-count // across), across, squeeze=False).ravel()
    for axes in grid[count:]:
        axes.remove()
    return list(grid[:count])


def limit(axes: Axes, shown: Array) -> None:
    """Lets a wide band run off: the axis is at most three times as long as these values."""
    low, high = float(shown.min()), float(shown.max())
    room = max(high / low, 1.02)
    bottom, top = axes.get_ylim()
    axes.set_ylim(max(bottom, low / room), min(top, high * room))


def log_axes(axes: Axes, x: str, y: str) -> None:
    axes.set(xscale="log", yscale="log", xlabel=x, ylabel=y)
    for axis in (axes.xaxis, axes.yaxis):
        log_ticks(axis)


def log_ticks(axis: Any) -> None:
    """Powers of ten, or where there are too few of them plain numbers in between."""
    low, high = sorted(axis.get_view_interval())
    if high / low >= 30:
        axis.set_major_locator(LogLocator(numticks=7))
        axis.set_minor_formatter(NullFormatter())
        return
    narrow = high / low < 5
    axis.set_major_locator(MaxNLocator(5) if narrow else LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(_short))
    axis.set_minor_formatter(NullFormatter())
    if narrow:
        axis.set_minor_locator(NullLocator())


def _short(value: float, _: int) -> str:
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if 1e15 > value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def legend(axes: Axes, above: bool = False, columns: int = 1) -> None:
    """Where it covers no points: in the emptiest corner, or above the axes."""
    if above:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, borderaxespad=0.2)
    else:
        axes.legend(loc="best")
