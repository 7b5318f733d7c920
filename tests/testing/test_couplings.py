"""check_coupling passes a sound coupling and fails each broken one for the reason that is broken."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from srcflow.couplings.affine import Affine
from srcflow.testing import (
    check_coupling,
)
from srcflow.types import AffineParams


class OffsetCoupling(Affine):
    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        z, logdet = super().forward(x, params)
        return z + 1e-5, logdet

    def inverse(self, z: Tensor, params: Tensor) -> Tensor:
        return super().inverse(z - 1e-5, params)


class InexactCoupling(Affine):
    def inverse(self, z: Tensor, params: Tensor) -> Tensor:
        return super().inverse(z, params) + 1e-8 * params[..., 0, :] ** 2


class WrongSignCoupling(Affine):
    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        z, logdet = super().forward(x, params)
        return z, -logdet


class HalfLogdetCoupling(Affine):
    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        z, logdet = super().forward(x, params)
        return z, logdet.to(x.dtype)


class NarrowCoupling(Affine):
    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x.float(), params.float())


class LeakyCoupling(Affine):
    """Each token is shifted by its neighbour's parameter: invertible, with a true log-determinant, but not token by token."""

    @staticmethod
    def _moved(params: Tensor) -> Tensor:
        return torch.stack([params[..., 0, :], params[..., 1, :].roll(1, dims=1)], dim=-2)

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x, self._moved(params))

    def inverse(self, z: Tensor, params: Tensor) -> Tensor:
        return super().inverse(z, self._moved(params))

    def affine(self, params: Tensor) -> None:  # type: ignore[override]
        return None


class DeadRowCoupling(Affine):
    params_per_channel = 3

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x, params[..., :2, :])

    def inverse(self, z: Tensor, params: Tensor) -> Tensor:
        return super().inverse(z, params[..., :2, :])

    def affine(self, params: Tensor) -> AffineParams:
        return super().affine(params[..., :2, :])


class StuckCoupling(Affine):
    """Quadratic in its scale parameter: no gradient at zero, where heads start."""

    @staticmethod
    def _squared(params: Tensor) -> Tensor:
        return torch.stack([params[..., 0, :] ** 2, params[..., 1, :]], dim=-2)

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x, self._squared(params))

    def inverse(self, z: Tensor, params: Tensor) -> Tensor:
        return super().inverse(z, self._squared(params))

    def affine(self, params: Tensor) -> AffineParams:
        return super().affine(self._squared(params))


class WrongViewCoupling(Affine):
    def affine(self, params: Tensor) -> AffineParams:
        view = super().affine(params)
        return AffineParams(-view.log_scale, view.shift)


class InPlaceCoupling(Affine):
    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        z, logdet = super().forward(x, params)
        if not params.requires_grad and not x.requires_grad:
            x.zero_()
        return z, logdet


class WeightyCoupling(Affine):
    def __init__(self) -> None:
        self.weight = torch.ones(3)


class UnrecordableCoupling(Affine):
    def __init__(self, function: Callable[[Tensor], Tensor] = torch.exp) -> None:
        self.function = function


@pytest.mark.parametrize(
    ("coupling", "message"),
    [
        (OffsetCoupling(), "zero parameters are not the identity"),
        (InexactCoupling(), r"inverse\(forward\(x\)\) and x in torch.float64"),
        (WrongSignCoupling(), "log-determinant of a token .* and the Jacobian's"),
        (HalfLogdetCoupling(), "log-determinant of torch.bfloat16 inputs is torch.bfloat16"),
        (NarrowCoupling(), "log-determinant of torch.float64 inputs is torch.float32"),
        (LeakyCoupling(), "tokens are not independent"),
        (DeadRowCoupling(), r"no gradient .* parameter rows \[2\]"),
        (StuckCoupling(), r"parameter rows \[0\] \(at zero"),
        (WrongViewCoupling(), "affine view"),
        (InPlaceCoupling(), "in place"),
        (WeightyCoupling(), "weightless"),
        (UnrecordableCoupling(), "no specification"),
    ],
)
def test_broken_couplings_fail(coupling: Affine, message: str) -> None:
    with pytest.raises(AssertionError, match=f"{type(coupling).__name__}: .*{message}"):
        check_coupling(coupling)


def test_a_sound_coupling_passes() -> None:
    check_coupling(Affine())
    check_coupling(Affine(), dim=1, tokens=2, batch=2, seed=5)
