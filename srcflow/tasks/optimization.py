"""AdamW with warm-up and cosine decay: what every stage trains with (docs/reference/equations.md E19)."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from srcflow.errors import ConfigError, Problems


def warmup_cosine(step: int, *, peak: float, minimum: float, warmup: int, total: int) -> float:
    """Learning rate of the update that follows `step` finished ones.

    It rises linearly from `minimum` to `peak` over `warmup` updates, falls on half a cosine to `minimum` at `total`, and stays there
    (TARFlow's and STARFlow's schedule, whose published form rises again after `total`).

    >>> [warmup_cosine(n, peak=1.0, minimum=0.0, warmup=2, total=6) for n in (0, 1, 2, 4, 6, 60)]
    [0.0, 0.5, 1.0, 0.5, 0.0, 0.0]
    """
    if step < warmup:
        return minimum + (peak - minimum) * step / warmup
    if step >= total:
        return minimum
    return minimum + 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) * (peak - minimum)


@dataclass(frozen=True)
class Optimization:
    """AdamW, its schedule, and what happens to a gradient before it is used.

    Args:
        learning_rate: the peak.
        min_learning_rate: where the warm-up starts and the cosine ends; stays there afterwards.
        warmup_steps: optimizer steps of linear warm-up.
        betas: AdamW's decay rates of the two moments.
        weight_decay: decoupled weight decay.
        decay: which parameters decay: "all" (published recipes), or "matrices", those with at least two dimensions.
        gradient_clip: largest global norm of a gradient; null: not clipped. Set it here, not in trainer.gradient_clip_val.
        max_bad_steps: a step with a non-finite loss or gradient is skipped; this many in a row end the run.
        dump_bad_steps: so many of the run's first skipped steps are written to the disk, for `srcflow replay`; the one that ends the run
            is in any case.
    """

    learning_rate: float = 2e-4
    min_learning_rate: float = 1e-6
    warmup_steps: int = 0
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    decay: Literal["all", "matrices"] = "all"
    gradient_clip: float | None = 1.0
    max_bad_steps: int = 20
    dump_bad_steps: int = 0

    def __post_init__(self) -> None:
        problems, key = Problems(), "optimization"
        if not self.learning_rate > 0:
            problems.add(ConfigError(f"{key}.learning_rate", self.learning_rate, "must be positive."))
        if not 0 <= self.min_learning_rate <= self.learning_rate:
            problems.add(
                ConfigError(
                    f"{key}.min_learning_rate", self.min_learning_rate, f"must lie between 0 and learning_rate = {self.learning_rate}."
                )
            )
        if self.warmup_steps < 0:
            problems.add(ConfigError(f"{key}.warmup_steps", self.warmup_steps, "must not be negative."))
        if not all(0 <= b < 1 for b in self.betas):
            problems.add(ConfigError(f"{key}.betas", self.betas, "each must lie in [0, 1)."))
        if self.weight_decay < 0:
            problems.add(ConfigError(f"{key}.weight_decay", self.weight_decay, "must not be negative."))
        if self.decay not in ("all", "matrices"):
            problems.add(ConfigError(f"{key}.decay", self.decay, "unknown.", 'Write "all" or "matrices".'))
        if self.gradient_clip is not None and not self.gradient_clip > 0:
            problems.add(ConfigError(f"{key}.gradient_clip", self.gradient_clip, "must be positive.", "Write null for no clipping."))
        if self.max_bad_steps < 1:
            problems.add(ConfigError(f"{key}.max_bad_steps", self.max_bad_steps, "must be at least 1."))
        if self.dump_bad_steps < 0:
            problems.add(ConfigError(f"{key}.dump_bad_steps", self.dump_bad_steps, "must not be negative.", "Write 0 for none."))
        problems.raise_if_any()

    def learning_rate_at(self, step: int, total: int) -> float:
        """Learning rate of the update that follows `step` finished ones, of `total` (see `warmup_cosine`)."""
        return warmup_cosine(step, peak=self.learning_rate, minimum=self.min_learning_rate, warmup=self.warmup_steps, total=total)

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.AdamW:
        """AdamW over the parameters that require a gradient."""
        trained = [p for p in parameters if p.requires_grad]
        if self.decay == "matrices":
            decayed = [p for p in trained if p.ndim >= 2]
            groups: list[dict[str, Any]] = [
                {"params": decayed, "weight_decay": self.weight_decay},
                {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
            ]
            groups = [g for g in groups if g["params"]]
        else:
            groups = [{"params": trained, "weight_decay": self.weight_decay}]
        return torch.optim.AdamW(groups, lr=self.learning_rate, betas=self.betas)

    def scheduler(self, optimizer: torch.optim.Optimizer, total: int) -> torch.optim.lr_scheduler.LambdaLR:
        """The schedule over `total` optimizer steps; to be stepped after every one of them.

        Raises:
            ConfigError: the warm-up is longer than the run.
        """
        if self.warmup_steps >= total:
            raise ConfigError(
                "optimization.warmup_steps", self.warmup_steps, f"the run has only {total} optimizer steps (trainer.max_steps)."
            )
        return torch.optim.lr_scheduler.LambdaLR(optimizer, functools.partial(_factor, self, total))


def _factor(settings: Optimization, total: int, step: int) -> float:
    return settings.learning_rate_at(step, total) / settings.learning_rate


DEFAULT = Optimization()
"""Settings of a task whose configuration names none."""
