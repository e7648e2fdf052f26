"""Compose configurations, start commands, and turn errors into one line, for every command."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import copy
import dataclasses
import functools
import gc
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, ParamSpec, TextIO, TypeVar

from hydra import __version__ as hydra_version
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from tinygpt import config as schema
from tinygpt import signals, streams, words
from tinygpt.adaptation import config as adapting
from tinygpt.adaptation.config import AdaptConfig
from tinygpt.arguments import read_arguments as read_arguments
from tinygpt.arguments import read_text as read_text
from tinygpt.arguments import show_help as show_help
from tinygpt.config import Config, ConfigError, RunError, Settings, checks, is_out_of_memory
from tinygpt.words import CONF_DIR as CONF_DIR
from tinygpt.words import Command

T = TypeVar("T")
S = TypeVar("S", bound=Settings)
P = ParamSpec("P")

# Waiting threads must not spin, which would take cores from the threads they wait for.
NOT_NEEDED = ("scipy", "matplotlib", "transformers")  # to import Lightning
WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}


# --- composing


@functools.cache
def register_schemas() -> None:
    """Register the schema with Hydra, so that it checks names and types."""
    store = ConfigStore.instance()
    for command in COMMANDS:
        store.store(name=f"schema_{command.name}", node=command.schema)
    for group, choices in {**schema.CHOICES, "policy": adapting.POLICIES}.items():
        for name, node in choices.items():
            store.store(group=f"schema/{group}", name=name, node=node)


def compose_config(overrides: Sequence[str]) -> Config:
    """Return the checked configuration of ``tinygpt.run``, or raise ConfigError."""
    return compose_for(RUN, overrides)


def compose_for(command: Command[S], overrides: Sequence[str]) -> S:
    """Return the checked configuration of a command, or raise ConfigError."""
    overrides = words.as_meant(overrides, command)
    with in_one_line(overrides, command):
        parsed = _parsed(command, overrides)
        for item in parsed:
            if item.is_sweep_override():
                raise ConfigError(words.several(item))
        return command.read(_composed(command, parsed), overrides)


def checked_adaptation(composed: DictConfig, overrides: Sequence[str]) -> AdaptConfig:
    """Return the composed configuration as dataclasses, checked, or raise ConfigError."""
    config = checks.as_dataclasses(composed, AdaptConfig)
    adapting.check_adapt(config)
    return config


def checked(composed: DictConfig, overrides: Sequence[str]) -> Config:
    """Return the composed configuration as checked dataclasses, including the shape and tokenizer
    of ``init_from``, or raise ConfigError."""
    config = checks.typed(composed, overrides)
    if config.init_from is not None:
        from tinygpt.runs import pretrained

        pretrained.adopt(config, overrides)
    checks.check(config)
    return config


def _parsed(command: Command[S], overrides: Sequence[str]) -> list[Override]:
    """Parse the overrides.  Raise ConfigError for an invalid choice, and for an experiment that
    sets the keys of another command."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    for item in parsed:
        group, value = item.key_or_group, item.value()
        path = Path(CONF_DIR, group)
        if group == "experiment" and (item.is_sweep_override() or isinstance(value, list)):
            raise ConfigError(f"{item.input_line}: takes one experiment; run one command for each")
        is_given = isinstance(value, str | list | dict) or item.is_sweep_override()
        may_be_null = value is None and group in ("experiment", "data")
        if path.is_dir() and not is_given and not may_be_null:
            choices = (file.stem for file in path.glob("*.yaml"))
            raise ConfigError(words.no_such_choice(str(item.input_line), choices))
        file = path / f"{value}.yaml"
        if group == "experiment" and file.is_file():
            text = file.read_text(encoding="utf-8")
            ours = {field.name for field in dataclasses.fields(command.schema)}
            for other in COMMANDS:
                theirs = {field.name for field in dataclasses.fields(other.schema)} - ours
                if theirs and re.search(rf"^ *({'|'.join(theirs)})[.:]", text, re.M):
                    line = f"{item.input_line}: is for python -m tinygpt.{other.name}"
                    raise ConfigError(line)
    return parsed


def _composed(
    command: Command[S], parsed: Sequence[Override], with_hydra: bool = False
) -> DictConfig:
    """Compose the chosen groups, then set the values as Hydra does, without those of a sweep."""
    items = [item for item in parsed if not item.is_sweep_override()]
    groups = tuple(str(item.input_line) for item in items if not _is_plain_value(item))
    composed = copy.deepcopy(_composed_groups(command.file, groups, with_hydra))
    for item in items:
        if not _is_plain_value(item):
            continue
        name, value = item.key_or_group, item.value()
        place, _, _ = name.rpartition(".")
        if place and OmegaConf.select(composed, place, default=0) is None:
            section, _, choice = place.partition(".")
            needed = f"{section}={choice or ', where the text is from'}"
            raise ConfigError(f"{item.input_line}: needs {needed}")
        there = OmegaConf.select(composed, name, throw_on_missing=False)
        if item.is_add() and there is not None and not isinstance(value, dict | list):
            raise ConfigError(f"{item.input_line}: the key is there already, set it without +")
        added = item.is_add() or item.is_force_add()
        OmegaConf.update(composed, name, value, merge=True, force_add=added)
    return composed


@functools.lru_cache(maxsize=64)
def _composed_groups(file: str, overrides: tuple[str, ...], with_hydra: bool) -> DictConfig:
    """Compose the chosen groups; cached, because it takes 60 ms and a sweep may have 1,000 jobs."""
    if not with_hydra:
        composed = copy.deepcopy(_composed_groups(file, overrides, True))
        with open_dict(composed):
            del composed.hydra
        return composed
    with contextlib.ExitStack() as stack:
        if not GlobalHydra.instance().is_initialized():
            stack.enter_context(initialize_config_dir(CONF_DIR, version_base="1.3"))
        return compose(file, overrides=list(overrides), return_hydra_config=True)


def _is_plain_value(item: Override) -> bool:
    """Return whether an override is like ``model.d_model=64``: not a group's choice or a sweep."""
    name = item.key_or_group
    is_group = item.package is not None or Path(CONF_DIR, name).is_dir()
    return not (is_group or item.is_sweep_override() or name.startswith("hydra"))


@contextlib.contextmanager
def in_one_line(overrides: Sequence[str], command: Command[S]) -> Iterator[None]:
    """Turn the errors of Hydra and OmegaConf into a ConfigError, one line."""
    register_schemas()
    words.check(overrides, command)
    longest = f"{max(overrides, key=len, default=''):.60}"
    try:
        yield
    except ConfigError:
        raise
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(words.explain(error, overrides, command)) from error
    except (AssertionError, AttributeError, TypeError, ValueError) as error:  # OmegaConf's own
        line = f"{longest}: cannot be set from the command line ({schema.first_line(error)})"
        raise ConfigError(line) from error
    except OSError as error:  # from looking up a choice as a file
        raise ConfigError(f"{longest}: {error.strerror}") from error
    except RecursionError as error:
        raise ConfigError(f"{longest}: nested too deeply") from error


# --- starting a command with Hydra


def start(command: Command[S], job: Callable[[], object]) -> None:
    """Print the help if ``sys.argv`` asks for it, or else let Hydra call ``job``.

    Mistakes in the configuration are found before torch is imported and anything is written.
    """
    # argparse wants options before or after the overrides, not between them
    sys.argv[1:] = sorted(sys.argv[1:], key=lambda word: word not in ("--multirun", "-m"))
    sys.argv[1:] = words.as_meant(sys.argv[1:], command)
    arguments = _read_options(command, sys.argv[1:])
    overrides = arguments.overrides
    if arguments.help:
        show_help(help_text(command))
        return
    register_schemas()
    if not any((arguments.hydra_help, arguments.info, arguments.shell_completion)):
        is_sweep = sweeps(command, overrides, arguments.multirun)
        if not is_sweep:
            if "hydra/sweeper=optuna" in overrides:
                raise ConfigError("hydra/sweeper=optuna: needs --multirun")
            config = compose_for(command, overrides)
            kind = config.launcher.kind
            if kind not in ("auto", "serial"):
                raise ConfigError(f"launcher={kind}: needs --multirun, or an experiment")
            if any(item.startswith("scale=") for item in overrides):
                raise ConfigError(f"scale={config.scale}: needs an experiment that has scales")
        elif not {item.split("=")[0] for item in overrides} & {"study", "experiment"}:
            sys.argv.append(f"study={sweep_name(command, overrides)}")
        if not arguments.cfg:
            loading(lean=not (is_sweep or getattr(config, "callbacks", None)))
    job()


def _read_options(command: Command[S], argv: Sequence[str]) -> argparse.Namespace:
    """Read the options of ``hydra.main`` that we support.  Raise ConfigError for others."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--help", "-h", action="store_true")
    parser.add_argument("--version", action="version", version=f"Hydra {hydra_version}")
    parser.add_argument("--package", "-p")
    parser.add_argument("--resolve", action="store_true")
    one = parser.add_mutually_exclusive_group()
    for names in (["--run", "-r"], ["--multirun", "-m"], ["--hydra-help"]):
        one.add_argument(*names, action="store_true")
    one.add_argument("--shell-completion", "-sc", action="store_true")
    one.add_argument("--cfg", "-c", choices=["job", "hydra", "all"])
    shown = ["all", "config", "defaults", "defaults-tree", "plugins", "searchpath"]
    one.add_argument("--info", "-i", const="all", nargs="?", choices=shown)

    def refuse(message: str) -> NoReturn:
        raise ConfigError(message.removeprefix("argument "))

    parser.error = refuse  # type: ignore[method-assign]
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        option = next((word for word in unknown if word.startswith("-")), unknown[0])
        raise ConfigError(words.explain_option(option, argv, words.names(command), command))
    if (arguments.resolve or arguments.package) and not arguments.cfg:
        raise ConfigError("--resolve, --package: need --cfg job, whose configuration they show")
    return arguments


def sweep_name(command: Command[S], overrides: Sequence[str]) -> str:
    """Return the study's name for a sweep without one, from the keys that it varies."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    swept = [o.get_key_element().rsplit(".", 1)[-1] for o in parsed if o.is_sweep_override()]
    return "-".join([command.sweep, *sorted(swept)])


def help_text(command: Command[S]) -> str:
    """Return the help; Hydra would print the same, but takes a second to list every group."""
    shown = OmegaConf.load(Path(CONF_DIR, "hydra", "help", f"{command.name}.yaml"))
    return str(OmegaConf.create({"hydra": {"help": shown}}).hydra.help.template)


def sweeps(command: Command[S], overrides: Sequence[str], multirun: bool) -> bool:
    """Return whether the command line or its experiment asks for a sweep."""
    with in_one_line(overrides, command):
        composed = _composed(command, _parsed(command, overrides), with_hydra=True)
        checks.check_scale(composed.scale)
        words.check_targets(composed)
    return multirun or composed.hydra.mode == RunMode.MULTIRUN


def announce(doing: str, file: TextIO | None = None) -> None:
    """Print what the next seconds are spent on, unless the parent process does."""
    if signals.PARENT not in os.environ:
        print(f"{doing} …", file=file, flush=True)


_shown = contextlib.ExitStack()


def loading(file: TextIO | None = None, *, lean: bool = False) -> None:
    """Say that libraries are being loaded, with a spinner until ``loaded`` is called."""
    announce("loading", file)
    _shown.enter_context(importing(file, lean=lean))


@contextlib.contextmanager
def importing(file: TextIO | None = None, *, lean: bool = False) -> Iterator[None]:
    """Show a spinner while the block imports torch; see ``quickly``."""
    with spinning("torch, Lightning", file), quickly(lean=lean):
        yield


@contextlib.contextmanager
def quickly(*, lean: bool) -> Iterator[None]:
    """Make importing Lightning take half as long, or without ``lean`` four fifths.

    Garbage is not collected.  With ``lean``, torchmetrics does not import packages that only its
    metrics of sound, images and texts need, which a user's own callback might use.
    """
    from lightning_utilities.core import imports

    met, is_there = imports.RequirementCache.__bool__, imports.package_available
    if lean:
        imports.RequirementCache.__bool__ = lambda self: (  # type: ignore[method-assign]
            str(self.requirement).partition(">")[0] not in NOT_NEEDED and met(self)
        )
        imports.package_available = lambda name: (  # type: ignore[assignment]
            name not in NOT_NEEDED and is_there(name)
        )
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        imports.RequirementCache.__bool__ = met  # type: ignore[method-assign]
        imports.package_available = is_there


def loaded() -> None:
    """Remove the spinner of ``loading``."""
    _shown.close()


def spinning(what: str, file: TextIO | None = None) -> contextlib.AbstractContextManager[object]:
    """Return a spinner, if ``file`` is a terminal."""
    loaded()
    from rich.console import Console

    console = Console(file=file)
    is_shown = console.is_terminal and signals.PARENT not in os.environ
    return console.status(what) if is_shown else contextlib.nullcontext()


# --- errors and exit codes


def one_line_errors(command: Callable[P, T]) -> Callable[P, T]:
    """Decorate a command: print errors that users can fix as one line on stderr, and exit.

    The exit code is 2 for a ConfigError, 1 for a RunError, and 128 plus the number for a signal.
    ``HYDRA_FULL_ERROR=1`` shows the traceback instead.  Also sets how threads wait, which must
    happen before torch is imported.
    """

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        for name, value in WAITING.items():
            os.environ.setdefault(name, value)
        streams.survive()
        atexit.register(gc.freeze)  # collecting torch's objects would take a second
        try:
            # a shell ignores SIGINT for background commands, but whoever sends it means it
            with signals.obeyed(also=(signal.SIGINT,)), _shown:
                return command(*args, **kwargs)
        except (Exception, KeyboardInterrupt, signals.Stopped) as error:
            if (stopped := _stopped_by(error)) is not None:
                if signals.PARENT not in os.environ:  # the parent prints it
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
    """Return the signal behind ``error``, which may be an error of a library's interrupted
    clean-up."""
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
    print("error: " + "".join(shown), file=sys.stderr)  # control characters are escaped
    raise SystemExit(code)


_ADAPT_VARIANTS = {group: schema.CHOICES[group] for group in ("data", "launcher")}
_ADAPT_VARIANTS["policy"] = adapting.POLICIES
RUN = Command("run", "config", "sweep", schema.CHOICES, Config, checked)
ADAPT = Command("adapt", "adapt", "adaptation", _ADAPT_VARIANTS, AdaptConfig, checked_adaptation)
COMMANDS: tuple[Command[Any], ...] = (RUN, ADAPT)
