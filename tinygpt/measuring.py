"""Time one configuration of ``python -m tinygpt.run``, in a process that does nothing else.

``tinygpt.benchmark`` starts it: each model has a peak of memory, threads and compiled code of its
own in a process of its own.
"""

from __future__ import annotations

import csv
import itertools
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.callbacks import LambdaCallback
from rich.console import Console
from torch import Tensor
from torch.utils.benchmark import Timer

from tinygpt import cli, fileio, rundir
from tinygpt.config import Config
from tinygpt.counting import count_parameters, flops_per_token
from tinygpt.data import corpora, shards
from tinygpt.data.datamodule import TrainBatches
from tinygpt.model.generate import generate
from tinygpt.training.hardware import AUTOCAST, Device, quiet_lightning
from tinygpt.training.module import LanguageModel
from tinygpt.training.session import open_data, open_machine, train
from tinygpt.training.trainer import make_trainer

Row = dict[str, Any]


def row(measure: str, unit: str, samples: Sequence[float], scale: float = 1.0) -> Row:
    """Return a row of the table: the median and the quartiles of ``scale`` times the samples."""
    low, median, high = np.percentile(np.asarray(samples) * scale, (25, 50, 75)).tolist()
    numbers = {"median": median, "low": low, "high": high, "samples": len(samples)}
    return {"measure": measure, **numbers, "unit": unit, "threads": torch.get_num_threads()}


def rate(measure: str, unit: str, amount: float, seconds: Sequence[float]) -> Row:
    """Return a row with ``amount`` over the median and the quartiles of ``seconds``."""
    found = row(measure, unit, seconds)
    slow, fast = amount / found["high"], amount / found["low"]
    return found | {"median": amount / found["median"], "low": slow, "high": fast}


class Bench:
    """The parts of one configuration: its data, its model and its steps."""

    def __init__(self, config: Config, seconds: float, compiled: str = "off") -> None:
        self.config, self.seconds, self.device = config, seconds, open_machine(config)
        corpus, cache = corpora.open_corpus(config.data), shards.cache_root(config.cache_dir)
        tokenized = shards.prepare(corpus, config.data, config.tokenizer, cache, lambda *_: None)
        self.tokenizer, self.data = tokenized.tokenizer, open_data(config, tokenized, self.device)
        assert self.data.plan is not None
        split, windows, self.plan = self.data.splits["train"], self.data.windows, self.data.plan
        self.batches = TrainBatches(
            split, windows, length=self.data.length, seed=config.seed, plan=self.plan
        )
        self.module = LanguageModel(config, self.tokenizer.vocab_size, self.plan)
        self.model = self.module.model
        self.dtype = {**AUTOCAST, "64": torch.float64}.get(self.device.precision, torch.float32)
        self.module.to(self.device.accelerator)
        if self.device.precision == "64":
            self.module.double()
        if compiled == "on":
            self.model.compile()

    def timed(self, work: Callable[[], object]) -> list[float]:
        """Return the seconds of a call, once for each block of calls that torch's timer makes."""
        timer = Timer("work()", globals={"work": work}, num_threads=torch.get_num_threads())
        return timer.blocked_autorange(min_run_time=self.seconds).times

    def autocast(self) -> torch.autocast:
        """Return the context of a pass in mixed precision, or one that does nothing."""
        device = self.device
        return torch.autocast(device.accelerator, self.dtype, device.precision in AUTOCAST)

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the loss of one pass, in the precision of the run."""
        inputs, targets = (part.to(self.device.accelerator) for part in batch)
        with self.autocast():
            loss: Tensor = self.model(inputs, targets)
        return loss

    def bare_step(self) -> Callable[[], None]:
        """Return a training step without Lightning: the same batches, model and optimizer."""
        limit, passes = self.config.train.grad_clip_norm, self.plan.accumulate
        optimizer, schedule = self.module.make_optimizer(fused=self.device.accelerator != "mps")
        index = itertools.count()

        def step() -> None:
            for _ in range(passes):
                torch.autograd.backward(self.loss(self.batches[next(index)]) / passes)
            if limit is not None:
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit, foreach=True)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()

        return step

    def of_model(self, steps: Sequence[float], peak_memory: float) -> Iterator[Row]:
        """Yield what training and sampling cost; ``steps`` are the real Trainer's, in seconds."""
        config, model, device = self.config, self.model, self.device.accelerator
        tokens, passes = config.train.batch_tokens, self.plan.accumulate
        flops = tokens * flops_per_token(config.model, self.tokenizer.vocab_size)
        parameters = count_parameters(config.model, self.tokenizer.vocab_size).total
        side = 1024 if device == "cpu" else 8192  # large enough for full speed
        a, b = (torch.randn(side, side, device=device).to(self.dtype) for _ in range(2))
        product = rate("matrix product", "GFLOP/s", 2e-9 * side**3, self.timed(lambda: a @ b))
        best = 1e9 * product["median"] * self.device.world_size
        yield row("parameters", "", [parameters])
        yield row("tokens per step", "", [tokens])
        yield rate("training", "tokens/s", tokens, steps)
        yield row("training step", "ms", steps, 1e3)
        yield rate("training FLOPs", "GFLOP/s", 1e-9 * flops, steps)
        yield product
        yield rate("MFU", "%", 100 * flops / best, steps)
        yield row("peak memory", "MB", [peak_memory], 1e-6)
        yield row("bare step", "ms", self.timed(self.bare_step()), 1e3)
        batch, weights = self.batches[0], list(model.parameters())
        yield row("forward", "ms", self.timed(lambda: self.loss(batch)), 1e3 * passes)
        both = self.timed(lambda: torch.autograd.grad(self.loss(batch), weights))
        yield row("forward+backward", "ms", both, 1e3 * passes)
        prompt = torch.zeros(1, 1, dtype=torch.long, device=device)
        count = max(1, config.model.max_seq_len - 1)
        with self.autocast():
            sampling = self.timed(lambda: generate(model, prompt, count))
        yield rate("generation", "tokens/s", count, sampling)
        documents = corpora.open_corpus(config.data).documents("train")
        texts = list(corpora.first_bytes((document.text for document in documents), 1_000_000))
        size = 1e-6 * sum(len(text.encode()) for text in texts)
        encode = self.tokenizer.encode_batch
        yield rate("tokenization", "MB/s", size, self.timed(lambda: encode(texts)))

    def overhead(self) -> Iterator[Row]:
        """Yield what Lightning adds to a step: CPU time, of steps with and without it in turns."""
        bare_step, marks = self.bare_step(), list[float]()

        def after_step(*_: Any) -> None:
            marks.append(time.process_time())
            bare_step()
            marks.append(time.process_time())

        callback = LambdaCallback(on_train_batch_end=after_step)
        place, plan = rundir.RunDir(Path(self.config.output_dir)), self.plan
        trainer = make_trainer(place, plan, self.device, [callback], plan.total_steps)
        module = LanguageModel(self.config, self.tokenizer.vocab_size, self.plan)
        with quiet_lightning():
            trainer.fit(module, datamodule=self.data)
        begun, ended = np.reshape(marks, (-1, 2)).T  # of the bare steps
        ours, bare = begun[1:] - ended[:-1], (ended - begun)[1:]
        yield row("Trainer's step", "CPU ms", ours, 1e3)
        yield row("bare step", "CPU ms", bare, 1e3)
        yield row("Lightning's part", "CPU ms", ours - bare, 1e3)


def environment(device: Device) -> str:
    """Return the machine and the software in a line."""
    found, path = rundir.environment(), Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", path.read_text() if path.exists() else "")
    return (
        f"{device.name}, precision {device.precision}; "
        f"{names[0] if names else found['processor']}, {found['cpu_count']} cores, "
        f"{torch.backends.cpu.get_cpu_capability()}; torch {torch.__version__}, "
        f"Python {found['python']}, {found['platform']}; tinygpt {found['git_commit']}"
    )


@cli.one_line_errors
def main() -> None:
    out, seconds, what, *overrides = sys.argv[1:]
    config = cli.compose_config(overrides)
    if what == "overhead":
        rows = list((bench := Bench(config, float(seconds))).overhead())
    else:
        train(config, [], Console(quiet=True))
        run = rundir.RunDir(Path(config.output_dir, str(config.study), str(config.run_name)))
        with run.metrics.open(newline="") as file:
            lines = [line for line in csv.DictReader(file) if line["tokens_per_second"]]
        rates = [float(line["tokens_per_second"]) for line in lines[1:]]  # the first warms up
        bench = Bench(config, float(seconds), fileio.read_json(run.environment)["compile"])
        steps = [config.train.batch_tokens / rate for rate in rates]
        rows = list(bench.of_model(steps, float(lines[-1]["peak_memory_bytes"])))
    fileio.write_json(Path(out), {"environment": environment(bench.device), "rows": rows})


if __name__ == "__main__":
    main()
