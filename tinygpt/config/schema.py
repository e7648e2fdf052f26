"""Define every key of ``python -m tinygpt.run`` with its type, bounds, default and description.

A file under ``conf/`` holds only what differs from these defaults.  This module imports nothing
slow, so that a mistyped key is reported before torch is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Optional

from omegaconf import MISSING

from tinygpt.config.errors import ConfigError
from tinygpt.config.settings import LAUNCHERS, LoggerConfig, Settings, TrainerConfig, key

DEFAULT_TOKENS = 2_000_000
HUB_NAME = r"\w[\w.-]*(/[\w.-]+)?"  # how a model on the hub can be called
HORIZONS = ("tokens", "steps", "epochs", "tokens_per_param", "flops")
ACTIVATIONS = ("gelu", "gelu_tanh", "swiglu")
PRECISIONS = ("auto", "32", "64", "bf16-mixed", "16-mixed")
SCALED_BY_WIDTH = ("adamw", "adam", "lion")  # optimizers whose rate goes with 1/width
# The numbers of Llama 3's RoPE scaling.
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
BETAS = "Decay rates of the moving averages of the gradient and its square."


@dataclass
class ModelConfig:
    """Set the shape of a decoder-only transformer.  The tokenizer decides the vocabulary."""

    n_layers: int = key(2, "Number of transformer blocks.", least=1)
    d_model: int = key(64, "Width of the residual stream.", least=1)
    n_heads: int = key(4, "Attention heads per block; must divide d_model.", least=1)
    n_kv_heads: Optional[int] = key(None, "Heads of keys and values; null means n_heads.", least=1)
    d_ff: Optional[int] = key(None, "MLP width; null means 4·d_model (SwiGLU: 2/3 of it).", least=1)
    max_seq_len: int = key(256, "Context length in tokens.", least=1)
    dropout: float = key(0.0, "Probability of zeroing an activation.", least=0.0, below=1.0)
    bias: bool = key(True, "Give linear layers and LayerNorm a bias.")
    tie_weights: bool = key(True, "Use the token embedding as the output layer too.")
    position: str = key("learned", "How positions are encoded.", among=("learned", "rope"))
    rope_theta: float = key(10000.0, "Base of the rotation frequencies under rope.", above=0.0)
    rope_scaling: Optional[dict[str, float]] = key(None, "Scaling of RoPE as in Llama 3.")
    norm: str = key("layernorm", "Kind of normalization layer.", among=("layernorm", "rmsnorm"))
    norm_eps: float = key(1e-5, "Constant added to the variance in each norm.", above=0.0)
    activation: str = key("gelu", "Activation function of the MLP.", among=ACTIVATIONS)
    attention: str = key("sdpa", "Torch's fused kernel, or plain code.", among=("sdpa", "manual"))
    gradient_checkpointing: bool = key(False, "Recompute activations to save memory.")
    pad_vocab_to_multiple: int = key(1, "Pad the vocabulary to a multiple of this.", least=1)
    parametrization: str = key(
        "standard", "With mup, one learning rate suits every width.", among=("standard", "mup")
    )
    mup_base_width: int = key(64, "Width at which mup's learning rate was tuned.", least=1)


@dataclass
class DataConfig:
    """Choose the text, and how much of it to use."""

    source: str = key(MISSING, "Kind of corpus; set by data=.")
    name: str = key(MISSING, "Name of the data set in results.json.")
    fraction: float = key(1.0, "Share of the training documents to use.", above=0.0, most=1.0)
    stride: Optional[int] = key(None, "Tokens between windows; null means max_seq_len.", least=1)
    max_tokens: Optional[int] = key(None, "Most training tokens to use; null means all.", least=1)
    max_documents: Optional[int] = key(None, "Most documents to read; null means all.", least=1)
    eval_tokens: Optional[int] = key(
        100_000, "Tokens to validate on, and as many to test on; null means all.", least=1
    )
    val_fraction: float = key(0.05, "Share of documents kept for validation.", above=0.0, below=1.0)
    test_fraction: float = key(0.05, "Share of documents kept for the test.", least=0.0, below=1.0)
    val_is_test: bool = key(False, "Use the validation split as the test split too.")


@dataclass
class SyntheticData(DataConfig):
    """Use the embedded corpus: stories from a seeded grammar, whose entropy is known exactly."""

    source: str = key("synthetic", among=("synthetic",))
    corpus_seed: int = key(0, "Seed of the grammar and its stories.", least=0)
    n_facts: int = key(16384, "Number of facts that stories draw on.", least=1)
    zipf_exponent: float = key(1.2, "Facts have frequencies of r^-this, by rank r.", least=0.0)
    noise_rate: float = key(0.05, "Chance that a story misstates a fact.", least=0.0, below=1.0)
    heldout_entities: int = key(64, "Entities kept out of the stories, for adaptation.", least=0)


def unescaped(text: str) -> str:
    r"""Return ``text`` with the escapes \n, \t, \r and \\ replaced by their characters."""
    characters = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}
    return re.sub(r"\\([ntr\\])", lambda match: characters[match[1]], text)


@dataclass
class TextData(DataConfig):
    """Say how files and rows of a table become documents."""

    separator: str = key(
        "auto",
        "Text between documents, or none if a file is one; auto takes <|endoftext|> if present, "
        "else cuts sections of about 2,000 characters.",
    )
    text_column: str = key(
        "auto", "Column of the text, also a.b or [a,b]; auto takes text, else the most prose."
    )

    def __post_init__(self) -> None:
        self.separator = unescaped(self.separator)


@dataclass
class HubData(TextData):
    """Use a text data set of the Hugging Face hub, or a local folder laid out like one."""

    source: str = key("hub", among=("hub",))
    repo: str = key(MISSING, "Name of the data set on the hub, as owner/name.")
    config: Optional[str] = key(None, "Configuration of the data set, where it has several.")
    split: str = key("train", "Split to train on.")
    val_split: Optional[str] = key(
        "auto", "Split to validate on; auto is validation if any, null cuts it from split."
    )
    test_split: Optional[str] = key(
        "auto", "Split to test on; auto is test if there is one, null cuts it from split."
    )
    revision: Optional[str] = key(None, "Branch, tag or commit; null means the newest.")


@dataclass
class CustomData(TextData):
    """Use your own files: text, .jsonl, .json, .csv, .tsv or .parquet, compressed or not."""

    source: str = key("custom", among=("custom",))
    path: str = key(MISSING, "File, folder, glob or [list] of them.")
    encoding: Optional[str] = key(None, "Text encoding; null means UTF-8 or the byte order mark's.")
    delimiter: Optional[str] = key(None, "Character between a table's values; null detects it.")
    header: Optional[bool] = key(None, "Whether a table starts with column names; null detects it.")
    val_file: Optional[str] = key(None, "Files to validate on; null cuts a part from path.")
    test_file: Optional[str] = key(None, "Files to test on; null cuts a part from path.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.delimiter is not None:
            self.delimiter = unescaped(self.delimiter)


@dataclass
class TokenizerConfig:
    """Say how text becomes tokens."""

    kind: str = key(MISSING, "Kind of tokenizer; set by tokenizer=.")


@dataclass
class BpeTokenizer(TokenizerConfig):
    """Train a byte-level byte-pair encoding (Sennrich et al. 2016) on the corpus."""

    kind: str = key("bpe", among=("bpe",))
    vocab_size: int = key(1024, "Vocabulary size, with 256 bytes and 2 special tokens.", least=258)
    train_bytes: int = key(50_000_000, "Bytes of training text to learn the tokens from.", least=1)


@dataclass
class CharTokenizer(TokenizerConfig):
    """Use one token per character of the training text."""

    kind: str = key("char", among=("char",))
    train_bytes: int = key(50_000_000, "Bytes of training text to learn the tokens from.", least=1)


@dataclass
class ByteTokenizer(TokenizerConfig):
    """Use one token per byte of UTF-8."""

    kind: str = key("byte", among=("byte",))


@dataclass
class Gpt2Tokenizer(TokenizerConfig):
    """Use the vocabulary of GPT-2 (Radford et al. 2019), 50,257 tokens."""

    kind: str = key("gpt2", among=("gpt2",))
    vocab_dir: Optional[str] = key(
        None, "Folder with encoder.json and vocab.bpe; null lets tiktoken download them."
    )


@dataclass
class SavedTokenizer(TokenizerConfig):
    """Use a tokenizer that was trained before."""

    kind: str = key("saved", among=("saved",))
    path: str = key(MISSING, "File tokenizer.json, or the folder of a run or a Hugging Face model.")


@dataclass
class LoraConfig:
    """Train low-rank adapters (Hu et al. 2021) and freeze the weights of ``init_from``."""

    rank: Optional[int] = key(None, "Rank of the adapters; null trains all weights.", least=1)
    alpha: Optional[int] = key(None, "Weights become W + alpha/rank·B·A; null is 2·rank.", least=1)


@dataclass
class OptimConfig:
    """Choose the optimizer."""

    kind: str = key(MISSING, "Kind of optimizer; set by optim=.")
    lora: LoraConfig = field(default_factory=LoraConfig)
    learning_rate: float = key(1e-3, "Peak learning rate.", above=0.0)
    weight_decay: float = key(0.1, "Strength of weight decay.", least=0.0)
    decay_embeddings: bool = key(True, "Decay embeddings too; norms and biases are always exempt.")
    scale_rate_with_width: Optional[bool] = key(
        None, "Divide the matrices' learning rate by relative width; null does under mup only."
    )


@dataclass
class AdamOptim(OptimConfig):
    """Use Adam (Kingma & Ba 2015), or AdamW with decoupled decay (Loshchilov & Hutter 2019)."""

    kind: str = key("adamw", among=("adamw", "adam"))
    betas: list[float] = key([0.9, 0.95], BETAS, least=0.0, below=1.0)
    eps: float = key(1e-8, "Constant added to the denominator of a step.", above=0.0)


@dataclass
class SgdOptim(OptimConfig):
    """Use stochastic gradient descent with momentum."""

    kind: str = key("sgd", among=("sgd",))
    momentum: float = key(0.9, "Momentum.", least=0.0, below=1.0)
    nesterov: bool = key(True, "Use Nesterov momentum.")


@dataclass
class LionOptim(OptimConfig):
    """Step by the sign of a momentum (Chen et al. 2023)."""

    kind: str = key("lion", among=("lion",))
    betas: list[float] = key([0.9, 0.99], BETAS, least=0.0, below=1.0)


@dataclass
class AdafactorOptim(OptimConfig):
    """Use Adafactor (Shazeer & Stern 2018); ``learning_rate`` is relative to a parameter's RMS."""

    kind: str = key("adafactor", among=("adafactor",))
    beta2_decay: float = key(-0.8, "Step n keeps 1 - n^this of the average.", least=-1.0, below=0.0)
    least_rms: float = key(1e-3, "Smallest RMS at which a parameter counts.", above=0.0)
    clip_threshold: float = key(1.0, "Largest RMS of an update.", least=1.0)


@dataclass
class MuonOptim(OptimConfig):
    """Use Muon (Jordan et al. 2024) at ``learning_rate`` inside the blocks, and AdamW elsewhere."""

    kind: str = key("muon", among=("muon",))
    momentum: float = key(0.95, "Momentum of the matrices.", least=0.0, below=1.0)
    nesterov: bool = key(True, "Use Nesterov momentum.")
    ns_steps: int = key(5, "Newton-Schulz iterations per step.", least=1, most=99)
    adam_learning_rate: float = key(1e-2, "Peak learning rate of all other weights.", above=0.0)
    betas: list[float] = key([0.9, 0.95], BETAS, least=0.0, below=1.0)
    eps: float = key(1e-8, "Constant added to AdamW's denominator.", above=0.0)


@dataclass
class ScheduleConfig:
    """Set the learning rate by step: a linear warmup, then what the kind says."""

    kind: str = key(MISSING, "Kind of schedule; set by schedule=.")
    warmup_steps: Optional[int] = key(None, "Warmup steps; null means by warmup_fraction.", least=0)
    warmup_fraction: float = key(0.05, "Share of the steps spent on warmup.", least=0.0, below=1.0)


@dataclass
class ConstantSchedule(ScheduleConfig):
    """Keep the peak rate to the end."""

    kind: str = key("constant", among=("constant",))


@dataclass
class DecaySchedule(ScheduleConfig):
    """Decay from the peak to the last step, along a cosine or a line."""

    kind: str = key("cosine", among=("cosine", "linear"))
    min_ratio: float = key(0.1, "Final learning rate, as a share of the peak.", least=0.0, most=1.0)


@dataclass
class WsdSchedule(ScheduleConfig):
    """Stay at the peak, then decay linearly (warmup-stable-decay, Hu et al. 2024)."""

    kind: str = key("wsd", among=("wsd",))
    min_ratio: float = key(0.1, "Final learning rate, as a share of the peak.", least=0.0, most=1.0)
    decay_fraction: float = key(0.2, "Share of the steps spent on the decay.", above=0.0, most=1.0)


@dataclass
class TrainConfig:
    """Set the training recipe; give its length once, in one of the first five keys."""

    tokens: Optional[int] = key(None, "Train on this many tokens.", least=1, most=10**18)
    steps: Optional[int] = key(None, "Train for this many optimizer steps.", least=1, most=10**12)
    epochs: Optional[float] = key(None, "Train for this many passes over the text.", above=0.0)
    tokens_per_param: Optional[float] = key(
        None, "Train on this many tokens per parameter, counting embeddings.", above=0.0
    )
    flops: Optional[float] = key(None, "Train for this many FLOPs, counted exactly.", above=0.0)
    batch_tokens: int = key(2048, "Tokens per optimizer step.", least=1)
    precision: str = key(
        "auto", "Number format; auto is bf16-mixed on a GPU that has it, else 32.", among=PRECISIONS
    )
    grad_clip_norm: Optional[float] = key(1.0, "Gradient norm limit; null never clips.", above=0.0)
    skip_nonfinite: bool = key(False, "Skip steps whose gradient is not finite, and count them.")
    log_every: int = key(10, "Optimizer steps between lines of metrics.csv.", least=1)
    eval_every: Optional[int] = key(None, "Tokens between validations; null gives ten.", least=1)
    eval_share: Optional[float] = key(
        0.1,
        "Share of the training time that validations may take; if they would take longer, all "
        "but the first and last score every k-th window.  null scores all windows.",
        above=0.0,
    )
    eval_on_start: bool = key(True, "Validate before the first step.")
    checkpoint_every: Optional[int] = key(None, "Tokens between saves; null: eval_every.", least=1)
    keep_every: Optional[int] = key(None, "Tokens between step_<N>.ckpt; null is off.", least=1)
    early_stopping_patience: Optional[int] = key(
        None, "Stop after this many validations without improvement; null never does.", least=1
    )
    sample_prompt: str = key("", "Text that samples continue; empty starts a new document.")
    sample_tokens: int = key(120, "Tokens per sample; 0 writes no samples.", least=0)


@dataclass
class Config(Settings):
    """Hold the configuration of a run, as saved in ``config.yaml`` in its folder."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = MISSING
    tokenizer: TokenizerConfig = MISSING
    optim: OptimConfig = MISSING
    schedule: ScheduleConfig = MISSING
    train: TrainConfig = field(default_factory=TrainConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    callbacks: dict[str, Any] = key({}, "Your callbacks, as +callbacks.ema._target_=my_code.EMA.")
    init_from: Optional[str] = key(
        None,
        "Start from the weights, shape and tokenizer of a run, a checkpoint, a Hugging Face "
        "folder, or a GPT-2 or Llama on the hub.",
    )

    @property
    def steps(self) -> int:
        """Return the number of optimizer steps.  Raise ConfigError if it depends on the data."""
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
    """Set how the next token is chosen; the options apply in this order, as in Hugging Face's."""

    repetition_penalty: float = key(
        1.0, "Above 1, tokens already in the context become less likely.", above=0.0
    )
    temperature: float = key(0.8, "Randomness of choice; 0 takes the likeliest token.", least=0.0)
    top_k: Optional[int] = key(50, "Choose among this many likeliest tokens; null is all.", least=1)
    top_p: float = key(1.0, "Choose among the likeliest that add up to this.", above=0.0, most=1.0)
    min_p: float = key(0.0, "Least probability, as a share of the top one.", least=0.0, most=1.0)


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
    "launcher": LAUNCHERS,
    "schedule": {"constant": ConstantSchedule, "decay": DecaySchedule, "wsd": WsdSchedule},
}


def variant(group: str, values: Mapping[str, Any]) -> type:
    """Return the dataclass with the ``kind`` (for data, ``source``) of ``values``.

    Raises ConfigError if there is none.
    """
    name = "source" if group == "data" else "kind"
    for choice in CHOICES[group].values():
        kinds = {f.name: f.metadata.get("among", ()) for f in fields(choice)}[name]
        if values.get(name) in kinds:
            return choice
    raise ConfigError(f"{group}.{name}={values.get(name)}: no such {group}")


def width_ratio(model: ModelConfig) -> float:
    """Return d_model / mup_base_width, the m of µP's rules."""
    return model.d_model / model.mup_base_width


def rate_is_scaled(model: ModelConfig, optim: OptimConfig) -> bool:
    """Return whether the learning rate of the matrices in the blocks is divided by ``width_ratio``.

    Under µP a step must have the same effect at any width.  The effect of a step of Adam or Lion
    grows with the width; a step of Muon has the same spectral norm at any width.
    """
    if optim.scale_rate_with_width is not None:
        return optim.scale_rate_with_width
    return model.parametrization == "mup" and optim.kind != "muon"
