"""The size and shape of the package: each limit is counted here."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

from tests.conftest import ROOT
from tests.test_imports import FILES, PACKAGE, imported

# Lines of each part.  A change that needs more takes them from somewhere else.
LIMITS = {
    "root": 3_257,
    "config": 1_201,
    "runs": 873,
    "data": 3_775,
    "model": 1_494,
    "training": 2_749,
    "sweeping": 2_602,
    "scaling": 9_553,
    "evaluating": 1_411,
    "adaptation": 3_085,
}
LONGEST = 450  # lines of a file
MOST_FILES = 130
# Uses of names that torch and Lightning keep to themselves, by the name; each says why.
PRIVATE = {
    "_linear_pointwise": 1,  # oneDNN has no public call
    "_broadcast_sigterm_tensor": 1,
    "_signal_connector": 1,
    "_logger_connector": 1,
    "_first_loop_iter": 2,
    "_get_file_writer": 1,
}


# Public for all their underscore: namedtuples' methods, os._exit, torch's multi-tensor functions.
PRIVATE_NAME = re.compile(r"_(?!asdict|fields|replace|exit|foreach_)[a-z]\w*")


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def test_no_part_and_no_file_outgrows_its_limit() -> None:
    sizes: Counter[str] = Counter()
    for path in PACKAGE.rglob("*.py"):
        folder = path.relative_to(PACKAGE).parent.as_posix()
        sizes["root" if folder == "." else folder] += lines(path)
    assert sizes.keys() == LIMITS.keys()
    assert {part: n for part, n in sizes.items() if n > LIMITS[part]} == {}
    assert {path.name: lines(path) for path in FILES if lines(path) > LONGEST} == {}
    assert len(list(PACKAGE.rglob("*.py"))) <= MOST_FILES


def modules_of(name: str, known: dict[str, Path]) -> str | None:
    """Return the module of ours that importing ``name`` runs: itself, or the one that has it."""
    while name and name not in known:
        name = name.rpartition(".")[0]
    return name or None


def test_no_module_imports_itself_by_a_detour() -> None:
    """Imports inside functions count."""
    known = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in FILES
    }
    graph: dict[str, set[str]] = {}
    for module, path in known.items():
        found = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tinygpt"):
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names if alias.name.startswith("tinygpt")}
        graph[module] = {m for m in (modules_of(name, known) for name in found) if m} - {module}

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        left = [start]
        while left:
            for other in graph[left.pop()] - seen:
                seen.add(other)
                left.append(other)
        return seen

    cyclic = sorted(module for module in graph if module in reached(module))
    assert cyclic == []


def test_private_names_of_libraries_are_few_and_listed() -> None:
    """An attribute that begins with an underscore is ours where a file of ours defines it."""
    sources = {path: path.read_text() for path in FILES}
    ours = set(
        re.findall(r"(?:def |class |self\.|^)(_[a-z]\w*)", "\n".join(sources.values()), re.M)
    )
    used: Counter[str] = Counter()
    for source in sources.values():
        assert not any(name.startswith("hydra._internal") for name in imported(ast.parse(source)))
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Attribute) and PRIVATE_NAME.fullmatch(node.attr):
                used[node.attr] += node.attr not in ours
    assert {name: n for name, n in used.items() if n} == PRIVATE


def test_imports_are_seen() -> None:
    source = "from tinygpt import config\nimport torch\nfrom tinygpt.data import shards"
    assert list(imported(ast.parse(source))) == ["tinygpt.config", "torch", "tinygpt.data"]
