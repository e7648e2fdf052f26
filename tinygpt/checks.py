"""What a configuration must keep to: known keys, bounds, and what must fit together.

Every mistake is a ConfigError of one line, found before torch is imported.
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

T = TypeVar("T")


def typed(composed: DictConfig, overrides: Sequence[str] = ()) -> Config:
    """The composed configuration as dataclasses; ``check`` says whether it can be had.

    ``overrides`` are the command line's ``key=value`` strings: a horizon given there replaces the
    one that a recipe brings.  Raises ConfigError.
    """
    given = horizon_given(overrides)
    config = as_dataclasses(composed, Config)
    for name in HORIZONS:
        if given not in (None, name):
            setattr(config.train, name, None)
    if not any(getattr(config.train, name) is not None for name in HORIZONS):
        config.train.tokens = DEFAULT_TOKENS
    return config


def as_dataclasses(composed: DictConfig, cls: type[T]) -> T:
    """The composed configuration, of the schema ``cls``.  Raises ConfigError for other keys."""
    config = OmegaConf.to_object(composed)
    assert isinstance(config, cls)
    for name in _extra_keys(composed, config):
        raise ConfigError(unknown_key(name, list(key_names(config))))
    return config


def horizon_given(overrides: Sequence[str]) -> str | None:
    """The horizon key that the command line sets, if any.  Raises ConfigError for two of them."""
    pairs = [item.lstrip("+").partition("=")[::2] for item in overrides if "=" in item]
    last = dict(pairs)  # of a key given twice the last counts
    given = [f"train.{h}" for h in HORIZONS if last.get(f"train.{h}", "null") != "null"]
    if len(set(given)) > 1:
        raise ConfigError(f"{' and '.join(sorted(set(given)))}: give the horizon once")
    return given[-1].removeprefix("train.") if given else None


def unknown_key(name: str, known: Sequence[str]) -> str:
    """The line for a key that does not exist, with the nearest ones that do."""
    if name in REMOVED:
        return f"{name}: removed; {REMOVED[name]}"
    if name in known:
        group = name.split(".")[0]
        return f"{name}: not a key of the chosen {group}"
    return f"{name}: no such key{did_you_mean(name, known)}"


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """The end of an error line: what ``name`` may have been meant for, if anything is near."""
    last = name.rsplit(".", 1)[-1]
    found = difflib.get_close_matches(name, known, n=2, cutoff=0.85)
    found += [k for k in known if k.rsplit(".", 1)[-1] == last]  # right name, wrong place
    if len(name) > 2:
        word = re.compile(rf"(^|[._]){re.escape(name)}")
        found = found or [k for k in known if word.search(k)]
    found = found or difflib.get_close_matches(name, known, n=2, cutoff=0.5)
    nearest = list(dict.fromkeys(found))[:2]
    return f"; did you mean {' or '.join(nearest)}?" if nearest else ""


def key_names(section: Any, prefix: str = "") -> Iterator[str]:
    """Dotted names of every leaf of a configuration or of a schema class, but an experiment's
    tables of values and the arguments of the user's callbacks."""
    for item in dataclasses.fields(section):
        if item.name in ("sweep", "callbacks"):
            continue
        value = getattr(section, item.name, None)
        if dataclasses.is_dataclass(value):
            yield from key_names(value, f"{prefix}{item.name}.")
        else:
            yield prefix + item.name


def _extra_keys(composed: DictConfig, config: Any, prefix: str = "") -> Iterator[str]:
    """Keys that Hydra's ``+key=value`` added to a schema that does not have them."""
    names = {item.name for item in dataclasses.fields(config)}
    for key_, value in composed.items():
        name = str(key_)
        if name not in names:
            yield f"{prefix}{name}"
        elif isinstance(value, DictConfig) and dataclasses.is_dataclass(getattr(config, name)):
            yield from _extra_keys(value, getattr(config, name), f"{prefix}{name}.")


def check(config: Config) -> None:
    """Bounds of every key, then what must fit together.  Raises ConfigError, one line."""
    check_bounds(config)
    model, data, train = config.model, config.data, config.train
    given = [f"train.{name}" for name in HORIZONS if getattr(train, name) is not None]
    require(len(given) == 1, f"{' and '.join(given)}: give the horizon once")
    _divides("model.n_heads", model.n_heads, "model.d_model", model.d_model)
    if model.n_kv_heads is not None:
        _divides("model.n_kv_heads", model.n_kv_heads, "model.n_heads", model.n_heads)
    require(
        model.position != "rope" or model.d_model // model.n_heads % 2 == 0,
        f"model.n_heads={model.n_heads}: rope needs an even d_model / n_heads, "
        f"here {model.d_model} / {model.n_heads} = {model.d_model // model.n_heads}",
    )
    scaling = model.rope_scaling
    require(
        scaling is None
        or (
            model.position == "rope"
            and scaling.keys() == set(LLAMA3)
            and min(scaling.values()) > 0
            and scaling["low_freq_factor"] < scaling["high_freq_factor"]
        ),
        f"model.rope_scaling={scaling}: must be null, or with position=rope numbers above 0 for "
        f"{', '.join(LLAMA3)}, the low below the high",
    )
    _divides("model.max_seq_len", model.max_seq_len, "train.batch_tokens", train.batch_tokens)
    stride = data.stride or model.max_seq_len
    require(
        stride <= model.max_seq_len,
        f"data.stride={stride}: more than model.max_seq_len={model.max_seq_len} would skip tokens",
    )
    require(
        data.val_fraction + data.test_fraction < 1,
        f"data.val_fraction={data.val_fraction} and data.test_fraction={data.test_fraction}: "
        "their sum must be below 1",
    )
    check_text(data)
    require(
        len(getattr(config.optim, "betas", (0.0, 0.0))) == 2,
        f"optim.betas={getattr(config.optim, 'betas', None)}: must be two numbers",
    )
    require(
        not (isinstance(config.optim, SgdOptim) and config.optim.nesterov)
        or getattr(config.optim, "momentum", 0) > 0,
        "optim.nesterov=true: needs optim.momentum above 0",
    )
    mlflow = config.logger.mlflow
    uri = mlflow.tracking_uri if mlflow else None
    require(
        uri is None
        or re.match(r"(sqlite|postgresql|mysql|mssql|https?)(\+\w+)?://", uri) is not None,
        f"logger.mlflow.tracking_uri={uri}: must be a database or a server, as sqlite:///FILE or "
        "http://HOST:PORT; MLflow takes no folders any more",
    )
    _check_rate_scaling(config)
    _check_lora(config)
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
    """Raises ConfigError for a value that cannot name a folder."""
    for name, value in named.items():
        require(
            value is None or re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}", value) is not None,
            f"{name}={value}: must be letters, digits, '.', '_', '-' only, as it names a folder",
        )


def _check_rate_scaling(config: Config) -> None:
    kind, allowed = config.optim.kind, f"allowed with optim={', '.join(SCALED_BY_WIDTH)}"
    holds = kind in SCALED_BY_WIDTH or not rate_is_scaled(config.model, config.optim)
    if config.optim.scale_rate_with_width:
        require(holds, f"optim.scale_rate_with_width=true: not with optim={kind}; {allowed}")
    line = f"model.parametrization=mup: has no rule for the rates of optim={kind}; {allowed}, muon"
    require(holds, line)


def _check_lora(config: Config) -> None:
    rank, d_model = config.optim.lora.rank, config.model.d_model
    if rank is None:
        alpha = config.optim.lora.alpha
        require(alpha is None, f"optim.lora.alpha={alpha}: needs optim.lora.rank")
        return
    given = f"optim.lora.rank={rank}"
    require(config.init_from is not None, f"{given}: needs init_from, whose weights it keeps")
    require(rank <= d_model, f"{given}: must be at most model.d_model={d_model}")
    standard = config.model.parametrization == "standard"
    require(standard, f"{given}: has no rule for its rates under model.parametrization=mup")
    require(config.optim.kind != "muon", f"{given}: not with optim=muon, as its factors are thin")


def check_sweepable(config: Settings) -> None:
    """Raises ConfigError for a job that a sweep cannot run.

    Each further process of a run repeats its command: in a sweep it would repeat the sweep.
    """
    hardware = config.hardware
    trainer = getattr(config, "trainer", None)
    require(trainer is None or not trainer.fast_dev_run, "trainer.fast_dev_run=true: no --multirun")
    several = {"devices": hardware.devices, "num_nodes": hardware.num_nodes}
    for name, value in several.items():
        require(
            value == 1,
            f"hardware.{name}={value}: a sweep runs jobs of one device side by side; "
            f"use hardware.{name}=1, or no --multirun",
        )


def check_bounds(section: Any, prefix: str = "") -> None:
    """Every field of a dataclass against the bounds its ``key`` gave.  Raises ConfigError."""
    for item in dataclasses.fields(section):
        value, name, bounds = getattr(section, item.name), prefix + item.name, item.metadata
        if dataclasses.is_dataclass(value):
            check_bounds(value, name + ".")
            continue
        for one in value if isinstance(value, list) else [value]:
            if one is not None:
                _check_value(name, one, **bounds)


def check_text(data: object) -> None:
    """Raise ConfigError for what no text can be read by."""
    line = "data.separator='': must be auto, none or a text that separates documents"
    require(getattr(data, "separator", "auto") != "", line)
    delimiter, encoding = (getattr(data, name, None) for name in ("delimiter", "encoding"))
    require(
        delimiter is None or (len(delimiter) == 1 and delimiter not in '"\n\r'),
        f"data.delimiter={delimiter}: must be one character, as , ; | or \\t",
    )
    if encoding is not None:
        try:
            b"".decode(encoding)
            known = codecs.lookup(encoding).incrementaldecoder is not None
        except (LookupError, ValueError):
            known = False
        require(known, f"data.encoding={encoding}: no such encoding; utf-8, utf-16, latin-1, ...")


def check_scale(scale: str) -> None:
    """Raises ConfigError where no experiment can have that scale."""
    _check_value("scale", scale, among=SCALES)


def _check_value(
    name: str,
    value: Any,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    among: Sequence[str] | None = None,
) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{name}={value}: must be a finite number")
    if among is not None and value not in among:
        raise ConfigError(f"{name}={value}: must be one of {', '.join(among)}")
    limits = [
        ("at least", least, operator.ge),
        ("above", above, operator.gt),
        ("at most", most, operator.le),
        ("below", below, operator.lt),
    ]
    for words, limit, holds in limits:
        if limit is not None and not holds(value, limit):
            raise ConfigError(f"{name}={value}: must be {words} {limit:.10g}")


def require(holds: bool, line: str) -> None:
    """Raises ConfigError with ``line`` where something does not hold."""
    if not holds:
        raise ConfigError(line)


def _divides(small_key: str, small: int, large_key: str, large: int) -> None:
    require(large % small == 0, f"{small_key}={small}: must divide {large_key}={large}")
