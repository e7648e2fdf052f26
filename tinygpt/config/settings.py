"""Define the keys that every command with sweeps has: where it runs and how runs are named."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Optional

from omegaconf import MISSING

SCALES = ("smoke", "laptop", "gpu")
SMOKE = "smoke: not a result"  # shown for a study at that scale


def key(default: Any, help: str = "", **bounds: Any) -> Any:
    """Return a field with a description and bounds: least, most, above, below or among."""
    bounds["help"] = help
    if isinstance(default, list | dict):
        return field(default_factory=default.copy, metadata=bounds)
    return field(default=default, metadata=bounds)


@dataclass
class HardwareConfig:
    """Say where a run trains; nothing here changes what is learned."""

    accelerator: str = key(
        "auto",
        "Device to train on; auto takes CUDA, else MPS, else the CPU.",
        among=("auto", "cpu", "mps", "cuda"),
    )
    devices: int = key(1, "Devices per machine, one process each; -1 means all of them.", least=-1)
    num_nodes: int = key(1, "Number of machines.", least=1)
    strategy: str = key("auto", "How devices share a batch; auto means ddp.", among=("auto", "ddp"))
    micro_batch_size: Optional[int] = key(None, "Sequences per pass; null picks a number.", least=1)
    threads: Optional[int] = key(
        None, "CPU threads to use; null means as many as speed up training.", least=1, most=4096
    )
    compile: str = key(
        "auto",
        "Use torch.compile; auto does so for long runs on one GPU.",
        among=("auto", "off", "on"),
    )


@dataclass
class TrainerConfig:
    """Set flags of Lightning's Trainer that the recipe does not decide; null is its default."""

    fast_dev_run: Optional[bool] = key(
        None, "Try one training step and one validation batch without writing a run."
    )
    limit_val_batches: Optional[int] = key(None, "Validate on at most this many batches.", least=1)
    limit_test_batches: Optional[int] = key(
        None, "Score at most this many batches of the test text; 0 leaves it out.", least=0
    )
    profiler: Optional[str] = key(
        None,
        "Write a report of one of Lightning's profilers into the run's folder.",
        among=("simple", "advanced", "pytorch"),
    )
    detect_anomaly: Optional[bool] = key(None, "Report the operation that produced a NaN; slow.")


@dataclass
class TensorBoardLog:
    """Log to TensorBoard, on by default."""

    flush_seconds: int = key(10, "Seconds between writes to disk.", least=1)


@dataclass
class WandbLog:
    """Log to Weights & Biases, with ``logger=wandb``."""

    project: str = key("tinygpt", "Project to log to.")
    entity: Optional[str] = key(None, "User or team that owns the project; null means your own.")
    offline: bool = key(True, "Write to disk only; wandb sync uploads it later.")


@dataclass
class MlflowLog:
    """Log to MLflow, with ``logger=mlflow``."""

    experiment: Optional[str] = key(None, "Name of the experiment; null means the study.")
    tracking_uri: Optional[str] = key(None, "Where to log; null is sqlite, <output_dir>/mlflow.db.")


@dataclass
class LoggerConfig:
    """Choose where to log, in addition to metrics.csv."""

    tensorboard: Optional[TensorBoardLog] = None
    wandb: Optional[WandbLog] = None
    mlflow: Optional[MlflowLog] = None


@dataclass
class LauncherConfig:
    """Say where the runs of a sweep train."""

    kind: str = key(MISSING, "Kind of launcher; set by launcher=.")


@dataclass
class SerialLauncher(LauncherConfig):
    """Train one run after the other, in this process."""

    kind: str = key("serial", among=("serial",))


@dataclass
class LocalLauncher(LauncherConfig):
    """Train in processes on this machine, each with its share of the cores or GPUs."""

    kind: str = key("local", among=("local",))
    n_jobs: Optional[int] = key(
        None, "Runs at a time; null means per_gpu on each GPU, or one per core.", least=1
    )
    per_gpu: Optional[int] = key(None, "Runs per GPU; null is 4 for small models, else 1.", least=1)


@dataclass
class AutoLauncher(LocalLauncher):
    """Train as ``local`` if several runs can train at a time, else as ``serial``."""

    kind: str = key("auto", among=("auto",))


@dataclass
class SlurmLauncher(LauncherConfig):
    """Train in an array of Slurm jobs, one per run, queued again if preempted or out of time."""

    kind: str = key("slurm", among=("slurm",))
    partition: Optional[str] = key(None, "Slurm partition; null means the cluster's default.")
    minutes: int = key(60, "Time limit of a job; a run that takes longer is queued again.", least=1)
    cpus: int = key(4, "CPU cores per run.", least=1)
    gpus: int = key(0, "GPUs per run.", least=0)
    memory_gb: Optional[int] = key(None, "GB of memory per run; null means the default.", least=1)
    n_jobs: int = key(256, "Runs at a time.", least=1)
    requeues: int = key(10, "How often a run may be queued again.", least=0)
    sbatch: dict[str, Any] = key({}, "Other options of sbatch, such as account or qos.")


@dataclass
class RayLauncher(LauncherConfig):
    """Train on a Ray cluster, or on one started on this machine."""

    kind: str = key("ray", among=("ray",))
    address: Optional[str] = key(None, "Address of the cluster; null starts one on this machine.")
    cpus: int = key(1, "CPU cores per run.", least=1)
    gpus: float = key(0.0, "GPUs per run; 0.5 lets two runs share one.", least=0.0)


LAUNCHERS: dict[str, type] = {
    "auto": AutoLauncher,
    "serial": SerialLauncher,
    "local": LocalLauncher,
    "slurm": SlurmLauncher,
    "ray": RayLauncher,
}


@dataclass
class SweepConfig:
    """Set what an experiment varies at each scale: keys with their values, in every combination.

    ``together`` lists such tables, each swept on its own, for keys that change together.
    """

    smoke: dict[str, Any] = key({}, "Keys and their values at scale=smoke.")
    laptop: dict[str, Any] = key({}, "Keys and their values at scale=laptop.")
    gpu: dict[str, Any] = key({}, "Keys and their values at scale=gpu.")
    share_trunk: bool = key(False, "Share the constant-rate steps of runs that differ in length.")


@dataclass
class Settings:
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    launcher: LauncherConfig = MISSING
    sweep: SweepConfig = field(default_factory=SweepConfig)
    scale: str = key("laptop", "Which size of an experiment to run.", among=SCALES)
    seed: int = key(42, "Seed of the weights, the data order and dropout.", least=0, most=2**32 - 1)
    study: Optional[str] = key(
        None,
        "Folder for the runs; null means runs, the experiment's name and scale, or the swept keys.",
    )
    run_name: Optional[str] = key(
        None,
        "Folder of the run; null means the values set and six digits of the configuration's hash.",
    )
    output_dir: str = key("outputs", "Folder in which studies are written.")
    cache_dir: Optional[str] = key(
        None, "Folder for prepared text; null means $TINYGPT_CACHE, else ~/.cache/tinygpt."
    )
    force: bool = key(False, "Train again what is already finished.")
    plan: bool = key(False, "Only print what would be done and what it would cost.")
    fit: bool = key(True, "Fit a law to the runs of a finished sweep and write a report.")
