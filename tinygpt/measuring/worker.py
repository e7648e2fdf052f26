"""``python -m tinygpt.measuring.worker JOB``: one process that works in turns; see ``turns``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from tinygpt import cli
from tinygpt.measuring.jobs import Job
from tinygpt.measuring.turns import Player


def main() -> None:
    job, player = Job.read(sys.argv[1]), Player()
    with player.failing_in_a_line():
        play(job, player)


def play(job: Job, player: Player) -> None:
    config = cli.compose_config(job.overrides)
    tokens = Path(job.tokens)
    from tinygpt.measuring import kernels, training
    from tinygpt.measuring.tokens import open_tokens
    from tinygpt.training.session import open_data, open_machine

    if job.measure in ("train", "parts"):
        training.play_training(
            config,
            tokens,
            player,
            warmup=job.warmup,
            by_part=job.measure == "parts",
            probe=job.probe,
        )
    device = open_machine(config)
    data = open_data(config, open_tokens(tokens), device)
    facts: dict[str, Any] = training.facts_of(config, data, device)
    clock, vocab_size = training.clock_of(device), data.prepared.tokenizer.vocab_size
    if job.measure == "gemm":
        work = kernels.matrix_product(device, clock)
    elif job.measure == "attention":
        work = kernels.attention(config, device, clock)
    elif job.measure == "generation":
        work = kernels.generation(config, vocab_size, device, clock)
    else:
        work, facts["vocab_size"] = kernels.tokenization(config, vocab_size, clock)
    player.serve(facts, work)


if __name__ == "__main__":
    main()
