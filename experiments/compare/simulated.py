"""Scores the ratio of two recipes on simulated studies, where it is known.

python experiments/compare/simulated.py        100 studies of each kind; writes the table and page
python experiments/compare/simulated.py 10     so many, printed alone

The true losses are the laws of experiments/bank/worlds.py: those that are fitted, or others.  The
second recipe makes of its tokens, or of its parameters, what the first makes of so many times as
many; the ratio is the same at every scale, or goes by the compute to the power of -0.08.  Runs
scatter as the seeds of experiments/grid_books do, and two of a seed share 30 % of the variance.
"""

from __future__ import annotations

import itertools
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tinygpt.fileio import write_text
from tinygpt.scaling.compare import ratio_of

sys.path.insert(0, str(Path(__file__).parents[1] / "bank"))
import worlds as bank

HERE = Path(__file__).parent
MARKS = re.compile(r"(<!-- simulated -->\n).*?(<!-- end -->\n)", re.S)
STUDIES, SHARED = 100, 0.3
RATIOS, DRIFTS, DESIGNS = (1.0, 1.2, 2.0), (0.0, -0.08), (12, 24, 40)
PLACES = {  # sizes, lengths, seeds, by the number of runs
    12: (bank.SIZES[::2], bank.LENGTHS[1:], 1),
    24: (bank.SIZES[::2], bank.LENGTHS[1:], 2),
    40: (bank.SIZES, bank.LENGTHS[1:], 2),
}


def study(number: int, count: int, ratio: float, drift: float) -> tuple[pd.DataFrame, float]:
    """Return the runs of both recipes, and the mean log compute, where the ratio is ``ratio``."""
    random = np.random.default_rng([number, count, int(10 * ratio), drift != 0.0])
    kind, gains_size = ("inside", "outside")[number % 2], number // 2 % 2
    forms = bank.truths(random)[kind]
    form = forms[number // 4 % len(forms)]
    sizes, lengths, seeds = PLACES[count]
    n, d = (np.repeat(axis.ravel(), seeds) for axis in np.meshgrid(sizes, lengths))
    scale = np.log(6 * n * d)
    gain = ratio * np.exp(drift * (scale - scale.mean()))
    noise = np.interp(np.log(d), np.log(bank.LENGTHS), bank.SCATTER["measured"])
    common, *own = noise * random.standard_normal((3, len(n)))
    tables = []
    for other, each in enumerate(own):
        m = gain if other else np.ones(len(n))
        size, tokens = (n * m, d) if gains_size else (n, d * m)
        loss = form(5e4 / size, 1e6 / tokens)
        scatter = np.sqrt(SHARED) * common + np.sqrt(1 - SHARED) * each
        tables.append(
            pd.DataFrame({"other": other, "N": n, "D": d, "loss": loss * np.exp(scatter)})
        )
    return pd.concat(tables), float(scale.mean())


def judge(number: int, count: int, ratio: float, drift: float) -> list[dict[str, Any]]:
    """Return how the estimates of one study lie beside the truth."""
    runs, centre = study(number, count, ratio, drift)
    sides = (runs[runs["other"] == one] for one in (0, 1))
    found = ratio_of(*sides, {"N": "N", "D": "D"}, "loss")
    rows = []
    for what, compute in (("best known", found.best_known), ("largest runs", found.ends[1])):
        truth, one = ratio * np.exp(drift * (np.log(compute) - centre)), found.at(compute)
        rows.append((what, truth, one))
    rows.append(("exponents", 1 + drift, found.exponents()))
    return [
        {
            "runs": count,
            "ratio": ratio,
            "drift": drift,
            "what": what,
            "covered": truth in one,
            "off": abs(one.estimate / truth - 1),
            "reach": (one.high / one.low - 1) / 2,
            "claimed": found.differs or found.drifts,
            "detectable": found.detectable,
        }
        for what, truth, one in rows
    ]


def score(studies: int) -> pd.DataFrame:
    """Return a row for each kind of study, and each estimate of it."""
    rows = []
    for kind in itertools.product(DESIGNS, RATIOS, DRIFTS):
        for number in range(studies):
            rows += judge(number, *kind)
        print(kind, flush=True)
    runs = pd.DataFrame(rows)
    runs["within"] = runs["off"] < 0.1
    groups = runs.groupby(["runs", "ratio", "drift", "what"], sort=False)
    medians = groups[["off", "reach", "detectable"]].median()
    return groups[["covered", "within", "claimed"]].mean().join(medians).reset_index()


def markdown(table: pd.DataFrame) -> str:
    """Return the table of the page, a row for each number of runs and true ratio."""
    header = ["runs of each", "ratio", "scale", "off, %", "within ±10 %, %", "±, %", "covered, %"]
    header += ["of the largest runs, %", "of the exponents, %", "difference claimed, %"]
    lines = [header, ["---"] * len(header)]
    for (count, ratio, drift), rows in table.groupby(["runs", "ratio", "drift"], sort=False):
        one = rows.set_index("what")
        best = one.loc["best known"]
        cells = [count, f"{ratio:g}", "drifts" if drift else "constant", f"{100 * best['off']:.1f}"]
        cells += [f"{100 * best[name]:.0f}" for name in ("within", "reach", "covered")]
        cells += [f"{100 * one.loc[w, 'covered']:.0f}" for w in ("largest runs", "exponents")]
        lines.append([*cells, f"{100 * best['claimed']:.0f}"])
    for what in ("best known",):
        mean = table[table["what"] == what]["covered"].mean()
        rest = [table[table["what"] == w]["covered"].mean() for w in ("largest runs", "exponents")]
        cells = ["**all**", "", "", "", "", "", f"**{100 * mean:.1f}**"]
        lines.append([*cells, *(f"**{100 * one:.1f}**" for one in rest), ""])
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines) + "\n"


def main() -> None:
    table = score(int(sys.argv[1]) if sys.argv[1:] else STUDIES)
    print(markdown(table))
    if sys.argv[1:]:
        return
    text = table.to_csv(index=False, float_format="%.4g", lineterminator="\n")
    write_text(HERE / "simulated.csv", text)
    page = HERE / "README.md"
    write_text(page, MARKS.sub(lambda m: f"{m[1]}{markdown(table)}{m[2]}", page.read_text()))


if __name__ == "__main__":
    main()
