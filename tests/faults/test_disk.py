"""A disk that is full, a folder that cannot be written any more or is gone: one line, exit code 1,
what was finished stays, and with the cause removed the same command completes."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import tiny
from tests.faults.conftest import Injected, succeeded
from tests.faults.test_kills import SHORT, files, nothing_torn
from tests.faults.warm import Strike, Warm
from tests.test_bad_input import fill, small_disk
from tests.test_resume import outcome


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", "4m") as disk:
        yield disk


@pytest.fixture
def study(warm: Warm, corpus: Path, disk: Path) -> tuple[str, ...]:
    """The words of a sweep on that disk, which is finished."""
    sweep = ("--multirun", "model.d_model=8,16,32", "seed=1,2", *SHORT, "fit=false")
    words = ("run", *tiny(corpus, *sweep, f"output_dir={disk}/outputs"))
    succeeded(warm(*words))
    return words


def fails_for_want_of_space(
    warm: Warm, words: tuple[str, ...], disk: Path, leaving: int, cache: Path | None = None
) -> None:
    before = files(disk)
    filler = fill(disk, leaving)
    ended = warm(*words, cache=cache)
    assert ended.code == 1, ended.err
    assert ended.line.startswith(str(disk))
    assert ended.line.endswith("No space left on device")
    filler.unlink()
    nothing_torn(disk)
    after = files(disk)
    assert {name: after[name] for name in before} == before
    succeeded(warm(*words, cache=cache))


@pytest.mark.parametrize("leaving", [12_288, 60_000, 200_000, 400_000])
def test_a_run(
    warm: Warm, words: list[str], whole: Path, disk: Path, injected: Injected, leaving: int
) -> None:
    """At its first records, at a first and at later checkpoints."""
    words = [*words, "logger=csv", f"output_dir={disk}/outputs"]
    injected("full disk under run")
    fails_for_want_of_space(warm, ("run", *words), disk, leaving)
    found, expected = outcome(disk / "outputs/s/r"), outcome(whole)
    assert found == expected


@pytest.mark.parametrize("leaving", [4096, 20_480, 65_536])
def test_data_preparation(
    warm: Warm, corpus: Path, disk: Path, injected: Injected, leaving: int
) -> None:
    words = ("run", *tiny(corpus, "tokenizer=bpe", "tokenizer.vocab_size=300", "plan=true"))
    succeeded(warm(*words, cache=warm.folder / "clean"))
    injected("full disk under data preparation")
    fails_for_want_of_space(warm, words, disk, leaving, disk / "cache")
    assert files(disk / "cache") == files(warm.folder / "clean")


@pytest.mark.parametrize("leaving", [0, 8192])
def test_the_summary_of_a_sweep(
    warm: Warm, study: tuple[str, ...], disk: Path, injected: Injected, leaving: int
) -> None:
    before = files(disk)
    for path in disk.glob("outputs/s/sweep_*"):
        path.unlink()
    injected("full disk under a summary")
    fails_for_want_of_space(warm, study, disk, leaving)
    assert files(disk) == before


@pytest.mark.parametrize("leaving", [0, 12_288, 100_000])
def test_a_report(
    warm: Warm, study: tuple[str, ...], disk: Path, injected: Injected, leaving: int
) -> None:
    words = ("fit", f"runs={disk}/outputs/s")
    succeeded(warm(*words))
    fit, before = disk / "outputs/s/fit", files(disk)
    shutil.rmtree(fit)
    injected("full disk under fit")
    fails_for_want_of_space(warm, words, disk, leaving)
    assert files(disk) == before


@pytest.mark.parametrize("leaving", [0, 8192, 30_000])
def test_an_export(warm: Warm, whole: Path, disk: Path, injected: Injected, leaving: int) -> None:
    words = ("export", f"run={whole}", f"to={disk}/exported", "force=true")
    succeeded(warm(*words, "checkpoint=best"))
    injected("full disk under export")
    fails_for_want_of_space(warm, words, disk, leaving)


# --- a folder that is lost on the way


def vanish(folder: Path) -> None:
    shutil.rmtree(folder)


def cannot_be_written(folder: Path) -> None:
    """Permissions do not stop root."""
    subprocess.run(["chattr", "-R", "+i", str(folder)], check=True, capture_output=True)


@pytest.fixture
def run(warm: Warm) -> Iterator[Path]:
    run = warm.folder / "outputs/s/r"
    yield run
    subprocess.run(["chattr", "-R", "-i", str(warm.folder)], check=False, capture_output=True)


@pytest.mark.parametrize("does", [vanish, cannot_be_written])
@pytest.mark.parametrize("part", [0.3, 0.6, 0.9, 0.98])
def test_a_run_folder_that_is_lost(
    warm: Warm,
    words: list[str],
    whole: Path,
    run: Path,
    injected: Injected,
    part: float,
    does: object,
) -> None:
    if does is cannot_be_written and (os.geteuid() != 0 or not shutil.which("chattr")):
        pytest.skip("needs root and chattr")
    words = [*words, "logger=csv"]
    changes = succeeded(warm("run", *words, strike=Strike(run))).changes
    shutil.rmtree(run)
    strike = Strike(run, int(part * changes), does=does)  # type: ignore[arg-type]
    ended = warm("run", *words, strike=strike)
    injected("read-only run folder" if does is cannot_be_written else "vanished run folder")
    assert ended.code == 1, ended
    assert "outputs/s/r/" in ended.line
    assert ".tmp" not in ended.line
    subprocess.run(["chattr", "-R", "-i", str(warm.folder)], check=False, capture_output=True)
    succeeded(warm("run", *words))
    assert outcome(run) == outcome(whole)
