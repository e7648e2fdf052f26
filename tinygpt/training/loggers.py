"""Log runs to TensorBoard, Weights & Biases and MLflow.

Each logger gets the configuration, every line of metrics, every sample and the outcome, against
training tokens.  When a run begins or resumes, its whole history is logged again, so that a run
that was interrupted, or branched off another, is one curve from its first step, without repeats.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
import shutil
import textwrap
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import filelock
from lightning.pytorch.loggers import MLFlowLogger
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import api_pb2, metadata
from tensorboard.plugins.hparams.plugin_data_pb2 import (
    HParamsPluginData,
    SessionEndInfo,
    SessionStartInfo,
)
from torch.utils.tensorboard import SummaryWriter

from tinygpt import fileio
from tinygpt.config import Config, ConfigError, first_line, install
from tinygpt.config.checks import key_names
from tinygpt.data.network import reachable
from tinygpt.runs import rundir
from tinygpt.training.hardware import quiet_lightning

log = logging.getLogger("tinygpt")

# mlflow is last: imported before the others, it would not find them later
LIBRARIES = {"wandb": ["wandb"], "mlflow": ["alembic", "sqlalchemy", "mlflow"]}
# The results that compare runs, with their names in TensorBoard, whose HParams page shows the first
# five in alphabetical order.
OUTCOME = {
    "final_val_loss": "loss",
    "best_val_loss": "loss_best",
    "final_val_bits_per_byte": "loss_bits_per_byte",
    "test_loss": "loss_test",
    "final_val_accuracy": "token_accuracy",
    "tokens_per_second": "tokens_per_second",
}
# TensorBoard sorts curves digits first, so that the numbered groups precede the results, but the
# HParams page sorts plain text, in which "(" comes before digits.
LOSSES, BY_COMPUTE, FINAL = "1 loss", "2 loss by MFLOPs", "(final)"
GROUPS = {"train": "3 train", "val": "4 val"}
WIDTH = 120  # characters per line of a sample: TensorBoard does not wrap them


class Progress(NamedTuple):
    """Hold how far a run is, in each unit that can be an x axis."""

    tokens: int
    flops: float
    seconds: float  # of training


class RunLogger(Protocol):
    """Log one run; the ``status`` of ``close`` is success, failed or KILLED."""

    def log_line(self, values: Mapping[str, float], at: Progress) -> None: ...

    def log_text(self, text: str, tokens: int) -> None: ...

    def log_outcome(self, outcome: Mapping[str, float], status: str, at: Progress) -> None: ...

    def close(self, status: str) -> None: ...


class Loggers:
    """Log a run to the loggers that ``begin`` opens."""

    def __init__(self) -> None:
        self.open: list[RunLogger] = []
        self._at = Progress(0, 0.0, 0.0)
        self._flops_per_token = 0.0
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
        """Open the loggers of ``config.logger`` and log the history of the run.

        ``sizes`` are the sizes in results.json, ``floor`` is the exact loss of the source if known,
        ``texts`` are the samples so far by tokens.  Raises ConfigError if a logger cannot open.
        """
        self._flops_per_token = sizes["flops_exact"] / sizes["train_tokens"]
        self._floor = floor
        rows = [
            {name: float(value) for name, value in row.items() if value}
            for row in rundir.MetricsFile(run.metrics).read()
        ]
        params = {**flat(config), **{name: sizes[name] for name in rundir.SIZES}}
        if config.logger.tensorboard is not None:
            began = time.time() - (rows[-1]["seconds"] if rows else 0.0)
            flush_seconds = config.logger.tensorboard.flush_seconds
            self.open.append(Board(run.events, params, flush_seconds, began))
        if config.logger.wandb is not None:
            self.open.append(WandbRun(config, run, params))
        if config.logger.mlflow is not None:
            with quiet_lightning():
                self.open.append(MlflowRun(config, run, params))
        for row in rows:
            self.log_line(row)
            if self._at.tokens in texts:
                self.log_text(texts[self._at.tokens])

    def log_line(self, row: Mapping[str, float | None]) -> None:
        """Log a row of metrics.csv, in which None was not measured."""
        known = {name: value for name, value in row.items() if value is not None}
        del known["step"]
        tokens = int(known.pop("tokens"))
        self._at = Progress(tokens, tokens * self._flops_per_token, known.pop("seconds"))
        values = {_tag(name): value for name, value in known.items()}
        if "val/loss" in values and self._floor is not None:
            values["val/irreducible_loss_exact"] = self._floor
        for logger in self.open:
            logger.log_line(values, self._at)

    def log_text(self, text: str) -> None:
        """Log the sample that belongs to the last line, once."""
        if self._at.tokens == self._sampled:
            return
        self._sampled = self._at.tokens
        for logger in self.open:
            logger.log_text(text, self._at.tokens)

    def log_results(self, results: Mapping[str, Any]) -> None:
        outcome = {name: results[name] for name in OUTCOME if results[name] is not None}
        for logger in self.open:
            logger.log_outcome(outcome, results["status"], self._at)

    def __enter__(self) -> Loggers:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        failed = "KILLED" if isinstance(error, SystemExit) else "failed"
        for logger in self.open:
            logger.close("success" if error is None else failed)
        self.open = []


def check_loggers(config: Config) -> None:
    """Raise ConfigError where a logger's library or MLflow's server is missing."""
    uri = ""
    if config.logger.mlflow is not None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read at its first import
        uri = mlflow_uri(config)
    for name, libraries in LIBRARIES.items():
        if getattr(config.logger, name) is not None:
            try:
                for library in libraries:
                    importlib.import_module(library)
            except ImportError as error:
                raise ConfigError(f"logger={name}: needs {install(name)}") from error
    if uri.startswith("http") and not reachable(uri):  # MLflow would try for minutes
        raise ConfigError(f"logger.mlflow.tracking_uri={uri}: nothing answers there")


def _tag(name: str) -> str:
    """Return the tag of a column of metrics.csv: ``val_loss`` → ``val/loss``."""
    split, _, rest = name.partition("_")
    return f"{split}/{rest}" if split in ("train", "val") else f"train/{name}"


def flat(config: Config) -> dict[str, Any]:
    """Return every key of the configuration by its dotted name."""
    return {name: functools.reduce(getattr, name.split("."), config) for name in key_names(config)}


class Board:
    """Write a run to TensorBoard: curves, samples and a row of the HParams page.

    A new event file purges the earlier ones.  The step of a point is in training tokens; its time
    leaves out interruptions and evaluations, so *Relative* is training time.  A second group plots
    the losses against MFLOPs, as steps must be whole numbers below 2^63.
    """

    def __init__(
        self, folder: Path, params: Mapping[str, Any], flush_seconds: int, began: float
    ) -> None:
        self.began = began
        # TensorBoard sorts files by name: by whole seconds, then by process
        if any(folder.glob(f"events.*.{int(time.time())}.*")):
            time.sleep(1 - time.time() % 1)
        self.writer = SummaryWriter(str(folder), purge_step=0, flush_secs=flush_seconds)
        self.writer.add_custom_scalars({"loss": {"all losses": ["Multiline", [f"{LOSSES}/"]]}})
        # SummaryWriter.add_hparams would open another folder and end the session at once
        start = SessionStartInfo(start_time_secs=began)
        for name, value in params.items():
            if value is None or name.split(".")[0] in rundir.NOT_SCIENCE:
                continue
            if name in rundir.SIZES:  # after every key in the alphabet
                name = f"trained.{name}"
            if isinstance(value, bool):
                start.hparams[name].bool_value = value
            elif isinstance(value, int | float):
                start.hparams[name].number_value = value
            else:
                start.hparams[name].string_value = str(value)
        self._add(metadata.SESSION_START_INFO_TAG, HParamsPluginData(session_start_info=start))

    def log_line(self, values: Mapping[str, float], at: Progress) -> None:
        when = self.began + at.seconds
        for tag, value in values.items():
            split, _, name = tag.partition("/")
            group = f"{GROUPS[split]}/{name}"
            if name == "loss":
                group, mflops = f"{LOSSES}/{split}", round(at.flops / 1e6)
                self.writer.add_scalar(f"{BY_COMPUTE}/{split}", value, mflops, when)
            elif name == "irreducible_loss_exact":
                group = f"{LOSSES}/{split}_irreducible_exact"
            self.writer.add_scalar(group, value, at.tokens, when)

    def log_text(self, text: str, tokens: int) -> None:
        lines = (textwrap.fill(line, WIDTH) for line in text.splitlines())
        # indented, so that Markdown in it is shown as it is
        self.writer.add_text("samples", textwrap.indent("\n".join(lines), " " * 4), tokens)

    def log_outcome(self, outcome: Mapping[str, float], status: str, at: Progress) -> None:
        for name, value in outcome.items():
            tag = f"{FINAL}/{OUTCOME[name]}"
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


class WandbRun:
    """Log a run to Weights & Biases.

    An offline run is one folder in ``wandb/``, made anew each time; an online run resumes after its
    last step.
    """

    def __init__(self, config: Config, run: rundir.RunDir, params: Mapping[str, Any]) -> None:
        import wandb

        settings = config.logger.wandb
        assert settings is not None
        for old in run.path.glob("wandb/offline-run-*"):
            shutil.rmtree(old)
        try:
            self.run = wandb.init(
                project=settings.project,
                entity=settings.entity,
                name=config.run_name,
                id=fileio.digest([config.study, config.run_name])[:16],
                group=config.study,
                dir=run.path,
                mode="offline" if settings.offline else "online",
                resume="allow",
                reinit="create_new",  # several train in this process, some of them at once
                settings=wandb.Settings(console="off", silent=settings.offline),
            )
        except wandb.Error as error:
            raise ConfigError(f"logger.wandb: {first_line(error)}") from error
        for name in Progress._fields:
            self.run.define_metric(name)
        self.run.define_metric("*", step_metric="tokens")
        self.run.config.update(dict(params), allow_val_change=True)
        self.texts: list[tuple[int, str]] = []
        self.first = self.run.step  # earlier ones are online already

    def log_line(self, values: Mapping[str, float], at: Progress) -> None:
        if at.tokens >= self.first:
            self.run.log({**values, **at._asdict()}, step=at.tokens)

    def log_text(self, text: str, tokens: int) -> None:
        import wandb

        self.texts.append((tokens, text))
        if tokens >= self.first:
            table = wandb.Table(columns=["tokens", "text"], data=self.texts)
            self.run.log({"samples": table}, step=tokens)

    def log_outcome(self, outcome: Mapping[str, float], status: str, at: Progress) -> None:
        self.run.summary.update({**outcome, "status": status})

    def close(self, status: str) -> None:
        self.run.finish(exit_code=0 if status == "success" else 1)


def mlflow_uri(config: Config) -> str:
    """Return MLflow's tracking URI, by default that of a database in ``output_dir``."""
    assert config.logger.mlflow is not None
    database = (Path(config.output_dir).absolute() / "mlflow.db").as_posix()
    return config.logger.mlflow.tracking_uri or f"sqlite:///{database}"


class MlflowRun:
    """Log a run to MLflow, to the same MLflow run as before if it still exists.

    MLflow keeps everything it is given, so each step is logged only once.  If it fails half way,
    the training continues without it.  Raises ConfigError if its store cannot be opened.
    """

    def __init__(self, config: Config, run: rundir.RunDir, params: Mapping[str, Any]) -> None:
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError

        logging.getLogger("mlflow").setLevel(logging.ERROR)  # it reports every table it makes
        self.lost, uri = False, mlflow_uri(config)
        is_local = not uri.startswith("http")
        # the jobs of a sweep must not make the database and the experiment at the same time
        lock = filelock.FileLock(Path(config.output_dir) / ".mlflow.lock")
        try:
            with lock if is_local else contextlib.nullcontext():
                self._open(config, run, uri, is_local)
        except (MlflowException, SQLAlchemyError, OSError) as error:
            raise ConfigError(f"logger.mlflow.tracking_uri={uri}: {first_line(error)}") from error
        if self.logged_until < 0:
            self._try(self.logger.log_hyperparams, dict(params))

    def _open(self, config: Config, run: rundir.RunDir, uri: str, is_local: bool) -> None:
        assert config.logger.mlflow is not None
        run_id = _known_run(run, uri)
        artifacts = (Path(config.output_dir).absolute() / "mlflow-artifacts").as_uri()
        self.logger = MLFlowLogger(
            config.logger.mlflow.experiment or config.study or "runs",
            run_name=config.run_name,
            tracking_uri=uri,
            artifact_location=artifacts if is_local else None,  # None: the server decides
            run_id=run_id,
        )
        assert self.logger.run_id is not None  # makes the experiment and the run
        self.logged_until = -1
        if run_id is None:
            fileio.write_json(run.mlflow, {"tracking_uri": uri, "run_id": self.logger.run_id})
            return
        self.logger.experiment.update_run(run_id, status="RUNNING")
        logged = self.logger.experiment.get_metric_history(run_id, "tokens")
        self.logged_until = max((metric.step for metric in logged), default=-1)

    def log_line(self, values: Mapping[str, float], at: Progress) -> None:
        if at.tokens > self.logged_until:
            self._try(self.logger.log_metrics, {**values, **at._asdict()}, at.tokens)

    def log_text(self, text: str, tokens: int) -> None:
        client, run_id = self.logger.experiment, self.logger.run_id
        self._try(client.log_text, run_id, text, f"samples/{tokens}.txt")

    def log_outcome(self, outcome: Mapping[str, float], status: str, at: Progress) -> None:
        self._try(self.logger.log_metrics, outcome, at.tokens)
        self._try(self.logger.experiment.set_tag, self.logger.run_id, "status", status)

    def close(self, status: str) -> None:
        self._try(self.logger.finalize, status)

    def _try(self, call: Callable[..., object], *arguments: Any) -> None:
        """Call MLflow unless it has failed before: each try of a lost server takes minutes."""
        from mlflow.exceptions import MlflowException

        if self.lost:
            return
        try:
            call(*arguments)
        except MlflowException as error:
            self.lost, line = True, "MLflow fails: %s; from here on only metrics.csv is kept"
            log.warning(line, first_line(error))


def _known_run(run: rundir.RunDir, uri: str) -> str | None:
    """Return the id of this folder's MLflow run if it is still in the store."""
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    if not run.mlflow.exists():
        return None
    before = fileio.read_json(run.mlflow, tracking_uri=str, run_id=str)
    if before["tracking_uri"] == uri:
        with contextlib.suppress(MlflowException):  # it was removed there
            if MlflowClient(uri).get_run(before["run_id"]).info.lifecycle_stage == "active":
                return str(before["run_id"])
    return None
