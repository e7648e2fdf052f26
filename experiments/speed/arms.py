"""The rivals of tinygpt's Trainer, each as a process that works in turns: python arms.py JOB."""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from plain import Batches, PlainGPT, Recipe, Shape, batches, training
from torch import Tensor, nn
from torch.nn import functional as F

from tinygpt import cli
from tinygpt.config import AdamOptim, Config, DecaySchedule
from tinygpt.data.datamodule import TokenData, TrainBatches
from tinygpt.measuring.tokens import open_tokens
from tinygpt.measuring.training import clock_of, facts_of, probe_loss
from tinygpt.measuring.turns import Lap, Player
from tinygpt.model.gpt import GPT
from tinygpt.training.calibration import AUTOCAST
from tinygpt.training.hardware import keep_freed_memory, set_threads
from tinygpt.training.module import LanguageModel
from tinygpt.training.optim import make_optimizer
from tinygpt.training.session import open_data
from tinygpt.training.trainer import resolve_device

Loop = tuple[Iterator[Any], Callable[[Tensor, Tensor], Tensor], nn.Module]

NAMES = {  # tinygpt's modules as nanoGPT and GPT-2 name them
    "token_embedding": "wte",
    "position_embedding": "wpe",
    "blocks": "h",
    "norm_1": "ln_1",
    "norm_2": "ln_2",
    "norm_final": "ln_f",
    "attention": "attn",
    "qkv": "c_attn",
    "proj": "c_proj",
    "up": "c_fc",
    "down": "c_proj",
}


def shape_of(config: Config, vocab_size: int) -> Shape:
    model = config.model
    return Shape(model.n_layers, model.d_model, model.n_heads, model.max_seq_len, vocab_size)


def recipe_of(config: Config, total_steps: int, warmup_steps: int) -> Recipe:
    optim, schedule, clip = config.optim, config.schedule, config.train.grad_clip_norm
    assert isinstance(optim, AdamOptim)
    assert isinstance(schedule, DecaySchedule)
    assert clip is not None
    return Recipe(
        learning_rate=optim.learning_rate,
        least_rate=optim.learning_rate * schedule.min_ratio,
        warmup_steps=warmup_steps,
        total_steps=total_steps,
        weight_decay=optim.weight_decay,
        betas=(optim.betas[0], optim.betas[1]),
        grad_clip=clip,
    )


def autocast(config: Config) -> AbstractContextManager[Any]:
    dtype = AUTOCAST.get(config.train.precision)
    return torch.autocast("cpu", dtype) if dtype else contextlib.nullcontext()


def initial_weights(config: Config, vocab_size: int) -> dict[str, Tensor]:
    """What tinygpt begins with for this seed, by GPT-2's names."""
    torch.manual_seed(config.seed)
    weights = GPT(config.model, vocab_size).state_dict()
    renamed = {
        ".".join(NAMES.get(part, part) for part in name.split(".")): value
        for name, value in weights.items()
    }
    return {**renamed, "lm_head.weight": renamed["wte.weight"]}


def plain_loop(config: Config, data: TokenData, get_batch: Batches, recipe: Recipe) -> Loop:
    vocab_size = data.prepared.tokenizer.vocab_size
    model = PlainGPT(shape_of(config, vocab_size))
    model.load_state_dict(initial_weights(config, vocab_size))

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        loss: Tensor = model(x, y)[1]
        return loss

    return training(model, loss_of, get_batch, recipe, autocast(config)), loss_of, model


def transformers_loop(config: Config, data: TokenData, get_batch: Batches, recipe: Recipe) -> Loop:
    from transformers import GPT2Config, GPT2LMHeadModel

    vocab_size = data.prepared.tokenizer.vocab_size
    shape = shape_of(config, vocab_size)
    model = GPT2LMHeadModel(
        GPT2Config(  # type: ignore[call-arg]
            vocab_size=shape.vocab_size,
            n_positions=shape.context,
            n_embd=shape.d_model,
            n_layer=shape.n_layers,
            n_head=shape.n_heads,
            activation_function="gelu",
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            resid_pdrop=0.0,
            use_cache=False,
            bos_token_id=None,
            eos_token_id=None,
            attn_implementation="sdpa",
        )
    )
    weights = initial_weights(config, vocab_size)
    names = [name for name in weights if name.endswith(".weight") and ".c_" in name]
    weights |= {name: weights[name].T.contiguous() for name in names}  # its Conv1D is (in, out)
    head = weights.pop("lm_head.weight")
    model.load_state_dict(
        {"lm_head.weight": head} | {f"transformer.{name}": value for name, value in weights.items()}
    )

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        loss: Tensor = model(input_ids=x, labels=x).loss
        return loss

    loop = training(model, loss_of, get_batch, recipe, autocast(config))

    def loss_of_all(x: Tensor, y: Tensor) -> Tensor:
        """Its own is without the last target of each window."""
        return F.cross_entropy(model(input_ids=x).logits.flatten(0, 1), y.flatten())

    return loop, loss_of_all, model


def raw_loop(config: Config, data: TokenData, get_batch: Batches, recipe: Recipe) -> Loop:
    """tinygpt's own parts, and nothing around them: what Lightning adds is the difference."""
    assert data.plan is not None
    torch.manual_seed(config.seed)
    module = LanguageModel(config, data.prepared.tokenizer.vocab_size, data.plan)
    own = TrainBatches(
        data.splits["train"], data.windows, length=data.length, seed=config.seed, plan=data.plan
    )

    def steps() -> Iterator[None]:
        module.train()
        optimizer = make_optimizer(module.model, config.optim, fused=True)
        peak = config.optim.learning_rate
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: module.rate(s) / peak)
        for step in itertools.count():
            with autocast(config):
                loss = module.training_step(own[step], step)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            module.configure_gradient_clipping(optimizer)
            optimizer.step()
            schedule.step()
            yield

    return steps(), module.model, module


LOOPS = {"plain": plain_loop, "transformers": transformers_loop, "raw": raw_loop}


def play(arm: str, overrides: list[str], folder: Path, keeps: bool, player: Player) -> None:
    config = cli.compose_config(overrides)
    device = resolve_device(config.hardware, config.train.precision)
    set_threads(config.hardware, device)
    if keeps:
        keep_freed_memory()
    prepared = open_tokens(folder)
    data = open_data(config, prepared, device)
    assert data.plan is not None
    dtype, context = prepared.index["dtype"], config.model.max_seq_len
    get_batch = batches(
        folder / "train.bin", dtype, data.plan.batch_size, context, seed=config.seed
    )
    recipe = recipe_of(config, data.plan.total_steps, data.plan.warmup_steps)
    loop, loss_of, model = LOOPS[arm](config, data, get_batch, recipe)
    facts = facts_of(config, data, device)
    facts |= {
        "parameters": sum(p.numel() for p in model.parameters()),
        "probe_loss": probe_loss(loss_of, data),
    }
    clock = clock_of(device)

    def work(steps: int) -> dict[str, Lap]:
        clock.start()
        for _ in range(steps):
            next(loop)
        return {"train": clock.lap(steps * config.train.batch_tokens)}

    work(3)
    player.serve(facts, work)


if __name__ == "__main__":
    job, player = json.loads(sys.argv[1]), Player()
    with player.failing_in_a_line():
        play(job["arm"], job["overrides"], Path(job["tokens"]), job["keeps"], player)
