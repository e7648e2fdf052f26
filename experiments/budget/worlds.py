"""Simulates laws within a budget where the truth is known, on a simulated clock.

python experiments/budget/worlds.py        100 studies; writes worlds.csv and the page
python experiments/budget/worlds.py 20     so many, printed alone

The true loss is a law that the forecast does not have; runs scatter as the seeds of
experiments/grid_books do, those of one trunk alike.  Two workers make the runs that
``tinygpt.scaling.design`` chooses, for 20 core-minutes.  After half of the time the loss of the
most expensive run is predicted, which one of them then trains; at the end, the loss at ten times
its compute.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tinygpt.fileio import write_text
from tinygpt.scaling.design import Design
from tinygpt.scaling.noise import guessed
from tinygpt.sweeping.recipe import COSTLIEST, LONGEST

sys.path.insert(0, str(Path(__file__).parents[1] / "bank"))
import worlds as bank

HERE = Path(__file__).parent
MARKS = re.compile(r"(<!-- worlds -->\n).*?(<!-- end -->\n)", re.S)
STUDIES, WORKERS, BUDGET = 100, 2, 600.0  # seconds of each worker
SIZES = np.array([6592, 25472, 56640, 100096, 223872, 396800, 890112], dtype=float)
STEP_SECONDS = np.array([0.006, 0.008, 0.011, 0.014, 0.022, 0.033, 0.06])
LENGTHS, BATCH, BESIDE = 64_000 * 2.0 ** np.arange(6), 256, 3.0
TRUNK = 0.85  # correlation of a seed's luck at one length and at twice as much, as in grids.py
LAWS = ("chinchilla", "chinchilla_tied", "coupled", "kaplan_constant")


def noise_of(tokens: Any) -> Any:
    """Return the scatter of log L between seeds, as measured in grid_books by its steps."""
    return np.interp(
        np.log(tokens / BATCH),
        np.log(bank.LENGTHS / 512),
        bank.SCATTER["measured"],
    )


def luck(random: np.random.Generator) -> np.ndarray:
    """Return what a seed does to each length of a trunk, in standard deviations."""
    steps = random.standard_normal(len(LENGTHS))
    for i in range(1, len(steps)):
        steps[i] = TRUNK * steps[i - 1] + np.sqrt(1 - TRUNK**2) * steps[i]
    return steps


def study(number: int) -> list[dict[str, Any]]:
    """Return the errors of log L of one study, with the half-widths of their intervals."""
    random = np.random.default_rng([number, 21])
    forms = bank.truths(random)["outside"]
    form = forms[number % len(forms)]
    rows = [
        {"N": n, "D": d, "seconds": BESIDE + step * (d / BATCH + 200)}
        for _ in range(3)
        for n, step in zip(SIZES, STEP_SECONDS, strict=True)
        for d in LENGTHS
    ]
    table = pd.DataFrame(rows)
    table["trunk"] = np.repeat(np.arange(3 * len(SIZES)), len(LENGTHS))
    table["luck"] = np.concatenate([luck(random) for _ in range(3 * len(SIZES))])
    largest = LONGEST * BUDGET / STEP_SECONDS[4] * BATCH
    test = {"N": SIZES[4], "D": min(largest, LENGTHS[-1])}
    is_cheap = table["seconds"] <= COSTLIEST * LONGEST * BUDGET
    is_small = table["N"] * table["D"] <= COSTLIEST * test["N"] * test["D"]
    table = table[is_cheap & is_small]
    last = {**test, "trunk": -1, "luck": random.standard_normal()}
    last["seconds"] = BESIDE + STEP_SECONDS[4] * (test["D"] / BATCH + 200)
    table = pd.concat([table, pd.DataFrame([last])], ignore_index=True)
    n, d, seconds = (table[name].to_numpy() for name in ("N", "D", "seconds"))
    losses = form(5e4 / n, 1e6 / d) * np.exp(noise_of(d) * table["luck"].to_numpy())
    target = {name: value * 10**0.5 for name, value in test.items()}
    design = Design(
        table[["N", "D"]],
        pd.DataFrame([target]),
        seconds,
        6 * n * d,
        LAWS,
        guessed(d / BATCH),
        trunks=table["trunk"].to_numpy(),
    )
    row_of_test, said = len(table) - 1, None
    workers: list[tuple[float, int | None]] = [(0.0, None)] * WORKERS  # free at, with what run
    while workers:
        workers.sort(key=lambda one: one[0])
        now, ended = workers.pop(0)
        if ended is not None:
            design.tell(ended, float(losses[ended]))
        pending = [row for _, row in workers if row is not None]
        left = (BUDGET if said else (1 - LONGEST) * BUDGET) - now
        is_over = said is not None and row_of_test not in pending
        able = (seconds <= left) & (np.arange(len(table)) != row_of_test)
        found = None if is_over else design.next(able, pending)
        if found is not None:
            workers.append((now + seconds[found[0]], found[0]))
        elif said is None and not pending:
            said = predicted(design, test)
            workers += [(now + seconds[row_of_test], row_of_test), (now, None)]
    assert said is not None
    out = []
    pairs = (("test run", test, said), ("ten times", target, predicted(design, target)))
    for what, place, (log_loss, half) in pairs:
        truth = float(np.log(form(5e4 / place["N"], 1e6 / place["D"])))
        chance = float(noise_of(place["D"])) * random.standard_normal()
        measured = np.log(losses[-1]) if place is test else truth + chance
        one = {"what": what, "error": log_loss - measured, "reach": half}
        out.append({**one, "runs": len(design.losses)})
    return out


def predicted(design: Design, place: dict[str, float]) -> tuple[float, float]:
    """Return the log loss at a place by all runs that have ended, and its half-width."""
    made = design.fit()
    assert made is not None
    there = {name: np.array([value]) for name, value in place.items()}
    log_loss, half = made.at(there, 6 * there["N"] * there["D"])
    return float(log_loss[0]), float(half[0])


def score(count: int) -> pd.DataFrame:
    """Return a row for each place: mean error and half-width in %, and coverage in %."""
    runs = pd.DataFrame([row for i in range(count) for row in study(i)])
    rows = []
    for what, one in runs.groupby("what", sort=False):
        rows.append(
            {
                "predicted": what,
                "studies": count,
                "runs": one["runs"].mean(),
                "error": 100 * one["error"].abs().mean(),
                "covered": 100 * (one["error"].abs() <= one["reach"]).mean(),
                "half_width": 100 * one["reach"].mean(),
            }
        )
    return pd.DataFrame(rows)


def markdown(table: pd.DataFrame) -> str:
    lines = ["| predicted | studies | runs of each | error, % | in interval, % | ±, % |"]
    lines.append("|---|---|---|---|---|---|")
    for row in table.to_dict("records"):
        numbers = (row[name] for name in ("runs", "error", "covered", "half_width"))
        cells = [row["predicted"], row["studies"], *(f"{number:.3g}" for number in numbers)]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    if sys.argv[1:]:
        print(markdown(score(int(sys.argv[1]))))
        return
    table = score(STUDIES)
    print(markdown(table))
    write_text(HERE / "worlds.csv", table.to_csv(index=False, lineterminator="\n"))
    page = HERE / "README.md"
    write_text(page, MARKS.sub(lambda m: f"{m[1]}{markdown(table)}{m[2]}", page.read_text()))


if __name__ == "__main__":
    main()
