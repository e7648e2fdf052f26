"""The configuration schema of ``python -m tinygpt.run``: every key, its type, bounds and default.

A file under ``conf/`` holds only what differs from these defaults.  Imports omegaconf at most, so
that a mistyped key is reported before torch is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Optional

from omegaconf import MISSING

from tinygpt.config.errors import ConfigError
from tinygpt.config.settings import (
    AutoLauncher,
    LocalLauncher,
    LoggerConfig,
    RayLauncher,
    SerialLauncher,
    Settings,
    SlurmLauncher,
    TrainerConfig,
    key,
)

DEFAULT_TOKENS = 2_000_000
HUB_NAME = r"\w[\w.-]*(/[\w.-]+)?"  # how a model on the hub can be called
HORIZONS = ("tokens", "steps", "epochs", "tokens_per_param", "flops")
ACTIVATIONS = ("gelu", "gelu_tanh", "swiglu")
PRECISIONS = ("auto", "32", "64", "bf16-mixed", "16-mixed")
SCALED_BY_WIDTH = ("adamw", "adam", "lion")  # optimizers whose rate goes with 1/width
# The numbers of Llama 3's RoPE scaling.
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


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
    parametrization: str = key("standard", among=("standard", "mup"))  # mup: one rate fits all
    mup_base_width: int = key(64, least=1)  # the width the rate was tuned at


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

    separator: str = "auto"  # auto: <|endoftext|> if there, else sections of about 2,000 characters
    text_column: str = "auto"  # auto: text, else the column with the most prose; a.b, [a,b]

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
    decay_embeddings: bool = True  # norms and biases are never decayed
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
    beta2_decay: float = key(-0.8, least=-1.0, below=0.0)  # step n keeps 1 - n^beta2_decay
    least_rms: float = key(1e-3, above=0.0)  # what a parameter near zero counts as
    clip_threshold: float = key(1.0, least=1.0)  # the largest RMS of an update


@dataclass
class MuonOptim(OptimConfig):
    """``learning_rate`` is that of the matrices inside the blocks (Jordan et al. 2024); AdamW moves
    the rest."""

    kind: str = key("muon", among=("muon",))
    momentum: float = key(0.95, least=0.0, below=1.0)
    nesterov: bool = True
    ns_steps: int = key(5, least=1, most=99)  # Newton-Schulz iterations
    adam_learning_rate: float = key(1e-2, above=0.0)  # of all the rest, as betas and eps
    betas: list[float] = key([0.9, 0.95], least=0.0, below=1.0)  # noqa: RUF009
    eps: float = key(1e-8, above=0.0)


@dataclass
class ScheduleConfig:
    """The learning rate by step: a linear warmup, then what the kind says."""

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
    """The training recipe.  Its horizon, tokens to flops, is given once; default: tokens."""

    tokens: Optional[int] = key(None, least=1, most=10**18)
    steps: Optional[int] = key(None, least=1, most=10**12)
    epochs: Optional[float] = key(None, above=0.0)
    tokens_per_param: Optional[float] = key(None, above=0.0)  # counts all parameters
    flops: Optional[float] = key(None, above=0.0)  # exact, of forward and backward
    batch_tokens: int = key(2048, least=1)  # an optimizer step
    precision: str = key("auto", among=PRECISIONS)
    grad_clip_norm: Optional[float] = key(1.0, above=0.0)
    skip_nonfinite: bool = False  # leave out a step whose gradient is not finite, and count it
    log_every: int = key(10, least=1)  # optimizer steps
    eval_every: Optional[int] = key(None, least=1)  # tokens; null: a tenth of the horizon
    # Of the training time, for evaluations between the first and the last: where all validation
    # windows would take more, they score every k-th.  null: they score all.
    eval_share: Optional[float] = key(0.1, above=0.0)
    checkpoint_every: Optional[int] = key(None, least=1)  # tokens; null: eval_every
    keep_every: Optional[int] = key(None, least=1)  # tokens; keeps step_<N>.ckpt; null: none
    early_stopping_patience: Optional[int] = key(None, least=1)  # evaluations; null: off
    sample_prompt: str = ""  # empty: from the beginning of a document
    sample_tokens: int = key(120, least=0)  # 0: no samples


@dataclass
class Config(Settings):
    """The configuration of a run, as ``config.yaml`` in its folder keeps it."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = MISSING
    tokenizer: TokenizerConfig = MISSING
    optim: OptimConfig = MISSING
    schedule: ScheduleConfig = MISSING
    train: TrainConfig = field(default_factory=TrainConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    # the user's own, each by its _target_ and its arguments: +callbacks.ema._target_=my_code.EMA
    callbacks: dict[str, Any] = field(default_factory=dict)
    # weights to begin with: a run, one of its checkpoints, a Hugging Face folder or a model on the
    # hub (GPT-2 or Llama); it brings its own shape and tokenizer
    init_from: Optional[str] = None

    @property
    def steps(self) -> int:
        """Return the number of optimizer steps.  Raise ConfigError if only the data decides it."""
        train = self.train
        if train.steps is not None:
            return train.steps
        if train.tokens is not None:
            return train.tokens // train.batch_tokens
        raise ConfigError(
            "steps: follows from the data; after data.prepare_data() and data.setup() it is "
            "data.plan.total_steps"
        )


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
        "auto": AutoLauncher,
        "serial": SerialLauncher,
        "local": LocalLauncher,
        "slurm": SlurmLauncher,
        "ray": RayLauncher,
    },
    "schedule": {"constant": ConstantSchedule, "decay": DecaySchedule, "wsd": WsdSchedule},
}


def variant(group: str, values: Mapping[str, Any]) -> type:
    """Return the dataclass whose ``kind`` (of data: ``source``) is that of ``values``.

    Raises ConfigError where there is none.
    """
    name = "source" if group == "data" else "kind"
    for choice in CHOICES[group].values():
        kinds = {f.name: f.metadata.get("among", ()) for f in fields(choice)}[name]
        if values.get(name) in kinds:
            return choice
    raise ConfigError(f"{group}.{name}={values.get(name)}: no such {group}")


def width_ratio(model: ModelConfig) -> float:
    """Return how many times wider than ``mup_base_width`` the model is: the m of µP's rules."""
    return model.d_model / model.mup_base_width


def rate_is_scaled(model: ModelConfig, optim: OptimConfig) -> bool:
    """Return whether the learning rate of the matrices in the blocks is divided by ``width_ratio``.

    Under µP a step must change what a matrix does by as much at any width.  A step of Adam or
    Lion does more the wider the matrix; one of Muon has the same spectral norm at any width.
    """
    if optim.scale_rate_with_width is not None:
        return optim.scale_rate_with_width
    return model.parametrization == "mup" and optim.kind != "muon"
