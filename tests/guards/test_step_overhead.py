"""The trainer adds little to a step.  Slow, and never part of the default suite: it measures time.

Run it on an idle machine: ``python -m pytest -m slow -s tests/guards/test_step_overhead.py``.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from tests.guards.commands import OLD, succeed

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

STEPS, ROUNDS = 300, 3
MOST = 1e-3  # seconds that a step of the trainer may take beyond one of the bare loop


def test_lightning_adds_at_most_a_millisecond_to_a_step(old: Path) -> None:
    """Compare the trainer with a bare loop over the same model, in turns in one process.

    The bare loop has no data, clipping of its own kind, logging or checkpoints: forward, loss,
    backward, clip, AdamW.  The best of three rounds counts on both sides.
    """
    import torch
    from torch.nn import functional

    from tinygpt import load_run

    words = json.loads((OLD / "losses.json").read_text())["runs"]["gpt2"]["overrides"]
    longer = [f"train.steps={STEPS}", "train.log_every=100", "train.eval_every=1_000_000"]
    ours, bare = [], []
    for number in range(ROUNDS):
        place = ["study=overhead", f"run_name=round-{number}"]
        succeed("run", *words, *longer, *place)
        folder = Path("outputs", "overhead", f"round-{number}")
        ours.append(json.loads((folder / "results.json").read_text())["seconds_training"] / STEPS)

        model = load_run(folder).model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, foreach=True)
        tokens = torch.randint(0, 258, (8, 33))
        start = time.perf_counter()
        for _ in range(STEPS):
            logits = model(tokens[:, :-1])
            loss = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        bare.append((time.perf_counter() - start) / STEPS)
    told = f"trainer {1e3 * min(ours):.2f} ms a step, bare loop {1e3 * min(bare):.2f} ms"
    print(told)
    assert min(ours) - min(bare) <= MOST, told
