"""The contract of compressors: normalised features to compact codes and back."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor, nn

from srcflow.registry import Recorded
from srcflow.types import Grid


class Compressor(nn.Module, metaclass=Recorded):
    """Features (B, N, D) <-> codes (B, N, d). The codes carry no channel norm: a LayerNorm would put them on a sphere.

    Attributes:
        dim: feature width D.
        code_dim: code width d.
        trainable: False for the members that are fitted by statistics or need no fitting at all.
    """

    dim: int
    code_dim: int
    trainable: bool = True

    @abstractmethod
    def compress(self, x: Tensor, grid: Grid) -> Tensor:
        """Codes (B, N, d) of normalised features (B, N, D) on a grid (rows, columns)."""

    @abstractmethod
    def expand(self, codes: Tensor, grid: Grid) -> Tensor:
        """Normalised features (B, N, D) of codes (B, N, d)."""

    def out_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """(N, d) of the codes for features of shape (N, D)."""
        return shape[0], self.code_dim

    def init_from_pca(self, mean: Tensor, components: Tensor) -> None:
        """Start from a principal component analysis: mean (D,), components (d, D) with orthonormal rows, largest variance first.

        A member that cannot start from PCA, or needs no start, leaves this as it is.
        """

    @property
    def needs_pca(self) -> bool:
        """Whether `init_from_pca` must be called before the first use (and has not been)."""
        return False

    def last_layer(self) -> nn.Parameter | None:
        """The parameter at which the adaptive weight of an adversarial loss compares gradient norms; None if nothing is trained."""
        return None

    def forward(self, x: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """(codes (B, N, d), reconstructed features (B, N, D)): one call for wrappers such as DDP that intercept `forward`."""
        codes = self.compress(x, grid)
        return codes, self.expand(codes, grid)
