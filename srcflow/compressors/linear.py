"""A linear compressor."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from srcflow.compressors._pca_start import Float32Linear, PCAStarted, Start, check_tokens
from srcflow.types import Grid


class Linear(PCAStarted):
    """One linear map per token and way, D -> d and d -> D, trained.

    Args:
        dim: feature width D.
        code_dim: code width d.
        start: "pca" starts as PCA exactly (the task fits it first), "random" from torch's own initialisation.
    """

    def __init__(self, dim: int, code_dim: int = 32, start: Start = "pca") -> None:
        super().__init__(dim, code_dim, start)
        self.enc = Float32Linear(dim, code_dim)
        self.dec = Float32Linear(code_dim, dim)

    def compress(self, x: Tensor, grid: Grid) -> Tensor:
        """See `Compressor.compress`; at least float32."""
        check_tokens(x, self.dim, grid, "features")
        return self.enc(x)  # type: ignore[no-any-return]  # torch is untyped here

    def expand(self, codes: Tensor, grid: Grid) -> Tensor:
        """See `Compressor.expand`; at least float32."""
        check_tokens(codes, self.code_dim, grid, "codes")
        return self.dec(codes)  # type: ignore[no-any-return]  # torch is untyped here

    def last_layer(self) -> nn.Parameter:
        """See `Compressor.last_layer`: the weight of the map d -> D."""
        return cast("nn.Parameter", self.dec.weight)

    @torch.no_grad()
    def _start(self, mean: Tensor, components: Tensor) -> None:
        self.enc.weight.copy_(components)
        self.enc.bias.copy_(-(components @ mean))
        self.dec.weight.copy_(components.T)
        self.dec.bias.copy_(mean)
