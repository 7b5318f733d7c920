"""TARFlow's affine coupling."""

from __future__ import annotations

import torch
from torch import Tensor

from srcflow.couplings.base import Coupling
from srcflow.types import AffineParams


def upcast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Each tensor in at least float32, all in one dtype."""
    dtype = torch.float32
    for t in tensors:
        dtype = torch.promote_types(dtype, t.dtype)
    return tuple(t.to(dtype) for t in tensors)


class Affine(Coupling):
    """z = (x - m) exp(-a) with parameters (a, m): TARFlow's coupling (arXiv 2412.06329, E5)."""

    params_per_channel = 2
    scale_rows = (0,)

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """See `Coupling.forward`."""
        x, params = upcast(x, params)
        a, m = params.unbind(-2)
        return (x - m) * torch.exp(-a), -a

    def inverse(self, z: Tensor, params: Tensor) -> Tensor:
        """See `Coupling.inverse`."""
        z, params = upcast(z, params)
        a, m = params.unbind(-2)
        return z * torch.exp(a) + m

    def affine(self, params: Tensor) -> AffineParams:
        """See `Coupling.affine`."""
        a, m = upcast(params)[0].unbind(-2)
        return AffineParams(a, m)
