"""Keep commands running whatever they print and whoever reads it.  Torch-free."""

from __future__ import annotations

import codecs
import errno
import functools
import io
import os
import sys
from collections.abc import Callable
from typing import Any

PLAIN = dict(zip("→–—−·×±▶…─│", ("->", *"----x", "+-", ">", "...", "-", "|"), strict=True))
gone: list[Any] = []  # streams without a reader
GONE = {errno.EPIPE, errno.EIO, errno.EBADF}  # the reader or the terminal is closed


def _plainer(error: UnicodeError) -> tuple[str, int]:
    """Replace characters that an encoding lacks with ASCII."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = "".join(PLAIN.get(c, c) for c in error.object[error.start : error.end])
    return text.encode("ascii", "backslashreplace").decode(), error.end


codecs.register_error("tinygpt.plain", _plainer)


def survive() -> None:
    """Make the standard streams accept any text, and ignore that they have no reader."""
    for number in range(3):  # if closed (`>&-`), the next file opened would get its number
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
            setattr(sys, name, stream)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="tinygpt.plain")
            for method in ("write", "flush"):
                if method not in vars(stream):
                    setattr(stream, method, _surviving(stream, getattr(stream, method)))


def _surviving(stream: io.TextIOWrapper, call: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(call)
    def surviving(*arguments: Any) -> Any:
        try:
            return call(*arguments)
        except OSError as error:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())  # discards buffered text too
            os.close(nowhere)
            gone.append(stream)
            if error.errno not in GONE and stream is sys.stdout:
                print(f"note: stdout: {error.strerror}; continuing without it", file=sys.stderr)
            return len(arguments[0]) if arguments else None

    return surviving
