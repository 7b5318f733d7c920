"""Normalisation layers."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

NormName = Literal["layer", "rms"]


class RMSNorm(nn.Module):
    """x / rms(x) * (1 + weight) over the last axis, computed in at least float32; weight starts at 0 (STARFlow's form).

    Args:
        width: size of the last axis.
        eps: added to the mean square.
    """

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """Same shape and dtype as x (..., width)."""
        high = x.to(torch.promote_types(x.dtype, torch.float32))
        high = high * torch.rsqrt(high.square().mean(-1, keepdim=True) + self.eps)
        return (high * (1.0 + self.weight)).to(x.dtype)


def make_norm(name: NormName, width: int) -> nn.Module:
    """LayerNorm (eps 1e-5) or RMSNorm (eps 1e-6)."""
    return nn.LayerNorm(width) if name == "layer" else RMSNorm(width)
