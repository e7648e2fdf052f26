"""Check that the keys of a configuration are known, within their bounds, and fit together.

Every mistake is a one-line ConfigError, found before torch is imported.
"""

from __future__ import annotations

import codecs
import dataclasses
import difflib
import math
import operator
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf

from tinygpt.config import (
    DEFAULT_TOKENS,
    HORIZONS,
    LLAMA3,
    REMOVED,
    SCALED_BY_WIDTH,
    SCALES,
    Config,
    ConfigError,
    Settings,
    SgdOptim,
    rate_is_scaled,
)
from tinygpt.config.errors import require as require

T = TypeVar("T")
LIMITS = {
    "least": ("at least", operator.ge),
    "above": ("above", operator.gt),
    "most": ("at most", operator.le),
    "below": ("below", operator.lt),
}


def typed(composed: DictConfig, overrides: Sequence[str] = ()) -> Config:
    """Return the composed configuration as dataclasses, not yet checked by ``check``.

    A horizon among the command line's ``overrides`` replaces a recipe's.  Raises ConfigError.
    """
    config = as_dataclasses(composed, Config)
    values = dict(item.lstrip("+").partition("=")[::2] for item in overrides)  # the last one wins
    given = [name for name in HORIZONS if values.get(f"train.{name}", "null") != "null"]
    for name in HORIZONS:
        if given and name not in given:
            setattr(config.train, name, None)
    if all(getattr(config.train, name) is None for name in HORIZONS):
        config.train.tokens = DEFAULT_TOKENS
    return config


def as_dataclasses(composed: DictConfig, cls: type[T]) -> T:
    """Return the composed configuration as a ``cls``.  Raise ConfigError for an unknown key."""
    config = OmegaConf.to_object(composed)
    assert isinstance(config, cls)
    for name in _extra_keys(composed, config):
        raise ConfigError(unknown_key(name, list(key_names(config))))
    return config


def unknown_key(name: str, known: Sequence[str]) -> str:
    """Return the error line for an unknown key, with a suggestion."""
    if name in REMOVED:
        return f"{name}: removed; {REMOVED[name]}"
    if name in known:
        return f"{name}: not a key of the chosen {name.split('.')[0]}"
    return f"{name}: no such key{did_you_mean(name, known)}"


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """Return the end of an error line that suggests known names similar to ``name``, if any."""
    last = name.rpartition(".")[2]
    found = difflib.get_close_matches(name, known, n=2, cutoff=0.85)
    found += [k for k in known if k.rpartition(".")[2] == last]  # right name, wrong section
    if len(name) > 2 and not found:
        found = [k for k in known if re.search(rf"(^|[._]){re.escape(name)}", k)]
    found = found or difflib.get_close_matches(name, known, n=2, cutoff=0.5)
    nearest = list(dict.fromkeys(found))[:2]
    return f"; did you mean {' or '.join(nearest)}?" if nearest else ""


def key_names(section: Any, prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of the keys of a configuration or a schema class.

    The tables of ``sweep`` and the arguments of the user's callbacks are left out.
    """
    for item in dataclasses.fields(section):
        value = getattr(section, item.name, None)
        if dataclasses.is_dataclass(value) and item.name != "sweep":
            yield from key_names(value, f"{prefix}{item.name}.")
        elif item.name not in ("sweep", "callbacks"):
            yield prefix + item.name


def _extra_keys(composed: DictConfig, config: Any, prefix: str = "") -> Iterator[str]:
    """Yield the keys added by ``+key=value`` that are not in the schema."""
    names = {item.name for item in dataclasses.fields(config)}
    for key, value in composed.items():
        name = str(key)
        if name not in names:
            yield f"{prefix}{name}"
        elif isinstance(value, DictConfig) and dataclasses.is_dataclass(getattr(config, name)):
            yield from _extra_keys(value, getattr(config, name), f"{prefix}{name}.")


def check(config: Config) -> None:
    """Check the bounds of every key, then that the keys fit together, or raise ConfigError."""
    check_bounds(config)
    model, data, train, optim = config.model, config.data, config.train, config.optim
    horizons = sorted(f"train.{name}" for name in HORIZONS if getattr(train, name) is not None)
    require(len(horizons) == 1, f"{' and '.join(horizons)}: give the horizon once")
    for small, large in (
        ("model.n_heads", "model.d_model"),
        ("model.n_kv_heads", "model.n_heads"),
        ("model.max_seq_len", "train.batch_tokens"),
    ):
        value, whole = operator.attrgetter(small, large)(config)
        fits = value is None or whole % value == 0
        require(fits, f"{small}={value}: must divide {large}={whole}")
    require(
        model.position != "rope" or model.d_model // model.n_heads % 2 == 0,
        f"model.n_heads={model.n_heads}: rope needs an even d_model / n_heads, "
        f"here {model.d_model} / {model.n_heads} = {model.d_model // model.n_heads}",
    )
    if (scaling := model.rope_scaling) is not None:
        holds = model.position == "rope" and scaling.keys() == set(LLAMA3)
        holds = holds and min(scaling.values()) > 0
        require(
            holds and scaling["low_freq_factor"] < scaling["high_freq_factor"],
            f"model.rope_scaling={scaling}: must be null, or with position=rope numbers above 0 "
            f"for {', '.join(LLAMA3)}, the low below the high",
        )
    line = f"data.stride={data.stride}: more than model.max_seq_len={model.max_seq_len} would skip"
    require((data.stride or 0) <= model.max_seq_len, f"{line} tokens")
    given = f"data.val_fraction={data.val_fraction} and data.test_fraction={data.test_fraction}"
    fits = data.val_fraction + data.test_fraction < 1
    require(fits, f"{given}: their sum must be below 1")
    check_text(data)
    betas = getattr(optim, "betas", [0.0, 0.0])
    require(len(betas) == 2, f"optim.betas={betas}: must be two numbers")
    if isinstance(optim, SgdOptim):
        holds = not optim.nesterov or optim.momentum > 0
        require(holds, "optim.nesterov=true: needs optim.momentum above 0")
    uri = config.logger.mlflow.tracking_uri if config.logger.mlflow else None
    require(
        not uri or bool(re.match(r"(sqlite|postgresql|mysql|mssql|https?)(\+\w+)?://", uri)),
        f"logger.mlflow.tracking_uri={uri}: must be a database or a server, as sqlite:///FILE or "
        "http://HOST:PORT; MLflow no longer accepts folders",
    )
    _check_rates(config)
    require(
        config.hardware.devices != 0,
        "hardware.devices=0: must be at least 1, or -1 for all there are",
    )
    for name, callback in config.callbacks.items():
        target = callback.get("_target_") if isinstance(callback, dict) else None
        require(
            isinstance(target, str) and "." in target,
            f"callbacks.{name}: needs +callbacks.{name}._target_=MODULE.CLASS",
        )
    check_names({"study": config.study, "run_name": config.run_name, "data.name": data.name})


def check_names(named: Mapping[str, str | None]) -> None:
    """Raise ConfigError if a value cannot be the name of a folder."""
    for name, value in named.items():
        require(
            value is None or re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}", value) is not None,
            f"{name}={value}: must be letters, digits, '.', '_', '-' only, as it names a folder",
        )


def _check_rates(config: Config) -> None:
    """Check that the optimizer suits µP and LoRA."""
    model, optim = config.model, config.optim
    if optim.kind not in SCALED_BY_WIDTH and rate_is_scaled(model, optim):
        allowed = f"optim={optim.kind}; allowed with optim={', '.join(SCALED_BY_WIDTH)}"
        if optim.scale_rate_with_width:
            raise ConfigError(f"optim.scale_rate_with_width=true: not with {allowed}")
        line = f"model.parametrization=mup: has no rule for the rates of {allowed}, muon"
        raise ConfigError(line)
    rank, alpha = optim.lora.rank, optim.lora.alpha
    if rank is None:
        require(alpha is None, f"optim.lora.alpha={alpha}: needs optim.lora.rank")
        return
    given = f"optim.lora.rank={rank}"
    require(config.init_from is not None, f"{given}: needs init_from, whose weights it keeps")
    require(rank <= model.d_model, f"{given}: must be at most model.d_model={model.d_model}")
    standard = model.parametrization == "standard"
    require(standard, f"{given}: has no rule for its rates under model.parametrization=mup")
    require(optim.kind != "muon", f"{given}: not with optim=muon, as its factors are thin")


def check_sweepable(config: Settings) -> None:
    """Raise ConfigError for a job that a sweep cannot run."""
    trainer = getattr(config, "trainer", None)
    require(trainer is None or not trainer.fast_dev_run, "trainer.fast_dev_run=true: no --multirun")
    for name in ("devices", "num_nodes"):  # further processes would repeat the command, a sweep
        value = getattr(config.hardware, name)
        require(
            value == 1,
            f"hardware.{name}={value}: a sweep runs jobs of one device side by side; "
            f"use hardware.{name}=1, or no --multirun",
        )


def check_bounds(section: Any, prefix: str = "") -> None:
    """Check every field of a dataclass against the bounds of its ``key``, or raise ConfigError."""
    for item in dataclasses.fields(section):
        value, name = getattr(section, item.name), prefix + item.name
        if dataclasses.is_dataclass(value):
            check_bounds(value, name + ".")
            continue
        for one in value if isinstance(value, list) else [value]:
            if one is not None:
                _check_value(name, one, item.metadata)


def check_text(data: object) -> None:
    """Raise ConfigError for a separator, delimiter or encoding that cannot work."""
    line = "data.separator='': must be auto, none or a text that separates documents"
    require(getattr(data, "separator", "auto") != "", line)
    delimiter, encoding = (getattr(data, name, None) for name in ("delimiter", "encoding"))
    holds = delimiter is None or (len(delimiter) == 1 and delimiter not in '"\n\r')
    require(holds, f"data.delimiter={delimiter}: must be one character, as , ; | or \\t")
    if encoding is not None:
        try:
            b"".decode(encoding)
            known = codecs.lookup(encoding).incrementaldecoder is not None
        except (LookupError, ValueError):
            known = False
        require(known, f"data.encoding={encoding}: no such encoding; utf-8, utf-16, latin-1, ...")


def check_scale(scale: str) -> None:
    """Raise ConfigError for an unknown scale."""
    _check_value("scale", scale, {"among": SCALES})


def _check_value(name: str, value: Any, bounds: Mapping[str, Any]) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{name}={value}: must be a finite number")
    for bound, limit in bounds.items():
        if bound == "among":
            require(value in limit, f"{name}={value}: must be one of {', '.join(limit)}")
        elif bound in LIMITS:
            words, holds = LIMITS[bound]
            require(holds(value, limit), f"{name}={value}: must be {words} {limit:.10g}")
