"""A model that mlx_lm reads, in a local folder, as a policy; Apple silicon alone."""

from __future__ import annotations

import importlib
import math
import platform
from collections.abc import Sequence
from pathlib import Path

from tinygpt.adaptation.config import ModelPolicy, OuterConfig
from tinygpt.adaptation.edits import Row
from tinygpt.adaptation.policies import Policy
from tinygpt.adaptation.prompted import PromptedPolicy, read_config
from tinygpt.adaptation.writers import Text, Writer
from tinygpt.config import ConfigError, RunError, first_line, install
from tinygpt.model.generate import NO_CHOICE


class MlxPolicy(PromptedPolicy):
    """A model that mlx_lm reads, on Apple silicon.  It is not trained."""

    backend = "mlx"

    def __init__(self, config: ModelPolicy, rates: Sequence[float]) -> None:
        """Raises ConfigError on other machines, and where the library or the model is missing."""
        machine = platform.system(), platform.machine()
        if machine != ("Darwin", "arm64"):
            here = " ".join(machine)
            raise ConfigError(f"policy.kind=mlx: needs Apple silicon, and this is {here}; use hf")
        if "model_file" in read_config(config.path):
            raise ConfigError(f"policy.path={config.path}: brings code of its own; it is not run")
        try:
            self.mlx = importlib.import_module("mlx.core")
            self.mlx_lm = importlib.import_module("mlx_lm")
            sampling = importlib.import_module("mlx_lm.sample_utils")
        except ImportError as error:
            raise ConfigError(f"policy.kind=mlx: needs {install('mlx')}") from error
        try:
            self.lm, tokenizer = self.mlx_lm.load(str(Path(config.path).expanduser()))
        except Exception as error:  # whatever the files lead mlx_lm to
            why = first_line(error)
            raise ConfigError(f"policy.path={config.path}: cannot be read ({why})") from error
        self.sampler = sampling.make_sampler(temp=config.temperature, top_k=config.top_k or 0)
        super().__init__(config, rates, tokenizer)

    def logits(self, ids: Sequence[int], allowed: Sequence[int]) -> Sequence[float]:
        last = self.lm(self.mlx.array([list(ids)]))[0, -1]
        of_each: list[float] = last[self.mlx.array(list(allowed))].tolist()
        return of_each

    def continued(self, prompt: list[int], count: int, seed: int) -> list[Text]:
        self.mlx.random.seed(seed)
        return [self._continued(prompt) for _ in range(count)]

    def _continued(self, prompt: list[int]) -> Text:
        text, tokens = "", 0
        for part in self.mlx_lm.stream_generate(
            self.lm,
            self.tokenizer,
            prompt,
            max_tokens=self.config.max_edit_tokens,
            sampler=self.sampler,
        ):
            if not math.isfinite(part.logprobs[part.token].item()):
                raise RunError(NO_CHOICE)
            text += part.text
            tokens += part.finish_reason != "stop"  # which is the end of the text, not of it
        return Text(text, tokens)

    def trained(self, rows: Sequence[Row], config: OuterConfig, seed: int) -> Writer:
        raise RunError("policy.kind=mlx: cannot be trained here; use hf")

    def save(self, folder: Path) -> None:
        """Nothing: the model stays as it is."""

    def load(self, folder: Path) -> Policy:
        return self
