"""Scores the forecast on simulated studies, where the truth is known.

python experiments/bank/worlds.py        200 studies of each kind; writes worlds.csv and the page
python experiments/bank/worlds.py 20     so many, printed alone

Each study has the design of experiments/grid_books: 5 sizes, 5 lengths, 2 seeds.  Its true loss is
a law that the forecast knows, or one that it does not; its noise is the same everywhere, or what
the seeds of grid_books scatter by at each length.  The forecast predicts the runs that a report
holds out, and a run at ten times the largest compute.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tinygpt.fileio import write_text
from tinygpt.scaling import forecast
from tinygpt.scaling.laws import LAWS

HERE = Path(__file__).parent
MARKS = re.compile(r"(<!-- worlds -->\n).*?(<!-- end -->\n)", re.S)
STUDIES = 200
Array = NDArray[np.float64]
SIZES = np.array([6592, 25472, 56640, 100096, 223872], dtype=float)
LENGTHS = np.array([249856, 499712, 999424, 1998848, 3999744], dtype=float)
SCATTER = {  # standard deviations of log L, by length
    "equal": np.full(5, 0.003),
    "measured": np.array([0.0213, 0.0175, 0.0044, 0.0011, 0.0032]),
}
LAWS_TRIED = [name for name, law in LAWS.items() if set(law.variables) == {"N", "D"}]
Truth = Callable[[Array, Array], Array]


def truths(random: np.random.Generator) -> dict[str, list[Truth]]:
    """Return laws with random parameters, of x = 5e4 / N and y = 1e6 / D: such as the forecast
    averages, and others."""
    alpha, beta = random.uniform(0.25, 0.5, 2)
    e, a, b = random.uniform([1.2, 0.5, 0.5], [2.4, 1.5, 1.5])
    gamma = random.uniform(0.3, 0.8)
    inside: list[Truth] = [
        lambda x, y: e + a * x**alpha + b * y**beta,  # Chinchilla's
        lambda x, y: e + (a * x ** (alpha / gamma) + b * y ** (beta / gamma)) ** gamma,  # coupled
        lambda x, y: e + (a * x ** (alpha / beta) + b * y) ** beta,  # Kaplan's, with E
    ]
    outside: list[Truth] = [
        # small models gain more from data
        lambda x, y: e + a * x**alpha + b * y**beta + 0.5 * x**alpha * y**beta,
        # the exponent of D falls with N, as in Farseer (arXiv:2506.10972)
        lambda x, y: e + a * x**alpha + b * y ** (beta * x**0.03),
        # short runs stand still before they learn
        lambda x, y: e + a * x**alpha + b / (1 + (0.4 * y) ** (-2 * beta)),
    ]
    return {"inside": inside, "outside": outside}


def study(kind: str, noise: str, number: int) -> list[dict[str, Any]]:
    """Return for one study the errors of log L and the half-widths of their intervals."""
    random = np.random.default_rng([number, len(kind), len(noise)])
    forms = truths(random)[kind]
    form, scatter = forms[number % len(forms)], SCATTER[noise]
    n, d = (np.repeat(axis.ravel(), 2) for axis in np.meshgrid(SIZES, LENGTHS))
    noises = scatter[np.searchsorted(LENGTHS, d)] * random.standard_normal(len(n))
    table = pd.DataFrame({"N": n, "D": d, "loss": form(5e4 / n, 1e6 / d) * np.exp(noises)})
    groups = np.arange(len(n)) // 2
    columns = {"N": "N", "D": "D"}
    sample = forecast.Sample(table, LAWS_TRIED, columns, "loss", 6 * n * d, groups)
    held = forecast.hold_out(sample)
    assert held is not None
    above = sample.rows(held.above)
    found = _errors("held out", held.below, above.values, above.measured)
    far = {"N": np.array([SIZES[-1] * 10**0.5]), "D": np.array([LENGTHS[-1] * 10**0.5])}
    loss = form(5e4 / far["N"], 1e6 / far["D"])
    measured = np.log(loss) + scatter[-1] * random.standard_normal()
    return found + _errors("ten times", forecast.forecast(sample), far, measured)


def _errors(
    what: str, made: forecast.Forecast, there: dict[str, Array], measured: Array
) -> list[dict[str, Any]]:
    predicted, reach = made.at(there, 6 * there["N"] * there["D"])
    each = zip(np.abs(predicted - measured), reach, strict=True)
    return [{"what": what, "error": error, "reach": half} for error, half in each]


def score(count: int) -> pd.DataFrame:
    """Return a row for each kind of study: errors and half-widths in %, and coverage in %."""
    rows = []
    for kind in ("inside", "outside"):
        for noise in SCATTER:
            runs = pd.DataFrame([r for i in range(count) for r in study(kind, noise, i)])
            for what, one in runs.groupby("what"):
                rows.append(
                    {
                        "form": kind,
                        "noise": noise,
                        "predicted": what,
                        "studies": count,
                        "runs": len(one),
                        "error": 100 * one["error"].mean(),
                        "covered": 100 * (one["error"] <= one["reach"]).mean(),
                        "half_width": 100 * one["reach"].mean(),
                    }
                )
            print(pd.DataFrame(rows[-2:]).to_string(index=False), flush=True)
    return pd.DataFrame(rows)


def markdown(table: pd.DataFrame) -> str:
    lines = ["| form | noise | predicted | runs | error, % | in interval, % | ±, % |"]
    lines.append("|---|---|---|---|---|---|---|")
    for row in table.to_dict("records"):
        cells = [row["form"], row["noise"], row["predicted"], f"{row['runs']:,}"]
        cells += [f"{row[name]:.3g}" for name in ("error", "covered", "half_width")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    if sys.argv[1:]:
        score(int(sys.argv[1]))
        return
    table = score(STUDIES)
    write_text(HERE / "worlds.csv", table.to_csv(index=False, lineterminator="\n"))
    page = HERE / "README.md"
    text = MARKS.sub(lambda m: f"{m[1]}{markdown(table)}{m[2]}", page.read_text())
    write_text(page, text)


if __name__ == "__main__":
    main()
