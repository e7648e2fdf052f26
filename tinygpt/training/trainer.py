"""From ``hardware`` to a Lightning Trainer."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import logging
import os
import signal
import subprocess
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.profilers import (
    AdvancedProfiler,
    Profiler,
    PyTorchProfiler,
    SimpleProfiler,
)
from lightning.pytorch.strategies import DDPStrategy, ParallelStrategy

from tinygpt import fileio, rundir, signals
from tinygpt.config import ConfigError, HardwareConfig, RunError, TrainerConfig, first_line
from tinygpt.horizon import Plan
from tinygpt.trained import check_sums, usable_device

PROFILERS: dict[str, Callable[..., Profiler]] = {
    "simple": SimpleProfiler,
    "advanced": AdvancedProfiler,
    "pytorch": PyTorchProfiler,
}
NEVER = 10**9  # epochs: the Journal validates, between logging and saving
LIGHTNING_PRECISION = {"32": "32-true", "64": "64-true"}


@dataclass(frozen=True)
class Device:
    """What ``hardware`` and ``train.precision`` come down to on this machine."""

    accelerator: str  # cpu, mps or cuda
    precision: str  # 32, 64, bf16-mixed or 16-mixed
    devices: int = 1  # on each node
    num_nodes: int = 1
    strategy: str = "auto"  # ddp; auto: one device
    rank: int = 0  # of this process; the first one, 0, speaks and writes

    @property
    def world_size(self) -> int:
        return self.devices * self.num_nodes

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name() if self.accelerator == "cuda" else self.accelerator


def resolve_device(hardware: HardwareConfig, precision: str) -> Device:
    """Raises ConfigError where the machine lacks what is asked for."""
    kind = usable_device(hardware.accelerator, "hardware.accelerator").type
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
    device = Device(kind, precision, _devices(hardware, kind), hardware.num_nodes)
    if device.world_size == 1:
        return device
    device = dataclasses.replace(device, strategy="ddp")
    return dataclasses.replace(device, rank=_rank(device))


def _devices(hardware: HardwareConfig, kind: str) -> int:
    """Return how many devices a node has."""
    devices = hardware.devices
    if kind == "cuda":
        there = torch.cuda.device_count()
        if devices > there:
            raise ConfigError(f"hardware.devices={devices}: this machine has {there}")
        devices = there if devices == -1 else devices
    elif devices == -1:
        raise ConfigError(f"hardware.devices=-1: on {kind} say how many")
    if kind == "mps" and devices * hardware.num_nodes > 1:
        raise ConfigError(f"hardware.devices={devices}: mps has one device")
    return devices


def _rank(device: Device) -> int:
    """Which process of the run this one is: launched by Lightning, by srun or by torchrun."""
    try:
        with quiet_lightning():
            trainer = pl.Trainer(**_placed(device), logger=False, enable_checkpointing=False)
        strategy = trainer.strategy
        assert isinstance(strategy, ParallelStrategy)
        assert strategy.cluster_environment is not None
        strategy.cluster_environment.validate_settings(device.devices, device.num_nodes)
    except (RuntimeError, ValueError) as error:  # what srun was asked for does not fit
        raise ConfigError(f"hardware.devices={device.devices}: {error}") from error
    return trainer.global_rank


def _placed(device: Device) -> dict[str, Any]:
    """Where a Trainer runs, in Lightning's words."""
    return {
        "accelerator": device.accelerator,
        "devices": device.devices,
        "num_nodes": device.num_nodes,
        # buffers are constants
        "strategy": DDPStrategy(broadcast_buffers=False) if device.strategy == "ddp" else "auto",
    }


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
        with fileio.replacing(Path(path)) as temporary:
            torch.save(checkpoint, temporary)

    def load_checkpoint(
        self, path: Any, map_location: Any | None = None, weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Onto the CPU, tensors and plain data alone.  Raises ConfigError for a damaged file."""
        try:
            check_sums(Path(path))
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
    max_steps: int,
    flags: TrainerConfig | None = None,
) -> pl.Trainer:
    """Return a Trainer that steps and does nothing else by itself: callbacks log, evaluate, save.

    All that Lightning counts comes from ``plan``; ``flags`` are those that a user may set.
    """
    flags = flags or TrainerConfig()
    profiler = None
    if flags.profiler is not None:  # into the folder: Lightning's own messages are not shown
        profiler = PROFILERS[flags.profiler](dirpath=run.path, filename="profile")
    if device.accelerator == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32
    plugins: list[Any] = [AtomicCheckpoints()]
    with quiet_lightning():
        if SLURMEnvironment.detect():  # the checkpoints it writes by itself would bypass ours
            plugins.append(SLURMEnvironment(auto_requeue=False))
        trainer = pl.Trainer(
            **_placed(device),
            precision=LIGHTNING_PRECISION.get(device.precision, device.precision),  # type: ignore[arg-type]
            max_steps=max_steps,
            max_epochs=-1,
            min_epochs=0,
            accumulate_grad_batches=plan.accumulate,
            logger=False,
            log_every_n_steps=0,
            callbacks=callbacks,
            plugins=plugins,
            deterministic="warn",
            use_distributed_sampler=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            default_root_dir=run.path,
            check_val_every_n_epoch=NEVER,
            inference_mode=False,
            fast_dev_run=bool(flags.fast_dev_run),
            limit_val_batches=flags.limit_val_batches,
            profiler=profiler,
            detect_anomaly=bool(flags.detect_anomaly),
        )
    # With deterministic kernels torch also fills new memory with NaN, a tenth of a small step,
    # to show a read of what nobody wrote; what every kernel here reads has been written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    # Lightning would broadcast at each pass, and wait for it, whether a SIGTERM came; Interrupts
    # ask that where the processes rest anyway.
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
    # Its own handler of SIGTERM leaves with code 0 and saves nothing.
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    return trainer


def own_callbacks(wanted: Mapping[str, Any]) -> list[pl.Callback]:
    """Return the user's own callbacks.  Raises ConfigError where one cannot be made."""
    made = []
    for name, arguments in wanted.items():
        rest = {key: value for key, value in arguments.items() if key != "_target_"}
        module, _, last = arguments["_target_"].rpartition(".")
        try:
            callback = getattr(importlib.import_module(module), last)(**rest)
        except Exception as error:  # it is the user's code
            line = f"callbacks.{name}: {type(error).__name__}: {first_line(error)}"
            raise ConfigError(line) from error
        if not isinstance(callback, pl.Callback):
            raise ConfigError(f"callbacks.{name}: {module}.{last} is no Callback of Lightning")
        made.append(callback)
    return made


def validate(trainer: pl.Trainer) -> None:
    """Run the validation loop inside of training, as Lightning does at its own intervals."""
    # the loop around it does the same: the validation has batches of its own to count
    connector = trainer._logger_connector
    first_batch = connector._first_loop_iter
    trainer.validating = True
    trainer.fit_loop.epoch_loop.val_loop.run()
    trainer.training = True
    connector._first_loop_iter = first_batch


def fit(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    data: pl.LightningDataModule,
    note: signals.Note,
    ckpt_path: str | None = None,
) -> None:
    """Train, while ``note`` is told of a signal; of SIGTERM even where submitit ignores it."""
    with signals.handled(note, also=(signal.SIGTERM,)):
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)


def leave_with_parent(parent: int) -> None:
    """Ends this process soon after the one that launched it, which may have been killed."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def ending_together(trainer: pl.Trainer) -> Iterator[None]:
    """No process that Lightning launches inside outlives the block, however that ends."""
    os.environ[signals.PARENT] = str(os.getpid())
    try:
        yield
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    except (Exception, KeyboardInterrupt, signals.Stopped) as error:
        # where another process fails this one loses its connection, a RuntimeError
        if _end_launched(trainer, patience=5 if isinstance(error, RuntimeError) else 0):
            raise RunError("another process of this run failed, as said above") from error
        raise
    finally:
        del os.environ[signals.PARENT]
        _end_launched(trainer, patience=60)


def _end_launched(trainer: pl.Trainer, patience: float) -> bool:
    """Waits so many seconds for the launched processes, then kills them; whether one failed."""
    launched: list[subprocess.Popen[bytes]] = getattr(trainer.strategy.launcher, "procs", [])
    processes = list(launched)
    launched.clear()  # Lightning watches this list, and kills this process once one has failed
    end = time.monotonic() + patience
    failed = False
    for process in processes:
        try:
            failed |= process.wait(max(0.0, end - time.monotonic())) != 0
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    return failed
