"""The LightningModule: the model, its loss, its optimizer."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from tinygpt.config import Config
from tinygpt.horizon import Plan
from tinygpt.model.gpt import GPT, dropout_seeds
from tinygpt.training.optim import make_optimizer, rate_factor


class Stretch:
    """What is measured of the steps since the last line of metrics: tensors on the device.

    ``loss_sum``: of the steps; ``grad_norm_max``: the largest, before clipping, NaN if one was;
    ``skipped``: how many steps were not taken.
    """

    def __init__(self, zero: Tensor) -> None:
        self.loss_sum, self.grad_norm_max, self.skipped = (zero.clone() for _ in range(3))

    def see(self, norm: Tensor) -> None:
        """A step with a gradient of this norm."""
        self.grad_norm_max = torch.maximum(self.grad_norm_max, norm)

    def see_or_skip(self, norm: Tensor) -> None:
        """The same where a step is not taken if the norm is not finite."""
        finite = norm.isfinite()
        self.see(torch.where(finite, norm, 0.0))
        self.skipped += ~finite


class LanguageModel(pl.LightningModule):
    """Next-token prediction with a GPT.

    ``stretch`` adds up, on the device, what is measured of the steps since the last line of
    metrics, so that nobody waits for the device at each step; whoever logs begins a new one.
    """

    def __init__(self, config: Config, vocab_size: int, plan: Plan) -> None:
        super().__init__()
        self.config, self.plan = config, plan
        self.model = GPT(config.model, vocab_size)
        self.stretch = Stretch(torch.zeros(()))
        self.grad_norm: Tensor | None = None
        # whether a step with a gradient that is not finite is left out
        self.skips = config.train.skip_nonfinite
        self._passes: list[Tensor] = []  # losses of a step that may yet be skipped

    def on_fit_start(self) -> None:
        self.skips |= self.trainer.precision == "16-mixed"  # as its loss scale does

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model(tokens)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        inputs, targets = batch  # (B, T) each
        seeds = None
        if self.config.model.dropout > 0:
            # dropout too is a function of (seed, step) and of the sequence's place in the batch,
            # so a resumed run drops the same units, and so does one on other hardware
            step, pass_ = divmod(batch_idx, self.plan.accumulate)
            first = (pass_ * self.trainer.world_size + self.global_rank) * len(inputs)
            seeds = dropout_seeds(self.config.seed, step, first, len(inputs)).to(inputs.device)
        loss: Tensor = self.model(inputs, targets, seeds=seeds)
        part = loss.detach().to(self.stretch.loss_sum) / self.plan.accumulate
        if self.config.train.skip_nonfinite:
            self._passes.append(part)
        else:
            self.stretch.loss_sum += part
        return loss

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Makes another run's checkpoint one of this run's.

        Lightning counts passes; on other hardware a step may have another number of them.  And the
        rate of the next step, which is kept with the optimizer, is another one where the run that
        begins here is shorter.
        """
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
            self.model.parameters(),
            float("inf") if limit is None else limit,
            # on the CPU, too, one call for all, which torch chooses by itself on CUDA alone
            foreach=True if self.device.type == "cpu" else None,
        )
        if self.skips:
            self.stretch.see_or_skip(self.grad_norm)
        else:
            self.stretch.see(self.grad_norm)
        if self.config.train.skip_nonfinite:
            if self.grad_norm.isfinite():  # waits for the device
                self.stretch.loss_sum += sum(self._passes)
            else:
                optimizer.zero_grad()  # without gradients it changes neither weights nor state
            self._passes.clear()

    def rate(self, step: int) -> float:
        """The learning rate that optimizer step ``step`` (0 is the first) uses."""
        plan = self.plan
        factor = rate_factor(
            step, self.config.schedule, total_steps=plan.total_steps, warmup_steps=plan.warmup_steps
        )
        return self.config.optim.learning_rate * factor

    def make_optimizer(self, *, fused: bool) -> tuple[torch.optim.Optimizer, LambdaLR]:
        """Return the optimizer and its schedule, which is stepped once an optimizer step."""
        optimizer = make_optimizer(self.model, self.config.optim, fused=fused)
        peak = self.config.optim.learning_rate
        return optimizer, LambdaLR(optimizer, lambda step: self.rate(step) / peak)

    def configure_optimizers(self) -> Any:
        on_device = self.device.type in ("cpu", "cuda")
        # gradients must be unscaled before they are clipped, which fused optimizers do too late
        optimizer, schedule = self.make_optimizer(
            fused=on_device and self.trainer.precision != "16-mixed"
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
