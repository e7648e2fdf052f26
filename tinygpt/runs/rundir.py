"""The run folder: its name, its files, the configuration's hash.  Torch-free."""

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
# What does not change the result of a run, and so is neither in its hash nor in its name.
NOT_SCIENCE = {
    *("hardware", "logger", "launcher", "sweep", "scale", "plan", "fit", "experiment"),
    *("output_dir", "cache_dir", "study", "run_name", "force"),
}
# Keys of ``train`` that change no weight: a run can be resumed with other values.
FREE = (
    *("log_every", "checkpoint_every", "keep_every", "sample_tokens", "sample_prompt"),
    "eval_share",
)
DATA_PLACES = ("path", "val_file", "test_file", "repo")  # the content there stands for them
# Size of a run beside its configuration, as results.json names it.
SIZES = ("model_parameters", "parameters_non_embedding", "train_tokens", "flops_exact")


# --- the hash and the name


def config_hash(config: Config, content: dict[str, str]) -> str:
    """Return the hash of all that changes a result.

    ``content`` maps what is read from outside (``data``, ``tokenizer``, ``init_from``) to the
    fingerprint of what was read; it stands for the paths.  A key that is newer than the first runs
    counts only where it is used, so that they keep their hash.
    """
    values = {k: v for k, v in dataclasses.asdict(config).items() if k not in NOT_SCIENCE}
    data, model, train = values["data"], values["model"], values["train"]
    for section, names in ((data, DATA_PLACES), (values["tokenizer"], ("vocab_dir", "path"))):
        for name in names:
            section.pop(name, None)
    values.pop("init_from")
    trainer = {k: v for k, v in values.pop("trainer").items() if v and k != "profiler"}
    values |= {"trainer": trainer} if trainer else {}
    newer: list[tuple[dict[str, Any], str, Any]] = [(values, "callbacks", {})]
    newer += [(train, "skip_nonfinite", False), (model, "rope_scaling", None)]
    if train["early_stopping_patience"] is None:  # else it decides when a run stops
        train["eval_share"] = None
    newer += [(train, "eval_share", None)]
    newer += [(data, name, None) for name in ("encoding", "delimiter", "header")]
    for section, name, unused in newer:
        if name in section and section[name] == unused:
            section.pop(name)
    return fileio.digest({**values, "content": content})


def effective_hash(config: Config, content: dict[str, str]) -> str:
    """Return the hash of what decides the trained weights, however it is spelt.

    A value that a default stands for is written out; what has no effect beside the other values,
    or only looks on, is left out.  Two runs with the same hash train the same model.
    """
    config = copy.deepcopy(config)
    model, train, schedule = config.model, config.train, config.schedule
    model.d_ff = resolved_d_ff(model)
    model.n_kv_heads = model.n_kv_heads or model.n_heads
    model.rope_theta = model.rope_theta if model.position == "rope" else 0.0
    config.optim.scale_rate_with_width = rate_is_scaled(model, config.optim)
    if model.parametrization == "standard" and not config.optim.scale_rate_with_width:
        model.mup_base_width = 0
    model.attention = ""  # two ways to the same numbers
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
    named: dict[str, str] = {}  # by the whole key: two may end alike
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
    """Return the folder that the study has for a run, else a new one named by ``named``.

    A run that is spelt in another way, or swept beside others, so finds itself again.
    """
    study = Path(config.output_dir) / (config.study or "runs")
    if config.run_name is not None:
        return study / config.run_name
    try:
        known = list(study.glob(f"*-{config_hash[:6]}"))
    except OSError as error:  # a name too long
        line = f"output_dir={config.output_dir:.60}: cannot be written ({error.strerror})"
        raise ConfigError(line) from error
    for path in known:
        with contextlib.suppress(ConfigError, AttributeError):
            if fileio.read_json(path / "environment.json").get("config_hash") == config_hash:
                return path
    return study / run_name(named, config_hash)


# --- the folders of runs


def open_run(path: str | Path) -> RunDir:
    """Return the folder of a run that has begun.  Raise ConfigError for any other place."""
    run = RunDir(Path(path).expanduser())
    check_name(run.path)
    if run.config.exists() and not is_adaptation(run.path):
        return run
    if not run.path.is_dir():
        raise ConfigError(f"run={path}: no such folder")
    if inside := find_runs(run.path):
        line = f"a folder of {len(inside)} runs; give one of them, as {inside[0]}"
        raise ConfigError(f"run={path}: {line}")
    raise ConfigError(f"run={path}: not the folder of a run{_instead(run.path)}")


def find_runs(folder: Path) -> list[Path]:
    """Return the folders of trainings in ``folder``, itself included: width 64 before 128."""
    return [path for path in _begun(folder) if not is_adaptation(path)]


def find_adaptations(folder: Path) -> list[Path]:
    """Return the folders of adaptations in ``folder``, itself included."""
    return [path for path in _begun(folder) if is_adaptation(path)]


def is_adaptation(folder: Path) -> bool:
    """Return whether a run's folder has an adaptation's records, or its configuration."""
    config, records = folder / "config.yaml", folder / "adapt.jsonl"
    text = b"" if records.exists() or not config.exists() else config.read_bytes()
    return records.exists() or text.startswith(b"documents:") or b"\ndocuments:" in text


def no_runs(folder: Path) -> ConfigError:
    """Return the error for a folder without trainings."""
    return ConfigError(f"runs={folder}: no runs in there{_instead(folder)}")


def _instead(folder: Path) -> str:
    """Return what a folder has in the place of trainings."""
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
    """Raise ConfigError for a name that no table can hold and that not every library opens."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{path}: its name is not UTF-8; rename it") from error


# --- the configuration that a run was trained with


def read_config(path: Path) -> Config:
    """Return the ``config.yaml`` that a run was trained with; what it lacks has its default.

    Raises ConfigError, naming the file, where it is not one.
    """
    values = fileio.read_yaml(path)
    try:
        return config_from(values)
    except (ValueError, KeyError, TypeError, AttributeError, OmegaConfBaseException) as error:
        reason = one_line(error)
        raise ConfigError(f"{path}: not the configuration of a run ({reason})") from error


def config_from(values: dict[str, Any]) -> Config:
    """Return the configuration with these plain values; what they lack has its default."""
    values = _literal(values)
    for name in REMOVED:  # keys of earlier versions
        section, _, last = name.partition(".")
        (values.get(section) or {}).pop(last, None)
    values["train"] = {"eval_share": None, **(values.get("train") or {})}  # as of runs before it
    typed = OmegaConf.structured(Config)
    for group in CHOICES:
        typed[group] = OmegaConf.structured(variant(group, values[group]))
    config = OmegaConf.to_object(OmegaConf.merge(typed, values))
    assert isinstance(config, Config)
    _check_tables(config)
    return config


def _check_tables(config: Any) -> None:
    """Raise ValueError for a text in the place of a table, where OmegaConf takes one with ${."""
    for name, kind in typing.get_type_hints(type(config)).items():
        value, kinds = getattr(config, name), (kind, *typing.get_args(kind))
        if dataclasses.is_dataclass(value):
            _check_tables(value)
        elif isinstance(value, str) and any(map(dataclasses.is_dataclass, kinds)):
            raise ValueError(f"{name}={value} is no table")


def _literal(value: Any) -> Any:
    """Escape interpolations: a file from elsewhere could ask for the environment."""
    if isinstance(value, dict):
        return {key: _literal(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_literal(inner) for inner in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


# --- one run's folder


class RunDir:
    """One run's folder and the paths in it."""

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
        self.mlflow = path / "mlflow.json"  # which run of MLflow's this is
        self.checkpoints = path / "checkpoints"
        self.records = path / "adapt.jsonl"  # of an adaptation, which has no metrics

    @property
    def last(self) -> Path:
        return self.checkpoints / "last.ckpt"

    @property
    def events(self) -> Path:
        """Return the folder of TensorBoard's files, whose path is the run's name there: the run's
        own, or the one within it that earlier versions made."""
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
        """Return the checkpoint of that name; None: ``final``, of a run that has not ended
        ``last``.  Raise ConfigError where there is none."""
        there = self.kept()
        if not there:
            raise ConfigError(f"run={self.path}: has no checkpoint")
        name = checkpoint or ("final" if "final" in there else "last")
        if name not in there:
            found = f"there are {', '.join(there)}"
            raise ConfigError(f"checkpoint={name}: not in {self.checkpoints}; {found}")
        return self.checkpoints / f"{name}.ckpt"

    def finished(self, config_hash: str, force: bool = False) -> dict[str, Any] | None:
        """Return the results of a finished run of this very configuration, else None.

        Raises ConfigError where the folder is not a run's or, unless ``force`` may replace it, is
        that of another configuration.
        """
        begun = next((path for path in (self.results, self.environment) if path.exists()), None)
        if begun is None:
            # what a run can leave behind that was killed before it wrote environment.json
            others = self.path.iterdir() if self.path.is_dir() else ()
            if any(not path.name.startswith(".") and path.name != "run.log" for path in others):
                line = f"run_name={self.path.name}: {self.path} is there and is no run's"
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
        """Return the hash of ``config``, or of the run that is here where it differs from it only
        in keys that change no weight.

        Raises ConfigError, naming the keys that differ, for any other run.
        """
        asked = config_hash(config, content)
        begun = next((path for path in (self.results, self.environment) if path.exists()), None)
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
        """Keep a second process out of this folder.  Raise ConfigError if one is there."""
        return fileio.locked(self.path, self.path.parent.parent, "run")

    def clear(self) -> None:
        """Remove an earlier run of the same configuration; the results go first."""
        files = (self.results, self.error, self.metrics, self.samples, self.log, self.mlflow)
        for path in (*files, self.records):
            path.unlink(missing_ok=True)
        for path in [*self.checkpoints.glob("*"), *self.events.glob("events.out.tfevents.*")]:
            path.unlink()

    def write_config(self, config: Settings) -> None:
        """Write config.yaml, without the tables of the sweep that a run may belong to."""
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


# --- what it ran on


def environment(**resolved: Any) -> dict[str, Any]:
    """Return versions, machine and code, for ``environment.json``; ``resolved`` comes first."""
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
    """Return the commit of the source this runs from, with ``-dirty`` where it is changed."""
    source = Path(__file__).resolve().parents[2]
    if not (source / ".git").exists():
        return None
    options = ("--always", "--dirty", "--abbrev=40", "--exclude=*")
    command = ["git", "-C", str(source), "describe", *options]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
