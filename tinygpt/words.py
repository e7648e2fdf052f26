"""Look up keys, rewrite overrides for Hydra, and explain mistakes in a command line."""

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
# conf/ is inside the package of an installed wheel, and beside it in a checkout.
CONF_DIR = str(next(p for p in (_HERE / "conf", _HERE.parent / "conf") if p.is_dir()))
FILES = ("data.path", "data.val_file", "data.test_file")  # keys of one path or a list of paths
LISTS = (*FILES, "data.text_column")  # keys of lists that a configuration keeps as one text
IS_FILE = r"[/.*~]"  # marks a value as a file rather than a choice
LETTERS = {"k": 10**3, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
LONGEST = 10_000  # characters of an override, as Hydra takes quadratic time
# Prefixes of the classes that Hydra may instantiate.
TARGETS = ("hydra_plugins.", "hydra._internal.core_plugins.", "optuna.samplers.")
LOGGING = (
    *("logging.StreamHandler", "logging.FileHandler", "logging.NullHandler"),
    "colorlog.ColoredFormatter",
)
STREAMS = ("ext://sys.stdout", "ext://sys.stderr")
# A quoted text, or an unquoted word that is the value or an element of a list or of choice(...).
_WORD = re.compile(
    r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|(?<=[=,(\[])(\s*)([^\s,()\[\]{}'"\\]+)(?=\s*(?:[,)\]]|$))"""
)
_RANGES = re.compile(r"=\s*(?:tag\(.*)?(?:range|interval|glob|int|float|bool)\(")
_LIST_OF_TEXTS = re.compile(rf"(\+*(?:{'|'.join(map(re.escape, LISTS))}))=(\[[^\[\]]*\])")


@dataclass(frozen=True, eq=False)
class Command(Generic[S]):
    """Describe a command whose configuration Hydra composes."""

    name: str  # after python -m tinygpt.
    file: str  # primary configuration in conf/
    sweep: str  # start of a sweep's default study name
    variants: Mapping[str, Mapping[str, type]]  # schemas of each group, by their name in conf/
    schema: type[S]
    read: Callable[[DictConfig, Sequence[str]], S]  # checks a composed configuration


# --- keys and their types


def kinds(cls: type, prefix: str = "") -> dict[str, Any]:
    """Return the type of every key of a dataclass."""
    return {name: kind for name, kind, _ in leaves(cls, prefix)}


def leaves(cls: type, prefix: str = "") -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
    """Yield the dotted name, type and bounds of every key of a dataclass."""
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
    """Return the type of every key of a command, including all variants of its groups."""
    found = {name: kind for name, kind in kinds(command.schema).items() if name[:6] != "sweep."}
    for group, variants in command.variants.items():
        for cls in variants.values():
            found |= kinds(cls, f"{group}.")
    return found


@functools.cache
def value_types(command: Command[Any]) -> dict[str, set[Any]]:
    """Return the scalar types that each key accepts, for lists those of the elements."""

    def scalars(kind: Any) -> set[Any]:
        inner = typing.get_args(kind)
        return set().union(*map(scalars, inner)) - {type(None)} if inner else {kind}

    return {name: scalars(kind) for name, kind in key_types(command).items()}


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
    texts = {int: "an integer", float: "a number", bool: "true or false", str: "a text"}
    return texts.get(kind, "set key by key")


# --- rewritten for Hydra


def as_meant(overrides: Sequence[str], command: Command[Any]) -> list[str]:
    """Return the overrides with their values rewritten so that Hydra reads them as the schema does.

    Texts that look like a number, or begin with ~, are quoted, as are lists of files and columns,
    which are kept as one text.  Integers such as 1e6, 50k and 2M are written out.
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
    """Return a number such as 2M or 1.5B in digits, and any other word unchanged."""
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
    """Return whether Hydra may read a word as a number or a boolean."""
    try:
        return word.lower() in ("true", "false") or float(word) is not None
    except ValueError:
        return False


def files(text: str) -> list[str]:
    """Return the paths in ``a,b`` or ``[a,b]``; names of existing files may contain commas."""
    if text.startswith("[") and text.endswith("]") and not os.path.exists(text):
        text = text[1:-1]
    pieces, found = text.split(",") if text else [], []
    while pieces:
        ends = range(len(pieces), 0, -1)
        paths = [os.path.expanduser(",".join(pieces[:end])) for end in ends]
        path = next((path for path in paths if os.path.exists(path)), paths[-1])
        found.append(path)
        del pieces[: len(pieces) - paths.index(path)]
    return found


# --- mistakes found before Hydra reads the overrides


def check(overrides: Sequence[str], command: Command[Any]) -> None:
    """Raise ConfigError for anything but ``key=value``, and for a removed, decided or foreign key.

    The line says what to write instead.
    """
    for before, item in zip(["", *overrides], overrides, strict=False):
        if item.startswith("~"):
            raise ConfigError(f"{item}: a key cannot be removed, only set")
        if not re.match(r"\+{0,2}[A-Za-z_][\w./@:-]*=", item):
            check_quotes(before, item, key_types(command))
            text = f"; did you mean data=custom data.path={item}?" if os.path.isfile(item) else ""
            raise ConfigError(f"'{item}': must be key=value{text}")
        if len(item) > LONGEST or re.search("[0-9]{1000}", item):
            raise ConfigError(f"{item:.60}...: too long ({len(item)} characters)")
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
        is_allowed = "LOCAL_RANK" in os.environ or value.lower() in ("false", "null")
        if decided and not (name.startswith("hydra") and is_allowed):
            raise ConfigError(f"{name}={value}: is decided by {decided}")
        if name not in key_types(command) and (meant := synonym(name, value, command)):
            raise ConfigError(f"{name}={value}: no such key; did you mean {meant}?")


def check_quotes(before: str, item: str, types: Mapping[str, Any]) -> None:
    """Raise ConfigError if ``item`` seems to continue the text in ``before``."""
    name = before.partition("=")[0].lstrip("+")
    if "=" in before and types.get(name) in (str, Optional[str]):
        raise ConfigError(f"'{item}': a text with spaces needs quotes, '{before} {item} ...'")


def synonym(name: str, value: str, command: Command[Any]) -> str:
    """Return our override for another program's ``name=value``, or "" if unknown."""
    last = name.rpartition(".")[2]
    ours = next((ours for ours, theirs in SYNONYMS.items() if last in theirs.split()), "")
    key = ours.partition("=")[0]
    if key not in names(command) or name.startswith(("hydra", "callbacks.", "trainer.")):
        return ""
    return ours.format(DEVICES.get(value, value) if key == "hardware" else value)


def explain_option(
    option: str, argv: Sequence[str], known: Sequence[str], command: Command[Any] | None = None
) -> str:
    """Return the error line for an unknown option; often one of the keys ``known`` is meant."""
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
    """Return the error line for several values where one is needed."""
    name, _, value = str(item.input_line).partition("=")
    if name.lstrip("+") in FILES:
        return f"{item.input_line}: write several files as a list, '{name}=[{value}]'"
    return f"{item.input_line}: several values need --multirun, a list [a,b], a text 'key=\"a,b\"'"


def check_targets(value: Any, name: str = "") -> None:
    """Raise ConfigError for a class or function that a configuration must not name.

    When a configuration is composed, Hydra calls whatever is named by ``_target_``, and Python's
    logging whatever is named by ``()``, ``class`` or ``ext://``.
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
    """Explain a library's error in one line, with the key, the value and what is allowed."""
    if isinstance(error, MissingConfigException):
        group, _, choice = (error.missing_cfg_file or "").rpartition("/")
        shipped = [path.stem for path in Path(CONF_DIR, group).glob("*.yaml")]
        return no_such_choice(f"{group}={choice}", error.options or shipped)
    if isinstance(error, OverrideParseException):
        name, _, value = error.override.partition("=")
        value = value.replace("\\", "\\\\").replace('"', '\\"')
        return f"{error.override}: cannot be read; in quotes it can: '{name}=\"{value}\"'"
    cause: BaseException = error
    # under a debugger OmegaConf chains further causes without the key
    while cause.__cause__ is not None and not getattr(cause, "full_key", None):
        cause = cause.__cause__
    name = getattr(cause, "full_key", None) or ""
    if isinstance(cause, MissingMandatoryValue):
        return f"{name}: must be given, as {name}=..."
    if isinstance(cause, ConfigAttributeError | ConfigKeyError):
        return _unknown_key(name, command)
    if not name:
        line = first_line(cause)
        quoted = re.search(r"'([\w./@]+)'", line)  # may be a group that this command lacks
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
    """Return the error line for ``group=choice`` if the group has other ``choices``."""
    (group, _, choice), known = given.partition("="), sorted(choices)
    if group == "data" and re.search(IS_FILE, choice):
        return f"{given}: no such choice; did you mean data=custom data.path={choice}?"
    near = checks.did_you_mean(choice, known)
    return f"{given}: no such choice" + (f"; there are {', '.join(known)}{near}" if known else "")


def _unknown_key(name: str, command: Command[Any]) -> str:
    """Return the error line for an unknown key, with the choices of its group that have it."""
    line = checks.unknown_key(name, names(command))
    group, _, last = name.partition(".")
    owners: list[str] = []
    for cls in command.variants.get(group, {}).values():
        fields = {field.name: field for field in dataclasses.fields(cls)}
        if last in fields:
            owners += fields["source" if group == "data" else "kind"].metadata["among"]
    return f"{line}; it is one of {group}={' or '.join(owners)}" if owners else line
