"""A run's folder and a cache's: files that another process wrote, or none did."""

from __future__ import annotations

import contextlib
import functools
import shutil
from pathlib import Path
from unittest import mock

import torch

from tests.fuzz.harness import SEEDS, Harness, scratch
from tinygpt.config import ConfigError, checks
from tinygpt.data import shards
from tinygpt.runs import load as trained
from tinygpt.runs import rundir
from tinygpt.runs.load import load_run
from tinygpt.scaling.runs import comparable, load_curves, load_runs, read_rows

RUN = SEEDS.parent / "run"  # a finished run of a minute model
CACHE = SEEDS.parent / "shards"  # its tokens


@functools.cache
def copied(name: str, *without: str) -> rundir.RunDir:
    """Of the run, alone in a study, for one harness to change a file of."""
    ignore = shutil.ignore_patterns(*without)
    return rundir.RunDir(shutil.copytree(RUN, scratch() / name / "study" / "run", ignore=ignore))


def config(data: bytes) -> None:
    """To be used, as ``sample`` does."""
    run = copied("config")
    run.config.write_bytes(data)
    checks.check(rundir.read_config(run.config))


def yaml(data: bytes) -> None:
    """To be told of, as a table of runs does."""
    run = copied("yaml")
    run.config.write_bytes(data)
    read_rows(run.path.parent)


def results(data: bytes) -> None:
    run = copied("results", "config.yaml")
    run.results.write_bytes(data)
    with contextlib.suppress(ConfigError):
        run.finished("0" * 64)
    read_rows(run.path.parent)


def table(data: bytes) -> None:
    """Results, up to the rows that a law goes through."""
    run = copied("table", "config.yaml")
    run.results.write_bytes(data)
    load_curves(run.path.parent)
    comparable(load_runs(run.path.parent, RUN), "final_val_loss")


def environment(data: bytes) -> None:
    run = copied("environment", "config.yaml", "results.json")
    run.environment.write_bytes(data)
    with contextlib.suppress(ConfigError):
        run.finished("0" * 64)
    read_rows(run.path.parent)


def error(data: bytes) -> None:
    run = copied("error", "config.yaml", "results.json")
    run.error.write_bytes(data)
    read_rows(run.path.parent)


def metrics(data: bytes) -> None:
    run = copied("metrics")
    run.metrics.write_bytes(data)
    file = rundir.MetricsFile(run.metrics)
    file.keep_until(8)
    assert all(int(row["step"]) <= 8 for row in file.read())


def metrics_of_runs(data: bytes) -> None:
    run = copied("curves", "config.yaml")
    run.metrics.write_bytes(data)
    load_curves(run.path.parent)


def checkpoint(data: bytes) -> None:
    run = copied("checkpoint")
    (run.checkpoints / "final.ckpt").write_bytes(data)
    with mock.patch.object(rundir, "read_config", read_once):
        load_run(run.path)


def loaded(data: bytes) -> None:
    """The results of a run that is used."""
    run = copied("loaded")
    run.results.write_bytes(data)
    with (
        mock.patch.object(rundir, "read_config", read_once),
        mock.patch.object(trained, "read_checkpoint", return_value=weights()),
    ):
        load_run(run.path)


@functools.cache
def weights() -> tuple[dict[str, torch.Tensor], int]:
    run = rundir.RunDir(RUN)
    return trained.read_checkpoint(run.chosen("final"), read_once(run.config))


read_once = functools.cache(rundir.read_config)  # it takes 80 ms and is another harness's


@functools.cache
def cache(name: str) -> Path:
    return shutil.copytree(CACHE, scratch() / name)


def used(folder: Path) -> None:
    """Damage is found, or does none."""
    index = shards.load_index(folder)
    if index is None:
        return
    for name in index["splits"]:
        split = shards.Split(folder, name, index)
        windows = split.eval_windows(8, whole_documents=False)
        tokens = split.gather(split.train_windows(8, 8, 0.5).starts, 9)
        assert tokens.max() < 2**16
        assert windows.lengths.sum() == split.info["tokens"]


def index(data: bytes) -> None:
    folder = cache("index")
    (folder / "index.json").write_bytes(data)
    used(folder)


def shard(data: bytes) -> None:
    folder = cache("shard")
    (folder / "val_00000.bin").write_bytes(data)
    used(folder)


def offsets(data: bytes) -> None:
    folder = cache("offsets")
    (folder / "val.offsets.npy").write_bytes(data)
    used(folder)


HARNESSES = [
    Harness("run_config", "yaml", config),
    Harness("run_yaml", "yaml", yaml, seeds_of="run_config"),
    Harness("run_results", "json", results),
    Harness("run_table", "json", table, seeds_of="run_results"),
    Harness("run_loaded", "json", loaded, seeds_of="run_results"),
    Harness("run_environment", "json", environment),
    Harness("run_error", "json", error),
    Harness("run_metrics", "csv", metrics),
    Harness("run_curves", "csv", metrics_of_runs, seeds_of="run_metrics"),
    Harness("run_checkpoint", "zip", checkpoint),
    Harness("shards_index", "json", index),
    Harness("shards_bin", "bytes", shard),
    Harness("shards_offsets", "bytes", offsets),
]
