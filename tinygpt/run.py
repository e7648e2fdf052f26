"""``python -m tinygpt.run``: train one model, or a sweep of them with ``--multirun``."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from tinygpt import cli
from tinygpt.config import Config, ConfigError


@hydra.main(config_path=cli.CONF_DIR, config_name="config", version_base="1.3")
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

    results = train(config, overrides, Console())
    loss = results["final_val_loss"]
    if results["status"] == "diverged":
        raise SystemExit(1)
    return math.inf if loss is None else loss


def check_single(config: Config, overrides: Sequence[str]) -> None:
    """Refuses what only a sweep can use.  Raises ConfigError."""
    keys = {item.split("=")[0] for item in overrides}
    if config.launcher.kind != "serial":
        raise ConfigError(f"launcher={config.launcher.kind}: needs --multirun, or an experiment")
    if config.sweep.stack != "off":
        raise ConfigError(f"sweep.stack={config.sweep.stack}: needs --multirun, or an experiment")
    if "scale" in keys:
        raise ConfigError(f"scale={config.scale}: needs an experiment that has scales")


def sweep_name(overrides: Sequence[str]) -> str:
    """The study of a bare sweep, named after the keys that it sweeps."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    swept = [o.get_key_element().rsplit(".", 1)[-1] for o in parsed if o.is_sweep_override()]
    return "-".join(["sweep", *sorted(swept)])


def _unknown_option(message: str) -> NoReturn:
    raise ConfigError(f"{message.rpartition(': ')[2]}: no such option; --help shows what there is")


@cli.one_line_errors
def main() -> None:
    parser = get_args_parser()
    parser.error = _unknown_option  # type: ignore[method-assign]
    # it may stand anywhere; argparse wants options before or behind the overrides
    sys.argv[1:] = sorted(sys.argv[1:], key=lambda word: word not in ("--multirun", "-m"))
    arguments = parser.parse_args(sys.argv[1:])
    overrides = arguments.overrides
    if arguments.help:
        print(cli.help_text())
        return
    for name in ("config_path", "config_name", "config_dir", "experimental_rerun"):
        if getattr(arguments, name) is not None:  # others' configurations; a pickle
            _unknown_option(f"--{name.replace('_', '-')}")
    shown = (arguments.hydra_help, arguments.info, arguments.shell_completion)
    cli.register_schemas()
    if not any(shown):
        # every mistake is found before torch is imported and before anything is written: those
        # of a single run here, those of a sweep's jobs by sweeping
        if not cli.sweeps(overrides, arguments.multirun):
            check_single(cli.compose_config(overrides), overrides)
        elif not {item.split("=")[0] for item in overrides} & {"study", "experiment"}:
            sys.argv.append(f"study={sweep_name(overrides)}")
    job()


if __name__ == "__main__":
    main()
