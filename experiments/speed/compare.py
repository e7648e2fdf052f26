"""Times a training step of tinygpt beside two other programs that do the same work, on a CPU.

python experiments/speed/compare.py suite=true
python experiments/speed/compare.py model=small batch_size=8 vocab_size=50257
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import platform
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import torch
from plain import PlainGPT, Recipe, Shape, batches, training
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.benchmark import Timer

from tinygpt import cli, fileio, signals
from tinygpt.config import Config, RunError, key, one_line
from tinygpt.config.counting import flops_per_token
from tinygpt.data.corpora import Document
from tinygpt.data.shards import Prepared
from tinygpt.data.tokenizers import Char
from tinygpt.data.writing import SplitWriter
from tinygpt.model.kernels import Linear
from tinygpt.runs import rundir
from tinygpt.training.hardware import choose_slices
from tinygpt.training.module import LanguageModel
from tinygpt.training.session import Run, open_data, open_machine

USAGE = """\
python experiments/speed/compare.py [key=value ...]

model=tiny              one of conf/model; nanogpt: slm_nano without biases, and no transformers,
                        whose GPT-2 always has them
batch_size=16           windows a step
vocab_size=4096
threads=1               of each program
steps=4 rounds=20       a round: so many steps of each program, there and back through their order
isa=auto                avx2: leave AVX-512 unused, in every program
suite=true              instead of one case: all of the README, half an hour
profile=true            instead of a comparison: the operators of so many steps of tinygpt
output_dir=outputs/speed    where results.csv or profile-<model>-<vocab_size>.txt is written
"""
SUITE = (  # model, batch size, vocabulary, steps that take a second or two
    *(("tiny", 16, 4096, 4), ("small", 8, 4096, 4), ("medium", 4, 4096, 2), ("large", 2, 4096, 1)),
    *(("tiny", 16, 50257, 1), ("small", 8, 50257, 1), ("medium", 4, 50257, 1)),
    *(("large", 2, 50257, 1), ("nanogpt", 12, 65, 40)),  # the last: as its README trains on a CPU
)
RECIPE = Recipe(
    learning_rate=3e-3,
    least_rate=3e-4,
    warmup_steps=50_000,
    total_steps=1_000_000,
    weight_decay=0.1,
    betas=(0.9, 0.95),
    grad_clip=1.0,
)
AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
AVX2 |= {"MKL_ENABLE_INSTRUCTIONS": "AVX2"}  # which MKL heeds on Intel's processors
CLOCKS = {"cpu": time.process_time, "wall": time.perf_counter}
PRODUCTS = ("mkldnn::_linear_pointwise", *(f"aten::{name}" for name in ("mm", "addmm", "addmm_")))
# tinygpt's modules as nanoGPT and GPT-2 name them
NAMES = {"token_embedding": "wte", "position_embedding": "wpe", "blocks": "h", "attention": "attn"}
NAMES |= {"norm_1": "ln_1", "norm_2": "ln_2", "norm_final": "ln_f"}
NAMES |= {"qkv": "c_attn", "proj": "c_proj", "up": "c_fc", "down": "c_proj"}
Loss = Callable[[Tensor, Tensor], Tensor]
Row = dict[str, Any]


@dataclass
class Arguments:
    model: str = "tiny"
    batch_size: int = key(16, least=1)
    vocab_size: int = key(4096, least=4, most=50257)
    threads: int = key(1, least=1)
    rounds: int = key(20, least=1)
    steps: int = key(4, least=1)
    isa: str = key("auto", among=("auto", "avx2"))
    suite: bool = False
    profile: bool = False
    output_dir: str = "outputs/speed"


def config_of(case: Arguments) -> Config:
    """Return the configuration of ``tinygpt.run`` that does the work.  Raise ConfigError."""
    model = ("slm_nano", "model.bias=false") if case.model == "nanogpt" else (case.model,)
    config = cli.compose_config(
        [
            *(f"model={model[0]}", *model[1:], "model.activation=gelu", "tokenizer=char"),
            *("optim=adamw", f"optim.learning_rate={RECIPE.learning_rate}"),
            *(f"optim.weight_decay={RECIPE.weight_decay}", f"optim.betas={[*RECIPE.betas]}"),
            *("schedule=cosine", f"schedule.warmup_steps={RECIPE.warmup_steps}"),
            f"schedule.min_ratio={RECIPE.least_rate / RECIPE.learning_rate}",
            *(f"train.steps={RECIPE.total_steps}", f"train.grad_clip_norm={RECIPE.grad_clip}"),
            *(f"train.{name}_every={10**15}" for name in ("eval", "checkpoint")),
            *("train.precision=32", "train.sample_tokens=0", "logger=csv"),
            *("hardware.accelerator=cpu", f"hardware.threads={case.threads}"),
        ]
    )
    config.train.batch_tokens = case.batch_size * config.model.max_seq_len
    return config


# --- the processes that train


def turns(pipe: Connection, model: nn.Module, loss_of: Loss, batch: list[Tensor]) -> Iterator[None]:
    """Yield before each of the steps that the other end asks for, and tell it what they took.

    First tell it what must be the same in every process.
    """
    with torch.no_grad():
        loss = float(loss_of(*batch))
    isa = torch.backends.cpu.get_cpu_capability()
    pipe.send({"parameters": sum(p.numel() for p in model.parameters()), "loss": loss, "isa": isa})
    while True:
        steps, is_profiled = pipe.recv()
        with torch.profiler.profile() if is_profiled else contextlib.nullcontext() as profiler:
            begun = [clock() for clock in CLOCKS.values()]
            for _ in range(steps):
                yield
            took = [clock() - first for clock, first in zip(CLOCKS.values(), begun, strict=True)]
        pipe.send(operators(profiler) if profiler else took)


def operators(profiler: torch.profiler.profile) -> Row:
    """Return the table of the operators, the seconds of all and of matrix products, and how many
    FLOPs a second one large product reaches by the same library."""
    found, side = profiler.key_averages(), 1024
    layer, x = Linear(side, side, bias=False), torch.randn(side, side)
    with torch.no_grad():
        timer = Timer("layer(x)", globals=locals(), num_threads=torch.get_num_threads())
        seconds = timer.blocked_autorange(min_run_time=1.0).median
    return {
        "table": re.sub(" +$", "", found.table("self_cpu_time_total", row_limit=12), flags=re.M),
        "seconds": 1e-6 * sum(e.self_cpu_time_total for e in found),
        "products": 1e-6 * sum(e.self_cpu_time_total for e in found if e.key in PRODUCTS),
        "best": 2 * side**3 / seconds,
    }


def random_tokens(folder: Path, vocab_size: int, length: int) -> Prepared:
    """Write shards of random ids: two million to train on, and a window to validate on."""
    tokenizer = Char("".join(map(chr, range(vocab_size - 3))))  # and three special tokens
    random, splits = np.random.default_rng(0), {}
    for name, count in (("train", 2_000_000), ("val", length)):
        writer = SplitWriter(folder, name, tokenizer, limit=None)
        ids = random.integers(vocab_size, size=count - 1, dtype=np.uint32)
        writer.add(Document("random"), ids)  # an end of text is written before and behind it
        splits[name] = writer.finish()
    return Prepared(folder, {"dtype": writer.dtype.name, "splits": splits}, tokenizer)


class Turns(pl.Callback):
    """Holds the Trainer between two steps until it is asked for more."""

    def __init__(self, steps: Iterator[None]) -> None:
        self.steps = steps

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            next(self.steps)


def train_tinygpt(config: Config, vocab_size: int, folder: Path, pipe: Connection) -> None:
    """Train as ``tinygpt.run`` does; leave the initial weights and a batch for the others."""
    device, length = open_machine(config), config.model.max_seq_len
    data = open_data(config, random_tokens(folder, vocab_size, length), device)
    assert data.plan is not None
    module = LanguageModel(config, vocab_size, data.plan)
    module.slices = choose_slices(config, vocab_size, data.plan, device, {})
    starts = length * np.arange(data.plan.batch_size)
    tokens = torch.from_numpy(data.splits["train"].gather(starts, length + 1))
    batch = [tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()]
    torch.save({"weights": module.model.state_dict(), "batch": batch}, folder / "start.pt")
    place = rundir.RunDir(folder / "run")
    place.checkpoints.mkdir(parents=True)
    steps = turns(pipe, module.model, module.model, batch)
    Run(config, place, data, device, "", module, ()).train(False, [Turns(steps)], None)


def train_rival(name: str, config: Config, vocab_size: int, folder: Path, pipe: Connection) -> None:
    """Train another model from tinygpt's weights, on its tokens, in the plain loop."""
    model = config.model
    torch.set_num_threads(config.hardware.threads or 1)
    start = torch.load(folder / "start.pt", weights_only=True)
    weights = {
        ".".join(NAMES.get(part, part) for part in name.split(".")): value
        for name, value in start["weights"].items()
    }
    weights["lm_head.weight"] = weights["wte.weight"]
    sizes = model.n_layers, model.d_model, model.n_heads, model.max_seq_len
    shape, make = Shape(*sizes, vocab_size, model.bias), RIVALS[name]
    made, own_loss, loss_of_all = make(shape, weights)
    size = config.train.batch_tokens // shape.context
    get_batch = batches(folder / "train_00000.bin", "uint16", size, shape.context, seed=0)
    loop = training(made, own_loss, get_batch, RECIPE, contextlib.nullcontext())
    for _ in turns(pipe, made, loss_of_all, start["batch"]):
        next(loop)


def make_plain(shape: Shape, weights: dict[str, Tensor]) -> tuple[nn.Module, Loss, Loss]:
    """Return the plain model and, twice, its loss, which is that of all positions."""
    model = PlainGPT(shape)
    model.load_state_dict(weights)

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        loss: Tensor = model(x, y)[1]
        return loss

    return model, loss_of, loss_of


def make_transformers(shape: Shape, weights: dict[str, Tensor]) -> tuple[nn.Module, Loss, Loss]:
    """Return GPT-2 of transformers, its own loss and that of all positions."""
    from transformers import GPT2Config, GPT2LMHeadModel

    settings: Row = {"n_layer": shape.n_layers, "n_embd": shape.d_model, "n_head": shape.n_heads}
    settings |= {"n_positions": shape.context, "vocab_size": shape.vocab_size}
    settings |= dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0)
    settings |= dict.fromkeys(("bos_token_id", "eos_token_id"))
    settings |= {"activation_function": "gelu", "attn_implementation": "sdpa", "use_cache": False}
    model = GPT2LMHeadModel(GPT2Config(**settings))
    is_turned = re.compile(r"\.c_\w+\.weight$").search  # its Conv1D is (in, out)
    head = weights.pop("lm_head.weight")
    named = {f"transformer.{n}": w.t() if is_turned(n) else w for n, w in weights.items()}
    model.load_state_dict({**named, "lm_head.weight": head})

    def own_loss(x: Tensor, y: Tensor) -> Tensor:
        loss: Tensor = model(input_ids=x, labels=x).loss
        return loss

    def loss_of_all(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(input_ids=x).logits.flatten(0, 1), y.flatten())

    return model, own_loss, loss_of_all


RIVALS = {"plain": make_plain, "transformers": make_transformers}


def work(name: str, config: Config, vocab_size: int, folder: Path, pipe: Connection) -> None:
    """Train until the other end is gone; where that fails, send it a line that says why."""
    try:
        if name == "tinygpt":
            train_tinygpt(config, vocab_size, folder, pipe)
        else:
            train_rival(name, config, vocab_size, folder, pipe)
    except (EOFError, ConnectionError):
        pass
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {one_line(error)}")


# --- the process that compares them


class Program:
    """One of the programs, waiting in a process of its own."""

    def __init__(self, name: str, config: Config, vocab_size: int, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.name, (self.pipe, far) = name, context.Pipe()
        words = (name, config, vocab_size, folder, far)
        self.process = context.Process(target=work, args=words, daemon=True)
        with signals.not_for_children():  # this process ends them
            self.process.start()
        far.close()

    def ask(self, *message: Any) -> Any:
        """Return what the process sends next, after it is told ``message``.  Raise RunError."""
        try:
            if message:
                self.pipe.send(message)
            answer = self.pipe.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            code = self.process.exitcode
            raise RunError(f"{self.name}: its process ended with code {code}") from None
        if isinstance(answer, str):
            raise RunError(f"{self.name}: {answer}")
        return answer

    def seconds(self, steps: int) -> list[float]:
        """Return what so many steps took by each of CLOCKS."""
        took: list[float] = self.ask(steps, False)
        return took


@contextlib.contextmanager
def started(
    names: Sequence[str], config: Config, vocab_size: int
) -> Iterator[tuple[list[Program], str]]:
    """Start the programs one after the other, tinygpt first, and end them behind the block.

    Yield them, warm, and the instructions that they use.
    """
    with tempfile.TemporaryDirectory(prefix="tinygpt-") as folder, contextlib.ExitStack() as stack:
        programs, facts = [], dict[str, Row]()
        for name in names:
            programs.append(program := Program(name, config, vocab_size, Path(folder)))
            stack.callback(program.process.join)
            stack.callback(program.process.kill)
            facts[name] = program.ask()
        check_same_work(facts)
        for program in programs:
            program.seconds(3)
        yield programs, facts["tinygpt"]["isa"]


def check_same_work(facts: dict[str, Row]) -> None:
    """Raise RunError unless all have as many parameters and, from the same weights, one loss."""
    ours = facts["tinygpt"]
    for name, theirs in facts.items():
        is_alike = all(theirs[fact] == ours[fact] for fact in ("parameters", "isa"))
        if not (is_alike and abs(theirs["loss"] - ours["loss"]) < 1e-4):
            raise RunError(f"{name} does not do the same work: {theirs}, tinygpt: {ours}")


def median_interval(values: Any) -> tuple[float, float, float]:
    """Return the median and its 95 % bootstrap interval."""
    drawn = np.random.default_rng(0).choice(values, (10_000, len(values)))
    low, high = np.percentile(np.median(drawn, axis=1), (2.5, 97.5))
    return float(np.median(values)), float(low), float(high)


def compare(case: Arguments) -> list[Row]:
    """Return a row for each rival and clock."""
    config = config_of(case)
    names = ["tinygpt", *(RIVALS if config.model.bias else ["plain"])]
    seconds = {name: np.zeros((case.rounds, len(CLOCKS))) for name in names}
    with started(names, config, case.vocab_size) as (programs, isa):
        for number in range(case.rounds):
            for program in [*programs, *reversed(programs)]:
                seconds[program.name][number] += program.seconds(case.steps)
    tokens, rows = 2 * case.steps * config.train.batch_tokens, list[Row]()
    sizes = {name: getattr(case, name) for name in ("threads", "batch_size", "vocab_size")}
    for rival in names[1:]:
        for column, clock in enumerate(CLOCKS):
            ours, theirs = seconds["tinygpt"][:, column], seconds[rival][:, column]
            ratio, low, high = median_interval(theirs / ours)
            row = {"case": case.model, "processor": processor(), "isa": isa, **sizes}
            row |= {"rival": rival, "clock": clock, "rounds": case.rounds}
            row["tinygpt_tokens_per_second"] = float(np.median(tokens / ours))
            rows.append({**row, "ratio": ratio, "low": low, "high": high})
    return rows


def processor() -> str:
    """Return the processor's name, as Linux has it."""
    path = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", path.read_text() if path.exists() else "")
    return str(names[0]) if names else platform.processor()


def heading(case: Arguments, isa: str) -> str:
    return (
        f"{case.model}: batch {case.batch_size}, vocabulary {case.vocab_size:,}; {processor()}, "
        f"{isa}, threads {case.threads}"
    )


def show(case: Arguments, rows: Sequence[Row], console: Console) -> None:
    table = Table(box=None, pad_edge=False)
    for name in ("rival", "clock", "tinygpt, tokens/s", "times as fast", "95 %"):
        table.add_column(name, justify="left" if name in ("rival", "clock") else "right")
    for row in rows:
        speed, interval = row["tinygpt_tokens_per_second"], f"{row['low']:.2f} to {row['high']:.2f}"
        cells = (row["rival"], row["clock"], f"{speed:,.0f}", f"{row['ratio']:.2f}", interval)
        table.add_row(*cells)
    line = f"{heading(case, rows[0]['isa'])}, rounds {case.rounds}"
    console.print(line, table, "", sep="\n", highlight=False, soft_wrap=True)


def profile(case: Arguments) -> str:
    """Return where the time of a step of tinygpt goes, and how fast its matrix products are."""
    config = config_of(case)
    with started(["tinygpt"], config, case.vocab_size) as ((program,), isa):
        step = dict(zip(CLOCKS, program.seconds(case.steps), strict=True))["wall"] / case.steps
        found = program.ask(case.steps, True)
    per_token = flops_per_token(config.model, case.vocab_size, seq_len=0)  # 0: without attention
    flops = config.train.batch_tokens * per_token  # of the products of a step
    return (
        f"{heading(case, isa)}, steps {case.steps}\n{found['table']}\n"
        f"Matrix products: {100 * found['products'] / found['seconds']:.1f} % of this time, at "
        f"{1e-9 * flops * case.steps / found['products']:.1f} GFLOP/s.\n"
        f"One product of 1024 x 1024 alone: {1e-9 * found['best']:.1f} GFLOP/s.  At that speed "
        f"they would take {1e3 * flops / found['best']:.1f} ms of a step, which takes "
        f"{1e3 * step:.1f} ms without the profiler.\n"
    )


@cli.one_line_errors
def main() -> None:
    arguments = cli.read_arguments(Arguments, sys.argv[1:], USAGE)
    cases = [arguments]
    if arguments.suite:
        keys = ("model", "batch_size", "vocab_size", "steps")
        given: list[Row] = [dict(zip(keys, case, strict=True)) for case in SUITE]
        cases = [dataclasses.replace(arguments, **case) for case in given]
    for case in cases:
        config_of(case)  # a mistake is found before anything is timed
    if arguments.isa == "avx2":
        os.environ.update(AVX2)
    os.environ.update(KINETO_LOG_LEVEL="99", TRANSFORMERS_VERBOSITY="error")  # quiet libraries
    folder, console, rows = Path(arguments.output_dir), Console(), list[Row]()
    folder.mkdir(parents=True, exist_ok=True)
    for case in cases:
        if arguments.profile:
            fileio.write_text(
                folder / f"profile-{case.model}-{case.vocab_size}.txt", text := profile(case)
            )
            console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            show(case, found := compare(case), console)
            rows += found
            with fileio.replacing(folder / "results.csv") as temporary:
                pd.DataFrame(rows).to_csv(temporary, index=False)


if __name__ == "__main__":
    main()
