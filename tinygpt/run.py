"""``python -m tinygpt.run``: train one model, or a sweep of them with ``--multirun``."""

from __future__ import annotations

import math

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from tinygpt import cli


@hydra.main(config_path=cli.CONF_DIR, config_name=cli.RUN.file, version_base="1.3")
@cli.one_line_errors
def job(composed: DictConfig) -> float:
    """One run; returns its final validation loss."""
    overrides = list(HydraConfig.get().overrides.task)
    config = cli.checked(composed, overrides)
    from tinygpt.sweeping.jobs import study_name
    from tinygpt.sweeping.study import run_study

    if config.plan:
        run_study([overrides])
        return math.nan
    config.study = config.study or study_name(config, overrides)

    from rich.console import Console

    from tinygpt.training.session import train

    cli.loaded()

    results = train(config, overrides, Console(markup=False))
    loss = results["final_val_loss"]
    if results["status"] == "diverged":
        raise SystemExit(1)
    return math.inf if loss is None else loss


@cli.one_line_errors
def main() -> None:
    cli.start(cli.RUN, job)


if __name__ == "__main__":
    main()
