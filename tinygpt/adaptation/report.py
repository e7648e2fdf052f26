"""The report of a study of adaptation: does self-editing beat the raw document, at what cost?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console

from tinygpt import fileio
from tinygpt.adaptation import plots
from tinygpt.adaptation.analysis import (
    BASE,
    FEW,
    RAW,
    Adaptation,
    analyse_adaptation,
    by_order,
    load_records,
)
from tinygpt.adaptation.config import RATED
from tinygpt.adaptation.plots import bases, title
from tinygpt.scaling import document, wording
from tinygpt.scaling.document import Block, Heading, Items, Paragraph, Picture, Table
from tinygpt.scaling.intervals import LEVEL, Interval
from tinygpt.scaling.wording import count

CAPTIONS = {
    "adaptation_laws": (
        "Mean reward on test documents after k inner steps, with its 95 % band; below, against "
        "all tokens that a document took, those of the policy's fine-tuning not counted. Losses "
        "larger than the gains run off below."
    ),
    "pareto_forgetting": (
        "Reward against forgetting on test documents. No setting gains more than the front at no "
        "more forgetting, but for `oracle`, which is told what to write."
    ),
    "restem": (
        "Reward by iteration, with 95 % intervals. The best of several edits is chosen by the "
        "reward it is shown with: it is an upper end, not what the policy gives."
    ),
}
TABLES = ("summary", "paired", "laws")


def make(runs: Sequence[str | Path], folder: Path, seed: int = 0) -> None:
    """Write the whole report on the records under ``runs``, and print the answer.

    Raises ConfigError where there are none or they contradict each other.
    """
    adaptation = analyse_adaptation(load_records(*runs), seed)
    write(adaptation, folder)
    show(adaptation, folder)


def write(adaptation: Adaptation, folder: Path) -> list[Path]:
    """Write report, figures and tables; what an earlier analysis left is replaced."""
    with fileio.turn(folder):
        fileio.remove_torn(folder, folder / "tensorboard")
        figures = plots.draw(adaptation, folder)
        for name in TABLES:
            text = getattr(adaptation, name).to_csv(index=False, lineterminator="\n")
            fileio.write_text(folder / f"adaptation_{name}.csv", text)
        files = document.write(list(compose(adaptation, figures)), folder)
    files += [f"adaptation_{name}.csv" for name in TABLES]
    files += [f"{name}.{kind}" for name in figures for kind in ("png", "svg")]
    return [folder / name for name in files]


def show(adaptation: Adaptation, folder: Path, console: Console | None = None) -> None:
    """Print the answer, what each method brings, and where the report lies."""
    brief = outcomes(adaptation, brief=True)
    document.show([*answer(adaptation), *brief, *notes(adaptation)], folder, console)


def compose(adaptation: Adaptation, figures: Sequence[str]) -> Iterator[Block]:
    """Yield the whole report, in the order it is read."""
    yield from answer(adaptation)
    yield from outcomes(adaptation)
    yield from differences(adaptation)
    yield from choices(adaptation)
    yield from _pictures(figures, "pareto_forgetting", "adaptation_laws")
    yield from powers(adaptation)
    yield from rounds(adaptation)
    yield from _pictures(figures, "restem")
    yield from splits(adaptation)
    yield from notes(adaptation)
    yield from method(adaptation)
    yield Heading("Files")
    lines = ["`adaptation_summary.csv`: every setting, of every split"]
    lines.append("`adaptation_paired.csv`: every comparison with `lora_doc`")
    lines.append("`adaptation_laws.csv`: reward = c·k^a by method, or why there is none")
    lines.append("figures, as `.png` and `.svg`: " + ", ".join(f"`{name}`" for name in figures))
    yield Items(lines)


def _pictures(figures: Sequence[str], *names: str) -> Iterator[Block]:
    yield from (Picture(name, CAPTIONS[name]) for name in names if name in figures)


# --- the answer


def answer(adaptation: Adaptation) -> Iterator[Block]:
    """Say it in plain words, by base; then from what size on."""
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
        if part["base_parameters"].nunique() > 1:
            yield Paragraph(f"{str(task).replace('_', ' ')}: {_from_what_size(part)}")


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
        f"{_signed(row, 'difference')} nats over {count(row['documents'], 'document')}, Holm's p "
        f"{_p(row['holm_p'], '= ')}; forgetting {_plus(row['forgetting'])} nats, {more} against "
        f"`{RAW}`"
    )


def _p(value: float, equal: str = "") -> str:
    return "< 0.001" if value < 1e-3 else f"{equal}{wording.number(value, 2)}"


def _from_what_size(part: pd.DataFrame) -> str:
    sizes = sorted(part["base_parameters"].unique())
    wins = sorted(part[part["verdict"] == "better"]["base_parameters"].unique())
    if not wins:
        return f"no evidence at any of the {len(sizes)} sizes of the base."
    if wins == sizes:
        return f"it wins somewhere at every size, from {sizes[0]:,} parameters on."
    if wins == sizes[-len(wins) :]:
        return f"it wins from {wins[0]:,} parameters on, not below."
    listed = ", ".join(f"{size:,}" for size in wins)
    return f"it wins at {listed} parameters, but not at every larger size: no size to name."


# --- tables


def outcomes(adaptation: Adaptation, brief: bool = False) -> Iterator[Block]:
    """Say what each method brings on test documents, after the fewest and the most steps;
    ``brief``: after the most alone, at the largest rank."""
    table = adaptation.summary
    table = table[(table["split"] == "test") & (table["documents"] > 0)]
    if table.empty:
        yield Paragraph("No test document has a result yet.")
        return
    yield Heading("What each method brings")
    yield Paragraph(
        "Test documents; reward: by how much the held-out loss falls; forgetting: by how much the "
        f"loss on the base's own text rises (nats per token), with {100 * LEVEL:.0f} % intervals."
    )
    for name, part in bases(table):
        last = part["inner_steps"].max()
        ends = [part[part["inner_steps"] > 0]["inner_steps"].min(), last]
        if brief:
            ends, rank = [last], part["lora_rank"].max()
            part = part[part["lora_rank"].isna() | (part["lora_rank"] == rank)]
            name += f" (rank {_rank({'lora_rank': rank})}, k = {last})"
        part = part[part["inner_steps"].isin(ends) | (part["method"] == "none")]
        rows = [_outcome(row) for row in _by_method(part)]
        kept = [column for column in rows[0] if any(row[column] for row in rows)]
        kept = [column for column in kept if not brief or column in BRIEF]
        yield Heading(name, 3)
        yield Table(kept, [[row[column] for column in kept] for row in rows])


def _by_method(table: pd.DataFrame) -> Iterator[dict[Any, Any]]:
    """Yield its rows, those of a method together."""
    for method in by_order(table["method"]):
        yield from table[table["method"] == method].to_dict("records")


BRIEF = ("method", "reward", "forgetting", "accuracy", "failed")


def _outcome(row: dict[Any, Any]) -> dict[str, str]:
    """Return the cells by column, empty where there is nothing to say."""
    facts = np.isfinite(row["accuracy_after"])
    return {
        "method": f"`{row['method']}`",
        "rank": _rank(row),
        "k": str(row["inner_steps"]),
        "reward": _signed(row, "reward", "reward_"),
        "forgetting": _signed(row, "forgetting", "forgetting_"),
        "before": wording.percent(row["accuracy_before"]) if facts else "",
        "accuracy": _share(row) if facts else "",
        "gained": _points(row) if facts else "",
        "tokens": wording.whole(row["tokens_processed"]),
        "policy's": f"{row['policy_tokens']:,.0f}",
        "documents": f"{row['documents']} × {count(row['seeds'], 'seed')}",
        "failed": f"{row['errors']} of {row['records']}" if row["errors"] else "",
    }


def _share(row: dict[Any, Any]) -> str:
    low, high = (f"{100 * row[f'accuracy_after_{end}']:.0f}" for end in ("low", "high"))
    return f"{wording.percent(row['accuracy_after'])} ({low} to {high})"


def _points(row: dict[str, Any]) -> str:
    """Return the accuracy gained and its interval, in points."""
    mean, low, high = (100 * row[f"accuracy_gain{end}"] for end in ("", "_low", "_high"))
    return f"{mean:+.0f}" + (f" ({low:.0f} to {high:.0f})" if np.isfinite(low) else "")


def _rank(row: Any) -> str:
    return wording.UNKNOWN if pd.isna(row["lora_rank"]) else str(row["lora_rank"])


def _plus(value: float) -> str:
    return f"{'+' if value > 0 else ''}{wording.number(value, 2)}"


def _signed(row: Any, name: str, prefix: str = "") -> str:
    """Return ``+0.12 (0.05 to 0.19)``, to the digits that the interval supports."""
    value, low, high = (float(row[end]) for end in (name, f"{prefix}low", f"{prefix}high"))
    if not low < high:
        return _plus(value)
    found = Interval(value, low, high, LEVEL, "")
    return f"{'+' if value > 0 else ''}{wording.estimate(value, found)} ({wording.reach(found)})"


def differences(adaptation: Adaptation) -> Iterator[Block]:
    """Compare every method with ``lora_doc``, by steps."""
    table = adaptation.paired
    if table.empty:
        return
    yield Heading(f"Against `{RAW}`")
    yield Paragraph(
        f"Reward less that of `{RAW}` on the same test documents and seeds, at equal rank, steps "
        "and tokens; ▲ better, ▼ worse (p < 0.05 by Holm), unmarked: no evidence. Beside it, at "
        "the most steps, the difference in forgetting and p by t, Wilcoxon and Holm."
    )
    for name, part in bases(table):
        steps = sorted(part["inner_steps"].unique())
        yield Heading(name, 3)
        header = ["method", "rank", *(f"k = {k}" for k in steps), "documents", "forgetting"]
        header += ["t", "Wilcoxon", "Holm"]
        rows = [
            _difference(group.set_index("inner_steps"), steps)
            for one in by_order(part["method"])
            for _, group in part[part["method"] == one].groupby(
                ["iteration", "lora_rank"], dropna=False
            )
        ]
        yield Table(header, rows)
    methods = set(adaptation.summary["method"]) - {"none", RAW} - set(table["method"])
    if methods:
        names = ", ".join(f"`{name}`" for name in by_order(methods))
        yield Paragraph(f"Without a document, seed and setting that `{RAW}` has too: {names}.")


def _difference(group: pd.DataFrame, steps: Sequence[int]) -> list[str]:
    marks = {"better": " ▲", "worse": " ▼", "no evidence": ""}
    cells = [
        f"{_signed(group.loc[k], 'difference')}{marks[str(group.loc[k, 'verdict'])]}"
        if k in group.index
        else wording.UNKNOWN
        for k in steps
    ]
    last = group.loc[group.index.max()]
    forgetting = _signed(last, "forgetting_difference", "forgetting_")
    p = [_p(last[name]) for name in ("p", "wilcoxon_p", "holm_p")]
    return [f"`{last['method']}`", _rank(last), *cells, str(last["documents"]), forgetting, *p]


def powers(adaptation: Adaptation) -> Iterator[Block]:
    """Say reward = c·k^a, where it may be said."""
    table = adaptation.laws
    if table.empty:
        return
    yield Heading("Reward by inner steps")
    yield Paragraph(
        "reward = c·k^a through the means over test documents, where these are positive, rise "
        "with k and have the law within their intervals; its own "
        f"({100 * LEVEL:.0f} %) by the bootstrap over documents. Off: how far the law is from a "
        "mean at most."
    )
    for name, part in bases(table):
        yield Heading(name, 3)
        rows = [_power(row) for row in _by_method(part)]
        yield Table(["method", "rank", "c", "a", "off", ""], rows)


def _power(row: dict[Any, Any]) -> list[str]:
    rank = _rank(row)
    if np.isnan(row["c"]):
        return [f"`{row['method']}`", rank, "", "", "", f"none: {row['reason']}"]
    shown = [_signed(row, name, f"{name}_").removeprefix("+") for name in ("c", "a")]
    return [f"`{row['method']}`", rank, *shown, wording.percent(row["left"]), row["reason"]]


def rounds(adaptation: Adaptation) -> Iterator[Block]:
    """Say what the outer loop learned."""
    table = adaptation.restem
    if table.empty:
        return
    yield Heading("By iteration")
    yield Paragraph(
        "Edits of a document, each as often as it was proposed. Accepted: the share of documents "
        "of which an edit was learned from. On train documents the policy explores more at first: "
        "a part of what is gained there is not learning. On test documents it does not explore."
    )
    header = ["base", "rank", "documents", "iteration", "edits", "mean", "best", "accepted"]
    rows = [
        [
            title(row["task"], row["base_parameters"]),
            _rank(row),
            f"{row['documents']} {row['split']}",
            str(row["iteration"]),
            f"{row['edits']:.3g}",
            _signed(row, "mean", "mean_"),
            _signed(row, "best", "best_"),
            wording.UNKNOWN if pd.isna(row["accepted"]) else wording.percent(row["accepted"]),
        ]
        for row in table.to_dict("records")
    ]
    yield Table(header, rows)


def choices(adaptation: Adaptation) -> Iterator[Block]:
    """Say which rates were chosen on the tune documents."""
    table = adaptation.records
    tuned = table["method"].isin(RATED) & (table["split"] == "test") & table["edit_id"].notna()
    if "edit" not in table or not tuned.any():
        return
    yield Heading("What was chosen")
    yield Paragraph(
        "On tune documents, by the score after the most steps; a seed chooses by itself."
    )
    rows = []
    for (task, size, method, rank), group in table[tuned].groupby(
        [*BASE, "method", "lora_rank"], dropna=False
    ):
        tried = table[(table["method"] == method) & (table["split"] == "tune")]["edit"].dropna()
        rates = {edit.get("lr") for edit in tried}
        edits = group.drop_duplicates("seed")["edit"]
        said = pd.Series([_directive(edit, rates) for edit in edits]).value_counts()
        words = "; ".join(f"{one} ({count(times, 'seed')})" for one, times in said.items())
        base = title(str(task), int(str(size)))
        rows.append([base, f"`{method}`", _rank({"lora_rank": rank}), words])
    yield Table(["base", "method", "rank", "chosen"], rows)


def _directive(edit: dict[str, Any], rates: set[Any]) -> str:
    """Say it in words, and whether a rate beyond those tried might be better."""
    ends = {min(rates): "the lowest tried", max(rates): "the highest tried"} if rates else {}
    words = [str(edit.get("source")), f"rate {edit.get('lr', float('nan')):g}"]
    words += [ends[edit.get("lr")]] if len(rates) > 1 and edit.get("lr") in ends else []
    return ", ".join(words)


def splits(adaptation: Adaptation) -> Iterator[Block]:
    """Show tune and train documents; the test documents alone count above."""
    table = adaptation.summary
    others = table[(table["split"] != "test") & (table["documents"] > 0)]
    others = others[others["inner_steps"] == others.groupby(BASE)["inner_steps"].transform("max")]
    if others.empty:
        return
    yield Heading("Tune and train documents")
    yield Paragraph("At the most steps; rates were chosen on tune documents, the policy on train.")
    for name, part in bases(others):
        yield Heading(name, 3)
        rows = [
            [
                row["split"],
                f"`{row['method']}`",
                _rank(row),
                wording.UNKNOWN if pd.isna(row["tuned_lr"]) else f"{row['tuned_lr']:g}",
                _signed(row, "reward", "reward_"),
                _signed(row, "forgetting", "forgetting_"),
                str(row["documents"]),
            ]
            for split in ("tune", "train")
            for row in _by_method(part[part["split"] == split])
        ]
        header = ["split", "method", "rank", "rate", "reward", "forgetting", "documents"]
        yield Table(header, rows)


def notes(adaptation: Adaptation) -> Iterator[Block]:
    if adaptation.notes:
        yield Heading("Notes")
        yield Items([f"{line}." for line in adaptation.notes])


def method(adaptation: Adaptation) -> Iterator[Block]:
    yield Heading("How it was computed")
    yield Paragraph(
        "Records of a document are averaged first; every interval is over documents. Means: "
        "percentiles of the bootstrap, widened for few documents (Hesterberg 2015), and "
        f"of fewer than {FEW} Student's t; "
        "accuracies: Clopper and Pearson's. Differences: "
        "Student's t, with Wilcoxon's signed ranks beside it; Holm's correction is over all "
        "self-edits, ranks and steps of a base, and apart from them over the references (those "
        "whose directive is not the model's own choice). Equal tokens are those trained on; what "
        "the policy reads and writes comes on top and is listed. Records without a result are in "
        "no mean: a method "
        f"that fails often looks better than it is. Seed {adaptation.seed}."
    )
