"""The words of a command line: which keys there are, how Hydra must be told, what errors mean."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import re
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, Generic, Optional, TypeVar

from hydra.core.override_parser.types import Override
from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationResolutionError,
    MissingMandatoryValue,
)

from tinygpt.config import ConfigError, Settings, checks, first_line, install
from tinygpt.config.names import DECIDED, DEVICES, OTHER_CHOICES, REMOVED, SYNONYMS

S = TypeVar("S", bound=Settings)

_HERE = Path(__file__).resolve().parent
# Inside an installed wheel conf/ lies in the package, in a checkout beside it.
CONF_DIR = str(next(p for p in (_HERE / "conf", _HERE.parent / "conf") if p.is_dir()))
FILES = ("data.path", "data.val_file", "data.test_file")  # keys of one path, or a list of them
LISTS = (*FILES, "data.text_column")  # that a configuration keeps as one text
IS_FILE = r"[/.*~]"  # in what should be a choice
LETTERS = {"k": 10**3, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
LONGEST = 10_000  # characters of an override: Hydra's time grows with their square
# What Hydra may make an object of, by the names in a configuration.
TARGETS = ("hydra_plugins.", "hydra._internal.core_plugins.", "optuna.samplers.")
LOGGING = (
    *("logging.StreamHandler", "logging.FileHandler", "logging.NullHandler"),
    "colorlog.ColoredFormatter",
)
STREAMS = ("ext://sys.stdout", "ext://sys.stderr")
# A quoted text, or a word alone in its place: the value, or one of a list or of choice(...).
_WORD = re.compile(
    r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|(?<=[=,(\[])(\s*)([^\s,()\[\]{}'"\\]+)(?=\s*(?:[,)\]]|$))"""
)
_RANGES = re.compile(r"=\s*(?:tag\(.*)?(?:range|interval|glob|int|float|bool)\(")
_LIST_OF_TEXTS = re.compile(rf"(\+*(?:{'|'.join(map(re.escape, LISTS))}))=(\[[^\[\]]*\])")


@dataclass(frozen=True, eq=False)
class Command(Generic[S]):
    """A command whose configuration Hydra composes."""

    name: str  # behind python -m tinygpt.
    file: str  # in conf/, beside those of the groups
    sweep: str  # what the study of a bare sweep is called
    variants: Mapping[str, Mapping[str, type]]  # of the groups that have several, by their name
    schema: type[S]
    read: Callable[[DictConfig, Sequence[str]], S]  # what was composed, checked


# --- keys and their types


def kinds(cls: type, prefix: str = "") -> dict[str, Any]:
    """Return the type of every key of a dataclass; those of a dataclass in it are ``field.key``."""
    return {name: kind for name, kind, _ in leaves(cls, prefix)}


def leaves(cls: type, prefix: str = "") -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
    """Yield the name, type and bounds of every key of a dataclass."""
    types = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        name, kind = prefix + field.name, types[field.name]
        for inner in (kind, *typing.get_args(kind)):
            if isinstance(inner, type) and dataclasses.is_dataclass(inner):
                yield from leaves(inner, f"{name}.")
                break
        else:
            yield name, kind, field.metadata


@functools.cache
def key_types(command: Command[Any]) -> dict[str, Any]:
    """Return the type of every key of a command, in any variant of its groups."""
    found = {name: kind for name, kind in kinds(command.schema).items() if name[:6] != "sweep."}
    for group, variants in command.variants.items():
        for cls in variants.values():
            found |= kinds(cls, f"{group}.")
    return found


@functools.cache
def value_types(command: Command[Any]) -> dict[str, set[Any]]:
    """Return what the values of every key may be; those of a list are its elements'."""
    return {name: _leaves(kind) for name, kind in key_types(command).items()}


def _leaves(kind: Any) -> set[Any]:
    inner = typing.get_args(kind)
    return set().union(*map(_leaves, inner)) - {type(None)} if inner else {kind}


def names(command: Command[Any]) -> list[str]:
    """Return all keys and sections of a command, sorted."""
    types = key_types(command)
    return sorted({*types, *(name.partition(".")[0] for name in types)})


def described(kind: Any, of_element: bool = False) -> str:
    """Return what a value of this type looks like, for an error line."""
    if typing.get_origin(kind) is typing.Union:
        kind = next(one for one in typing.get_args(kind) if one is not type(None))
    if typing.get_origin(kind) is list:
        if not of_element:
            return "a list, as [a,b]"
        kind = typing.get_args(kind)[0]
    texts = {
        int: "an integer",
        float: "a number",
        bool: "true or false",
        str: "a text",
    }
    return texts.get(kind, "set key by key")


# --- rewritten for Hydra


def as_meant(overrides: Sequence[str], command: Command[Any]) -> list[str]:
    """Return the overrides with values written as the schema needs them, for Hydra to read.

    Hydra takes 1.10 for the number 1.1, whatever the key, and cannot read ~: a text gets quotes,
    and so do lists of files and columns, which a configuration keeps as one text.  1e6 is a float,
    which no integer may be: it is written out, as are 50k and 2M.
    """
    found = []
    for item in overrides:
        if match := _LIST_OF_TEXTS.fullmatch(item):
            quoted = match[2].replace("'", "\\'")
            item = f"{match[1]}='{quoted}'"
        types = value_types(command).get(item.partition("=")[0].lstrip("+"), set())
        if types in ({str}, {int}, {float}) and not _RANGES.search(item):
            rewrite = _as_text if types == {str} else _as_whole if types == {int} else _as_number
            item = _WORD.sub(rewrite, item)
        if match := re.match(r"(\+*output_dir=['\"])(~[^'\"]*)", item):  # Hydra makes it too
            item = match[1] + os.path.expanduser(match[2]) + item[match.end() :]
        found.append(item)
    return found


def _as_text(match: re.Match[str]) -> str:
    space, word = match[1], match[2]
    return f"{space}'{word}'" if word and (_is_literal(word) or word[0] == "~") else match[0]


def plain(word: str) -> str:
    """Return 2M or 1.5B in digits, and any other word as it is."""
    match = re.fullmatch(r"([+-]?\d[\d_]*(?:\.\d+)?)([kKMBT])", word)
    return f"{(Decimal(match[1]) * LETTERS[match[2]]).normalize():f}" if match else word


def _as_number(match: re.Match[str]) -> str:
    return f"{match[1]}{plain(match[2])}" if match[2] else match[0]


def _as_whole(match: re.Match[str]) -> str:
    space, typed = match[1], match[2] or ""
    word = plain(typed.upper())
    if not _is_literal(word) or word in ("TRUE", "FALSE"):
        return match[0]
    is_whole = float(word).is_integer() and not re.fullmatch(r"[+-]?[\d_]+", typed)
    return f"{space}{int(Decimal(word))}" if is_whole else match[0]


def _is_literal(word: str) -> bool:
    """Return whether Hydra may read it as a number or a truth value."""
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


# --- mistakes that are seen before Hydra reads


def check(overrides: Sequence[str], command: Command[Any]) -> None:
    """Raise ConfigError for what is no ``key=value``, and for a name that is no key here, with
    what to write instead."""
    for before, item in zip(["", *overrides], overrides, strict=False):
        if item.startswith("~"):
            raise ConfigError(f"{item}: a key cannot be removed, only set")
        if not re.match(r"\+{0,2}[A-Za-z_][\w./@:-]*=", item):
            check_quotes(before, item, key_types(command))
            text = f"; did you mean data=custom data.path={item}?" if os.path.isfile(item) else ""
            raise ConfigError(f"'{item}': must be key=value{text}")
        if len(item) > LONGEST or re.search("[0-9]{1000}", item):
            raise ConfigError(f"{item:.60}...: longer than any value ({len(item)} characters)")
        name, _, value = item.lstrip("+").partition("=")
        if item == "hydra/sweeper=optuna" and importlib.util.find_spec("optuna") is None:
            raise ConfigError(f"{item}: is not installed; {install('optuna')}")
        if name == "data" and re.search(IS_FILE, value):
            raise ConfigError(no_such_choice(item, ()))
        if item in OTHER_CHOICES:
            raise ConfigError(f"{item}: no such choice; did you mean {OTHER_CHOICES[item]}?")
        if removed := REMOVED.get(name) or REMOVED.get(f"{name}={value}"):
            raise ConfigError(f"{name}={value}: removed; {removed}")
        decided = DECIDED.get(name) or DECIDED.get(name.rpartition(".")[0])
        # Lightning sets Hydra's folders for the further processes of a run
        is_theirs = "LOCAL_RANK" in os.environ or value.lower() in ("false", "null")
        if decided and not (name.startswith("hydra") and is_theirs):
            raise ConfigError(f"{name}={value}: is decided by {decided}")
        if name not in key_types(command) and (meant := synonym(name, value, command)):
            raise ConfigError(f"{name}={value}: no such key; did you mean {meant}?")


def check_quotes(before: str, item: str, types: Mapping[str, Any]) -> None:
    """Raise ConfigError where ``item`` seems to go on with the text that ``before`` began."""
    name = before.partition("=")[0].lstrip("+")
    if "=" in before and types.get(name) in (str, Optional[str]):
        raise ConfigError(f"'{item}': a text with spaces needs quotes, '{before} {item} ...'")


def synonym(name: str, value: str, command: Command[Any]) -> str:
    """Return the override that other programs spell ``name=value``, or "" if none is known."""
    last = name.rpartition(".")[2]
    meant = next((ours for ours, theirs in SYNONYMS.items() if last in theirs.split()), "")
    key = meant.partition("=")[0]
    if key not in names(command) or name.startswith(("hydra", "callbacks.", "trainer.")):
        return ""
    return meant.format(DEVICES.get(value, value) if key == "hardware" else value)


def explain_option(
    option: str, argv: Sequence[str], known: Sequence[str], command: Command[Any] | None = None
) -> str:
    """Return the line for an option that there is not, often meant for one of the keys ``known``
    and followed by its value."""
    name, equals, value = option.lstrip("-").partition("=")
    after = argv[argv.index(option) + 1 :][:1]
    if not equals:
        value = after[0] if after and not re.search("^-|=", after[0]) else "..."
    name = name.replace("-", "_")
    meant = f"{name}={value}" if name in known else ""
    meant = meant or (synonym(name, value, command) if command else "")
    hint = f"; did you mean {meant}?" if meant else checks.did_you_mean(name, known)
    return f"{option}: no such option{hint or '; --help shows what there is'}"


def several(item: Override) -> str:
    """Return the line for several values where one is needed."""
    name, _, value = str(item.input_line).partition("=")
    if name.lstrip("+") in FILES:
        return f"{item.input_line}: several files are a list, '{name}=[{value}]'"
    return f"{item.input_line}: several values need --multirun, a list [a,b], a text 'key=\"a,b\"'"


def check_targets(value: Any, name: str = "") -> None:
    """Raise ConfigError for a class or function that a configuration must not name.

    Hydra calls what stands under ``_target_`` and Python's logging what stands under ``()`` and
    ``class`` or behind ``ext://``, whatever it is, as soon as a configuration is composed.
    """
    if isinstance(value, DictConfig | ListConfig):
        value = OmegaConf.to_container(value, resolve=False)
    if isinstance(value, dict):
        for key, inner in value.items():
            check_targets(inner, f"{name}.{key}".lstrip("."))
    elif isinstance(value, list):
        for inner in value:
            check_targets(inner, name)
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


# --- what Hydra and OmegaConf raise


def explain(error: BaseException, overrides: Sequence[str], command: Command[Any]) -> str:
    """Return a library's error as one line with the key, the value and what is allowed."""
    if isinstance(error, MissingConfigException):
        group, _, choice = (error.missing_cfg_file or "").rpartition("/")
        shipped = [path.stem for path in Path(CONF_DIR, group).glob("*.yaml")]
        return no_such_choice(f"{group}={choice}", error.options or shipped)
    if isinstance(error, OverrideParseException):
        name, _, value = error.override.partition("=")
        value = value.replace("\\", "\\\\").replace('"', '\\"')
        return f"{error.override}: cannot be read; in quotes it can: '{name}=\"{value}\"'"
    cause: BaseException = error
    # under a debugger OmegaConf chains further causes that no longer name the key
    while cause.__cause__ is not None and not getattr(cause, "full_key", None):
        cause = cause.__cause__
    name = getattr(cause, "full_key", None) or ""
    if isinstance(cause, MissingMandatoryValue):
        return f"{name}: must be given, as {name}=..."
    if isinstance(cause, ConfigAttributeError | ConfigKeyError):
        return _unknown_key(name, command)
    if not name:
        line = first_line(cause)
        quoted = re.search(r"'([\w./@]+)'", line)  # perhaps a group that this command lacks
        if quoted and quoted[1] not in names(command):
            return _unknown_key(quoted[1], command)
        return line
    key = re.sub(r"\[\d+\]$", "", name)
    values = [item.split("=", 1)[1] for item in overrides if item.lstrip("+").startswith(f"{key}=")]
    given = f"{key}={values[-1] if values else '?'}"
    if isinstance(cause, InterpolationResolutionError):
        return f"{given}: {first_line(cause)}"
    return f"{given}: must be {described(key_types(command).get(key), key != name)}"


def no_such_choice(given: str, choices: Iterable[str]) -> str:
    """Return the line for ``group=choice``, where the group has other ``choices``."""
    (group, _, choice), known = given.partition("="), sorted(choices)
    if group == "data" and re.search(IS_FILE, choice):
        return f"{given}: no such choice; did you mean data=custom data.path={choice}?"
    near = checks.did_you_mean(choice, known)
    return f"{given}: no such choice" + (f"; there are {', '.join(known)}{near}" if known else "")


def _unknown_key(name: str, command: Command[Any]) -> str:
    """Return the line for a key, with the choices of its group that have it."""
    line = checks.unknown_key(name, names(command))
    group, _, last = name.partition(".")
    owners: list[str] = []
    for cls in command.variants.get(group, {}).values():
        fields = {field.name: field for field in dataclasses.fields(cls)}
        if last in fields:
            owners += fields["source" if group == "data" else "kind"].metadata["among"]
    return f"{line}; it is one of {group}={' or '.join(owners)}" if owners else line
