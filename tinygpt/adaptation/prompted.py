"""Policies of a language model that reads instructions, from a local folder: of transformers, or
one that mlx_lm reads on Apple silicon.

The prompts follow those of Zweiger et al. 2025 (implications, rewrite, self-qa), in other words.
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
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinygpt.adaptation import edits
from tinygpt.adaptation.config import ModelPolicy, OuterConfig
from tinygpt.adaptation.documents import Document
from tinygpt.adaptation.edits import TEXT_OPS, Row
from tinygpt.adaptation.inner import training
from tinygpt.adaptation.policies import Policy, Text, Writer, seed_of
from tinygpt.config import ConfigError, LoraConfig, RunError, first_line, install
from tinygpt.fileio import read_json, replacing_folder, write_json
from tinygpt.model.generate import NO_CHOICE

Frame = tuple[str, str]  # what stands before the document in a prompt, and behind it
FRAMES: dict[str, Frame] = {
    "continue": ("", ""),
    "restate": (
        "Text:\n",
        "\n\nThe same in other words, and what follows from it, one statement a line:\n",
    ),
    "qa": (
        "Text:\n",
        "\n\nQuestions that the text answers, one a line, each with its answer:\n",
    ),
}
QUESTIONS = {
    "source": "What it reads: the text (doc), new text about it (edit) or both",
    "text_ops": "The new text goes on (continue), says the same (restate) or asks (qa)",
    "n": "How many new texts of each kind",
    "aug": "What is altered in copies",
    "lr": "Learning rate",
    "mask": "What counts: all, or the second half of each sequence",
}
ANSWER = re.compile(r"\s*\n\s*(?=(?:Answer|A):)")  # on a line of its own it would be learned alone


class PromptedPolicy(Writer):
    """Its tokenizer is one of transformers; so are those of mlx_lm."""

    ops: Sequence[str] = TEXT_OPS

    def __init__(self, config: ModelPolicy, rates: Sequence[float], tokenizer: Any) -> None:
        """Raises ConfigError where the prompts and the text do not fit into the context, and for
        a tokenizer without enough letters."""
        self.model, self.config, self.tokenizer = config.path, config, tokenizer
        self.length = _context(config.path)
        self.slots = edits.slots(rates, self.ops)
        where = f"policy.path={config.path}"
        most = max(len(slot.options) for slot in self.slots)
        self.tokens = edits.option_tokens(self.encode, tokenizer.unk_token_id, most, where)
        self.frames = FRAMES | {"directive": self._questions()}
        room = min(map(self._room, self.frames))
        if room < 1:
            raise ConfigError(
                f"{where}: its context of {self.length} tokens is too short; prompts and "
                f"policy.max_edit_tokens={config.max_edit_tokens} take {self.length - room}"
            )

    def _questions(self) -> Frame:
        letters = [self.tokenizer.decode([token]).strip() for token in self.tokens]
        asked = ""
        for slot in self.slots:
            said = ["+".join(o) if isinstance(o, list) else str(o) for o in slot.options]
            options = ", ".join(f"{a} = {o}" for a, o in zip(letters, said, strict=False))
            asked += f"{QUESTIONS[slot.name]}: {options}\n"
        before = "\n\nHow does a language model best learn this text?\n"
        return "Text:\n", f"{before}{asked}The letters of the best choices, in this order: "

    def _room(self, name: str) -> int:
        """Return how many tokens of a document a prompt can have."""
        written = len(self.slots) if name == "directive" else self.config.max_edit_tokens
        return self.length - written - len(self._prompt(name, []))

    def _prompt(self, name: str, document: Sequence[int]) -> list[int]:
        begin = self.tokenizer.bos_token_id
        before, behind = map(self.encode, self.frames[name])
        return [*([] if begin is None else [begin]), *before, *document, *behind]

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False, verbose=False)
        return ids

    def prefix(self, document: Document) -> list[int]:
        return self.behind("directive", document, 1)[0]

    def behind(self, op: str, document: Document, count: int) -> list[list[int]]:
        """Return prompts with the end of a document that is too long."""
        return [self._prompt(op, self.encode(document.context)[-self._room(op) :])] * count

    def texts(
        self, prompts: Sequence[Sequence[list[int]]], seeds: Sequence[int]
    ) -> list[list[Text]]:
        found = []
        for some, seed in zip(prompts, seeds, strict=True):
            groups = [(prompt, len(list(same))) for prompt, same in itertools.groupby(some)]
            each = [self.continued(ids, count, seed_of(seed, ids)) for ids, count in groups]
            found.append([Text(ANSWER.sub(" ", text), n) for texts in each for text, n in texts])
        return found

    @abstractmethod
    def continued(self, prompt: list[int], count: int, seed: int) -> list[Text]:
        """Return so many texts behind one prompt."""


def read_config(path: str) -> dict[str, Any]:
    """Return ``config.json`` of a local folder.  Raises ConfigError where there is none."""
    folder, where = Path(path).expanduser(), f"policy.path={path}"
    if not folder.is_dir():
        raise ConfigError(f"{where}: no such folder")
    if not (folder / "config.json").exists():
        raise ConfigError(f"{where}: not the folder of a model, as it has no config.json")
    try:
        return read_json(folder / "config.json")
    except ConfigError as error:
        raise ConfigError(f"{where}: not the folder of a model ({error})") from error


def _context(path: str) -> int:
    """Return the most tokens that the model reads at once, unlimited if its file has no limit."""
    values = read_config(path)
    found = values.get("max_position_embeddings") or values.get("n_positions") or sys.maxsize
    if type(found) is not int or found < 1:
        raise ConfigError(
            f"policy.path={path}: max_position_embeddings={found!r:.40}: must be a whole number"
        )
    return found


# --- transformers


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
        """Write a folder that can be a ``policy.path`` too."""
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
    """Load one of transformers' auto classes.  Raises ConfigError, which ``where`` begins."""
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
    """Load from tensors alone: pickled weights can hold any code."""
    options = {"use_safetensors": True, "dtype": torch.float32}
    return _from_folder("AutoModelForCausalLM", folder, where, **options).to(device).eval()


def _finite(ids: Tensor, scores: Tensor) -> Tensor:
    """Stop ``generate`` where there is nothing to choose from."""
    if not scores.amax(dim=-1).isfinite().all():
        raise RunError(NO_CHOICE)
    return scores


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Begin torch's global generators at ``seed``, and restore them afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def fine_tuned(lm: Any, rows: Sequence[Row], config: OuterConfig, seed: int) -> Any:
    """Return a copy, trained as ``inner.adapt`` trains ours; its adapters are still in it.

    Raises RunError where it diverges.
    """
    device = next(lm.parameters()).device
    model = copy.deepcopy(lm).requires_grad_(True)
    with _seeded(seed, device):
        model = model if config.lora.rank is None else _with_adapters(model, config.lora)
    model.eval()  # no dropout
    rate = config.learning_rate
    losses = training(
        model,
        lambda inputs, counted: model(input_ids=inputs).logits[counted],
        rows,
        rate,
        config.tokens_per_step,
        seed,
    )
    for step, loss in enumerate(itertools.islice(losses, config.steps), start=1):
        if not math.isfinite(loss):
            raise RunError(
                f"outer.learning_rate={rate}: the policy's training diverged at step {step}"
            )
    return model


def _with_adapters(model: Any, lora: LoraConfig) -> Any:
    """Add them to all linear layers but the head, which may be tied."""
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
        # peft notices by itself that GPT-2's matrices are transposed, and calls transformers in a
        # deprecated way
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False", UserWarning)
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        return get_peft_model(model, peft)


def merged(model: Any) -> Any:
    """Return it without adapters, which are added to the matrices."""
    plain = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
    return plain.eval()


# --- mlx_lm


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
        found = []
        for _ in range(count):
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
                tokens += part.finish_reason != "stop"  # the last one, which ends the text
            found.append(Text(text, tokens))
        return found

    def trained(self, rows: Sequence[Row], config: OuterConfig, seed: int) -> Writer:
        raise RunError("policy.kind=mlx: cannot be trained here; use hf")

    def save(self, folder: Path) -> None:
        """Write nothing: the model stays as it is."""

    def load(self, folder: Path) -> Policy:
        return self
