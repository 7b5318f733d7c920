"""A convolutional compressor."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from srcflow.compressors._pca_start import Float32Linear, PCAStarted, Start, check_tokens, rounded_width, start_maps_from_pca
from srcflow.errors import ConfigError
from srcflow.types import Grid


class Conv(PCAStarted):
    """Residual convolutions on the token grid between the maps D -> width -> d, and back: sees a neighbourhood, not the image.

    Args:
        dim: feature width D.
        code_dim: code width d.
        width: channels of the convolutions; null: dim rounded up to a multiple of 64.
        layers: residual blocks in each half.
        kernel: side of the convolutions, odd.
        start: "pca" starts as PCA exactly (the task fits it first), with the residual branches at zero; "random" from torch's own
            initialisation.
    """

    def __init__(
        self, dim: int, code_dim: int = 32, width: int | None = None, layers: int = 4, kernel: int = 3, start: Start = "pca"
    ) -> None:
        super().__init__(dim, code_dim, start)
        if kernel < 1 or kernel % 2 == 0:
            raise ConfigError("compressor.kernel", kernel, "must be odd, so that the grid keeps its size.")
        if layers < 0:
            raise ConfigError("compressor.layers", layers, "a number of layers is not negative.")
        self.width = rounded_width(dim, width, code_dim)
        self.enc = _Half(dim, self.width, code_dim, layers, kernel)
        self.dec = _Half(code_dim, self.width, dim, layers, kernel)

    def compress(self, x: Tensor, grid: Grid) -> Tensor:
        """See `Compressor.compress`; at least float32."""
        check_tokens(x, self.dim, grid, "features")
        return self.enc(x, grid)  # type: ignore[no-any-return]  # torch is untyped here

    def expand(self, codes: Tensor, grid: Grid) -> Tensor:
        """See `Compressor.expand`; at least float32."""
        check_tokens(codes, self.code_dim, grid, "codes")
        return self.dec(codes, grid)  # type: ignore[no-any-return]  # torch is untyped here

    def last_layer(self) -> nn.Parameter:
        """See `Compressor.last_layer`: the weight of the decoding half's last linear map."""
        return cast("nn.Parameter", self.dec.last.weight)

    def _start(self, mean: Tensor, components: Tensor) -> None:
        start_maps_from_pca(self.enc.first, self.enc.last, self.dec.first, self.dec.last, mean, components)
        self.enc.close()
        self.dec.close()


class _Half(nn.Module):
    def __init__(self, in_dim: int, width: int, out_dim: int, layers: int, kernel: int) -> None:
        super().__init__()
        self.first = nn.Linear(in_dim, width)
        self.blocks = nn.ModuleList(_Block(width, kernel) for _ in range(layers))
        self.last = Float32Linear(width, out_dim)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        x = self.first(x)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        for block in self.blocks:
            x = x + block(x, grid)
        return self.last(x)  # type: ignore[no-any-return]  # torch is untyped here

    @torch.no_grad()
    def close(self) -> None:
        """Set the residual branches' last layers to zero: what is left is the two linear maps."""
        for block in self.blocks:
            for parameter in block.get_submodule("conv2").parameters():
                parameter.zero_()


class _Block(nn.Module):
    """The residual branch: norm, convolution, GELU, convolution."""

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.conv1 = nn.Conv2d(width, width, kernel, padding=kernel // 2)
        self.conv2 = nn.Conv2d(width, width, kernel, padding=kernel // 2)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        maps = self.norm(x).transpose(1, 2).unflatten(2, tuple(grid))
        return self.conv2(F.gelu(self.conv1(maps))).flatten(2).transpose(1, 2)  # type: ignore[no-any-return]  # torch is untyped here
