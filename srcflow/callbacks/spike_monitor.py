"""Watch the loss and the gradient's norm for jumps."""

from __future__ import annotations

import math
from collections import deque
from statistics import median
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn

from srcflow.callbacks.non_finite import NonFiniteGuard
from srcflow.errors import ConfigError

DEVIATION = 1.4826
"""Standard deviation of a normal law in units of its median absolute deviation."""
FLOOR = 1e-3
"""Least deviation that is assumed, as a share of the median."""
TINY = 1e-30


class SpikeWarning(UserWarning):
    """The loss or the gradient's norm jumped."""


class Jumps:
    """Finds values far above those before them: by more than `threshold` robust deviations (1.4826 times the median absolute deviation).

    A value counts among the next ones' predecessors whether it was a jump or not. So a rare outlier hardly moves the median, and a lasting
    change is no news once it fills half of the window.

    Args:
        window: how many values are kept.
        threshold: in deviations.
        ratios: judge positive values by their logarithm.

    >>> jumps = Jumps(window=8, threshold=6.0)
    >>> [jumps.height(x) > 6 for x in (1.0, 1.1, 0.9, 1.0, 1.1, 9.0, 1.0)]
    [False, False, False, False, False, True, False]
    """

    def __init__(self, window: int, threshold: float, ratios: bool = False) -> None:
        self.threshold, self.ratios = threshold, ratios
        self.kept: deque[float] = deque(maxlen=window)
        self.count = 0

    def height(self, value: float) -> float:
        """How many deviations a value lies above the median of those before it (0 until half of the window is there); keeps it."""
        value = math.log(max(value, TINY)) if self.ratios else value
        found = 0.0
        if 2 * len(self.kept) >= (self.kept.maxlen or 0):
            middle = median(self.kept)
            spread = max(DEVIATION * median(abs(x - middle) for x in self.kept), FLOOR * (1.0 if self.ratios else abs(middle)), TINY)
            found = (value - middle) / spread
        self.kept.append(value)
        self.count += found > self.threshold
        return found


class SpikeMonitor(L.Callback):
    """Warns, with step and value, when the loss or the gradient's norm jumps, and logs `train/loss_spikes` and `train/grad_norm_spikes`,
    the numbers of jumps so far.

    A jump is a value more than `threshold` robust deviations above the median of the last `window` steps; the norm is judged by its
    logarithm. Steps that the guard dropped are not judged. The loss is the mean over all ranks, so every rank comes to the same result; it
    and the norm (before clipping) are those that the task's `NonFiniteGuard` has fetched from the device already, so a step is not held up.

    Args:
        window: steps that a value is compared with; judging begins when half of them are there.
        threshold: deviations from which on a value is a jump. For normally distributed values 6 is met by chance once in 10^9 steps;
            batches have heavier tails.
    """

    def __init__(self, window: int = 200, threshold: float = 8.0) -> None:
        if window < 4:
            raise ConfigError("spike_monitor.window", window, "a spread needs at least 4 values.")
        if not threshold > 0:
            raise ConfigError("spike_monitor.threshold", threshold, "must be positive.")
        self.jumps = {"loss": Jumps(window, threshold), "grad_norm": Jumps(window, threshold, ratios=True)}
        self._step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find the guard.

        Raises:
            ConfigError: the module has none.
        """
        self._guard(trainer)
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Judge the step, if one was made."""
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        guard = self._guard(trainer)
        if not guard.last_skipped:
            for name, value in (("loss", guard.loss), ("grad_norm", guard.norm)):
                self._judge(name, value, trainer.global_step - 1)
        pl_module.log_dict({f"train/{name}_spikes": float(j.count) for name, j in self.jumps.items()})

    def _judge(self, name: str, value: float, step: int) -> None:
        jumps = self.jumps[name]
        height = jumps.height(value)
        if height > jumps.threshold:
            rank_zero_warn(
                f"optimizer step {step}: train/{name} jumped to {value:.4g}, {height:.3g} deviations above the median of the last "
                f"{len(jumps.kept)} steps ({jumps.count} jumps so far).",
                category=SpikeWarning,
            )

    def _guard(self, trainer: L.Trainer) -> NonFiniteGuard:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, NonFiniteGuard):
                return callback
        raise ConfigError("trainer.callbacks", "SpikeMonitor", "needs the NonFiniteGuard that every task of srcflow attaches.", "Add one.")

    def state_dict(self) -> dict[str, Any]:
        """The values kept and the counts."""
        return {name: {"kept": list(j.kept), "count": j.count} for name, j in self.jumps.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore them."""
        for name, state in state_dict.items():
            self.jumps[name].kept.extend(state["kept"])
            self.jumps[name].count = state["count"]
