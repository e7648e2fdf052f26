"""Write files atomically, check them when reading, and lock folders.  Torch-free."""

from __future__ import annotations

import bz2
import contextlib
import csv
import errno
import gzip
import hashlib
import io
import json
import lzma
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import filelock
import yaml

from tinygpt.config import ConfigError, one_line
from tinygpt.config.errors import require

DEEPEST = 100  # levels of a YAML file
# The C library's loader, where available, is ten times faster.
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


# --- writing


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; if the block succeeds, rename it to ``path``.

    The content is on disk before the rename, so readers see either the old file or the new one.
    The folder must exist: if it is removed meanwhile, the write fails.
    """
    with naming(path):
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        with naming(path):
            yield temporary
            with temporary.open("rb+") as written:
                os.fsync(written.fileno())
            mask = os.umask(0)
            os.umask(mask)
            os.chmod(temporary, 0o666 & ~mask)  # mkstemp's files are private
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):  # such as the one that stopped the write
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(folder: Path, kept: bool = False) -> Iterator[Path]:
    """Yield a new folder beside ``folder`` that replaces it after the block.

    Only one process may do so at a time.  Remains of a killed process are removed, or with
    ``kept`` left in the new folder, so that they can be used.
    """
    new, old = (folder.with_name(f".{folder.name}.{name}") for name in ("tmp", "old"))
    if old.exists() and not folder.exists():  # killed between the two renames
        old.rename(folder)
    remains = [old] if kept else [new, old]
    for path in remains:
        shutil.rmtree(path, ignore_errors=True)
    try:
        new.mkdir(parents=True, exist_ok=kept)
        yield new
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    except Exception:  # but not an interrupt
        remains = [new, old]
        raise
    finally:
        if old.exists() and not folder.exists():
            old.rename(folder)
        for path in remains:
            shutil.rmtree(path, ignore_errors=True)


def remove_torn(*folders: Path) -> None:
    """Remove the temporary files of killed processes; no other process may be writing."""
    for folder in folders:
        for path in folder.glob(".*.tmp"):
            path.unlink(missing_ok=True)


def check_writable(key: str, folder: Path) -> None:
    """Raise ConfigError, naming ``key``, if ``folder`` cannot be created or written to."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    require(nearest.is_dir(), f"{key}={folder}: {nearest} is a file; give a folder")
    line = f"{key}={folder}: {nearest} is not writable; give another folder"
    require(os.access(nearest, os.W_OK | os.X_OK), line)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Make the error of a failed write name ``path``, instead of nothing or a temporary file."""
    try:
        yield
    except OSError as error:
        if not error.filename or f".{path.name}." in str(error.filename):
            error.filename = str(path)
        raise
    except Exception as error:  # torch and safetensors do not say that the disk is full
        if shutil.disk_usage(path.parent).free >= 1 << 16:
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error


def write_text(path: Path, text: str) -> None:
    """Write a file atomically, creating its folder if necessary."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def copy(source: Path, path: Path) -> None:
    with replacing(path) as temporary:
        shutil.copyfile(source, temporary)


def write_json(path: Path, values: Any) -> None:
    write_text(path, to_json(values))


def write_csv(path: Path, rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Write one line per row; None and missing values become empty fields."""
    text = io.StringIO()
    table = csv.DictWriter(text, columns, lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write_text(path, text.getvalue())


def to_json(values: Any) -> str:
    """Return indented JSON.  Raise ValueError for NaN and infinity, which JSON lacks."""
    return json.dumps(values, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def append(path: Path, content: bytes, sync: bool = False) -> None:
    """Append all of ``content`` or nothing; with ``sync``, wait until it is on disk.

    Raises OSError on a full disk.
    """
    with naming(path), path.open("ab", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        if file.write(content) != len(content):  # a full disk takes only part of it
            file.truncate(end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if sync:
            os.fsync(file.fileno())


# --- reading


def read_json(path: Path, **needed: type) -> dict[str, Any]:
    """Return the JSON object in a file, whose values ``needed`` must have the given types.

    Raises ConfigError, naming the file and the first wrong value.
    """
    try:
        values = parse_object(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not a readable JSON file ({error})") from error
    for name, kind in needed.items():
        if type(values.get(name)) is not kind:
            wanted = {str: "a text", int: "a whole number", list: "a list"}[kind]
            raise ConfigError(f"{path}: {name}={values.get(name)!r:.40}: must be {wanted}")
    return values


def parse_object(text: str) -> dict[str, Any]:
    """Parse a JSON object.  Raise ValueError for anything else, and for unpaired surrogates."""
    values = parse_json(text)
    if not isinstance(values, dict):
        raise ValueError("not an object")
    if "\\u" in text:
        json.dumps(values, ensure_ascii=False).encode()  # fails for surrogates
    return values


def parse_json(text: str) -> Any:
    """Parse JSON.  Raise ValueError, also if it exceeds Python's recursion limit."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file.

    Raises ConfigError, naming the file, for anything else, and for aliases, with which a small file
    can expand without end.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if "&" in text and any(isinstance(e, yaml.AliasEvent) for e in yaml.parse(text, _Loader)):
            raise yaml.YAMLError("it has aliases")
        values = yaml.load(text, Loader=_Loader)
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{path}: not a readable YAML file ({one_line(error)})") from error
    require(isinstance(values, dict), f"{path}: not a table of YAML")
    # the C loader accepts more levels than Python can recurse through
    require(not _is_deep(values, 0), f"{path}: not a readable YAML file (nested too deeply)")
    return dict(values)


def _is_deep(value: Any, depth: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return depth > DEEPEST or any(_is_deep(one, depth + 1) for one in inner)


def digest(value: Any) -> str:
    """Return the SHA-256 of the canonical JSON of ``value``, in hexadecimal."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            sha.update(chunk)
    return sha.hexdigest()


# --- compressed files


def unpacked(raw: IO[bytes], kind: str) -> Any:
    """Return a stream that decompresses ``raw``, of kind ``.gz``, ``.bz2``, ``.xz`` or ``.zst``."""
    if kind == ".gz":
        return gzip.open(raw)
    if kind in (".zst", ".zstd"):
        import pyarrow

        return pyarrow.CompressedInputStream(pyarrow.PythonFile(raw), "zstd")
    return io.BufferedReader(_Streams(raw, kind)) if kind in (".bz2", ".xz") else raw


class _Streams(io.RawIOBase):
    """Read all streams of a .bz2 or .xz file; Python's readers silently stop at garbage."""

    def __init__(self, raw: IO[bytes], kind: str) -> None:
        self.raw, self.is_xz = raw, kind == ".xz"
        self.make: Any = lzma.LZMADecompressor if self.is_xz else bz2.BZ2Decompressor
        self.stream = self.make()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = b""
        while not data:
            if self.stream.eof:
                if not (packed := self._next()):
                    return 0
                self.stream = self.make()
            else:
                packed = self.raw.read(1 << 16) if self.stream.needs_input else b""
                if self.stream.needs_input and not packed:
                    raise EOFError("the file ends within a stream")
            data = self.stream.decompress(packed, len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def _next(self) -> bytes:
        """Return the start of the next stream, after padding (zeros by fours, in .xz)."""
        packed: bytes = self.stream.unused_data
        while not packed.strip(b"\0") and (more := self.raw.read(1 << 16)):
            packed += more
        zeros = len(packed) - len(packed.lstrip(b"\0"))
        return packed[zeros - zeros % 4 :] if self.is_xz else packed


# --- one process at a time


@contextlib.contextmanager
def locked(folder: Path, output_dir: Path, what: str) -> Iterator[None]:
    """Create ``folder``, and lock it; raise ConfigError if another process has locked it."""
    lock = filelock.FileLock(folder / ".lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise ConfigError(f"{folder}: another process is training this {what}") from error
    except OSError as error:
        line = f"output_dir={output_dir}: cannot be written ({error.strerror})"
        raise ConfigError(line) from error
    try:
        yield
    finally:
        lock.release()


def report_lock(folder: Path) -> contextlib.AbstractContextManager[object]:
    """Create ``folder``, and return the lock for writing a report into it."""
    folder.mkdir(parents=True, exist_ok=True)
    return filelock.FileLock(folder.with_name(f".{folder.name}.lock"))
