"""Read the ``key=value`` arguments of commands without Hydra into a dataclass."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import textwrap
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import MISSING

from tinygpt import words
from tinygpt.config import ConfigError, checks

T = TypeVar("T")
PATHS = ("runs", "table", "path", "compare", "output_dir")
TRUTH = dict.fromkeys(("true", "yes", "on", "1"), True)
TRUTH |= dict.fromkeys(("false", "no", "off", "0"), False)


def show_help(text: str) -> None:
    """Print ``text``, wrapping its columns if the terminal is too narrow."""
    width, blocks, was_plain = shutil.get_terminal_size().columns, [""], False
    if max(map(len, text.splitlines())) <= width:
        print(text)
        return
    for line in text.splitlines():
        is_plain = bool(line) and not re.match(r" |\S+=|\S.{0,29}[^.]  ", line)
        if line.startswith(" " * 8) or (is_plain and was_plain):
            blocks[-1] += f" {line.strip()}"
        else:
            blocks.append(line)
        was_plain = is_plain
    for block in blocks[1:]:
        match = re.match(r" *\S.{0,29}?[^.]  +(?=\S)| *", block)
        shape = textwrap.TextWrapper(width, break_long_words=False, break_on_hyphens=False)
        shape.subsequent_indent = " " * min(len(match[0]) if match else 0, 33)
        print(shape.fill(block))


def read_arguments(cls: type[T], argv: Sequence[str], usage: str, bare: str = "") -> T:
    """Fill the dataclass ``cls`` from ``key=value`` arguments (nested: ``field.key=value``).

    A text is taken verbatim after the first ``=``; a list is split at commas.  A word without
    ``=`` is a value of the key ``bare``, or is appended to it if it is a list.  ``--help`` prints
    ``usage``.  Raises ConfigError for an unknown or missing key or a wrong type.
    """
    if any(item in ("-h", "--help") for item in argv):
        show_help(usage)
        raise SystemExit(0)
    kinds = words.kinds(cls)
    given: dict[str, Any] = {}
    for before, item in zip(["", *argv], argv, strict=False):
        name, equals, value = item.partition("=")
        if item.startswith("-"):
            raise ConfigError(words.explain_option(item, argv, list(kinds)))
        is_bare = not equals or (name not in kinds and os.path.exists(item))
        if is_bare and not (bare and os.path.exists(item)):
            words.check_quotes(before, item, kinds)
        if is_bare:
            if not bare:
                raise ConfigError(f"'{item}': must be key=value; --help shows the keys")
            name, value = bare, item
        if name not in kinds:
            raise ConfigError(checks.unknown_key(name, list(kinds)))
        try:
            read = _read(value, kinds[name], is_path=name in PATHS)
        except (KeyError, ValueError) as error:
            expected = words.described(kinds[name], of_element=True)
            raise ConfigError(f"{name}={value}: must be {expected}") from error
        if is_bare and name in given and not isinstance(read, list):
            raise ConfigError(f"'{item}': {name}={given[name]} is given already")
        given[name] = given.get(name, []) + read if is_bare and isinstance(read, list) else read
    arguments = _filled(cls, given)
    checks.check_bounds(arguments)
    return arguments


def _read(text: str, kind: Any, is_path: bool) -> Any:
    """Parse ``text`` as a value of type ``kind``."""
    if typing.get_origin(kind) is list:
        items = words.files(text) if is_path else text.split(",") if text else []
        (inner,) = typing.get_args(kind)
        return [_read(item, inner, is_path=False) for item in items]
    if typing.get_origin(kind) is typing.Union:  # Optional
        inner = next(one for one in typing.get_args(kind) if one is not type(None))
        return None if text == "null" else _read(text, inner, is_path)
    if kind is bool:
        return TRUTH[text.lower()]
    if kind in (int, float):
        text = words.plain(text.upper() if kind is int else text)
    return os.path.expanduser(text) if is_path else kind(text)


def _filled(cls: type[T], given: Mapping[str, Any], prefix: str = "") -> T:
    hints, values = typing.get_type_hints(cls), {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        name, kind = prefix + field.name, hints[field.name]
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            values[field.name] = _filled(kind, given, f"{name}.")
        elif name in given:
            values[field.name] = given[name]
        elif field.default == MISSING:
            raise ConfigError(f"{name}: must be given, as {name}=...")
    return cls(**values)


def read_text(key: str, place: str, newline: str | None = None) -> str:
    """Return the text of the file that ``key`` names, without a byte order mark.

    ``newline=""`` keeps line endings; otherwise they become line feeds.  Raises ConfigError.
    """
    try:
        with Path(place).expanduser().open(encoding="utf-8-sig", newline=newline) as file:
            return file.read()
    except OSError as error:
        raise ConfigError(f"{key}={place}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{key}={place}: not UTF-8 text (byte {error.start})") from error
