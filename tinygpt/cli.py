"""What the commands share: composing the configuration, reading ``key=value``, one-line errors."""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import operator
import os
import re
import signal
import sys
import typing
from collections.abc import Callable, Iterator, Sequence
from os.path import expanduser
from pathlib import Path
from typing import Any, NoReturn, ParamSpec, TypeVar

from hydra import __version__ as hydra_version
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from tinygpt import checks, explaining, fileio, signals, streams, words
from tinygpt import config as schema
from tinygpt.adaptation import config as adapting
from tinygpt.adaptation.config import AdaptConfig
from tinygpt.config import Config, ConfigError, RunError, Settings, is_out_of_memory
from tinygpt.explaining import Command, full_key, plain

T = TypeVar("T")
S = TypeVar("S", bound=Settings)
P = ParamSpec("P")

CONF_DIR = explaining.CONF_DIR
# Threads that wait must not spin: they would take the cores from those that others keep waiting.
WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}
PATHS = ("runs", "table", "output_dir")  # of the commands without Hydra
STRANGE = (AssertionError, AttributeError, TypeError)  # of OmegaConf, at a key that is null
LONGEST = 10_000  # characters of an override: Hydra's time grows with their square


@functools.cache
def register_schemas() -> None:
    """Makes the dataclasses known to Hydra, so that it checks names and types as it composes."""
    store = ConfigStore.instance()
    for command in COMMANDS:
        store.store(name=f"schema_{command.name}", node=command.schema)
    for group, choices in {**schema.CHOICES, "policy": adapting.POLICIES}.items():
        for name, node in choices.items():
            store.store(group=f"schema/{group}", name=name, node=node)


def compose_config(overrides: Sequence[str]) -> Config:
    """The checked configuration of ``tinygpt.run`` that ``overrides`` ask for.

    Raises ConfigError, one line.
    """
    return compose_for(RUN, overrides)


def compose_for(command: Command[S], overrides: Sequence[str]) -> S:
    """The checked configuration that ``overrides`` ask for.  Raises ConfigError, one line."""
    overrides = words.as_meant(with_lists(overrides), command)
    with in_one_line(overrides, command):
        _check_experiment(overrides, command)
        parsed = OverridesParser.create().parse_overrides(list(overrides))
        values = [item for item in parsed if _is_plain_value(item)]
        groups = tuple(item.input_line or "" for item in parsed if not _is_plain_value(item))
        composed = copy.deepcopy(_composed(command.file, groups))
        for item in values:
            _set(composed, item)
        return command.read(composed, overrides)


def checked_adaptation(composed: DictConfig, overrides: Sequence[str]) -> AdaptConfig:
    """As dataclasses, checked.  Raises ConfigError."""
    config = checks.as_dataclasses(composed, AdaptConfig)
    adapting.check_adapt(config)
    return config


def checked(composed: DictConfig, overrides: Sequence[str]) -> Config:
    """As dataclasses, with what ``init_from`` brings, checked.  Raises ConfigError."""
    config = checks.typed(composed, overrides)
    if config.init_from is not None:
        from tinygpt import pretrained  # reads files

        pretrained.adopt(config, overrides)
    checks.check(config)
    return config


@functools.lru_cache(maxsize=64)
def _composed(file: str, overrides: tuple[str, ...]) -> DictConfig:
    """What the chosen groups come to.

    Hydra reads a dozen files for that, 60 ms; setting the values of a sweep's thousand jobs on
    copies of it takes one.
    """
    with _initialized():
        return compose(file, overrides=list(overrides))


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


def _set(composed: DictConfig, item: Override) -> None:
    """Set a value as Hydra does when it composes: + adds a key, ++ adds it or sets it."""
    name, value = item.key_or_group, item.value()
    there = OmegaConf.select(composed, name, throw_on_missing=False)
    if item.is_add() and there is not None and not isinstance(value, dict | list):
        raise ConfigError(f"{item.input_line}: the key is there already, set it without +")
    added = item.is_add() or item.is_force_add()
    OmegaConf.update(composed, name, value, merge=True, force_add=added)


def _parser() -> argparse.ArgumentParser:
    """Return a parser of the options that ``hydra.main`` has, which it does not offer itself."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("overrides", nargs="*")
    for names in ("help h", "hydra-help", "resolve", "run r", "multirun m", "shell-completion sc"):
        parser.add_argument(*_options(names), action="store_true")
    for names in ("package p", "config-path cp", "config-name cn", "config-dir cd"):
        parser.add_argument(*_options(names))
    parser.add_argument("--experimental-rerun")
    parser.add_argument("--version", action="version", version=f"Hydra {hydra_version}")
    parser.add_argument("--cfg", "-c", choices=["job", "hydra", "all"])
    shown = ["all", "config", "defaults", "defaults-tree", "plugins", "searchpath"]
    parser.add_argument("--info", "-i", const="all", nargs="?", choices=shown)
    return parser


def _options(names: str) -> list[str]:
    long, *short = names.split()
    return [f"--{long}", *(f"-{name}" for name in short)]


def start(command: Command[S], job: Callable[[], object]) -> None:
    """What a command does with ``sys.argv``: prints its help, or has Hydra call ``job``.

    Every mistake is found before torch is imported and before anything is written: those of a
    single run here, those of a sweep's jobs by sweeping.
    """
    parser = _parser()
    parser.error = functools.partial(_unknown_option, command)  # type: ignore[method-assign]
    # it may stand anywhere; argparse wants options before or behind the overrides
    sys.argv[1:] = sorted(sys.argv[1:], key=lambda word: word not in ("--multirun", "-m"))
    sys.argv[1:] = words.as_meant(with_lists(sys.argv[1:]), command)
    arguments = parser.parse_args(sys.argv[1:])
    overrides = arguments.overrides
    if arguments.help:
        print(help_text(command))
        return
    words.check_options(vars(arguments))
    register_schemas()
    if not any((arguments.hydra_help, arguments.info, arguments.shell_completion)):
        if not sweeps(command, overrides, arguments.multirun):
            if "hydra/sweeper=optuna" in overrides:
                raise ConfigError("hydra/sweeper=optuna: needs --multirun")
            check_single(compose_for(command, overrides), overrides)
        elif not {item.split("=")[0] for item in overrides} & {"study", "experiment"}:
            sys.argv.append(f"study={sweep_name(command, overrides)}")
    job()


def _unknown_option(command: Command[S], message: str) -> NoReturn:
    raise ConfigError(words.explain_option(sys.argv[1:], message, command))


def check_single(config: Settings, overrides: Sequence[str]) -> None:
    """Refuses what only a sweep can use.  Raises ConfigError."""
    if config.launcher.kind != "serial":
        raise ConfigError(f"launcher={config.launcher.kind}: needs --multirun, or an experiment")
    if "scale" in {item.split("=")[0] for item in overrides}:
        raise ConfigError(f"scale={config.scale}: needs an experiment that has scales")


def sweep_name(command: Command[S], overrides: Sequence[str]) -> str:
    """The study of a bare sweep, named after the keys that it sweeps."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    swept = [o.get_key_element().rsplit(".", 1)[-1] for o in parsed if o.is_sweep_override()]
    return "-".join([command.sweep, *sorted(swept)])


def _check_experiment(overrides: Sequence[str], command: Command[S]) -> None:
    """Raises ConfigError for an experiment of another command, by the keys that it sets, and for
    several at once, of which the last alone would be done."""
    names = [item.partition("=")[2] for item in overrides if item.startswith("experiment=")]
    if names and re.search(r"[\[,(]", names[-1]):
        raise ConfigError(f"experiment={names[-1]}: takes one experiment; give a command to each")
    path = Path(CONF_DIR, "experiment", f"{names[-1] if names else ''}.yaml")
    if not path.is_file():
        return
    found = fileio.read_yaml(path)
    tables = [table for table in found.get("sweep", {}).values() if isinstance(table, dict)]
    tables += [found, *(row for table in tables for row in table.get("together", []))]
    keys = {key.split(".")[0] for table in tables for key in table}
    for other in COMMANDS:
        theirs, ours = (set(explaining.fields_of(one.schema)) for one in (other, command))
        if keys & (theirs - ours):
            raise ConfigError(f"experiment={names[-1]}: is one of python -m tinygpt.{other.name}")


def help_text(command: Command[S]) -> str:
    """What Hydra would print, but it lists every group first, a second's work, to leave it out."""
    shown = OmegaConf.load(Path(CONF_DIR, "hydra", "help", f"{command.name}.yaml"))
    return str(OmegaConf.create({"hydra": {"help": shown}}).hydra.help.template)


def sweeps(command: Command[S], overrides: Sequence[str], multirun: bool) -> bool:
    """Whether the command line, or the experiment it names, asks for a sweep."""
    with in_one_line(overrides, command), _initialized():
        _check_experiment(overrides, command)
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        composed = hydra.compose_config(
            command.file, list(overrides), RunMode.MULTIRUN, from_shell=False
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
        is_callback = re.fullmatch(r"callbacks\.\w+\._target_", name) is not None
        calls = (
            (last == "_target_" and not is_callback and not value.startswith(TARGETS))
            or (last in ("()", "class") and value not in LOGGING)
            or ("://" in value and value.startswith(("ext", "cfg")) and value not in STREAMS)
        )
        if calls:
            raise ConfigError(f"{name}={value}: names code that no configuration may call")


@contextlib.contextmanager
def in_one_line(overrides: Sequence[str], command: Command[S]) -> Iterator[None]:
    """Raises as a ConfigError, one line, what Hydra and OmegaConf raise."""
    register_schemas()
    _check_words(overrides)
    words.check(overrides, command)
    try:
        yield
    except ConfigError:
        raise
    except (HydraException, OmegaConfBaseException, ValueError, *STRANGE) as error:
        raise ConfigError(explaining.explain(error, overrides, command)) from error
    except OSError as error:  # a choice is sought as a file
        raise ConfigError(f"{max(overrides, key=len):.60}: {error.strerror}") from error
    except RecursionError as error:
        raise ConfigError(f"{max(overrides, key=len):.60}: nested too deeply") from error


def with_lists(overrides: Sequence[str]) -> list[str]:
    """Put lists of files and columns into quotes, as a configuration keeps them as one text."""
    keys = "|".join(map(re.escape, explaining.LISTS))
    pattern = re.compile(rf"(\+*(?:{keys}))=(\[[^\[\]]*\])")
    found = ((item, pattern.fullmatch(item)) for item in overrides)
    return [
        f"{match[1]}='{match[2].replace(chr(39), chr(92) + chr(39))}'" if match else item
        for item, match in found
    ]


def _check_words(overrides: Sequence[str]) -> None:
    for item in overrides:
        if item.startswith("~"):
            raise ConfigError(f"{item}: a key cannot be removed, only set")
        if not re.match(r"\+{0,2}[A-Za-z_][\w./@:-]*=", item):
            raise ConfigError(f"'{item}': must be key=value")
        if len(item) > LONGEST or re.search("[0-9]{1000}", item):
            raise ConfigError(f"{item:.60}...: longer than any value ({len(item)} characters)")


def read_arguments(cls: type[T], argv: Sequence[str], usage: str) -> T:
    """Fills the dataclass ``cls`` from ``key=value`` arguments, ``field.key=value`` for a
    dataclass in it.

    A text is taken verbatim after the first ``=``; a list is split at commas.  ``--help`` prints
    ``usage``.  Raises ConfigError for an unknown key, a missing one or a wrong type.
    """
    if any(item in ("-h", "--help") for item in argv):
        print(usage)
        raise SystemExit(0)
    values, kinds = OmegaConf.structured(cls), explaining.kinds(cls)
    verbatim: dict[str, Any] = {}  # OmegaConf would see ${...} and ??? in a text
    names = list(kinds)
    for item in argv:
        name, equals, value = item.partition("=")
        if not equals:
            raise ConfigError(f"{item}: must be key=value, one of {', '.join(names)}")
        if name not in names:
            raise ConfigError(checks.unknown_key(name, names))
        read = _read(value, kinds[name])
        if name in PATHS:
            read = words.files(value) if isinstance(read, list) else read and expanduser(read)
        if read is not None and str in (kinds[name], *typing.get_args(kinds[name])):
            verbatim[name], read = read, type(read)()
        section, _, last = name.rpartition(".")
        try:
            (OmegaConf.select(values, section) if section else values)[last] = read
        except OmegaConfBaseException as error:
            raise ConfigError(f"{name}={value}: {plain(str(error))}") from error
    try:
        arguments = OmegaConf.to_object(values)
    except MissingMandatoryValue as error:
        name = full_key(error)
        raise ConfigError(f"{name}: must be given, as {name}=...") from error
    for name, read in verbatim.items():
        section, _, last = name.rpartition(".")
        setattr(operator.attrgetter(section)(arguments) if section else arguments, last, read)
    checks.check_bounds(arguments)
    return arguments  # type: ignore[return-value]


def _read(text: str, kind: Any) -> Any:
    """``text`` as OmegaConf should see it for a field of type ``kind``."""
    kinds = typing.get_args(kind) or (kind,)
    if typing.get_origin(kind) is list:
        return text.split(",") if text else []
    return None if text == "null" and type(None) in kinds else text


def read_text(key: str, place: str, newline: str | None = None) -> str:
    """The text of the file that ``key`` names, without a byte order mark.  Raises ConfigError.

    ``newline=""`` keeps its line ends; else they become line feeds.
    """
    try:
        with Path(place).expanduser().open(encoding="utf-8-sig", newline=newline) as file:
            return file.read()
    except OSError as error:
        raise ConfigError(f"{key}={place}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{key}={place}: not UTF-8 text (byte {error.start})") from error


def one_line_errors(command: Callable[P, T]) -> Callable[P, T]:
    """Turns what the user can mend into one line on stderr: ConfigError 2, RunError 1, a signal
    128 and its number.

    ``HYDRA_FULL_ERROR=1`` shows the traceback instead.  Before torch is there it says, too, how
    threads wait.
    """

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        for name, value in WAITING.items():
            os.environ.setdefault(name, value)
        streams.survive()
        try:
            # a shell starts what stands before an & with SIGINT ignored; who sends it means it
            with signals.obeyed(also=(signal.SIGINT,)):
                return command(*args, **kwargs)
        except (Exception, KeyboardInterrupt, signals.Stopped) as error:
            if (stopped := _stopped_by(error)) is not None:
                if signals.PARENT not in os.environ:  # which says it
                    print(stopped.line, file=sys.stderr)
                raise SystemExit(stopped.code) from None
            if isinstance(error, RunError | OSError):
                _leave(error, 1)
            if isinstance(error, ConfigError):
                _leave(error, 2)
            if "determine home directory" in str(error):
                _leave(ConfigError("~: no home folder is known; set HOME, or give cache_dir="), 2)
            if is_out_of_memory(error):
                _leave(RunError(f"out of memory: {error}"), 1)
            raise

    return run


def _stopped_by(error: BaseException | None) -> signals.Stopped | None:
    """Return the signal behind ``error``: a library's clean-up may have stumbled over what it
    left half done."""
    while error is not None and not isinstance(error, KeyboardInterrupt | signals.Stopped):
        error = error.__context__
    return signals.Stopped(signal.SIGINT) if isinstance(error, KeyboardInterrupt) else error


def _leave(error: Exception, code: int) -> NoReturn:
    if os.environ.get("HYDRA_FULL_ERROR") == "1":
        raise error
    line = str(error)
    if isinstance(error, OSError) and error.strerror:
        line = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    shown = (c if c.isprintable() else repr(c)[1:-1] for c in " ".join(line.split()))
    print("error: " + "".join(shown), file=sys.stderr)  # what a file says moves no cursor
    raise SystemExit(code)


_HARDWARE = {"": schema.HardwareConfig}
RUN = Command(
    "run",
    "config",
    "sweep",
    {
        **schema.CHOICES,
        "model": {"": schema.ModelConfig},
        "train": {"": schema.TrainConfig},
        "hardware": _HARDWARE,
        "logger": {"": schema.LoggerConfig},
    },
    Config,
    checked,
)
ADAPT = Command(
    "adapt",
    "adapt",
    "adaptation",
    {
        **{group: schema.CHOICES[group] for group in ("data", "launcher")},
        "policy": adapting.POLICIES,
        "documents": {"": adapting.DocumentsConfig},
        "inner": {"": adapting.InnerConfig},
        "tuning": {"": adapting.TuningConfig},
        "outer": {"": adapting.OuterConfig},
        "hardware": _HARDWARE,
    },
    AdaptConfig,
    checked_adaptation,
)
COMMANDS: tuple[Command[Any], ...] = (RUN, ADAPT)
