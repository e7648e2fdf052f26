"""Which runs are meant, and what they are called.  Torch-free."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from tinygpt import rundir
from tinygpt.config import ConfigError


def find(runs: Sequence[str | Path]) -> tuple[list[Path], list[Path]]:
    """The runs that are named, or lie in folders that are; and of those in folders the runs that
    have no checkpoint.  Raises ConfigError."""
    found: list[Path] = []
    without: list[Path] = []
    for name in runs:
        path = Path(name).expanduser()
        if not path.is_dir():
            raise ConfigError(f"runs={name}: no such folder")
        inside = rundir.find_runs(path)
        if not inside:
            raise ConfigError(f"runs={name}: no runs in there")
        for one in inside:
            kept = one == path or any(rundir.RunDir(one).checkpoints.glob("[!.]*.ckpt"))
            (found if kept else without).append(one)
    if not found:
        raise ConfigError(f"runs={','.join(map(str, runs))}: none of them has a checkpoint")
    return list(dict.fromkeys(found)), without


def names_of(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell the runs apart."""
    parts = [path.resolve().parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = [os.path.join(*some[-length:]) for some in parts]
        if len(set(names)) == len(names):
            break
    return names
