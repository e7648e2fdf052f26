"""Chooses runs from the Farseer task of ScaleBench within 1, 5 and 10 % of what all of them cost.

python experiments/budget/scalebench.py        ten repeats; writes scalebench.csv and the page
python experiments/budget/scalebench.py 2      so many, printed alone

A repeat leaves a tenth of the 404 runs out at random, as if they could not be made; what they cost
still counts in the whole.  The design sees a loss once it has paid for it, never those of the
target.  R² is clipped to [-1, 1], as in the benchmark (Li et al. 2026, arXiv:2604.22753).
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from tinygpt.fileio import write_text
from tinygpt.scaling.design import Design, spend

HERE = Path(__file__).parent
MARKS = re.compile(r"(<!-- scalebench -->\n).*?(<!-- end -->\n)", re.S)
SHARES, REPEATS = (0.01, 0.05, 0.10), 10
PUBLISHED = {0.01: 0.67, 0.05: 0.88, 0.10: 0.93}  # the best of the paper's table
LAWS = ("chinchilla", "chinchilla_tied", "coupled", "kaplan_constant")


def score(share: float, repeat: int) -> dict[str, float]:
    """Return how well the target is predicted from runs of this share of the whole cost."""
    pool = pd.read_csv(HERE / "tables" / "farseer_train.csv")
    target = pd.read_csv(HERE / "tables" / "farseer_test.csv")
    budget = share * float((6 * pool["N"] * pool["D"]).sum())
    if repeat:  # the first has all of them
        pool = pool.sample(frac=0.9, random_state=repeat).reset_index(drop=True)
    cost = (6 * pool["N"] * pool["D"]).to_numpy()
    design = Design(pool[["N", "D"]], target[["N", "D"]], cost, cost, LAWS, seed=repeat)
    found = spend(design, budget, lambda row: float(pool["loss"][row]))
    measured = target["loss"].to_numpy()
    left = np.sum((measured - found.predicted) ** 2)
    r2 = 1 - left / np.sum((measured - measured.mean()) ** 2)
    error = 100 * float(np.mean(np.abs(found.predicted / measured - 1)))
    return {
        "share": share,
        "repeat": repeat,
        "r2": max(-1.0, r2),
        "error": error,
        "runs": len(found.rows),
    }


def markdown(scores: pd.DataFrame) -> str:
    lines = [
        "| cost, % | runs | R² | standard deviation | all 404 at hand | best published | error, % |"
    ]
    lines.append("|---|---|---|---|---|---|---|")
    for share, rows in scores.groupby("share"):
        first = rows.loc[rows["repeat"] == 0, "r2"].iloc[0]
        numbers = (rows["r2"].mean(), rows["r2"].std(ddof=0), first, PUBLISHED[float(share)])
        cells = [f"{100 * float(share):.0f}", f"{rows['runs'].mean():.0f}"]
        cells += [f"{number:.2f}" for number in numbers]
        lines.append(f"| {' | '.join([*cells, format(rows['error'].mean(), '.2f')])} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    repeats = int(sys.argv[1]) if sys.argv[1:] else REPEATS
    scores = pd.DataFrame([score(share, i) for share in SHARES for i in range(repeats)])
    print(markdown(scores))
    if sys.argv[1:]:
        return
    write_text(HERE / "scalebench.csv", scores.to_csv(index=False, lineterminator="\n"))
    page = HERE / "README.md"
    write_text(page, MARKS.sub(lambda m: f"{m[1]}{markdown(scores)}{m[2]}", page.read_text()))


if __name__ == "__main__":
    main()
