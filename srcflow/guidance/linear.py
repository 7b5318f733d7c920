"""TARFlow's guidance."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from srcflow.errors import ConfigError
from srcflow.guidance.base import Blocks, Guidance, Negative
from srcflow.guidance.schedules import Schedule
from srcflow.types import AffineParams


class Linear(Guidance):
    """Extrapolates log-scale and shift away from the negative stream: a = a_c + w (a_c - a_u), m = m_c + w (m_c - m_u).

    TARFlow's rule (arXiv 2412.06329, E9). With an `Annealed` schedule it is TARFlow's annealed guidance.

    Args:
        strength: guidance strength w >= 0 or a schedule.
        what: which parameters are extrapolated; the others stay the positive stream's.
        blocks: where it acts.
        negative: what the negative stream is.
    """

    def __init__(
        self,
        strength: float | Schedule,
        what: Literal["both", "log_scale", "shift"] = "both",
        blocks: Blocks = "all",
        negative: Negative | None = None,
    ) -> None:
        super().__init__(strength, blocks, negative)
        if what not in ("both", "log_scale", "shift"):
            raise ConfigError("guidance.what", what, "unknown.", 'Write "both", "log_scale" or "shift".')
        self.what = what

    def __call__(self, positive: AffineParams, negative: AffineParams, progress: Tensor) -> AffineParams:
        """See `Guidance.__call__`."""
        w = self.weights(progress, positive.shift)
        log_scale, shift = positive
        if self.what != "shift":
            log_scale = log_scale + w * (log_scale - negative.log_scale)
        if self.what != "log_scale":
            shift = shift + w * (shift - negative.shift)
        return AffineParams(log_scale, shift)
