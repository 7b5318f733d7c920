"""The semantic representation compressor (SRC) of SRC-Flow (arXiv 2605.18267): transformers around a narrow code."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from srcflow.compressors._pca_start import Float32Linear, PCAStarted, Start, check_tokens, rounded_width, start_maps_from_pca
from srcflow.errors import ConfigError
from srcflow.nn.attention import Attention
from srcflow.nn.mlp import MLP
from srcflow.nn.patchify import pair
from srcflow.types import Grid


class Semantic(PCAStarted):
    """Two transformer halves with global attention over the tokens and linear maps D -> width -> d and back (E4).

    Pre-norm layers on a float32 residual stream, learned positions in each half (resampled bicubically for other grids), no norm on the
    codes. Depth and the use of global attention are the paper's; it does not state width, heads and positions, which are options here.

    Args:
        dim: feature width D.
        code_dim: code width d.
        width: width of the transformers; null: dim rounded up to a multiple of `head_dim`.
        layers: transformer layers in each half.
        head_dim: width of an attention head; divides `width`.
        grid: token grid of the position tables, one number or [rows, columns].
        mlp_ratio: inner width of the MLPs as a multiple of `width`.
        start: "pca" starts as PCA exactly (the task fits it first), with the residual branches and positions at zero; "random" from torch's
            own initialisation (the paper's).

    Raises:
        ConfigError: `head_dim` does not divide `width`, or `width` is less than `code_dim`.
    """

    def __init__(
        self,
        dim: int,
        code_dim: int = 32,
        width: int | None = None,
        layers: int = 4,
        head_dim: int = 64,
        grid: int | tuple[int, int] = 16,
        mlp_ratio: float = 4.0,
        start: Start = "pca",
    ) -> None:
        super().__init__(dim, code_dim, start)
        self.width = rounded_width(dim, width, code_dim, head_dim)
        if self.width % head_dim:
            raise ConfigError("compressor.width", self.width, f"must be a multiple of compressor.head_dim = {head_dim}.")
        if layers < 0:
            raise ConfigError("compressor.layers", layers, "a number of layers is not negative.")
        self.grid: Grid = pair(grid, "compressor.grid")
        hidden = round(mlp_ratio * self.width)
        self.enc = _Half(dim, self.width, code_dim, layers, head_dim, hidden, self.grid)
        self.dec = _Half(code_dim, self.width, dim, layers, head_dim, hidden, self.grid)

    def compress(self, x: Tensor, grid: Grid) -> Tensor:
        """See `Compressor.compress`; at least float32, under autocast too (the last linear map is computed in float32)."""
        check_tokens(x, self.dim, grid, "features")
        return self.enc(x, grid)  # type: ignore[no-any-return]  # torch is untyped here

    def expand(self, codes: Tensor, grid: Grid) -> Tensor:
        """See `Compressor.expand`; at least float32, as `compress`."""
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
    """Linear map in, positions, transformer layers, linear map out."""

    def __init__(self, in_dim: int, width: int, out_dim: int, layers: int, head_dim: int, hidden: int, grid: Grid) -> None:
        super().__init__()
        self.grid = grid
        self.first = nn.Linear(in_dim, width)
        self.positions = nn.Parameter(torch.empty(grid[0] * grid[1], width).normal_(std=0.02))
        self.layers = nn.ModuleList(_Layer(width, head_dim, hidden) for _ in range(layers))
        self.last = Float32Linear(width, out_dim)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        # the sum with the float32 table keeps the residual stream in float32 under autocast
        x = self.first(x) + self._positions(grid)
        for layer in self.layers:
            x = layer(x)
        return self.last(x)  # type: ignore[no-any-return]  # torch is untyped here

    def _positions(self, grid: Grid) -> Tensor:
        if tuple(grid) == self.grid:
            return self.positions
        table = self.positions.T.reshape(1, -1, *self.grid)
        table = table.to(torch.promote_types(table.dtype, torch.float32))
        return F.interpolate(table, size=tuple(grid), mode="bicubic", align_corners=False)[0].flatten(1).T

    @torch.no_grad()
    def close(self) -> None:
        """Set positions and the residual branches' last layers to zero: what is left is the two linear maps."""
        self.positions.zero_()
        for layer in self.layers:
            for name in ("attention.proj", "mlp.fc2"):
                for parameter in layer.get_submodule(name).parameters():
                    parameter.zero_()


class _Layer(nn.Module):
    """A pre-norm transformer layer with full attention."""

    def __init__(self, width: int, head_dim: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, head_dim, width // head_dim)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), causal=False)
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]  # torch is untyped here
