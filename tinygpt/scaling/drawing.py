"""Style, lay out and save figures: categories in Okabe and Ito's palette, values in viridis."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.contour import ContourSet
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from tinygpt import fileio
from tinygpt.scaling.wording import letter

BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, RED, PURPLE, GREY = "#0072B2", "#D55E00", "#CC79A7", "#777777"
COLUMN, PAGE = 3.4, 7.0  # inches
STYLE: Any = {
    "font.size": 8,
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
    "figure.dpi": 200,
    "svg.hashsalt": "tinygpt",  # else the ids in the file are random
}
# The hover text of each point of an artist, for the page.
HOVER: WeakKeyDictionary[Artist, Sequence[str]] = WeakKeyDictionary()
RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
LABELS = {
    "N": "parameters N",
    "D": "training tokens D",
    "U": "unique tokens",
    "T": "context length (tokens)",
    "C": "training compute (FLOPs)",
}


def save(figures: Mapping[str, Figure | None], folder: Path) -> list[str]:
    """Write each figure as PNG and SVG, and all for TensorBoard; return their names.

    Call this within ``STYLE``.  For a figure that is None, the files of an earlier one are removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        png, svg = folder / f"{name}.png", folder / f"{name}.svg"
        if figure is None:
            png.unlink(missing_ok=True)
            svg.unlink(missing_ok=True)
            continue
        agg: Any = FigureCanvasAgg(figure)
        _lay_out(figure)
        # savefig would draw a figure that has a layout twice
        with fileio.replacing(png) as temporary:
            agg.print_png(temporary, metadata={"Software": None})
        vector: Any = FigureCanvasSVG(figure)
        with fileio.replacing(svg) as temporary:
            vector.print_svg(temporary, metadata={"Date": None, "Creator": None})
    names = [name for name, figure in figures.items() if figure is not None]
    write_events(folder, names)
    return names


def _lay_out(figure: Figure) -> None:
    """Lay the figure out once, since each format would do it again."""
    engine = figure.get_layout_engine()
    assert engine is not None
    axes = [axis for one in figure.axes for axis in (one.xaxis, one.yaxis)]
    minor = {axis: axis.get_minor_locator() for axis in axes}
    for axis in minor:
        axis.set_minor_locator(NullLocator())  # minor ticks have no labels: they only cost time
    engine.execute(figure)
    for axis, locator in minor.items():
        axis.set_minor_locator(locator)
    figure.set_layout_engine("none")


def write_events(folder: Path, figures: Sequence[str]) -> None:
    """Write each ``<figure>.png`` of ``folder`` to its ``tensorboard/``, replacing earlier ones.

    A running TensorBoard follows: the new file has a later name and starts a session, which makes
    it forget the earlier images.  The old file is emptied now and removed the next time.
    """
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.record_writer import RecordWriter

    place, now = folder / "tensorboard", time.time_ns()
    place.mkdir(parents=True, exist_ok=True)
    earlier = list(place.glob("*"))
    start = SessionLog(status=SessionLog.START)
    events = [Event(file_version="brain.Event:2"), Event(session_log=start)]
    for name in figures:
        png = (folder / f"{name}.png").read_bytes()
        width, height = (int.from_bytes(png[at : at + 4], "big") for at in (16, 20))
        image = Summary.Image(width=width, height=height, encoded_image_string=png)
        value = Summary.Value(tag=f"fit/{name}", image=image)
        events.append(Event(summary=Summary(value=[value])))
    with fileio.replacing(place / f"events.out.tfevents.{now}") as path, path.open("wb") as file:
        records = RecordWriter(file)
        for event in events:
            event.wall_time = now / 1e9
            records.write(event.SerializeToString())
    for path in earlier:
        if path.stat().st_size:
            path.write_bytes(b"")  # a reader that has it open would fail if it were gone
        else:
            path.unlink()


def log_norm(values: Any) -> Normalize:
    """Return the logarithmic colour scale of an array."""
    low, high = values.min(), values.max()
    return LogNorm(low, high if high > low else low * 2)


def viridis(norm: Normalize) -> Any:
    """Return the function from values to colours."""
    return ScalarMappable(norm, "viridis").to_rgba


def colour_bar(figure: Figure, axes: Axes, norm: Normalize, word: str) -> None:
    bar = figure.colorbar(ScalarMappable(norm, "viridis"), ax=axes, pad=0.02, aspect=30)
    bar.set_label(word)
    bar.outline.set_linewidth(0.4)
    log_ticks(bar.ax.yaxis)


def side_by_side(count: int) -> tuple[Figure, list[Axes]]:
    """Return a figure and its panels, at most three to a row; a single one is a column wide."""
    across = min(count, 3)
    height = {1: COLUMN * 0.9, 2: 2.7, 3: 2.2}[across] * math.ceil(count / across)
    figure = Figure(figsize=(COLUMN * 1.2 if count == 1 else PAGE, height))
    return figure, panels(figure, count, across)


def panels(figure: Figure, count: int, across: int) -> list[Axes]:
    """Return ``count`` panels of a figure, ``across`` to a row."""
    grid = figure.subplots(-(-count // across), across, squeeze=False).ravel()
    for axes in grid[count:]:
        axes.remove()
    return list(grid[:count])


def label_contours(axes: Axes, lines: ContourSet, taken: Any) -> None:
    """Label each contour where it is furthest from the points ``taken``, (n, 2), and the edges."""
    scaled = axes.transScale.transform
    corners = scaled(np.column_stack([axes.get_xlim(), axes.get_ylim()]))
    taken = (scaled(taken) - corners[0]) / (corners[1] - corners[0])
    places = []
    for path in lines.get_paths():
        vertices = np.asarray(path.vertices, dtype=float)
        if not len(vertices):
            continue
        points = (scaled(vertices) - corners[0]) / (corners[1] - corners[0])
        nearest = np.linalg.norm(points[:, None] - taken[None], axis=-1).min(axis=1)
        room = np.minimum(nearest, 1.5 * np.minimum(points, 1 - points).min(axis=1))
        best = int(np.argmax(room))
        if room[best] > 0.04:
            places.append(tuple(vertices[best]))
            taken = np.concatenate([taken, points[best : best + 1]])
    axes.clabel(lines, fmt="%.3g", fontsize=6, inline_spacing=2, manual=places)


def limit(axes: Axes, values: Any) -> None:
    """Clip wide bands: let the axis span at most three times the range of these values."""
    low, high = float(values.min()), float(values.max())
    room = max(high / low, 1.02)
    bottom, top = axes.get_ylim()
    axes.set_ylim(max(bottom, low / room), min(top, high * room))


def log_axes(axes: Axes, x: str, y: str) -> None:
    axes.set(xscale="log", yscale="log", xlabel=x, ylabel=y)
    log_ticks(axes.xaxis)
    log_ticks(axes.yaxis)


def log_ticks(axis: Any) -> None:
    """Set ticks at powers of ten or, on a short axis, at plain numbers."""
    low, high = sorted(axis.get_view_interval())
    axis.set_minor_formatter(NullFormatter())
    if high / low >= 30:
        axis.set_major_locator(LogLocator(numticks=7))
        axis.set_major_formatter(FuncFormatter(_power_of_ten))
        return
    narrow = high / low < 5
    axis.set_major_locator(MaxNLocator(5) if narrow else LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: letter(value)))
    if narrow:
        axis.set_minor_locator(NullLocator())


def _power_of_ten(value: float, _: Any) -> str:
    """Return 10⁶ in plain characters, since mathtext takes far longer to draw."""
    return "10" + f"{math.log10(value):.0f}".translate(RAISED)


def legend(axes: Axes, above: bool = False, columns: int = 1) -> None:
    """Put the legend into the emptiest corner, or above the axes."""
    if above:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, borderaxespad=0.2)
    else:
        axes.legend(loc="best")
