"""The loggers beside metrics.csv: TensorBoard, Weights & Biases, MLflow.

All are told the same: what the run is, every line of metrics, every sample, how it ended.  The x
axis is training tokens; FLOPs and seconds can take its place.  When a run begins they are told
all that it has behind it, so that one that was interrupted, or that branched off another, is one
curve from its first step, with nothing twice.
"""

from __future__ import annotations

import functools
import importlib
import os
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Protocol

from tinygpt import rundir
from tinygpt.checks import key_names
from tinygpt.config import Config, ConfigError, install
from tinygpt.training.board import Board
from tinygpt.training.tracking import At, WandbRun, check_server, open_mlflow
from tinygpt.training.trainer import quiet_lightning

# mlflow is last: imported without the others it could not be told of them any more
LIBRARIES = {"wandb": ["wandb"], "mlflow": ["alembic", "sqlalchemy", "mlflow"]}
# Of the results, what runs are compared by.
OUTCOME = (
    *("final_val_loss", "best_val_loss", "final_val_bits_per_byte", "final_val_accuracy"),
    *("test_loss", "tokens_per_second"),
)


class RunLogger(Protocol):
    """One of them, and in it one run."""

    def begin(self, params: Mapping[str, Any]) -> None: ...

    def log_line(self, values: Mapping[str, float], at: At) -> None: ...

    def log_text(self, text: str, tokens: int) -> None: ...

    def log_outcome(self, outcome: Mapping[str, float], status: str, at: At) -> None: ...

    def close(self, status: str) -> None:
        """``status``: success, failed or KILLED."""


class Loggers:
    """Those that a run has; with none, nothing happens."""

    def __init__(self) -> None:
        self.open: list[RunLogger] = []
        self._at = At(0, 0.0, 0.0)
        self._flops = 0.0  # for a token
        self._floor: float | None = None
        self._sampled: int | None = None  # tokens at the last text

    def begin(
        self,
        config: Config,
        run: rundir.RunDir,
        sizes: Mapping[str, Any],
        floor: float | None,
        texts: Mapping[int, str],
    ) -> None:
        """Opens what ``logger`` asks for and tells it what the run has behind it.

        ``sizes`` is what its results will say of its size; ``floor`` the loss that no model gets
        below; ``texts`` the samples there are, by tokens.  Raises ConfigError where a logger
        cannot be had.
        """
        self._flops, self._floor = sizes["flops_exact"] / sizes["train_tokens"], floor
        rows = [
            {name: float(value) for name, value in row.items() if value}
            for row in rundir.MetricsFile(run.metrics).read()
        ]
        began = time.time() - (rows[-1]["seconds"] if rows else 0.0)
        if config.logger.tensorboard is not None:
            flush_seconds = config.logger.tensorboard.flush_seconds
            self.open.append(Board(run.path / "tensorboard", flush_seconds, began))
        if config.logger.wandb is not None:
            self.open.append(WandbRun(config, run))
        if config.logger.mlflow is not None:
            with quiet_lightning():
                self.open.append(open_mlflow(config, run))
        params = {**_flat(config), **{name: sizes[name] for name in rundir.SIZES}}
        for logger in self.open:
            logger.begin(params)
        for row in rows:
            self.log_line(row)
            if self._at.tokens in texts:
                self.log_text(texts[self._at.tokens])

    def log_line(self, row: Mapping[str, float | None]) -> None:
        """``row`` has the columns of metrics.csv; what was not measured is None or not there."""
        known = {name: value for name, value in row.items() if value is not None}
        del known["step"]
        tokens = int(known.pop("tokens"))
        self._at = At(tokens, tokens * self._flops, known.pop("seconds"))
        values = {_tag(name): value for name, value in known.items()}
        if "val/loss" in values and self._floor is not None:
            values["val/irreducible_loss_exact"] = self._floor
        for logger in self.open:
            logger.log_line(values, self._at)

    def log_text(self, text: str) -> None:
        """A sample of the model as it was at the last line; a second one there is the same."""
        if self._at.tokens == self._sampled:
            return
        self._sampled = self._at.tokens
        for logger in self.open:
            logger.log_text(text, self._at.tokens)

    def log_results(self, results: Mapping[str, Any]) -> None:
        outcome = {name: results[name] for name in OUTCOME if results[name] is not None}
        for logger in self.open:
            logger.log_outcome(outcome, results["status"], self._at)

    def close(self, status: str) -> None:
        for logger in self.open:
            logger.close(status)
        self.open = []

    def __enter__(self) -> Loggers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        interrupted = isinstance(error, SystemExit)
        self.close("success" if error is None else "KILLED" if interrupted else "failed")


def check_loggers(config: Config) -> None:
    """Raises ConfigError where a logger's library is missing, or its server."""
    if config.logger.mlflow is not None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read at its first import
    for name, libraries in LIBRARIES.items():
        if getattr(config.logger, name) is not None:
            try:
                for library in libraries:
                    importlib.import_module(library)
            except ImportError as error:
                raise ConfigError(f"logger={name}: needs {install(name)}") from error
    if config.logger.mlflow is not None:
        check_server(config)


def _tag(name: str) -> str:
    """A column of metrics.csv in groups: ``val_loss`` → ``val/loss``."""
    split, _, rest = name.partition("_")
    return f"{split}/{rest}" if split in ("train", "val") else f"train/{name}"


def _flat(config: Config) -> dict[str, Any]:
    """Every key of the configuration by its dotted name."""
    return {name: functools.reduce(getattr, name.split("."), config) for name in key_names(config)}
