"""Signals that ask a process to stop: obeyed at once, or noted until a whole step is saved.

A second signal ends the process as it is.  Torch-free.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGBREAK")
STOPPING = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))
DEFAULTS = (signal.SIG_DFL, signal.default_int_handler)
PARENT = "TINYGPT_PARENT"  # environment variable: the process of a run that launched this one
# Seconds in which signals are one request: a closing terminal sends SIGHUP twice.
ONE_REQUEST = 0.25
PATIENCE = 2.0  # seconds for the main thread, which may be inside a library, to hear of a signal

Note = Callable[[int], None]
_notes: list[Note] = []  # the innermost one is told
_received: list[tuple[int, float]] = []  # the first signal and when it came
_heard = threading.Event()
_leaving = threading.Lock()  # by the main thread or by the one that watches, not by both


class Stopped(SystemExit):
    """A signal asked the process to stop; ``line`` says so, and the exit code is the shell's."""

    def __init__(self, number: int, line: str = "") -> None:
        super().__init__(128 + number)
        name = signal.Signals(number).name
        self.number = number
        self.line = line or f"stopped by {name}; the same command goes on from what is saved"


def received() -> int | None:
    """Return the first stopping signal that came, if one did."""
    return _received[0][0] if _received else None


def stop(number: int) -> NoReturn:
    raise Stopped(number)


@contextlib.contextmanager
def handled(note: Note, also: tuple[int, ...] = ()) -> Iterator[None]:
    """Call ``note`` with the first stopping signal inside the block.

    A signal that is ignored (``nohup``) or has another handler keeps it, except for those in
    ``also``.  Only the main thread can handle signals; elsewhere the block just runs.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {}
    for number in STOPPING:
        handler = signal.getsignal(number)
        if handler in DEFAULTS or (number in also and handler is not _handle):
            before[number] = signal.signal(number, _handle)
    _notes.append(note)
    try:
        yield
    finally:
        _notes.pop()
        for number, handler in before.items():
            signal.signal(number, handler)
        if not _notes:
            _received.clear()
            _heard.clear()


@contextlib.contextmanager
def obeyed(also: tuple[int, ...] = ()) -> Iterator[None]:
    """Raise Stopped for the first stopping signal inside the block.

    ``also`` as for ``handled``.  A process that a run launched leaves the decision to its parent,
    which hears of it at a rest.
    """
    note = _wait if PARENT in os.environ else stop
    with _watched(), handled(note, also):
        yield
        if note is stop and (number := received()) is not None:  # a library swallowed it
            stop(number)


@contextlib.contextmanager
def not_for_children() -> Iterator[None]:
    """Keep a terminal's signals from the processes started inside the block; their parent, which
    hears of them behind it, tells them with SIGTERM."""
    if os.name != "posix":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, set(STOPPING) - {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _wait(number: int) -> None:
    pass


def _handle(number: int, frame: FrameType | None) -> None:
    _heard.set()
    if not _received:
        _received.append((number, time.monotonic()))
        _notes[-1](number)
    elif time.monotonic() - _received[0][1] > ONE_REQUEST:
        _leave(number)


def _leave(number: int) -> NoReturn:
    """End the process as it is; what is half written is removed when the run goes on."""
    if not _leaving.acquire(timeout=1.0):
        os._exit(128 + number)
    with contextlib.suppress(OSError):
        if os.isatty(1):
            os.write(1, b"\x1b[?25h")  # a progress bar had hidden the cursor
        if PARENT not in os.environ:
            line = f"stopped at once by {signal.Signals(number).name}; the same command goes on"
            os.write(2, f"{line} from what is saved\n".encode())
    os._exit(128 + number)


@contextlib.contextmanager
def _watched() -> Iterator[None]:
    """Leave where the main thread does not come back to Python to obey: a tokenizer is trained
    in one call of minutes."""
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or os.name != "posix" or _notes:
        yield
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reading,), daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writing)


def _watch(reading: int) -> None:
    """Read the signals' numbers from a pipe as they come, whatever the main thread is doing."""
    first = None
    while read := os.read(reading, 1):
        number, now = read[0], time.monotonic()
        if number not in STOPPING or signal.getsignal(number) is not _handle:
            continue
        first = first or now
        obeying = _notes[-1:] == [stop]
        if now - first > ONE_REQUEST or (obeying and not _heard.wait(PATIENCE)):
            _leave(number)
    os.close(reading)
