"""Record the decisions and results of a law within a budget, and the time spent."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tinygpt import fileio

TOUCH = 1.0  # seconds between marks of the time that has passed


class Record:
    """Hold the lines of ``design.jsonl``, from which a killed study resumes."""

    def __init__(self, path: Path) -> None:
        self.path, self.start, self.before = path, time.monotonic(), 0.0
        self.lines: list[dict[str, Any]] = []
        if not path.exists():
            return
        touched, raw = path.stat().st_mtime, path.read_bytes().split(b"\n")
        self.lines = [json.loads(line) for line in raw[:-1]]
        if raw[-1]:  # torn as it was written
            fileio.write_text(path, "".join(line.decode() + "\n" for line in raw[:-1]))
        if self.lines:
            last = self.lines[-1]
            self.before = last["at"] + max(0.0, touched - last["written"])

    def elapsed(self) -> float:
        """Return the seconds that the study has worked, over all its starts."""
        return self.before + time.monotonic() - self.start

    def note(self, event: str, **facts: Any) -> dict[str, Any]:
        """Append a line, and return it once it is on disk."""
        line = {"event": event, "at": round(self.elapsed(), 2), "written": time.time(), **facts}
        fileio.append(self.path, (json.dumps(line) + "\n").encode(), sync=True)
        self.lines.append(json.loads(json.dumps(line)))
        return self.lines[-1]

    def find(self, event: str) -> dict[str, Any] | None:
        """Return the first line of this kind."""
        return next((line for line in self.lines if line["event"] == event), None)

    @contextlib.contextmanager
    def marking_time(self) -> Iterator[None]:
        """Touch the file every second, so that a later start knows how long this one worked."""
        stop = threading.Event()

        def mark() -> None:
            while not stop.wait(TOUCH):
                with contextlib.suppress(OSError):
                    os.utime(self.path)

        thread = threading.Thread(target=mark, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
