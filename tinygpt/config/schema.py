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
BETAS = "decay rates of the averages of gradient and squared gradient"


@dataclass
class ModelConfig:
    """The shape of a decoder-only transformer.  The vocabulary comes from the tokenizer."""

    n_layers: int = key(2, "number of blocks", least=1)
    d_model: int = key(64, "width of the residual stream", least=1)
    n_heads: int = key(4, "attention heads; must divide d_model", least=1)
    n_kv_heads: Optional[int] = key(None, "key and value heads; null: as many as n_heads", least=1)
    d_ff: Optional[int] = key(None, "width of the MLP; null: 4·d_model, SwiGLU: 2/3 of it", least=1)
    max_seq_len: int = key(256, "context length in tokens", least=1)
    dropout: float = key(0.0, "probability of dropping an activation", least=0.0, below=1.0)
    bias: bool = key(True, "biases in linear layers and in LayerNorm")
    tie_weights: bool = key(True, "use the token embedding as the output head")
    position: str = key("learned", "position encoding", among=("learned", "rope"))
    rope_theta: float = key(10000.0, "base of the RoPE frequencies", above=0.0)
    rope_scaling: Optional[dict[str, float]] = key(None, "Llama 3's factors for a longer context")
    norm: str = key("layernorm", "normalization", among=("layernorm", "rmsnorm"))
    norm_eps: float = key(1e-5, "added to the variance in each norm", above=0.0)
    activation: str = key("gelu", "activation of the MLP", among=ACTIVATIONS)
    attention: str = key("sdpa", "attention implementation", among=("sdpa", "manual"))
    gradient_checkpointing: bool = key(False, "recompute activations to save memory")
    pad_vocab_to_multiple: int = key(1, "round the rows of the embedding up to this", least=1)
    parametrization: str = key(
        "standard", "mup: one rate for every width", among=("standard", "mup")
    )
    mup_base_width: int = key(64, "width at which the learning rate was tuned", least=1)


@dataclass
class DataConfig:
    """The text, and how much of it is used."""

    source: str = key(MISSING, "kind of corpus, set by data=")
    name: str = key(MISSING, "name of the data set in results.json")
    fraction: float = key(
        1.0, "share of the training documents, from the first", above=0.0, most=1.0
    )
    stride: Optional[int] = key(None, "tokens between windows; null: model.max_seq_len", least=1)
    max_tokens: Optional[int] = key(None, "training tokens to prepare; null: all", least=1)
    max_documents: Optional[int] = key(None, "documents to read; null: all", least=1)
    eval_tokens: Optional[int] = key(
        100_000, "tokens to validate on, and to test on; null: all", least=1
    )
    val_fraction: float = key(0.05, "share of documents for validation", above=0.0, below=1.0)
    test_fraction: float = key(0.05, "share of documents for the test", least=0.0, below=1.0)
    val_is_test: bool = key(False, "use the validation split as the test split too")


@dataclass
class SyntheticData(DataConfig):
    """The embedded corpus: stories from a seeded grammar, with an exactly known entropy."""

    source: str = key("synthetic", among=("synthetic",))
    corpus_seed: int = key(0, "seed of the grammar and its stories", least=0)
    n_facts: int = key(16384, "facts that stories may state", least=1)
    zipf_exponent: float = key(
        1.2, "the r-th most frequent fact is as likely as r^-this", least=0.0
    )
    noise_rate: float = key(0.05, "probability that a fact is stated wrongly", least=0.0, below=1.0)
    heldout_entities: int = key(64, "entities that no story mentions, for adaptation", least=0)


def unescaped(text: str) -> str:
    """Return ``text`` with the characters that a backslash and n, t, r or another one stand for."""
    typed = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}
    return re.sub(r"\\([ntr\\])", lambda found: typed[found[1]], text)


@dataclass
class TextData(DataConfig):
    """Text that somebody wrote: how a file or a row becomes documents."""

    separator: str = key(
        "auto",
        "auto: <|endoftext|> if present, else sections of about 2,000 characters; none; a text",
    )
    text_column: str = key(
        "auto", "column of the text; auto: text, else the column with the most prose; a.b; [a,b]"
    )

    def __post_init__(self) -> None:
        """Read a backslash with n, t, r or another one as the character that it stands for."""
        self.separator = unescaped(self.separator)


@dataclass
class HubData(TextData):
    """A text data set of the Hugging Face hub, or a local folder laid out like one."""

    source: str = key("hub", among=("hub",))
    repo: str = key(MISSING, "owner/name on the hub")
    config: Optional[str] = key(None, "configuration of the data set")
    split: str = key("train", "split to train on")
    val_split: Optional[str] = key(
        "auto", "auto: validation, if there is one; null: cut from split"
    )
    test_split: Optional[str] = key("auto", "auto: test, if there is one; null: cut from split")
    revision: Optional[str] = key(None, "branch, tag or commit of the data set")


@dataclass
class CustomData(TextData):
    """Files, a glob or a folder: text, .jsonl, .json, .csv, .tsv, .parquet, compressed or not."""

    source: str = key("custom", among=("custom",))
    path: str = key(MISSING, "file, folder, glob or [list] of them")
    encoding: Optional[str] = key(None, "null: UTF-8, or what a byte order mark says")
    delimiter: Optional[str] = key(None, "between the values of a table; null: detected")
    header: Optional[bool] = key(None, "whether a table starts with names; null: detected")
    val_file: Optional[str] = key(None, "files to validate on; null: cut from path")
    test_file: Optional[str] = key(None, "files for the test; null: cut from path")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.delimiter is not None:
            self.delimiter = unescaped(self.delimiter)


@dataclass
class TokenizerConfig:
    """Say how text becomes tokens."""

    kind: str = key(MISSING, "kind of tokenizer, set by tokenizer=")


@dataclass
class BpeTokenizer(TokenizerConfig):
    """Byte-level byte-pair encoding (Sennrich et al. 2016), trained on the corpus."""

    kind: str = key("bpe", among=("bpe",))
    vocab_size: int = key(1024, "tokens, including 256 bytes and two special tokens", least=258)
    train_bytes: int = key(50_000_000, "bytes of training text to learn from", least=1)


@dataclass
class CharTokenizer(TokenizerConfig):
    """One token per character of the training text."""

    kind: str = key("char", among=("char",))
    train_bytes: int = key(50_000_000, "bytes of training text to learn from", least=1)


@dataclass
class ByteTokenizer(TokenizerConfig):
    """One token per byte of UTF-8."""

    kind: str = key("byte", among=("byte",))


@dataclass
class Gpt2Tokenizer(TokenizerConfig):
    """The vocabulary of GPT-2 (Radford et al. 2019), 50,257 tokens."""

    kind: str = key("gpt2", among=("gpt2",))
    vocab_dir: Optional[str] = key(
        None, "folder with encoder.json and vocab.bpe; null: by tiktoken"
    )


@dataclass
class SavedTokenizer(TokenizerConfig):
    """A tokenizer that was trained before."""

    kind: str = key("saved", among=("saved",))
    path: str = key(MISSING, "tokenizer.json, or the folder of a run or of a Hugging Face model")


@dataclass
class LoraConfig:
    """Low-rank adapters are trained, and the weights of ``init_from`` kept (Hu et al. 2021)."""

    rank: Optional[int] = key(None, "rank of the adapters; null: train all weights", least=1)
    alpha: Optional[int] = key(None, "scale: W + alpha/rank·B·A; null: 2·rank", least=1)


@dataclass
class OptimConfig:
    """The optimizer."""

    kind: str = key(MISSING, "kind of optimizer, set by optim=")
    lora: LoraConfig = field(default_factory=LoraConfig)
    learning_rate: float = key(1e-3, "peak learning rate", above=0.0)
    weight_decay: float = key(0.1, "weight decay", least=0.0)
    decay_embeddings: bool = key(True, "decay embeddings too; norms and biases are never decayed")
    scale_rate_with_width: Optional[bool] = key(
        None, "divide the matrices' rate by width; null: under µP"
    )


@dataclass
class AdamOptim(OptimConfig):
    """Adam (Kingma & Ba 2015); adamw: decay apart from the gradient (Loshchilov & Hutter 2019)."""

    kind: str = key("adamw", among=("adamw", "adam"))
    betas: list[float] = key([0.9, 0.95], BETAS, least=0.0, below=1.0)
    eps: float = key(1e-8, "added to the denominator", above=0.0)


@dataclass
class SgdOptim(OptimConfig):
    """Stochastic gradient descent with momentum."""

    kind: str = key("sgd", among=("sgd",))
    momentum: float = key(0.9, "momentum", least=0.0, below=1.0)
    nesterov: bool = key(True, "use Nesterov momentum")


@dataclass
class LionOptim(OptimConfig):
    """The sign of a momentum (Chen et al. 2023)."""

    kind: str = key("lion", among=("lion",))
    betas: list[float] = key([0.9, 0.99], BETAS, least=0.0, below=1.0)


@dataclass
class AdafactorOptim(OptimConfig):
    """``learning_rate`` is relative: a step is at most so much of a parameter's own RMS
    (Shazeer & Stern 2018)."""

    kind: str = key("adafactor", among=("adafactor",))
    beta2_decay: float = key(-0.8, "step n keeps 1 - n^this of the average", least=-1.0, below=0.0)
    least_rms: float = key(1e-3, "RMS that a parameter near zero counts as", above=0.0)
    clip_threshold: float = key(1.0, "largest RMS of an update", least=1.0)


@dataclass
class MuonOptim(OptimConfig):
    """``learning_rate`` is that of the matrices inside the blocks (Jordan et al. 2024); AdamW moves
    the rest."""

    kind: str = key("muon", among=("muon",))
    momentum: float = key(0.95, "momentum of the matrices", least=0.0, below=1.0)
    nesterov: bool = key(True, "use Nesterov momentum")
    ns_steps: int = key(5, "Newton-Schulz iterations", least=1, most=99)
    adam_learning_rate: float = key(1e-2, "peak learning rate of all other weights", above=0.0)
    betas: list[float] = key([0.9, 0.95], BETAS, least=0.0, below=1.0)
    eps: float = key(1e-8, "added to AdamW's denominator", above=0.0)


@dataclass
class ScheduleConfig:
    """The learning rate by step: a linear warmup, then what the kind says."""

    kind: str = key(MISSING, "kind of schedule, set by schedule=")
    warmup_steps: Optional[int] = key(None, "null: warmup_fraction of all steps", least=0)
    warmup_fraction: float = key(0.05, "share of the steps that warm up", least=0.0, below=1.0)


@dataclass
class ConstantSchedule(ScheduleConfig):
    """The peak rate to the end."""

    kind: str = key("constant", among=("constant",))


@dataclass
class DecaySchedule(ScheduleConfig):
    """A decay from the peak to the last step, along a cosine or a line."""

    kind: str = key("cosine", among=("cosine", "linear"))
    min_ratio: float = key(0.1, "last rate, as a share of the peak", least=0.0, most=1.0)


@dataclass
class WsdSchedule(ScheduleConfig):
    """Warmup, stable, decay: at its peak, then linearly down (Hu et al. 2024)."""

    kind: str = key("wsd", among=("wsd",))
    min_ratio: float = key(0.1, "last rate, as a share of the peak", least=0.0, most=1.0)
    decay_fraction: float = key(0.2, "share of the steps that decay", above=0.0, most=1.0)


@dataclass
class TrainConfig:
    """The training recipe.  Its horizon, tokens to flops, is given once; default: tokens."""

    tokens: Optional[int] = key(None, "training tokens", least=1, most=10**18)
    steps: Optional[int] = key(None, "optimizer steps", least=1, most=10**12)
    epochs: Optional[float] = key(None, "passes over the training text", above=0.0)
    tokens_per_param: Optional[float] = key(None, "counting embeddings too", above=0.0)
    flops: Optional[float] = key(None, "exact FLOPs of forward and backward", above=0.0)
    batch_tokens: int = key(2048, "tokens per optimizer step", least=1)
    precision: str = key("auto", "auto: bf16 where the GPU has it, else 32", among=PRECISIONS)
    grad_clip_norm: Optional[float] = key(1.0, "clip gradients to this norm; null: off", above=0.0)
    skip_nonfinite: bool = key(False, "skip a step whose gradient is not finite, and count it")
    log_every: int = key(10, "optimizer steps between lines of metrics.csv", least=1)
    eval_every: Optional[int] = key(None, "tokens; null: a tenth of the horizon", least=1)
    eval_share: Optional[float] = key(
        0.1,
        "share of the training time for validations between the first and the last, which score "
        "every k-th window if all would take longer; null: all windows",
        above=0.0,
    )
    checkpoint_every: Optional[int] = key(None, "tokens; null: eval_every", least=1)
    keep_every: Optional[int] = key(None, "tokens; keeps step_<N>.ckpt; null: none", least=1)
    early_stopping_patience: Optional[int] = key(None, "validations; null: off", least=1)
    sample_prompt: str = key("", "how samples begin; empty: as a document does")
    sample_tokens: int = key(120, "tokens of each sample; 0: no samples", least=0)


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
    callbacks: dict[str, Any] = key({}, "your own: +callbacks.ema._target_=my_code.EMA")
    init_from: Optional[str] = key(
        None,
        "weights to start from, with their shape and tokenizer: a run, a checkpoint, a Hugging "
        "Face folder, or a GPT-2 or Llama on the hub",
    )

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

    repetition_penalty: float = key(
        1.0, "above 1: tokens of the context are less likely", above=0.0
    )
    temperature: float = key(0.8, "0: always the most likely token", least=0.0)
    top_k: Optional[int] = key(50, "draw from this many of the most likely; null: all", least=1)
    top_p: float = key(1.0, "draw from the most likely that make up this", above=0.0, most=1.0)
    min_p: float = key(0.0, "draw from those with this share of the top one", least=0.0, most=1.0)


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
