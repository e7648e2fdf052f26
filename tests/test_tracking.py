"""Log to MLflow: one run for each of ours, each step once, no files outside the output folder."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from tests.conftest import tiny
from tests.test_training import Trained
from tinygpt import cli
from tinygpt.config import Config, ConfigError
from tinygpt.config.checks import key_names
from tinygpt.runs import rundir
from tinygpt.training.callbacks import Checkpoints
from tinygpt.training.loggers import OUTCOME, check_loggers, mlflow_uri

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MLflow's own
WORDS = (
    "logger=[tensorboard,mlflow]",
    "study=s",
    "train.steps=20",
    "train.log_every=3",
    "train.eval_every=1280",  # 5 steps
    "train.checkpoint_every=1024",  # 4 steps
)


def config_of(*words: str) -> Config:
    return cli.compose_config(["logger=mlflow", *words])


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    return pytest.importorskip("mlflow")


class Store:
    """What MLflow's own client reads in a database."""

    def __init__(self, uri: str) -> None:
        from mlflow.tracking import MlflowClient

        self.client = MlflowClient(uri)

    def runs(self, experiment: str) -> list[Any]:
        found = self.client.get_experiment_by_name(experiment)
        assert found is not None
        return list(self.client.search_runs([found.experiment_id], order_by=["start_time"]))

    def history(self, run: Any, key: str) -> list[tuple[int, float]]:
        """(tokens, value) in the order in which they were logged."""
        return [(m.step, m.value) for m in self.client.get_metric_history(run.info.run_id, key)]


def samples(run: Path) -> dict[int, str]:
    """samples.txt: tokens → text, in the order in which they stand there."""
    parts = (run / "samples.txt").read_text(encoding="utf-8").split("--- step")[1:]
    heads = [part.partition("\n") for part in parts]
    return {
        int(head.split("(")[1].split()[0].replace(",", "")): text.removesuffix("\n\n")
        for head, _, text in heads
    }


def logged(trained: Trained, column: str) -> list[tuple[int, float]]:
    with (trained.path / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row[column]]
    return [(int(row["tokens"]), float(row[column])) for row in rows]


class Stop(Exception):
    pass


def stop_at(step: int, trained: Trained) -> None:
    """Ends a run after this step was logged, whatever was saved before."""
    save = Checkpoints.on_train_batch_end

    def saving(self: Any, trainer: Any, *args: Any) -> None:
        if trainer.global_step == step:
            raise Stop
        save(self, trainer, *args)

    with mock.patch.object(Checkpoints, "on_train_batch_end", saving), pytest.raises(Stop):
        trained.go()


def interrupt_at(step: int, trained: Trained) -> None:
    """As Ctrl-C does."""
    save = Checkpoints.on_train_batch_end

    def saving(self: Any, trainer: Any, *args: Any) -> None:
        if trainer.global_step == step:
            signal.raise_signal(signal.SIGINT)
        save(self, trainer, *args)

    with mock.patch.object(Checkpoints, "on_train_batch_end", saving), pytest.raises(SystemExit):
        trained.go()


def test_what_is_left_open_lies_in_the_output_folder(tmp_path: Path) -> None:
    assert mlflow_uri(config_of(f"output_dir={tmp_path}")) == f"sqlite:///{tmp_path}/mlflow.db"
    given = config_of("logger.mlflow.tracking_uri=http://host:5000")
    assert mlflow_uri(given) == "http://host:5000"


def test_a_server_that_is_not_there_is_told_at_once(mlflow: Any) -> None:
    check_loggers(config_of())
    with pytest.raises(ConfigError) as error:
        check_loggers(config_of("logger.mlflow.tracking_uri=http://127.0.0.1:1"))
    assert (
        str(error.value) == "logger.mlflow.tracking_uri=http://127.0.0.1:1: nothing answers there"
    )


@pytest.mark.parametrize("missing", ["mlflow", "sqlalchemy", "alembic"])
def test_without_the_library_it_is_one_line(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ConfigError) as error:
        check_loggers(config_of())
    assert (
        str(error.value)
        == "logger=mlflow: needs `pip install -e '.[mlflow]'` in the folder of tinygpt"
    )


def test_an_interrupted_run_is_one_run_there_and_every_step_is_once(
    tmp_path: Path, corpus: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, mlflow: Any
) -> None:
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    trained = Trained(tmp_path / "outputs", cache, tiny(corpus, *WORDS))
    store = Store(f"sqlite:///{tmp_path}/outputs/mlflow.db")
    for step in (3, 11):  # before there is a checkpoint, and after what step 8 saved
        stop_at(step, trained)
        (found,) = store.runs("s")
        assert found.info.status == "FAILED"
        assert max(tokens for tokens, _ in store.history(found, "tokens")) <= step * 256
    interrupt_at(14, trained)
    assert [run.info.status for run in store.runs("s")] == ["KILLED"]
    trained.go()
    (found,) = store.runs("s")
    assert (found.info.run_name, found.info.status) == ("r", "FINISHED")
    for column in ("train_loss", "val_loss", "learning_rate", "seconds"):
        split, _, rest = column.partition("_")
        key = f"{split}/{rest}" if split in ("train", "val") else f"train/{column}"
        key = "seconds" if column == "seconds" else key
        mine, theirs = logged(trained, column), store.history(found, key)
        assert [tokens for tokens, _ in theirs] == [tokens for tokens, _ in mine]
        if column != "seconds":
            assert theirs == mine
    config = cli.compose_config(trained.words)
    assert set(found.data.params) == {*key_names(config), *rundir.SIZES}
    assert found.data.params["model.d_model"] == "16"
    assert found.data.params["model_parameters"] == str(trained.results["model_parameters"])
    for name in OUTCOME:
        assert found.data.metrics[name] == trained.results[name]
    assert found.data.tags["status"] == "finished"
    per_token = trained.results["flops_exact"] / trained.results["train_tokens"]
    for tokens, flops in store.history(found, "flops"):
        assert flops == pytest.approx(tokens * per_token)
    for at, text in samples(trained.path).items():
        (artifact,) = Path(tmp_path).glob(f"outputs/mlflow-artifacts/*/artifacts/samples/{at}.txt")
        assert artifact.read_text(encoding="utf-8") == text
    assert found.data.params["train.steps"] == "20"
    assert not (tmp_path / "mlruns").exists()
    assert any(trained.path.glob("events.*"))

    trained.go("force=true")
    assert len(store.runs("s")) == 2


def test_a_store_that_lost_the_run_gets_a_new_one(
    tmp_path: Path, corpus: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, mlflow: Any
) -> None:
    """And one that fails half way does not end the training."""
    trained = Trained(
        tmp_path / "outputs", cache, tiny(corpus, *WORDS, "logger.mlflow.experiment=e")
    )
    stop_at(11, trained)
    store = Store(f"sqlite:///{tmp_path}/outputs/mlflow.db")
    (first,) = store.runs("e")
    store.client.delete_run(first.info.run_id)
    log_batch = mlflow.tracking.MlflowClient.log_batch

    def failing(self: Any, run_id: str, metrics: Any = (), **more: Any) -> None:
        if any(metric.step > 15 * 256 for metric in metrics):
            raise mlflow.exceptions.MlflowException("the disk is full\nand more")
        log_batch(self, run_id, metrics, **more)

    monkeypatch.setattr(mlflow.tracking.MlflowClient, "log_batch", failing)
    trained.go()
    assert trained.results["status"] == "finished"
    assert trained.said.count("MLflow fails: the disk is full; from here on only") == 1
    (second,) = store.runs("e")
    assert second.info.run_id != first.info.run_id
    steps = [tokens // 256 for tokens, _ in store.history(second, "train/loss")]
    assert steps == [3, 5, 6, 9, 10, 12, 15]  # all that it has behind it, too


def test_a_store_that_cannot_be_had_is_one_line(
    tmp_path: Path, corpus: Path, cache: Path, mlflow: Any
) -> None:
    uri = f"sqlite:///{tmp_path}/nowhere/x.db"
    (tmp_path / "nowhere").write_text("a file, and no folder")
    words = tiny(corpus, *WORDS, f"logger.mlflow.tracking_uri={uri}")
    with pytest.raises(ConfigError) as error:
        Trained(tmp_path / "outputs", cache, words).go()
    assert str(error.value).startswith(f"logger.mlflow.tracking_uri={uri}: ")
    assert "\n" not in str(error.value)


# The command, but whoever asks for the network is told on.
WATCHED = """
import socket, sys
from tinygpt import run

def refuse(*args, **more):
    print("NETWORK", args, file=sys.stderr)
    raise OSError("no network")

socket.socket.connect = socket.getaddrinfo = refuse
run.main()
"""


@pytest.mark.slow
def test_the_command_says_nothing_of_mlflow_and_asks_nobody(
    tmp_path: Path, corpus: Path, cache: Path, mlflow: Any
) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW", "DO_NOT"))}
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, *tiny(corpus, *WORDS, "run_name=r")],
        cwd=tmp_path,
        env={**environment, "TINYGPT_CACHE": str(cache)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "mlflow" not in done.stdout.lower()
    assert [path.name for path in tmp_path.iterdir()] == ["outputs"]
    names = {path.name for path in (tmp_path / "outputs").iterdir()}
    assert names == {"s", "mlflow.db", ".mlflow.lock", "mlflow-artifacts"}
