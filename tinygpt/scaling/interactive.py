"""Turn a matplotlib figure into plotly traces, so that readers can hover, zoom and filter."""

from __future__ import annotations

import base64
import functools
import gzip
import html
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.colors import to_hex
from matplotlib.container import ErrorbarContainer
from matplotlib.contour import ContourSet
from matplotlib.figure import Figure

from tinygpt.scaling.drawing import HOVER
from tinygpt.scaling.wording import letter

DASHES = {"-": "solid", "--": "dash", "-.": "dashdot", ":": "dot"}
MARKERS = {"o": "circle", "s": "square", "D": "diamond", "*": "star", "x": "x-thin-open"}
MOST_GROUPS = 12  # values with a legend entry each; if there are more, a colour bar
MOST_LINES = 100  # lines of a collection that has hover texts, at most
PIXELS = 1.5  # of the page, per point of a figure
Trace = dict[str, Any]


def traces(figure: Figure) -> dict[str, Any]:
    """Return the panels of a figure, each with its axes and traces, ready for JSON."""
    bars = [axes for axes in figure.axes if axes.get_label() == "<colorbar>"]
    words = [axes.get_ylabel() for axes in bars]
    panels: list[dict[str, Any]] = []
    for axes in (axes for axes in figure.axes if axes not in bars):
        coloured = any(c.get_array() is not None for c in axes.collections)
        word = words[min(len(panels), len(words) - 1)] if words and coloured else ""
        notes = [
            {"text": one.get_text(), "color": to_hex(one.get_color())}
            for one in axes.texts
            if one.get_transform() == axes.transAxes
        ]
        both = {
            name: {
                "title": getattr(axes, f"get_{name}label")(),
                "type": getattr(axes, f"get_{name}scale")(),
                "range": _numbers(sorted(getattr(axes, f"get_{name}lim")())),
            }
            for name in "xy"
        }
        panels.append({**both, "traces": list(_traces(axes, word)), "notes": notes})
    return {"panels": panels}


def _traces(axes: Axes, word: str) -> Iterator[Trace]:
    """Yield the traces of a panel from back to front; ``word`` names its colour bar."""
    parts: list[tuple[float, Trace]] = []
    groups: dict[str, str] = {}  # colour -> the value it stands for
    bars = [bar for bar in axes.containers if isinstance(bar, ErrorbarContainer)]
    alone = {part: str(bar.get_label()) for bar in bars if not bar[0] for part in bar[2]}
    for one in axes.collections:
        if isinstance(one, PathCollection):
            made = _points(one, word, groups)
        else:
            made = _area(one, alone.get(one, str(one.get_label())), word)
        parts += [(one.get_zorder(), trace) for trace in made]
    for patch in axes.patches:
        corners = patch.get_patch_transform().transform(patch.get_path().vertices)
        if patch.get_data_transform() != axes.transData:
            corners = _across(axes, corners)
        style = {"fillcolor": _rgba(patch.get_facecolor()), **_named(str(patch.get_label()))}
        parts.append((0.0, _filled(corners, style)))
    names: dict[Any, str] = {}  # of the lines of error bars; their caps have none
    for bar in bars:
        data, caps, _ = bar.lines
        names |= dict.fromkeys(caps, "") | ({data: str(bar.get_label())} if data else {})
    for line in axes.lines:
        if name := names.get(line, str(line.get_label())):
            parts.append((line.get_zorder(), trace := _line(axes, line, name)))
            if "name" in trace and "line" in trace:
                groups.setdefault(trace["line"]["color"], name)
    for text in axes.texts:
        if text.get_transform() != axes.transAxes:
            font = {"size": 10, "color": to_hex(text.get_color())}
            trace = {"mode": "text", "text": [text.get_text()], "textfont": font}
            parts.append((9.0, _at([text.get_position()]) | trace))
    for _, trace in sorted(parts, key=lambda part: part[0]):
        colour = trace.get("line", {}).get("color") or trace.get("tint", "")
        if "name" not in trace and colour in groups:
            trace["legendgroup"] = groups[colour]
        yield trace


def _line(axes: Axes, line: Any, name: str) -> Trace:
    points = np.column_stack([line.get_xdata(), line.get_ydata()]).astype(float)
    if line.get_transform() == axes.get_yaxis_transform(which="grid"):
        points = _across(axes, points)
    colour, marker, modes = to_hex(line.get_color()), line.get_marker(), []
    trace = _at(points) | _named(name)
    if line.get_linestyle() != "None":
        modes.append("lines")
        dash = DASHES.get(line.get_linestyle(), "dash")
        trace["line"] = {"color": colour, "dash": dash, "width": PIXELS * line.get_linewidth()}
    if marker not in ("None", None):
        modes.append("markers")
        symbol = MARKERS.get(str(marker), "circle")
        if to_hex(line.get_markerfacecolor()) != colour and not symbol.endswith("open"):
            symbol += "-open"
        look = {"symbol": symbol, "size": 2 * line.get_markersize(), "color": colour}
        trace["marker"] = look | {"line": {"width": 2 if symbol.endswith("open") else 0}}
    return trace | {"mode": "+".join(modes) or "lines"} | _hover(line, np.arange(len(points)))


def _points(artist: Any, word: str, groups: dict[str, str]) -> Iterator[Trace]:
    """Yield the points of a scatter plot, a trace for each value of the colour if these are few."""
    points, values = np.asarray(artist.get_offsets(), dtype=float), artist.get_array()
    everything = np.arange(len(points))
    parts: list[tuple[Any, str, dict[str, Any]]] = []
    if values is None:
        parts.append((everything, "runs", {"color": to_hex(artist.get_facecolor()[0])}))
    elif len(levels := np.unique(values)) > MOST_GROUPS:
        parts.append((everything, "runs", _scale(artist, word)))
    else:
        for level in levels:
            colour = to_hex(artist.to_rgba(level))
            name = groups[colour] = _level(word, level)
            parts.append((everything[values == level], name, {"color": colour}))
    size = 1.7 * float(np.sqrt(artist.get_sizes()[0]))
    look: Trace = {"size": size, "line": {"width": 0.5, "color": "paper"}}
    for rows, name, colours in parts:
        trace = _at(points[rows]) | {"mode": "markers", "marker": look | colours} | _named(name)
        yield trace | _hover(artist, rows)


def _level(word: str, value: float) -> str:
    """Return ``N = 6.59k`` for a value of ``parameters N``."""
    last = word.split(" (")[0].split()[-1:]
    symbol = f"{last[0]} = " if last and len(last[0]) == 1 else ""
    return symbol + letter(float(f"{value:.3g}"))


def _scale(artist: Any, word: str) -> dict[str, Any]:
    """Return the marker colours of points by their values, on the figure's logarithmic scale."""
    low, high = np.log10([artist.norm.vmin, artist.norm.vmax])
    ticks = np.linspace(low, high, 5)
    return {
        "color": _numbers(np.log10(np.asarray(artist.get_array(), dtype=float))),
        "colorscale": [[at, to_hex(artist.cmap(at))] for at in (0.0, 0.25, 0.5, 0.75, 1.0)],
        "cmin": float(low),
        "cmax": float(high),
        "colorbar": {
            "title": {"text": word, "side": "right"},
            "tickvals": _numbers(ticks),
            "ticktext": [letter(float(f"{value:.2g}")) for value in 10.0**ticks],
        },
    }


def _area(artist: Any, label: str, word: str) -> Iterator[Trace]:
    """Yield the lines, the contours or the areas of a collection."""
    paths, name, is_contour = artist.get_paths(), _named(label), isinstance(artist, ContourSet)
    if not is_contour and not isinstance(artist, LineCollection):
        colour = artist.get_facecolor()[0]
        style = {"fillcolor": _rgba(colour), "tint": to_hex(colour[:3]), **name}
        yield from (_filled(path.vertices, style) for path in paths)
        return
    colours = artist.get_edgecolors()
    levels = np.array([] if is_contour or artist.get_array() is None else artist.get_array())
    are_named = 0 < len(np.unique(levels)) <= MOST_GROUPS
    for at, path in enumerate(paths):
        pieces = path.to_polygons(closed_only=False)
        if not pieces:
            continue
        broken = np.concatenate([part for p in pieces for part in (p, [[np.nan, np.nan]])])
        colour = to_hex(colours[at % len(colours)])
        line = {"color": colour, "width": PIXELS * float(artist.get_linewidths()[0])}
        trace = _at(broken[:-1]) | {"mode": "lines", "line": line}
        if is_contour:
            trace |= {"text": f"{artist.levels[at]:.4g}", "hoverinfo": "text"}
        elif len(paths) <= MOST_LINES:
            text = HOVER.get(artist, [""] * len(paths))[at]
            trace |= {"text": html.escape(text, quote=False), "hoverinfo": "text+x+y"}
        else:
            trace["hoverinfo"] = "skip"
        yield trace | (_named(_level(word, levels[at])) if are_named else name)
        name = {}


def _filled(points: Any, style: Trace) -> Trace:
    look: Trace = {"mode": "lines", "line": {"width": 0}, "fill": "toself", "hoverinfo": "skip"}
    return _at(points) | look | style


def _across(axes: Axes, points: Any) -> Any:
    """Return points whose x is a share of the panel's width, 0 or 1, in units of its axis."""
    low, high = axes.get_xlim()
    points = np.array(points, dtype=float)
    points[:, 0] = np.where(points[:, 0] > 0.5, high, low)
    return points


def _named(label: str) -> dict[str, str]:
    return {} if label.startswith("_") or not label else {"name": label, "legendgroup": label}


def _hover(artist: Any, rows: Any) -> dict[str, Any]:
    """Return the hover texts of some points of an artist, if it has any."""
    if (texts := HOVER.get(artist)) is None:
        return {}
    lines = [html.escape(texts[row], quote=False).replace("\n", "<br>") for row in rows]
    return {"text": lines, "hoverinfo": "text"}


def _at(points: Any) -> Trace:
    x, y = np.asarray(points, dtype=float).T
    return {"x": _numbers(x), "y": _numbers(y)}


def _numbers(values: Any) -> list[float | None]:
    """Return each value to six significant digits, more than a screen shows, or None."""
    return [float(f"{value:.6g}") if np.isfinite(value) else None for value in values]


def _rgba(colour: Any) -> str:
    red, green, blue, alpha = (float(part) for part in colour)
    return f"rgba({255 * red:.0f},{255 * green:.0f},{255 * blue:.0f},{alpha:.2g})"


def script(figures: Mapping[str, Any]) -> str:
    """Return the script elements of the page: the traces of its figures, plotly.js and our code."""
    if not figures:
        return ""
    data = json.dumps(figures, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    code = Path(__file__).with_name("report.js").read_text(encoding="utf-8")
    return (
        f'<script type="application/json" id="figures">{data}</script>\n'
        f'<script type="text/plain" id="plotly">{_plotly()}</script>\n<script>\n{code}</script>\n'
    )


@functools.cache
def _plotly() -> str:
    """Return plotly.js in gzip and base64, a third of its size."""
    from plotly.offline import get_plotlyjs

    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), 6, mtime=0)).decode()
