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
from hydra.types import RunMode
from omegaconf import DictConfig

from tinygpt import cli
from tinygpt.config import ConfigError, typed


@hydra.main(config_path=cli.CONF_DIR, config_name="config", version_base="1.3")
@cli.one_line_errors
def job(composed: DictConfig) -> float:
    """One run; returns its final validation loss, for a sweeper that optimises."""
    hydra_config = HydraConfig.get()
    overrides = list(hydra_config.overrides.task)
    config = typed(composed, overrides)
    if config.study is None:
        config.study = hydra_config.runtime.choices.get("experiment") or "runs"

    from rich.console import Console

    from tinygpt.training.session import train

    results = train(config, overrides, Console())
    loss = results["final_val_loss"]
    if results["status"] == "diverged" and hydra_config.mode == RunMode.RUN:
        raise SystemExit(1)
    return math.inf if loss is None else loss


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
    arguments = parser.parse_args(sys.argv[1:])
    shown = (arguments.help, arguments.hydra_help, arguments.info, arguments.shell_completion)
    cli.register_schemas()
    if not any(shown):
        # every mistake is found here, before torch is imported and before anything is written
        cli.compose_jobs(arguments.overrides, arguments.multirun)
        keys = {item.split("=")[0] for item in arguments.overrides}
        if arguments.multirun and not keys & {"study", "experiment"}:
            sys.argv.append(f"study={sweep_name(arguments.overrides)}")
    job()


if __name__ == "__main__":
    main()
