"""The figures of a report as TensorBoard shows them, on its page of images."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from tinygpt import fileio


def write(folder: Path, figures: Sequence[str]) -> None:
    """Puts each ``<figure>.png`` of ``folder`` into its ``tensorboard/``; earlier ones go."""
    place, now = folder / "tensorboard", time.time_ns()
    place.mkdir(parents=True, exist_ok=True)
    before = list(place.glob("*"))
    events = [
        Event(file_version="brain.Event:2"),
        Event(session_log=SessionLog(status=SessionLog.START)),  # who looks forgets the earlier
        *(Event(summary=_image(folder / f"{name}.png")) for name in figures),
    ]
    # a name of its own, behind the earlier: who looks opens it as a new file
    with fileio.replacing(place / f"events.out.tfevents.{now}") as path, path.open("wb") as file:
        records = RecordWriter(file)
        for event in events:
            event.wall_time = now / 1e9
            records.write(event.SerializeToString())
    for path in before:
        if path.stat().st_size:
            path.write_bytes(b"")  # who is reading it would stumble over a file that is gone
        else:
            path.unlink()


def _image(path: Path) -> Summary:
    png = path.read_bytes()
    width, height = (int.from_bytes(png[at : at + 4], "big") for at in (16, 20))
    image = Summary.Image(width=width, height=height, encoded_image_string=png)
    return Summary(value=[Summary.Value(tag=f"fit/{path.stem}", image=image)])
