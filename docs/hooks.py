"""Build the site from the repository as it is: pages keep their places, so links between them are
those that work in a checkout.  Fills in the reference from the schema and the commands."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import io
import posixpath
import re
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from tinygpt import cli
from tinygpt.config import Settings

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = (
    *("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "docs/**/*.md", "docs/*.svg", "docs/*.js"),
    *("experiments/**/*.md", "experiments/**/*.png", "tests/*/README.md"),
)
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]+)")
MARK = re.compile(r"^<!-- (\w+) (\w+) -->$", re.M)  # <!-- keys run -->
TYPES = {int: "integer", float: "number", bool: "true or false", str: "text"}
BOUNDS = {"least": "at least", "most": "at most", "above": "above", "below": "below"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Publish the pages and figures of the repository at their own places."""
    from mkdocs.structure.files import File

    for file in list(files):
        if file.src_dir == config.docs_dir:
            files.remove(file)
    for path in sorted(path for pattern in PUBLISHED for path in ROOT.glob(pattern)):
        place = path.relative_to(ROOT).as_posix()
        files.append(File(place, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill in what is generated, and point links to files that are not pages to the repository."""
    folder = posixpath.dirname(page.file.src_uri)

    def to_repository(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, match[1]))
        if files.get_file_from_path(target) or not (ROOT / target).exists():
            return match[0]  # a page, or a broken link, which is reported
        kind = "tree" if (ROOT / target).is_dir() else "blob"
        return f"{config.repo_url}/{kind}/main/{target}"

    generators = {"keys": keys_of, "usage": usage, "api": api}
    filled = MARK.sub(lambda match: generators[match[1]](match[2]), markdown)
    return LINK.sub(to_repository, filled)


# --- configuration


def keys_of(name: str) -> str:
    """Return the tables of every key of a command that Hydra configures."""
    command = next(one for one in cli.COMMANDS if one.name == name)
    text, hints = [], typing.get_type_hints(command.schema)
    alone = []
    common = {field.name for field in dataclasses.fields(Settings)}
    for field in sorted(dataclasses.fields(command.schema), key=lambda one: one.name in common):
        kind = section_of(hints[field.name])
        if kind is None:
            alone.append(row(command.schema, field, hints[field.name]))
            continue
        shared = keys(kind, f"{field.name}.")
        text += [f"## {field.name}", paragraph(kind), table(shared)]
        names_of_shared = {one[0] for one in shared}
        for variant in command.variants.get(field.name, {}).values():
            own = [one for one in keys(variant, f"{field.name}.") if one[0] not in names_of_shared]
            kinds = {one.name: one.metadata.get("among", ()) for one in dataclasses.fields(variant)}
            names = kinds["source" if field.name == "data" else "kind"]
            text += [f"### {field.name}={' or '.join(names)}", paragraph(variant)]
            text += [table(own)] if own else []
        text += choices(field.name)
    return "\n\n".join([*text, "## The rest", table(alone)])


def sections(command: Any) -> Iterator[type]:
    """Yield the dataclass of each section of keys, and those of its variants."""
    hints = typing.get_type_hints(command.schema)
    for field in dataclasses.fields(command.schema):
        if (kind := section_of(hints[field.name])) is not None:
            yield from (kind, *command.variants.get(field.name, {}).values())


def section_of(kind: Any) -> type | None:
    """Return the dataclass of a section of keys; None for the type of a single key."""
    for one in (kind, *typing.get_args(kind)):
        if isinstance(one, type) and dataclasses.is_dataclass(one):
            return one
    return None


def keys(cls: type, prefix: str) -> list[tuple[str, ...]]:
    """Return a row for each key of a section, those of sections in it too."""
    hints, rows = typing.get_type_hints(cls), []
    for field in dataclasses.fields(cls):
        inner = section_of(hints[field.name])
        if inner is not None:
            rows += keys(inner, f"{prefix}{field.name}.")
        elif field.name not in ("kind", "source"):  # set by the choice of the group
            rows.append(row(cls, field, hints[field.name], prefix))
    return rows


def row(cls: type, field: dataclasses.Field[Any], kind: Any, prefix: str = "") -> tuple[str, ...]:
    made = field.default_factory
    default = field.default if made is dataclasses.MISSING else made()
    about = described(cls, field.name).replace("<", "&lt;")
    return f"`{prefix}{field.name}`", allowed(kind, field.metadata), spelled(default), about


def described(cls: type, name: str) -> str:
    """Return the description of a key: its own, or that of the class it is inherited from."""
    for owner in cls.__mro__:
        for field in dataclasses.fields(owner) if dataclasses.is_dataclass(owner) else ():
            if field.name == name and field.metadata.get("help"):
                return str(field.metadata["help"])
    return ""


def allowed(kind: Any, metadata: Any) -> str:
    """Return the type and bounds of a key in words."""
    if among := metadata.get("among"):
        return ", ".join(f"`{value}`" for value in among)
    arguments = [one for one in typing.get_args(kind) if one is not type(None)]
    if typing.get_origin(kind) is typing.Union:
        return allowed(arguments[0], metadata) + ", or `null`"
    text = f"list of {TYPES[arguments[0]]}s" if typing.get_origin(kind) is list else "mapping"
    bounds = [f"{BOUNDS[name]} {limit:.10g}" for name, limit in metadata.items() if name in BOUNDS]
    return ", ".join([TYPES.get(kind, text), *bounds])


def spelled(value: Any) -> str:
    """Return a default as it is typed in a command."""
    typed = {"???": "required", "": "empty"}
    if isinstance(value, str) and value in typed:
        return typed[value]
    return f"`{yaml.safe_dump(value, default_flow_style=True).splitlines()[0]}`"


def choices(group: str) -> list[str]:
    """Return a list of the files in conf/ that a group can be set to, and what each sets."""
    lines = []
    for path in sorted((ROOT / "conf" / group).glob("*.yaml")):
        source = path.read_text(encoding="utf-8")
        about = " ".join(re.findall(r"^# (.*)", source, re.M))
        values = yaml.load(source, yaml.BaseLoader) or {}  # as they are typed
        values.pop("defaults", None)
        sets = ", ".join(f"`{name}={value}`" for name, value in flat(values))
        more = f"{about} Sets {sets}." if sets else about
        lines.append(f"- **{group}={path.stem}**: {more}".removesuffix(": "))
    return ["\n".join(line.replace("<", "&lt;") for line in lines)] if lines else []


def flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each value of nested tables with its whole name."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def paragraph(cls: type) -> str:
    return " ".join((inspect.getdoc(cls) or "").split())


def table(rows: list[tuple[str, ...]]) -> str:
    head = ["| key | values | default | what it does |", "|---|---|---|---|"]
    cells = (" | ".join(cell.replace("|", "\\|") for cell in row) for row in rows)
    return "\n".join([*head, *(f"| {line} |" for line in cells)]) if rows else ""


# --- commands and Python


def usage(name: str) -> str:
    """Return what a command prints for --help."""
    module, said, argv = importlib.import_module(f"tinygpt.{name}"), io.StringIO(), sys.argv
    sys.argv = [f"tinygpt.{name}", "--help"]
    try:
        with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
            module.main()
    finally:
        sys.argv = argv
    return f"```text\n{said.getvalue().strip()}\n```"


def api(name: str) -> str:
    """Return the directives by which mkdocstrings documents the public names of a module."""
    module = importlib.import_module(name.replace("_", "."))
    return "\n\n".join(f"::: {module.__name__}.{public}" for public in module.__all__)
