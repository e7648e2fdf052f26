"""From ``hardware`` and ``logger`` to a Lightning Trainer."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.loggers import Logger, TensorBoardLogger

from tinygpt import rundir
from tinygpt.config import Config, ConfigError, HardwareConfig, Plan
from tinygpt.training.tracking import check_server, open_mlflow

# Tokens that a device takes well in one pass: beyond that a larger pass is not faster.
PASS_TOKENS = {"cpu": 8192, "mps": 16384, "cuda": 65536}
# mlflow is last: imported without the others it could not be told of them any more
LIBRARIES = {"wandb": ["wandb"], "mlflow": ["alembic", "sqlalchemy", "mlflow"]}
LIGHTNING_PRECISION = {"32": "32-true", "64": "64-true"}


@dataclass(frozen=True)
class Device:
    """What ``hardware`` and ``train.precision`` come down to on this machine."""

    accelerator: str  # cpu, mps or cuda
    precision: str  # 32, 64, bf16-mixed or 16-mixed


def resolve_device(hardware: HardwareConfig, precision: str) -> Device:
    """Raises ConfigError where the machine lacks what is asked for."""
    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    kind = hardware.accelerator
    if kind == "auto":
        kind = next(name for name in there if there[name])
    if not there[kind]:
        usable = ", ".join(["auto", *(name for name in there if there[name])])
        raise ConfigError(
            f"hardware.accelerator={kind}: this machine or this build of torch has none; "
            f"usable here: {usable}"
        )
    if kind == "mps" and hardware.compile:
        raise ConfigError("hardware.compile=true: not on mps; usable there: false")
    allowed = {"cpu": ("32", "64", "bf16-mixed"), "mps": ("32",)}.get(
        kind, ("32", "64", "bf16-mixed", "16-mixed")
    )
    if precision == "auto":
        precision = "32"
        if kind == "cuda":
            precision = "bf16-mixed" if torch.cuda.is_bf16_supported() else "16-mixed"
    if precision not in allowed:
        raise ConfigError(
            f"train.precision={precision}: on {kind} one of auto, {', '.join(allowed)}"
        )
    return Device(kind, precision)


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
                raise ConfigError(
                    f"logger={name}: needs `pip install 'tinygpt[{name}]'`"
                ) from error
    if config.logger.mlflow is not None:
        check_server(config)


def make_loggers(config: Config, run: rundir.RunDir, step: int) -> list[Logger]:
    """The loggers that come on top of metrics.csv; their x axis is training tokens."""
    loggers: list[Logger] = []
    if config.logger.tensorboard is not None:
        # what a resumed run logs again takes the place of what was logged before
        purge = step * config.train.batch_tokens + 1 if step else None
        board = TensorBoardLogger(
            run.path / "tensorboard",
            name="",
            version="",
            flush_secs=config.logger.tensorboard.flush_seconds,
            purge_step=purge,
        )
        losses = ["train/loss", "val/loss", "val/irreducible_loss_exact"]
        board.experiment.add_custom_scalars({"loss": {"all losses": ["Multiline", losses]}})
        loggers.append(board)
    if config.logger.wandb is not None:
        from lightning.pytorch.loggers import WandbLogger

        wandb = config.logger.wandb
        loggers.append(
            WandbLogger(
                name=config.run_name,
                id=config.run_name,
                group=config.study,
                save_dir=run.path,
                project=wandb.project,
                entity=wandb.entity,
                offline=wandb.offline,
                resume="allow",
            )
        )
    if config.logger.mlflow is not None:
        with quiet_lightning():
            loggers.append(open_mlflow(config, run))
    return loggers


@contextlib.contextmanager
def quiet_lightning() -> Iterator[None]:
    """Lightning's hints do not concern a user of this program."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning.*")
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        yield


class AtomicCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint beside its place, then renames it; reads tensors and plain data only."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        with rundir.replacing(Path(path)) as temporary:
            torch.save(checkpoint, temporary)

    def load_checkpoint(
        self, path: Any, map_location: Any | None = None, weights_only: bool | None = True
    ) -> dict[str, Any]:
        try:
            checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            checkpoint["global_step"], checkpoint["callbacks"]["Journal"]["status"]
        except Exception as error:  # torch raises whatever the broken bytes lead it to
            raise ConfigError(
                f"{path}: this checkpoint is damaged; remove it to begin anew, or use force=true"
            ) from error
        return checkpoint


def make_trainer(
    run: rundir.RunDir,
    plan: Plan,
    device: Device,
    callbacks: list[pl.Callback],
    loggers: list[Logger],
    max_steps: int,
) -> pl.Trainer:
    """A Trainer that steps and does nothing else: what is logged and saved is the callbacks' own.

    All that Lightning counts comes from ``plan``.
    """
    if device.accelerator == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32
    with quiet_lightning():
        return pl.Trainer(
            accelerator=device.accelerator,
            devices=1,
            precision=LIGHTNING_PRECISION.get(device.precision, device.precision),  # type: ignore[arg-type]
            max_steps=max_steps,
            max_epochs=-1,
            min_epochs=0,
            accumulate_grad_batches=plan.accumulate,
            logger=loggers or False,
            callbacks=callbacks,
            plugins=[AtomicCheckpoints()],
            deterministic="warn",
            use_distributed_sampler=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            default_root_dir=run.path,
        )
