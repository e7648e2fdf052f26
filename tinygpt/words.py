"""The words of a command line, as they are meant: text stays text, and what people type who come
from elsewhere is answered with the key that it is here."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import re
import typing
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from tinygpt.checks import did_you_mean
from tinygpt.config import DECIDED, REMOVED, ConfigError, install
from tinygpt.explaining import Command, kinds

# A quoted text, or a word alone in its place: the value, or one of a list or of choice(...).
_WORD = re.compile(
    r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|(?<=[=,(\[])(\s*)([^\s,()\[\]{}'"\\]+)(?=\s*(?:[,)\]]|$))"""
)
_RANGES = re.compile(r"=\s*(?:tag\(.*)?(?:range|interval|glob|int|float|bool)\(")

# What others call it, and what it is here; {} is the value.
SYNONYMS = {
    **dict.fromkeys(("lr", "learning_rate", "max_lr", "peak_lr"), "optim.learning_rate={}"),
    **dict.fromkeys(("wd", "weight_decay"), "optim.weight_decay={}"),
    **dict.fromkeys(("n_embd", "embed_dim", "hidden_size", "dim"), "model.d_model={}"),
    **dict.fromkeys(("n_layer", "num_layers", "num_hidden_layers", "layers"), "model.n_layers={}"),
    **dict.fromkeys(("n_head", "num_heads", "num_attention_heads"), "model.n_heads={}"),
    **dict.fromkeys(
        ("block_size", "context_length", "context_size", "seq_len", "max_length"),
        "model.max_seq_len={}",
    ),
    "dropout": "model.dropout={}",
    "vocab_size": "tokenizer.vocab_size={}",
    **dict.fromkeys(
        ("max_steps", "max_iters", "num_steps", "iterations", "iters", "steps"), "train.steps={}"
    ),
    **dict.fromkeys(("epochs", "max_epochs", "num_epochs", "num_train_epochs"), "train.epochs={}"),
    **dict.fromkeys(
        ("batch_size", "per_device_train_batch_size", "train_batch_size"),
        "train.batch_tokens={}*L with L=model.max_seq_len, as it counts tokens",
    ),
    **dict.fromkeys(
        ("accumulate_grad_batches", "gradient_accumulation_steps", "grad_accum_steps"),
        "hardware.micro_batch_size=B/{} with B the sequences of train.batch_tokens",
    ),
    **dict.fromkeys(("device", "accelerator"), "hardware={}"),
    **dict.fromkeys(("grad_clip", "gradient_clip_val", "max_grad_norm"), "train.grad_clip_norm={}"),
    **dict.fromkeys(("warmup", "warmup_iters", "warmup_steps"), "schedule.warmup_steps={}"),
}
DEVICES = {"gpu": "cuda", "nvidia": "cuda", "cuda:0": "cuda", "metal": "mps"}
# Choices that Hydra's plugins have, or that other programs know, and what to say instead.
CHOICES = {
    **{f"hardware={word}": f"hardware={ours}" for word, ours in DEVICES.items()},
    "hydra/launcher=joblib": "launcher=local",
    "hydra/launcher=submitit_local": "launcher=local",
    "hydra/launcher=submitit_slurm": "launcher=slurm",
    "hydra/launcher=ray": "launcher=ray",
}
# What Hydra would do with its own folders; here a run has its own.
FOLDERS = {
    "hydra.run.dir": "a run's folder is output_dir/study/run_name; use output_dir={}",
    "hydra.sweep.dir": "a study's folder is output_dir/study; use output_dir={}",
    "hydra.sweep.subdir": "a run's folder is output_dir/study/run_name; use run_name=",
    "hydra.output_subdir": "a run's folder keeps its configuration as config.yaml",
    "hydra.job.chdir": "commands stay in the folder where they are started",
}
OPTIONS = {
    "config_name": "a command has one configuration; use experiment=NAME, or key=value",
    "config_path": "a command has one configuration; use experiment=NAME, or key=value",
    "config_dir": "a command has one configuration; use experiment=NAME, or key=value",
    "experimental_rerun": "use the overrides of that run; it goes on from its last checkpoint",
}


@functools.cache
def value_types(command: Command[Any]) -> dict[str, set[Any]]:
    """Return what the values of every key may be: those of a list are its elements'."""
    found = dict(kinds(command.schema))
    for group, choices in command.sections.items():
        for cls in choices.values():
            found |= kinds(cls, f"{group}.")
    for name, kind in list(found.items()):
        for inner in typing.get_args(kind):
            if isinstance(inner, type) and dataclasses.is_dataclass(inner):
                found |= kinds(inner, f"{name}.")
    return {name: _leaves(kind) for name, kind in found.items()}


def _leaves(kind: Any) -> set[Any]:
    inner = typing.get_args(kind)
    return set().union(*map(_leaves, inner)) - {type(None)} if inner else {kind}


def as_meant(overrides: Sequence[str], command: Command[Any]) -> list[str]:
    """Return the overrides with numbers written as the schema needs them, for Hydra to read.

    It takes 1.10 for the number 1.1, whatever the key, and cannot read ~: a text gets quotes.
    1e6 is a float, which no integer may be: it is written out.
    """
    found = []
    for item in overrides:
        types = value_types(command).get(item.partition("=")[0].lstrip("+"), set())
        if types in ({str}, {int}) and not _RANGES.search(item):
            item = _WORD.sub(_as_text if types == {str} else _as_whole, item)
        if match := re.match(r"(\+*output_dir=['\"])(~[^'\"]*)", item):  # Hydra makes it too
            item = match[1] + os.path.expanduser(match[2]) + item[match.end() :]
        found.append(item)
    return found


def _as_text(match: re.Match[str]) -> str:
    space, word = match[1], match[2]
    return f"{space}'{word}'" if word and (_is_literal(word) or word[0] == "~") else match[0]


def _as_whole(match: re.Match[str]) -> str:
    space, word = match[1], match[2]
    if not word or not _is_literal(word) or word.lower() in ("true", "false"):
        return match[0]
    is_whole = float(word).is_integer() and not re.fullmatch(r"[+-]?[\d_]+", word)
    return f"{space}{int(Decimal(word))}" if is_whole else match[0]


def _is_literal(word: str) -> bool:
    """Whether Hydra may read it as a number or a truth value."""
    try:
        return word.lower() in ("true", "false") or float(word) is not None
    except ValueError:
        return False


def files(text: str) -> list[str]:
    """Return the paths of ``a,b`` or ``[a,b]``; one that exists may have commas in its name."""
    if text.startswith("[") and text.endswith("]") and not os.path.exists(text):
        text = text[1:-1]
    pieces, found = text.split(",") if text else [], []
    while pieces:
        ends = range(len(pieces), 1, -1)
        paths = ((end, os.path.expanduser(",".join(pieces[:end]))) for end in ends)
        end = next((end for end, path in paths if os.path.exists(path)), 1)
        found.append(os.path.expanduser(",".join(pieces[:end])))
        del pieces[:end]
    return found


def check(overrides: Sequence[str], command: Command[Any]) -> None:
    """Raise ConfigError for what means something elsewhere, with what to say here."""
    for item in overrides:
        name, _, value = item.lstrip("+").partition("=")
        if item == "hydra/sweeper=optuna" and importlib.util.find_spec("optuna") is None:
            raise ConfigError(f"{item}: is not installed; {install('optuna')}")
        if item in CHOICES:
            raise ConfigError(f"{item}: no such choice; did you mean {CHOICES[item]}?")
        is_default = name == "hydra.job.chdir" and value.lower() in ("false", "null")
        removed = REMOVED.get(name) or REMOVED.get(f"{name}={value}")
        if removed:
            raise ConfigError(f"{name}={value}: removed; {removed}")
        if name in DECIDED:
            raise ConfigError(f"{name}={value}: is decided by {DECIDED[name]}")
        if name in FOLDERS and not is_default and "LOCAL_RANK" not in os.environ:
            raise ConfigError(f"{item}: {FOLDERS[name].format(value)}")
        meant = name not in value_types(command) and _synonym(name, value, command)
        if meant:
            raise ConfigError(f"{name}={value}: no such key; did you mean {meant}?")


def _synonym(name: str, value: str, command: Command[Any]) -> str:
    """Return what somebody means by this key, "" where that cannot be told."""
    meant = SYNONYMS.get(name.rpartition(".")[2], "")
    key = meant.partition("=")[0]
    if key not in value_types(command).keys() | command.sections.keys() or name.startswith("hydra"):
        return ""
    return meant.format(DEVICES.get(value, value) if key == "hardware" else value)


def explain_option(words: Sequence[str], message: str, command: Command[Any]) -> str:
    """Return the line for argparse's ``message`` on a command line's ``words``."""
    if message.startswith("argument "):  # one of Hydra's, with another value than it takes
        return message.removeprefix("argument ")
    unknown = message.rpartition(": ")[2]
    option = next((word for word in unknown.split() if word.startswith("-")), unknown)
    name, _, value = option.lstrip("-").partition("=")
    name = name.replace("-", "_")
    if "=" not in option:
        rest = words[words.index(option) + 1 :] if option in words else []
        value = rest[0] if rest and "=" not in rest[0] and not rest[0].startswith("--") else "..."
    meant = _synonym(name, value, command)
    if name in value_types(command):
        meant = f"{name}={value}"
    if meant:
        return f"{option}: no such option; did you mean {meant}?"
    near = did_you_mean(name, list(value_types(command)))
    return f"{unknown}: no such option; --help shows what there is{near}"


def check_options(given: Mapping[str, Any]) -> None:
    """Raise ConfigError for options of Hydra that lead nowhere here, or exclude one another."""
    for name, line in OPTIONS.items():
        if given.get(name) is not None:
            raise ConfigError(f"--{name.replace('_', '-')}: {line}")
    shows = [name for name in ("cfg", "info", "shell_completion") if given.get(name)]
    if shows and (given.get("multirun") or given.get("run") or len(shows) > 1):
        other = "multirun" if given.get("multirun") else "run" if given.get("run") else shows[1]
        line = f"--{other} --{shows[0]}: only one of them; plan=true lists the jobs of a sweep"
        raise ConfigError(line.replace("_", "-"))
    if given.get("run") and given.get("multirun"):
        raise ConfigError("--run --multirun: only one of them")
    for name in ("resolve", "package"):
        if given.get(name) and not given.get("cfg"):
            raise ConfigError(f"--{name}: needs --cfg job, whose configuration it shows")
