"""The figures of a study of adaptation: reward by steps and tokens, by forgetting, by iteration."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from tinygpt.adaptation.analysis import BASE, RAW, REFERENCES, Adaptation, by_order, pareto_front
from tinygpt.scaling.drawing import (
    BLACK,
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
    panels,
    save,
)

REWARD = "reward (nats per token)"
FORGETTING = "forgetting (nats per token)"
ACROSS = 5  # panels of methods
COLOURS = {
    "none": BLACK,
    RAW: BLUE,
    "lora_edit": SKY,
    "lora_doc+edit": GREEN,
    "oracle": PURPLE,
    "full_ft_doc": GREY,
}
MARKERS = "o^sDvP*X"  # of the k, from the least
TRAIN, TEST = ORANGE, BLUE
DOTTED: Any = {"linewidth": 0.8, "linestyle": (0, (1, 1))}
DASHES = (0, (4, 2))


def draw(adaptation: Adaptation, folder: Path) -> list[str]:
    """Write every figure that applies as PNG and SVG; return their names, without ending."""
    with mpl.rc_context(STYLE):
        figures = {
            "adaptation_laws": steps(adaptation),
            "pareto_forgetting": pareto(adaptation),
            "restem": iterations(adaptation),
        }
        return save(figures, folder)


def title(task: Any, parameters: Any) -> str:
    return f"{str(task).replace('_', ' ')}, {int(parameters):,} parameters"


def bases(table: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield the part of each task and size of the base, with its title."""
    for (task, parameters), part in table.groupby(BASE):
        yield title(task, parameters), part


def colours(methods: list[str]) -> dict[str, Any]:
    """Return one for each method; iterations from light to dark."""
    rounds = [name for name in methods if name not in COLOURS]
    depths = dict(zip(rounds, np.linspace(1.0, 0.4, len(rounds))[::-1], strict=True))
    return {
        name: tuple(1 - depths[name] * (1 - part) for part in to_rgb(RED))
        if name in depths
        else COLOURS[name]
        for name in methods
    }


def _tested(adaptation: Adaptation) -> pd.DataFrame:
    table = adaptation.summary
    return table[(table["split"] == "test") & (table["documents"] > 0)]


# --- against steps and tokens


def steps(adaptation: Adaptation) -> Figure | None:
    """Draw a panel a method, a line a rank, with the law if there is one; then against tokens."""
    table = _tested(adaptation)
    table = table[(table["method"] != "none") & (table["inner_steps"] > 0)]
    if table.empty:
        return None
    parts = list(bases(table))
    rows = [-(-part["method"].nunique() // ACROSS) for _, part in parts]
    heights = [1.45 * n + 2.5 for n in rows]
    figure = Figure(figsize=(PAGE, sum(heights)))
    blocks = figure.subfigures(len(parts), 1, squeeze=False, height_ratios=heights)
    for block, (name, part), down in zip(blocks.ravel(), parts, rows, strict=True):
        _block(adaptation, block, name, part, down)
    return figure


def _block(
    adaptation: Adaptation, block: SubFigure, name: str, part: pd.DataFrame, down: int
) -> None:
    block.suptitle(name, fontsize=8, fontweight="bold")
    top, bottom = block.subfigures(2, 1, squeeze=False, height_ratios=[1.45 * down, 2.3]).ravel()
    methods = by_order(part["method"])
    grid = top.subplots(down, ACROSS, sharex=True, sharey=True, squeeze=False)
    ranks = sorted(part["lora_rank"].dropna().unique())
    shades = dict(zip(ranks, (SKY, RED, GREEN, PURPLE, ORANGE) * len(ranks), strict=False))
    for axes in grid.ravel()[len(methods) :]:
        axes.remove()
    raw = part[part["method"] == RAW]
    for axes, method in zip(grid.ravel(), methods, strict=False):
        axes.set_title(method, fontsize=7, pad=3)
        axes.axhline(0, color=GREY, linewidth=0.5)
        for rank, lines in raw.groupby("lora_rank") if method != RAW else ():
            x = lines["inner_steps"].astype(float)
            axes.plot(x, lines["reward"], color=shades[rank], **DOTTED)
        for rank, line in part[part["method"] == method].groupby("lora_rank", dropna=False):
            _line(adaptation, axes, line, GREY if pd.isna(rank) else shades[rank])
    grid[0, 0].set_ylim(_shown(part))
    grid[0, 0].set_xscale("log")
    found = sorted(part["inner_steps"].unique())
    grid[0, 0].set_xticks([float(k) for k in found], [str(k) for k in found])
    grid[0, 0].xaxis.minorticks_off()
    for axes in grid[:, 0]:
        axes.set_ylabel("reward (nats)")
    for column in range(min(ACROSS, len(methods))):
        grid[(len(methods) - 1 - column) // ACROSS, column].tick_params(labelbottom=True)
    top.supxlabel("inner steps k", fontsize=8)
    marks = [Line2D([], [], color=shades[rank], label=f"rank {rank}") for rank in ranks]
    marks.append(Line2D([], [], color=GREY, label=f"{RAW} there", **DOTTED))
    marks.append(Line2D([], [], color=BLACK, linestyle=DASHES, linewidth=0.8, label="c·k^a"))
    top.legend(handles=marks, loc="outside upper center", ncols=len(marks))
    _against_tokens(bottom, part, methods)


def _shown(part: pd.DataFrame) -> tuple[float, float]:
    """Return limits that hold the means, below zero no more than there is above."""
    low, high = float(part["reward"].min()), max(float(part["reward"].max()), 0.0)
    low = max(min(low, 0.0), -high) if high else low
    room = 0.12 * (high - low or 1.0)
    return low - room, high + room


def _line(adaptation: Adaptation, axes: Axes, line: pd.DataFrame, colour: Any) -> None:
    k = line["inner_steps"].to_numpy(dtype=float)
    low, high = (line[f"reward_{end}"].to_numpy() for end in ("low", "high"))
    axes.fill_between(k, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.plot(k, line["reward"], "o-", color=colour, markersize=2.5)
    mine = adaptation.laws.merge(line[[*BASE, "method", "lora_rank"]].head(1))
    for c, a in mine[["c", "a"]].dropna().to_numpy(dtype=float):
        grid = np.geomspace(k.min(), k.max(), 50)
        axes.plot(grid, c * grid**a, color=BLACK, linewidth=0.6, linestyle=DASHES)


def _against_tokens(block: SubFigure, part: pd.DataFrame, methods: list[str]) -> None:
    axes = block.subplots()
    shades = colours(methods)
    ranked = part["lora_rank"].isna() | (part["lora_rank"] == part["lora_rank"].max())
    for method in methods:
        line = part[ranked & (part["method"] == method)]
        style = "s-" if method in REFERENCES else "o-"
        x, y, colour = line["tokens_total"], line["reward"], shades[method]
        axes.plot(x, y, style, color=colour, markersize=3, label=method)
    axes.axhline(0, color=GREY, linewidth=0.5)
    rank = part["lora_rank"].max()
    axes.set(xscale="log", ylabel="reward (nats)", ylim=_shown(part))
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_minor_formatter(NullFormatter())
    of_rank = "" if pd.isna(rank) else f", rank {rank}"
    axes.set_xlabel(f"tokens a document: trained on, and read and written by the policy{of_rank}")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))


# --- against forgetting


def pareto(adaptation: Adaptation) -> Figure | None:
    """Draw reward against forgetting on test documents, with the front of each base."""
    table = _tested(adaptation)
    if table.empty:
        return None
    parts = list(bases(table))
    across = min(2, len(parts))
    down = -(-len(parts) // across)
    figure = Figure(figsize=(PAGE if across > 1 else PAGE * 0.75, 2.7 * down + 0.2))
    grid = panels(figure, len(parts), across)
    shades = colours(by_order(table["method"]))
    markers = dict(zip(sorted(table["inner_steps"].unique()), MARKERS * 9, strict=False))
    ranks = sorted(table["lora_rank"].dropna().unique())
    for axes, (name, part) in zip(grid, parts, strict=False):
        axes.set_title(name, fontsize=8)
        _front(axes, part)
        for row in part.to_dict("records"):
            hollow = len(ranks) > 1 and row["lora_rank"] == ranks[0]
            face = "white" if hollow else shades[row["method"]]
            shown: dict[str, Any] = {"color": shades[row["method"]], "markerfacecolor": face}
            shown |= {"marker": markers[row["inner_steps"]], "markersize": 4, "linestyle": ""}
            axes.plot(row["forgetting"], row["reward"], **shown)
        axes.set(xlabel=FORGETTING, ylabel=REWARD)
    marks = [Line2D([], [], color=c, marker="o", ls="", label=name) for name, c in shades.items()]
    marks += [
        Line2D([], [], color=BLACK, marker=mark, ls="", label=f"k = {k}")
        for k, mark in markers.items()
        if k > 0
    ]
    if len(ranks) > 1:
        shown = {"color": BLACK, "marker": "o", "ls": "", "markerfacecolor": "white"}
        marks.append(Line2D([], [], **shown, label=f"hollow: rank {ranks[0]}"))
    marks.append(Line2D([], [], color=BLACK, linewidth=0.8, label="front"))
    for mark in marks:
        mark.set_markersize(4)
    figure.legend(handles=marks, loc="outside right center")
    return figure


def _front(axes: Axes, part: pd.DataFrame) -> None:
    """Draw as steps what is reached at no more than so much forgetting, without ``oracle``."""
    part = part[part["method"] != "oracle"]
    x, y = part["forgetting"].to_numpy(), part["reward"].to_numpy()
    front = part[pareto_front(x, y)].sort_values("forgetting")
    axes.step(
        front["forgetting"], front["reward"], where="post", color=BLACK, linewidth=0.8, zorder=1
    )


# --- by iteration


def iterations(adaptation: Adaptation) -> Figure | None:
    """Draw mean and best reward of the edits of a document, by iteration."""
    table = adaptation.restem
    if table.empty:
        return None
    parts = list(table.groupby([*BASE, "lora_rank"], dropna=False))
    across = min(3, len(parts))
    down = -(-len(parts) // across)
    width = {1: COLUMN * 1.35, 2: PAGE * 0.85, 3: PAGE}[across]
    figure = Figure(figsize=(width, 2.4 * down + 0.3))
    grid = panels(figure, len(parts), across)
    for axes, ((task, parameters, rank), part) in zip(grid, parts, strict=False):
        k = part["inner_steps"].iloc[0]
        axes.set_title(f"{title(task, parameters)}\nrank {rank}, k = {k}", fontsize=7)
        _rounds(axes, part)
        _level(adaptation, axes, (task, parameters, rank, k))
        axes.set(xlabel="ReST-EM iteration", ylabel=REWARD)
        rounds = sorted(part["iteration"].unique())
        axes.set(xticks=rounds, xlim=(rounds[0] - 0.3, rounds[-1] + 0.3))
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(handles)))
    return figure


def _rounds(axes: Axes, part: pd.DataFrame) -> None:
    for split, colour, aside in (("train", TRAIN, -0.04), ("test", TEST, 0.04)):
        line = part[part["split"] == split]
        if line.empty:
            continue
        x = line["iteration"].to_numpy(dtype=float) + aside
        edits = line["edits"].max()
        for name, style in (("mean", "o-"), ("best", "^--")):
            if edits <= 1 and name == "best":
                continue
            label = f"{split}: {name} of {edits:.2g} edits" if edits > 1 else f"{split}: mean"
            reach = np.stack([line[name] - line[f"{name}_low"], line[f"{name}_high"] - line[name]])
            bars: dict[str, Any] = {"color": colour, "markersize": 3.5, "elinewidth": 0.8}
            axes.errorbar(x, line[name], yerr=reach, fmt=style, **bars, label=label)


def _level(adaptation: Adaptation, axes: Axes, place: tuple[Any, ...]) -> None:
    """Draw what the raw document gives, on test documents."""
    table = _tested(adaptation)
    table = table[table["method"] == RAW]
    for name, value in zip([*BASE, "lora_rank", "inner_steps"], place, strict=True):
        table = table[table[name] == value]
    for level in table["reward"]:
        axes.axhline(level, color=GREY, label=f"test: {RAW}", **DOTTED)
