"""Figures of an evaluation: loss by position, runs against their cost, training curves."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from tinygpt import rundir
from tinygpt.evaluating.runs import Evaluation, convergence, curve_of
from tinygpt.scaling.drawing import (
    BLUE,
    COLUMN,
    GREEN,
    GREY,
    ORANGE,
    PAGE,
    PURPLE,
    RED,
    SKY,
    STYLE,
    legend,
    log_axes,
    log_ticks,
    write_png,
)

COLOURS = (BLUE, ORANGE, GREEN, PURPLE, SKY, RED)
RING: Any = {"markersize": 8, "fillstyle": "none"}
MANY = 16  # runs: more are not told apart by name
MARKS = 40  # points of a line by position: beyond that neighbours are averaged


def draw(made: Sequence[Evaluation], folder: Path) -> list[Path]:
    """Those there is something to see in."""
    found = []
    with mpl.rc_context(STYLE):
        whole = [one for one in made if one.is_whole]
        if any(one.positions for one in whole):
            found.append(_figure(folder / "loss_by_position.png", whole, _by_position))
        if len({one.scores["run"] for one in made}) > 1:
            found.append(_figure(folder / "comparison.png", whole, *_COSTS))
        if any(sum("val_loss" in row for row in _curve(one)) > 1 for one in whole):
            found.append(_figure(folder / "convergence.png", whole, _convergence))
    return found


Panel = Callable[[Axes, Sequence[Evaluation]], None]


def _figure(path: Path, made: Sequence[Evaluation], *panels: Panel) -> Path:
    width = PAGE if len(panels) > 1 else 1.4 * COLUMN
    figure = Figure(figsize=(width, 0.9 * COLUMN))
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        panel(axes, made)
    write_png(figure, path)
    return path


def _label(one: Evaluation, made: Sequence[Evaluation]) -> str:
    """By what is not the same of all."""
    names = [name for name in ("run", "checkpoint") if len({m.scores[name] for m in made}) > 1]
    return " ".join(str(one.scores[name]) for name in names)


def _colours(count: int) -> list[str]:
    if count <= len(COLOURS):
        return list(COLOURS[:count])
    return [to_hex(colour) for colour in mpl.colormaps["viridis"](np.linspace(0, 1, count))]


def _by_position(axes: Axes, made: Sequence[Evaluation]) -> None:
    if len({one.scores["run"] for one in made}) > 1:  # of each run its last checkpoint
        made = list({one.scores["run"]: one for one in made}.values())
    made = [one for one in made if one.positions]
    for one, colour in zip(made, _colours(len(made)), strict=True):
        assert one.positions is not None
        loss, error = one.positions.loss, one.positions.error
        edges = np.unique(np.geomspace(1, len(loss) + 1, MARKS).round().astype(int)) - 1
        parts = list(itertools.pairwise(edges))
        x = [np.sqrt((a + 1) * b) for a, b in parts]
        y = np.array([loss[a:b].mean() for a, b in parts])
        half = np.array([np.sqrt(np.square(error[a:b]).sum()) / (b - a) for a, b in parts])
        axes.plot(x, y, "-o", color=colour, markersize=2, label=_label(one, made))
        axes.fill_between(x, y - half, y + half, color=colour, alpha=0.25, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set(
        xlabel="position in the context (tokens seen)",
        ylabel="loss (nats per token) ± standard error",
    )
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    if len(made) > 1:
        _legend(axes, len(made))


def _legend(axes: Axes, lines: int) -> None:
    """In the emptiest corner; of many lines beside the axes, of very many none."""
    if lines <= len(COLOURS):
        legend(axes)
    elif lines <= MANY:
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), borderaxespad=0.2)


def _against(column: str, word: str) -> Panel:
    def panel(axes: Axes, made: Sequence[Evaluation]) -> None:
        by_run: dict[str, list[Evaluation]] = {}
        for one in made:
            by_run.setdefault(one.scores["run"], []).append(one)
        for (run, some), colour in zip(by_run.items(), _colours(len(by_run)), strict=True):
            points = sorted((one.scores[column], one.scores["loss"]) for one in some)
            axes.plot(*zip(*points, strict=True), "-o", color=colour, markersize=4, label=run)
        log_axes(axes, word, "loss (nats per token)")
        if column == "flops_exact":
            _legend(axes, len(by_run))

    return panel


_COSTS = (
    _against("model_parameters", "parameters"),
    _against("flops_exact", "training compute (FLOPs)"),
)


def _curve(one: Evaluation) -> list[dict[str, float]]:
    return [row for row in curve_of(rundir.RunDir(Path(one.scores["folder"]))) if "val_loss" in row]


def _convergence(axes: Axes, made: Sequence[Evaluation]) -> None:
    """Validation in training; a ring where it first was within 1 % of its last value."""
    runs = list({one.scores["run"]: one for one in made}.values())
    for one, colour in zip(runs, _colours(len(runs)), strict=True):
        rows = [row for row in _curve(one) if row["tokens"] > 0]
        x, y = [row["tokens"] for row in rows], [row["val_loss"] for row in rows]
        label = one.scores["run"] if len(runs) > 1 else "validation loss"
        axes.plot(x, y, "-o", color=colour, markersize=2, label=label)
        near = convergence(_curve(one))["tokens_to_1_percent"]
        if near:
            axes.plot(near, y[x.index(near)], "o", color=colour, **RING)
    axes.plot([], [], "o", color=GREY, label="within 1 % of its last", **RING)
    floors = {one.scores["irreducible_loss_exact"] for one in runs}
    if len(floors) == 1 and None not in floors and made[0].scores["text"] == "val":
        axes.axhline(floors.pop(), color=GREY, linestyle="--", label="exact floor")
    axes.set(xlabel="training tokens", ylabel="validation loss (nats per token)", yscale="log")
    log_ticks(axes.yaxis)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1e6:g}M")
    _legend(axes, len(runs))
