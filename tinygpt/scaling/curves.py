"""The learning curves of all runs, and the least loss that any of them reaches by some compute."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from tinygpt import rundir
from tinygpt.config import ConfigError
from tinygpt.scaling import drawing
from tinygpt.scaling.analysis import Analysis
from tinygpt.scaling.laws import Array

Log = dict[str, Array]  # the columns of metrics.csv
FEW = 5  # fewer measured losses than this make no curve
MANY = 200  # more curves than this are one image


@dataclass(frozen=True)
class Curve:
    """The loss of one run as it trains."""

    row: int  # of the table
    tokens: Array  # (n,)
    flops: Array  # (n,)
    loss: Array  # (n,)


def read(analysis: Analysis) -> tuple[list[Curve], str]:
    """The curves of the runs whose folder is there, and what loss they show."""
    column = analysis.columns.run
    if not column or column not in analysis.runs or analysis.columns.d not in analysis.runs:
        return [], ""
    logs = _logs([str(one) for one in analysis.runs[column]], analysis.curves)
    measured = analysis.fit.loss.removeprefix("final_")
    few = any(len(_column(log, measured)[1]) < FEW for log in logs.values())
    name = "train_loss" if few and measured == "val_loss" else measured
    total = analysis.runs[analysis.columns.d].to_numpy(dtype=float)
    found = []
    for row, log in logs.items():
        tokens, loss = _column(log, name)
        if len(loss):
            found.append(Curve(row, tokens, analysis.compute[row] * tokens / total[row], loss))
    return found, name


def _logs(folders: list[str], curves: pd.DataFrame | None) -> dict[int, Log]:
    """The metrics of the runs, by row; those of a table are looked for in their folders."""
    if curves is not None and len(curves):
        columns = {name: curves[name].to_numpy(dtype=float) for name in rundir.METRICS}
        lines = curves.groupby("folder").indices
        return {
            row: {name: column[lines[folder]] for name, column in columns.items()}
            for row, folder in enumerate(folders)
            if folder in lines
        }
    found = {row: _read(rundir.RunDir(Path(name)).metrics) for row, name in enumerate(folders)}
    return {row: log for row, log in found.items() if log}


def _read(path: Path) -> Log:
    try:
        log = rundir.MetricsFile(path).columns() if path.is_file() else {}
    except (OSError, ConfigError):  # a curve less
        return {}
    return {name: np.array([float(v or "nan") for v in values]) for name, values in log.items()}


def _column(log: Log, name: str) -> tuple[Array, Array]:
    """Tokens and values where it was measured, but not before the first step."""
    if name not in log:
        return np.array([]), np.array([])
    tokens, values = log["tokens"], log[name]
    there = (tokens > 0) & np.isfinite(values) & (values > 0)
    return tokens[there], values[there]


def envelope(curves: list[Curve]) -> tuple[Array, Array]:
    """The least loss that any run has by so many FLOPs, interpolated in the logarithms."""
    low = min(curve.flops.min() for curve in curves)
    high = max(curve.flops.max() for curve in curves)
    grid = np.geomspace(low, high, 200)
    found = np.full((len(curves), len(grid)), np.inf)
    for line, curve in zip(found, curves, strict=True):
        inside = (grid >= curve.flops.min()) & (grid <= curve.flops.max())
        logs = np.interp(np.log(grid[inside]), np.log(curve.flops), np.log(curve.loss))
        line[inside] = np.exp(logs)
    least = np.minimum.accumulate(found.min(axis=0))
    return grid[np.isfinite(least)], least[np.isfinite(least)]


def draw(analysis: Analysis) -> Figure | None:
    """Loss against tokens and against FLOPs; None where there are no run folders."""
    curves, name = read(analysis)
    if not curves:
        return None
    figure, (left, right) = drawing.side_by_side(2)
    column = analysis.columns.n
    known = column in analysis.runs and analysis.runs[column].nunique() > 1
    sizes = analysis.runs[column].to_numpy(dtype=float) if known else None
    norm = drawing.log_norm(sizes) if sizes is not None else None
    colours: Any = drawing.BLUE
    if norm is not None and sizes is not None:
        colours = drawing.viridis(norm)(sizes[[curve.row for curve in curves]])
    for axes, of in ((left, "tokens"), (right, "flops")):
        lines = [np.column_stack([getattr(curve, of), curve.loss]) for curve in curves]
        many = LineCollection(lines, colors=colours, linewidths=0.8, alpha=0.8)
        many.set_rasterized(len(lines) > MANY)  # else the SVG takes megabytes
        axes.add_collection(many)
        axes.autoscale()
    right.plot(*envelope(curves), color=drawing.BLACK, linestyle=(0, (4, 2)), label="least of all")
    word = drawing.loss_label(analysis)
    word = f"training {word}" if name == "train_loss" else word
    for axes, x_word in ((left, drawing.LABELS["D"]), (right, drawing.LABELS["C"])):
        if analysis.floor is not None:
            axes.axhline(analysis.floor, color=drawing.GREEN, linestyle="-.", label="exact floor")
        drawing.log_axes(axes, x_word, word)
        if axes.get_legend_handles_labels()[0]:
            drawing.legend(axes)
    if norm is not None:
        drawing.colour_bar(figure, right, norm, "parameters N")
    return figure
