"""Learning rate × width from runs.csv → learning_rate.png and the best rates.

python -m tinygpt.run experiment=learning_rate        the runs: 25 minutes on two cores
cp outputs/learning_rate-laptop/sweep_summary.csv experiments/mup/runs.csv
python experiments/mup/plot.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

HERE = Path(__file__).parent


def best_rate(losses: pd.Series) -> float:
    """Where the parabola through the best rate and its neighbours, in log rate, is lowest."""
    losses = losses.dropna()
    at = int(np.clip(losses.argmin(), 1, len(losses) - 2))
    x, y = np.log2(losses.index[at - 1 : at + 2]), losses.iloc[at - 1 : at + 2]
    a, b, _ = np.polyfit(x, y, 2)
    if a <= 0 or losses.argmin() in (0, len(losses) - 1):
        return float(losses.index[losses.argmin()])  # at the edge of what was tried
    return float(2 ** (-b / (2 * a)))


def main() -> None:
    runs = pd.read_csv(HERE / "runs.csv")
    if "parametrization" not in runs:
        runs["parametrization"] = runs["config.model.parametrization"]
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True)
    for axis, kind in zip(axes, ("standard", "mup"), strict=True):
        some = runs[runs["parametrization"] == kind]
        for n, (width, group) in enumerate(some.groupby("d_model")):
            by_rate = group.groupby("learning_rate")["final_val_loss"]
            mean, low, high = by_rate.mean(), by_rate.min(), by_rate.max()
            color = plt.cm.viridis(n / 3.5)
            axis.fill_between(mean.index, low, high, color=color, alpha=0.2)
            axis.plot(mean.index, mean, "o-", color=color, label=f"{width}")
            best = best_rate(mean)
            axis.axvline(best, color=color, linestyle=":", linewidth=1)
            print(f"{kind:<10} d_model {width:>4}  best rate {best:.2e}  loss {mean.min():.4f}")
        axis.set_xscale("log", base=2)
        rates = sorted(some["learning_rate"].unique())
        axis.set_xticks(rates, [f"{rate:g}" for rate in rates])
        axis.set_xlabel("learning rate")
        axis.set_title(kind)
    axes[0].set_ylim(runs["final_val_loss"].min() - 0.1, 4.5)
    axes[0].set_ylabel("final validation loss, nats per token")
    axes[0].legend(title="d_model")
    figure.tight_layout()
    figure.savefig(HERE / "learning_rate.png", dpi=110)


if __name__ == "__main__":
    main()
