"""Principal components, fitted by streaming statistics."""

from __future__ import annotations

import torch
from torch import Tensor

from srcflow.compressors._pca_start import check_pca, check_tokens, linear
from srcflow.compressors.base import Compressor
from srcflow.errors import ConfigError
from srcflow.types import Grid


class PCA(Compressor):
    """The leading principal components of the features; nothing to train.

    Args:
        dim: feature width D.
        code_dim: code width d, the number of components.

    Raises:
        ConfigError: `code_dim` is not between 1 and `dim`; or PCA is used before it was fitted.
    """

    trainable = False
    mean: Tensor
    components: Tensor
    fitted: Tensor

    def __init__(self, dim: int, code_dim: int = 32) -> None:
        super().__init__()
        if not 1 <= code_dim <= dim:
            raise ConfigError("compressor.code_dim", code_dim, f"must lie between 1 and compressor.dim = {dim}.")
        self.dim, self.code_dim = dim, code_dim
        self.register_buffer("mean", torch.zeros(dim), persistent=True)
        self.register_buffer("components", torch.zeros(code_dim, dim), persistent=True)
        self.register_buffer("fitted", torch.tensor(False), persistent=True)
        self._ready = False  # spares every call a look at the device

    @property
    def needs_pca(self) -> bool:
        """See `Compressor.needs_pca`."""
        return self.fitted.is_meta or not bool(self.fitted)

    @torch.no_grad()
    def init_from_pca(self, mean: Tensor, components: Tensor) -> None:
        """See `Compressor.init_from_pca`. Raises ShapeError if the shapes are not (D,) and (d, D)."""
        check_pca(mean, components, self.dim, self.code_dim)
        self.mean.copy_(mean)
        self.components.copy_(components)
        self.fitted.fill_(True)

    def compress(self, x: Tensor, grid: Grid) -> Tensor:
        """See `Compressor.compress`; at least float32."""
        self._check_fitted()
        check_tokens(x, self.dim, grid, "features")
        return linear(x - self.mean, self.components)

    def expand(self, codes: Tensor, grid: Grid) -> Tensor:
        """See `Compressor.expand`; at least float32."""
        self._check_fitted()
        check_tokens(codes, self.code_dim, grid, "codes")
        return linear(codes, self.components.T, self.mean)

    def _check_fitted(self) -> None:
        if not self._ready and self.needs_pca:
            raise ConfigError("compressor", "PCA", "has not been fitted.", "Train it with CompressorTask, or call init_from_pca.")
        self._ready = True
