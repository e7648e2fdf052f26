"""Find the files of a corpus: a path, a folder, a glob or a list of these."""

from __future__ import annotations

import glob
import os
import shlex
from collections import Counter
from pathlib import Path

from tinygpt.config import ConfigError
from tinygpt.data.survey import Survey, counted
from tinygpt.data.textfiles import BINARY, MARKS, PACKED, inner_suffix

# Only these are read from a folder, packed or not; a file named by its path or a glob may have any.
_KINDS = """
csv tsv tab psv jsonl ndjson jsonlines json parquet
txt text md markdown mdx rst adoc asciidoc org tex log
srt vtt asm awk bash bat c cc clj cljs coffee cpp cs css cu cuh cxx d dart el erl ex exs
f f90 f95 fish for fs glsl go gradle graphql groovy h hh hpp hs hxx java jl js jsx kt
kts lean less lisp lua m mjs ml mli mm nim pas php pl pm proto ps1 py pyi pyx r rb rkt
rs s sass scala scm scss sh sol sql sv svelte swift tcl ts tsx v vb vhd vhdl vim vue zig
zsh
"""
FOLDER_SUFFIXES = frozenset(f".{kind}" for kind in _KINDS.split())


def find_files(key: str, value: str, survey: Survey | None = None) -> list[Path]:
    """Return the files named by a path, a folder, a glob or a list of these, each once.

    ``survey`` counts what was skipped.  Raises ConfigError if there are none.
    """
    survey, files = survey or Survey(), list[Path]()
    for place in _places(value):
        try:
            files += _files_of(key, place, survey.skipped)
        except (OSError, RuntimeError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise ConfigError(f"{key}={place}: cannot be read ({reason})") from error
    if not files:
        raise ConfigError(f"{key}={value}: must name a file, a folder or a glob")
    files = _once(files, survey.skipped)
    survey.files += len(files)
    return files


def _places(value: str) -> list[str]:
    """Return the items of a list ``[a.txt,'b, c.txt']``; any other text is one place."""
    if not (value[:1] == "[" and value[-1:] == "]") or os.path.exists(value):
        return [value] if value else []
    words = shlex.shlex(value[1:-1], posix=True)
    words.whitespace, words.whitespace_split = ",", True
    words.escape = words.commenters = ""
    try:
        return [word.strip() for word in words]
    except ValueError:  # an apostrophe in a name
        return [word.strip() for word in value[1:-1].split(",")]


def _files_of(key: str, value: str, skipped: Counter[str]) -> list[Path]:
    path = Path(value).expanduser()
    if path.is_dir():
        files = _texts_in(path, skipped)
    elif path.exists():
        if not path.is_file():
            raise ConfigError(f"{key}={value}: not a file")
        return [path]
    else:
        found = map(Path, glob.glob(str(path), recursive=True))
        matches = sorted(found, key=lambda match: (len(match.parts), match))
        files = [file for file in matches if file.is_file()]
        if not files:
            several = f"; several are a list, '{key}=[{value}]'" if "," in value else ""
            reason = "not a file" if matches else "no such file or folder" + several
            raise ConfigError(f"{key}={value}: {reason}")
        if len(files) < len(matches) and "**" not in value:  # ** also matches the folders above
            skipped["folder"] += len(matches) - len(files)
    kept = []
    for file in _once(files, skipped):
        with file.open("rb") as stream:
            head = stream.read(8192)  # git, too, looks for NUL in this much
        is_packed = file.suffix.lower() in (*BINARY, *PACKED) or head.startswith(tuple(MARKS))
        if not head:
            skipped["empty file"] += 1
        elif b"\0" in head and not is_packed:
            skipped["binary file"] += 1
        else:
            kept.append(file)
    if not kept:
        beside = ", ".join(counted(skipped)) or "it is empty"
        raise ConfigError(
            f"{key}={value}: no text in there ({beside}); name the files, or a glob, to read others"
        )
    return sorted(kept)


def _texts_in(folder: Path, skipped: Counter[str]) -> list[Path]:
    there = _walk(folder, skipped)
    suffixes = {inner_suffix(file) for file in there} & FOLDER_SUFFIXES
    if suffixes != {".json"}:  # beside text, .json holds settings
        suffixes -= {".json"}
    files = []
    for file in there:
        inner, suffix = inner_suffix(file), file.suffix.lower()
        if inner not in suffixes:
            skipped[(inner + suffix if suffix in PACKED else suffix) or "without suffix"] += 1
        elif file.suffix == ".log" and any(file.with_suffix(s).exists() for s in (".tex", ".aux")):
            skipped["LaTeX log"] += 1
        else:
            files.append(file)
    return files


def _walk(root: Path, skipped: Counter[str]) -> list[Path]:
    """Return the files under ``root``, following links to folders last and once."""
    files, real, linked = list[Path](), [root], list[Path]()
    seen = set(root.resolve().parents)  # a link to one of these would lead back here
    while real or linked:
        folder = real.pop() if real else linked.pop(0)
        if folder.resolve() in seen:
            skipped["repeated folder"] += 1
            continue
        seen.add(folder.resolve())
        for path in sorted(folder.iterdir()):
            if path.name.startswith(".") or path.name in ("__MACOSX", "__pycache__"):
                skipped["hidden folder" if path.is_dir() else "hidden file"] += 1
            elif path.is_dir():
                (linked if path.is_symlink() else real).append(path)
            elif path.is_file():
                files.append(path)
            else:
                skipped["broken link" if path.is_symlink() else "special file"] += 1
    return files


def _once(files: list[Path], skipped: Counter[str]) -> list[Path]:
    """Return each file under one of its names, preferably one that is not a link."""
    kept: dict[tuple[int, int], Path] = {}
    for path in sorted(files, key=Path.is_symlink):
        status = path.stat()
        if kept.setdefault((status.st_dev, status.st_ino), path) is not path:
            skipped["duplicate file"] += 1
    names = set(kept.values())
    return [path for path in dict.fromkeys(files) if path in names]
