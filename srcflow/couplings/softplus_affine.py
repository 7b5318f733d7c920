"""STARFlow's affine coupling with a softplus scale."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from srcflow.couplings.affine import upcast
from srcflow.couplings.base import Coupling
from srcflow.types import AffineParams

OFFSET = math.log(math.e - 1.0)
"""softplus(OFFSET) = 1, so zero parameters are the identity."""


class SoftplusAffine(Coupling):
    """z = (x - m) / softplus(a + ln(e - 1)) with parameters (a, m): STARFlow's coupling (arXiv 2506.06276, E6).

    The scale grows linearly with `a` where TARFlow's grows exponentially, which keeps long training runs finite.
    """

    params_per_channel = 2
    scale_rows = (0,)

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """See `Coupling.forward`."""
        x, params = upcast(x, params)
        a, m = params.unbind(-2)
        sigma = F.softplus(a + OFFSET)
        return (x - m) / sigma, -torch.log(sigma)

    def inverse(self, z: Tensor, params: Tensor) -> Tensor:
        """See `Coupling.inverse`."""
        z, params = upcast(z, params)
        a, m = params.unbind(-2)
        return z * F.softplus(a + OFFSET) + m

    def affine(self, params: Tensor) -> AffineParams:
        """See `Coupling.affine`."""
        a, m = upcast(params)[0].unbind(-2)
        return AffineParams(torch.log(F.softplus(a + OFFSET)), m)
