"""What happens between steps: metrics, evaluation, checkpoints, progress, interrupts.

All of it happens at whole optimizer steps and in this order: log, evaluate, sample, save, stop.
A checkpoint therefore knows everything that was logged before it, and a resumed run logs what the
uninterrupted one would have.
"""

from __future__ import annotations

import logging
import math
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import psutil
import torch
from rich.progress import Progress, TaskID

from tinygpt import rundir, signals
from tinygpt.config import Config
from tinygpt.horizon import Plan
from tinygpt.training.console import clock, short
from tinygpt.training.evaluation import Scores
from tinygpt.training.loggers import Loggers
from tinygpt.training.module import LanguageModel, StepStats

log = logging.getLogger("tinygpt")


STATS = ("loss_sum", "grad_norm_max", "skipped")
SPIKE = 10  # times the usual norm of the gradient, the median of the last lines
MOST_SKIPPED = 10  # steps in a row
LEAST_SCALE = 1.0  # of the loss, at 16-mixed; below, half precision gains nothing any more


def step_ended(trainer: pl.Trainer, batch_idx: int) -> bool:
    """Whether the pass that just ended completed an optimizer step."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0


def is_rest(step: int, config: Config, plan: Plan) -> bool:
    """Whether something is logged, evaluated or saved after this step.

    Only there do the processes of a run speak of more than gradients; so all of them must find
    the same steps.
    """
    intervals = (config.train.log_every, plan.eval_steps, plan.checkpoint_steps, plan.keep_steps)
    return step >= plan.total_steps or any(every and step % every == 0 for every in intervals)


class Journal(pl.Callback):
    """Logs, evaluates and judges: what a run measures of itself.

    ``evaluate`` scores the validation split; ``sample`` writes text at a step.
    """

    def __init__(
        self,
        config: Config,
        plan: Plan,
        metrics: rundir.MetricsFile,
        evaluate: Callable[[], Scores],
        sample: Callable[[int], None],
        module: LanguageModel,
        loggers: Loggers,
    ) -> None:
        self.config, self.plan, self.metrics = config, plan, metrics
        self.evaluate, self.sample, self._module = evaluate, sample, module
        self.loggers = loggers
        self.scores: Scores | None = None  # the last ones
        self.state: dict[str, Any] = {
            "status": "finished",
            "initial_val_loss": None,
            "best_val_loss": None,
            "best_val_step": None,
            "last_val_loss": None,
            "evaluations_without_progress": 0,
            "final_train_loss": None,
            "seconds": 0.0,
            "tokens_per_second": None,
            "steps": 0,  # at the last line of metrics
            "skipped_steps": 0,  # until that line
            "untaken": 0,  # in a row until that line, where a whole stretch was skipped
            "grad_norm_spikes": 0,
            "grad_norms": [],  # the largest before each of the last lines
            **dict.fromkeys(STATS, 0.0),  # since that line
        }
        self._mark: float | None = None  # when the stretch that is being timed began
        self._timed_from, self._timed_seconds = 0, 0.0  # since the last line of metrics

    def state_dict(self) -> dict[str, Any]:
        stats = self._module.stats
        return {**self.state, **{name: float(getattr(stats, name)) for name in STATS}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.state.update(state_dict)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, LanguageModel)
        for name in STATS:
            getattr(pl_module.stats, name).fill_(self.state[name])
        self._timed_from = trainer.global_step
        if trainer.global_step == 0:
            scores = self._evaluated()
            self.state["initial_val_loss"] = scores.loss
            self._write(trainer, 0, {}, scores)
            self.sample(0)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if not step_ended(trainer, batch_idx):
            return
        assert isinstance(pl_module, LanguageModel)
        step, plan = trainer.global_step, self.plan
        if not is_rest(step, self.config, plan):
            return
        evaluating = step >= plan.total_steps or step % plan.eval_steps == 0
        logging_ = evaluating or step % self.config.train.log_every == 0
        # every process goes on with the mean of all, so that a checkpoint of one tells of all
        stats = pl_module.stats
        stats.loss_sum = trainer.strategy.reduce(stats.loss_sum)
        measured = (float(stats.loss_sum), float(stats.grad_norm_max))  # waits for the device
        finite = all(map(math.isfinite, measured))
        self._stop_clock()
        if logging_ or not finite:  # weights that are not finite are never saved
            self._log(trainer, pl_module, step, evaluating)
        if self._is_half_way(step) and self.state["status"] != "diverged":
            self.sample(step)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._mark is None:
            self._mark = time.perf_counter()

    def _stop_clock(self) -> None:
        """Evaluation, samples and checkpoints are not training time."""
        if self._mark is not None:
            elapsed = time.perf_counter() - self._mark
            self.state["seconds"] += elapsed
            self._timed_seconds += elapsed
        self._mark = None

    def _is_half_way(self, step: int) -> bool:
        """The first evaluation in the second half, the last step excepted."""
        every, total = self.plan.eval_steps, self.plan.total_steps
        half = every * math.ceil(total / 2 / every)
        return step == half and step < total

    def _log(self, trainer: pl.Trainer, module: LanguageModel, step: int, evaluating: bool) -> None:
        state, stats, since = self.state, module.stats, self.state["steps"]
        skipped, largest = int(stats.skipped), float(stats.grad_norm_max)
        # one that is skipped for its loss scale has a loss all the same
        counted = step - since - (skipped if self.config.train.skip_nonfinite else 0)
        loss = float(stats.loss_sum) / counted if counted else None
        state["untaken"] = 0 if counted else state["untaken"] + skipped
        tokens = (step - self._timed_from) * self.config.train.batch_tokens
        state["tokens_per_second"] = tokens / self._timed_seconds if self._timed_seconds else None
        state["final_train_loss"] = state["final_train_loss"] if loss is None else loss
        state["steps"] = step
        state["skipped_steps"] += skipped
        self._timed_from, self._timed_seconds = step, 0.0
        row: dict[str, Any] = {
            "train_loss": loss,
            "learning_rate": module.rate(step - 1),
            "grad_norm": None if module.grad_norm is None else float(module.grad_norm),
            "grad_norm_max": largest,
            "skipped_steps": state["skipped_steps"] if module.skips else None,
            "loss_scale": loss_scale(trainer),
            "tokens_per_second": state["tokens_per_second"],
            "peak_memory_bytes": peak_memory(module.device.type),
        }
        if counted:
            module.log("train_loss", stats.loss_sum / counted)
        module.stats = StepStats(module.device)
        self._note_spike(largest, since, step)
        scores = None
        if state["untaken"] >= MOST_SKIPPED:
            why = f"no gradient was finite in the {state['untaken']} steps until {step}"
            self._end(trainer, "diverged", why)
        elif loss is not None and not math.isfinite(loss):
            self._end(trainer, "diverged", f"the training loss is {loss} at step {step}")
        elif not math.isfinite(largest):
            self._end(trainer, "diverged", f"the gradient's norm is {largest} at step {step}")
        elif row["loss_scale"] is not None and row["loss_scale"] < LEAST_SCALE:
            why = f"the loss scale fell to {row['loss_scale']:g}, as gradients overflow"
            self._end(trainer, "diverged", f"{why} at step {step}")
        elif evaluating:
            scores = self._evaluated()
            self._judge(step, scores)
            if not math.isfinite(state["last_val_loss"]):
                self._end(trainer, "diverged", f"the validation loss is not finite at step {step}")
            elif self._out_of_patience():
                patience = self.config.train.early_stopping_patience
                self._end(trainer, "stopped_early", f"no progress in {patience} evaluations")
        self._write(trainer, step, row, scores)

    def _note_spike(self, largest: float, since: int, step: int) -> None:
        state, before = self.state, self.state["grad_norms"]
        usual = statistics.median(before) if len(before) >= 5 else math.inf
        if largest > SPIKE * usual:
            state["grad_norm_spikes"] += 1
            log.info(
                "note    gradient norm %.3g in steps %d to %d, usual is %.3g",
                largest,
                since + 1,
                step,
                usual,
            )
        state["grad_norms"] = [*before, largest][-20:]

    def _evaluated(self) -> Scores:
        self.scores = self.evaluate()
        return self.scores

    def _judge(self, step: int, scores: Scores) -> None:
        state = self.state
        state["last_val_loss"] = scores.loss
        if state["best_val_loss"] is None or scores.loss < state["best_val_loss"]:
            state |= {"best_val_loss": scores.loss, "best_val_step": step}
            state["evaluations_without_progress"] = 0
        else:
            state["evaluations_without_progress"] += 1

    def _out_of_patience(self) -> bool:
        patience = self.config.train.early_stopping_patience
        return patience is not None and self.state["evaluations_without_progress"] >= patience

    def _end(self, trainer: pl.Trainer, status: str, why: str) -> None:
        self.state["status"] = status
        trainer.should_stop = True
        log.info("%s: %s", status.replace("_", " "), why)

    def _write(
        self, trainer: pl.Trainer, step: int, row: dict[str, Any], scores: Scores | None = None
    ) -> None:
        tokens = step * self.config.train.batch_tokens
        row = {**row, "seconds": round(self.state["seconds"], 3)}
        row |= scores.named("val") if scores else {}
        if not trainer.is_global_zero:
            return
        row = {"step": step, "tokens": tokens, **row}
        self.metrics.append(row)
        self.loggers.log_line(row)
        if scores:
            left = self._time_left(step)
            train = f"train {row['train_loss']:.4f}  " if row.get("train_loss") is not None else ""
            log.info(
                "step %*d/%d  %s tokens  %sval %.4f%s",
                len(str(self.plan.total_steps)),
                step,
                self.plan.total_steps,
                short(tokens),
                train,
                scores.loss,
                left,
            )

    def _time_left(self, step: int) -> str:
        rate = self.state["tokens_per_second"]
        if not rate:
            return ""
        seconds = (self.plan.total_steps - step) * self.config.train.batch_tokens / rate
        left = f"  {clock(seconds)} left" if step < self.plan.total_steps else ""
        return f"  {short(rate)} tokens/s{left}"


class Checkpoints(pl.Callback):
    """``last``, ``best`` and ``step_<N>``, each written beside its place and renamed."""

    def __init__(
        self, run: rundir.RunDir, plan: Plan, journal: Journal, keep_at: frozenset[int]
    ) -> None:
        self.run, self.plan, self.journal, self.keep_at = run, plan, journal, keep_at

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if not step_ended(trainer, batch_idx) or self.journal.state["status"] == "diverged":
            return
        step, plan, folder = trainer.global_step, self.plan, self.run.checkpoints
        at_end = step >= plan.total_steps or trainer.should_stop
        if self.journal.state["best_val_step"] == step:
            trainer.save_checkpoint(folder / "best.ckpt")
        if step in self.keep_at or (plan.keep_steps and step % plan.keep_steps == 0):
            trainer.save_checkpoint(self.run.step(step))
        if at_end or step % plan.checkpoint_steps == 0:
            trainer.save_checkpoint(self.run.last)


class Interrupts(pl.Callback):
    """Finish the step, save and stop once a signal has asked to stop.

    Several processes finish the steps until the next rest, where they learn of each other's
    signals, and stop together.
    """

    def __init__(self, run: rundir.RunDir, config: Config, plan: Plan) -> None:
        self.run, self.config, self.plan = run, config, plan
        self.received = signals.received()

    def note(self, number: int) -> None:
        self.received = number

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if not step_ended(trainer, batch_idx):
            return
        if trainer.world_size > 1 and not is_rest(trainer.global_step, self.config, self.plan):
            return
        if self.agreed(trainer):
            trainer.save_checkpoint(self.run.last)
            trainer.should_stop = True

    def agreed(self, trainer: pl.Trainer) -> bool:
        """Whether a process had received a signal when it was asked; all must ask together.

        One that comes while they agree is not forgotten: it is for the next time.
        """
        if trainer.world_size == 1:
            return self.received is not None
        number = torch.tensor(float(self.received or 0), device=trainer.strategy.root_device)
        received = int(trainer.strategy.reduce(number, reduce_op="max"))
        self.received = received or self.received
        return received > 0


class ProgressBar(pl.Callback):
    """A bar with loss, speed and time left, drawn four times a second, on a terminal only."""

    def __init__(self, bar: Progress, plan: Plan, journal: Journal) -> None:
        self.bar, self.plan, self.journal = bar, plan, journal
        self._task: TaskID | None = None
        self._next = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        total, done = self.plan.total_steps, trainer.global_step
        self._task = self.bar.add_task("training", total=total, completed=done, loss="", speed="")
        self.bar.start()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        now = time.monotonic()
        if now < self._next or self._task is None:
            return
        self._next = now + 0.25
        state = self.journal.state
        loss = "" if state["final_train_loss"] is None else f"loss {state['final_train_loss']:.3f}"
        rate = state["tokens_per_second"]
        speed = "" if rate is None else f"{short(rate)} tokens/s"
        self.bar.update(self._task, completed=trainer.global_step, loss=loss, speed=speed)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.bar.stop()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self.bar.stop()


def loss_scale(trainer: pl.Trainer) -> float | None:
    """What the loss is multiplied by, at 16-mixed, so that small gradients are not 0."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return None if scaler is None else float(scaler.get_scale())


def peak_memory(accelerator: str) -> int | None:
    """Bytes: the most that CUDA had allocated, or that this process had resident."""
    if accelerator == "cuda":
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
