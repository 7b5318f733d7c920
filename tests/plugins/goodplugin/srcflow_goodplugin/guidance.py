"""A guidance rule that grows more slowly than the difference of the streams."""

from __future__ import annotations

from torch import Tensor

from srcflow.errors import ConfigError
from srcflow.guidance.base import Blocks, Guidance, Negative
from srcflow.guidance.schedules import Schedule
from srcflow.types import AffineParams


class Power(Guidance):
    """Extrapolates by sign(x) |x|^power of the streams' difference x, so that large differences count for less.

    Args:
        strength: guidance strength w or a schedule.
        power: exponent, positive; 1 is linear extrapolation.
        blocks: where it acts.
        negative: what the negative stream is.
    """

    def __init__(
        self,
        strength: float | Schedule,
        power: float = 0.5,
        blocks: Blocks = "all",
        negative: Negative | None = None,
    ) -> None:
        super().__init__(strength, blocks, negative)
        if power <= 0:
            raise ConfigError("guidance.power", power, "an exponent is positive.")
        self.power = power

    def __call__(self, positive: AffineParams, negative: AffineParams, progress: Tensor) -> AffineParams:
        """See `Guidance.__call__`."""
        w = self.weights(progress, positive.shift)
        return AffineParams(*(p + w * self._grow(p - n) for p, n in zip(positive, negative, strict=True)))

    def _grow(self, x: Tensor) -> Tensor:
        return x.sign() * x.abs().pow(self.power)
