"""What the tests of faults share; how many faults there were is said at the end."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.warm import Ended, Warm
from tests.test_resume import arguments

Injected = Callable[[str], None]
HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.faults)
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def injected(request: pytest.FixtureRequest) -> Injected:
    """Call it with the name of each fault that was injected."""
    return lambda name: request.node.user_properties.append(("fault", name))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    counts = {"passed": Counter[str](), "failed": Counter[str]()}
    for outcome, count in counts.items():
        for report in terminalreporter.stats.get(outcome, []):
            if report.when == "call":
                count.update(name for key, name in report.user_properties if key == "fault")
    survived, lost = counts["passed"].total(), counts["failed"].total()
    if survived + lost:
        kinds = ", ".join(
            f"{n} {name}" for name, n in sorted(sum(counts.values(), Counter()).items())
        )
        terminalreporter.write_line(
            f"{survived + lost} faults injected, {survived} survived, {lost} lost: {kinds}"
        )


@pytest.fixture
def warm(tmp_path: Path, cache: Path) -> Warm:
    return Warm(tmp_path / "here", cache)


@pytest.fixture
def elsewhere(cache: Path) -> Iterator[Warm]:
    """In a folder on a file system that is not the one of temporary files."""
    if not os.access("/dev/shm", os.W_OK):
        pytest.skip("no second file system")
    folder = Path(tempfile.mkdtemp(dir="/dev/shm"))
    assert folder.stat().st_dev != Path(tempfile.gettempdir()).stat().st_dev
    yield Warm(folder / "here", cache)
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def words(corpus: Path) -> list[str]:
    """Of a run that takes a second: dropout, accumulation and an uneven rhythm of checkpoints."""
    return arguments(corpus)


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory, cache: Path, words: list[str]) -> Path:
    """The folder of that run, undisturbed; to be compared with, not changed."""
    folder = tmp_path_factory.mktemp("whole") / "here"
    assert Warm(folder, cache)("run", *words).code == 0
    return folder / "outputs/s/r"


def succeeded(ended: Ended) -> Ended:
    assert ended.code == 0, ended.err
    assert ended.err == ""
    return ended
