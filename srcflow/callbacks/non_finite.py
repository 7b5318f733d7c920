"""Skip steps whose loss or gradient is not finite, on all ranks alike; end the run after too many in a row."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.optim import Optimizer

from srcflow.errors import ConfigError, NonFiniteError


class NonFiniteGuard(L.Callback):
    """Clips the gradient's global norm and drops the steps whose loss or gradient is not finite.

    A dropped step leaves the weights and the optimizer's moments as they were (its gradients are gone, so the optimizer has nothing to
    update) and the moving average untouched; the step counter and the schedule go on. Every task attaches its own guard. Logs
    `train/grad_norm` (before clipping) and `train/skipped_steps`.

    Args:
        gradient_clip: largest global norm of the gradient, None for no clipping.
        max_bad_steps: this many dropped steps in a row raise NonFiniteError.
    """

    def __init__(self, gradient_clip: float | None = None, max_bad_steps: int = 20) -> None:
        if max_bad_steps < 1:
            raise ConfigError("max_bad_steps", max_bad_steps, "must be at least 1.")
        self.gradient_clip, self.max_bad_steps = gradient_clip, max_bad_steps
        self.skipped, self.in_a_row = 0, 0
        self.last_skipped = False
        self._loss_finite: Tensor | None = None

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Note whether the loss of this batch (of several, when gradients are accumulated) is finite."""
        finite = torch.isfinite(loss.detach()).all()
        self._loss_finite = finite if self._loss_finite is None else self._loss_finite & finite

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Clip, or drop the step."""
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        limit = self.gradient_clip if self.gradient_clip is not None else float("inf")
        norm: Any = torch.nn.utils.clip_grad_norm_(parameters, limit)
        if hasattr(norm, "full_tensor"):  # sharded gradients give a sharded norm
            norm = norm.full_tensor()
        finite = torch.isfinite(norm)
        if self._loss_finite is not None:
            finite = finite & self._loss_finite.to(finite.device)
        self._loss_finite = None
        self.last_skipped = trainer.strategy.reduce_boolean_decision(not bool(finite), all=False)
        if self.last_skipped:
            optimizer.zero_grad(set_to_none=True)
            self.skipped += 1
            self.in_a_row += 1
            if self.in_a_row >= self.max_bad_steps:
                raise NonFiniteError(
                    f"{self.in_a_row} steps in a row had a non-finite loss or gradient (optimizer step {trainer.global_step}, "
                    f"{self.skipped} skipped in all). Lower optimization.learning_rate, lengthen optimization.warmup_steps, "
                    f"or check the data; optimization.max_bad_steps = {self.max_bad_steps} is the limit."
                )
        else:
            self.in_a_row = 0
            pl_module.log("train/grad_norm", norm)
        pl_module.log("train/skipped_steps", float(self.skipped))

    def state_dict(self) -> dict[str, Any]:
        """The counters, for the checkpoint."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the counters."""
        self.skipped, self.in_a_row = state_dict["skipped"], state_dict["in_a_row"]


def step_was_skipped(trainer: L.Trainer) -> bool:
    """Whether the last optimizer step was dropped by a guard."""
    return any(c.last_skipped for c in trainer.callbacks if isinstance(c, NonFiniteGuard))  # type: ignore[attr-defined]
