"""What can be asked of an evaluation.  Torch-free, so that a mistake is said at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional

from tinygpt import checks
from tinygpt.config import PRECISIONS, ConfigError, key


@dataclass
class OtherText:
    """A text to score instead of the run's own; its keys are those of ``data=custom``."""

    path: Optional[str] = None
    separator: str = "auto"
    text_column: str = "auto"
    encoding: Optional[str] = None
    delimiter: Optional[str] = None
    header: Optional[bool] = None


@dataclass
class Options:
    """What is asked of each run, and on what it is computed."""

    checkpoints: list[str] = field(default_factory=list)  # none: final, of an unended run last
    split: str = key("val", among=("val", "test"))
    data: OtherText = field(default_factory=OtherText)
    stride: Optional[int] = key(None, least=1)  # null: the context
    baseline: bool = False
    task: list[str] = field(default_factory=list)
    quantize: Optional[str] = key(None, among=("int8",))
    prune: Optional[float] = key(None, above=0.0, below=1.0)
    samples: int = key(0, least=0)
    seed: int = key(0, least=0)  # of the samples
    device: str = key("auto", among=("auto", "cpu", "mps", "cuda"))
    precision: str = key("auto", among=PRECISIONS)  # auto: as in training
    threads: Optional[int] = key(None, least=1, most=4096)  # null: as in training
    cache_dir: Optional[str] = None

    def check(self) -> None:
        """What must fit together.  Raises ConfigError."""
        checks.check_text(self.data)
        for name, default in vars(OtherText()).items():
            value = getattr(self.data, name)
            if self.data.path is None and value != default:
                raise ConfigError(f"data.{name}={value}: needs data.path=")
        if "all" in self.checkpoints and len(self.checkpoints) > 1:
            raise ConfigError(f"checkpoints={','.join(self.checkpoints)}: all is all of them")
