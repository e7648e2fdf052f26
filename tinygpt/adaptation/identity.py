"""Which adaptation a configuration is: its hash, and the folder it goes to.  Torch-free."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from tinygpt import fileio, rundir
from tinygpt.adaptation.config import AdaptConfig, methods_of
from tinygpt.data import corpora

STUDY = "adaptation"  # that an adaptation goes to where none is named
# What fingerprints stand for, so that all of it may be moved.
PLACES = ("run", "checkpoint")


def contents(config: AdaptConfig) -> dict[str, str]:
    """Fingerprints of all that a configuration names and does not hold, for its hash.

    Raises ConfigError for a base that is not there.
    """
    base = rundir.open_run(config.run)
    found = {
        "run": fileio.read_json(base.environment)[
            "config_hash"
        ],  # its own text, for what it forgets
        "checkpoint": fileio.sha256(base.chosen(config.checkpoint)),
        "tokenizer": fileio.sha256(base.tokenizer),
    }
    if config.data is not None:
        found["data"] = corpora.open_corpus(config.data).fingerprint()
    path = getattr(config.policy, "path", None)
    if path is not None:
        found["policy"] = _fingerprint(Path(path).expanduser())
    return found


def _fingerprint(path: Path) -> str:
    """Of a file, or of the files in a folder; a name that is neither stands for itself."""
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file())
        return fileio.digest([[file.name, fileio.sha256(file)] for file in files])
    return fileio.sha256(path) if path.is_file() else str(path)


def config_hash(config: AdaptConfig, content: dict[str, str]) -> str:
    """The hash of all that changes a result; ``content`` is that of ``contents``."""
    left_out = (*rundir.NOT_SCIENCE, *PLACES)
    values = {k: v for k, v in dataclasses.asdict(config).items() if k not in left_out}
    for name in rundir.DATA_PLACES:
        (values["data"] or {}).pop(name, None)
    values["policy"].pop("path", None)
    values["methods"] = methods_of(config)
    # as earlier versions had them, so that what was adapted then is still found
    values["outer"]["shared"], values["tuning"]["directives"] = False, 24
    return fileio.digest({**values, "content": content})


def identify(config: AdaptConfig, overrides: Sequence[str]) -> tuple[str, rundir.RunDir]:
    """The configuration's hash and folder; fills in ``study`` and ``run_name``."""
    hash_ = config_hash(config, contents(config))
    config.study = config.study or STUDY
    folder = rundir.folder_of(config, overrides, hash_)
    config.run_name = folder.name
    return hash_, rundir.RunDir(folder)
