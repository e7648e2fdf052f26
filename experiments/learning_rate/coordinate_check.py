"""The coordinate check of µP (Yang et al. 2022, appendix D.1), on the embedded corpus.

Mean |activation| of every block's output and of the logits after each of the first steps, for
growing width.  Under µP it must not grow with width.  Writes coordinate_check.csv and .png here:

    python experiments/learning_rate/coordinate_check.py        about two minutes on one core
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F

from tinygpt.cli import compose_config
from tinygpt.data import corpora, shards
from tinygpt.data.datamodule import TrainBatches
from tinygpt.model.gpt import GPT
from tinygpt.training.optim import make_optimizer
from tinygpt.training.session import open_data, open_machine

HERE = Path(__file__).parent
WIDTHS, SEEDS, STEPS = (32, 64, 128, 256), (1, 2, 3), 10


def measure(model: GPT, tokens: Tensor) -> dict[str, float]:
    """Mean |x| of what each block and the head give out."""
    found: dict[str, float] = {}

    def note(name: str) -> Any:
        def hook(module: Any, inputs: Any, out: Tensor) -> None:
            found[name] = out.abs().mean().item()

        return hook

    hooks = [b.register_forward_hook(note(f"block {n}")) for n, b in enumerate(model.blocks)]
    with torch.no_grad():
        found["logits"] = model(tokens).abs().mean().item()
    for handle in hooks:
        handle.remove()
    return found


def steps_of(parametrization: str, width: int, seed: int) -> Iterator[dict[str, Any]]:
    """One row a step and place: the first ``STEPS`` steps at the default rate, no warmup."""
    words = [f"model.parametrization={parametrization}", f"model.d_model={width}", f"seed={seed}"]
    config = compose_config([*words, f"model.n_heads={width // 16}", "hardware=cpu"])
    corpus, cache = corpora.open_corpus(config.data), shards.cache_root(None)
    prepared = shards.prepare(corpus, config.data, config.tokenizer, cache)
    data = open_data(config, prepared, open_machine(config))
    assert data.plan is not None
    batches = TrainBatches(
        data.splits["train"], data.windows, length=data.length, seed=seed, plan=data.plan
    )
    torch.manual_seed(seed)
    model = GPT(config.model, prepared.tokenizer.vocab_size)
    optimizer = make_optimizer(model, config.optim, fused=False)
    probe, _ = batches[STEPS]
    for step in range(STEPS + 1):
        for place, size in measure(model, probe).items():
            yield {
                "parametrization": parametrization,
                "d_model": width,
                "seed": seed,
                "step": step,
                "place": place,
                "mean_abs": size,
            }
        inputs, targets = batches[step]
        optimizer.zero_grad()
        F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()).backward()
        optimizer.step()


def plot(rows: pd.DataFrame) -> dict[tuple[str, str], float]:
    """One panel a parametrization and place; the slopes of the last step on log-log axes."""
    places = list(rows["place"].unique())
    figure, axes = plt.subplots(2, len(places), figsize=(4 * len(places), 6.5), sharex=True)
    slopes = {}
    for panels, kind in zip(axes, ("standard", "mup"), strict=True):
        for axis, place in zip(panels, places, strict=True):
            some = rows[(rows["parametrization"] == kind) & (rows["place"] == place)]
            for step in range(0, STEPS + 1, 2):
                mean = some[some["step"] == step].groupby("d_model")["mean_abs"].mean()
                axis.loglog(mean.index, mean, "o-", color=plt.cm.viridis(step / STEPS), label=step)
            slopes[kind, place] = np.polyfit(np.log(mean.index), np.log(mean), 1)[0]
            axis.set_title(f"{kind}, {place}: slope {slopes[kind, place]:+.2f}")
            axis.set_xticks(WIDTHS, [str(width) for width in WIDTHS])
            axis.minorticks_off()
    for axis in axes[-1]:
        axis.set_xlabel("d_model")
    axes[0, 0].set_ylabel("mean |activation|")
    axes[1, 0].set_ylabel("mean |activation|")
    axes[0, 0].legend(title="steps", fontsize=8)
    figure.tight_layout()
    figure.savefig(HERE / "coordinate_check.png", dpi=110)
    return slopes


if __name__ == "__main__":
    table = pd.DataFrame(
        row
        for kind in ("standard", "mup")
        for width in WIDTHS
        for seed in SEEDS
        for row in steps_of(kind, width, seed)
    )
    table.to_csv(HERE / "coordinate_check.csv", index=False, float_format="%.6g")
    for (kind, place), slope in plot(table).items():
        print(f"{kind:<10} {place:<10} {slope:+.3f}")
