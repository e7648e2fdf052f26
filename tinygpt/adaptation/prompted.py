"""Propose edits with a language model that reads instructions, by transformers or mlx_lm.

The prompts paraphrase those of Zweiger et al. 2025 (implications, rewrite, self-qa).
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import itertools
import math
import platform
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinygpt.adaptation.config import ModelPolicy, OuterConfig
from tinygpt.adaptation.documents import Document
from tinygpt.adaptation.edits import TEXT_OPS, Row
from tinygpt.adaptation.inner import seed_of
from tinygpt.adaptation.policies import Writer, fine_tune
from tinygpt.config import ConfigError, RunError, first_line, install
from tinygpt.config.checks import require
from tinygpt.fileio import read_json
from tinygpt.model.generate import NO_CHOICE

# The parts of a prompt before and after the document.
FRAMES = {
    "continue": ("", ""),
    "restate": (
        "Text:\n",
        "\n\nThe same in other words, and what follows from it, one statement a line:\n",
    ),
    "qa": ("Text:\n", "\n\nQuestions that the text answers, one a line, each with its answer:\n"),
}
QUESTIONS = {
    "source": "What it reads: the text (doc), new text about it (edit) or both",
    "text_ops": "The new text goes on (continue), says the same (restate) or asks (qa)",
    "n": "How many new texts of each kind",
    "aug": "What is altered in copies",
    "lr": "Learning rate",
    "mask": "What counts: all, or the second half of each sequence",
}
ANSWER = re.compile(r"\s*\n\s*(?=(?:Answer|A):)")  # joins an answer to the line of its question


class PromptedPolicy(Writer):
    """Propose edits with a model whose tokenizer is from transformers, as those of mlx_lm are."""

    ops = TEXT_OPS

    def __init__(self, config: ModelPolicy, rates: Sequence[float], tokenizer: Any) -> None:
        """Raise ConfigError if prompts and texts do not fit in the context, and for a tokenizer
        with too few letters."""
        self.model, self.config, self.tokenizer = config.path, config, tokenizer
        where = f"policy.path={config.path}"
        self.set_slots(rates, tokenizer.unk_token_id, where)
        letters = [tokenizer.decode([token]).strip() for token in self.tokens]
        asked = "\n\nHow does a language model best learn this text?\n"
        for name, options in self.slots.items():
            names = ["+".join(o) if isinstance(o, list) else str(o) for o in options]
            choices = ", ".join(f"{a} = {o}" for a, o in zip(letters, names, strict=False))
            asked += f"{QUESTIONS[name]}: {choices}\n"
        asked += "The letters of the best choices, in this order: "
        self.frames = FRAMES | {"directive": ("Text:\n", asked)}
        room = min(map(self._room, self.frames))
        require(
            room >= 1,
            f"{where}: its context of {self.length} tokens is too short; prompts and "
            f"policy.max_edit_tokens={config.max_edit_tokens} take {self.length - room}",
        )

    def _room(self, name: str) -> int:
        """Return how many tokens of a document fit in a prompt."""
        written = len(self.slots) if name == "directive" else self.config.max_edit_tokens
        return self.length - written - len(self._prompt(name, []))

    def _prompt(self, name: str, document: Sequence[int]) -> list[int]:
        begin = self.tokenizer.bos_token_id
        before, behind = map(self.encode, self.frames[name])
        return [*([] if begin is None else [begin]), *before, *document, *behind]

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False, verbose=False)
        return ids

    def behind(self, what: str, document: Document, count: int) -> list[list[int]]:
        """Return prompts with the document, or as much of its end as fits."""
        return [self._prompt(what, self.encode(document.context)[-self._room(what) :])] * count

    def texts(self, prompts: Sequence[list[int]], seed: int) -> tuple[list[str], int]:
        found: list[str] = []
        tokens = 0
        for prompt, same in itertools.groupby(prompts):
            texts, wrote = self.continued(prompt, len(list(same)), seed_of(seed, prompt))
            found += [ANSWER.sub(" ", text) for text in texts]
            tokens += wrote
        return found, tokens

    def continued(self, prompt: list[int], count: int, seed: int) -> tuple[list[str], int]:
        """Return ``count`` texts after one prompt, and how many tokens they took."""
        raise NotImplementedError


def _context(path: str) -> int:
    """Return the context length of the model in a folder, or raise ConfigError."""
    folder, where = Path(path).expanduser(), f"policy.path={path}"
    require(folder.is_dir(), f"{where}: no such folder")
    line = f"{where}: not the folder of a model, as it has no config.json"
    require((folder / "config.json").exists(), line)
    try:
        values = read_json(folder / "config.json")
    except ConfigError as error:
        raise ConfigError(f"{where}: not the folder of a model ({error})") from error
    require("model_file" not in values, f"{where}: contains code of its own, which is not run")
    found = values.get("max_position_embeddings") or values.get("n_positions") or sys.maxsize
    line = f"{where}: max_position_embeddings={found!r:.40}: must be a whole number"
    require(type(found) is int and found >= 1, line)
    return int(found)


def _imported(name: str, kind: str) -> Any:
    """Import a library.  Raise ConfigError, naming the extra ``kind``, if it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(f"policy.kind={kind}: needs {install(kind)}") from error


# --- transformers


class HuggingFacePolicy(PromptedPolicy):
    """Propose edits with a causal language model of transformers, in float32."""

    backend = "hf"

    def __init__(self, config: ModelPolicy, rates: Sequence[float], device: torch.device) -> None:
        """Raise ConfigError if the model cannot be read or a library is missing."""
        self.length = _context(config.path)
        for name in ("transformers", "peft"):
            _imported(name, "hf")
        folder, where = Path(config.path).expanduser(), f"policy.path={config.path}"
        # pickled weights can contain code
        options = {"use_safetensors": True, "dtype": torch.float32}
        model = _from_folder("AutoModelForCausalLM", folder, where, **options)
        self.device, self.lm = device, model.to(device).eval()
        self.parameters = sum(weight.numel() for weight in self.lm.parameters())
        super().__init__(config, rates, _from_folder("AutoTokenizer", folder, where))

    @torch.no_grad()
    def logits(self, ids: Sequence[int], allowed: Sequence[int]) -> Sequence[float]:
        read = torch.tensor([list(ids)], device=self.device)
        last = self.lm(input_ids=read, logits_to_keep=1).logits[0, -1]
        logits: list[float] = last[list(allowed)].tolist()
        return logits

    def continued(self, prompt: list[int], count: int, seed: int) -> tuple[list[str], int]:
        ends = self.lm.generation_config.eos_token_id or self.tokenizer.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        ids = torch.tensor([prompt], device=self.device)
        with _seeded(seed, self.device):
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
        written = rows[:, len(prompt) :].tolist()
        new = [list(itertools.takewhile(lambda token: token not in ends, row)) for row in written]
        texts = [self.tokenizer.decode(row, skip_special_tokens=True) for row in new]
        return texts, sum(map(len, new))

    def trained(self, rows: Sequence[Row], config: OuterConfig, seed: int) -> Any:
        """Train adapters of all linear layers but the head, which may be tied, or all weights."""
        from peft import LoraConfig, get_peft_model

        model, rank = copy.deepcopy(self.lm).requires_grad_(True), config.lora.rank
        if rank is not None:
            alpha = config.lora.alpha or 2 * rank
            kind: Any = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
            with _seeded(seed, self.device), warnings.catch_warnings():
                # peft handles GPT-2's transposed matrices, and makes a deprecated call
                warnings.filterwarnings("ignore", "fan_in_fan_out is set to False", UserWarning)
                warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
                model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=alpha, **kind))
        model.eval()  # no dropout

        def forward(inputs: Tensor, counted: Tensor) -> Any:
            return model(input_ids=inputs).logits[counted]

        fine_tune(model, forward, rows, config, seed)
        return (model if rank is None else model.merge_and_unload()).eval()


def _from_folder(kind: str, folder: Path, where: str, **options: Any) -> Any:
    """Load one of transformers' auto classes.  Raise ConfigError, starting with ``where``."""
    transformers: Any = importlib.import_module("transformers")
    transformers.utils.logging.disable_progress_bar()
    try:
        return getattr(transformers, kind).from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, **options
        )
    except Exception as error:  # files can make it raise anything
        why = first_line(error)
        raise ConfigError(f"{where}: {kind} of transformers cannot read it ({why})") from error


def _finite(ids: Tensor, scores: Tensor) -> Tensor:
    """Raise RunError in ``generate`` if no logit is finite."""
    if not scores.amax(dim=-1).isfinite().all():
        raise RunError(NO_CHOICE)
    return scores


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's global generators for the block, and restore them afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


# --- mlx_lm


class MlxPolicy(PromptedPolicy):
    """Propose edits with a model that mlx_lm reads, on Apple silicon; it cannot be trained."""

    backend = "mlx"

    def __init__(self, config: ModelPolicy, rates: Sequence[float]) -> None:
        """Raise ConfigError on other machines, and if the library or the model is missing."""
        machine = platform.system(), platform.machine()
        line = f"policy.kind=mlx: needs Apple silicon, and this is {' '.join(machine)}; use hf"
        require(machine == ("Darwin", "arm64"), line)
        self.length = _context(config.path)
        self.mlx, self.mlx_lm = _imported("mlx.core", "mlx"), _imported("mlx_lm", "mlx")
        sampling = _imported("mlx_lm.sample_utils", "mlx")
        try:
            self.lm, tokenizer = self.mlx_lm.load(str(Path(config.path).expanduser()))
        except Exception as error:  # files can make it raise anything
            why = first_line(error)
            raise ConfigError(f"policy.path={config.path}: cannot be read ({why})") from error
        self.sampler = sampling.make_sampler(temp=config.temperature, top_k=config.top_k or 0)
        super().__init__(config, rates, tokenizer)

    def logits(self, ids: Sequence[int], allowed: Sequence[int]) -> Sequence[float]:
        last = self.lm(self.mlx.array([list(ids)]))[0, -1]
        logits: list[float] = last[self.mlx.array(list(allowed))].tolist()
        return logits

    def continued(self, prompt: list[int], count: int, seed: int) -> tuple[list[str], int]:
        self.mlx.random.seed(seed)
        texts, tokens = [""] * count, 0
        for n in range(count):
            for part in self.mlx_lm.stream_generate(
                self.lm,
                self.tokenizer,
                prompt,
                max_tokens=self.config.max_edit_tokens,
                sampler=self.sampler,
            ):
                if not math.isfinite(part.logprobs[part.token].item()):
                    raise RunError(NO_CHOICE)
                texts[n] += part.text
                tokens += part.finish_reason != "stop"  # the end token does not count
        return texts, tokens
