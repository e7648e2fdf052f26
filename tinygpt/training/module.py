"""The LightningModule: the model, its loss, its optimizer."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from tinygpt.config import Config
from tinygpt.horizon import Plan
from tinygpt.model.gpt import GPT
from tinygpt.training.optim import make_optimizer, rate_factor


class LanguageModel(pl.LightningModule):
    """Next-token prediction with a GPT.

    ``train_loss_sum`` adds up the loss of every step on the device, so that nobody waits for the
    device at each step; whoever logs divides by the number of steps and resets it.
    """

    def __init__(self, config: Config, vocab_size: int, plan: Plan) -> None:
        super().__init__()
        self.config, self.plan = config, plan
        self.model = GPT(config.model, vocab_size)
        self.train_loss_sum = torch.zeros(())
        self.grad_norm: Tensor | None = None

    def configure_model(self) -> None:
        """Under fsdp: each block's weights, then the rest, are spread over the devices."""
        if self.device_mesh is None:
            return
        from torch.distributed.fsdp import fully_shard

        for part in (*self.model.blocks, self.model):
            fully_shard(part, mesh=self.device_mesh["data_parallel"])

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model(tokens)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        inputs, targets = batch  # (B, T) each
        if self.config.model.dropout > 0:
            # dropout too is a function of (seed, step), so a resumed run drops the same units
            key = np.random.SeedSequence([self.config.seed, batch_idx, self.global_rank])
            torch.manual_seed(int(key.generate_state(1)[0]))
        loss: Tensor = self.model(inputs, targets)
        self.train_loss_sum += loss.detach().to(self.train_loss_sum) / self.plan.accumulate
        return loss

    def forget_train_loss(self) -> None:
        """Begins a new stretch of steps to average the training loss over."""
        self.train_loss_sum = torch.zeros_like(self.train_loss_sum)

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
        norm = torch.nn.utils.clip_grad_norm_(
            self.model.parameters(),
            float("inf") if limit is None else limit,
            # on the CPU, too, one call for all, which torch chooses by itself on CUDA alone
            foreach=True if self.device.type == "cpu" and self.device_mesh is None else None,
        )
        self.grad_norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # fsdp

    def rate(self, step: int) -> float:
        """The learning rate that optimizer step ``step`` (0 is the first) uses."""
        plan = self.plan
        factor = rate_factor(
            step, self.config.schedule, total_steps=plan.total_steps, warmup_steps=plan.warmup_steps
        )
        return self.config.optim.learning_rate * factor

    def configure_optimizers(self) -> Any:
        on_device = self.device.type in ("cpu", "cuda")
        # gradients must be unscaled before they are clipped, which fused optimizers do too late
        fused = on_device and self.trainer.precision != "16-mixed"
        optimizer, schedule = self.make_optimizer(fused=fused)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def make_optimizer(self, *, fused: bool) -> tuple[torch.optim.Optimizer, LambdaLR]:
        optimizer = make_optimizer(self.model, self.config.optim, fused=fused)
        peak = self.config.optim.learning_rate
        return optimizer, LambdaLR(optimizer, lambda s: self.rate(s) / peak)
