"""The trainer adds little to a step.  Slow, and never part of the default suite: it measures time.

Run it on an idle machine: ``python -m pytest -m slow -s tests/guards/test_step_overhead.py``.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path

import pytest

from tests.guards.commands import OLD, succeed

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

SHORT, LONG, ROUNDS = 100, 400, 3
MOST = 1e-3  # seconds that a step of the trainer may take beyond one of the bare loop, or
SHARE = 0.5  # so much of a bare step, where that is more: a slow or busy machine takes longer


def test_lightning_adds_at_most_a_millisecond_to_a_step(old: Path) -> None:
    """Compare the trainer with a bare loop over the same model, in turns in one process.

    The bare loop reads no data and logs nothing: forward, loss, backward, clip, AdamW.  CPU time
    is taken, which other processes disturb little.  A long run less a short one leaves the steps
    alone, and the median of the rounds counts.
    """
    import torch
    from torch.nn import functional

    from tinygpt import load_run

    words = json.loads((OLD / "losses.json").read_text())["runs"]["gpt2"]["overrides"]
    words += ["train.log_every=1000", "train.eval_every=1_000_000"]

    def trained(steps: int, number: int) -> float:
        """Return the CPU seconds of a whole run."""
        place = ["study=overhead", f"run_name={steps}-{number}"]
        start = time.process_time()
        succeed("run", *words, f"train.steps={steps}", *place)
        return time.process_time() - start

    def looped(steps: int) -> float:
        """Return the CPU seconds of as many steps of the bare loop."""
        model = load_run(Path("outputs/overhead", f"{SHORT}-0")).model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, foreach=True)
        tokens = torch.randint(0, 258, (8, 33))
        start = time.process_time()
        for _ in range(steps):
            logits = model(tokens[:, :-1])
            loss = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return time.process_time() - start

    trained(8, 0)  # imports and text
    added, allowed = [], []
    for number in range(ROUNDS):
        trainer = trained(SHORT, number), trained(LONG, number)
        bare = looped(SHORT), looped(LONG)
        ours, theirs = ((long - short) / (LONG - SHORT) for short, long in (trainer, bare))
        print(f"trainer {1e3 * ours:.2f} ms a step, bare loop {1e3 * theirs:.2f} ms")
        added.append(ours - theirs)
        allowed.append(max(MOST, SHARE * theirs))
    assert statistics.median(added) <= statistics.median(allowed)
