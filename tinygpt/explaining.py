"""What Hydra and OmegaConf raise, as one line with the key, the value and what is allowed."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import (
    ConfigCompositionException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from tinygpt import checks
from tinygpt.config import Settings

S = TypeVar("S", bound=Settings)

_HERE = Path(__file__).resolve().parent
# Inside an installed wheel conf/ lies in the package, in a checkout beside it.
CONF_DIR = str(next(p for p in (_HERE / "conf", _HERE.parent / "conf") if p.is_dir()))


FILES = ("data.path", "data.val_file", "data.test_file")  # keys of one path, or a list of them
LISTS = (*FILES, "data.text_column")  # that a configuration keeps as one text


@dataclass(frozen=True, eq=False)
class Command(Generic[S]):
    """A command whose configuration Hydra composes."""

    name: str  # behind python -m tinygpt.
    file: str  # in conf/, beside those of the groups
    sweep: str  # how the study of a bare sweep is called
    sections: Mapping[str, Mapping[str, type]]  # of its configuration, with the variants of each
    schema: type[S]
    read: Callable[[DictConfig, Sequence[str]], S]  # what was composed, checked


def explain(error: BaseException, overrides: Sequence[str], command: Command[S]) -> str:
    """Hydra's and OmegaConf's messages, as one line with the key, the value and what is allowed."""
    cause: BaseException = error
    # under a debugger OmegaConf chains further causes that no longer name the key
    while cause.__cause__ is not None and not full_key(cause):
        cause = cause.__cause__
    text = str(cause)
    name = full_key(cause)
    if isinstance(error, MissingConfigException):
        return _unknown_choice(text)
    if isinstance(error, OverrideParseException):
        name, _, value = error.override.partition("=")
        value = value.replace("\\", "\\\\").replace('"', '\\"')
        return f"{error.override}: cannot be read; in quotes it can: '{name}=\"{value}\"'"
    if "Ambiguous value" in text or "requires --multirun" in text:
        item = text.splitlines()[0].split("'", 1)[1].rsplit("'", 1)[0]
        name, _, value = item.partition("=")
        if name.lstrip("+") in FILES:
            return f"{item}: several files are a list, '{name}=[{value}]'"
        return f"{item}: several values need --multirun, a list [a,b], a text 'key=\"a,b\"'"
    if "group override must be" in text:
        return _not_a_choice(overrides)
    if isinstance(cause, AssertionError):  # Hydra's, at a key of a section that is null
        keys = r"\+*(?:(logger)\.(\w+)|(data)|model\.rope_scaling)\."
        found = (re.match(keys, item) for item in overrides)
        unset = [match for match in found if match]
        if not unset:
            return text.splitlines()[0]
        if not unset[0][1] and not unset[0][3]:
            return f"{unset[0].string}: {plain(text)}"
        needed = f"{unset[0][1]}={unset[0][2]}" if unset[0][1] else "data=, where the text is from"
        return f"{unset[0].string}: needs {needed}"
    missing = re.search(r"[Mm]issing mandatory value: (\S+)", text)
    if missing:
        name = missing.group(1) if "." in missing.group(1) else name
        return f"{name}: must be given, as {name}=..."
    if isinstance(cause, OmegaConfBaseException) and "not in '" in text:
        return _unknown_key(name, command)
    if isinstance(error, ConfigCompositionException) and "Could not override" in text:
        return _unknown_key(text.split("'")[1], command)
    if name:
        name = re.sub(r"\[\d+\]$", "", name)
        return f"{name}={_given(name, overrides)}: {plain(text)}"
    return text.splitlines()[0]


def full_key(error: BaseException) -> str:
    found = re.search(r"full_key: (\S+)", str(error))
    return found.group(1) if found else ""


def _given(name: str, overrides: Sequence[str]) -> str:
    values = [
        item.split("=", 1)[1] for item in overrides if item.lstrip("+").startswith(f"{name}=")
    ]
    return values[-1] if values else "?"


def plain(text: str) -> str:
    line = text.splitlines()[0]
    if "not Optional" in line:
        return "must not be null"
    if "not a valid bool" in line:
        return "must be true or false"
    if "is not a ListConfig" in line:
        return "must be a list, as [a,b]"
    if "has no attribute" in line or "Unexpected type for root" in line:
        return "cannot be set from the command line"
    if "Invalid type assigned" in line:
        return "must be set key by key"
    words = {"Integer": "an integer", "Float": "a number", "Boolean": "true or false"}
    found = re.search(r"could not be converted to (\w+)", line)
    return f"must be {words.get(found.group(1), found.group(1))}" if found else line


def _unknown_choice(text: str) -> str:
    """From Hydra's "Could not find 'group/choice'" or "Could not load 'group/choice'."."""
    group, _, choice = re.findall(r"'([^']*)'", text)[1].rpartition("/")
    return f"{group}={choice}: no such choice{_choices(group, choice)}"


def _not_a_choice(overrides: Sequence[str]) -> str:
    """A group that was given a number or null: Hydra does not say which."""
    for item in OverridesParser.create().parse_overrides(list(overrides)):
        group = item.key_or_group
        if Path(CONF_DIR, group).is_dir() and not isinstance(item.value(), str | list):
            return f"{item.input_line}: no such choice{_choices(group)}"
    return f"{' '.join(overrides)}: a group takes the name of a choice"


def _choices(group: str, choice: str = "") -> str:
    names = sorted(p.stem for p in Path(CONF_DIR, group).glob("*.yaml"))
    near = checks.did_you_mean(choice, names) if choice else ""
    return f"; there are {', '.join(names)}{near}" if names else ""


def _unknown_key(name: str, command: Command[S]) -> str:
    """With the choices of its group that have this key, where the chosen one has not."""
    line = checks.unknown_key(name, _known_keys(command))
    group, _, last = name.partition(".")
    owners: list[str] = []
    for chosen, choice in command.sections.get(group, {}).items():
        if not chosen:
            continue
        fields = {f.name: f for f in dataclasses.fields(choice)}
        if last in fields:
            owners += fields["source" if group == "data" else "kind"].metadata["among"]
    return f"{line}; it is one of {group}={' or '.join(owners)}" if owners else line


def _known_keys(command: Command[S]) -> list[str]:
    names = [name for name in fields_of(command.schema) if name != "sweep"]
    for group, choices in command.sections.items():
        for cls in choices.values():
            names += kinds(cls, f"{group}.")
    return sorted(set(names))


def fields_of(cls: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(cls)]


def kinds(cls: type, prefix: str = "") -> dict[str, Any]:
    """The type of every key of a dataclass; those of a dataclass in it are ``field.key``."""
    found: dict[str, Any] = {}
    for name, kind in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            found |= kinds(kind, f"{prefix}{name}.")
        else:
            found[prefix + name] = kind
    return found
