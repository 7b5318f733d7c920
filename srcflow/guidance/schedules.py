"""Guidance strengths that change along a block's tokens."""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor

from srcflow.errors import ConfigError
from srcflow.registry import Recorded


def _not_negative(strength: float) -> float:
    if not (strength >= 0 and math.isfinite(strength)):
        cure = "Write a finite number of at least 0; 0 switches guidance off."
        raise ConfigError("guidance.strength", strength, "is not a strength.", cure)
    return strength


class Schedule(metaclass=Recorded):
    """Strength as a function of progress: 0 at a block's first token, 1 at its last, in the block's own order."""

    @abstractmethod
    def __call__(self, progress: Tensor) -> Tensor:
        """Strengths (m,) for progress (m,) in [0, 1]."""

    @property
    @abstractmethod
    def is_zero(self) -> bool:
        """True if the strength is 0 everywhere, so that no negative stream has to be run."""

    def __repr__(self) -> str:
        arguments: dict[str, object] = getattr(self, "_recorded_spec", ("", {}))[1]
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in arguments.items())})"


class Constant(Schedule):
    """The same strength for every token.

    Args:
        strength: guidance strength w; 0 means no guidance.
    """

    def __init__(self, strength: float) -> None:
        self.strength = _not_negative(strength)

    def __call__(self, progress: Tensor) -> Tensor:
        """See `Schedule`."""
        return torch.full_like(progress, self.strength)

    @property
    def is_zero(self) -> bool:
        """See `Schedule`."""
        return self.strength == 0


class Annealed(Schedule):
    """Strength that grows linearly from 0 at the first token to its full value at the last (TARFlow's annealed guidance, E9).

    Args:
        strength: guidance strength w at the last token.
    """

    def __init__(self, strength: float) -> None:
        self.strength = _not_negative(strength)

    def __call__(self, progress: Tensor) -> Tensor:
        """See `Schedule`."""
        return self.strength * progress

    @property
    def is_zero(self) -> bool:
        """See `Schedule`."""
        return self.strength == 0


class Interval(Schedule):
    """One strength inside an interval of progress, none outside.

    Args:
        strength: guidance strength w inside the interval.
        start: first progress that is guided, in [0, 1].
        stop: last progress that is guided, in [0, 1].
    """

    def __init__(self, strength: float, start: float = 0.0, stop: float = 1.0) -> None:
        if not 0 <= start <= stop <= 1:
            raise ConfigError(
                "schedule.start/stop", (start, stop), "an interval of progress lies in [0, 1].", "Write 0 <= start <= stop <= 1."
            )
        self.strength, self.start, self.stop = _not_negative(strength), start, stop

    def __call__(self, progress: Tensor) -> Tensor:
        """See `Schedule`."""
        inside = (progress >= self.start) & (progress <= self.stop)
        return self.strength * inside.to(progress.dtype)

    @property
    def is_zero(self) -> bool:
        """See `Schedule`."""
        return self.strength == 0
