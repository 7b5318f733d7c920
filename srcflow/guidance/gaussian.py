"""STARFlow's closed-form guidance."""

from __future__ import annotations

import torch
from torch import Tensor

from srcflow.guidance.base import Blocks, Guidance, Negative
from srcflow.guidance.schedules import Schedule
from srcflow.types import AffineParams


class Gaussian(Guidance):
    """The Gaussian proportional to p_c^(1+w) / p_u^w, with the variance ratio clipped at 1 (arXiv 2506.06276, E10).

    With s = min(sigma_c / sigma_u, 1)^2 and D = 1 + w - w s:  sigma = sigma_c / sqrt(D),  m = ((1 + w) m_c - w s m_u) / D.

    Args:
        strength: guidance strength w >= 0 or a schedule.
        blocks: where it acts; the published models condition and guide the deep block only.
        negative: what the negative stream is.
    """

    def __init__(self, strength: float | Schedule, blocks: Blocks = "conditioned", negative: Negative | None = None) -> None:
        super().__init__(strength, blocks, negative)

    def __call__(self, positive: AffineParams, negative: AffineParams, progress: Tensor) -> AffineParams:
        """See `Guidance.__call__`."""
        w = self.weights(progress, positive.shift)
        s = torch.exp(2.0 * (positive.log_scale - negative.log_scale).clamp(max=0.0))
        d = 1.0 + w - w * s
        shift = ((1.0 + w) * positive.shift - w * s * negative.shift) / d
        return AffineParams(positive.log_scale - 0.5 * torch.log(d), shift)
