"""The volume-preserving coupling."""

from __future__ import annotations

import torch
from torch import Tensor

from srcflow.couplings.affine import upcast
from srcflow.couplings.base import Coupling
from srcflow.types import AffineParams


class Additive(Coupling):
    """z = x - m with the parameter m: volume-preserving (TARFlow with `nvp=False`; pair it with a learned `Flow.prior_std`, E7)."""

    params_per_channel = 1
    scale_rows = ()

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """See `Coupling.forward`."""
        x, params = upcast(x, params)
        z = x - params.squeeze(-2)
        return z, torch.zeros_like(z)

    def inverse(self, z: Tensor, params: Tensor) -> Tensor:
        """See `Coupling.inverse`."""
        z, params = upcast(z, params)
        return z + params.squeeze(-2)

    def affine(self, params: Tensor) -> AffineParams:
        """See `Coupling.affine`."""
        m = upcast(params)[0].squeeze(-2)
        return AffineParams(torch.zeros_like(m), m)
