"""Name run folders, find them, read and write their files, and hash configurations.  Torch-free."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import os
import platform
import re
import subprocess
import typing
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tinygpt import fileio
from tinygpt.config import (
    CHOICES,
    HORIZONS,
    REMOVED,
    Config,
    ConfigError,
    Settings,
    SweepConfig,
    one_line,
    rate_is_scaled,
    variant,
)
from tinygpt.config.counting import resolved_d_ff
from tinygpt.runs.metrics import METRICS as METRICS
from tinygpt.runs.metrics import MetricsFile as MetricsFile

SCHEMA_VERSION = 1
# Keys that do not change the result of a run, and so are neither in its hash nor in its name.
NOT_SCIENCE = {
    *("hardware", "logger", "launcher", "sweep", "scale", "plan", "fit", "experiment"),
    *("output_dir", "cache_dir", "study", "run_name", "force"),
}
# Keys of ``train`` that do not change the weights: a run can be resumed with other values.
FREE = (
    *("log_every", "checkpoint_every", "keep_every", "sample_tokens", "sample_prompt"),
    "eval_share",
)
DATA_PLACES = ("path", "val_file", "test_file", "repo")  # the content is hashed instead
# The results that are the size of a run.
SIZES = ("model_parameters", "parameters_non_embedding", "train_tokens", "flops_exact")


def config_hash(config: Config, content: dict[str, str]) -> str:
    """Return the hash of everything that changes a result.

    ``content`` has the fingerprints of ``data``, ``tokenizer`` and ``init_from``, which replace
    their paths.  A key newer than the first runs counts only where it is used, so that earlier
    runs keep their hash.
    """
    values = {k: v for k, v in dataclasses.asdict(config).items() if k not in NOT_SCIENCE}
    data, model, train = values["data"], values["model"], values["train"]
    for section, names in ((data, DATA_PLACES), (values["tokenizer"], ("vocab_dir", "path"))):
        for name in names:
            section.pop(name, None)
    values.pop("init_from")
    flags = values.pop("trainer")
    trainer = {k: v for k, v in flags.items() if v or (k, v) == ("limit_test_batches", 0)}
    trainer.pop("profiler", None)
    values |= {"trainer": trainer} if trainer else {}
    newer: list[tuple[dict[str, Any], str, Any]] = [(values, "callbacks", {})]
    newer += [(train, "skip_nonfinite", False), (model, "rope_scaling", None)]
    if train["early_stopping_patience"] is None:  # otherwise it decides when a run stops
        train["eval_share"] = None
    newer += [(train, "eval_share", None), (train, "eval_on_start", True)]
    newer += [(data, name, None) for name in ("encoding", "delimiter", "header")]
    for section, name, unused in newer:
        if name in section and section[name] == unused:
            section.pop(name)
    return fileio.digest({**values, "content": content})


def effective_hash(config: Config, content: dict[str, str]) -> str:
    """Return a hash that two configurations share if they train the same weights.

    Defaults are resolved; values without effect on the weights are left out.
    """
    config = copy.deepcopy(config)
    model, train, schedule = config.model, config.train, config.schedule
    model.d_ff = resolved_d_ff(model)
    model.n_kv_heads = model.n_kv_heads or model.n_heads
    model.rope_theta = model.rope_theta if model.position == "rope" else 0.0
    config.optim.scale_rate_with_width = rate_is_scaled(model, config.optim)
    if model.parametrization == "standard" and not config.optim.scale_rate_with_width:
        model.mup_base_width = 0
    model.attention = ""  # both compute the same numbers
    model.gradient_checkpointing = False
    config.data.stride = config.data.stride or model.max_seq_len
    if schedule.warmup_steps is not None:
        schedule.warmup_fraction = 0.0
    train.log_every, train.checkpoint_every, train.keep_every = 1, None, None
    train.sample_prompt, train.sample_tokens = "", 0
    if train.early_stopping_patience is None:
        train.eval_every = None
    return config_hash(config, content)


def run_name(overrides: Sequence[str], config_hash: str) -> str:
    """Return a readable folder name: the overridden values, then six digits of the hash."""
    named: dict[str, str] = {}  # by full key: two keys may end alike
    for item in overrides:
        key, _, value = item.lstrip("+~").partition("=")
        group = key.split(".")[0]
        is_cleared = key.startswith("train.") and key[6:] in HORIZONS and value == "null"
        if group not in NOT_SCIENCE and not group.startswith("hydra") and not is_cleared:
            named[key] = unquoted(value).rstrip("/").rsplit("/", 1)[-1]
    words = sorted(f"{key.rsplit('.', 1)[-1]}-{value}" for key, value in named.items())
    text = re.sub(r"[^A-Za-z0-9._-]+", "-", "_".join(words))
    text = re.sub(r"-{2,}", "-", text).strip("-._")[:100].strip("-._")
    return f"{text or 'default'}-{config_hash[:6]}"


def unquoted(value: str) -> str:
    """Return the value of an override without the quotes around it."""
    match = re.fullmatch(r"'([^'\\]*)'|\"([^\"\\]*)\"", value)
    return (match[1] or match[2] or "") if match else value


def folder_of(config: Settings, named: Sequence[str], config_hash: str) -> Path:
    """Return the folder of the run with this hash, or a new folder named after ``named``.

    A run is thus found again if its overrides are written differently.
    """
    study = Path(config.output_dir) / (config.study or "runs")
    if config.run_name is not None:
        return study / config.run_name
    try:
        known = list(study.glob(f"*-{config_hash[:6]}"))
    except OSError as error:  # the name is too long
        line = f"output_dir={config.output_dir:.60}: cannot be written ({error.strerror})"
        raise ConfigError(line) from error
    for path in known:
        with contextlib.suppress(ConfigError, AttributeError):
            if fileio.read_json(path / "environment.json").get("config_hash") == config_hash:
                return path
    return study / run_name(named, config_hash)


def open_run(path: str | Path) -> RunDir:
    """Return the folder of a run that has begun.  Raises ConfigError for any other folder."""
    run = RunDir(Path(path).expanduser())
    check_name(run.path)
    if run.config.exists() and not is_adaptation(run.path):
        return run
    if not run.path.is_dir():
        raise ConfigError(f"run={path}: no such folder")
    if inside := find_runs(run.path):
        line = f"a folder of {len(inside)} runs; give one of them, as {inside[0]}"
        raise ConfigError(f"run={path}: {line}")
    raise ConfigError(f"run={path}: not the folder of a run{_adaptations_in(run.path)}")


def find_runs(folder: Path) -> list[Path]:
    """Return the folders of trainings in ``folder``, or itself, in natural order."""
    return [path for path in _begun(folder) if not is_adaptation(path)]


def find_adaptations(folder: Path) -> list[Path]:
    """Return the folders of adaptations in ``folder``, or itself, in natural order."""
    return [path for path in _begun(folder) if is_adaptation(path)]


def is_adaptation(folder: Path) -> bool:
    """Return whether a run's folder has an adaptation's records or configuration."""
    config = folder / "config.yaml"
    if (folder / "adapt.jsonl").exists():
        return True
    return config.exists() and re.search(rb"^documents:", config.read_bytes(), re.M) is not None


def no_runs(folder: Path) -> ConfigError:
    """Return the error for a folder without trainings."""
    return ConfigError(f"runs={folder}: no runs in there{_adaptations_in(folder)}")


def _adaptations_in(folder: Path) -> str:
    """Return the part of an error line that says which adaptations are in ``folder``."""
    adaptations = find_adaptations(folder)
    if folder in adaptations:
        return ", but of an adaptation"
    count = len(adaptations)
    return f", but {count} adaptation{'s' * (count > 1)}" if adaptations else ""


def _begun(folder: Path) -> list[Path]:
    found = [path.parent for path in folder.rglob("environment.json")]
    for path in found:
        check_name(path)

    def natural(path: Path) -> list[tuple[str, int]]:
        parts = re.findall(r"(\D*)(\d*)", str(path))
        return [(text, int(number or -1)) for text, number in parts]

    return sorted(found, key=natural)


def check_name(path: Path) -> None:
    """Raise ConfigError for a name that is not UTF-8, which tables cannot hold."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{path}: its name is not UTF-8; rename it") from error


def read_config(path: Path) -> Config:
    """Return the configuration in a run's ``config.yaml``; missing keys have their defaults.

    Raises ConfigError, naming the file, if it is not a configuration.
    """
    values = fileio.read_yaml(path)
    try:
        return config_from(values)
    except (ValueError, KeyError, TypeError, AttributeError, OmegaConfBaseException) as error:
        line = f"{path}: not the configuration of a run ({one_line(error)})"
        raise ConfigError(line) from error


def config_from(values: dict[str, Any]) -> Config:
    """Return the configuration with these plain values; missing keys have their defaults."""
    values = _literal(values)
    for name in REMOVED:  # keys of earlier versions
        section, _, last = name.partition(".")
        (values.get(section) or {}).pop(last, None)
    values["train"] = {"eval_share": None, **(values.get("train") or {})}  # of runs before the key
    typed = OmegaConf.structured(Config)
    for group in CHOICES:
        typed[group] = OmegaConf.structured(variant(group, values[group]))
    config = OmegaConf.to_object(OmegaConf.merge(typed, values))
    assert isinstance(config, Config)
    _check_tables(config)
    return config


def _check_tables(config: Any) -> None:
    """Raise ValueError for a string instead of a table; OmegaConf accepts one that has ``${``."""
    for name, kind in typing.get_type_hints(type(config)).items():
        value, kinds = getattr(config, name), (kind, *typing.get_args(kind))
        if dataclasses.is_dataclass(value):
            _check_tables(value)
        elif isinstance(value, str) and any(map(dataclasses.is_dataclass, kinds)):
            raise ValueError(f"{name}={value} is no table")


def _literal(value: Any) -> Any:
    """Escape interpolations, as a file from elsewhere could read environment variables."""
    if isinstance(value, dict):
        return {key: _literal(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_literal(inner) for inner in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


class RunDir:
    """Name the files in one run's folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.environment = path / "environment.json"
        self.tokenizer = path / "tokenizer.json"
        self.metrics = path / "metrics.csv"
        self.results = path / "results.json"
        self.samples = path / "samples.txt"
        self.error = path / "error.json"
        self.log = path / "run.log"
        self.mlflow = path / "mlflow.json"  # the id of the run in MLflow
        self.checkpoints = path / "checkpoints"
        self.last = self.checkpoints / "last.ckpt"
        self.records = path / "adapt.jsonl"  # of an adaptation, which has no metrics

    @property
    def events(self) -> Path:
        """Return the folder of TensorBoard's files: the run's, or a subfolder of older runs."""
        older = self.path / "tensorboard"
        return older if older.is_dir() else self.path

    def step(self, number: int) -> Path:
        return self.checkpoints / f"step_{number}.ckpt"

    def kept(self) -> list[str]:
        """Return the names of the checkpoints: steps in order, then best, last and final."""
        names = [path.stem for path in self.checkpoints.glob("*.ckpt") if path.name[0] != "."]
        steps = [name for name in names if re.fullmatch("step_[0-9]+", name)]
        steps.sort(key=lambda name: int(name[5:]))
        return [*steps, *(name for name in ("best", "last", "final") if name in names)]

    def chosen(self, checkpoint: str | None) -> Path:
        """Return the checkpoint of that name; None means ``final``, or ``last`` before the end.

        Raises ConfigError if there is none.
        """
        kept = self.kept()
        if not kept:
            raise ConfigError(f"run={self.path}: has no checkpoint")
        name = checkpoint or ("final" if "final" in kept else "last")
        if name not in kept:
            choices = f"there are {', '.join(kept)}"
            raise ConfigError(f"checkpoint={name}: not in {self.checkpoints}; {choices}")
        return self.checkpoints / f"{name}.ckpt"

    def _identity(self) -> Path | None:
        """Return the file that holds the hash of the run, None if no run has begun here."""
        return next((path for path in (self.results, self.environment) if path.exists()), None)

    def finished(self, config_hash: str, force: bool = False) -> dict[str, Any] | None:
        """Return the results if this run is finished, else None.

        Raises ConfigError if the folder is not a run's, or, without ``force``, if it is another
        run's.
        """
        begun = self._identity()
        if begun is None:
            # a run killed before it wrote environment.json leaves its log and hidden files
            others = self.path.iterdir() if self.path.is_dir() else ()
            if any(not path.name.startswith(".") and path.name != "run.log" for path in others):
                line = f"run_name={self.path.name}: {self.path} exists and is not a run's folder"
                raise ConfigError(line)
            return None
        values = fileio.read_json(begun)
        if values.get("config_hash") != config_hash and not force:
            raise self._another("")
        return values if begun == self.results and not force else None

    def _another(self, differs: str) -> ConfigError:
        return ConfigError(
            f"run_name={self.path.name}: {self.path} holds a run of another configuration"
            f"{differs}; choose another run_name, or force=true replaces it"
        )

    def hash_in(self, config: Config, content: dict[str, str]) -> str:
        """Return the hash of ``config``, or of a run here that differs only in ``FREE`` keys.

        Raises ConfigError, naming the keys that differ, for any other run.
        """
        asked, begun = config_hash(config, content), self._identity()
        stored = fileio.read_json(begun).get("config_hash") if begun else None
        is_new = config.force or stored in (None, asked) or not self.config.exists()
        if is_new or is_adaptation(self.path):
            return asked
        theirs = read_config(self.config)
        changed = _changed(dataclasses.asdict(theirs), dataclasses.asdict(config))
        decisive = {k: v for k, v in changed.items() if k not in [f"train.{n}" for n in FREE]}
        same_content = config_hash(theirs, content) == stored
        if same_content and not decisive:
            return str(stored)
        shown = [f"{key}={old}, not {new}" for key, (old, new) in decisive.items()]
        if not same_content and not any(key.startswith(("data.", "tokenizer.")) for key in changed):
            shown.append("another text or tokenizer behind the same keys")
        more = f" and {len(shown) - 4} more keys" if len(shown) > 4 else ""
        if set(decisive) <= {f"train.{name}" for name in HORIZONS}:
            more = f"; init_from={self.path} with another run_name trains on from its weights"
        raise self._another(f"; it has {', '.join(shown[:4])}{more}")

    def locked(self) -> contextlib.AbstractContextManager[None]:
        """Lock this folder.  Raises ConfigError if another process holds it."""
        return fileio.locked(self.path, self.path.parent.parent, "run")

    def clear(self) -> None:
        """Remove the files of the run that is here, the results first."""
        files = (self.results, self.error, self.metrics, self.samples, self.log, self.mlflow)
        for path in (*files, self.records):
            path.unlink(missing_ok=True)
        for path in [*self.checkpoints.glob("*"), *self.events.glob("events.out.tfevents.*")]:
            path.unlink()

    def write_config(self, config: Settings) -> None:
        """Write config.yaml without the tables of a sweep."""
        alone = copy.copy(config)
        alone.sweep = SweepConfig()
        fileio.write_text(self.config, OmegaConf.to_yaml(OmegaConf.structured(alone)))


def _changed(theirs: Any, ours: Any, name: str = "") -> dict[str, tuple[Any, Any]]:
    """Return the keys of two configurations whose values differ, with both values."""
    changed: dict[str, tuple[Any, Any]] = {}
    keys = dict.fromkeys([*theirs, *ours])
    for key in [key for key in keys if name or key not in NOT_SCIENCE]:
        old, new = theirs.get(key), ours.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            changed |= _changed(old, new, f"{name}{key}.")
        elif old != new:
            changed[name + key] = old, new
    return changed


def environment(**resolved: Any) -> dict[str, Any]:
    """Return ``environment.json``: the values ``resolved``, then versions, machine and code."""
    names = ("torch", "lightning", "torchmetrics", "numpy", "tokenizers", "tiktoken", "datasets")
    return {
        **resolved,
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in ("tinygpt", *names)},
        "platform": platform.platform(),
        "processor": platform.machine(),
        "cpu_count": os.cpu_count(),
        "git_commit": git_commit(),
    }


def git_commit() -> str | None:
    """Return the commit of this source, with ``-dirty`` if it was changed, None if unknown."""
    source = Path(__file__).resolve().parents[2]
    if not (source / ".git").exists():
        return None
    options = ("--always", "--dirty", "--abbrev=40", "--exclude=*")
    command = ["git", "-C", str(source), "describe", *options]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
