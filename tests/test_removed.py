"""What earlier versions had: keys are answered in a line, run folders are still of use."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.conftest import Command, tiny
from tests.test_training import Trained
from tinygpt import cli, fileio, load_run
from tinygpt.config import ConfigError
from tinygpt.runs import rundir
from tinygpt.scaling import load_runs
from tinygpt.sweeping.jobs import compose_jobs, expand
from tinygpt.sweeping.kinds import TRAINING

# config_hash at the last commit that had these keys.
HASHES = {
    "model=small": "d90ba1f02c9ee07c78754ed4248a2c037965667f41c8aaf84908d19b4cddd521",
    "model=tiny optim.learning_rate=0.003 seed=7": (
        "5175b55fc286bc4703528b36e35b39b8a257f0c43e8929c152213070a92498be"
    ),
    "data.fraction=0.5 train.tokens=1000000": (
        "f890f3bbdb474829dc030fe40decce47954ceba6b961cdd81ba04f2c599cfc04"
    ),
    "optim=muon schedule=wsd": "86e4e108a04385561f90e0f106589fb67d089324032e702bd75f344641c22e64",
    "model=tiny hardware=cpu train.precision=32 model.position=rope": (
        "aec12074392cb8a7fa95cb5f766894008f8ad24b589cf72c605e7e35f6b3cd25"
    ),
}
LINES = [
    ("sweep.stack=auto", "runs go side by side with launcher=local"),
    ("hardware.strategy=fsdp", "hardware.strategy=ddp"),
    ("hardware.matmul=torch", "TINYGPT_MATMUL=torch"),
    ("+hardware.allocator=keep", "freed memory is always kept"),
    ("hardware.compile=regional", "hardware.compile=on"),
]


@pytest.mark.parametrize("words", HASHES)
def test_a_run_keeps_its_hash(words: str) -> None:
    config = cli.compose_config(words.split())
    assert rundir.config_hash(config, {"data": "x"}) == HASHES[words]


@pytest.mark.parametrize(("word", "instead"), LINES)
def test_a_removed_key_is_answered_in_a_line(word: str, instead: str) -> None:
    line = f"{word.lstrip('+')}: removed; {instead}"
    for compose in (
        lambda: cli.compose_config([word]),
        lambda: compose_jobs(expand({}, [word, "seed=1,2"]), TRAINING),
        lambda: compose_jobs(
            expand({word.split("=")[0]: [word.split("=")[1]]}, ["seed=1,2"]), TRAINING
        ),
    ):
        with pytest.raises(ConfigError) as error:
            compose()
        assert str(error.value).startswith(line)


def make_old(trained: Trained, stack: str = "off", **begun: object) -> None:
    """Put what an earlier version wrote into the files of a run."""
    path = trained.path / "config.yaml"
    config = yaml.safe_load(path.read_text())
    config["hardware"] |= {"matmul": "auto", "allocator": "keep"}
    config["sweep"]["stack"] = stack
    path.write_text(yaml.safe_dump(config))
    for name, more in (("environment.json", begun), ("results.json", {})):
        path = trained.path / name
        if path.exists():
            fileio.write_json(path, {**fileio.read_json(path), "stacked": None, **more})


def test_an_old_folder_is_still_of_use(
    tinygpt: Command, tmp_path: Path, corpus: Path, cache: Path
) -> None:
    """It is read, sampled, evaluated, exported and summed up, and trained on to the same end."""
    trained = Trained(tmp_path, cache, tiny(corpus, "train.checkpoint_every=1024")).go()
    make_old(trained, compile="off")
    first, folder = trained.results, str(trained.path)
    assert load_run(folder).generate("a", 5)
    for command, *words in (
        ("sample", f"run={folder}", "max_new_tokens=5"),
        ("evaluate", f"runs={folder}", f"output_dir={tmp_path / 'scores'}"),
        ("export", f"run={folder}", f"to={tmp_path / 'exported'}"),
    ):
        done = tinygpt(command, *words)
        assert done.returncode == 0, done.stderr
    trained.go()
    assert trained.said.startswith("already finished")
    (trained.path / "results.json").unlink()
    trained.go()
    assert "resuming" in trained.said
    assert trained.results["final_val_loss"] == first["final_val_loss"]
    make_old(trained)
    assert list(load_runs(tmp_path)["final_val_loss"]) == [first["final_val_loss"]]


@pytest.mark.parametrize(
    ("key", "stack", "begun"),
    [
        ("sweep.stack", "off", {"stacked": 4}),
        ("sweep.stack", "auto", {}),
        ("hardware.strategy=fsdp", "off", {"strategy": "fsdp"}),
    ],
)
def test_a_run_begun_with_what_is_removed_is_not_resumed(
    tmp_path: Path, corpus: Path, cache: Path, key: str, stack: str, begun: dict[str, object]
) -> None:
    trained = Trained(tmp_path, cache, tiny(corpus, "train.steps=2")).go()
    (trained.path / "results.json").unlink()
    make_old(trained, stack, **begun)
    with pytest.raises(ConfigError, match=f"^{key}: removed; .* was begun with it, use force=true"):
        trained.go()
    assert trained.go("force=true").results["status"] == "finished"
