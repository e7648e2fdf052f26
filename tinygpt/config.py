"""The configuration schema: every key, its type, its bounds, and what must fit together.

The YAML files under ``conf/`` carry values; this module says what is allowed.  It imports
omegaconf at most, so that a mistyped key is reported before torch is loaded.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import operator
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Optional

from omegaconf import MISSING, DictConfig, OmegaConf

DEFAULT_TOKENS = 2_000_000
MOST_STEPS = 10**12
HORIZONS = ("tokens", "steps", "epochs", "tokens_per_param", "flops")
PRECISIONS = ("auto", "32", "64", "bf16-mixed", "16-mixed")
SCALES = ("smoke", "laptop", "gpu")
SCALED_BY_WIDTH = ("adamw", "adam", "lion")  # optimizers whose rate goes with 1/width


class ConfigError(ValueError):
    """Something the user asked for cannot be had: one line that names the key, the bad value
    and what is allowed.  Commands print it and leave with exit code 2."""


class RunError(RuntimeError):
    """A run failed after it had begun; one line.  Commands leave with exit code 1."""


def key(default: Any, **bounds: Any) -> Any:
    """A field with bounds: ``least`` >=, ``most`` <=, ``above`` >, ``below`` <, ``among``."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=bounds)
    return field(default=default, metadata=bounds)


@dataclass
class ModelConfig:
    """A decoder-only transformer.  Sizes only; the vocabulary comes from the tokenizer."""

    n_layers: int = key(2, least=1)
    d_model: int = key(64, least=1)
    n_heads: int = key(4, least=1)
    n_kv_heads: Optional[int] = key(None, least=1)  # null: as many as n_heads
    d_ff: Optional[int] = key(None, least=1)  # null: 4·d_model, for SwiGLU two thirds of it
    max_seq_len: int = key(256, least=1)
    dropout: float = key(0.0, least=0.0, below=1.0)
    bias: bool = True
    tie_weights: bool = True
    position: str = key("learned", among=("learned", "rope"))
    rope_theta: float = key(10000.0, above=0.0)
    norm: str = key("layernorm", among=("layernorm", "rmsnorm"))
    activation: str = key("gelu", among=("gelu", "gelu_tanh", "swiglu"))
    attention: str = key("sdpa", among=("sdpa", "manual"))
    gradient_checkpointing: bool = False
    pad_vocab_to_multiple: int = key(1, least=1)  # rows of the embedding are rounded up to this
    parametrization: str = key("standard", among=("standard", "mup"))
    mup_base_width: int = key(64, least=1)  # the d_model that the learning rate was tuned at


@dataclass
class DataConfig:
    """What every corpus has in common."""

    source: str = MISSING  # synthetic | hub | custom
    name: str = MISSING  # what results.json calls the data set
    fraction: float = key(1.0, above=0.0, most=1.0)  # prefix of the training documents
    stride: Optional[int] = key(None, least=1)  # between training windows; null: max_seq_len
    max_tokens: Optional[int] = key(None, least=1)  # training tokens to prepare; null: all
    max_documents: Optional[int] = key(None, least=1)  # documents to read; null: all
    eval_tokens: Optional[int] = key(100_000, least=1)  # of validation, and of test; null: all
    val_fraction: float = key(0.05, above=0.0, below=1.0)
    test_fraction: float = key(0.05, least=0.0, below=1.0)
    val_is_test: bool = False


@dataclass
class SyntheticData(DataConfig):
    """The embedded corpus: stories from a seeded grammar, with an exactly known entropy."""

    source: str = key("synthetic", among=("synthetic",))
    corpus_seed: int = key(0, least=0)
    n_facts: int = key(16384, least=1)
    zipf_exponent: float = key(1.2, least=0.0)
    noise_rate: float = key(0.05, least=0.0, below=1.0)
    heldout_entities: int = key(64, least=0)


@dataclass
class TextData(DataConfig):
    """Text that somebody wrote: how a file or a row becomes documents."""

    separator: str = "auto"
    text_column: str = "auto"


@dataclass
class HubData(TextData):
    """A text data set of the Hugging Face hub, or a local folder laid out like one."""

    source: str = key("hub", among=("hub",))
    repo: str = MISSING
    config: Optional[str] = None
    split: str = "train"
    val_split: Optional[str] = "auto"  # auto: the source's own `validation` if it has one
    test_split: Optional[str] = "auto"
    revision: Optional[str] = None


@dataclass
class CustomData(TextData):
    """Files, a glob or a folder: .txt, .jsonl, .csv, .parquet."""

    source: str = key("custom", among=("custom",))
    path: str = MISSING
    val_file: Optional[str] = None
    test_file: Optional[str] = None


@dataclass
class TokenizerConfig:
    kind: str = MISSING


@dataclass
class BpeTokenizer(TokenizerConfig):
    kind: str = key("bpe", among=("bpe",))
    vocab_size: int = key(1024, least=258)  # 256 bytes and two special tokens
    train_bytes: int = key(50_000_000, least=1)


@dataclass
class CharTokenizer(TokenizerConfig):
    kind: str = key("char", among=("char",))
    train_bytes: int = key(50_000_000, least=1)


@dataclass
class ByteTokenizer(TokenizerConfig):
    kind: str = key("byte", among=("byte",))


@dataclass
class Gpt2Tokenizer(TokenizerConfig):
    kind: str = key("gpt2", among=("gpt2",))
    vocab_dir: Optional[str] = None  # folder with encoder.json and vocab.bpe; null: by tiktoken


@dataclass
class OptimConfig:
    kind: str = MISSING
    learning_rate: float = key(1e-3, above=0.0)
    weight_decay: float = key(0.1, least=0.0)
    decay_embeddings: bool = True
    scale_rate_with_width: Optional[bool] = None  # null: as model.parametrization needs it


@dataclass
class AdamOptim(OptimConfig):
    kind: str = key("adamw", among=("adamw", "adam"))
    betas: list[float] = key([0.9, 0.95], least=0.0, below=1.0)  # noqa: RUF009
    eps: float = key(1e-8, above=0.0)


@dataclass
class SgdOptim(OptimConfig):
    kind: str = key("sgd", among=("sgd",))
    momentum: float = key(0.9, least=0.0, below=1.0)
    nesterov: bool = True


@dataclass
class LionOptim(OptimConfig):
    kind: str = key("lion", among=("lion",))
    betas: list[float] = key([0.9, 0.99], least=0.0, below=1.0)  # noqa: RUF009


@dataclass
class AdafactorOptim(OptimConfig):
    """``learning_rate`` is relative: a step is at most so much of a parameter's own RMS."""

    kind: str = key("adafactor", among=("adafactor",))
    beta2_decay: float = key(-0.8, least=-1.0, below=0.0)
    least_rms: float = key(1e-3, above=0.0)
    clip_threshold: float = key(1.0, least=1.0)


@dataclass
class MuonOptim(OptimConfig):
    """``learning_rate`` is that of the matrices inside the blocks; AdamW moves the rest."""

    kind: str = key("muon", among=("muon",))
    momentum: float = key(0.95, least=0.0, below=1.0)
    nesterov: bool = True
    ns_steps: int = key(5, least=1, most=99)
    adam_learning_rate: float = key(1e-2, above=0.0)
    betas: list[float] = key([0.9, 0.95], least=0.0, below=1.0)  # noqa: RUF009
    eps: float = key(1e-8, above=0.0)


@dataclass
class ScheduleConfig:
    kind: str = MISSING
    warmup_steps: Optional[int] = key(None, least=0)  # null: warmup_fraction of all steps
    warmup_fraction: float = key(0.05, least=0.0, below=1.0)


@dataclass
class ConstantSchedule(ScheduleConfig):
    kind: str = key("constant", among=("constant",))


@dataclass
class DecaySchedule(ScheduleConfig):
    kind: str = key("cosine", among=("cosine", "linear"))
    min_ratio: float = key(0.1, least=0.0, most=1.0)


@dataclass
class WsdSchedule(ScheduleConfig):
    kind: str = key("wsd", among=("wsd",))
    min_ratio: float = key(0.1, least=0.0, most=1.0)
    decay_fraction: float = key(0.2, above=0.0, most=1.0)


@dataclass
class TrainConfig:
    """The training recipe.  The horizon is given once; intervals are in training tokens."""

    tokens: Optional[int] = key(None, least=1, most=10**18)
    steps: Optional[int] = key(None, least=1, most=10**12)
    epochs: Optional[float] = key(None, above=0.0)
    tokens_per_param: Optional[float] = key(None, above=0.0)
    flops: Optional[float] = key(None, above=0.0)
    batch_tokens: int = key(2048, least=1)
    precision: str = key("auto", among=PRECISIONS)
    grad_clip_norm: Optional[float] = key(1.0, above=0.0)
    log_every: int = key(10, least=1)  # optimizer steps
    eval_every: Optional[int] = key(None, least=1)  # tokens; null: a tenth of the horizon
    checkpoint_every: Optional[int] = key(None, least=1)  # tokens; null: eval_every
    keep_every: Optional[int] = key(None, least=1)  # tokens; keeps step_<N>.ckpt; null: none
    early_stopping_patience: Optional[int] = key(None, least=1)  # evaluations; null: off
    sample_prompt: str = ""
    sample_tokens: int = key(120, least=0)


@dataclass
class HardwareConfig:
    """Where it runs.  Nothing here changes what is learned."""

    accelerator: str = key("auto", among=("auto", "cpu", "mps", "cuda"))
    devices: int = key(1, least=-1)  # on each node, a process each; -1: all there are
    num_nodes: int = key(1, least=1)
    strategy: str = key("auto", among=("auto", "ddp", "fsdp"))  # auto: ddp for several devices
    micro_batch_size: Optional[int] = key(None, least=1)  # sequences; null: what fits well
    threads: Optional[int] = key(None, least=1, most=4096)  # CPU threads; null: torch's own choice
    compile: bool = False


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
    """Where the runs of a sweep are trained."""

    kind: str = MISSING


@dataclass
class SerialLauncher(LauncherConfig):
    """One run after the other, in this process."""

    kind: str = key("serial", among=("serial",))


@dataclass
class LocalLauncher(LauncherConfig):
    """Processes on this machine, each with its share of the cores, or with a GPU of its own."""

    kind: str = key("local", among=("local",))
    n_jobs: Optional[int] = key(None, least=1)  # null: one a GPU; without GPUs one a core


@dataclass
class SlurmLauncher(LauncherConfig):
    """An array of Slurm jobs, one a run; preempted or out of time, they are queued again."""

    kind: str = key("slurm", among=("slurm",))
    partition: Optional[str] = None
    minutes: int = key(60, least=1)
    cpus: int = key(4, least=1)
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
    """What an experiment varies, at each scale: keys with their values, every combination.

    Under ``together`` stands a list of such tables whose combinations follow one another, for
    keys that go together.
    """

    smoke: dict[str, Any] = field(default_factory=dict)
    laptop: dict[str, Any] = field(default_factory=dict)
    gpu: dict[str, Any] = field(default_factory=dict)
    share_trunk: bool = False  # runs that differ in length alone share their constant-rate part


@dataclass
class Config:
    """The whole of it, as ``config.yaml`` in a run folder keeps it."""

    model: ModelConfig = MISSING
    data: DataConfig = MISSING
    tokenizer: TokenizerConfig = MISSING
    optim: OptimConfig = MISSING
    schedule: ScheduleConfig = MISSING
    train: TrainConfig = MISSING
    hardware: HardwareConfig = MISSING
    logger: LoggerConfig = MISSING
    launcher: LauncherConfig = MISSING
    sweep: SweepConfig = field(default_factory=SweepConfig)
    scale: str = key("laptop", among=SCALES)
    seed: int = key(42, least=0, most=2**32 - 1)
    study: Optional[str] = None
    run_name: Optional[str] = None
    output_dir: str = "outputs"
    cache_dir: Optional[str] = None
    force: bool = False
    plan: bool = False
    fit: bool = True


def width_ratio(model: ModelConfig) -> float:
    """How many times wider than ``mup_base_width`` the model is: the m of µP's rules."""
    return model.d_model / model.mup_base_width


def rate_is_scaled(model: ModelConfig, optim: OptimConfig) -> bool:
    """Whether the matrices inside the blocks get their rate divided by ``width_ratio``.

    Under µP a step must change what a matrix does by as much at any width.  A step of Adam or
    Lion does more the wider the matrix; one of Muon has the same spectral norm at any width.
    """
    if optim.scale_rate_with_width is not None:
        return optim.scale_rate_with_width
    return model.parametrization == "mup" and optim.kind != "muon"


def typed(composed: DictConfig, overrides: Sequence[str] = ()) -> Config:
    """The composed configuration as dataclasses, checked.

    ``overrides`` are the command line's ``key=value`` strings: a horizon given there replaces the
    one that a recipe brings.  Raises ConfigError.
    """
    composed = composed.copy()
    given = horizon_given(overrides)
    if given:
        for name in HORIZONS:
            composed.train[name] = composed.train[name] if name == given else None
    config = OmegaConf.to_object(composed)
    assert isinstance(config, Config)
    for name in _extra_keys(composed, config):
        raise ConfigError(unknown_key(name, list(key_names(config))))
    if not any(getattr(config.train, name) is not None for name in HORIZONS):
        config.train.tokens = DEFAULT_TOKENS
    check(config)
    return config


def horizon_given(overrides: Sequence[str]) -> str | None:
    """The horizon key that the command line sets, if any; two of them are an error."""
    pairs = [item.lstrip("+").partition("=")[::2] for item in overrides if "=" in item]
    last = dict(pairs)  # of a key given twice the last counts
    given = [f"train.{h}" for h in HORIZONS if last.get(f"train.{h}", "null") != "null"]
    if len(set(given)) > 1:
        raise ConfigError(f"{' and '.join(sorted(set(given)))}: give the horizon once")
    return given[-1].removeprefix("train.") if given else None


def unknown_key(name: str, known: Sequence[str]) -> str:
    """The line for a key that does not exist, with the nearest ones that do."""
    if name in known:
        group = name.split(".")[0]
        return f"{name}: not a key of the chosen {group}"
    last = name.rsplit(".", 1)[-1]
    nearest = [k for k in known if k.rsplit(".", 1)[-1] == last][:2]  # right name, wrong place
    nearest = nearest or difflib.get_close_matches(name, known, n=2, cutoff=0.5)
    hint = f"; did you mean {' or '.join(nearest)}?" if nearest else ""
    return f"{name}: no such key{hint}"


def key_names(section: Any, prefix: str = "") -> Iterator[str]:
    """Dotted names of every leaf of a configuration or of a schema class, but an experiment's
    tables of values."""
    for item in dataclasses.fields(section):
        if item.name == "sweep":
            continue
        value = getattr(section, item.name, None)
        if dataclasses.is_dataclass(value):
            yield from key_names(value, f"{prefix}{item.name}.")
        else:
            yield prefix + item.name


def _extra_keys(composed: DictConfig, config: Any, prefix: str = "") -> Iterator[str]:
    """Keys that Hydra's ``+key=value`` added to a schema that does not have them."""
    names = {item.name for item in dataclasses.fields(config)}
    for key_, value in composed.items():
        name = str(key_)
        if name not in names:
            yield f"{prefix}{name}"
        elif isinstance(value, DictConfig) and dataclasses.is_dataclass(getattr(config, name)):
            yield from _extra_keys(value, getattr(config, name), f"{prefix}{name}.")


def check(config: Config) -> None:
    """Bounds of every key, then what must fit together.  Raises ConfigError, one line."""
    check_bounds(config)
    model, data, train = config.model, config.data, config.train
    given = [f"train.{name}" for name in HORIZONS if getattr(train, name) is not None]
    _require(len(given) == 1, f"{' and '.join(given)}: give the horizon once")
    _divides("model.n_heads", model.n_heads, "model.d_model", model.d_model)
    if model.n_kv_heads is not None:
        _divides("model.n_kv_heads", model.n_kv_heads, "model.n_heads", model.n_heads)
    _require(
        model.position != "rope" or model.d_model // model.n_heads % 2 == 0,
        f"model.n_heads={model.n_heads}: rope needs an even d_model / n_heads, "
        f"here {model.d_model} / {model.n_heads} = {model.d_model // model.n_heads}",
    )
    _divides("model.max_seq_len", model.max_seq_len, "train.batch_tokens", train.batch_tokens)
    stride = data.stride or model.max_seq_len
    _require(
        stride <= model.max_seq_len,
        f"data.stride={stride}: more than model.max_seq_len={model.max_seq_len} would skip tokens",
    )
    _require(
        data.val_fraction + data.test_fraction < 1,
        f"data.val_fraction={data.val_fraction} and data.test_fraction={data.test_fraction}: "
        "their sum must be below 1",
    )
    _require(
        not (isinstance(data, TextData) and data.separator == ""),
        "data.separator='': must be auto, none or a text that separates documents",
    )
    _require(
        len(getattr(config.optim, "betas", (0.0, 0.0))) == 2,
        f"optim.betas={getattr(config.optim, 'betas', None)}: must be two numbers",
    )
    _require(
        not (isinstance(config.optim, SgdOptim) and config.optim.nesterov)
        or getattr(config.optim, "momentum", 0) > 0,
        "optim.nesterov=true: needs optim.momentum above 0",
    )
    mlflow = config.logger.mlflow
    uri = mlflow.tracking_uri if mlflow else None
    _require(
        uri is None
        or re.match(r"(sqlite|postgresql|mysql|mssql|https?)(\+\w+)?://", uri) is not None,
        f"logger.mlflow.tracking_uri={uri}: must be a database or a server, as sqlite:///FILE or "
        "http://HOST:PORT; MLflow takes no folders any more",
    )
    _check_rate_scaling(config)
    _require(
        config.hardware.devices != 0,
        "hardware.devices=0: must be at least 1, or -1 for all there are",
    )
    named = {"study": config.study, "run_name": config.run_name, "data.name": data.name}
    for name, value in named.items():
        _require(
            value is None or re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}", value) is not None,
            f"{name}={value}: must be letters, digits, '.', '_', '-' only, as it names a folder",
        )


def _check_rate_scaling(config: Config) -> None:
    kind, allowed = config.optim.kind, f"allowed with optim={', '.join(SCALED_BY_WIDTH)}"
    holds = kind in SCALED_BY_WIDTH or not rate_is_scaled(config.model, config.optim)
    if config.optim.scale_rate_with_width:
        _require(holds, f"optim.scale_rate_with_width=true: not with optim={kind}; {allowed}")
    line = f"model.parametrization=mup: has no rule for the rates of optim={kind}; {allowed}, muon"
    _require(holds, line)


def check_sweepable(config: Config) -> None:
    """Raises ConfigError for a job that a sweep cannot run.

    Each further process of a run repeats its command: in a sweep it would repeat the sweep.
    """
    hardware = config.hardware
    several = {"devices": hardware.devices, "num_nodes": hardware.num_nodes}
    for name, value in several.items():
        _require(
            value == 1,
            f"hardware.{name}={value}: a sweep runs jobs of one device side by side; "
            f"use hardware.{name}=1, or no --multirun",
        )


def check_bounds(section: Any, prefix: str = "") -> None:
    """Every field of a dataclass against the bounds its ``key`` gave.  Raises ConfigError."""
    for item in dataclasses.fields(section):
        value, name, bounds = getattr(section, item.name), prefix + item.name, item.metadata
        if dataclasses.is_dataclass(value):
            check_bounds(value, name + ".")
            continue
        for one in value if isinstance(value, list) else [value]:
            if one is not None:
                _check_value(name, one, **bounds)


def check_scale(scale: str) -> None:
    """Raises ConfigError where no experiment can have that scale."""
    _check_value("scale", scale, among=SCALES)


def _check_value(
    name: str,
    value: Any,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    among: Sequence[str] | None = None,
) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{name}={value}: must be a finite number")
    if among is not None and value not in among:
        raise ConfigError(f"{name}={value}: must be one of {', '.join(among)}")
    limits = [
        ("at least", least, operator.ge),
        ("above", above, operator.gt),
        ("at most", most, operator.le),
        ("below", below, operator.lt),
    ]
    for words, limit, holds in limits:
        if limit is not None and not holds(value, limit):
            raise ConfigError(f"{name}={value}: must be {words} {limit:.10g}")


def _require(holds: bool, line: str) -> None:
    if not holds:
        raise ConfigError(line)


def _divides(small_key: str, small: int, large_key: str, large: int) -> None:
    _require(large % small == 0, f"{small_key}={small}: must divide {large_key}={large}")


@dataclass(frozen=True)
class Plan:
    """What follows from a configuration once the data is known.  Steps are optimizer steps."""

    total_steps: int
    train_tokens: int
    warmup_steps: int
    eval_steps: int
    checkpoint_steps: int
    keep_steps: int | None
    batch_size: int  # sequences an optimizer step
    micro_batch_size: int  # sequences a pass on one device
    accumulate: int  # passes an optimizer step on one device


def derive(
    config: Config,
    *,
    parameters: int,
    flops_per_token: float,
    windows: int,
    vocab_size: int,
    devices: int = 1,
    pass_tokens: int = 8192,
) -> Plan:
    """Everything counted in steps, from the horizon and the batch, in this one place.

    ``windows`` is the number of training windows of one epoch, ``pass_tokens`` what the device
    takes well in one pass.  Raises ConfigError if the batch cannot be cut up as asked for.
    """
    train, length = config.train, config.model.max_seq_len
    batch_size = train.batch_tokens // length
    total = _total_steps(train, parameters, flops_per_token, windows / batch_size)
    schedule = config.schedule
    if schedule.warmup_steps is not None:
        warmup = schedule.warmup_steps
        _require(
            warmup < total,
            f"schedule.warmup_steps={warmup}: must be below the {total} steps of the run",
        )
    else:
        warmup = int(schedule.warmup_fraction * total)
    eval_steps = _steps(train.eval_every, train.batch_tokens) or math.ceil(total / 10)
    _require(
        batch_size % devices == 0,
        f"hardware.devices={config.hardware.devices}: {devices} devices cannot share the batch of "
        f"{batch_size} sequences evenly (train.batch_tokens={train.batch_tokens} / "
        f"model.max_seq_len={length}); their number must divide it",
    )
    micro = config.hardware.micro_batch_size
    if micro is None:
        # float32 logits of one pass stay below 256 MiB
        largest = min(pass_tokens // length, 2**26 // (length * vocab_size))
        micro = _largest_divisor(batch_size // devices, max(1, largest))
    _require(
        batch_size % (micro * devices) == 0,
        f"hardware.micro_batch_size={micro}: must divide the batch of {batch_size} sequences "
        f"(train.batch_tokens={train.batch_tokens} / model.max_seq_len={length})"
        + (f" on {devices} devices" if devices > 1 else ""),
    )
    return Plan(
        total_steps=total,
        train_tokens=total * train.batch_tokens,
        warmup_steps=warmup,
        eval_steps=eval_steps,
        checkpoint_steps=_steps(train.checkpoint_every, train.batch_tokens) or eval_steps,
        keep_steps=_steps(train.keep_every, train.batch_tokens),
        batch_size=batch_size,
        micro_batch_size=micro,
        accumulate=batch_size // (micro * devices),
    )


def _total_steps(train: TrainConfig, parameters: int, flops_per_token: float, epoch: float) -> int:
    """Whole steps that the horizon pays for; ``epoch`` is the steps of one pass over the data."""
    if train.steps is not None:
        return train.steps
    if train.epochs is not None:
        total = train.epochs * epoch
    elif train.tokens_per_param is not None:
        total = train.tokens_per_param * parameters / train.batch_tokens
    elif train.flops is not None:
        total = train.flops / flops_per_token / train.batch_tokens
    else:
        assert train.tokens is not None
        total = train.tokens / train.batch_tokens
    name = next(h for h in HORIZONS if getattr(train, h) is not None)
    _require(
        total >= 1,
        f"train.{name}={getattr(train, name)}: less than one step of "
        f"train.batch_tokens={train.batch_tokens}",
    )
    _require(
        total <= MOST_STEPS,
        f"train.{name}={getattr(train, name)}: {total:.3g} steps are more than {MOST_STEPS:.0e}",
    )
    return int(total)


def _steps(tokens: int | None, batch_tokens: int) -> int | None:
    return None if tokens is None else max(1, tokens // batch_tokens)


def _largest_divisor(number: int, limit: int) -> int:
    return next((d for d in range(min(number, limit), 0, -1) if number % d == 0), 1)
