"""Time one configuration of ``python -m tinygpt.run`` in a process of its own.

``tinygpt.benchmark`` starts it, so that peak memory, threads and compiled code are of one model.
"""

from __future__ import annotations

import csv
import itertools
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.callbacks import LambdaCallback
from rich.console import Console
from torch import Tensor
from torch.utils.benchmark import Timer

from tinygpt import cli, fileio
from tinygpt.config import Config
from tinygpt.config.counting import count_parameters, flops_per_token
from tinygpt.data import corpora, shards
from tinygpt.data.datamodule import TrainBatches
from tinygpt.model.generate import generate
from tinygpt.runs import rundir
from tinygpt.training.hardware import AUTOCAST, Device, choose_slices, quiet_lightning
from tinygpt.training.module import LanguageModel
from tinygpt.training.session import open_data, open_machine, train
from tinygpt.training.slices import in_slices, mean_loss
from tinygpt.training.trainer import make_trainer

Row = dict[str, Any]
Samples = Any  # an array of numbers


class Bench:
    """Hold the data, model and steps of one configuration."""

    def __init__(self, config: Config, seconds: float, compiled: str = "off") -> None:
        self.config, self.seconds, self.device = config, seconds, open_machine(config)
        corpus, cache = corpora.open_corpus(config.data), shards.cache_root(config.cache_dir)
        tokenized = shards.prepare(corpus, config.data, config.tokenizer, cache, lambda *_: None)
        self.tokenizer, self.data = tokenized.tokenizer, open_data(config, tokenized, self.device)
        split, windows, self.plan = self.data.splits["train"], self.data.windows, self.data.plan
        self.batches = TrainBatches(
            split, windows, length=self.data.length, seed=config.seed, plan=self.plan
        )
        vocab_size = self.tokenizer.vocab_size
        self.module = LanguageModel(config, vocab_size, self.plan)
        self.model = self.module.model
        self.slices = choose_slices(config, vocab_size, self.plan, self.device, {})
        self.each = torch.get_num_threads()  # the threads of a slice
        self.threads = self.slices * self.each
        self.dtype = {**AUTOCAST, "64": torch.float64}.get(self.device.precision, torch.float32)
        self.module.to(self.device.accelerator)
        if self.device.precision == "64":
            self.module.double()
        if compiled == "on":
            self.model.compile()

    def timed(self, work: Callable[[], object], threads: int | None = None) -> Samples:
        """Return the seconds per call, one number for each block of torch's timer."""
        timer = Timer("work()", globals={"work": work}, num_threads=threads or self.each)
        return np.array(timer.blocked_autorange(min_run_time=self.seconds).times)

    def row(self, measure: str, unit: str, samples: Samples) -> Row:
        """Return a row of the table with the median and the quartiles of the samples."""
        low, median, high = np.percentile(samples, (25, 50, 75)).tolist()
        numbers = {"median": median, "low": low, "high": high, "samples": len(samples)}
        return {"measure": measure, **numbers, "unit": unit, "threads": self.threads}

    def autocast(self) -> torch.autocast:
        device = self.device
        return torch.autocast(device.accelerator, self.dtype, device.precision in AUTOCAST)

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the loss of one pass, in the precision of the run."""
        inputs, targets = (part.to(self.device.accelerator) for part in batch)
        with self.autocast():
            return mean_loss(self.model, self.slices, inputs, targets)

    def bare_step(self) -> Callable[[], None]:
        """Return a training step without Lightning: the same batches, model and optimizer."""
        limit, passes = self.config.train.grad_clip_norm, self.plan.accumulate
        optimizer, schedule = self.module.make_optimizer(fused=self.device.accelerator != "mps")
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        index = itertools.count()

        def step() -> None:
            for _ in range(passes):
                torch.autograd.backward(self.loss(self.batches[next(index)]) / passes)
            if limit is not None:
                torch.nn.utils.clip_grad_norm_(parameters, limit, foreach=True)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()

        return step

    def of_model(self, steps: Samples, peak_memory: float) -> Iterator[Row]:
        """Yield what training and sampling cost; ``steps`` are the Trainer's, in seconds."""
        config, model, device = self.config, self.model, self.device.accelerator
        tokens, passes = config.train.batch_tokens, self.plan.accumulate
        vocab_size = self.tokenizer.vocab_size
        speed = tokens * flops_per_token(config.model, vocab_size) / steps
        side = 1024 if device == "cpu" else 8192  # large enough for full speed
        a, b = (torch.randn(side, side, device=device).to(self.dtype) for _ in range(2))
        product = 2 * side**3 / self.timed(lambda: a @ b, self.threads)
        best = np.median(product) * self.device.world_size
        yield self.row("parameters", "", [count_parameters(config.model, vocab_size).total])
        yield self.row("tokens per step", "", [tokens])
        yield self.row("training", "tokens/s", tokens / steps)
        yield self.row("training step", "ms", 1e3 * steps)
        yield self.row("training FLOPs", "GFLOP/s", 1e-9 * speed)
        yield self.row("matrix product", "GFLOP/s", 1e-9 * product)
        yield self.row("MFU", "%", 100 * speed / best)
        yield self.row("peak memory", "MB", [1e-6 * peak_memory])
        yield self.row("bare step", "ms", 1e3 * self.timed(self.bare_step()))
        batch, weights = self.batches[0], list(model.parameters())
        batch = batch[0].to(device), batch[1].to(device)
        with self.autocast():
            forward = self.timed(lambda: in_slices(self.model, self.slices, batch, grad=True))
        yield self.row("forward", "ms", 1e3 * passes * forward)
        both = self.timed(lambda: torch.autograd.grad(self.loss(batch), weights))
        yield self.row("forward+backward", "ms", 1e3 * passes * both)
        prompt = torch.zeros(1, 1, dtype=torch.long, device=device)
        count = max(1, config.model.max_seq_len - 1)
        with self.autocast():
            sampling = self.timed(lambda: generate(model, prompt, count))
        yield self.row("generation", "tokens/s", count / sampling)
        documents = corpora.open_corpus(config.data).documents("train")
        texts = list(corpora.first_bytes((document.text for document in documents), 1_000_000))
        size = 1e-6 * sum(len(text.encode()) for text in texts)
        encoding = self.timed(lambda: self.tokenizer.encode_batch(texts))
        yield self.row("tokenization", "MB/s", size / encoding)

    def overhead(self) -> Iterator[Row]:
        """Yield the CPU time that Lightning adds to a step, by alternating with bare steps."""
        bare_step, marks = self.bare_step(), list[float]()

        def after_step(*_: Any) -> None:
            marks.append(time.process_time())
            bare_step()
            marks.append(time.process_time())

        callback = LambdaCallback(on_train_batch_end=after_step)
        place = rundir.RunDir(Path(self.config.output_dir))
        trainer = make_trainer(place, self.plan, self.device, [callback], self.plan.total_steps)
        module = LanguageModel(self.config, self.tokenizer.vocab_size, self.plan)
        with quiet_lightning():
            trainer.fit(module, datamodule=self.data)
        begun, ended = np.reshape(marks, (-1, 2)).T  # of the bare steps
        ours, bare = 1e3 * (begun[1:] - ended[:-1]), 1e3 * (ended - begun)[1:]
        yield self.row("Trainer's step", "CPU ms", ours)
        yield self.row("bare step", "CPU ms", bare)
        yield self.row("Lightning's part", "CPU ms", ours - bare)


def environment(device: Device) -> str:
    """Return a line about the machine and the software."""
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
        rates = np.array([float(line["tokens_per_second"]) for line in lines[1:]])  # 0 warms up
        bench = Bench(config, float(seconds), fileio.read_json(run.environment)["compile"])
        peak_memory = float(lines[-1]["peak_memory_bytes"])
        rows = list(bench.of_model(config.train.batch_tokens / rates, peak_memory))
    fileio.write_json(Path(out), {"environment": environment(bench.device), "rows": rows})


if __name__ == "__main__":
    main()
