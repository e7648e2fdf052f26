"""The figure of a benchmark: a panel a measure, a line a configuration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from tinygpt.measuring.results import Row, labels
from tinygpt.measuring.statistics import quartiles
from tinygpt.scaling.drawing import BLUE, GREEN, GREY, ORANGE, PAGE, PURPLE, SKY, STYLE, write_png

PARTS = dict(
    zip(
        ("data", "forward", "backward", "optimizer", "framework"),
        (GREEN, SKY, BLUE, ORANGE, PURPLE),
        strict=True,
    )
)


def draw(rows: Sequence[Row], path: Path) -> None:
    """Wall time; of training the tokens per CPU second too."""
    panels = [panel for panel in _panels(rows) if panel[1]]
    heights = [1.2 + 0.62 * len({row.place for row in some}) for _, some, _ in panels]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(PAGE, 0.62 * sum(heights)))
        grid = figure.subplots(len(panels), 1, height_ratios=heights, squeeze=False)
        for axes, (title, some, way) in zip(grid[:, 0], panels, strict=True):
            label = labels(some)
            names = list(dict.fromkeys(label(row) for row in some))
            lines = {row: names.index(label(row)) for row in some}
            way(axes, some, lines.__getitem__)
            axes.set_yticks(range(len(names)), names)
            axes.set_ylim(len(names) - 0.4, -0.6)
            axes.tick_params(axis="y", length=0)
            axes.spines["left"].set_visible(False)
            axes.set_title(title, loc="left", fontsize=8, fontweight="bold")
        figure.align_ylabels()
        write_png(figure, path)


Way = Callable[[Axes, Sequence[Row], Callable[[Row], int]], None]


def _panels(rows: Sequence[Row]) -> list[tuple[str, list[Row], Way]]:
    def some(*beginnings: str) -> list[Row]:
        return [row for row in rows if row.what.startswith(beginnings) and row.clock != "cpu"]

    training = [row for row in rows if row.what in ("training", "MFU")]
    return [
        ("Training, tokens per second", training, _training),
        ("Where the time of a step goes", some("step: "), _stacked),
        ("Attention, forward and backward, ms", some("attention: "), _pairs),
        ("Generation, tokens per second", some("generation: "), _pairs),
        ("Tokenizers, MB of text per second", some("tokenizer: "), _pairs),
        ("Peak memory, MB", some("peak memory"), _bars),
        ("From the command to the first step, seconds", some("first step"), _bars),
    ]


def _training(axes: Axes, rows: Sequence[Row], line: Callable[[Row], int]) -> None:
    mfu = {row.place: row.median for row in rows if row.what == "MFU" and row.clock == "wall"}
    rates = [row for row in rows if row.what == "training"]
    _bars(
        axes,
        [row for row in rates if row.clock == "wall"],
        line,
        more=lambda row: f", {mfu[row.place]:.0f} % MFU" if row.place in mfu else "",
    )
    by_cpu = [row for row in rates if row.clock == "cpu"]
    for n, row in enumerate(by_cpu):
        word = "per CPU second" if n == 0 else None
        axes.plot(row.median, line(row), "|", color=ORANGE, markersize=11, mew=1.6, label=word)
    axes.set_xlim(0, max(axes.get_xlim()[1], 1.03 * max(row.median for row in by_cpu)))
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.2)


def _bars(
    axes: Axes,
    rows: Sequence[Row],
    line: Callable[[Row], int],
    more: Callable[[Row], str] = lambda row: "",
) -> None:
    largest = max(row.median for row in rows)
    for row in rows:
        median, low, high = quartiles(row.samples)
        axes.barh(line(row), median, height=0.5, color=SKY)
        axes.plot([low, high], [line(row)] * 2, color=GREY, linewidth=1)
        text = f"{_number(median)}{more(row)}"
        axes.text(max(median, high) + 0.015 * largest, line(row), text, va="center", fontsize=7)
    axes.set_xlim(0, 1.22 * largest)


def _stacked(axes: Axes, rows: Sequence[Row], line: Callable[[Row], int]) -> None:
    """Shares, as steps of small and large models would not fit on one axis."""
    total: dict[int, float] = {}
    for row in rows:
        total[line(row)] = total.get(line(row), 0.0) + row.median
    left = dict.fromkeys(total, 0.0)
    for row in rows:
        y, part = line(row), row.what.removeprefix("step: ")
        share = 100 * row.median / total[y]
        word = part if y == 0 else None
        axes.barh(y, share, left=left[y], height=0.5, color=PARTS[part], label=word)
        if share > 6:
            middle = left[y] + share / 2
            text = f"{row.median:.3g} ms"
            axes.text(middle, y, text, ha="center", va="center", fontsize=6.5, color="white")
        left[y] += share
    for y, sum_ in total.items():
        axes.text(101, y, f"{sum_:.3g} ms", va="center", fontsize=7)
    axes.set_xlim(0, 112)
    axes.set_xticks(range(0, 101, 25), [f"{n} %" for n in range(0, 101, 25)])
    axes.legend(
        loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=5, borderaxespad=0.2, columnspacing=1.0
    )


def _pairs(axes: Axes, rows: Sequence[Row], line: Callable[[Row], int]) -> None:
    """Ways to the same thing on one line, each with its name and number."""
    colours = dict(
        zip(dict.fromkeys(row.what for row in rows), (BLUE, ORANGE, GREEN), strict=False)
    )
    for y in {line(row) for row in rows}:
        found = [row.median for row in rows if line(row) == y]
        axes.plot([min(found), max(found)], [y, y], color=GREY, linewidth=1, zorder=1)
    for row in rows:
        median, low, high = quartiles(row.samples)
        colour, below = colours[row.what], len(colours) > 2 and row.what == list(colours)[1]
        axes.plot([low, high], [line(row)] * 2, color=colour, linewidth=3, alpha=0.4)
        axes.plot(median, line(row), "o", color=colour, markersize=4)
        axes.annotate(
            f"{row.what.partition(': ')[2]} {_number(median)}",
            (median, line(row)),
            xytext=(0, -6 if below else 6),
            textcoords="offset points",
            ha="center",
            va="top" if below else "bottom",
            fontsize=6.5,
            color=colour,
        )
    axes.set_xscale("log")
    axes.margins(x=0.12)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
