"""Log, evaluate, sample, save and stop, in this order, after whole optimizer steps.

A checkpoint therefore holds everything that was logged before it, and a resumed run logs what the
uninterrupted run would have logged.
"""

from __future__ import annotations

import logging
import math
import statistics
import time
from typing import Any

import lightning.pytorch as pl
import torch
from rich.progress import Progress, TaskID

from tinygpt import fileio, signals
from tinygpt.config import Config
from tinygpt.config.horizon import Plan
from tinygpt.data.tokenizers import Tokenizer
from tinygpt.model.generate import generate
from tinygpt.runs import rundir
from tinygpt.training.console import clock, short
from tinygpt.training.evaluation import Scores
from tinygpt.training.hardware import peak_memory
from tinygpt.training.loggers import Loggers
from tinygpt.training.module import LanguageModel, StepStats

log = logging.getLogger("tinygpt")

STATS = ("loss_sum", "grad_norm_max", "skipped")
SPIKE = 10  # a gradient spike is this many times the median norm of the last log lines
MAX_SKIPPED = 10  # steps in a row
MIN_LOSS_SCALE = 1.0  # at 16-mixed; below it, half precision gains nothing
SAMPLE_HEADING = "--- step"


def is_sync_step(step: int, config: Config, plan: Plan) -> bool:
    """Return whether something is logged, evaluated or saved after this step.

    Only there do the processes of a run exchange more than gradients, so they must all agree.
    """
    intervals = (config.train.log_every, plan.eval_steps, plan.checkpoint_steps, plan.keep_steps)
    return step >= plan.total_steps or any(every and step % every == 0 for every in intervals)


class StepCallback(pl.Callback):
    """Call ``after_step`` after each optimizer step; Lightning's own hook follows every pass."""

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            assert isinstance(pl_module, LanguageModel)
            self.after_step(trainer, pl_module)

    def after_step(self, trainer: pl.Trainer, module: LanguageModel) -> None:
        raise NotImplementedError


class Samples:
    """Write ``samples.txt``, the texts sampled before, during and after training."""

    def __init__(
        self, run: rundir.RunDir, config: Config, tokenizer: Tokenizer, loggers: Loggers
    ) -> None:
        self.run, self.config, self.tokenizer, self.loggers = run, config, tokenizer, loggers
        self.texts: dict[int, str] = {}  # by optimizer step

    def restore(self, last_step: int) -> None:
        """Read back the samples up to ``last_step`` and drop those after it."""
        if self.run.samples.exists():
            text = self.run.samples.read_text(encoding="utf-8")
            for part in text.split(SAMPLE_HEADING)[1:]:
                step = int(part.split()[0].replace(",", ""))
                if step <= last_step:
                    self.texts[step] = part.partition("\n")[2].removesuffix("\n\n")

    def draw(self, trainer: pl.Trainer, module: LanguageModel) -> None:
        """Sample a text from the current model and add it to the file."""
        train, tokenizer, step = self.config.train, self.tokenizer, trainer.global_step
        if train.sample_tokens == 0 or not trainer.is_global_zero:
            return
        prompt = [tokenizer.start_id, *tokenizer.encode(train.sample_prompt)]
        tokens = torch.tensor([prompt], device=module.device)[:, -self.config.model.max_seq_len :]
        with trainer.precision_plugin.forward_context():
            out = generate(
                module.model,
                tokens,
                train.sample_tokens,
                temperature=0.8,
                top_k=50,
                generator=torch.Generator().manual_seed(self.config.seed),
                stop_token=tokenizer.eot_id,
                start_token=tokenizer.start_id,
            )
        ids = [i for i in out[0].tolist() if i not in tokenizer.separator]
        self.texts[step] = tokenizer.decode(ids)
        texts = (
            f"{SAMPLE_HEADING} {at:,} ({at * train.batch_tokens:,} tokens)\n{text}\n\n"
            for at, text in self.texts.items()
        )
        fileio.write_text(self.run.samples, "".join(texts))
        self.loggers.log_text(self.texts[step])


class Journal(StepCallback):
    """Log, evaluate and sample, and end a run that has diverged or stopped improving."""

    def __init__(
        self,
        config: Config,
        plan: Plan,
        metrics: rundir.MetricsFile,
        loggers: Loggers,
        samples: Samples,
    ) -> None:
        self.config, self.plan, self.metrics = config, plan, metrics
        self.loggers, self.samples = loggers, samples
        self.scores: Scores | None = None  # of the last evaluation
        # a line below is a row of metrics.csv
        self.state: dict[str, Any] = {
            "status": "finished",
            "initial_val_loss": None,
            "best_val_loss": None,
            "best_val_step": None,
            "evaluations_without_progress": 0,
            "final_train_loss": None,
            "seconds": 0.0,
            "tokens_per_second": None,
            "steps": 0,  # at the last line
            "skipped_steps": 0,  # up to the last line
            "untaken": 0,  # consecutive skipped steps, while every step of a line was skipped
            "grad_norm_spikes": 0,
            "grad_norms": [],  # the largest of each of the last lines
            **dict.fromkeys(STATS, 0.0),  # since the last line
        }
        self._stats: StepStats | None = None
        self._started: float | None = None  # when the current stretch of training began
        self._timed_from, self._timed_seconds = 0, 0.0  # since the last line
        self._begun = self._printed = (0, 0.0)  # step and time: of the start, of the last print
        self._rate: float | None = None  # tokens per second since the last print

    def state_dict(self) -> dict[str, Any]:
        return {**self.state, **{name: float(getattr(self._stats, name)) for name in STATS}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.state.update(state_dict)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, LanguageModel)
        self._stats = pl_module.stats
        for name in STATS:
            getattr(self._stats, name).fill_(self.state[name])
        self._timed_from = trainer.global_step
        if trainer.global_step == 0:
            if self.config.train.eval_on_start:
                self.scores = pl_module.validate()
                self.state["initial_val_loss"] = self.scores.loss
                self._write(trainer, 0, {}, self.scores)
            self.samples.draw(trainer, pl_module)
        self._begun = trainer.global_step, time.perf_counter()
        self._printed = trainer.global_step, self.state["seconds"]

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._started is None:
            self._started = time.perf_counter()

    def after_step(self, trainer: pl.Trainer, module: LanguageModel) -> None:
        step, plan = trainer.global_step, self.plan
        if not is_sync_step(step, self.config, plan):
            return
        evaluating = step >= plan.total_steps or step % plan.eval_steps == 0
        logging_ = evaluating or step % self.config.train.log_every == 0
        # every process continues with the mean, so one checkpoint is right for all
        stats = module.stats
        stats.loss_sum = trainer.strategy.reduce(stats.loss_sum)
        measured = (float(stats.loss_sum), float(stats.grad_norm_max))  # waits for the device
        if self._started is not None:  # evaluation, samples and checkpoints are not training time
            elapsed = time.perf_counter() - self._started
            self.state["seconds"] += elapsed
            self._timed_seconds += elapsed
            self._started = None
        if logging_ or not all(map(math.isfinite, measured)):  # bad weights are never saved
            self._log(trainer, module, step, evaluating)
        # half way: at the first evaluation in the second half
        half = plan.eval_steps * math.ceil(plan.total_steps / 2 / plan.eval_steps)
        if step == half < plan.total_steps and self.state["status"] != "diverged":
            self.samples.draw(trainer, module)

    def _log(self, trainer: pl.Trainer, module: LanguageModel, step: int, evaluating: bool) -> None:
        state, stats, since = self.state, module.stats, self.state["steps"]
        skipped, largest = int(stats.skipped), float(stats.grad_norm_max)
        # a step skipped because of its loss scale still has a loss
        counted = step - since - (skipped if self.config.train.skip_nonfinite else 0)
        loss = float(stats.loss_sum) / counted if counted else None
        state["untaken"] = 0 if counted else state["untaken"] + skipped
        tokens = (step - self._timed_from) * self.config.train.batch_tokens
        state["tokens_per_second"] = tokens / self._timed_seconds if self._timed_seconds else None
        state["final_train_loss"] = state["final_train_loss"] if loss is None else loss
        state["steps"] = step
        state["skipped_steps"] += skipped
        self._timed_from, self._timed_seconds = step, 0.0
        printed_step, printed_seconds = self._printed
        if seconds := state["seconds"] - printed_seconds:
            self._rate = (step - printed_step) * self.config.train.batch_tokens / seconds
        scaler = getattr(trainer.precision_plugin, "scaler", None)  # at 16-mixed
        row: dict[str, Any] = {
            "train_loss": loss,
            "learning_rate": module.rate(step - 1),
            "grad_norm": None if module.grad_norm is None else float(module.grad_norm),
            "grad_norm_max": largest,
            "skipped_steps": state["skipped_steps"] if module.skips else None,
            "loss_scale": None if scaler is None else float(scaler.get_scale()),
            "tokens_per_second": state["tokens_per_second"],
            "peak_memory_bytes": peak_memory(module.device.type),
        }
        if counted:
            module.log("train_loss", stats.loss_sum / counted)
        self._stats = module.stats = StepStats(module.device)
        self._note_spike(largest, since, step)
        scores, status = None, "finished"
        reason = self._divergence(row, step)
        if reason is None and evaluating:
            scores = self.scores = self._evaluate(module, step)
            if not math.isfinite(scores.loss):
                reason = f"the validation loss is not finite at step {step}"
        if reason is not None:
            status = "diverged"
        elif scores and self._out_of_patience():
            patience = self.config.train.early_stopping_patience
            status, reason = "stopped_early", f"no progress in {patience} evaluations"
        if reason is not None:
            self.state["status"] = status
            trainer.should_stop = True
            log.info("%s: %s", status.replace("_", " "), reason)
        self._write(trainer, step, row, scores)

    def _divergence(self, row: dict[str, Any], step: int) -> str | None:
        """Return why this line of metrics means that training has diverged, or None."""
        if self.state["untaken"] >= MAX_SKIPPED:
            return f"no gradient was finite in the {self.state['untaken']} steps until {step}"
        if row["train_loss"] is not None and not math.isfinite(row["train_loss"]):
            return f"the training loss is {row['train_loss']} at step {step}"
        if not math.isfinite(row["grad_norm_max"]):
            return f"the gradient's norm is {row['grad_norm_max']} at step {step}"
        if row["loss_scale"] is not None and row["loss_scale"] < MIN_LOSS_SCALE:
            scale = f"{row['loss_scale']:g}"
            return f"the loss scale fell to {scale} because gradients overflow at step {step}"
        return None

    def _note_spike(self, largest: float, since: int, step: int) -> None:
        state, before = self.state, self.state["grad_norms"]
        usual = statistics.median(before) if len(before) >= 5 else math.inf
        if largest > SPIKE * usual:
            state["grad_norm_spikes"] += 1
            line = "note    gradient norm %.3g in steps %d to %d, usual is %.3g"
            log.info(line, largest, since + 1, step, usual)
        state["grad_norms"] = [*before, largest][-20:]

    def _evaluate(self, module: LanguageModel, step: int) -> Scores:
        """Evaluate, and return the scores of part of the validation split, or at the end of all.

        The best step is always chosen by the part, which is the same each time.
        """
        data, is_part = module.data, module.data.val_every() > 1
        data.scores_all = not is_part
        scores = module.validate()
        data.scores_all = True
        self._update_best(step, scores)
        is_last = step >= self.plan.total_steps or self._out_of_patience()
        return module.validate() if is_last and is_part else scores

    def _update_best(self, step: int, scores: Scores) -> None:
        state = self.state
        if state["best_val_loss"] is None or scores.loss < state["best_val_loss"]:
            state |= {"best_val_loss": scores.loss, "best_val_step": step}
            state["evaluations_without_progress"] = 0
        else:
            state["evaluations_without_progress"] += 1

    def _out_of_patience(self) -> bool:
        patience = self.config.train.early_stopping_patience
        return patience is not None and self.state["evaluations_without_progress"] >= patience

    def _write(
        self, trainer: pl.Trainer, step: int, row: dict[str, Any], scores: Scores | None
    ) -> None:
        if not trainer.is_global_zero:
            return
        tokens, total = step * self.config.train.batch_tokens, self.plan.total_steps
        row = {"step": step, "tokens": tokens, **row, "seconds": round(self.state["seconds"], 3)}
        row |= scores.named("val") if scores else {}
        self.metrics.append(row)
        self.loggers.log_line(row)
        if not scores:
            return
        line = f"step {step:{len(str(total))}}/{total} {100 * step // total:3}%  "
        line += f"train {row['train_loss']:.4f}  " if row.get("train_loss") is not None else ""
        log.info("%s", f"{line}val {scores.loss:.4f}{self.pace(step)}")
        self._printed = step, self.state["seconds"]

    def pace(self, step: int) -> str:
        """Return the speed since the last printed line and the time left."""
        first, begun = self._begun
        text = f"  {short(self._rate)} tokens/s" if self._rate else ""
        if not first < step < self.plan.total_steps:
            return text
        each = (time.perf_counter() - begun) / (step - first)
        return f"{text}  {clock(each * (self.plan.total_steps - step))} left"


class Checkpoints(StepCallback):
    """Save the checkpoints ``last``, ``best`` and ``step_<N>``."""

    def __init__(
        self, run: rundir.RunDir, plan: Plan, journal: Journal, keep_at: frozenset[int]
    ) -> None:
        self.run, self.plan, self.journal, self.keep_at = run, plan, journal, keep_at

    def after_step(self, trainer: pl.Trainer, module: LanguageModel) -> None:
        if self.journal.state["status"] == "diverged":
            return
        step, plan = trainer.global_step, self.plan
        at_end = step >= plan.total_steps or trainer.should_stop
        if self.journal.state["best_val_step"] == step:
            trainer.save_checkpoint(self.run.checkpoints / "best.ckpt")
        if step in self.keep_at or (plan.keep_steps and step % plan.keep_steps == 0):
            trainer.save_checkpoint(self.run.step(step))
        if at_end or step % plan.checkpoint_steps == 0:
            trainer.save_checkpoint(self.run.last)


class Interrupts(StepCallback):
    """Save and stop at the end of the step in which a signal arrives.

    Several processes train on to the next step at which they synchronize, and stop together.
    """

    def __init__(self, run: rundir.RunDir, config: Config, plan: Plan) -> None:
        self.run, self.config, self.plan = run, config, plan
        self.received = signals.received()

    def note(self, number: int) -> None:
        self.received = number

    def after_step(self, trainer: pl.Trainer, module: LanguageModel) -> None:
        is_sync = is_sync_step(trainer.global_step, self.config, self.plan)
        if (trainer.world_size == 1 or is_sync) and self.agreed(trainer):
            trainer.save_checkpoint(self.run.last)
            trainer.should_stop = True

    def agreed(self, trainer: pl.Trainer) -> bool:
        """Return whether any process has received a signal; all processes must ask together."""
        if trainer.world_size == 1:
            return self.received is not None
        number = torch.tensor(float(self.received or 0), device=trainer.strategy.root_device)
        received = int(trainer.strategy.reduce(number, reduce_op="max"))
        self.received = received or self.received  # one may have arrived since: for the next time
        return received > 0


class ProgressBar(StepCallback):
    """Show the loss, the speed and the time left on a terminal, four times a second."""

    def __init__(self, bar: Progress, plan: Plan, journal: Journal) -> None:
        self.bar, self.plan, self.journal = bar, plan, journal
        self._task: TaskID | None = None
        self._next = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        total, done = self.plan.total_steps, trainer.global_step
        self._task = self.bar.add_task("training", total=total, completed=done, words="")
        self.bar.start()

    def after_step(self, trainer: pl.Trainer, module: LanguageModel) -> None:
        now = time.monotonic()
        if now < self._next or self._task is None:
            return
        self._next = now + 0.25
        step, loss = trainer.global_step, self.journal.state["final_train_loss"]
        words = ("" if loss is None else f"train {loss:.3f}") + self.journal.pace(step)
        self.bar.update(self._task, completed=step, words=words)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.bar.stop()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self.bar.stop()
