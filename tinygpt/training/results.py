"""Make ``results.json``, the flat outcome of a run; a value that does not apply is null."""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning.fabric.utilities.throughput import get_available_flops

from tinygpt.config import Config
from tinygpt.config.counting import (
    count_parameters,
    flops_6nd,
    flops_per_token,
    lora_parameters,
    resolved_d_ff,
)
from tinygpt.data import corpora, survey
from tinygpt.data.datamodule import TokenData
from tinygpt.runs import rundir
from tinygpt.training.evaluation import Scores, scored_tokens
from tinygpt.training.hardware import Device, peak_memory


def make_results(
    config: Config,
    hash_: str,
    data: TokenData,
    device: Device,
    state: dict[str, Any],
    final: Scores | None,
    test: Scores | None,
) -> dict[str, Any]:
    """Return the results of a run that has ended.

    ``state`` is the Journal's; ``final`` is None for a run that diverged.
    """
    return {
        "schema_version": rundir.SCHEMA_VERSION,
        "study": config.study,
        "run_name": config.run_name,
        "config_hash": hash_,
        "git_commit": rundir.git_commit(),
        "seed": config.seed,
        "status": state["status"],
        **_losses(state, data, final, test),
        "skipped_steps": state["skipped_steps"],
        "grad_norm_spikes": state["grad_norm_spikes"],
        **sizes_of(config, data, state["steps"]),
        "schedule_finished": state["steps"] >= data.plan.total_steps,
        **_recipe(config, data, device),
        **survey.results(data.prepared.index.get("survey")),
        **_speed(config, data, device, state),
    }


def planned(config: Config, data: TokenData, device: Device) -> dict[str, Any]:
    """Return the results that are known before training: sizes and recipe."""
    return {
        "seed": config.seed,
        **sizes_of(config, data, data.plan.total_steps),
        **_recipe(config, data, device),
        "flops_per_token": _flops_per_token(config, data),
    }


def _flops_per_token(config: Config, data: TokenData) -> float:
    vocab_size = data.prepared.tokenizer.vocab_size
    return flops_per_token(config.model, vocab_size, lora_rank=config.optim.lora.rank)


def _losses(
    state: dict[str, Any], data: TokenData, final: Scores | None, test: Scores | None
) -> dict[str, Any]:
    nothing = Scores(0, 0, 0, 0)
    val = final.named("val") if final else dict.fromkeys(nothing.named("val"))
    is_best = state["best_val_step"] == state["steps"]  # else, of the part scored during training
    losses: dict[str, float | None] = {
        **{f"final_{name}": value for name, value in val.items()},
        "final_val_loss_standard_error": final.standard_error if final else None,
        "initial_val_loss": state["initial_val_loss"],
        "best_val_loss": final.loss if final and is_best else state["best_val_loss"],
        "best_val_step": state["best_val_step"],
        "final_train_loss": state["final_train_loss"],
        "irreducible_loss_exact": data.floor("val"),
        **(test.named("test") if test else dict.fromkeys(nothing.named("test"))),
        "test_loss_standard_error": test.standard_error if test else None,
        "test_irreducible_loss_exact": data.floor("test") if "test" in data.splits else None,
    }
    # JSON has no NaN and no infinity
    return {k: v if v is None or math.isfinite(v) else None for k, v in losses.items()}


def sizes_of(config: Config, data: TokenData, steps: int) -> dict[str, Any]:
    """Return the results that describe the size of a run of ``steps`` steps."""
    model, vocab_size = config.model, data.prepared.tokenizer.vocab_size
    sizes, rank = count_parameters(model, vocab_size), config.optim.lora.rank
    tokens = steps * config.train.batch_tokens
    return {
        "model_parameters": sizes.total,
        "parameters_non_embedding": sizes.non_embedding,
        "parameters_embedding": sizes.embedding,
        "trainable_parameters": sizes.total if rank is None else lora_parameters(model, rank),
        "total_steps": steps,
        "train_tokens": tokens,
        "unique_train_tokens": min(tokens, data.windows.used_tokens),
        "dropped_tokens": data.windows.dropped_tokens,
        "flops_6nd": flops_6nd(sizes.total, tokens),
        "flops_exact": _flops_per_token(config, data) * tokens,
        "d_model": model.d_model,
        "d_ff": resolved_d_ff(model),
        "n_layers": model.n_layers,
        "n_heads": model.n_heads,
        "max_seq_len": model.max_seq_len,
        "parametrization": model.parametrization,
        "vocab_size": vocab_size,
    }


def _recipe(config: Config, data: TokenData, device: Device) -> dict[str, Any]:
    index, tokenizer = data.prepared.index, data.prepared.tokenizer
    train, val, test = (index["splits"][name] for name in ("train", "val", "test"))
    return {
        "init_from": config.init_from,
        "tokenizer": tokenizer.kind,
        "document_start": tokenizer.start_text,
        "dataset": corpora.describe(config.data),
        "data_fraction": config.data.fraction,
        "batch_tokens": config.train.batch_tokens,
        "learning_rate": config.optim.learning_rate,
        "weight_decay": config.optim.weight_decay,
        "warmup_steps": data.plan.warmup_steps,
        "optimizer": config.optim.kind,
        "schedule": config.schedule.kind,
        "precision_resolved": device.precision,
        "threads": torch.get_num_threads(),
        "devices": device.world_size,
        "tokenizer_fingerprint": index["tokenizer_fingerprint"],
        "data_fingerprint": train["fingerprint"],
        "validation_fingerprint": val["fingerprint"],
        "val_tokens": scored_tokens(val),
        "val_every": data.val_every(),  # one in so many windows is scored during training
        **{f"corpus_{name}": train[name] for name in ("tokens", "documents", "bytes")},
        "test_tokens": scored_tokens(test) if test else None,
        "test_documents": test["documents"] if test else None,
        # a text that is one stream has no documents to count
        "val_documents": val["documents"] if val["documents"] + train["documents"] > 2 else None,
    }


def _speed(
    config: Config, data: TokenData, device: Device, state: dict[str, Any]
) -> dict[str, Any]:
    seconds = state["seconds"]
    tokens = state["steps"] * config.train.batch_tokens
    rate = tokens / seconds if seconds > 0 else None
    flops, peak = _flops_per_token(config, data), _peak_flops(device)
    return {
        "tokens_per_second": rate,
        "seconds_training": seconds,
        "peak_memory_bytes": peak_memory(device.accelerator),
        "mfu": flops * rate / (peak * device.world_size) if peak and rate else None,
    }


def _peak_flops(device: Device) -> int | None:
    """Return the GPU's published FLOP/s at the run's precision, if Lightning's table has it."""
    if device.accelerator != "cuda":
        return None
    dtypes = {"32": torch.float32, "64": torch.float64, "16-mixed": torch.float16}
    dtype = dtypes.get(device.precision, torch.bfloat16)
    return get_available_flops(torch.device("cuda", torch.cuda.current_device()), dtype)
