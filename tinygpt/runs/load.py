"""Load the model, tokenizer, configuration and results of a run folder.

run = tinygpt.load_run("outputs/runs/stories")
print(run)
print(run.generate("Once upon a time", top_p=0.9))
"""

from __future__ import annotations

import html
import itertools
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tinygpt import fileio
from tinygpt.config import Config, ConfigError, Sampling
from tinygpt.config.counting import count_parameters, padded_vocab
from tinygpt.data.corpora import describe
from tinygpt.data.tokenizers import Tokenizer, load_tokenizer
from tinygpt.model.generate import Step, stream
from tinygpt.model.gpt import GPT
from tinygpt.model.huggingface import from_hugging_face, read_weights
from tinygpt.model.lora import merged
from tinygpt.runs import pretrained, rundir

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
WEIGHTS = "model."  # prefix of the model's own weights in a checkpoint


@dataclass(frozen=True, repr=False)
class TrainedRun:
    """Hold a run at one of its checkpoints; ``print`` shows it in five lines.

    ``results`` is the content of ``results.json``, None for a run that has not ended.  ``model`` is
    in evaluation mode, with weights in float32, or float64 if trained in it.
    """

    path: Path
    checkpoint: str
    step: int  # optimizer steps before the checkpoint
    config: Config
    tokenizer: Tokenizer
    model: GPT
    results: dict[str, Any] | None

    @property
    def tokens(self) -> int:
        """Return the training tokens up to the checkpoint."""
        return self.step * self.config.train.batch_tokens

    def __repr__(self) -> str:
        return "\n".join(f"{name:<8}{text}" for name, text in self._summary().items())

    def _repr_html_(self) -> str:
        rows = (
            f"<tr><th>{name}</th><td style='text-align: left'>{html.escape(text)}</td></tr>"
            for name, text in self._summary().items()
        )
        return f"<table>{''.join(rows)}</table>"

    def _summary(self) -> dict[str, str]:
        """Return a line for each aspect of the run."""
        config, model, results = self.config, self.config.model, self.results or {}
        size = count_parameters(model, self.tokenizer.vocab_size)
        status = results.get("status", "has not ended")
        losses = {
            "{:.4f} nats per token in validation": "final_val_loss",
            "{:.4f} before training": "initial_val_loss",
            "exact floor {:.4f}": "irreducible_loss_exact",
            "{:.4f} bits per byte": "final_val_bits_per_byte",
        }
        known = [
            text.format(results[n]) for text, n in losses.items() if results.get(n) is not None
        ]
        return {
            "run": f"{self.path}, {status}; {self.checkpoint}.ckpt after {self.step:,} steps",
            "model": f"{size.total:,} parameters, {size.non_embedding:,} without embeddings: "
            f"n_layers={model.n_layers} d_model={model.d_model} n_heads={model.n_heads} "
            f"max_seq_len={model.max_seq_len}",
            "text": f"{self.tokens:,} tokens of {describe(config.data)}; tokenizer "
            f"{config.tokenizer.kind} with {self.tokenizer.vocab_size:,} tokens",
            "recipe": f"{config.optim.kind}, learning rate {config.optim.learning_rate:g}, "
            f"batches of {config.train.batch_tokens:,} tokens, seed {config.seed}",
            "loss": ", ".join(known) or "not in results.json",
        }

    def generate(
        self, prompt: str = "", max_new_tokens: int = 200, *, seed: int = 0, **sampling: Any
    ) -> str:
        """Return the prompt and its continuation, up to the end of the document.

        ``sampling`` takes the fields of config.Sampling: temperature, top_k, top_p, min_p,
        repetition_penalty.  The same prompt and seed give the same text.  Raises ConfigError for an
        option out of bounds, RunError if the model's outputs are NaN.
        """
        encoded = self.encode_prompt(prompt)
        steps = self.stream([encoded], [seed], max_new_tokens, Sampling(**sampling))
        new = itertools.takewhile(self.tokenizer.eot_id.__ne__, (int(s.tokens) for s in steps))
        return self.tokenizer.decode([*encoded[1:], *new])

    def encode_prompt(self, prompt: str) -> list[int]:
        """Return the token ids of a prompt as the beginning of a document."""
        return [self.tokenizer.start_id, *self.tokenizer.encode(prompt)]

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        max_new_tokens: int,
        sampling: Sampling,
        use_cache: bool = True,
    ) -> Iterator[Step]:
        """Continue B encoded prompts of equal length, each with its seed.

        A text depends only on its own prompt and seed, not on the others in the batch.
        """
        generators = [
            torch.Generator().manual_seed(int(fileio.digest([seed, *prompt])[:16], 16))
            for seed, prompt in zip(seeds, prompts, strict=True)
        ]
        tokens = torch.tensor(prompts, device=next(self.model.parameters()).device)  # (B, T0)
        return stream(
            self.model,
            tokens,
            max_new_tokens,
            sampling,
            generators,
            stop_token=self.tokenizer.eot_id,
            start_token=self.tokenizer.start_id,
            use_cache=use_cache,
        )


def load_run(
    path: str | Path, checkpoint: str | None = None, device: str | torch.device = "cpu"
) -> TrainedRun:
    """Return the run in the folder ``path``, on ``device`` (``auto``: the fastest).

    ``checkpoint`` is ``final``, ``best``, ``last`` or ``step_<N>``; None means ``final``, or
    ``last`` if the run has not ended.  Raises ConfigError, one line, if the folder is not a run,
    has no such checkpoint or is damaged.
    """
    device, run = usable_device(device), rundir.open_run(path)
    config = rundir.read_config(run.config)
    tokenizer = load_tokenizer(run.tokenizer)
    wanted = {"tokenizer_fingerprint": str, "status": str, "total_steps": int}
    results = fileio.read_json(run.results, **wanted) if run.results.exists() else None
    if results and results["tokenizer_fingerprint"] != tokenizer.fingerprint():
        raise ConfigError(f"{run.tokenizer}: not the tokenizer that the run was trained with")
    chosen = run.chosen(checkpoint)
    state, step = read_checkpoint(chosen, config)
    model = GPT(config.model, tokenizer.vocab_size)
    try:
        model.to(next(iter(state.values())).dtype).load_state_dict(state)
    except (RuntimeError, StopIteration) as error:
        raise ConfigError(f"{chosen}: does not fit {run.config} and {run.tokenizer}") from error
    return TrainedRun(
        run.path, chosen.stem, step, config, tokenizer, model.to(device).eval(), results
    )


def read_checkpoint(path: Path, config: Config) -> tuple[dict[str, torch.Tensor], int]:
    """Return the model's weights, with LoRA adapters merged in, and the step.

    Reads tensors and plain data only, never code.  Raises ConfigError for a damaged file.
    """
    try:
        check_sums(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        weights = {k.removeprefix(WEIGHTS): v for k, v in content["state_dict"].items()}
        step = int(content["global_step"])
        if not all(v.dtype in FLOATS for v in weights.values()) or not 0 <= step < 2**63:
            raise ValueError("not what a run writes")
        if config.optim.lora.rank is not None:
            weights = merged(weights, config.optim.lora)
        return weights, step
    except Exception as error:  # damaged bytes can make torch raise anything
        raise ConfigError(f"{path}: this checkpoint is damaged") from error


def check_sums(path: Path) -> None:
    """Raise ValueError or BadZipFile if a checkpoint is not as it was written.

    torch writes a zip file with checksums that it does not read.  Nothing in it is compressed, and
    a compressed entry could expand to any size.
    """
    with zipfile.ZipFile(path) as file:
        compressed = any(one.compress_type != zipfile.ZIP_STORED for one in file.infolist())
        if compressed or file.testzip() is not None:
            raise ValueError(f"{path}: a checksum does not fit")


def initial_weights(config: Config, vocab_size: int) -> dict[str, torch.Tensor] | None:
    """Return the weights of ``config.init_from``, None if it is null.

    Learned positions are cut to ``max_seq_len``.  Raises ConfigError for damaged files.
    """
    if config.init_from is None:
        return None
    source = pretrained.locate(config.init_from)
    if source.checkpoint is not None:
        before = rundir.read_config(source.folder / "config.yaml")
        weights, _ = read_checkpoint(source.checkpoint, before)
        if config.model.position == "learned":
            table = "position_embedding.weight"
            weights[table] = weights[table][: config.model.max_seq_len]
        return weights
    rows = padded_vocab(vocab_size, config.model.pad_vocab_to_multiple)
    where = f"init_from={source.name}"
    return from_hugging_face(read_weights(source.folder), config.model, rows, where)


def usable_device(device: str | torch.device, key: str = "device") -> torch.device:
    """Return the device, the fastest for ``auto``.  Raises ConfigError, naming ``key``, if the
    machine has none."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    usable = [*["cuda"] * cuda, *["mps"] * mps, "cpu"]
    found = torch.device(usable[0] if device == "auto" else device)
    if found.type not in usable:
        raise ConfigError(
            f"{key}={device}: this machine or this build of torch has none; "
            f"usable here: {', '.join(['auto', *usable])}"
        )
    return found
