"""What is measured: a model on some hardware, as a configuration and as a process.  Torch-free."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tinygpt import cli
from tinygpt.config import Config
from tinygpt.measuring.tokens import write_tokens

ENDLESS = 1_000_000  # steps: nobody gets there, so that nothing but steps is timed


@dataclass(frozen=True)
class Setting:
    """One model on one choice of hardware; ``more`` are further overrides of the configuration."""

    model: str
    vocab_size: int
    batch_size: int
    max_seq_len: int | None = None  # null: the model's own
    precision: str = "auto"
    accelerator: str = "auto"
    threads: int | None = None
    compile: str = "off"
    micro_batch_size: int | None = None
    seed: int = 42
    more: tuple[str, ...] = ()

    @property
    def overrides(self) -> tuple[str, ...]:
        """Of the command ``tinygpt.run``.  Raises ConfigError for what that would refuse."""
        length = [] if self.max_seq_len is None else [f"model.max_seq_len={self.max_seq_len}"]
        model = [f"model={self.model}", *self.more, *length]
        context = cli.compose_config([*model, "train.batch_tokens=1048576"]).model.max_seq_len
        hardware = {
            "accelerator": self.accelerator,
            "threads": self.threads,
            "compile": self.compile,
            "micro_batch_size": self.micro_batch_size,
        }
        return (
            *model,
            f"train.batch_tokens={self.batch_size * context}",
            f"train.steps={ENDLESS}",
            "train.sample_tokens=0",
            f"train.precision={self.precision}",
            *(f"hardware.{name}={value}" for name, value in hardware.items() if value is not None),
            f"seed={self.seed}",
        )

    @property
    def config(self) -> Config:
        return cli.compose_config(self.overrides)


@dataclass(frozen=True)
class Job:
    """One process that measures; ``worker`` is its other side."""

    measure: str  # train, parts, gemm, attention, generation, tokenizer
    overrides: tuple[str, ...]
    tokens: str  # the folder of the random tokens
    warmup: int = 3  # steps of training before it is ready
    probe: bool = False  # says the loss of a batch before training

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-m", "tinygpt.measuring.worker", self.text]

    @property
    def text(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def read(cls, text: str) -> Job:
        values = json.loads(text)
        return cls(**{**values, "overrides": tuple(values["overrides"])})


@contextlib.contextmanager
def token_folders() -> Iterator[Callable[[Setting], str]]:
    """Gives each setting a folder of random tokens, the same to all that can share it; they are
    gone after the block."""
    with tempfile.TemporaryDirectory(prefix="tinygpt-") as name:

        def folder_of(setting: Setting) -> str:
            length = setting.config.model.max_seq_len
            folder = Path(name, f"{setting.vocab_size}-{length}-{setting.seed}")
            if not folder.exists():
                folder.mkdir()
                write_tokens(folder, setting.vocab_size, length, setting.seed)
            return str(folder)

        yield folder_of
