"""Study how a trained run adapts to new text (``python -m tinygpt.adapt``)."""

from __future__ import annotations

import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from tinygpt import cli
from tinygpt.config import ConfigError


@hydra.main(config_path=cli.CONF_DIR, config_name=cli.ADAPT.file, version_base="1.3")
@cli.one_line_errors
def job(composed: DictConfig) -> None:
    """Run one adaptation study."""
    overrides = list(HydraConfig.get().overrides.task)
    config = cli.checked_adaptation(composed, overrides)
    from tinygpt.sweeping.jobs import study_name
    from tinygpt.sweeping.kinds import ADAPTATION
    from tinygpt.sweeping.study import run_study

    if config.plan:
        run_study([overrides], ADAPTATION)
        return
    config.study = config.study or study_name(config, overrides, ADAPTATION.study)

    from rich.console import Console

    from tinygpt.adaptation.loop import adapt

    cli.loaded()
    console = Console(markup=False)
    adapt(config, overrides, console)
    assert config.run_name is not None
    folder = Path(config.output_dir, config.study, config.run_name)
    report, results = folder / "fit" / ADAPTATION.report, folder / "results.json"
    if config.fit and not (report.exists() and report.stat().st_mtime >= results.stat().st_mtime):
        ADAPTATION.fit(folder, console)


@cli.one_line_errors
def main() -> None:
    for word in sys.argv[1:]:
        if word.startswith("hydra/sweeper=") and word != "hydra/sweeper=tinygpt":
            raise ConfigError(
                f"{word}: minimizes one number, but an adaptation has several; "
                "--multirun tries every combination"
            )
    cli.start(cli.ADAPT, job)


if __name__ == "__main__":
    main()
