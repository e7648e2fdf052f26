"""The run folder: its name, its files, the configuration's hash.  Torch-free."""

from __future__ import annotations

import contextlib
import copy
import csv
import dataclasses
import os
import platform
import re
import subprocess
import typing
from collections.abc import Mapping, Sequence
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
from tinygpt.counting import resolved_d_ff

SCHEMA_VERSION = 1
# What does not change the result of a run, and so is neither in its hash nor in its name.
NOT_SCIENCE = {
    *("hardware", "logger", "launcher", "sweep", "scale", "plan", "fit", "experiment"),
    *("output_dir", "cache_dir", "study", "run_name", "force"),
}
# Keys of ``train`` that change no weight: a run goes on with others than it began with.
FREE = ("log_every", "checkpoint_every", "keep_every", "sample_tokens", "sample_prompt")
DATA_PLACES = ("path", "val_file", "test_file", "repo")  # keys for which what lies there stands


def config_hash(config: Config, content: dict[str, str]) -> str:
    """The hash of all that changes a result.

    ``content`` maps what is read from outside (``data``, ``tokenizer``, ``init_from``) to the
    fingerprint of what was read; it stands for the paths.
    """
    values = {k: v for k, v in dataclasses.asdict(config).items() if k not in NOT_SCIENCE}
    for name in DATA_PLACES:
        values["data"].pop(name, None)
    for name in ("vocab_dir", "path"):
        values["tokenizer"].pop(name, None)
    values.pop("init_from")
    if not config.train.skip_nonfinite:  # runs from before there was this key keep their hash
        values["train"].pop("skip_nonfinite")
    # neither counts unless it is used, and a profiler never does
    trainer = {k: v for k, v in values.pop("trainer").items() if v and k != "profiler"}
    values |= {"trainer": trainer} if trainer else {}
    if not config.callbacks:
        values.pop("callbacks")
    for name in ("encoding", "delimiter", "header"):
        if values["data"].get(name, 0) is None:
            values["data"].pop(name)
    if config.model.rope_scaling is None:
        values["model"].pop("rope_scaling")
    return fileio.digest({**values, "content": content})


def effective_hash(config: Config, content: dict[str, str]) -> str:
    """The hash of what decides the trained weights, however it is spelt.

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


def _changed(theirs: Any, ours: Any, name: str = "") -> dict[str, tuple[Any, Any]]:
    """Return the keys of two configurations whose values differ, with both values."""
    changed: dict[str, tuple[Any, Any]] = {}
    for key in dict.fromkeys([*theirs, *ours]):
        old, new = theirs.get(key), ours.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            changed |= _changed(old, new, f"{name}{key}.")
        elif old != new and (name or key not in NOT_SCIENCE):
            changed[name + key] = old, new
    return changed


def run_name(overrides: Sequence[str], config_hash: str) -> str:
    """A readable folder name: the overridden values, then six digits of the hash."""
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
    """Return the value of an override for a name: what is in its quotes, where it is in some."""
    match = re.fullmatch(r"'([^'\\]*)'|\"([^\"\\]*)\"", value)
    return (match[1] or match[2] or "") if match else value


def folder_of(config: Settings, named: Sequence[str], config_hash: str) -> Path:
    """Where a run goes: to the folder that its study has for it, else to one with a telling name.

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


def open_run(path: str | Path) -> RunDir:
    """The folder of a run that has begun.  Raises ConfigError, one line, for any other place."""
    run = RunDir(Path(path).expanduser())
    check_name(run.path)
    if run.config.exists() and not is_adaptation(run.path):
        return run
    inside = find_runs(run.path)
    if not run.path.is_dir():
        why = "no such folder"
    elif inside:
        why = f"a folder of {len(inside)} runs; give one of them, as {inside[0]}"
    else:
        why = f"not the folder of a run{_but(find_adaptations(run.path), run.path)}"
    raise ConfigError(f"run={path}: {why}")


def find_runs(folder: Path) -> list[Path]:
    """The folders of trainings in ``folder``, itself included: d_model-64 before d_model-128."""
    return [path for path in _begun(folder) if not is_adaptation(path)]


def find_adaptations(folder: Path) -> list[Path]:
    """As ``find_runs``, of adaptations."""
    return [path for path in _begun(folder) if is_adaptation(path)]


def is_adaptation(folder: Path) -> bool:
    """By its records, or its configuration where there are none yet."""
    config, records = folder / "config.yaml", folder / "adapt.jsonl"
    text = b"" if records.exists() or not config.exists() else config.read_bytes()
    return records.exists() or text.startswith(b"documents:") or b"\ndocuments:" in text


def no_runs(folder: Path) -> ConfigError:
    """The line for a folder without trainings."""
    return ConfigError(f"runs={folder}: no runs in there{_but(find_adaptations(folder), folder)}")


def _but(adaptations: Sequence[Path], folder: Path) -> str:
    """What is there in the place of trainings."""
    if folder in adaptations:
        return ", but of an adaptation"
    count = len(adaptations)
    return f", but {count} adaptation{'s' * (count > 1)}" if adaptations else ""


def _begun(folder: Path) -> list[Path]:
    found = [path.parent for path in folder.rglob("environment.json")]
    for path in found:
        check_name(path)
    return sorted(found, key=_natural)


def check_name(path: Path) -> None:
    """Raises ConfigError for a name that no table can hold and that not every library opens."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{path}: its name is not UTF-8; rename it") from error


def _natural(path: Path) -> list[tuple[str, int]]:
    parts = re.findall(r"(\D*)(\d*)", str(path))
    return [(text, int(number or -1)) for text, number in parts]


def read_config(path: Path) -> Config:
    """The ``config.yaml`` that a run was trained with; what it lacks has its default.

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
    typed = OmegaConf.structured(Config)
    for group in CHOICES:
        typed[group] = OmegaConf.structured(variant(group, values[group]))
    config = OmegaConf.to_object(OmegaConf.merge(typed, values))
    assert isinstance(config, Config)
    _check_tables(config)
    return config


def _check_tables(config: Any) -> None:
    """Raises ValueError for a text in the place of a table, where OmegaConf takes one with ${."""
    for name, kind in typing.get_type_hints(type(config)).items():
        value = getattr(config, name)
        if dataclasses.is_dataclass(value):
            _check_tables(value)
        elif isinstance(value, str) and any(
            map(dataclasses.is_dataclass, (kind, *typing.get_args(kind)))
        ):
            raise ValueError(f"{name}={value} is no table")


def _literal(value: Any) -> Any:
    """The same where no text is resolved: one from elsewhere could ask for the environment."""
    if isinstance(value, dict):
        return {key: _literal(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_literal(inner) for inner in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def _is_strange(path: Path) -> bool:
    """Not what a run can leave behind that was killed before it wrote environment.json."""
    return not path.name.startswith(".") and path.name != "run.log"


class RunDir:
    """One run's folder and the paths in it (design: the run folder)."""

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
        self.mlflow = path / "mlflow.json"  # which run there is this one
        self.checkpoints = path / "checkpoints"
        self.records = path / "adapt.jsonl"  # of an adaptation, which has no metrics

    @property
    def last(self) -> Path:
        return self.checkpoints / "last.ckpt"

    def step(self, number: int) -> Path:
        return self.checkpoints / f"step_{number}.ckpt"

    def kept(self) -> list[str]:
        """Names of the checkpoints: steps in their order, then best, last and final."""
        names = [path.stem for path in self.checkpoints.glob("*.ckpt") if path.name[0] != "."]
        steps = [name for name in names if re.fullmatch("step_[0-9]+", name)]
        steps.sort(key=lambda name: int(name[5:]))
        return [*steps, *(name for name in ("best", "last", "final") if name in names)]

    def chosen(self, checkpoint: str | None) -> Path:
        """The checkpoint of that name; None: ``final``, of a run that has not ended ``last``.

        Raises ConfigError where there is none.
        """
        there = self.kept()
        if not there:
            raise ConfigError(f"run={self.path}: has no checkpoint")
        name = checkpoint or ("final" if "final" in there else "last")
        if name not in there:
            found = f"there are {', '.join(there)}"
            raise ConfigError(f"checkpoint={name}: not in {self.checkpoints}; {found}")
        return self.checkpoints / f"{name}.ckpt"

    def finished(self, config_hash: str) -> dict[str, Any] | None:
        """The results of a finished run of this very configuration, else None.

        Raises ConfigError where the folder belongs to another configuration or is not a run's.
        """
        if self.results.exists():
            results: dict[str, Any] = self._owned(self.results, config_hash)
            return results
        if self.environment.exists():
            self._owned(self.environment, config_hash)
        elif self.path.is_dir() and any(_is_strange(p) for p in self.path.iterdir()):
            raise ConfigError(f"run_name={self.path.name}: {self.path} is there and is no run's")
        return None

    def _owned(self, path: Path, config_hash: str) -> Any:
        values = fileio.read_json(path)
        if values.get("config_hash") != config_hash:
            raise self._another("")
        return values

    def _another(self, differs: str) -> ConfigError:
        return ConfigError(
            f"run_name={self.path.name}: {self.path} holds a run of another configuration"
            f"{differs}; choose another run_name or study, give the values of before, or remove "
            "that folder"
        )

    def hash_in(self, config: Config, content: dict[str, str]) -> str:
        """Return the hash of ``config``, or of the run that is here where it differs from it only
        in keys that change no weight.

        Raises ConfigError, naming the keys that differ, for any other run.
        """
        asked = config_hash(config, content)
        begun = next((path for path in (self.results, self.environment) if path.exists()), None)
        stored = fileio.read_json(begun).get("config_hash") if begun else None
        if stored in (None, asked) or not self.config.exists() or is_adaptation(self.path):
            return asked
        theirs = read_config(self.config)
        changed = _changed(dataclasses.asdict(theirs), dataclasses.asdict(config))
        free = {f"train.{name}" for name in FREE}
        same_content = config_hash(theirs, content) == stored
        if same_content and set(changed) <= free:
            return str(stored)
        shown = [
            f"{key}={old}, not {new}" for key, (old, new) in changed.items() if key not in free
        ]
        if not same_content and not any(key.startswith(("data.", "tokenizer.")) for key in changed):
            shown.append("another text or tokenizer behind the same keys")
        more = f" and {len(shown) - 4} more keys" if len(shown) > 4 else ""
        if set(changed) - free <= {f"train.{name}" for name in HORIZONS}:
            more = f"; init_from={self.path} with another run_name trains on from its weights"
        raise self._another(f"; it has {', '.join(shown[:4])}{more}")

    def locked(self) -> contextlib.AbstractContextManager[None]:
        """Keeps a second process out of this folder.  Raises ConfigError if one is there."""
        return fileio.locked(self.path, self.path.parent.parent, "run")

    def clear(self) -> None:
        """Forgets an earlier run of the same configuration; the results go first."""
        files = (self.results, self.error, self.metrics, self.samples, self.log, self.mlflow)
        for path in (*files, self.records):
            path.unlink(missing_ok=True)
        for path in [*self.checkpoints.glob("*"), *self.path.glob("tensorboard/*")]:
            path.unlink()

    def write_config(self, config: Settings) -> None:
        """As it is, without the tables of the sweep it may belong to."""
        alone = copy.copy(config)
        alone.sweep = SweepConfig()
        fileio.write_text(self.config, OmegaConf.to_yaml(OmegaConf.structured(alone)))


# What is known of a run's size beside its configuration, as results.json calls it.
SIZES = ("model_parameters", "parameters_non_embedding", "train_tokens", "flops_exact")
METRICS = (
    *("step", "tokens", "seconds", "train_loss", "learning_rate", "grad_norm", "grad_norm_max"),
    *("skipped_steps", "loss_scale", "tokens_per_second", "peak_memory_bytes", "val_loss"),
    *("val_perplexity", "val_accuracy", "val_bits_per_byte", "val_bits_per_char"),
)
# As repr writes it.
_NUMBER = r"(?:-?[0-9]{1,18}(?:\.[0-9]{1,30})?(?:e[-+]?[0-9]{1,3})?|nan|-?inf)?"
_ROW = re.compile(rf"{_NUMBER}(?:,{_NUMBER})*")


class MetricsFile:
    """``metrics.csv``: a line is appended whole or not at all; an empty field is not measured."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def keep_until(self, step: int) -> None:
        """Makes the file, or drops the lines after ``step``, which will be written anew."""
        rows = self.read() if self.path.exists() else []
        kept = [row for row in rows if row["step"].isdecimal() and int(row["step"]) <= step]
        lines = [",".join(METRICS), *(",".join(row[name] for name in METRICS) for row in kept)]
        fileio.write_text(self.path, "\n".join(lines) + "\n")

    def read(self) -> list[dict[str, str]]:
        """The lines, as ``columns``."""
        columns = self.columns()
        return [dict(zip(METRICS, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def columns(self) -> dict[str, Sequence[str]]:
        """Of whole lines only; one torn by a crash is left out, a column that is not there is
        empty.  Raises ConfigError, naming the file, for what are no metrics."""
        try:
            with self.path.open(newline="", encoding="utf-8") as file:
                lines = [line for line in file if line.endswith("\n")]
            header = next(csv.reader(lines), list(METRICS))
        except (ValueError, csv.Error) as error:
            raise ConfigError(f"{self.path}: not the metrics of a run ({error})") from error
        if "step" not in header or len(set(header)) < len(header):
            raise ConfigError(f"{self.path}: not the metrics of a run (other columns)")
        lines = [line.rstrip("\r\n") for line in lines[1:]]
        for number, line in enumerate(lines, start=2):
            if not _ROW.fullmatch(line):
                strange = next(v for v in line.split(",") if not re.fullmatch(_NUMBER, v))
                raise ConfigError(f"{self.path}: line {number}: {strange!r:.40} is no number")
        rows = [line.split(",") for line in lines]
        whole = [row for row in rows if len(row) == len(header)]
        there = dict(zip(header, zip(*whole, strict=True), strict=True)) if whole else {}
        return {name: there.get(name, ("",) * len(whole)) for name in METRICS}

    def append(self, row: Mapping[str, float | int | None]) -> None:
        values = ["" if row.get(name) is None else repr(row[name]) for name in METRICS]
        fileio.append(self.path, (",".join(values) + "\n").encode())


def environment(**resolved: Any) -> dict[str, Any]:
    """Versions, machine and code, for ``environment.json``; ``resolved`` comes first."""
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
    """The commit of the source this runs from, with ``-dirty`` where it is changed; else None."""
    source = Path(__file__).resolve().parent.parent
    if not (source / ".git").exists():
        return None
    options = ("--always", "--dirty", "--abbrev=40", "--exclude=*")
    command = ["git", "-C", str(source), "describe", *options]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
