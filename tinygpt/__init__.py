"""tinygpt: from text to a scaling law with error bars."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tinygpt.evaluating.runs import evaluate_runs as evaluate_runs
    from tinygpt.evaluating.runs import loss_by_position as loss_by_position
    from tinygpt.evaluating.table import compare as compare
    from tinygpt.trained import TrainedRun as TrainedRun
    from tinygpt.trained import load_run as load_run

__version__ = "0.1.0"
__all__ = ["TrainedRun", "compare", "evaluate_runs", "load_run", "loss_by_position"]

_HOME = {
    "TrainedRun": "tinygpt.trained",
    "compare": "tinygpt.evaluating.table",
    "evaluate_runs": "tinygpt.evaluating.runs",
    "load_run": "tinygpt.trained",
    "loss_by_position": "tinygpt.evaluating.runs",
}


def __getattr__(name: str) -> Any:
    """Public names come from where they live when they are first used: torch takes seconds."""
    if name not in _HOME:
        raise AttributeError(f"module 'tinygpt' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
