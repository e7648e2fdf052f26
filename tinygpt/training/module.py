"""Train a GPT as a LightningModule: the model, its loss and its optimizer."""

from __future__ import annotations

import dataclasses
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from tinygpt.config import Config, ConfigError
from tinygpt.config.horizon import Plan
from tinygpt.data.datamodule import TokenData
from tinygpt.model.gpt import GPT, dropout_seeds
from tinygpt.model.lora import add_lora
from tinygpt.runs import rundir
from tinygpt.runs.load import initial_weights
from tinygpt.training.evaluation import Scores, TokenScores, score_batch, scores_of
from tinygpt.training.optim import make_optimizer, rate_factor
from tinygpt.training.slices import mean_loss


class StepStats:
    """Hold statistics of the steps since the last log line, as scalars on the device.

    ``loss_sum`` is the sum of losses, ``grad_norm_max`` the largest gradient norm before clipping
    (NaN if one was), ``skipped`` the number of steps not taken.
    """

    def __init__(self, device: torch.device) -> None:
        dtype = torch.float32 if device.type == "mps" else torch.float64
        zero = torch.zeros((), dtype=dtype, device=device)
        self.loss_sum, self.grad_norm_max, self.skipped = (zero.clone() for _ in range(3))

    def update(self, grad_norm: Tensor, skips: bool) -> None:
        """Record the gradient norm of a step; with ``skips``, count it as skipped if not finite."""
        if skips:
            finite = grad_norm.isfinite()
            self.skipped += ~finite
            grad_norm = torch.where(finite, grad_norm, 0.0)
        self.grad_norm_max = torch.maximum(self.grad_norm_max, grad_norm)


class LanguageModel(pl.LightningModule):
    """Train a GPT to predict the next token.

    ``config`` may be a plain dict, as in checkpoints.  The model is built at once if ``vocab_size``
    is given, else by ``setup``, for the tokenizer of the data.  Whoever logs ``stats`` replaces
    them with new ones.
    """

    model: GPT
    plan: Plan | None

    def __init__(
        self,
        config: Config | dict[str, Any],
        vocab_size: int | None = None,
        plan: Plan | None = None,
    ) -> None:
        super().__init__()
        self.config = rundir.config_from(config) if isinstance(config, dict) else config
        self.plan = plan
        plain = dataclasses.asdict(self.config)
        self.save_hyperparameters({"config": plain, "vocab_size": vocab_size})
        self.stats = StepStats(torch.device("cpu"))
        self.grad_norm: Tensor | None = None
        self.slices = 1  # of a pass, a thread each
        self.skips = self.config.train.skip_nonfinite  # steps whose gradient is not finite
        self.scores: Scores | None = None  # of the last validation or test
        self._passes: list[Tensor] = []  # losses of a step that may yet be skipped
        self._logged_step = 0
        if vocab_size is not None:
            self.build(vocab_size)

    def build(self, vocab_size: int, weights: dict[str, Tensor] | None = None) -> None:
        """Make the model, with the given or random weights, and LoRA's adapters."""
        self.hparams["vocab_size"] = vocab_size
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            self.model = GPT(self.config.model, vocab_size)
            if self.config.train.precision == "64":
                self.model.double()  # before the weights, which would be rounded
            if weights is not None:
                self.model.load_state_dict(weights)
            if self.config.optim.lora.rank is not None:
                add_lora(self.model, self.config.optim.lora)

    @property
    def data(self) -> TokenData:
        """Return the Trainer's data module.  Raises ConfigError unless it is a TokenData."""
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, TokenData):
            raise ConfigError("LanguageModel: needs TokenData, as in Trainer.fit(model, data)")
        return data

    def setup(self, stage: str) -> None:
        self.plan = self.data.plan
        if not hasattr(self, "model"):
            vocab_size = self.data.prepared.tokenizer.vocab_size
            self.build(vocab_size, initial_weights(self.config, vocab_size))
        if self.trainer.precision == "64-true":  # Lightning does it after loading: too late
            self.double()

    def on_fit_start(self) -> None:
        self.skips |= self.trainer.precision == "16-mixed"  # as its loss scale does
        self.stats = StepStats(self.device)

    def on_train_start(self) -> None:
        self._logged_step = self.trainer.global_step  # known only now where a run is resumed

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits ``(B, T, V)`` of ``tokens`` ``(B, T)``."""
        logits: Tensor = self.model(tokens)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the mean loss of a batch of inputs and targets, ``(B, T)`` each, in nats."""
        inputs, targets = batch
        seeds = None
        if self.config.model.dropout > 0:
            # dropout is a function of (seed, step) and of the place in the batch, so that a run
            # drops the same units when it is resumed and on other hardware
            step, pass_ = divmod(batch_idx, self.trainer.accumulate_grad_batches)
            first = (pass_ * self.trainer.world_size + self.global_rank) * len(inputs)
            seeds = dropout_seeds(self.config.seed, step, first, len(inputs)).to(inputs.device)
        loss = mean_loss(self.model, self.slices, inputs, targets, seeds)
        part = loss.detach().to(self.stats.loss_sum) / self.trainer.accumulate_grad_batches
        if self.config.train.skip_nonfinite:
            self._passes.append(part)
        else:
            self.stats.loss_sum += part
        return loss

    def on_validation_epoch_start(self) -> None:
        self._metric = TokenScores(self.device)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        info = self.data.splits[self._split].info
        score_batch(self.model, batch, info, self._metric, self.slices)

    def on_validation_epoch_end(self) -> None:
        self.scores = scores_of(self._metric, self.data.splits[self._split].info)
        for name, value in self.scores.named(self._split).items():
            exact = torch.tensor(value, dtype=self._metric.sums.dtype, device=self.device)
            self.log(name, exact, prog_bar=name == "val_loss")

    on_test_epoch_start = on_validation_epoch_start
    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end

    @property
    def _split(self) -> str:
        return "test" if self.trainer.testing else "val"

    def validate(self) -> Scores:
        """Run Lightning's validation loop in the middle of training."""
        # as Lightning does at its own intervals; the validation loop counts its own batches
        connector = self.trainer._logger_connector
        first_batch = connector._first_loop_iter
        self.trainer.validating = True
        self.trainer.fit_loop.epoch_loop.val_loop.run()
        self.trainer.training = True
        connector._first_loop_iter = first_batch
        assert self.scores is not None
        return self.scores

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adapt a checkpoint of other hardware, or of a longer run, to this run.

        Lightning counts passes, of which a step may take another number here.  The optimizer keeps
        the rate of the next step, which differs if this run is shorter than its trunk.
        """
        if self.plan is None or "optimizer_states" not in checkpoint:  # only the weights are used
            return
        factor = self.rate(checkpoint["global_step"]) / self.config.optim.learning_rate
        for state in checkpoint["optimizer_states"]:
            for group in state["param_groups"]:
                group["lr"] = group["initial_lr"] * factor
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for counts in (progress["total"], progress["current"]):
            more = checkpoint["global_step"] * self.plan.accumulate - counts["ready"]
            for name in counts:
                counts[name] += more

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        limit = self.config.train.grad_clip_norm
        self.grad_norm = torch.nn.utils.clip_grad_norm_(
            [p for group in optimizer.param_groups for p in group["params"]],
            float("inf") if limit is None else limit,
            # one call for all: by itself, torch does so on CUDA only
            foreach=True if self.device.type == "cpu" else None,
        )
        self.stats.update(self.grad_norm, self.skips)
        if self.config.train.skip_nonfinite:
            if self.grad_norm.isfinite():  # waits for the device
                self.stats.loss_sum += sum(self._passes)
            else:
                optimizer.zero_grad()  # without gradients, a step changes nothing
            self._passes.clear()
        self._log_stats(self.trainer.global_step + 1)

    def _log_stats(self, step: int) -> None:
        """Log and reset the statistics, as often as the Trainer logs."""
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and step % every == 0:
            stats, steps = self.stats, step - self._logged_step
            counted = steps - (stats.skipped if self.config.train.skip_nonfinite else 0)
            self.log("train_loss", stats.loss_sum / counted, prog_bar=True)
            self.log("grad_norm_max", stats.grad_norm_max)
            self.stats, self._logged_step = StepStats(self.device), step

    def rate(self, step: int) -> float:
        """Return the learning rate of optimizer step ``step``, counted from 0."""
        assert self.plan is not None
        total, warmup = self.plan.total_steps, self.plan.warmup_steps
        factor = rate_factor(step, self.config.schedule, total_steps=total, warmup_steps=warmup)
        return self.config.optim.learning_rate * factor

    def make_optimizer(self, *, fused: bool) -> tuple[torch.optim.Optimizer, LambdaLR]:
        """Return the optimizer and its schedule, which steps once per optimizer step."""
        optimizer = make_optimizer(self.model, self.config.optim, fused=fused)
        peak = self.config.optim.learning_rate
        return optimizer, LambdaLR(optimizer, lambda step: self.rate(step) / peak)

    def configure_optimizers(self) -> Any:
        # gradients must be unscaled before they are clipped; fused optimizers unscale them later
        fused = self.device.type in ("cpu", "cuda") and self.trainer.precision != "16-mixed"
        optimizer, schedule = self.make_optimizer(fused=fused)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
