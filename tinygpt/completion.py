"""Complete command lines in bash, zsh and fish."""

from __future__ import annotations

import glob
import importlib
import os
import re
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path

from tinygpt import cli, words
from tinygpt.config import ConfigError

# bash replaces the part of a word after its last =, other shells the whole word.
SCRIPTS = {
    "bash": """\
_tinygpt() {
  local line=${COMP_LINE:0:COMP_POINT} IFS=$'\\n'
  local word=${line##* }
  COMPREPLY=($(tinygpt --complete "$line" 2>/dev/null))
  [[ $word == *=* ]] && COMPREPLY=("${COMPREPLY[@]#"${word%"${word##*=}"}"}")
}
complete -o nospace -F _tinygpt tinygpt""",
    "zsh": """\
_tinygpt() { compadd -Q -S '' -- ${(f)"$(tinygpt --complete "$LBUFFER" 2>/dev/null)"} }
compdef _tinygpt tinygpt""",
    "fish": """\
complete -c tinygpt -f -a '(tinygpt --complete (commandline -cp) 2>/dev/null | string trim)'""",
}
BARE = ("law", "fit", "evaluate", "sample", "export")  # take files or folders without a key


@cli.one_line_errors
def main(option: str, given: Sequence[str], commands: Iterable[str]) -> None:
    if option == "--complete":
        print("\n".join(complete("".join(given), commands)))
    elif list(given[:1]) in [[name] for name in SCRIPTS]:
        print(SCRIPTS[given[0]])
    else:
        raise ConfigError(f"{' '.join([option, *given])}: give one of {', '.join(SCRIPTS)}")


def complete(line: str, commands: Iterable[str]) -> list[str]:
    """Return the completions of the last word of ``line``, with a space after complete words."""
    *before, word = line.split(" ")
    before = [one for one in before if one][1:]
    if not before or before[0] not in commands:
        return [f"{name} " for name in commands if not before and name.startswith(word)]
    if before == ["tokenizer"]:
        return [f"{name} " for name in ("train", "encode", "decode") if name.startswith(word)]
    known = _keys(*before[:2])
    if match := re.fullmatch(r"(\+*([\w./]+)=(?:.*[,\[])?)(.*)", word):
        choices = [f"{one} " for one in known.get(match[2], ()) if one.startswith(match[3])]
        return [match[1] + one for one in choices or _paths(match[3])]
    found: dict[str, None] = {}  # complete up to the next dot
    for name in sorted(name for name in known if name.startswith(word)):
        head, dot, _ = name[len(word) :].partition(".")
        found[word + head + (dot or "=")] = None
    return [*found, *(_paths(word) if before[0] in BARE else ())]


def _paths(begun: str) -> list[str]:
    found = sorted(glob.glob(f"{glob.escape(os.path.expanduser(begun))}*"))
    return [f"{path}/" if os.path.isdir(path) else f"{path} " for path in found if " " not in path]


def _keys(name: str, second: str = "") -> dict[str, Sequence[str]]:
    """Return the keys of a command with their choices, if they have any."""
    module = importlib.import_module(f"tinygpt.{name}")
    own = f"{second.title()}Arguments" if name == "tokenizer" else "Arguments"
    classes = [("", getattr(module, own))] if hasattr(module, own) else []
    found: dict[str, Sequence[str]] = {}
    if name in ("run", "law", "benchmark", "adapt"):
        command = cli.ADAPT if name == "adapt" else cli.RUN
        classes.append(("", command.schema))
        for group, variants in command.variants.items():
            classes += [(f"{group}.", cls) for cls in variants.values()]
        for folder in Path(words.CONF_DIR).iterdir():
            if folder.name in (*words.names(command), "experiment"):
                found[folder.name] = sorted(path.stem for path in folder.glob("*.yaml"))
    for prefix, cls in classes:
        for key, kind, bounds in words.leaves(cls, prefix):
            truth = ("true", "false") if bool in (kind, *typing.get_args(kind)) else ()
            found.setdefault(key, bounds.get("among", truth))
    return found
