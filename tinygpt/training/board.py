"""TensorBoard: curves, texts and a line of the HParams page for a run."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import api_pb2, metadata
from tensorboard.plugins.hparams.plugin_data_pb2 import (
    HParamsPluginData,
    SessionEndInfo,
    SessionStartInfo,
)
from torch.utils.tensorboard import SummaryWriter

from tinygpt import rundir
from tinygpt.training.tracking import At

WIDTH = 120  # characters of a sample's line: the page does not break them


class Board:
    """A run in TensorBoard.  A new file purges what is in earlier ones, as all is told again.

    Step is training tokens.  The time of a point is when it would have been had the run only
    trained, without a break: so Relative is training time.  Against FLOPs, which must be
    whole numbers below 2^63, the losses stand in a group of their own.
    """

    def __init__(self, folder: Path, flush_seconds: int, began: float) -> None:
        self.began = began
        # TensorBoard reads files in the order of their names: whole seconds, then the process
        if any(folder.glob(f"*.{int(time.time())}.*")):
            time.sleep(1 - time.time() % 1)
        self.writer = SummaryWriter(str(folder), purge_step=0, flush_secs=flush_seconds)
        losses = ["train/loss", "val/loss", "val/irreducible_loss_exact"]
        self.writer.add_custom_scalars({"loss": {"all losses": ["Multiline", losses]}})

    def begin(self, params: Mapping[str, Any]) -> None:
        """A session of the HParams page, which finds out by itself in what they differ."""
        start = SessionStartInfo(start_time_secs=self.began)
        for name, value in params.items():
            if value is None or name.split(".")[0] in rundir.NOT_SCIENCE:
                continue
            if isinstance(value, bool):
                start.hparams[name].bool_value = value
            elif isinstance(value, int | float):
                start.hparams[name].number_value = value
            else:
                start.hparams[name].string_value = str(value)
        self._add(metadata.SESSION_START_INFO_TAG, HParamsPluginData(session_start_info=start))

    def log_line(self, values: Mapping[str, float], at: At) -> None:
        when = self.began + at.seconds
        for tag, value in values.items():
            self.writer.add_scalar(tag, value, at.tokens, when)
        for split in ("train", "val"):
            if f"{split}/loss" in values:
                tag = f"loss by MFLOPs/{split}"
                self.writer.add_scalar(tag, values[f"{split}/loss"], round(at.flops / 1e6), when)

    def log_text(self, text: str, tokens: int) -> None:
        lines = (textwrap.fill(line, WIDTH) for line in text.splitlines())
        # as code: what looks like Markdown is the model's
        self.writer.add_text("samples", textwrap.indent("\n".join(lines), " " * 4), tokens)

    def log_outcome(self, outcome: Mapping[str, float], status: str, at: At) -> None:
        for name, value in outcome.items():
            # so named, these are what the HParams page shows, the first five in the alphabet
            tag = f"final/{name.removeprefix('final_').removeprefix('val_')}"
            self.writer.add_scalar(tag, value, at.tokens, self.began + at.seconds)
        ended = api_pb2.STATUS_FAILURE if status == "diverged" else api_pb2.STATUS_SUCCESS
        end = SessionEndInfo(status=ended, end_time_secs=self.began + at.seconds)
        self._add(metadata.SESSION_END_INFO_TAG, HParamsPluginData(session_end_info=end))

    def _add(self, tag: str, content: HParamsPluginData) -> None:
        about = metadata.create_summary_metadata(content)
        value = Summary.Value(tag=tag, metadata=about, tensor=metadata.NULL_TENSOR)
        writer = self.writer._get_file_writer()  # type: ignore[no-untyped-call]
        writer.add_summary(Summary(value=[value]))

    def close(self, status: str) -> None:
        self.writer.close()
