"""Use the LightningModule and the data module in a Trainer of the user's own."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    LearningRateMonitor,
    ModelCheckpoint,
)
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from rich.console import Console

from tests.conftest import tiny
from tinygpt import LanguageModel, TokenData, compose
from tinygpt.config import Config, ConfigError
from tinygpt.training.session import train

pytestmark = pytest.mark.filterwarnings("default")  # Lightning's own are for its users


@pytest.fixture
def words(corpus: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The words of a command that logs every step and validates every third."""
    monkeypatch.setenv("TINYGPT_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    every = ["train.log_every=1", "train.eval_every=768", "train.sample_tokens=0"]
    return tiny(corpus, *every, "logger=csv")


def trainer_of(config: Config, **flags: Any) -> pl.Trainer:
    """A user's Trainer: on the CPU, quiet unless told otherwise."""
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(max_steps=config.steps, **{**quiet, **flags})


def rows_of(path: Path, name: str) -> list[str]:
    """Return the column ``name`` of a CSV file, where it is not empty."""
    with path.open(newline="") as file:
        return [row[name] for row in csv.DictReader(file) if row.get(name)]


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["hardware.micro_batch_size=2", "model.dropout=0.1"],
        ["train.skip_nonfinite=true", "optim=lion"],
    ],
    ids=["plain", "accumulated", "skipping"],
)
def test_a_notebook_trains_to_the_losses_of_the_command(
    words: list[str], more: list[str], tmp_path: Path
) -> None:
    """To the last digit: every training loss, every validation, the test and the weights."""
    words = [*words, *more]
    results = train(compose(*words), words, Console(quiet=True))

    config = compose(*words)
    data, model = TokenData(config), LanguageModel(config)
    logger = CSVLogger(tmp_path / "book")
    trainer = trainer_of(
        config,
        logger=logger,
        log_every_n_steps=1,
        val_check_interval=3 * (4 if "hardware.micro_batch_size=2" in more else 1),
    )
    trainer.fit(model, data)
    assert trainer.global_step == config.steps == 12

    run = tmp_path / "outputs" / "runs" / results["run_name"]
    logged = Path(logger.log_dir) / "metrics.csv"
    assert rows_of(logged, "train_loss") == rows_of(run / "metrics.csv", "train_loss")
    of_command = rows_of(run / "metrics.csv", "val_loss")[1:]  # without step 0
    assert rows_of(logged, "val_loss") == of_command
    assert trainer.callback_metrics["val_loss"] == results["final_val_loss"]
    [tested] = trainer.test(model, data, verbose=False)
    assert tested["test_loss"] == results["test_loss"]
    assert tested["test_bits_per_byte"] == results["test_bits_per_byte"]
    final = torch.load(run / "checkpoints" / "final.ckpt", weights_only=True)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, final["state_dict"][name]), name

    loaded = LanguageModel.load_from_checkpoint(run / "checkpoints" / "final.ckpt")
    [validated] = trainer_of(config).validate(loaded, TokenData(config), verbose=False)
    assert validated["val_loss"] == results["final_val_loss"]


def test_stock_callbacks_and_loggers_see_the_metrics(words: list[str], tmp_path: Path) -> None:
    class Seen(Callback):
        losses: list[float] = []  # noqa: RUF012

        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            self.losses.append(float(trainer.callback_metrics["train_loss"]))

    config = compose(*words, "optim.learning_rate=0.01")
    best = ModelCheckpoint(tmp_path / "kept", monitor="val_loss", save_last=True, save_top_k=1)
    stopping = EarlyStopping("val_loss", patience=1, min_delta=10.0)  # nothing is good enough
    table, board = CSVLogger(tmp_path), TensorBoardLogger(tmp_path)
    trainer = trainer_of(
        config,
        callbacks=[best, stopping, LearningRateMonitor(), Seen()],
        logger=[table, board],
        enable_checkpointing=True,
        log_every_n_steps=1,
        val_check_interval=3,
        profiler="simple",
    )
    model = LanguageModel(config)
    trainer.fit(model, TokenData(config))
    assert trainer.global_step == 6
    assert len(Seen.losses) == 6
    assert best.best_model_score == trainer.callback_metrics["val_loss"]
    rates = rows_of(Path(table.log_dir) / "metrics.csv", "lr-AdamW/pg1")
    assert float(rates[0]) == pytest.approx(model.rate(0))
    assert list(Path(board.log_dir).glob("events.*"))

    loaded = LanguageModel.load_from_checkpoint(best.best_model_path)
    assert loaded.config == config
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, loaded.state_dict()[name])


def test_a_stock_checkpoint_resumes_to_the_same_bits(words: list[str], tmp_path: Path) -> None:
    config = compose(*words, "model.dropout=0.1", "hardware.micro_batch_size=4")
    every = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=5, save_top_k=-1)
    whole = LanguageModel(config)
    trainer = trainer_of(config, callbacks=[every], enable_checkpointing=True)
    trainer.fit(whole, TokenData(config))
    resumed = LanguageModel(config)
    trainer_of(config).fit(resumed, TokenData(config), ckpt_path=tmp_path / "step=5.ckpt")
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name])


def test_fast_dev_run(words: list[str]) -> None:
    config = compose(*words)
    trainer = trainer_of(config, fast_dev_run=True)
    trainer.fit(LanguageModel(config), TokenData(config))
    assert trainer.global_step == 1
    assert set(trainer.callback_metrics) >= {"val_loss", "val_perplexity"}


def test_steps_that_only_the_data_decides(words: list[str]) -> None:
    config = compose(*words, "train.steps=null", "train.epochs=0.5")
    with pytest.raises(ConfigError, match=r"^steps: follows from the data; after .*total_steps$"):
        _ = config.steps
    data = TokenData(config)
    data.prepare_data()
    data.setup()
    assert data.plan is not None
    inputs, targets = next(iter(data.train_dataloader()))
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert data.plan.total_steps > 0


def test_what_the_recipe_decides_is_refused(words: list[str]) -> None:
    config = compose(*words)
    trainer = trainer_of(config, accumulate_grad_batches=3)
    line = "^accumulate_grad_batches=3: set hardware.micro_batch_size instead$"
    with pytest.raises(ConfigError, match=line):
        trainer.fit(LanguageModel(config), TokenData(config))
    data = TokenData(config)
    data.prepare_data()
    data.setup()
    with pytest.raises(ConfigError, match=r"^LanguageModel: needs TokenData"):
        trainer_of(config).fit(LanguageModel(config), data.train_dataloader())


# The same from the command


def trained(words: list[str]) -> dict[str, Any]:
    return train(compose(*words), words, Console(quiet=True))


def test_flags_of_the_trainer_reach_it(words: list[str], tmp_path: Path) -> None:
    whole = trained(words)
    part = trained([*words, "trainer.limit_val_batches=1", "trainer.profiler=simple"])
    assert part["config_hash"] != whole["config_hash"]
    assert part["final_val_loss"] != whole["final_val_loss"]
    assert part["final_train_loss"] == whole["final_train_loss"]
    profile = tmp_path / "outputs" / "runs" / part["run_name"] / "fit-profile.txt"
    assert "run_training_batch" in profile.read_text()

    bare = trained([*words, "trainer.limit_test_batches=0", "train.eval_on_start=false"])
    assert bare["config_hash"] != whole["config_hash"]
    for name in ("test_loss", "initial_val_loss"):
        assert whole[name] > 0
        assert bare[name] is None
    assert bare["final_val_loss"] == whole["final_val_loss"]

    before = sorted(tmp_path.rglob("*"))
    tried = trained([*words, "trainer.fast_dev_run=true"])
    assert tried["status"] == "fast_dev_run"
    assert tried["final_val_loss"] > 0
    assert sorted(tmp_path.rglob("*")) == before


def test_callbacks_of_the_users_own(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They see the metrics, and their state goes through the checkpoints of the run."""
    (tmp_path / "my_code.py").write_text(CALLBACK)
    monkeypatch.syspath_prepend(tmp_path)
    own = ["+callbacks.mine._target_=my_code.Mine", "+callbacks.mine.text=hello"]
    results = trained([*words, *own])
    run = tmp_path / "outputs" / "runs" / results["run_name"]
    seen = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["callbacks"]["Mine"]
    assert seen["text"] == "hello"
    assert seen["steps"] == 12
    assert seen["val_loss"] == results["final_val_loss"]
    assert trained(words)["config_hash"] != results["config_hash"]
    for target, line in {
        "my_code.Nothing": "callbacks.mine: AttributeError: module 'my_code' has no attribute",
        "pathlib.PurePath": "callbacks.mine: TypeError: ",
        "builtins.dict": "callbacks.mine: builtins.dict is not a Lightning Callback",
    }.items():
        with pytest.raises(ConfigError, match=f"^{line}"):
            trained([*words, f"+callbacks.mine._target_={target}", "+callbacks.mine.text=hello"])


CALLBACK = """
from lightning.pytorch.callbacks import Callback

class Mine(Callback):
    def __init__(self, text):
        self.state = {"text": text, "steps": 0}
    def on_train_batch_end(self, trainer, *_):
        self.state["steps"] = trainer.global_step
    def on_validation_end(self, trainer, module):
        self.state["val_loss"] = float(trainer.callback_metrics["val_loss"])
    def state_dict(self):
        return self.state
"""


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("trainer.max_steps=5", "trainer.max_steps=5: is decided by train.steps"),
        ("+trainer.precision=16", "trainer.precision=16: is decided by train.precision"),
        ("trainer.devices=2", "trainer.devices=2: is decided by hardware.devices"),
        ("trainer.fast_dev_rum=true", "trainer.fast_dev_rum: no such key; did you mean "),
        ("trainer.limit_val_batches=0", "trainer.limit_val_batches=0: must be at least 1"),
        ("+callbacks.ema.decay=1", "callbacks.ema: needs +callbacks.ema._target_=MODULE.CLASS"),
    ],
)
def test_a_flag_that_is_not_for_the_user_is_refused(word: str, line: str) -> None:
    with pytest.raises(ConfigError) as refused:
        compose(word)
    assert str(refused.value).startswith(line)
