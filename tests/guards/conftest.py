"""What the guards share: a copy of the old fixtures that they may write to."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.guards.commands import OLD


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Iterator[Path]:
    """Work inside a copy of the fixtures made at ff2412f, as the paths in them are relative."""
    folder = tmp_path_factory.mktemp("ff2412f") / "copy"
    shutil.copytree(OLD, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("TINYGPT_CACHE", str(cache))
        yield folder
