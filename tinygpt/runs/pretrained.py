"""Find the run or Hugging Face model that a run begins from; adopt its shape and tokenizer.

This module is torch-free; load.py reads the weights.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tinygpt import fileio
from tinygpt.config import Config, ConfigError, ModelConfig, SavedTokenizer
from tinygpt.config.counting import resolved_d_ff
from tinygpt.data import shards
from tinygpt.data.corpora import Corpus
from tinygpt.data.huggingface import open_tokenizer
from tinygpt.data.network import model_folder
from tinygpt.data.tokenizers import Tokenizer
from tinygpt.model.families import from_config, vocab_rows
from tinygpt.runs import rundir

# Fields of a model that do not change the shape of its weights.
SHAPELESS = ("dropout", "attention", "gradient_checkpointing")


class Source(NamedTuple):
    """Name a checkpoint of a run, or a Hugging Face folder."""

    name: str  # as given
    folder: Path
    checkpoint: Path | None  # None: a Hugging Face folder


def locate(name: str) -> Source:
    """Find a run folder, a checkpoint, a Hugging Face folder or a model on the hub by name.

    Raises ConfigError if there is none.
    """
    path, given = Path(name).expanduser(), f"init_from={name}"
    if path.suffix == ".ckpt" and path.is_file():
        if not rundir.RunDir(path.parent.parent).config.exists():
            raise ConfigError(f"{given}: is not in a run folder, whose config.yaml has its shape")
        return Source(name, path.parent.parent, path)
    folder = model_folder("init_from", name)
    if (folder / "config.json").exists():
        return Source(name, folder, None)
    run = rundir.RunDir(folder)
    if not run.config.exists():
        raise ConfigError(f"{given}: neither the folder of a run nor of a Hugging Face model")
    for checkpoint in (run.checkpoints / "final.ckpt", run.last):
        if checkpoint.exists():
            return Source(name, folder, checkpoint)
    raise ConfigError(f"{given}: this run has no checkpoint yet")


def adopt(config: Config, overrides: Sequence[str]) -> None:
    """Give ``config`` the shape and the tokenizer of the model named by ``config.init_from``.

    Raises ConfigError if ``overrides``, the command line, ask for others.
    """
    assert config.init_from is not None
    source = locate(config.init_from)
    place = source.name if source.checkpoint is None else str(source.folder)
    tokenizer = open_tokenizer("init_from", place)
    keys = {item.lstrip("+").partition("=")[0] for item in overrides}
    _adopt_shape(config.model, _shape(source, tokenizer), keys, source.name)
    if any(key.split(".")[0] == "tokenizer" for key in keys):
        _check_tokenizer(config, tokenizer)
    else:
        config.tokenizer = SavedTokenizer(path=place)


def _shape(source: Source, tokenizer: Tokenizer) -> ModelConfig:
    if source.checkpoint is not None:
        return rundir.read_config(source.folder / "config.yaml").model
    content = fileio.read_json(source.folder / "config.json")
    values = from_config(content, f"init_from={source.name}")
    rows = vocab_rows(content)
    if rows < tokenizer.vocab_size:
        raise ConfigError(
            f"init_from={source.name}: its tokenizer has {tokenizer.vocab_size} tokens, but its "
            f"model only {rows} rows for them"
        )
    padding = rows if rows > tokenizer.vocab_size else 1  # the multiple that gives these rows
    return ModelConfig(**values, pad_vocab_to_multiple=padding)


def _adopt_shape(model: ModelConfig, own: ModelConfig, keys: set[str], name: str) -> None:
    """Copy the shape ``own`` into ``model``; ``keys`` are those of the command line."""

    def resolved(shape: ModelConfig, field: str) -> Any:
        if field == "d_ff":
            return resolved_d_ff(shape)
        value = getattr(shape, field)
        return value or shape.n_heads if field == "n_kv_heads" else value

    for field in (f.name for f in dataclasses.fields(ModelConfig) if f.name not in SHAPELESS):
        has, wanted = resolved(own, field), resolved(model, field)
        if has != wanted and keys & {"model", f"model.{field}"}:
            why = f"has {_written(has)} and brings its own shape"
            if field == "max_seq_len":
                if wanted < has or own.position == "rope":
                    continue  # fewer positions, or RoPE, which needs no table of them
                why = f"has only {has} learned positions"
            given = f"model.{field}" if f"model.{field}" in keys else "model"
            raise ConfigError(
                f"model.{field}={_written(wanted)}: init_from={name} {why}; leave {given}= out"
            )
        setattr(model, field, getattr(own, field))


def _written(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _check_tokenizer(config: Config, own: Tokenizer) -> None:
    if not isinstance(config.tokenizer, SavedTokenizer):
        raise ConfigError(
            f"tokenizer={config.tokenizer.kind}: init_from={config.init_from} brings its own "
            f"vocabulary, of {own.vocab_size} tokens ({own.kind}); leave tokenizer= out"
        )
    given = open_tokenizer("tokenizer.path", config.tokenizer.path)
    if given.fingerprint() != own.fingerprint():
        raise ConfigError(
            f"tokenizer.path={config.tokenizer.path}: not the tokenizer that "
            f"init_from={config.init_from} was trained with; leave tokenizer= out"
        )


def contents(corpus: Corpus, config: Config) -> dict[str, str]:
    """Return fingerprints of everything that a configuration names, for its hash."""
    found = shards.fingerprints(corpus, config.tokenizer)
    if config.init_from is not None:
        found["init_from"] = fingerprint(config.init_from)
    return found


def fingerprint(name: str) -> str:
    """Return the fingerprint of a checkpoint, or of a Hugging Face model's weights and config."""

    def hashed(path: Path) -> str:
        status = path.stat()
        return _hashed(path, status.st_size, status.st_mtime_ns)

    source = locate(name)
    if source.checkpoint is not None:
        return hashed(source.checkpoint)
    files = [source.folder / "config.json", *sorted(source.folder.glob("*.safetensors"))]
    return fileio.digest([hashed(path) for path in files])


@functools.lru_cache(maxsize=64)
def _hashed(path: Path, size: int, changed: int) -> str:
    """Hash a file once; size and time of change are part of the cache's key."""
    return fileio.sha256(path)
