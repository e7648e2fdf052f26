"""Define the keys of every command that can be swept: where it runs, how its runs are named."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Optional

from omegaconf import MISSING

SCALES = ("smoke", "laptop", "gpu")
SMOKE = "smoke: not a result"  # said of a study at that scale


def key(default: Any, help: str = "", **bounds: Any) -> Any:
    """Return a field with a description and bounds: ``least`` >=, ``most`` <=, ``above`` >,
    ``below`` <, ``among``."""
    bounds["help"] = help
    if isinstance(default, list | dict):
        return field(default_factory=default.copy, metadata=bounds)
    return field(default=default, metadata=bounds)


@dataclass
class HardwareConfig:
    """Say where a run trains; nothing here changes what is learned."""

    accelerator: str = key(
        "auto", "auto: CUDA, else MPS, else the CPU", among=("auto", "cpu", "mps", "cuda")
    )
    devices: int = key(1, "devices per node, one process each; -1: all of them", least=-1)
    num_nodes: int = key(1, "number of machines", least=1)
    strategy: str = key("auto", "auto: ddp for several devices", among=("auto", "ddp"))
    micro_batch_size: Optional[int] = key(None, "sequences per pass; null: what fits well", least=1)
    threads: Optional[int] = key(
        None, "CPU threads; null: as many as make it faster", least=1, most=4096
    )
    compile: str = key(
        "auto", "torch.compile; auto: on one GPU, for long runs", among=("auto", "off", "on")
    )


@dataclass
class TrainerConfig:
    """Flags of Lightning's Trainer beside those that the recipe decides; null: its own default."""

    fast_dev_run: Optional[bool] = key(
        None, "one training step and one batch of validation; writes no run"
    )
    limit_val_batches: Optional[int] = key(None, "batches per validation", least=1)
    profiler: Optional[str] = key(
        None, "Lightning's profiler, written to the run", among=("simple", "advanced", "pytorch")
    )
    detect_anomaly: Optional[bool] = key(None, "find the operation that made a NaN; slow")


@dataclass
class TensorBoardLog:
    """TensorBoard, on by default."""

    flush_seconds: int = key(10, "seconds between writes to disk", least=1)


@dataclass
class WandbLog:
    """Weights & Biases: ``logger=wandb``."""

    project: str = key("tinygpt", "project")
    entity: Optional[str] = key(None, "user or team; null: yours")
    offline: bool = key(True, "write to disk only; wandb sync uploads it later")


@dataclass
class MlflowLog:
    """MLflow: ``logger=mlflow``."""

    experiment: Optional[str] = key(None, "experiment; null: the study")
    tracking_uri: Optional[str] = key(None, "null: sqlite, <output_dir>/mlflow.db")


@dataclass
class LoggerConfig:
    """metrics.csv is always written; these come on top."""

    tensorboard: Optional[TensorBoardLog] = None
    wandb: Optional[WandbLog] = None
    mlflow: Optional[MlflowLog] = None


@dataclass
class LauncherConfig:
    """Say where the runs of a sweep train."""

    kind: str = key(MISSING, "kind of launcher, set by launcher=")


@dataclass
class SerialLauncher(LauncherConfig):
    """One run after the other, in this process."""

    kind: str = key("serial", among=("serial",))


@dataclass
class LocalLauncher(LauncherConfig):
    """Processes on this machine, each with its share of the cores, or of the GPUs."""

    kind: str = key("local", among=("local",))
    n_jobs: Optional[int] = key(
        None, "runs at once; null: per_gpu on each GPU, or one per core", least=1
    )
    per_gpu: Optional[int] = key(None, "runs per GPU; null: four small models, else one", least=1)


@dataclass
class AutoLauncher(LocalLauncher):
    """Trains as ``local`` if several runs can train at once, else as ``serial``."""

    kind: str = key("auto", among=("auto",))


@dataclass
class SlurmLauncher(LauncherConfig):
    """An array of Slurm jobs, one per run; preempted or out of time, they are queued again."""

    kind: str = key("slurm", among=("slurm",))
    partition: Optional[str] = key(None, "partition; null: the cluster's default")
    minutes: int = key(60, "time limit; a run that takes longer is queued again", least=1)
    cpus: int = key(4, "cores per run", least=1)
    gpus: int = key(0, "GPUs per run", least=0)
    memory_gb: Optional[int] = key(None, "memory per run", least=1)
    n_jobs: int = key(256, "runs at once", least=1)
    requeues: int = key(10, "times a run may be queued again", least=0)
    sbatch: dict[str, Any] = key({}, "any other option of sbatch, as account or qos")


@dataclass
class RayLauncher(LauncherConfig):
    """A Ray cluster, or one that is started on this machine."""

    kind: str = key("ray", among=("ray",))
    address: Optional[str] = key(None, "null: start a cluster on this machine")
    cpus: int = key(1, "cores per run", least=1)
    gpus: float = key(0.0, "GPUs per run; 0.5: two runs share one", least=0.0)


@dataclass
class SweepConfig:
    """What an experiment varies at each scale: keys with their values, every combination.

    ``together`` is a list of such tables, each swept on its own, for keys that go together.
    """

    smoke: dict[str, Any] = key({}, "keys and values at scale=smoke")
    laptop: dict[str, Any] = key({}, "keys and values at scale=laptop")
    gpu: dict[str, Any] = key({}, "keys and values at scale=gpu")
    share_trunk: bool = key(False, "runs that differ only in length share their constant-rate part")


@dataclass
class Settings:
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    launcher: LauncherConfig = MISSING
    sweep: SweepConfig = field(default_factory=SweepConfig)
    scale: str = key("laptop", "scale of an experiment", among=SCALES)
    seed: int = key(42, "seed of weights, data order and dropout", least=0, most=2**32 - 1)
    study: Optional[str] = key(
        None, "folder of the runs; null: runs, the experiment's name and scale, or the swept keys"
    )
    run_name: Optional[str] = key(
        None, "null: the overridden values and six digits of the configuration's hash"
    )
    output_dir: str = key("outputs", "where studies are written")
    cache_dir: Optional[str] = key(
        None, "where prepared text is kept; null: $TINYGPT_CACHE, else ~/.cache/tinygpt"
    )
    force: bool = key(False, "repeat what is finished")
    plan: bool = key(False, "print what would be done and what it costs, and do nothing")
    fit: bool = key(True, "fit a law to the runs at the end of a sweep, with a report")
