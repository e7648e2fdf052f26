"""The configuration schema: every key, its type and its bounds.

The YAML files under ``conf/`` carry values; this module says what is allowed, ``checks.py`` what
must fit together, ``horizon.py`` what follows in steps.  It imports
omegaconf at most, so that a mistyped key is reported before torch is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Optional, Protocol

from omegaconf import MISSING

DEFAULT_TOKENS = 2_000_000
HUB_NAME = r"\w[\w.-]*(/[\w.-]+)?"  # how a model on the hub can be called
HORIZONS = ("tokens", "steps", "epochs", "tokens_per_param", "flops")
ACTIVATIONS = ("gelu", "gelu_tanh", "swiglu")
PRECISIONS = ("auto", "32", "64", "bf16-mixed", "16-mixed")
SCALES = ("smoke", "laptop", "gpu")
SCALED_BY_WIDTH = ("adamw", "adam", "lion")  # optimizers whose rate goes with 1/width
# The numbers of Llama 3's RoPE scaling.
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


class ConfigError(ValueError):
    """Something the user asked for cannot be had: one line that names the key, the bad value
    and what is allowed.  Commands print it and leave with exit code 2."""


class RunError(RuntimeError):
    """A run failed after it had begun; one line.  Commands leave with exit code 1."""


def install(extra: str) -> str:
    """How to get what an extra of pyproject.toml brings: no index has a tinygpt to ask for."""
    return f"`pip install -e '.[{extra}]'` in the folder of tinygpt"


def is_out_of_memory(error: BaseException) -> bool:
    """Of the graphics card or of the machine, for which torch has no class."""
    if isinstance(error, MemoryError):
        return True
    words = ("out of memory", "you tried to allocate")
    return isinstance(error, RuntimeError) and any(some in str(error) for some in words)


def one_line(error: BaseException) -> str:
    """All that it says."""
    return " ".join(str(error).split())


def first_line(error: BaseException) -> str:
    """Of what a library says at length; its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


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
    rope_scaling: Optional[dict[str, float]] = None  # Llama 3's factors for a longer context
    norm: str = key("layernorm", among=("layernorm", "rmsnorm"))
    norm_eps: float = key(1e-5, above=0.0)  # added to the variance
    activation: str = key("gelu", among=ACTIVATIONS)
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


def unescaped(text: str) -> str:
    """Return ``text`` with the characters that a backslash and n, t, r or another one stand for."""
    typed = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}
    return re.sub(r"\\([ntr\\])", lambda found: typed[found[1]], text)


@dataclass
class TextData(DataConfig):
    """Text that somebody wrote: how a file or a row becomes documents."""

    separator: str = "auto"
    text_column: str = "auto"

    def __post_init__(self) -> None:
        """Read a backslash with n, t, r or another one as the character that it stands for."""
        self.separator = unescaped(self.separator)


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
    """Files, a glob or a folder: text, .jsonl, .json, .csv, .tsv, .parquet, packed or not."""

    source: str = key("custom", among=("custom",))
    path: str = MISSING
    encoding: Optional[str] = None  # null: UTF-8, or what a byte order mark says
    delimiter: Optional[str] = None  # of values in .csv and .tsv; null: detected
    header: Optional[bool] = None  # whether .csv and .tsv begin with names; null: detected
    val_file: Optional[str] = None
    test_file: Optional[str] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.delimiter is not None:
            self.delimiter = unescaped(self.delimiter)


@dataclass
class TokenizerConfig:
    kind: str = MISSING


@dataclass
class BpeTokenizer(TokenizerConfig):
    """Byte-level byte-pair encoding (Sennrich et al. 2016), trained on the corpus."""

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
    """The vocabulary of GPT-2 (Radford et al. 2019), 50,257 tokens."""

    kind: str = key("gpt2", among=("gpt2",))
    vocab_dir: Optional[str] = None  # folder with encoder.json and vocab.bpe; null: by tiktoken


@dataclass
class SavedTokenizer(TokenizerConfig):
    kind: str = key("saved", among=("saved",))
    path: str = MISSING  # tokenizer.json, or the folder of a run or of a Hugging Face model


@dataclass
class LoraConfig:
    """Adapters of low rank are trained, and the weights of ``init_from`` kept (Hu et al. 2021)."""

    rank: Optional[int] = key(None, least=1)  # null: none, all weights are trained
    alpha: Optional[int] = key(None, least=1)  # W + alpha/rank·B·A; null: 2·rank


@dataclass
class OptimConfig:
    kind: str = MISSING
    lora: LoraConfig = field(default_factory=LoraConfig)
    learning_rate: float = key(1e-3, above=0.0)
    weight_decay: float = key(0.1, least=0.0)
    decay_embeddings: bool = True
    scale_rate_with_width: Optional[bool] = None  # null: as model.parametrization needs it


@dataclass
class AdamOptim(OptimConfig):
    """Adam (Kingma & Ba 2015); adamw: decay apart from the gradient (Loshchilov & Hutter 2019)."""

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
    """The sign of a momentum (Chen et al. 2023)."""

    kind: str = key("lion", among=("lion",))
    betas: list[float] = key([0.9, 0.99], least=0.0, below=1.0)  # noqa: RUF009


@dataclass
class AdafactorOptim(OptimConfig):
    """``learning_rate`` is relative: a step is at most so much of a parameter's own RMS
    (Shazeer & Stern 2018)."""

    kind: str = key("adafactor", among=("adafactor",))
    beta2_decay: float = key(-0.8, least=-1.0, below=0.0)
    least_rms: float = key(1e-3, above=0.0)
    clip_threshold: float = key(1.0, least=1.0)


@dataclass
class MuonOptim(OptimConfig):
    """``learning_rate`` is that of the matrices inside the blocks (Jordan et al. 2024); AdamW moves
    the rest."""

    kind: str = key("muon", among=("muon",))
    momentum: float = key(0.95, least=0.0, below=1.0)
    nesterov: bool = True
    ns_steps: int = key(5, least=1, most=99)
    adam_learning_rate: float = key(1e-2, above=0.0)
    betas: list[float] = key([0.9, 0.95], least=0.0, below=1.0)  # noqa: RUF009
    eps: float = key(1e-8, above=0.0)


@dataclass
class ScheduleConfig:
    """How the learning rate goes with the step: a linear warmup, then what the kind says."""

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
    """Warmup, stable, decay: at its peak, then linearly down (Hu et al. 2024)."""

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
    skip_nonfinite: bool = False  # leave out a step whose gradient is not finite, and count it
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
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    # the user's own, each by its _target_ and its arguments: +callbacks.ema._target_=my_code.EMA
    callbacks: dict[str, Any] = field(default_factory=dict)
    scale: str = key("laptop", among=SCALES)
    init_from: Optional[str] = None  # a run, or a Hugging Face model, whose weights it begins with
    seed: int = key(42, least=0, most=2**32 - 1)
    study: Optional[str] = None
    run_name: Optional[str] = None
    output_dir: str = "outputs"
    cache_dir: Optional[str] = None
    force: bool = False
    plan: bool = False
    fit: bool = True

    @property
    def steps(self) -> int:
        """The number of optimizer steps.  Raises ConfigError where only the data decides it."""
        train = self.train
        if train.steps is not None:
            return train.steps
        if train.tokens is not None:
            return train.tokens // train.batch_tokens
        raise ConfigError(
            "steps: follows from the data; after data.prepare_data() and data.setup() it is "
            "data.plan.total_steps"
        )


class Settings(Protocol):
    """What every command that can be swept has in its configuration: where it runs, how it is
    called and kept."""

    hardware: HardwareConfig
    launcher: LauncherConfig
    sweep: SweepConfig
    scale: str
    seed: int
    study: Optional[str]
    run_name: Optional[str]
    output_dir: str
    cache_dir: Optional[str]
    force: bool
    plan: bool
    fit: bool


@dataclass
class Sampling:
    """How the next token is chosen, in this order; the names are Hugging Face's.

    The defaults are those of ``samples.txt``.
    """

    repetition_penalty: float = key(1.0, above=0.0)  # of tokens in the context; 1: none
    temperature: float = key(0.8, least=0.0)  # 0: always the likeliest
    top_k: Optional[int] = key(50, least=1)  # of so many of the likeliest; null: of all
    top_p: float = key(1.0, above=0.0, most=1.0)  # of the likeliest that make up this probability
    min_p: float = key(0.0, least=0.0, most=1.0)  # of those with this share of the likeliest's


# Keys and values that are no more, each with what to use instead.
REMOVED = {
    "sweep.stack": "runs go side by side with launcher=local launcher.n_jobs=2",
    "hardware.strategy=fsdp": "hardware.strategy=ddp shares the batch out over the devices",
    "hardware.allocator": "freed memory is always kept for the next step",
    "hardware.matmul": "TINYGPT_MATMUL=torch in the environment switches oneDNN off",
    **dict.fromkeys(
        [f"hardware.compile={how}" for how in ("regional", "whole", "graphs")],
        "hardware.compile=on compiles the whole model",
    ),
    "policy=table": "policy=self draws each choice from the model's own logits",
    "outer.shared": "the base that adapts is always the run itself",
    "tuning.directives": "tuning.learning_rates= lists what is tried on the tune documents",
    **dict.fromkeys(
        ["methods=uniform_directive", "methods=fixed_best_directive"],
        "methods=[lora_doc,restem] compares the document with learned directives",
    ),
    "estimator=absolute": "estimator=likelihood comes to the same law",
    "threshold_unit": "threshold= is in units of the noise",
}
# Flags of Lightning's Trainer that the recipe decides, by the keys that do.
DECIDED = {
    "trainer.max_steps": "train.steps",
    "trainer.max_epochs": "train.epochs",
    "trainer.accumulate_grad_batches": "hardware.micro_batch_size",
    "trainer.precision": "train.precision",
    "trainer.gradient_clip_val": "train.grad_clip_norm",
    "trainer.log_every_n_steps": "train.log_every",
    "trainer.val_check_interval": "train.eval_every",
    "trainer.logger": "logger",
    "trainer.callbacks": "+callbacks.NAME._target_",
    **{
        f"trainer.{name}": f"hardware.{name}"
        for name in ("accelerator", "devices", "num_nodes", "strategy")
    },
}
# The variants of each group, by their name in conf/.
CHOICES: dict[str, dict[str, type]] = {
    "data": {"synthetic": SyntheticData, "hub": HubData, "custom": CustomData},
    "tokenizer": {
        "bpe": BpeTokenizer,
        "char": CharTokenizer,
        "byte": ByteTokenizer,
        "gpt2": Gpt2Tokenizer,
        "saved": SavedTokenizer,
    },
    "optim": {
        "adam": AdamOptim,
        "sgd": SgdOptim,
        "lion": LionOptim,
        "adafactor": AdafactorOptim,
        "muon": MuonOptim,
    },
    "launcher": {
        "serial": SerialLauncher,
        "local": LocalLauncher,
        "slurm": SlurmLauncher,
        "ray": RayLauncher,
    },
    "schedule": {"constant": ConstantSchedule, "decay": DecaySchedule, "wsd": WsdSchedule},
}


def variant(group: str, values: Mapping[str, Any]) -> type:
    """The dataclass whose ``kind`` (of data: ``source``) is that of ``values``.

    Raises ConfigError where there is none.
    """
    name = "source" if group == "data" else "kind"
    for choice in CHOICES[group].values():
        kinds = {f.name: f.metadata.get("among", ()) for f in fields(choice)}[name]
        if values.get(name) in kinds:
            return choice
    raise ConfigError(f"{group}.{name}={values.get(name)}: no such {group}")


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
