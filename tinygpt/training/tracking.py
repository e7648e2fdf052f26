"""MLflow: a run of ours is one run there, however often it was interrupted."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import filelock
from lightning.pytorch.loggers import MLFlowLogger

from tinygpt import rundir
from tinygpt.checks import key_names
from tinygpt.config import Config, ConfigError
from tinygpt.data.network import reachable

log = logging.getLogger("tinygpt")

EVERY_LINE = "train/seconds"  # a metric that is in every line of metrics


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


class OnceLogger(MLFlowLogger):
    """Logs every step once: what a resumed run repeats is there already, and the same.

    MLflow keeps all that it is given, and takes nothing back.  Where it fails half way the
    training goes on without it.
    """

    logged_until = -1
    lost = False

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if not self.lost and (step is None or step > self.logged_until):
            with self._failing_once():
                super().log_metrics(metrics, step)

    def finalize(self, status: str = "success") -> None:
        if not self.lost:
            with self._failing_once():
                super().finalize(status)

    @contextlib.contextmanager
    def _failing_once(self) -> Iterator[None]:
        """A second try is not made: with a server that is gone each takes minutes."""
        from mlflow.exceptions import MlflowException

        try:
            yield
        except MlflowException as error:
            self.lost = True
            log.warning("MLflow fails: %s; from here on only metrics.csv is kept", _line(error))


def open_mlflow(config: Config, run: rundir.RunDir) -> OnceLogger:
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
        raise ConfigError(f"logger.mlflow.tracking_uri={where.uri}: {_line(error)}") from error


def _line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


@contextlib.contextmanager
def _alone(config: Config, where: Place) -> Iterator[None]:
    """Jobs of a sweep that begin at once must not all make the database and the experiment."""
    if where.uri.startswith("http"):
        yield
        return
    with filelock.FileLock(Path(config.output_dir) / ".mlflow.lock"):
        yield


def _opened(config: Config, run: rundir.RunDir, where: Place) -> OnceLogger:
    run_id = _known_run(run, where)
    logger = OnceLogger(
        where.experiment,
        run_name=config.run_name,
        tracking_uri=where.uri,
        artifact_location=where.artifacts,
        run_id=run_id,
    )
    assert logger.run_id is not None  # makes the experiment and the run
    if run_id is None:
        rundir.write_json(run.mlflow, {"tracking_uri": where.uri, "run_id": logger.run_id})
        logger.log_hyperparams(_flat(config))
    else:
        logger.experiment.update_run(run_id, status="RUNNING")
        logged = logger.experiment.get_metric_history(run_id, EVERY_LINE)
        logger.logged_until = max((metric.step for metric in logged), default=-1)
    return logger


def _known_run(run: rundir.RunDir, where: Place) -> str | None:
    """The id of the MLflow run of this folder, if it is still in that store."""
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    if not run.mlflow.exists():
        return None
    before = rundir.read_json(run.mlflow)
    if before["tracking_uri"] != where.uri:
        return None
    run_id = str(before["run_id"])
    with contextlib.suppress(MlflowException):  # it was removed there
        if MlflowClient(where.uri).get_run(run_id).info.lifecycle_stage == "active":
            return run_id
    return None


def _flat(config: Config) -> dict[str, Any]:
    """Every key of the configuration by its dotted name."""
    return {name: functools.reduce(getattr, name.split("."), config) for name in key_names(config)}
