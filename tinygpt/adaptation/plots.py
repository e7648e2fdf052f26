"""Draw reward by steps and tokens, against forgetting, and by iteration of ReST-EM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from tinygpt.adaptation.analysis import (
    BASE,
    RAW,
    REFERENCES,
    Adaptation,
    bases,
    by_order,
    pareto_front,
)
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
    log_ticks,
    panels,
    save,
)

REWARD = "reward (nats per token)"
FORGETTING = "forgetting (nats per token)"
ACROSS = 3  # panels of methods
COLOURS = {
    "none": BLACK,
    RAW: BLUE,
    "lora_edit": SKY,
    "lora_doc+edit": GREEN,
    "oracle": PURPLE,
    "full_ft_doc": GREY,
}
MARKERS = "o^sDvP*X"  # for increasing k
DOTTED: Any = {"linewidth": 0.8, "linestyle": (0, (1, 1))}
DASHED: Any = {"linewidth": 0.6, "linestyle": (0, (4, 2)), "color": BLACK}


def draw(adaptation: Adaptation, folder: Path) -> list[str]:
    """Write every figure that applies as PNG and SVG; return their names, without extension."""
    with mpl.rc_context(STYLE):
        figures = {
            "adaptation_laws": steps(adaptation),
            "pareto_forgetting": pareto(adaptation),
            "restem": iterations(adaptation),
        }
        return save(figures, folder)


def colours(methods: list[str]) -> dict[str, Any]:
    """Return the colour of each method, from light to dark for iterations."""
    rounds = [name for name in methods if name not in COLOURS]
    shades: dict[str, Any] = {name: COLOURS.get(name) for name in methods}
    for name, depth in zip(rounds, np.linspace(1.0, 0.4, len(rounds))[::-1], strict=True):
        shades[name] = tuple(1 - depth * (1 - part) for part in to_rgb(RED))
    return shades


def steps(adaptation: Adaptation) -> Figure | None:
    """Draw reward by steps for each base, with a panel per method and a line per rank.

    The last panel of a base has all methods of the largest rank against tokens.
    """
    table = adaptation.tested
    table = table[(table["method"] != "none") & (table["inner_steps"] > 0)]
    if table.empty:
        return None
    ranks = sorted(table["lora_rank"].dropna().unique())
    shades = dict(zip(ranks, (SKY, RED, GREEN, PURPLE, ORANGE) * len(ranks), strict=False))
    methods = colours(by_order(table["method"]))
    parts = list(bases(table))
    count = sum(part["method"].nunique() + 1 for _, part in parts)
    figure = Figure(figsize=(PAGE, 1.7 * -(-count // ACROSS) + 0.8))
    every = iter(panels(figure, count, ACROSS))
    for name, part in parts:
        raw = part[part["method"] == RAW]
        for method in by_order(part["method"]):
            axes = next(every)
            axes.axhline(0, color=GREY, linewidth=0.5)
            for rank, line in raw.groupby("lora_rank") if method != RAW else ():
                axes.plot(line["inner_steps"], line["reward"], color=shades[rank], **DOTTED)
            for rank, line in part[part["method"] == method].groupby("lora_rank", dropna=False):
                _line(adaptation, axes, line, shades.get(rank, GREY))
            axes.set(xscale="log", xlabel="inner steps k", ylabel="reward (nats)")
            axes.set(ylim=_limits(part), title=f"{name}\n{method}")
            taken = [float(k) for k in sorted(part["inner_steps"].unique())]
            axes.set_xticks(taken, [f"{k:g}" for k in taken])
            axes.minorticks_off()
        axes = next(every)
        largest = part["lora_rank"].isna() | (part["lora_rank"] == part["lora_rank"].max())
        for method, line in part[largest].groupby("method"):
            style: Any = {"color": methods[str(method)], "markersize": 3}
            style["marker"] = "s" if method in REFERENCES else "o"
            axes.plot(line["tokens_total"], line["reward"], **style)
        axes.set(xscale="log", xlabel="tokens a document, the policy's too", ylim=_limits(part))
        axes.set(title=f"{name}\nall, largest rank")
        log_ticks(axes.xaxis)
    for axes in figure.axes:
        axes.title.set_fontsize(7)
    marks = [Line2D([], [], color=shades[rank], label=f"rank {rank}") for rank in ranks]
    marks.append(Line2D([], [], color=GREY, label=f"{RAW}, same rank", **DOTTED))
    marks.append(Line2D([], [], label="c·k^a", **DASHED))
    marks += [Line2D([], [], color=c, marker="o", ls="", label=name) for name, c in methods.items()]
    figure.legend(handles=marks, loc="outside lower center", ncols=6)
    return figure


def _limits(part: pd.DataFrame) -> tuple[float, float]:
    """Return limits around the means that extend no further below zero than above."""
    low, high = float(part["reward"].min()), max(float(part["reward"].max()), 0.0)
    low = max(min(low, 0.0), -high) if high else low
    room = 0.12 * (high - low or 1.0)
    return low - room, high + room


def _line(adaptation: Adaptation, axes: Any, line: pd.DataFrame, colour: Any) -> None:
    k = line["inner_steps"].to_numpy(dtype=float)
    low, high = (line[f"reward_{end}"].to_numpy() for end in ("low", "high"))
    axes.fill_between(k, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.plot(k, line["reward"], "o-", color=colour, markersize=2.5)
    mine = adaptation.laws.merge(line[[*BASE, "method", "lora_rank"]].head(1))
    for c, a in mine[["c", "a"]].dropna().to_numpy(dtype=float):
        grid = np.geomspace(k.min(), k.max(), 50)
        axes.plot(grid, c * grid**a, **DASHED)


def pareto(adaptation: Adaptation) -> Figure | None:
    """Draw reward against forgetting on test documents, with the Pareto front of each base."""
    table = adaptation.tested
    if table.empty:
        return None
    parts = list(bases(table))
    across = min(2, len(parts))
    down = -(-len(parts) // across)
    figure = Figure(figsize=(PAGE if across > 1 else PAGE * 0.75, 2.7 * down + 0.2))
    shades = colours(by_order(table["method"]))
    markers = dict(zip(sorted(table["inner_steps"].unique()), MARKERS * 9, strict=False))
    ranks = sorted(table["lora_rank"].dropna().unique())
    for axes, (name, part) in zip(panels(figure, len(parts), across), parts, strict=True):
        own = part[part["method"] != "oracle"]  # which is told what to write
        front = own[pareto_front(own["forgetting"].to_numpy(), own["reward"].to_numpy())]
        front = front.sort_values("forgetting")
        shown: Any = {"where": "post", "color": BLACK, "linewidth": 0.8, "zorder": 1}
        axes.step(front["forgetting"], front["reward"], **shown)
        for row in part.to_dict("records"):
            hollow = len(ranks) > 1 and row["lora_rank"] == ranks[0]
            shade, marker = shades[row["method"]], markers[row["inner_steps"]]
            face: Any = "white" if hollow else shade
            axes.plot(row["forgetting"], row["reward"], marker, color=shade, mfc=face, ms=4)
        axes.set(xlabel=FORGETTING, ylabel=REWARD)
        axes.set_title(name, fontsize=8)
    dot: Any = {"color": BLACK, "marker": "o", "ls": "", "markersize": 4}
    marks = [Line2D([], [], **dot | {"color": c}, label=name) for name, c in shades.items()]
    marks += [
        Line2D([], [], **dot | {"marker": mark}, label=f"k = {k}")
        for k, mark in markers.items()
        if k > 0
    ]
    if len(ranks) > 1:
        marks.append(Line2D([], [], **dot, mfc="white", label=f"hollow: rank {ranks[0]}"))
    marks.append(Line2D([], [], color=BLACK, linewidth=0.8, label="front"))
    figure.legend(handles=marks, loc="outside right center")
    return figure


def iterations(adaptation: Adaptation) -> Figure | None:
    """Draw mean and best reward of a document's edits by iteration, beside the raw document's."""
    table, tested = adaptation.restem, adaptation.tested
    if table.empty:
        return None
    raw = tested[tested["method"] == RAW]
    parts = [(name, *pair) for name, base in bases(table) for pair in base.groupby("lora_rank")]
    across = min(3, len(parts))
    width = {1: COLUMN * 1.35, 2: PAGE * 0.85, 3: PAGE}[across]
    figure = Figure(figsize=(width, 2.4 * -(-len(parts) // across) + 0.3))
    grid = panels(figure, len(parts), across)
    for axes, (name, rank, part) in zip(grid, parts, strict=True):
        axes.set_title(f"{name}\nrank {rank}, k = {part['inner_steps'].iloc[0]}", fontsize=7)
        for split, colour, aside in (("train", ORANGE, -0.04), ("test", BLUE, 0.04)):
            line = part[part["split"] == split]
            if line.empty:
                continue
            edits, x = line["edits"].max(), line["iteration"].to_numpy(dtype=float) + aside
            for what, style in (("mean", "o-"), ("best", "^--"))[: 2 if edits > 1 else 1]:
                ends = [line[what] - line[f"{what}_low"], line[f"{what}_high"] - line[what]]
                bars: Any = {"color": colour, "markersize": 3.5, "elinewidth": 0.8}
                bars["label"] = f"{split}: {what}" + (f" of {edits:.2g} edits" if edits > 1 else "")
                axes.errorbar(x, line[what], yerr=np.stack(ends), fmt=style, **bars)
        for level in raw.merge(part[[*BASE, "lora_rank", "inner_steps"]].head(1))["reward"]:
            axes.axhline(level, color=GREY, label=f"test: {RAW}", **DOTTED)
        rounds = sorted(part["iteration"].unique())
        axes.set(xlabel="ReST-EM iteration", ylabel=REWARD)
        axes.set(xticks=rounds, xlim=(rounds[0] - 0.3, rounds[-1] + 0.3))
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(handles)))
    return figure
