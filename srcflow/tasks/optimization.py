"""Optimizer and schedule of every stage, and what happens to a gradient (docs/reference/equations.md E19)."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from srcflow.errors import ConfigError, Problems
from srcflow.learning_rates import Cosine, LearningRateSchedule
from srcflow.tasks.optimizers import Choice, choose, refused

BETAS, MIN_LEARNING_RATE = (0.9, 0.95), 1e-6
COSINE = Cosine()


@dataclass(frozen=True)
class Optimization:
    """Optimizer, its schedule, and what happens to a gradient before it is used.

    By default AdamW, with a linear warm-up and half a cosine. An option that has no effect on the chosen optimizer or schedule is refused.

    Args:
        learning_rate: the peak.
        min_learning_rate: where the warm-up starts and the schedule ends; stays there afterwards. Null: 1e-6, or none where the schedule
            has no minimum.
        warmup_steps: optimizer steps of linear warm-up.
        betas: AdamW's decay rates of the two moments; null: (0.9, 0.95), or what another `optimizer` is told.
        weight_decay: weight decay, decoupled in AdamW; it takes the place of the optimizer's own default.
        decay: which parameters decay: "all" (published recipes), or "matrices", those with at least two dimensions.
        gradient_clip: largest global norm of a gradient; null: not clipped. Set it here, not in trainer.gradient_clip_val.
        max_bad_steps: a step with a non-finite loss or gradient is skipped; this many in a row end the run.
        dump_bad_steps: so many of the run's first skipped steps are written to the disk, for `srcflow replay`; the one that ends the run
            is in any case.
        optimizer: class path of any subclass of torch.optim.Optimizer, or class_path and init_args; it gets the learning rate, and groups
            of parameters with their weight decay, from here. Null: AdamW.
        schedule: a `srcflow.learning_rates.LearningRateSchedule`: Cosine, Constant, WSD, or another; null: Cosine.

    Raises:
        ConfigError: names what is out of range, has no effect, or is refused by the optimizer; `ProblemsError` if several are.
    """

    learning_rate: float = 2e-4
    min_learning_rate: float | None = None
    warmup_steps: int = 0
    betas: tuple[float, float] | None = None
    weight_decay: float = 0.0
    decay: Literal["all", "matrices"] = "all"
    gradient_clip: float | None = 1.0
    max_bad_steps: int = 20
    dump_bad_steps: int = 0
    optimizer: dict[str, Any] | str | None = None
    schedule: LearningRateSchedule | None = None

    free_options: ClassVar[frozenset[str]] = frozenset({"max_bad_steps", "dump_bad_steps"})
    null_options: ClassVar[Mapping[str, Any]] = MappingProxyType({"betas": BETAS, "min_learning_rate": MIN_LEARNING_RATE})

    def __post_init__(self) -> None:
        problems, key = Problems(), "optimization"
        if not self.learning_rate > 0:
            problems.add(ConfigError(f"{key}.learning_rate", self.learning_rate, "must be positive."))
        with problems.collect():
            self._check_minimum(f"{key}.min_learning_rate")
        if self.warmup_steps < 0:
            problems.add(ConfigError(f"{key}.warmup_steps", self.warmup_steps, "must not be negative."))
        if self.betas is not None and not all(0 <= b < 1 for b in self.betas):
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
        if self.optimizer is not None:
            with problems.collect():
                self._check_optimizer(key, tried=not problems.found)
        problems.raise_if_any()

    def _check_minimum(self, key: str) -> None:
        schedule = self.schedule or COSINE
        if not schedule.uses_minimum:
            if self.min_learning_rate is not None:
                why = f"has no effect with the schedule {type(schedule).__name__}."
                raise ConfigError(key, self.min_learning_rate, why, "Remove it, or write null.")
        elif not 0 <= self.minimum <= self.learning_rate:
            raise ConfigError(key, self.minimum, f"must lie between 0 and learning_rate = {self.learning_rate}.")

    def _check_optimizer(self, key: str, *, tried: bool) -> None:
        """Refuse a class or arguments that cannot be used, and options that would have no effect on it."""
        problems, choice = Problems(), self._choice()
        if self.betas is not None:
            takes = "betas" in inspect.signature(choice.cls).parameters
            cure = f"Set {key}.optimizer.init_args.betas, and remove this or write null." if takes else "Remove it, or write null."
            problems.add(ConfigError(f"{key}.betas", self.betas, f"has no effect on {choice.name}; it is for the default AdamW.", cure))
        if not choice.decays:
            for name, value, neutral in (("weight_decay", self.weight_decay, 0.0), ("decay", self.decay, "all")):
                if value != neutral:
                    why = f"{choice.name} knows no weight decay."
                    problems.add(ConfigError(f"{key}.{name}", value, why, f"Remove it, or write {neutral}."))
        if tried:
            with problems.collect():
                choice.check(f"{key}.optimizer", self.learning_rate, self.weight_decay)
        problems.raise_if_any()

    def _choice(self) -> Choice:
        if self.optimizer is None:
            return Choice(torch.optim.AdamW, {"betas": BETAS if self.betas is None else self.betas})
        return choose(self.optimizer, "optimization.optimizer")

    @property
    def minimum(self) -> float:
        """The minimum in effect; 0 where the schedule has none."""
        if not (self.schedule or COSINE).uses_minimum:
            return 0.0
        return MIN_LEARNING_RATE if self.min_learning_rate is None else self.min_learning_rate

    def learning_rate_at(self, step: int, total: int) -> float:
        """Learning rate of the update that follows `step` finished ones, of `total` (see `srcflow.learning_rates`)."""
        schedule = self.schedule or COSINE
        return schedule(step, peak=self.learning_rate, minimum=self.minimum, warmup=self.warmup_steps, total=total)

    def build_optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer over the parameters that require a gradient.

        Raises:
            ConfigError: it does not take these parameters (PyTorch's Muon: matrices only).
        """
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
        choice = self._choice()
        try:
            return choice.build(groups, self.learning_rate)
        except (ValueError, TypeError, RuntimeError) as e:
            if self.optimizer is None:
                raise
            raise refused(e, choice, "optimization.optimizer") from e

    def check(self, total: int, key: str = "optimization") -> None:
        """Refuse a schedule that is longer than a run.

        Args:
            total: optimizer steps of the run.
            key: where these settings stand in the configuration, for messages.

        Raises:
            ConfigError: the warm-up, or warm-up and decay together, take more steps than the run has.
        """
        if self.warmup_steps >= total:
            raise ConfigError(f"{key}.warmup_steps", self.warmup_steps, f"the run has only {total} optimizer steps (trainer.max_steps).")
        if self.schedule is not None:
            self.schedule.check(self.warmup_steps, total, key)

    def scheduler(self, optimizer: torch.optim.Optimizer, total: int, *, whole: bool = True) -> torch.optim.lr_scheduler.LambdaLR:
        """The schedule over `total` optimizer steps; to be stepped after every one of them.

        Args:
            optimizer: what it acts on.
            total: optimizer steps of the run.
            whole: whether all of the schedule must fit into them.

        Raises:
            ConfigError: it does not (see `check`).
        """
        if whole:
            self.check(total)
        return torch.optim.lr_scheduler.LambdaLR(optimizer, functools.partial(_factor, self, total))


def _factor(settings: Optimization, total: int, step: int) -> float:
    return settings.learning_rate_at(step, total) / settings.learning_rate


DEFAULT = Optimization()
"""Settings of a task whose configuration names none."""
