"""check_compressor passes a sound compressor and fails each broken one for the reason that is broken."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from srcflow.compressors.base import Compressor
from srcflow.testing import (
    check_compressor,
)
from srcflow.types import Grid


class MLPCompressor(Compressor):
    """Sound: PCA plus a small network on either side; the flag lives in the state_dict."""

    def __init__(self, dim: int = 10, code_dim: int = 4) -> None:
        super().__init__()
        self.dim, self.code_dim = dim, code_dim
        self.mean = nn.Parameter(torch.zeros(dim))
        self.inward, self.outward = nn.Linear(dim, code_dim, bias=False), nn.Linear(code_dim, dim, bias=False)
        self.mlp = nn.Sequential(nn.Linear(code_dim, 8), nn.GELU(), nn.Linear(8, code_dim))
        nn.init.zeros_(self.mlp[2].weight)
        nn.init.zeros_(self.mlp[2].bias)
        self.register_buffer("fitted", torch.tensor(False))

    @property
    def needs_pca(self) -> bool:
        return not bool(self.fitted)

    def init_from_pca(self, mean: Tensor, components: Tensor) -> None:
        with torch.no_grad():
            self.mean.copy_(mean)
            self.inward.weight.copy_(components)
            self.outward.weight.copy_(components.T)
            self.fitted.fill_(True)

    def compress(self, x: Tensor, grid: Grid) -> Tensor:
        h = self.inward(x - self.mean).float()
        return h + self.mlp(h).float()

    def expand(self, codes: Tensor, grid: Grid) -> Tensor:
        return self.outward(codes) + self.mean

    def last_layer(self) -> nn.Parameter:
        return self.outward.weight


class NormedCompressor(MLPCompressor):
    def compress(self, x: Tensor, grid: Grid) -> Tensor:
        return F.layer_norm(super().compress(x, grid), (self.code_dim,))

    @property
    def needs_pca(self) -> bool:
        return False


class RMSNormedCompressor(NormedCompressor):
    """With an affine part, so that the codes' lengths differ."""

    def __init__(self, dim: int = 10, code_dim: int = 4) -> None:
        super().__init__(dim, code_dim)
        self.gain = nn.Parameter(torch.linspace(0.5, 2.0, code_dim))
        self.bias = nn.Parameter(torch.linspace(0.5, -1.0, code_dim))

    def compress(self, x: Tensor, grid: Grid) -> Tensor:
        return F.rms_norm(MLPCompressor.compress(self, x, grid), (self.code_dim,)) * self.gain + self.bias


class DeadWeightCompressor(MLPCompressor):
    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.ones(2))


class MixingCompressor(MLPCompressor):
    def compress(self, x: Tensor, grid: Grid) -> Tensor:
        return super().compress(x - 0.1 * x.mean(0), grid)

    @property
    def needs_pca(self) -> bool:
        return False


class WrongShapeCompressor(MLPCompressor):
    def out_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        return shape[0] // 2, self.code_dim


class HalfCompressor(MLPCompressor):
    def compress(self, x: Tensor, grid: Grid) -> Tensor:
        h = super().compress(x, grid)
        return h.bfloat16() if torch.is_autocast_enabled("cpu") else h


class DiceCompressor(MLPCompressor):
    def compress(self, x: Tensor, grid: Grid) -> Tensor:
        return F.dropout(super().compress(x, grid), 0.1, training=True)

    @property
    def needs_pca(self) -> bool:
        return False


class ForgetfulCompressor(MLPCompressor):
    """Its flag is an attribute, lost in an artifact."""

    _started = False

    @property
    def needs_pca(self) -> bool:
        return not self._started

    def init_from_pca(self, mean: Tensor, components: Tensor) -> None:
        super().init_from_pca(mean, components)
        self._started = True


class MeanlessCompressor(MLPCompressor):
    def init_from_pca(self, mean: Tensor, components: Tensor) -> None:
        super().init_from_pca(0 * mean, components)


class DetachedCompressor(MLPCompressor):
    def compress(self, x: Tensor, grid: Grid) -> Tensor:
        return super().compress(x.detach(), grid)


class StillCompressor(MLPCompressor):
    trainable = False


class CrampedCompressor(MLPCompressor):
    def compress(self, x: Tensor, grid: Grid) -> Tensor:
        return super().compress(x.reshape(-1, 16, self.dim), grid).reshape(*x.shape[:2], self.code_dim)


@pytest.mark.parametrize(
    ("compressor", "message"),
    [
        (NormedCompressor, "channel norm"),
        (RMSNormedCompressor, "channel norm"),
        (DeadWeightCompressor, "trainable parameters unused"),
        (MixingCompressor, "alone and in a batch"),
        (WrongShapeCompressor, "out_shape says"),
        (HalfCompressor, "codes under bfloat16 autocast"),
        (DiceCompressor, "called twice|of forward and of compress"),
        (ForgetfulCompressor, "the flag must live in the state_dict"),
        (MeanlessCompressor, "the start from PCA"),
        (DetachedCompressor, "no gradient reaches the features"),
        (StillCompressor, "says trainable = False"),
        (CrampedCompressor, r"the grid \(4, 5\) raises RuntimeError"),
    ],
)
def test_broken_compressors_fail(compressor: type[MLPCompressor], message: str) -> None:
    torch.manual_seed(0)
    with pytest.raises(AssertionError, match=f"{compressor.__name__}: .*({message})"):
        check_compressor(compressor())


def test_a_sound_compressor_passes_and_is_left_alone() -> None:
    compressor = MLPCompressor()
    check_compressor(compressor)
    assert compressor.needs_pca, "the check fitted the caller's compressor instead of a copy"
    check_compressor(compressor, (2, 6), seed=3)
