"""A harness: a reader, the kind of input it takes, and what it may answer."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tinygpt.config import ConfigError, RunError

SEEDS = Path(__file__).parent / "seeds"
DOCUMENTED = (ConfigError, RunError)  # one line for the user, with a file or a key in it


@dataclass(frozen=True)
class Harness:
    """``one`` hands ``data`` to the real reader; only DOCUMENTED errors may come out of it."""

    name: str
    kind: str  # a key of mutations.KINDS
    one: Callable[[bytes], object]
    seeds_of: str = ""  # another harness, whose seeds are its own
    largest: int = 1 << 15  # bytes

    def seed_folder(self) -> Path:
        return SEEDS / (self.seeds_of or self.name)

    def seeds(self) -> list[bytes]:
        """Valid inputs, and those that were found to be trouble once."""
        return [path.read_bytes() for path in sorted(self.seed_folder().iterdir())]

    def refuses(self, data: bytes) -> bool:
        """Whether the reader refused ``data``, as it may.  Raises Finding for anything else."""
        try:
            self.one(data)
        except DOCUMENTED as error:
            if not str(error).strip():
                raise Finding(f"{self.name}: an error that says nothing") from error
            return True
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a panic of a Rust library is no Exception
            frames = traceback.extract_tb(error.__traceback__)
            ours = [frame for frame in frames if "tinygpt" in frame.filename] or frames
            place = f"{type(error).__name__} at {Path(ours[-1].filename).name}:{ours[-1].lineno}"
            raise Finding(f"{self.name}: {place}: {error!s:.200}") from error
        return False


class Finding(Exception):
    """An input that a reader does not answer as documented.  Its words up to the last colon name
    the place."""


@functools.cache
def scratch() -> Path:
    """A folder for this process, in memory where the system has such."""
    memory = "/dev/shm"
    folder = tempfile.mkdtemp(prefix="fuzz-", dir=memory if os.path.isdir(memory) else None)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def remove_scratch() -> None:
    shutil.rmtree(scratch(), ignore_errors=True)


def file_of(name: str, data: bytes) -> Path:
    """``data`` as the file ``name`` in the scratch folder."""
    path = scratch() / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path
