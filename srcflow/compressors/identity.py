"""No compression."""

from __future__ import annotations

from torch import Tensor

from srcflow.compressors._pca_start import check_tokens
from srcflow.compressors.base import Compressor
from srcflow.types import Grid


class Identity(Compressor):
    """The codes are the features: for flows on raw features, and for pixels.

    Args:
        dim: feature width D, and code width.
    """

    trainable = False

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = self.code_dim = dim

    def compress(self, x: Tensor, grid: Grid) -> Tensor:
        """See `Compressor.compress`."""
        check_tokens(x, self.dim, grid, "features")
        return x

    def expand(self, codes: Tensor, grid: Grid) -> Tensor:
        """See `Compressor.expand`."""
        check_tokens(codes, self.code_dim, grid, "codes")
        return codes
