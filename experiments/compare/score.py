"""Compares recipes in tables of real runs: those of experiments/bank, and studies recorded here.

python experiments/compare/score.py                          all of them; writes the page
python experiments/compare/score.py muon=outputs/FOLDER      takes over the runs of a study first;
                                                             several folders with commas between

Porian's runs are on RefinedWeb, scored on it; Gadre's on three corpora, all scored on C4.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pandas as pd

from tinygpt.fileio import write_text
from tinygpt.scaling import elsewhere, versus
from tinygpt.scaling.columns import Columns
from tinygpt.scaling.runs import comparable, load_runs
from tinygpt.scaling.wording import number, with_interval

HERE = Path(__file__).parent
BANK = HERE.parent / "bank" / "tables"
MARKS = re.compile(r"(<!-- (public|studies) -->\n).*?(<!-- end -->\n)", re.S)
PORIAN = {"n": "params", "d": "tokens", "loss": "loss", "run": "none"}  # a run names a size
GADRE = {"n": "params_ne", "d": "tokens", "loss": "loss"}
# The tables of a comparison, the reference first, each with what it is called here.
PUBLIC = {
    "Porian": {
        "porian_rw_base_long_kaplan": "long warm-up (Kaplan's)",
        "porian_rw_base_short_kaplan": "short warm-up",
        "porian_rw_base_short_chinchilla": "short warm-up, decay to the end of each run",
        "porian_rw_tuned_short_const": "tuned for each size, constant rate",
    },
    "Gadre": {
        "gadre_c4_original": "C4",
        "gadre_rpj": "RedPajama",
        "gadre_rw_original": "RefinedWeb",
    },
}
STUDIES = {"muon": ("optim.kind", "adamw"), "position": ("model.position", "learned")}
HEADER = (
    *("recipe", "against", "runs", "pairs", "compute at equal loss", "at the largest"),
    *("ratio of exponents", "detectable", "fails"),
)


def public(group: str) -> versus.Comparison:
    """Compare the tables of a group."""
    named = PORIAN if group == "Porian" else GADRE
    sides = {
        name: elsewhere.read(BANK / f"{table}.csv", named, Columns.loss)
        for table, name in PUBLIC[group].items()
    }
    return versus.compare(sides, "studies")


def recorded(name: str) -> versus.Comparison:
    """Compare the recipes of a study that is recorded here."""
    key, reference = STUDIES[name]
    runs = pd.read_csv(HERE / f"{name}.csv", low_memory=False)
    columns = Columns()
    sides = {
        one: elsewhere.Table(*comparable(part, columns.loss), columns, [])
        for one, part in versus.split(runs, key)[0].items()
    }
    return versus.compare(sides, key, reference)


def rows(found: versus.Comparison) -> list[list[str]]:
    """Return the lines of a comparison."""
    lines = []
    for name, ratio in found.ratios.items():
        made = [ratio.at(ratio.best_known), ratio.at(ratio.ends[1]), ratio.exponents()]
        cells = [with_interval(one) for one in made]
        runs = f"{len(found.sides[name].runs)} and {len(found.first.runs)}"
        failed = [one.id for one in found.checks if one.passed is False and name in one.title]
        line = [name, found.reference, runs, str(ratio.pairs), *cells, number(ratio.detectable)]
        lines.append([*line, ", ".join(failed) or "none"])
    return lines


def markdown(lines: list[list[str]]) -> str:
    table = [list(HEADER), ["---"] * len(HEADER), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in table) + "\n"


def tables() -> dict[str, str]:
    """Return what stands between the marks of the page."""
    made = [name for name in STUDIES if (HERE / f"{name}.csv").exists()]
    studies = [line for name in made for line in rows(recorded(name))]
    return {
        "public": markdown([line for group in PUBLIC for line in rows(public(group))]),
        "studies": markdown(studies) if studies else "None is recorded yet.\n",
    }


def main() -> None:
    for word in sys.argv[1:]:
        name, _, folders = word.partition("=")
        runs = load_runs(*folders.split(","))
        if name == "position":
            runs = runs[runs["optimizer"] == "adamw"]
        runs["folder"] = [Path(folder).name for folder in runs["folder"]]
        write_text(HERE / f"{name}.csv", runs.to_csv(index=False, lineterminator="\n"))
    made, page = tables(), HERE / "README.md"
    print("\n".join(made.values()))
    text = MARKS.sub(lambda m: f"{m[1]}{made[m[2]]}{m[3]}", page.read_text())
    write_text(page, text)


if __name__ == "__main__":
    main()
