"""Skip steps whose loss or gradient is not finite, on all ranks alike; end the run after too many in a row."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol, cast, runtime_checkable

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from srcflow.errors import ConfigError, NonFiniteError


class NonFiniteWarning(UserWarning):
    """A step was skipped because its loss or gradient was not finite."""


@dataclass(frozen=True)
class BadStep:
    """A step that was dropped, as this rank saw it.

    Args:
        batches: what the step was made of, with the batches' numbers in the epoch.
        losses: the batches' losses as they went into the backward pass (divided by the number of accumulated batches).
        loss: the step's loss, mean over ranks.
        norm: the gradient's global norm before clipping.
        in_a_row: dropped steps in a row, this one included.
        skipped: dropped steps of the run, this one included.
        dump: whether what is needed to make the step again is to be written.
    """

    batches: list[tuple[Any, int]]
    losses: list[Tensor]
    loss: float
    norm: float
    in_a_row: int
    skipped: int
    dump: bool


@runtime_checkable
class Examines(Protocol):
    """A module that can say what was wrong with a step, and undo what its batches left behind."""

    def on_bad_step(self, step: BadStep) -> str:
        """Called on every rank, after the gradients were dropped; returns what was found, for the message. The same on every rank."""


class NonFiniteGuard(L.Callback):
    """Clips the gradient's global norm and drops the steps whose loss or gradient is not finite.

    A dropped step leaves the weights and the optimizer's moments as they were (its gradients are gone, so the optimizer has nothing to
    update) and the moving average untouched; the step counter and the schedule go on. Every task attaches its own guard, and then says in
    a warning what was wrong (see `Task.on_bad_step`). Logs `train/grad_norm` (before clipping) and `train/skipped_steps`.

    A step costs one reduction of two numbers and one wait for the device, whatever the outcome.

    Args:
        gradient_clip: largest global norm of the gradient, None for no clipping.
        max_bad_steps: this many dropped steps in a row raise NonFiniteError.
        dump_bad_steps: so many of the first dropped steps are dumped; the one that ends the run is in any case.

    Attributes:
        loss: the last step's loss: mean over its batches and over the ranks.
        norm: the last step's gradient norm before clipping.
    """

    def __init__(self, gradient_clip: float | None = None, max_bad_steps: int = 20, dump_bad_steps: int = 0) -> None:
        if max_bad_steps < 1:
            raise ConfigError("max_bad_steps", max_bad_steps, "must be at least 1.")
        if dump_bad_steps < 0:
            raise ConfigError("dump_bad_steps", dump_bad_steps, "must not be negative.")
        self.gradient_clip, self.max_bad_steps, self.dump_bad_steps = gradient_clip, max_bad_steps, dump_bad_steps
        self.skipped, self.in_a_row = 0, 0
        self.last_skipped = False
        self.loss = self.norm = math.nan
        self._losses: list[Tensor] = []
        self._batches: list[tuple[Any, int]] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        """Remember the batches of the step (no copies)."""
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._batches, self._losses = [], []
        self._batches.append((batch, batch_idx))

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Note the loss of this batch (of several, when gradients are accumulated)."""
        self._losses.append(loss.detach())

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Clip, or drop the step."""
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        limit = self.gradient_clip if self.gradient_clip is not None else float("inf")
        norm: Any = torch.nn.utils.clip_grad_norm_(parameters, limit)
        if hasattr(norm, "full_tensor"):  # sharded gradients give a sharded norm
            norm = norm.full_tensor()
        wide = torch.promote_types(norm.dtype, torch.float32)
        loss = sum((x.to(norm.device, wide) for x in self._losses), start=norm.new_zeros((), dtype=wide))
        # a number that is not finite on one rank makes the mean so on all
        seen = cast(Tensor, trainer.strategy.reduce(torch.stack([loss, norm.to(wide)]), reduce_op="mean"))
        self.loss, self.norm = seen.tolist()
        self.last_skipped = not (math.isfinite(self.loss) and math.isfinite(self.norm))
        if self.last_skipped:
            self._drop(trainer, pl_module, optimizer)
        else:
            self.in_a_row = 0
            pl_module.log("train/grad_norm", norm)
        self._batches, self._losses = [], []
        pl_module.log("train/skipped_steps", float(self.skipped))

    def _drop(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        optimizer.zero_grad(set_to_none=True)
        self.skipped += 1
        self.in_a_row += 1
        last = self.in_a_row >= self.max_bad_steps
        found = ""
        if isinstance(pl_module, Examines):
            dump = last or self.skipped <= self.dump_bad_steps
            step = BadStep(self._batches, self._losses, self.loss, self.norm, self.in_a_row, self.skipped, dump)
            found = f" {pl_module.on_bad_step(step)}"
        if last:
            raise NonFiniteError(
                f"{self.in_a_row} steps in a row had a non-finite loss or gradient (optimizer step {trainer.global_step}, "
                f"{self.skipped} skipped in all).{found} Lower optimization.learning_rate, lengthen optimization.warmup_steps, "
                f"or check the data; optimization.max_bad_steps = {self.max_bad_steps} is the limit."
            )
        rank_zero_warn(
            f"optimizer step {trainer.global_step} was skipped ({self.in_a_row} in a row, {self.skipped} in all): loss {self.loss:.4g}, "
            f"gradient norm {self.norm:.4g}.{found}",
            category=NonFiniteWarning,
        )

    def state_dict(self) -> dict[str, Any]:
        """The counters, for the checkpoint."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the counters."""
        self.skipped, self.in_a_row = state_dict["skipped"], state_dict["in_a_row"]


def step_was_skipped(trainer: L.Trainer) -> bool:
    """Whether the last optimizer step was dropped by a guard."""
    return any(c.last_skipped for c in trainer.callbacks if isinstance(c, NonFiniteGuard))  # type: ignore[attr-defined]
