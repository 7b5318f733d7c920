"""Two couplings: one that guidance can work on, one that it cannot."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from srcflow.couplings.base import Coupling
from srcflow.errors import ConfigError
from srcflow.types import AffineParams


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


class BoundedAffine(Coupling):
    """z = (x - m) exp(-s) with s = limit tanh(a / limit): a scale that cannot run away.

    Args:
        limit: bound of |s|.
    """

    params_per_channel = 2
    scale_rows = (0,)

    def __init__(self, limit: float = 3.0) -> None:
        if limit <= 0:
            raise ConfigError("coupling.limit", limit, "a bound is positive.")
        self.limit = limit

    def affine(self, params: Tensor) -> AffineParams:
        """See `Coupling.affine`."""
        a, m = _wide(params).unbind(-2)
        return AffineParams(self.limit * torch.tanh(a / self.limit), m)

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """See `Coupling.forward`."""
        log_scale, shift = self.affine(params)
        return (_wide(x) - shift) * torch.exp(-log_scale), -log_scale

    def inverse(self, z: Tensor, params: Tensor) -> Tensor:
        """See `Coupling.inverse`."""
        log_scale, shift = self.affine(params)
        return _wide(z) * torch.exp(log_scale) + shift


class SinhArcsinh(Coupling):
    """z = sinh(e^t arcsinh(y)) with y = (x - m) e^-a and t = tanh(b): tails heavier or lighter than a normal's. Not affine."""

    params_per_channel = 3
    scale_rows = (0,)

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """See `Coupling.forward`."""
        a, m, t = self._parts(params)
        y = (_wide(x) - m) * torch.exp(-a)
        w = torch.exp(t) * torch.asinh(y)
        log_cosh = w.abs() + F.softplus(-2.0 * w.abs()) - math.log(2.0)
        return torch.sinh(w), t - a + log_cosh - 0.5 * torch.log1p(y.square())

    def inverse(self, z: Tensor, params: Tensor) -> Tensor:
        """See `Coupling.inverse`."""
        a, m, t = self._parts(params)
        return torch.sinh(torch.exp(-t) * torch.asinh(_wide(z))) * torch.exp(a) + m

    def _parts(self, params: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, m, b = _wide(params).unbind(-2)
        return a, m, torch.tanh(b)
