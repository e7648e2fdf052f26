"""Files that are not as they were written: each is noticed, and mended where that can be done."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import tiny
from tests.faults.conftest import Injected, succeeded
from tests.faults.test_kills import files
from tests.faults.warm import Warm
from tests.test_resume import outcome


def truncated(data: bytes) -> bytes:
    return data[: len(data) // 2]


def emptied(data: bytes) -> bytes:
    return b""


def flipped(data: bytes) -> bytes:
    """One bit, in the middle."""
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


DAMAGES = [truncated, emptied, flipped]
Damage = Callable[[bytes], bytes]


def harm(path: Path, damage: Damage) -> None:
    before = path.read_bytes()
    path.write_bytes(damage(before))
    assert path.read_bytes() != before


@pytest.fixture
def again(warm: Warm, whole: Path) -> Path:
    """A copy of the finished run, as if it had been killed before its results."""
    run = warm.folder / "outputs/s/r"
    shutil.copytree(whole, run)
    (run / "results.json").unlink()
    (run / "checkpoints/final.ckpt").unlink()
    return run


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kept", ["best", "step_20"])
def test_a_damaged_last_checkpoint_gives_way_to_the_one_before(
    warm: Warm,
    again: Path,
    whole: Path,
    words: list[str],
    injected: Injected,
    damage: Damage,
    kept: str,
) -> None:
    for path in again.glob("checkpoints/*"):
        if path.stem not in ("last", kept):
            path.unlink()
    harm(again / "checkpoints/last.ckpt", damage)
    injected("damaged checkpoint")
    said = succeeded(warm("run", *words)).out
    assert f"outputs/s/r/checkpoints/last.ckpt is damaged: from {kept}.ckpt, step" in said
    found, expected = outcome(again), outcome(whole)
    for one in (found, expected):  # what was kept of the steps before was removed above
        one["kept"] = [name for name in one["kept"] if not name.startswith("step_")]
    assert found == expected


@pytest.mark.parametrize("damage", DAMAGES)
def test_no_checkpoint_that_is_whole(
    warm: Warm, again: Path, whole: Path, words: list[str], injected: Injected, damage: Damage
) -> None:
    for path in again.glob("checkpoints/*"):
        harm(path, damage)
    injected("damaged checkpoint")
    ended = warm("run", *words)
    assert ended.code == 2
    assert "last.ckpt: this checkpoint is damaged; remove it to begin anew" in ended.line
    succeeded(warm("run", *words, "force=true"))
    assert outcome(again) == outcome(whole)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_final_checkpoint_is_not_exported(
    warm: Warm, whole: Path, injected: Injected, damage: Damage
) -> None:
    run = shutil.copytree(whole, warm.folder / "r")
    harm(run / "checkpoints/final.ckpt", damage)
    injected("damaged checkpoint")
    ended = warm("export", "run=r", "to=there")
    assert (ended.code, ended.line) == (2, "r/checkpoints/final.ckpt: this checkpoint is damaged")
    assert not (warm.folder / "there").exists()


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *(("tokenizer.json", damage) for damage in DAMAGES),
        ("results.json", truncated),
        ("results.json", emptied),
    ],
)
def test_a_damaged_record_of_a_run_is_not_used(
    warm: Warm, whole: Path, injected: Injected, name: str, damage: Damage
) -> None:
    run = shutil.copytree(whole, warm.folder / "r")
    harm(run / name, damage)
    injected(f"damaged {name}")
    ended = warm("export", "run=r", "to=there")
    assert ended.code == 2
    assert f"r/{name}: not a " in ended.line
    assert not (warm.folder / "there").exists()


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_made_anew(
    warm: Warm, corpus: Path, injected: Injected, damage: Damage
) -> None:
    cache = warm.folder / "cache"
    words = tiny(corpus, "tokenizer=bpe", "tokenizer.vocab_size=300", "plan=true")
    succeeded(warm("run", *words, cache=cache))
    before = files(cache)
    assert {Path(name).suffix for name in before} == {".bin", ".npy", ".json"}
    for name in before:
        harm(cache / name, damage)
        injected(f"damaged {os.path.splitext(name)[1]} in the cache")
        succeeded(warm("run", *words, cache=cache))
        assert files(cache) == before, name
