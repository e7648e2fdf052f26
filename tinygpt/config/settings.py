"""Define the keys of every command that can be swept: where it runs, how its runs are named."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Optional

from omegaconf import MISSING

SCALES = ("smoke", "laptop", "gpu")
SMOKE = "smoke: not a result"  # said of a study at that scale


def key(default: Any, **bounds: Any) -> Any:
    """Return a field with bounds ``least`` >=, ``most`` <=, ``above`` >, ``below`` <, ``among``."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=bounds)
    return field(default=default, metadata=bounds)


@dataclass
class HardwareConfig:
    """Chooses the device, threads and micro-batch; nothing here changes what is learned."""

    accelerator: str = key("auto", among=("auto", "cpu", "mps", "cuda"))
    devices: int = key(1, least=-1)  # on each node, a process each; -1: all there are
    num_nodes: int = key(1, least=1)
    strategy: str = key("auto", among=("auto", "ddp"))  # auto: ddp for several devices
    micro_batch_size: Optional[int] = key(None, least=1)  # sequences; null: what fits well
    threads: Optional[int] = key(None, least=1, most=4096)  # CPU threads; null: as many as pay
    compile: str = key("auto", among=("auto", "off", "on"))


@dataclass
class TrainerConfig:
    """Flags of Lightning's Trainer beside those that the recipe decides; null: its own default."""

    fast_dev_run: Optional[bool] = None  # one step and one batch of validation; writes no run
    limit_val_batches: Optional[int] = key(None, least=1)
    profiler: Optional[str] = key(None, among=("simple", "advanced", "pytorch"))
    detect_anomaly: Optional[bool] = None


@dataclass
class TensorBoardLog:
    flush_seconds: int = key(10, least=1)


@dataclass
class WandbLog:
    project: str = "tinygpt"
    entity: Optional[str] = None
    offline: bool = True


@dataclass
class MlflowLog:
    experiment: Optional[str] = None  # null: the study
    tracking_uri: Optional[str] = None  # null: sqlite, <output_dir>/mlflow.db


@dataclass
class LoggerConfig:
    """metrics.csv is always written; these come on top."""

    tensorboard: Optional[TensorBoardLog] = None
    wandb: Optional[WandbLog] = None
    mlflow: Optional[MlflowLog] = None


@dataclass
class LauncherConfig:
    """Chooses where the runs of a sweep train."""

    kind: str = MISSING


@dataclass
class SerialLauncher(LauncherConfig):
    """One run after the other, in this process."""

    kind: str = key("serial", among=("serial",))


@dataclass
class LocalLauncher(LauncherConfig):
    """Processes on this machine, each with its share of the cores, or of the GPUs."""

    kind: str = key("local", among=("local",))
    n_jobs: Optional[int] = key(None, least=1)  # null: per_gpu on each; without GPUs one a core
    per_gpu: Optional[int] = key(None, least=1)  # null: four of a small model, else one


@dataclass
class AutoLauncher(LocalLauncher):
    """Trains as ``local`` where several runs can train at once, as ``serial`` where not."""

    kind: str = key("auto", among=("auto",))


@dataclass
class SlurmLauncher(LauncherConfig):
    """An array of Slurm jobs, one a run; preempted or out of time, they are queued again."""

    kind: str = key("slurm", among=("slurm",))
    partition: Optional[str] = None
    minutes: int = key(60, least=1)  # a run that takes longer is queued again
    cpus: int = key(4, least=1)  # a run, as gpus and memory_gb
    gpus: int = key(0, least=0)
    memory_gb: Optional[int] = key(None, least=1)
    n_jobs: int = key(256, least=1)  # at once
    requeues: int = key(10, least=0)  # after preemption or the end of the time
    sbatch: dict[str, Any] = field(default_factory=dict)  # any other option: account, qos, ...


@dataclass
class RayLauncher(LauncherConfig):
    """A Ray cluster, or one that is started on this machine."""

    kind: str = key("ray", among=("ray",))
    address: Optional[str] = None  # null: a cluster of its own here
    cpus: int = key(1, least=1)  # a run
    gpus: float = key(0.0, least=0.0)


@dataclass
class SweepConfig:
    """Lists what an experiment varies at each scale: keys with their values, every combination.

    ``together`` is a list of such tables, each swept on its own, for keys that go together.
    """

    smoke: dict[str, Any] = field(default_factory=dict)
    laptop: dict[str, Any] = field(default_factory=dict)
    gpu: dict[str, Any] = field(default_factory=dict)
    share_trunk: bool = False  # runs that differ in length alone share their constant-rate part


@dataclass
class Settings:
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    launcher: LauncherConfig = MISSING
    sweep: SweepConfig = field(default_factory=SweepConfig)
    scale: str = key("laptop", among=SCALES)  # of an experiment that sweeps
    seed: int = key(42, least=0, most=2**32 - 1)
    study: Optional[str] = None  # null: runs; an experiment's name and scale; a sweep's keys
    run_name: Optional[str] = None  # null: the overridden values and six digits of the hash
    output_dir: str = "outputs"
    cache_dir: Optional[str] = None  # null: $TINYGPT_CACHE, else ~/.cache/tinygpt
    force: bool = False  # do anew what is finished
    plan: bool = False  # print what would be done and what it costs; do nothing
    fit: bool = True  # at the end of a sweep: the law of its runs, figures and a report
