"""Make the Lightning Trainer of a run, and end the processes that it launches."""

from __future__ import annotations

import contextlib
import importlib
import os
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.profilers import AdvancedProfiler, PyTorchProfiler, SimpleProfiler

from tinygpt import fileio, signals
from tinygpt.config import ConfigError, RunError, TrainerConfig, first_line
from tinygpt.config.horizon import Plan
from tinygpt.runs import rundir
from tinygpt.runs.load import check_sums
from tinygpt.training.hardware import Device, placement, quiet_lightning

PROFILERS = {"simple": SimpleProfiler, "advanced": AdvancedProfiler, "pytorch": PyTorchProfiler}
LIGHTNING_PRECISION = {"32": "32-true", "64": "64-true"}


class AtomicCheckpoints(TorchCheckpointIO):
    """Write checkpoints atomically, and read only tensors and plain data from them."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        with fileio.replacing(Path(path)) as temporary:
            torch.save(checkpoint, temporary)

    def load_checkpoint(
        self, path: Any, map_location: Any | None = None, weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Load a checkpoint onto the CPU.  Raises ConfigError for a damaged file."""
        try:
            check_sums(Path(path))
            checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            checkpoint["global_step"], checkpoint["callbacks"]["Journal"]["status"]
        except Exception as error:  # damaged bytes can make torch raise anything
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
    """Return a Trainer that only takes steps; the callbacks log, evaluate and save."""
    flags = flags or TrainerConfig()
    profiler = None
    if flags.profiler is not None:  # to a file, as Lightning's messages are hidden
        profiler = PROFILERS[flags.profiler](dirpath=run.path, filename="profile")
    if device.accelerator == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32
    plugins: list[Any] = [AtomicCheckpoints()]
    with quiet_lightning():
        if SLURMEnvironment.detect():  # its automatic checkpoints would bypass ours
            plugins.append(SLURMEnvironment(auto_requeue=False))
        trainer = pl.Trainer(
            **placement(device),
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
            check_val_every_n_epoch=10**9,  # the Journal validates, between logging and saving
            inference_mode=False,
            fast_dev_run=bool(flags.fast_dev_run),
            limit_val_batches=flags.limit_val_batches,
            limit_test_batches=flags.limit_test_batches,
            profiler=profiler,
            detect_anomaly=bool(flags.detect_anomaly),
        )
    # With deterministic kernels, torch also fills new memory with NaN, to reveal reads of memory
    # that nobody wrote; there are none here, and it costs a tenth of a small step.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    # Lightning would broadcast after each pass whether a SIGTERM arrived; Interrupts does so where
    # the processes synchronize anyway.
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
    # Lightning's handler of SIGTERM exits with code 0 and saves nothing.
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    return trainer


def own_callbacks(wanted: Mapping[str, Any]) -> list[pl.Callback]:
    """Return the user's own callbacks.  Raises ConfigError if one cannot be made."""
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
            raise ConfigError(f"callbacks.{name}: {module}.{last} is not a Lightning Callback")
        made.append(callback)
    return made


def leave_with_parent(parent: int) -> None:
    """End this process within a second of the process that launched it."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def ending_together(trainer: pl.Trainer) -> Iterator[None]:
    """End all processes that Lightning launches in the block when the block ends."""
    os.environ[signals.PARENT] = str(os.getpid())
    try:
        yield
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    except (Exception, KeyboardInterrupt, signals.Stopped) as error:
        # when another process fails, this one loses its connection: a RuntimeError
        if _end_launched(trainer, patience=5 if isinstance(error, RuntimeError) else 0):
            raise RunError("another process of this run failed, as said above") from error
        raise
    finally:
        del os.environ[signals.PARENT]
        _end_launched(trainer, patience=60)


def _end_launched(trainer: pl.Trainer, patience: float) -> bool:
    """Wait ``patience`` seconds for the launched processes, kill the rest; return if one failed."""
    launched: list[subprocess.Popen[bytes]] = getattr(trainer.strategy.launcher, "procs", [])
    processes = list(launched)
    launched.clear()  # Lightning watches this list and kills this process once one has failed
    end = time.monotonic() + patience
    failed = False
    for process in processes:
        try:
            failed |= process.wait(max(0.0, end - time.monotonic())) != 0
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    return failed
