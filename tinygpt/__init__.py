"""tinygpt: from text to a scaling law with error bars."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tinygpt.trained import TrainedRun as TrainedRun
    from tinygpt.trained import load_run as load_run

__version__ = "0.1.0"
__all__ = ["TrainedRun", "load_run"]

_HOME = {"TrainedRun": "tinygpt.trained", "load_run": "tinygpt.trained"}


def __getattr__(name: str) -> Any:
    """Public names come from where they live when they are first used: torch takes seconds."""
    if name not in _HOME:
        raise AttributeError(f"module 'tinygpt' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
