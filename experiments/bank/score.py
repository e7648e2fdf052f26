"""Scores the forecast on tables of real runs that others published.

python experiments/bank/score.py                  the tables here; writes bank.csv and the page
python experiments/bank/score.py mine/*.csv       other tables, with the same constants

Each table is cut twice: at the cut that a report uses, and at a tenth of the largest compute.  The
forecast sees the runs below the cut alone.  Beside it stand Chinchilla's form as usually fitted
(scipy's L-BFGS from a grid of starts, the best of them by BFGS to its end, Huber 1e-3), the best
cheaper run, and a plane in the logarithms.  The constants of the intervals are fitted to the
families of tables other than the one that is scored.
"""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import optimize, special, stats

from tinygpt.fileio import write_text
from tinygpt.scaling import elsewhere, forecast
from tinygpt.scaling.columns import Columns, choice, varied

HERE = Path(__file__).parent
MARKS = re.compile(r"(<!-- numbers -->\n).*?(<!-- end -->\n)", re.S)
# In Porian's tables a run names the size: the rows of a size were trained to different lengths.
NAMED = {"porian": {"run": "none"}}
LEVEL = 0.93  # of the others' losses, so that unseen families come to 95 % at a report's cut
TAILS = 4  # degrees of freedom of the errors
# Where the logs of the constants are looked for (a quantile, least, factor, most), and the standard
# deviations that they are drawn there with: ten tables say little of each.
START = np.log([1.0, 0.001, 1.0, 0.015])
PRIOR = np.array([np.inf, 5.0, 5.0, 5.0])
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Score:
    """One table, cut once: the errors of log L above the cut, and those of the rivals in %."""

    table: str
    split: str
    runs: int
    errors: Array  # (n,)
    distance: Array  # beyond the runs that were fitted, (n,)
    rate: float
    between: Array  # how far the members are apart, (n,)
    scatter: Array  # of single runs, (n,)
    reach: Array  # the half-widths of the intervals, (n,)
    scipy: float
    best: float
    plane: float

    @property
    def family(self) -> str:
        return self.table.split("_")[0]

    @property
    def error(self) -> float:
        return 100 * float(np.mean(np.abs(np.expm1(self.errors))))

    def beyond(self, shape: Sequence[float]) -> Array:
        return forecast.expected(self.rate, self.between, self.distance, shape)

    def covered(self, reach: Array) -> float:
        return float(np.mean(np.abs(self.errors) <= reach))


def score(path: Path, log: bool = True) -> list[Score]:
    """Score a table at both cuts."""
    table = elsewhere.read(path, NAMED.get(path.stem.split("_")[0], {}), Columns.loss)
    runs, columns = table.runs.reset_index(drop=True), table.columns
    where = columns.where(runs)
    laws, variables, _ = choice("auto", "auto", varied(runs, where), where)
    size = columns.compute(runs)
    groups = forecast.groups_of(columns.dependence(runs, variables.values()))
    top = forecast.largest_of(size, groups)
    own = forecast.split_by_size(groups, size, 2)
    sample = forecast.Sample(runs, laws, variables, columns.loss, size, groups)
    found = []
    for split, held in (("own", own), ("tenth", top > size.max() / 10)):
        if held is None or held.all():
            continue
        one = forecast.hold_out(sample, held)
        if one is None:
            continue
        made, test = one.below, sample.rows(one.above)
        predicted, between = made.mean(test.values)
        rival = np.exp(usual(sample.rows(~held), test)) / np.exp(test.measured) - 1
        found.append(
            Score(
                path.stem,
                split,
                int((~held).sum()),
                predicted - test.measured,
                made.distance(test.values, test.size),
                made.rate,
                between,
                made.scatter(test.values),
                made.at(test.values, test.size)[1],
                100 * float(np.mean(np.abs(rival))),
                100 * one.best_cheaper,
                100 * one.plane,
            )
        )
        if log:
            print(f"{path.stem} {split}: {found[-1].error:.2f} %", flush=True)
    return found


# --- the rival


def usual(below: forecast.Sample, test: forecast.Sample) -> Array:
    """Predict by Chinchilla's form as Hoffmann et al. 2022 fit it, from a grid of starts."""
    n, d = (np.log(below.values[name]) for name in "ND")
    y = below.measured

    def terms(p: Array, n: Array, d: Array) -> Array:
        return np.stack([p[0] - p[3] * n, p[1] - p[4] * d, np.full_like(n, p[2])])

    def loss(p: Array) -> tuple[float, Array]:
        each = terms(p, n, d)
        middle = special.logsumexp(each, axis=0)
        residuals, shares = y - middle, np.exp(each - middle)
        slope = -np.clip(residuals, -1e-3, 1e-3) * shares
        gradient = [*slope.sum(axis=1), -np.sum(slope[0] * n), -np.sum(slope[1] * d)]
        return float(special.huber(1e-3, residuals).sum()), np.array(gradient)

    starts = itertools.product(
        (0, 5, 10, 15, 20), (0, 5, 10, 15, 20), (-1, 0, 1), *[(0, 0.5, 1)] * 2
    )
    fits = [
        optimize.minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 300})
        for start in starts
    ]
    best = min(fits, key=lambda one: one.fun).x
    # the valley is flat: where L-BFGS stops in it depends on the machine
    best = optimize.minimize(loss, best, jac=True, method="BFGS", options={"gtol": 1e-10}).x
    logs = (np.log(test.values[name]) for name in "ND")
    return np.asarray(special.logsumexp(terms(best, *logs), axis=0))


# --- the constants of the intervals


def calibrate(scores: Sequence[Score]) -> tuple[Array, float]:
    """Return the shape by the likelihood of the errors, a table as much as another, and the
    quantile that covers ``LEVEL`` of them."""

    def misfit(logs: Array) -> float:
        total = 0.0
        for one in scores:
            scale = logs[0] + np.log(np.hypot(one.scatter, one.beyond(np.exp(logs[1:]))))
            total -= float(np.mean(stats.t.logpdf(one.errors * np.exp(-scale), TAILS) - scale))
        return total / len(scores) + float(np.sum(((logs - START) / PRIOR)[1:] ** 2) / 2)

    shape = np.exp(optimize.minimize(misfit, START, method="BFGS").x[1:])
    sizes, weights = [], []
    for one in scores:  # what is left of an error beside the scatter
        left = np.maximum(one.errors**2 - (forecast.NORMAL * one.scatter) ** 2, 0.0)
        sizes.append(np.sqrt(left) / one.beyond(shape))
        weights.append(np.full(len(left), 1 / len(left)))
    each = np.concatenate(sizes)
    order = np.argsort(each)
    share = np.cumsum(np.concatenate(weights)[order]) / len(scores)
    return shape, float(each[order][np.searchsorted(share, LEVEL)])


def summary(scores: Sequence[Score], leave_out: bool) -> pd.DataFrame:
    """Return a row a table and cut; intervals by the other families, or by the constants in use."""
    rows = []
    for one in scores:
        reach = one.reach
        if leave_out:
            shape, quantile = calibrate([s for s in scores if s.family != one.family])
            reach = np.hypot(forecast.NORMAL * one.scatter, quantile * one.beyond(shape))
        rows.append(
            {
                "table": one.table,
                "cut": one.split,
                "runs": one.runs,
                "predicted": len(one.errors),
                "error": one.error,
                "covered": 100 * one.covered(reach),
                "half_width": 100 * float(np.sinh(reach).mean()),
                "scipy": one.scipy,
                "best_cheaper": one.best,
                "plane": one.plane,
            }
        )
    return pd.DataFrame(rows)


def markdown(table: pd.DataFrame) -> str:
    means = table.drop(columns=["table", "runs"]).groupby("cut").mean()
    losses = table["covered"] * table["predicted"]
    pooled = losses.groupby(table["cut"]).sum() / table["predicted"].groupby(table["cut"]).sum()
    lines = [
        "| table | cut | runs | predicted | error, % | in interval, % | ±, % | scipy "
        "| best cheaper run | plane |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    shown = ["error", "covered", "half_width", "scipy", "best_cheaper", "plane"]
    for row in table.to_dict("records"):
        cells = [row["table"], row["cut"], row["runs"], row["predicted"]]
        cells += [f"{row[name]:.3g}" for name in shown]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    for cut, row in means.iterrows():
        cells = ["**mean**", cut, "", "", *(f"**{row[name]:.3g}**" for name in shown)]
        cells[5] += f" ({pooled[cut]:.3g} of all losses)"
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    others = [Path(word) for word in sys.argv[1:]]
    paths = others or sorted((HERE / "tables").glob("*.csv"))
    scores = [one for path in paths for one in score(path)]
    table = summary(scores, leave_out=not others)
    print(markdown(table))
    if others:
        return  # the constants in use were fitted to other tables
    write_text(HERE / "bank.csv", table.to_csv(index=False, lineterminator="\n"))
    shape, quantile = calibrate(scores)
    each = ", ".join(f"{constant:.3g}" for constant in shape)
    constants = f"Constants by all tables: shape {each}; quantile {quantile:.3g}.\n"
    page = HERE / "README.md"
    numbers = f"{markdown(table)}\n{constants}"
    write_text(page, MARKS.sub(lambda m: f"{m[1]}{numbers}{m[2]}", page.read_text()))


if __name__ == "__main__":
    main()
