"""Stop a process on a signal, at once or after the current step has been saved.

A second signal ends the process immediately.  Torch-free.
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
PARENT = "TINYGPT_PARENT"  # environment variable of processes that a run launched
ONE_REQUEST = 0.25  # seconds in which repeated signals count once: a terminal sends SIGHUP twice
PATIENCE = 2.0  # seconds for the main thread, which may be inside a library, to handle a signal

Note = Callable[[int], None]
_notes: list[Note] = []  # the last one is called
_received: list[tuple[int, float]] = []  # the first signal and its time
_heard = threading.Event()
_leaving = threading.Lock()  # only one thread may end the process


class Stopped(SystemExit):
    """Exit because of a signal: ``line`` says so, and the exit code is 128 plus its number."""

    def __init__(self, number: int, line: str = "") -> None:
        super().__init__(128 + number)
        name = signal.Signals(number).name
        self.number = number
        self.line = line or f"stopped by {name}; the same command resumes from what is saved"


def received() -> int | None:
    """Return the first stopping signal received, if any."""
    return _received[0][0] if _received else None


def stop(number: int) -> NoReturn:
    raise Stopped(number)


@contextlib.contextmanager
def handled(note: Note, also: tuple[int, ...] = ()) -> Iterator[None]:
    """Call ``note`` with the first stopping signal received in the block.

    Signals that are ignored (``nohup``) or have another handler are left alone, except those in
    ``also``.  Outside the main thread, which alone can handle signals, the block just runs.
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
    """Raise Stopped for the first stopping signal received in the block.

    ``also`` is as for ``handled``.  A process that a run launched leaves the decision to its
    parent.
    """
    note: Note = (lambda number: None) if PARENT in os.environ else stop
    with _watched(), handled(note, also):
        yield
        if note is stop and (number := received()) is not None:  # a library swallowed it
            stop(number)


@contextlib.contextmanager
def not_for_children() -> Iterator[None]:
    """Shield processes started in the block from a terminal's signals.

    Their parent receives the signals after the block, and stops them with SIGTERM.
    """
    if os.name != "posix":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, set(STOPPING) - {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _handle(number: int, frame: FrameType | None) -> None:
    _heard.set()
    if not _received:
        _received.append((number, time.monotonic()))
        _notes[-1](number)
    elif time.monotonic() - _received[0][1] > ONE_REQUEST:
        _leave(number)


def _leave(number: int) -> NoReturn:
    """End the process immediately; incomplete files are removed when the run is resumed."""
    if not _leaving.acquire(timeout=1.0):
        os._exit(128 + number)
    with contextlib.suppress(OSError):
        if os.isatty(1):
            os.write(1, b"\x1b[?25h")  # show the cursor, which a progress bar hides
        if PARENT not in os.environ:
            line = f"stopped at once by {signal.Signals(number).name}; the same command resumes"
            os.write(2, f"{line} from what is saved\n".encode())
    os._exit(128 + number)


@contextlib.contextmanager
def _watched() -> Iterator[None]:
    """Watch for signals from a thread, as the main one may spend minutes in a library's call."""
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
    """Read signal numbers from a pipe; end the process if the main thread does not react."""
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
