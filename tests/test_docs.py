"""The documentation as a site: what it is generated from is complete, and it builds strictly."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import tinygpt
from tests.conftest import ROOT
from tinygpt import cli, scaling

SPEC = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
assert SPEC is not None
assert SPEC.loader is not None
hooks = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(hooks)

# How the docstring of a public name may start.
VERBS = "Add|Adapt|Continue|Define|Fit|Hold|Make|Name|Perform|Read|Refit|Return|Run|Say"
VERBS += "|Score|Serve|Set|Train"


def public(owner: Any, name: str = "") -> Iterator[tuple[str, str | None]]:
    """Yield the public names of a module, with those of its classes, and their docstrings."""
    for public_name in owner.__all__:
        value = getattr(owner, public_name)
        if not callable(value):
            continue
        yield public_name, value.__doc__
        for member, what in vars(value).items() if inspect.isclass(value) else ():
            is_hook = any(hasattr(base, member) for base in value.__mro__[1:])  # of Lightning
            is_named = isinstance(what, property) or (inspect.isfunction(what) and not is_hook)
            if is_named and not member.startswith("_"):
                yield f"{public_name}.{member}", what.__doc__


@pytest.mark.parametrize("module", [tinygpt, scaling])
def test_every_public_name_has_a_docstring_that_starts_with_a_verb(module: Any) -> None:
    docstrings = dict(public(module))
    assert len(docstrings) > 10
    wrong = {
        name: doc for name, doc in docstrings.items() if not re.match(rf"({VERBS})\b", doc or "")
    }
    assert wrong == {}


@pytest.mark.parametrize("command", cli.COMMANDS, ids=lambda command: str(command.name))
def test_every_key_of_the_schema_has_a_description(command: Any) -> None:
    rows = re.findall(r"^\| `([\w.]+)` \| .* \| (.*) \|$", hooks.keys_of(command.name), re.M)
    assert len(rows) > 40
    assert [name for name, about in rows if not about.strip()] == []
    for kind in hooks.sections(command):
        # a dataclass without one shows its signature
        assert not hooks.paragraph(kind).startswith(f"{kind.__name__}("), kind


def test_the_reference_has_the_keys_with_their_bounds_and_the_choices_with_what_they_set() -> None:
    page = hooks.keys_of("run")
    assert (
        "| `model.d_model` | integer, at least 1 | `64` | Width of the residual stream. |" in page
    )
    assert (
        "| `data.repo` | text | required | Name of the data set on the hub, as owner/name. |"
        in page
    )
    assert "- **optim=lion**: A step has the same size" in page
    assert "Sets `learning_rate=2e-3`, `weight_decay=0.3`." in page
    named = {field.name for field in dataclasses.fields(cli.RUN.schema)}
    assert named == set(re.findall(r"^(?:## |\| `)(\w+)(?:$|` )", page, re.M))


def test_the_address_of_the_repository_is_the_same_everywhere() -> None:
    (address,) = re.findall(r'^Repository = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.M)
    assert yaml.safe_load((ROOT / "mkdocs.yml").read_text())["repo_url"] == address
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["repository-code"] == address
    for page in ("README.md", "docs/start.md"):
        assert f"git clone {address} && cd " in (ROOT / page).read_text()


def test_the_readme_is_short_and_the_changelog_knows_the_version() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200
    assert f"\n## {tinygpt.__version__}, " in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.slow
def test_the_site_builds_in_strict_mode_and_works_without_the_network(tmp_path: Path) -> None:
    """A link or an anchor that leads nowhere is a warning, which strict mode refuses."""
    pytest.importorskip("mkdocs")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    index = (tmp_path / "index.html").read_text()
    assert not re.search(r"<(script|link)[^>]+(src|href)=.?https?://(?!github\.com)", index)
    reference = (tmp_path / "docs" / "reference" / "configuration.html").read_text()
    assert "train.tokens_per_param" in reference
    assert "tinygpt.scaling.fit" in (tmp_path / "docs" / "reference" / "python.html").read_text()
