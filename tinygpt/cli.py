"""What the commands share: composing the configuration, reading ``key=value``, one-line errors."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import operator
import os
import re
import sys
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, ParamSpec, TypeVar

from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    MissingConfigException,
    OverrideParseException,
)
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from tinygpt import checks
from tinygpt import config as schema
from tinygpt.config import Config, ConfigError, RunError

T = TypeVar("T")
P = ParamSpec("P")

_HERE = Path(__file__).resolve().parent
# Inside an installed wheel conf/ lies in the package, in a checkout beside it.
CONF_DIR = str(next(p for p in (_HERE / "conf", _HERE.parent / "conf") if p.is_dir()))

_PLAIN: dict[str, dict[str, type]] = {
    "model": {"": schema.ModelConfig},
    "train": {"": schema.TrainConfig},
    "hardware": {"": schema.HardwareConfig},
    "logger": {"": schema.LoggerConfig},
}


@functools.cache
def register_schemas() -> None:
    """Makes the dataclasses known to Hydra, so that it checks names and types as it composes."""
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    for group, choices in schema.CHOICES.items():
        for name, node in choices.items():
            store.store(group=f"schema/{group}", name=name, node=node)


def compose_config(overrides: Sequence[str]) -> Config:
    """The checked configuration that ``overrides`` ask for.  Raises ConfigError, one line."""
    with explaining(overrides):
        parsed = OverridesParser.create().parse_overrides(list(overrides))
        values = [item for item in parsed if _is_plain_value(item)]
        groups = tuple(item.input_line or "" for item in parsed if not _is_plain_value(item))
        composed = copy.deepcopy(_composed(groups))
        ConfigLoaderImpl._apply_overrides_to_config(values, composed)
        return checked(composed, overrides)


def checked(composed: DictConfig, overrides: Sequence[str]) -> Config:
    """As dataclasses, with what ``init_from`` brings, checked.  Raises ConfigError."""
    config = checks.typed(composed, overrides)
    if config.init_from is not None:
        from tinygpt import pretrained  # reads files

        pretrained.adopt(config, overrides)
    checks.check(config)
    return config


@functools.lru_cache(maxsize=64)
def _composed(overrides: tuple[str, ...]) -> DictConfig:
    """What the chosen groups come to.

    Hydra reads a dozen files for that, 60 ms; setting the values of a sweep's thousand jobs on
    copies of it takes one.
    """
    with _initialized():
        return compose("config", overrides=list(overrides))


@contextlib.contextmanager
def _initialized() -> Iterator[None]:
    """Hydra knows conf/: it does already where it is Hydra that called."""
    if GlobalHydra.instance().is_initialized():
        yield
    else:
        with initialize_config_dir(CONF_DIR, version_base="1.3"):
            yield


def _is_plain_value(item: Override) -> bool:
    """``model.d_model=64``: neither the choice of a group nor a sweep."""
    name = item.key_or_group
    is_group = item.package is not None or Path(CONF_DIR, name).is_dir()
    return not (is_group or item.is_sweep_override() or name.startswith("hydra"))


def help_text() -> str:
    """What Hydra would print, but it lists every group first, a second's work, to leave it out."""
    shown = OmegaConf.load(Path(CONF_DIR, "hydra", "help", "tinygpt.yaml"))
    return str(OmegaConf.create({"hydra": {"help": shown}}).hydra.help.template)


def sweeps(overrides: Sequence[str], multirun: bool) -> bool:
    """Whether the command line, or the experiment it names, asks for a sweep."""
    with explaining(overrides), _initialized():
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        composed = hydra.compose_config(
            "config", list(overrides), RunMode.MULTIRUN, from_shell=False
        )
        checks.check_scale(composed.scale)
        _check_targets(composed)
    return multirun or composed.hydra.mode == RunMode.MULTIRUN


# What Hydra may make an object of, by the names in a configuration.
TARGETS = ("hydra_plugins.", "hydra._internal.core_plugins.", "optuna.samplers.")
LOGGING = (
    *("logging.StreamHandler", "logging.FileHandler", "logging.NullHandler"),
    "colorlog.ColoredFormatter",
)
STREAMS = ("ext://sys.stdout", "ext://sys.stderr")


def _check_targets(value: Any, name: str = "") -> None:
    """Raises ConfigError for a class or function that a configuration must not name.

    Hydra calls what stands under ``_target_`` and Python's logging what stands under ``()`` and
    ``class`` or behind ``ext://``, whatever it is, as soon as a configuration is composed.
    """
    if isinstance(value, DictConfig | ListConfig):
        value = OmegaConf.to_container(value, resolve=False)
    if isinstance(value, dict):
        for key, inner in value.items():
            _check_targets(inner, f"{name}.{key}".lstrip("."))
    elif isinstance(value, list):
        for inner in value:
            _check_targets(inner, name)
    elif isinstance(value, str):
        last = name.rpartition(".")[2]
        calls = (
            (last == "_target_" and not value.startswith(TARGETS))
            or (last in ("()", "class") and value not in LOGGING)
            or ("://" in value and value.startswith(("ext", "cfg")) and value not in STREAMS)
        )
        if calls:
            raise ConfigError(f"{name}={value}: names code that no configuration may call")


@contextlib.contextmanager
def explaining(overrides: Sequence[str]) -> Iterator[None]:
    """Turns what Hydra and OmegaConf raise into a ConfigError."""
    register_schemas()
    _check_words(overrides)
    try:
        yield
    except ConfigError:
        raise
    except (HydraException, OmegaConfBaseException, ValueError, AssertionError) as error:
        raise ConfigError(_explain(error, overrides)) from error
    except OSError as error:  # a choice is sought as a file
        raise ConfigError(f"{max(overrides, key=len):.60}: {error.strerror}") from error


def _check_words(overrides: Sequence[str]) -> None:
    for item in overrides:
        if item.startswith("~"):
            raise ConfigError(f"{item}: a key cannot be removed, only set")
        if not re.match(r"\+{0,2}[A-Za-z_][\w./@:-]*=", item):
            raise ConfigError(f"'{item}': must be key=value")


def _explain(error: BaseException, overrides: Sequence[str]) -> str:
    """Hydra's and OmegaConf's messages, as one line with the key, the value and what is allowed."""
    cause: BaseException = error
    # under a debugger OmegaConf chains further causes that no longer name the key
    while cause.__cause__ is not None and not _full_key(cause):
        cause = cause.__cause__
    text = str(cause)
    name = _full_key(cause)
    if isinstance(error, MissingConfigException):
        return _unknown_choice(text)
    if isinstance(error, OverrideParseException):
        name, _, value = error.override.partition("=")
        value = value.replace("\\", "\\\\").replace('"', '\\"')
        return f"{error.override}: cannot be read; in quotes it can: '{name}=\"{value}\"'"
    if "Ambiguous value" in text or "requires --multirun" in text:
        item = text.splitlines()[0].split("'", 1)[1].rsplit("'", 1)[0]
        return f"{item}: several values need --multirun, a list [a,b], a text 'key=\"a,b\"'"
    if "group override must be" in text:
        return _not_a_choice(overrides)
    if isinstance(cause, AssertionError):  # Hydra's, at a key of a section that is null
        unset = [item for item in overrides if re.match(r"\+*logger\.\w+\.", item)]
        chosen = unset[0].split(".")[1] if unset else ""
        return f"{unset[0]}: needs logger={chosen}" if unset else text.splitlines()[0]
    missing = re.search(r"[Mm]issing mandatory value: (\S+)", text)
    if missing:
        name = missing.group(1) if "." in missing.group(1) else name
        return f"{name}: must be given, as {name}=..."
    if isinstance(cause, OmegaConfBaseException) and "not in '" in text:
        return _unknown_key(name)
    if isinstance(error, ConfigCompositionException) and "Could not override" in text:
        return _unknown_key(text.split("'")[1])
    if name:
        name = re.sub(r"\[\d+\]$", "", name)
        return f"{name}={_given(name, overrides)}: {_plain(text)}"
    return text.splitlines()[0]


def _full_key(error: BaseException) -> str:
    found = re.search(r"full_key: (\S+)", str(error))
    return found.group(1) if found else ""


def _given(name: str, overrides: Sequence[str]) -> str:
    values = [
        item.split("=", 1)[1] for item in overrides if item.lstrip("+").startswith(f"{name}=")
    ]
    return values[-1] if values else "?"


def _plain(text: str) -> str:
    line = text.splitlines()[0]
    if "not Optional" in line:
        return "must not be null"
    if "not a valid bool" in line:
        return "must be true or false"
    if "is not a ListConfig" in line:
        return "must be a list, as [a,b]"
    if "Invalid type assigned" in line:
        return "must be set key by key"
    kinds = {"Integer": "an integer", "Float": "a number", "Boolean": "true or false"}
    found = re.search(r"could not be converted to (\w+)", line)
    return f"must be {kinds.get(found.group(1), found.group(1))}" if found else line


def _unknown_choice(text: str) -> str:
    """From Hydra's "Could not find 'group/choice'" or "Could not load 'group/choice'."."""
    group, _, choice = re.findall(r"'([^']*)'", text)[1].rpartition("/")
    return f"{group}={choice}: no such choice{_choices(group)}"


def _not_a_choice(overrides: Sequence[str]) -> str:
    """A group that was given a number or null: Hydra does not say which."""
    for item in OverridesParser.create().parse_overrides(list(overrides)):
        group = item.key_or_group
        if Path(CONF_DIR, group).is_dir() and not isinstance(item.value(), str | list):
            return f"{item.input_line}: no such choice{_choices(group)}"
    return f"{' '.join(overrides)}: a group takes the name of a choice"


def _choices(group: str) -> str:
    names = sorted(p.stem for p in Path(CONF_DIR, group).glob("*.yaml"))
    return f"; there are {', '.join(names)}" if names else ""


def _unknown_key(name: str) -> str:
    """With the choices of its group that have this key, where the chosen one has not."""
    line = checks.unknown_key(name, _known_keys())
    group, _, last = name.partition(".")
    owners: list[str] = []
    for choice in schema.CHOICES.get(group, {}).values():
        fields = {f.name: f for f in dataclasses.fields(choice)}
        if last in fields:
            owners += fields["source" if group == "data" else "kind"].metadata["among"]
    return f"{line}; it is one of {group}={' or '.join(owners)}" if owners else line


def _known_keys() -> list[str]:
    names = [f.name for f in dataclasses.fields(Config) if f.name != "sweep"]
    for group, choices in {**schema.CHOICES, **_PLAIN}.items():
        for cls in choices.values():
            names += _kinds(cls, f"{group}.")
    return sorted(set(names))


def read_arguments(cls: type[T], argv: Sequence[str], usage: str) -> T:
    """Fills the dataclass ``cls`` from ``key=value`` arguments, ``field.key=value`` for a
    dataclass in it.

    A text is taken verbatim after the first ``=``; a list is split at commas.  ``--help`` prints
    ``usage``.  Raises ConfigError for an unknown key, a missing one or a wrong type.
    """
    if any(item in ("-h", "--help") for item in argv):
        print(usage)
        raise SystemExit(0)
    values, kinds = OmegaConf.structured(cls), _kinds(cls)
    verbatim: dict[str, Any] = {}  # OmegaConf would see ${...} and ??? in a text
    names = list(kinds)
    for item in argv:
        name, equals, value = item.partition("=")
        if not equals:
            raise ConfigError(f"{item}: must be key=value, one of {', '.join(names)}")
        if name not in names:
            raise ConfigError(checks.unknown_key(name, names))
        read = _read(value, kinds[name])
        if read is not None and str in (kinds[name], *typing.get_args(kinds[name])):
            verbatim[name], read = read, type(read)()
        section, _, last = name.rpartition(".")
        try:
            (OmegaConf.select(values, section) if section else values)[last] = read
        except OmegaConfBaseException as error:
            raise ConfigError(f"{name}={value}: {_plain(str(error))}") from error
    try:
        arguments = OmegaConf.to_object(values)
    except MissingMandatoryValue as error:
        name = _full_key(error)
        raise ConfigError(f"{name}: must be given, as {name}=...") from error
    for name, read in verbatim.items():
        section, _, last = name.rpartition(".")
        setattr(operator.attrgetter(section)(arguments) if section else arguments, last, read)
    checks.check_bounds(arguments)
    return arguments  # type: ignore[return-value]


def _kinds(cls: type, prefix: str = "") -> dict[str, Any]:
    """The type of every key of a dataclass; those of a dataclass in it are ``field.key``."""
    kinds: dict[str, Any] = {}
    for name, kind in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            kinds |= _kinds(kind, f"{prefix}{name}.")
        else:
            kinds[prefix + name] = kind
    return kinds


def _read(text: str, kind: Any) -> Any:
    """``text`` as OmegaConf should see it for a field of type ``kind``."""
    kinds = typing.get_args(kind) or (kind,)
    if typing.get_origin(kind) is list:
        return text.split(",") if text else []
    return None if text == "null" and type(None) in kinds else text


def read_text(key: str, place: str) -> str:
    """The text of the file that ``key`` names, without a byte order mark.  Raises ConfigError."""
    try:
        return Path(place).expanduser().read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{key}={place}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{key}={place}: not UTF-8 text (byte {error.start})") from error


def one_line_errors(command: Callable[P, T]) -> Callable[P, T]:
    """Turns what the user can mend into one line on stderr: ConfigError 2, RunError 1.

    ``HYDRA_FULL_ERROR=1`` shows the traceback instead.
    """

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return command(*args, **kwargs)
        except ConfigError as error:
            _leave(error, 2)
        except (RunError, OSError) as error:
            _leave(error, 1)
        except KeyboardInterrupt:
            print("interrupted; a run goes on from its last checkpoint", file=sys.stderr)
            raise SystemExit(130) from None

    return run


def _leave(error: Exception, code: int) -> NoReturn:
    if os.environ.get("HYDRA_FULL_ERROR") == "1":
        raise error
    line = str(error)
    if isinstance(error, OSError) and error.strerror:
        line = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    print("error: " + " ".join(line.split()), file=sys.stderr)
    raise SystemExit(code)
