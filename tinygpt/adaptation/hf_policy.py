"""A causal language model of transformers, in a local folder, as a policy."""

from __future__ import annotations

import contextlib
import copy
import importlib
import itertools
import math
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tinygpt.adaptation.config import ModelPolicy, OuterConfig
from tinygpt.adaptation.edits import Row
from tinygpt.adaptation.inner import CLIP, batches
from tinygpt.adaptation.prompted import PromptedPolicy, read_config
from tinygpt.adaptation.writers import Text
from tinygpt.config import ConfigError, LoraConfig, RunError, first_line, install
from tinygpt.data.datamodule import IGNORED
from tinygpt.fileio import read_json, replacing_folder, write_json
from tinygpt.model.generate import NO_CHOICE


class HuggingFacePolicy(PromptedPolicy):
    """A causal language model of transformers, in float32."""

    backend = "hf"

    def __init__(self, config: ModelPolicy, rates: Sequence[float], device: torch.device) -> None:
        """Raises ConfigError for what cannot be read, and where a library is missing."""
        read_config(config.path)
        try:
            importlib.import_module("transformers")
            importlib.import_module("peft")
        except ImportError as error:
            raise ConfigError(f"policy.kind=hf: needs {install('hf')}") from error
        folder, where = Path(config.path).expanduser(), f"policy.path={config.path}"
        self.device = device
        self.lm = _language_model(folder, where, device)
        self.parameters = sum(weight.numel() for weight in self.lm.parameters())
        super().__init__(config, rates, _from_folder("AutoTokenizer", folder, where))

    @torch.no_grad()
    def logits(self, ids: Sequence[int], allowed: Sequence[int]) -> Sequence[float]:
        read = torch.tensor([list(ids)], device=self.device)
        last = self.lm(input_ids=read, logits_to_keep=1).logits[0, -1]
        of_each: list[float] = last[list(allowed)].tolist()
        return of_each

    def continued(self, prompt: list[int], count: int, seed: int) -> list[Text]:
        ends = self.lm.generation_config.eos_token_id or self.tokenizer.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        ids = torch.tensor([prompt], device=self.device)
        with seeded(seed, self.device):
            rows = self.lm.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                temperature=self.config.temperature,
                top_k=self.config.top_k or 0,
                top_p=1.0,
                max_new_tokens=self.config.max_edit_tokens,
                num_return_sequences=count,
                eos_token_id=ends,
                pad_token_id=ends[0],
                logits_processor=[_finite],
            )
        new = [
            list(itertools.takewhile(lambda token: token not in ends, row))
            for row in rows[:, len(prompt) :].tolist()
        ]
        decode = self.tokenizer.decode
        return [Text(decode(row, skip_special_tokens=True), len(row)) for row in new]

    def trained(self, rows: Sequence[Row], config: OuterConfig, seed: int) -> HuggingFacePolicy:
        return self._with(merged(fine_tuned(self.lm, rows, config, seed)))

    def _with(self, lm: Any) -> HuggingFacePolicy:
        new = copy.copy(self)
        new.lm = lm
        return new

    def save(self, folder: Path) -> None:
        """A folder that can be a ``policy.path`` too."""
        with replacing_folder(folder / "policy") as new:
            self.lm.save_pretrained(new)
            self.tokenizer.save_pretrained(new)
            write_json(new / "policy.json", {"sft_tokens": self.sft_tokens})

    def load(self, folder: Path) -> HuggingFacePolicy:
        saved = folder / "policy"
        spent = read_json(saved / "policy.json")
        new = self._with(_language_model(saved, str(saved), self.device))
        new.sft_tokens = spent["sft_tokens"]
        return new


def _from_folder(kind: str, folder: Path, where: str, **options: Any) -> Any:
    """One of transformers' auto classes.  Raises ConfigError, which ``where`` begins."""
    transformers: Any = importlib.import_module("transformers")
    transformers.utils.logging.disable_progress_bar()
    try:
        return getattr(transformers, kind).from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, **options
        )
    except Exception as error:  # whatever the files lead it to
        why = first_line(error)
        raise ConfigError(f"{where}: {kind} of transformers cannot read it ({why})") from error


def _language_model(folder: Path, where: str, device: torch.device) -> Any:
    """From tensors alone: pickled weights can hold any code."""
    options = {"use_safetensors": True, "dtype": torch.float32}
    return _from_folder("AutoModelForCausalLM", folder, where, **options).to(device).eval()


def _finite(ids: Tensor, scores: Tensor) -> Tensor:
    """Among what ``generate`` makes of logits, to end where there is nothing to choose from."""
    if not scores.amax(dim=-1).isfinite().all():
        raise RunError(NO_CHOICE)
    return scores


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """torch's global generators begin at ``seed``, and are afterwards as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def fine_tuned(lm: Any, rows: Sequence[Row], config: OuterConfig, seed: int) -> Any:
    """A copy, trained as ``inner.adapt`` trains ours; its adapters are still in it.

    Raises RunError where it diverges.
    """
    device = next(lm.parameters()).device
    model = copy.deepcopy(lm).requires_grad_(True)
    with seeded(seed, device):
        model = model if config.lora.rank is None else _with_adapters(model, config.lora)
    model.eval()  # no dropout
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=0.0)
    stream = batches(rows, config.tokens_per_step, np.random.default_rng(seed))
    for step, (inputs, targets) in zip(range(1, config.steps + 1), stream, strict=False):
        counted = (targets != IGNORED).to(device)
        logits = model(input_ids=inputs.to(device)).logits[counted]  # (n, V)
        loss = F.cross_entropy(logits, targets.to(device)[counted])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        if not math.isfinite(loss.item()):
            rate = config.learning_rate
            raise RunError(
                f"outer.learning_rate={rate}: the policy's training diverged at step {step}"
            )
    return model


def _with_adapters(model: Any, lora: LoraConfig) -> Any:
    """In all its linear layers but the head, which may be tied."""
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    assert lora.rank is not None
    peft = PeftConfig(
        r=lora.rank,
        lora_alpha=lora.alpha or 2 * lora.rank,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        # peft sees itself that GPT-2's matrices are turned, and asks transformers in an old way
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False", UserWarning)
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        return get_peft_model(model, peft)


def merged(model: Any) -> Any:
    """Without adapters, which are added to the matrices."""
    plain = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
    return plain.eval()
