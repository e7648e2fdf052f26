"""Weights & Biases, MLflow: a run of ours is one run there, however often it was interrupted."""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import filelock
from lightning.pytorch.loggers import MLFlowLogger

from tinygpt import fileio, rundir
from tinygpt.config import Config, ConfigError, first_line
from tinygpt.data.network import reachable

log = logging.getLogger("tinygpt")

EVERY_LINE = "tokens"  # a metric that is in every line of metrics


class At(NamedTuple):
    """How far a run is, by all that can be an x axis."""

    tokens: int
    flops: float
    seconds: float  # of training


class WandbRun:
    """Offline, a run is one folder in ``wandb/``, made anew as all is told again; online it goes on
    behind its last step."""

    def __init__(self, config: Config, run: rundir.RunDir) -> None:
        import wandb

        wanted = config.logger.wandb
        assert wanted is not None
        for old in run.path.glob("wandb/offline-run-*"):
            shutil.rmtree(old)
        try:
            self.run = wandb.init(
                project=wanted.project,
                entity=wanted.entity,
                name=config.run_name,
                id=fileio.digest([config.study, config.run_name])[:16],
                group=config.study,
                dir=run.path,
                mode="offline" if wanted.offline else "online",
                resume="allow",
                reinit="create_new",  # several train in this process, some of them at once
                settings=wandb.Settings(console="off", silent=wanted.offline),
            )
        except wandb.Error as error:
            raise ConfigError(f"logger.wandb: {first_line(error)}") from error
        for name in At._fields:
            self.run.define_metric(name)
        self.run.define_metric("*", step_metric="tokens")
        self.texts: list[tuple[int, str]] = []
        self.first = self.run.step  # online what is below is there already

    def begin(self, params: Mapping[str, Any]) -> None:
        self.run.config.update(dict(params), allow_val_change=True)

    def log_line(self, values: Mapping[str, float], at: At) -> None:
        if at.tokens >= self.first:
            self.run.log({**values, **at._asdict()}, step=at.tokens)

    def log_text(self, text: str, tokens: int) -> None:
        import wandb

        self.texts.append((tokens, text))
        if tokens >= self.first:
            table = wandb.Table(columns=["tokens", "text"], data=self.texts)
            self.run.log({"samples": table}, step=tokens)

    def log_outcome(self, outcome: Mapping[str, float], status: str, at: At) -> None:
        self.run.summary.update({**outcome, "status": status})

    def close(self, status: str) -> None:
        self.run.finish(exit_code=0 if status == "success" else 1)


class Place(NamedTuple):
    """Where a run is logged to."""

    uri: str
    experiment: str
    artifacts: str | None  # None: the server decides


def place(config: Config) -> Place:
    """From the configuration; what it leaves open lies in ``output_dir``."""
    wanted = config.logger.mlflow
    assert wanted is not None
    outputs = Path(config.output_dir).absolute()
    uri = wanted.tracking_uri or f"sqlite:///{(outputs / 'mlflow.db').as_posix()}"
    artifacts = None if uri.startswith("http") else (outputs / "mlflow-artifacts").as_uri()
    return Place(uri, wanted.experiment or config.study or "runs", artifacts)


def check_server(config: Config) -> None:
    """Raises ConfigError where a tracking server does not answer; MLflow would try for minutes."""
    uri = place(config).uri
    if uri.startswith("http") and not reachable(uri):
        raise ConfigError(f"logger.mlflow.tracking_uri={uri}: nothing answers there")


class MlflowRun:
    """Logs every step once: what a resumed run repeats is there already, and the same.

    MLflow keeps all that it is given, and takes nothing back.  Where it fails half way the
    training goes on without it.
    """

    def __init__(self, logger: MLFlowLogger, is_new: bool, logged_until: int) -> None:
        self.logger, self.is_new, self.logged_until = logger, is_new, logged_until
        self.lost = False

    def begin(self, params: Mapping[str, Any]) -> None:
        if self.is_new:
            self._try(self.logger.log_hyperparams, dict(params))

    def log_line(self, values: Mapping[str, float], at: At) -> None:
        if at.tokens > self.logged_until:
            self._try(self.logger.log_metrics, {**values, **at._asdict()}, at.tokens)

    def log_text(self, text: str, tokens: int) -> None:
        client, run_id = self.logger.experiment, self.logger.run_id
        self._try(client.log_text, run_id, text, f"samples/{tokens}.txt")

    def log_outcome(self, outcome: Mapping[str, float], status: str, at: At) -> None:
        self._try(self.logger.log_metrics, outcome, at.tokens)
        self._try(self.logger.experiment.set_tag, self.logger.run_id, "status", status)

    def close(self, status: str) -> None:
        self._try(self.logger.finalize, status)

    def _try(self, call: Callable[..., object], *arguments: Any) -> None:
        """Not after it has failed once: with a server that is gone each try takes minutes."""
        from mlflow.exceptions import MlflowException

        if self.lost:
            return
        try:
            call(*arguments)
        except MlflowException as error:
            self.lost = True
            log.warning(
                "MLflow fails: %s; from here on only metrics.csv is kept", first_line(error)
            )


def open_mlflow(config: Config, run: rundir.RunDir) -> MlflowRun:
    """Begins a run in MLflow, or goes on with the one that this folder was logged to.

    Raises ConfigError where MLflow's store cannot be had.
    """
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    logging.getLogger("mlflow").setLevel(logging.ERROR)  # it tells of every table that it makes
    where = place(config)
    try:
        with _alone(config, where):
            return _opened(config, run, where)
    except (MlflowException, SQLAlchemyError, OSError) as error:
        raise ConfigError(f"logger.mlflow.tracking_uri={where.uri}: {first_line(error)}") from error


@contextlib.contextmanager
def _alone(config: Config, where: Place) -> Iterator[None]:
    """Jobs of a sweep that begin at once must not all make the database and the experiment."""
    if where.uri.startswith("http"):
        yield
        return
    with filelock.FileLock(Path(config.output_dir) / ".mlflow.lock"):
        yield


def _opened(config: Config, run: rundir.RunDir, where: Place) -> MlflowRun:
    run_id = _known_run(run, where)
    logger = MLFlowLogger(
        where.experiment,
        run_name=config.run_name,
        tracking_uri=where.uri,
        artifact_location=where.artifacts,
        run_id=run_id,
    )
    assert logger.run_id is not None  # makes the experiment and the run
    if run_id is None:
        fileio.write_json(run.mlflow, {"tracking_uri": where.uri, "run_id": logger.run_id})
        return MlflowRun(logger, is_new=True, logged_until=-1)
    logger.experiment.update_run(run_id, status="RUNNING")
    logged = logger.experiment.get_metric_history(run_id, EVERY_LINE)
    logged_until = max((metric.step for metric in logged), default=-1)
    return MlflowRun(logger, is_new=False, logged_until=logged_until)


def _known_run(run: rundir.RunDir, where: Place) -> str | None:
    """The id of the MLflow run of this folder, if it is still in that store."""
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    if not run.mlflow.exists():
        return None
    before = fileio.read_json(run.mlflow, tracking_uri=str, run_id=str)
    if before["tracking_uri"] != where.uri:
        return None
    run_id = str(before["run_id"])
    with contextlib.suppress(MlflowException):  # it was removed there
        if MlflowClient(where.uri).get_run(run_id).info.lifecycle_stage == "active":
            return run_id
    return None
