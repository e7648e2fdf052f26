"""Report whether self-editing beats the raw document, and at what cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tinygpt import fileio
from tinygpt.adaptation import plots
from tinygpt.adaptation.analysis import (
    FEW,
    PLACE,
    RAW,
    Adaptation,
    analyse_adaptation,
    bases,
    by_order,
    load_records,
)
from tinygpt.scaling import document, wording
from tinygpt.scaling.document import Block, Heading, Items, Paragraph, Picture, Table
from tinygpt.scaling.intervals import LEVEL, Interval
from tinygpt.scaling.wording import count

CAPTIONS = {
    "adaptation_laws": (
        "Mean reward on test documents after k inner steps, with its 95 % band, and against all "
        "tokens per document, without those of the policy's fine-tuning. Losses larger than the "
        "gains are cut off."
    ),
    "pareto_forgetting": (
        "Reward against forgetting on test documents. No setting gains more than the front without "
        "more forgetting, except `oracle`, which is told what to write."
    ),
    "restem": (
        "Reward by iteration, with 95 % intervals. The best of several edits is selected by the "
        "reward shown, so it is an upper bound on what the policy achieves."
    ),
}
TABLES = {
    "summary": "every setting, of every split",
    "paired": f"every comparison with `{RAW}`",
    "laws": "reward = c·k^a by method, or why there is none",
}
BRIEF = ("method", "reward", "forgetting", "accuracy", "failed")  # columns of what is printed
MARKS = {"better": " ▲", "worse": " ▼", "no evidence": ""}
Row = dict[Any, Any]
Cells = dict[str, str]  # of a row, by column


def make(runs: Sequence[str | Path], folder: Path, seed: int = 0) -> Adaptation:
    """Write the report on the records in ``runs``, or raise ConfigError."""
    adaptation = analyse_adaptation(load_records(*runs), seed)
    write(adaptation, folder)
    return adaptation


def show(adaptation: Adaptation, folder: Path) -> None:
    """Print the answer, and where the report is."""
    brief = outcomes(adaptation, brief=True)
    document.show([*answer(adaptation), *brief, *notes(adaptation)], folder)


def write(adaptation: Adaptation, folder: Path) -> list[Path]:
    """Write report, figures and tables, replacing those of an earlier analysis."""
    with fileio.report_lock(folder):
        fileio.remove_torn(folder, folder / "tensorboard")
        figures = plots.draw(adaptation, folder)
        for name in TABLES:
            text = getattr(adaptation, name).to_csv(index=False, lineterminator="\n")
            fileio.write_text(folder / f"adaptation_{name}.csv", text)
        files = document.write(list(compose(adaptation, figures)), folder)
    files += [f"adaptation_{name}.csv" for name in TABLES]
    files += [f"{name}.{kind}" for name in figures for kind in ("png", "svg")]
    return [folder / name for name in files]


def compose(adaptation: Adaptation, figures: Sequence[str]) -> Iterator[Block]:
    """Yield the whole report."""

    def pictures(*names: str) -> Iterator[Block]:
        return (Picture(name, CAPTIONS[name]) for name in names if name in figures)

    yield from answer(adaptation)
    yield from outcomes(adaptation)
    yield from differences(adaptation)
    yield from pictures("pareto_forgetting", "adaptation_laws")
    yield from powers(adaptation)
    yield from rounds(adaptation)
    yield from pictures("restem")
    yield from notes(adaptation)
    yield Heading("How it was computed")
    yield Paragraph(
        "Records of a document are averaged first; every interval is over documents. Means have "
        "bootstrap percentiles, widened for few documents (Hesterberg 2015), or Student's t for "
        f"fewer than {FEW}; accuracies have Clopper and Pearson's. Differences have Student's t, "
        "with Wilcoxon's signed ranks beside it; Holm's correction is over all self-edits, ranks "
        "and steps of a base, and separately over the references (whose directive is not the "
        "model's choice). Tokens are equal in training; what the policy reads and writes is extra "
        "and listed. Records without a result are in no mean, so a method that fails often looks "
        "better than it is. "
        f"Seed {adaptation.seed}."
    )
    yield Heading("Files")
    lines = [f"`adaptation_{name}.csv`: {words}" for name, words in TABLES.items()]
    lines.append("figures, as `.png` and `.svg`: " + ", ".join(f"`{name}`" for name in figures))
    yield Items(lines)


def notes(adaptation: Adaptation) -> Iterator[Block]:
    if adaptation.notes:
        yield Heading("Notes")
        yield Items([f"{line}." for line in adaptation.notes])


# --- the answer


def answer(adaptation: Adaptation) -> Iterator[Block]:
    """Answer in plain words for each base, then say from what size on."""
    yield Heading("Does self-editing beat the raw document?", 1)
    table = adaptation.paired
    edits = table[table["self_edit"]] if len(table) else table
    if edits.empty:
        yield Paragraph(
            f"Not known: no test document has both `{RAW}` and a self-edit at equal rank, steps, "
            "tokens and seed."
        )
        return
    yield Items([f"{name}: {_verdict(part)}" for name, part in bases(edits)])
    for task, part in edits.groupby("task"):
        sizes = sorted(part["base_parameters"].unique())
        wins = sorted(part[part["verdict"] == "better"]["base_parameters"].unique())
        if len(sizes) > 1:
            yield Paragraph(f"{str(task).replace('_', ' ')}: {_from_what_size(sizes, wins)}")


def _verdict(part: pd.DataFrame) -> str:
    """Return the answer for the self-edits of one base."""
    better, worse = (part[part["verdict"] == one] for one in ("better", "worse"))
    total = f"{count(len(part), 'comparison')} at equal tokens"
    if len(better):
        wins = better["method"].value_counts()
        which = ", ".join(f"`{name}` {wins[name]}" for name in by_order(wins.index))
        text = f"yes, in {len(better)} of {total} ({which}); most by {_largest(better)}."
    else:
        text = f"no evidence that it does, in any of {total}; the largest difference is that of "
        text += f"{_largest(part)}."
    if len(worse):
        text += f" It is worse in {len(worse)}; most by {_largest(worse, negative=True)}."
    return text


def _largest(rows: pd.DataFrame, negative: bool = False) -> str:
    """Describe the largest difference."""
    row = rows.sort_values("difference", ascending=negative, kind="stable").iloc[0]
    more = _signed(row, "forgetting_difference", "forgetting_")
    return (
        f"`{row['method']}` (rank {_rank(row)}, k = {row['inner_steps']}): "
        f"{_signed(row, 'difference', '')} nats over {count(row['documents'], 'document')}, Holm's "
        f"p {_p(row['holm_p'], '= ')}; forgetting {_plus(row['forgetting'])} nats, {more} against "
        f"`{RAW}`"
    )


def _from_what_size(sizes: list[int], wins: list[int]) -> str:
    if not wins:
        return f"no evidence at any of the {len(sizes)} sizes of the base."
    if wins == sizes:
        return f"it wins somewhere at every size, from {sizes[0]:,} parameters on."
    if wins == sizes[-len(wins) :]:
        return f"it wins from {wins[0]:,} parameters on, not below."
    listed = ", ".join(f"{size:,}" for size in wins)
    return f"it wins at {listed} parameters, but not at every larger size: no size to name."


# --- numbers as text


def _p(value: float, equal: str = "") -> str:
    return "< 0.001" if value < 1e-3 else f"{equal}{wording.number(value, 2)}"


def _rank(row: Any) -> str:
    return wording.UNKNOWN if pd.isna(row["lora_rank"]) else str(row["lora_rank"])


def _plus(value: float) -> str:
    return f"{'+' if value > 0 else ''}{wording.number(value, 2)}"


def _signed(row: Any, name: str, prefix: str | None = None) -> str:
    """Return ``+0.12 (0.05 to 0.19)``, rounded as the interval suggests.

    Its ends are in the columns ``prefix``low and ``prefix``high, by default after the name.
    """
    prefix = f"{name}_" if prefix is None else prefix
    value, low, high = (float(row[end]) for end in (name, f"{prefix}low", f"{prefix}high"))
    if not low < high:
        return _plus(value)
    found = Interval(value, low, high, LEVEL, "")
    return ("+" if value > 0 else "") + wording.with_interval(found)


# --- tables


def _tables(
    table: pd.DataFrame,
    cells: Callable[[Row], Cells],
    columns: Sequence[str] | None = None,
    title: str = "",
) -> Iterator[Block]:
    """Yield a table per base, with rows by method and without empty columns."""
    for name, part in bases(table):
        rows = [
            cells(row)
            for method in by_order(part["method"])
            for row in part[part["method"] == method].to_dict("records")
        ]
        kept = [column for column in columns or rows[0] if any(row[column] for row in rows)]
        yield Heading(name + title, 3)
        yield Table(kept, [[row[column] for column in kept] for row in rows])


def outcomes(adaptation: Adaptation, brief: bool = False) -> Iterator[Block]:
    """Yield the test results after the fewest and the most steps, or after the most (``brief``)."""
    table = adaptation.tested
    if table.empty:
        yield Paragraph("No test document has a result yet.")
        return
    yield Heading("What each method brings")
    yield Paragraph(
        "Test documents; reward: by how much the held-out loss falls; forgetting: by how much the "
        f"loss on the base's own text rises (nats per token), with {100 * LEVEL:.0f} % intervals."
    )
    for _, part in bases(table):
        steps, rank = part["inner_steps"], part["lora_rank"].max()
        last, title = steps.max(), ""
        ends = [last] if brief else [steps[steps > 0].min(), last]
        part = part[steps.isin(ends) | (part["method"] == "none")]
        if brief:
            part = part[part["lora_rank"].isna() | (part["lora_rank"] == rank)]
            title = f" (rank {_rank({'lora_rank': rank})}, k = {last})"
        yield from _tables(part, _outcome, BRIEF if brief else None, title)


def _outcome(row: Row) -> Cells:
    share = points = before = ""
    if np.isfinite(row["accuracy_after"]):
        ends = [100 * row[f"accuracy_after_{end}"] for end in ("low", "high")]
        before = wording.percent(row["accuracy_before"])
        share = f"{wording.percent(row['accuracy_after'])} ({ends[0]:.0f} to {ends[1]:.0f})"
        mean, low, high = (100 * row[f"accuracy_gain{end}"] for end in ("", "_low", "_high"))
        points = f"{mean:+.0f}" + (f" ({low:.0f} to {high:.0f})" if np.isfinite(low) else "")
    return {
        "method": f"`{row['method']}`",
        "rank": _rank(row),
        "k": str(row["inner_steps"]),
        "reward": _signed(row, "reward"),
        "forgetting": _signed(row, "forgetting"),
        "before": before,
        "accuracy": share,
        "gained": points,
        "tokens": wording.whole(row["tokens_processed"]),
        "policy's": f"{row['policy_tokens']:,.0f}",
        "documents": f"{row['documents']} × {count(row['seeds'], 'seed')}",
        "failed": f"{row['errors']} of {row['records']}" if row["errors"] else "",
    }


def differences(adaptation: Adaptation) -> Iterator[Block]:
    """Yield the comparisons with ``lora_doc``, by steps."""
    table = adaptation.paired
    if table.empty:
        return
    yield Heading(f"Against `{RAW}`")
    yield Paragraph(
        f"Reward minus that of `{RAW}` on the same test documents and seeds, at equal rank, steps "
        "and tokens: ▲ better, ▼ worse (p < 0.05 by Holm), unmarked no evidence. Beside it, at "
        "the most steps, the difference in forgetting and p by t, Wilcoxon and Holm."
    )
    for _, part in bases(table):
        last = part.sort_values("inner_steps").drop_duplicates(PLACE, keep="last").sort_index()
        yield from _tables(last, partial(_difference, part.to_dict("records")))
    methods = set(adaptation.summary["method"]) - {"none", RAW} - set(table["method"])
    if methods:
        names = ", ".join(f"`{name}`" for name in by_order(methods))
        yield Paragraph(f"Not comparable, as `{RAW}` lacks their documents or settings: {names}.")


def _difference(every: list[Row], row: Row) -> Cells:
    """Return the cells of a setting; ``every`` has the comparisons of its base at any steps."""
    place = [str(row[name]) for name in PLACE]
    mine = {one["inner_steps"]: one for one in every if [str(one[name]) for name in PLACE] == place}
    cells = {"method": f"`{row['method']}`", "rank": _rank(row)}
    for k in sorted({one["inner_steps"] for one in every}):
        one = mine.get(k)
        text = _signed(one, "difference", "") + MARKS[one["verdict"]] if one else wording.UNKNOWN
        cells[f"k = {k}"] = text
    cells["documents"] = str(row["documents"])
    cells["forgetting"] = _signed(row, "forgetting_difference", "forgetting_")
    names = {"t": "p", "Wilcoxon": "wilcoxon_p", "Holm": "holm_p"}
    return cells | {title: _p(row[name]) for title, name in names.items()}


def powers(adaptation: Adaptation) -> Iterator[Block]:
    """Yield the laws reward = c·k^a, and why there are none."""
    if adaptation.laws.empty:
        return
    yield Heading("Reward by inner steps")
    yield Paragraph(
        "reward = c·k^a, fitted to the means over test documents if these are positive, rise with "
        f"k and have the law within their intervals. Intervals ({100 * LEVEL:.0f} %) are by the "
        "bootstrap over documents. Off: the largest deviation of a mean from the law."
    )
    yield from _tables(adaptation.laws, _power)


def _power(row: Row) -> Cells:
    found = {"method": f"`{row['method']}`", "rank": _rank(row), "c": "", "a": "", "off": ""}
    if np.isnan(row["c"]):
        return found | {"": f"none: {row['reason']}"}
    shown = {name: _signed(row, name).removeprefix("+") for name in ("c", "a")}
    return found | shown | {"off": wording.percent(row["left"]), "": row["reason"]}


def rounds(adaptation: Adaptation) -> Iterator[Block]:
    """Yield what the outer loop learned."""
    if adaptation.restem.empty:
        return
    yield Heading("By iteration")
    yield Paragraph(
        "Edits of a document, each counted as often as it was proposed. Accepted: the share of "
        "documents with an edit that was learned from. On train documents the policy explores more "
        "at first, so part of the gain there is not learning. On test documents it never explores."
    )
    # rows of a split stay together, as those of a method do elsewhere
    yield from _tables(adaptation.restem.assign(method=adaptation.restem["split"]), _round)


def _round(row: Row) -> Cells:
    accepted = row["accepted"]
    return {
        "rank": _rank(row),
        "documents": f"{row['documents']} {row['split']}",
        "iteration": str(row["iteration"]),
        "edits": f"{row['edits']:.3g}",
        "mean": _signed(row, "mean"),
        "best": _signed(row, "best"),
        "accepted": wording.UNKNOWN if pd.isna(accepted) else wording.percent(accepted),
    }
