"""Train small GPTs on a text, and fit scaling laws with error bars to them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tinygpt.config import Config
    from tinygpt.data.datamodule import TokenData as TokenData
    from tinygpt.evaluating.runs import evaluate_runs as evaluate_runs
    from tinygpt.evaluating.runs import loss_by_position as loss_by_position
    from tinygpt.evaluating.table import compare as compare
    from tinygpt.runs.load import TrainedRun as TrainedRun
    from tinygpt.runs.load import load_run as load_run
    from tinygpt.training.module import LanguageModel as LanguageModel

__version__ = "0.1.0"
_HOME = {  # public names are imported on first use, because torch takes seconds to import
    "LanguageModel": "tinygpt.training.module",
    "TokenData": "tinygpt.data.datamodule",
    "TrainedRun": "tinygpt.runs.load",
    "compare": "tinygpt.evaluating.table",
    "evaluate_runs": "tinygpt.evaluating.runs",
    "load_run": "tinygpt.runs.load",
    "loss_by_position": "tinygpt.evaluating.runs",
}
__all__ = ["compose", *_HOME]


def compose(*overrides: str) -> Config:
    """Return the configuration of ``python -m tinygpt.run`` with these ``key=value`` overrides.

    Raises ConfigError, one line, for a mistake in them.
    """
    from tinygpt.cli import compose_config

    return compose_config(overrides)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'tinygpt' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
