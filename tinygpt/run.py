"""Train one model, or a sweep of models with ``--multirun``: ``python -m tinygpt.run``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from tinygpt import cli
from tinygpt.config import Config


@hydra.main(config_path=cli.CONF_DIR, config_name=cli.RUN.file, version_base="1.3")
@cli.one_line_errors
def job(composed: DictConfig) -> float:
    """Train one run and return its final validation loss."""
    overrides = list(HydraConfig.get().overrides.task)
    config = cli.checked(composed, overrides)
    from tinygpt.sweeping.jobs import study_name
    from tinygpt.sweeping.study import run_study

    if config.plan:
        run_study([overrides])
        return math.nan
    config.study = config.study or study_name(config, overrides)

    results = before(config)
    if results is None:
        from rich.console import Console

        from tinygpt.training.session import train

        cli.loaded()
        results = train(config, overrides, Console(markup=False))
    loss = results["final_val_loss"]
    if results["status"] == "diverged":
        raise SystemExit(1)
    return math.inf if loss is None else loss


def before(config: Config) -> dict[str, Any] | None:
    """Return the results of a finished run, without torch, or None if it must be trained.

    Raises ConfigError if the folder holds another run.
    """
    from rich.console import Console

    from tinygpt.data import corpora
    from tinygpt.runs import pretrained, rundir
    from tinygpt.training.console import report_finished

    run = rundir.RunDir(Path(config.output_dir, config.study or "runs", config.run_name or ""))
    if config.run_name is None or config.force or not run.config.exists():
        return None
    content = pretrained.contents(corpora.open_corpus(config.data), config)
    if (results := run.finished(run.hash_in(config, content))) is None:
        return None
    cli.loaded()
    return report_finished(run, results, Console(markup=False))


@cli.one_line_errors
def main() -> None:
    cli.start(cli.RUN, job)


if __name__ == "__main__":
    main()
