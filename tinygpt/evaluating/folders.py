"""Which runs are meant, what they are called and where they are told of.  Torch-free."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from tinygpt import fileio, rundir
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
            raise rundir.no_runs(path)
        for one in inside:
            kept = any(rundir.RunDir(one).checkpoints.glob("[!.]*.ckpt"))
            if one == path and not kept:
                raise ConfigError(f"runs={name}: has no checkpoint")
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


def text_name(split: str, path: str | None) -> str:
    """The folder in ``evaluation/`` of what a text gave; none for the validation split."""
    if path is None:
        return "" if split == "val" else split
    place = os.path.abspath(os.path.expanduser(path))
    name = re.sub("[^A-Za-z0-9._-]+", "-", os.path.basename(place)).strip(".-") or "text"
    return f"{name[:60]}-{fileio.digest(place)[:6]}"  # books of one name lie in several folders


def folder_for(paths: Sequence[Path], output_dir: str | None, text: str = "") -> Path:
    """``evaluation/``, of any ``text`` but the validation split a folder in it, in the one run, or
    where the several lie.  Raises ConfigError where it cannot be written."""
    if output_dir is None:
        if len({path.is_absolute() for path in paths}) > 1:
            paths = [path.absolute() for path in paths]
        parents = [path.parent for path in paths] if len(paths) > 1 else paths
        output_dir = os.path.join(os.path.commonpath(parents), "evaluation", text)
    folder = Path(output_dir).expanduser()
    fileio.check_writable("output_dir", folder)
    return folder
