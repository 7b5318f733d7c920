"""The transformer decoder of a representation autoencoder: tokens to pixels (RAE, arXiv 2510.11690)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from srcflow.errors import ConfigError, ShapeError
from srcflow.nn.attention import favourable_kernel
from srcflow.nn.patchify import pair, unpatchify
from srcflow.registry import Recorded, preset
from srcflow.types import Grid


class ViTDecoder(nn.Module, metaclass=Recorded):
    """A ViT of pre-norm layers with a class token and fixed sin-cos positions; its head predicts the pixels of each token's patch.

    Args:
        latent_dim: width of the tokens it decodes (the encoder's dim).
        dim: width of the transformer, a multiple of 4 and of `heads`.
        depth: layers.
        heads: attention heads.
        mlp_dim: inner width of the MLPs.
        patch: side p of a token's patch of output pixels.
        grid: token grid it decodes at, one number or [rows, columns]. The output has grid * patch pixels.
        channels: of the images.
        norm_eps: epsilon of every LayerNorm.
        qkv_bias: whether queries, keys and values have a bias (the other linear layers always have one).

    Raises:
        ConfigError: `dim` is not a multiple of 4 and of `heads`.
    """

    def __init__(
        self,
        latent_dim: int,
        dim: int,
        depth: int,
        heads: int,
        mlp_dim: int,
        patch: int = 16,
        grid: int | tuple[int, int] = 16,
        channels: int = 3,
        norm_eps: float = 1e-12,
        qkv_bias: bool = True,
    ) -> None:
        super().__init__()
        from timm.models.vision_transformer import Block

        if dim % 4 or dim % heads:
            raise ConfigError("decoder.dim", dim, f"must be a multiple of 4 (sin-cos positions) and of decoder.heads = {heads}.")
        self.latent_dim, self.dim, self.depth, self.heads, self.mlp_dim = latent_dim, dim, depth, heads, mlp_dim
        self.patch, self.channels, self.norm_eps, self.qkv_bias = patch, channels, norm_eps, qkv_bias
        self.grid: Grid = pair(grid, "decoder.grid")
        norm: Any = partial(nn.LayerNorm, eps=norm_eps)
        self.embed = nn.Linear(latent_dim, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        # in the state, because published checkpoints may hold a table that is no longer sin-cos
        self.register_buffer("pos_embed", sincos_table(dim, self.grid), persistent=True)
        self.blocks = nn.ModuleList(
            # the half guards int(dim * ratio) against rounding down
            Block(dim, heads, mlp_ratio=(mlp_dim + 0.5) / dim, qkv_bias=qkv_bias, norm_layer=norm)
            for _ in range(depth)
        )
        self.norm = norm(dim)
        self.head = nn.Linear(dim, patch * patch * channels)
        with torch.no_grad():  # a fresh head draws grey: channels that start apart stay noisy where images have no colour
            for t in (self.head.weight, self.head.bias):
                by_channel = t.unflatten(0, (patch * patch, channels))  # type: ignore[no-untyped-call]  # torch is untyped here
                by_channel.copy_(by_channel[:, :1].expand_as(by_channel).clone())

    pos_embed: Tensor

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the decoded images."""
        return self.grid[0] * self.patch, self.grid[1] * self.patch

    def forward(self, tokens: Tensor, grid: Grid | None = None) -> Tensor:
        """Predicted patches (E3).

        Args:
            tokens: (B, n, latent_dim), row-major.
            grid: their grid (rows, columns). If it is not the decoder's own, the embedded tokens are resampled bilinearly. None: the
                decoder's own, or a square if n is another number.

        Returns:
            (B, N0, p * p * C) patches on the decoder's own grid, channel fastest, in the encoder's normalised image units.

        Raises:
            ShapeError: the tokens do not fill the grid, or have another width.
        """
        b, n, width = tokens.shape
        if width != self.latent_dim:
            raise ShapeError(f"tokens of width {width} were given to a decoder with latent_dim = {self.latent_dim}.")
        rows, columns = self._source(n) if grid is None else grid
        if rows * columns != n:
            raise ShapeError(f"{n} tokens do not fill a grid of {rows} x {columns}.")
        x = self.embed(tokens)
        if (rows, columns) != self.grid:
            x = x.transpose(1, 2).reshape(b, self.dim, rows, columns)
            x = F.interpolate(x, size=self.grid, mode="bilinear", align_corners=False)
            x = x.flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.to(x.dtype).expand(b, -1, -1), x], dim=1) + self.pos_embed
        with favourable_kernel(x, x.shape[1]):
            for block in self.blocks:
                x = block(x)
        return self.head(self.norm(x))[:, 1:]  # type: ignore[no-any-return]  # torch is untyped here

    def unpatchify(self, patches: Tensor) -> Tensor:
        """Images (B, C, H, W) in the encoder's normalised units from `forward`'s patches (B, N0, p * p * C)."""
        return unpatchify(patches, self.patch, self.grid, order="ppc")

    def _source(self, n: int) -> Grid:
        if n == self.grid[0] * self.grid[1]:
            return self.grid
        side = round(n**0.5)
        if side * side != n:
            raise ShapeError(f"{n} tokens are not a square, and the decoder's own grid is {self.grid}; pass their grid.")
        return side, side


def sincos_table(dim: int, grid: Grid) -> Tensor:
    """Fixed positions (1, 1 + rows * columns, dim), the first row (class token) zero.

    Half of the channels encode the column, then half the row; in each half all sines, then all cosines, of the integer position times
    10000^(-k / (dim / 4)), k = 0 ... dim / 4 - 1. Computed in float64 and rounded to float32.
    """
    rows, columns = grid
    k = torch.arange(dim // 4, dtype=torch.float64)
    frequency = 10000.0 ** (-k / (dim / 4))

    def encode(position: Tensor) -> Tensor:
        angle = position[:, None] * frequency
        return torch.cat([angle.sin(), angle.cos()], dim=1)

    column = encode(torch.arange(columns, dtype=torch.float64)).expand(rows, columns, dim // 2)
    row = encode(torch.arange(rows, dtype=torch.float64))[:, None].expand(rows, columns, dim // 2)
    table = torch.cat([column, row], dim=-1).reshape(rows * columns, dim)
    return torch.cat([torch.zeros(1, dim, dtype=torch.float64), table])[None].to(torch.float32)


@preset
def vit_b(latent_dim: int, patch: int = 16, grid: int | tuple[int, int] = 16) -> ViTDecoder:
    """RAE's ViT-B decoder: width 768, 12 layers, 12 heads.

    Args:
        latent_dim: width of the tokens it decodes.
        patch: side of a token's patch of output pixels.
        grid: token grid it decodes at.
    """
    return ViTDecoder(latent_dim, dim=768, depth=12, heads=12, mlp_dim=3072, patch=patch, grid=grid)


@preset
def vit_l(latent_dim: int, patch: int = 16, grid: int | tuple[int, int] = 16) -> ViTDecoder:
    """RAE's ViT-L decoder: width 1024, 24 layers, 16 heads.

    Args:
        latent_dim: width of the tokens it decodes.
        patch: side of a token's patch of output pixels.
        grid: token grid it decodes at.
    """
    return ViTDecoder(latent_dim, dim=1024, depth=24, heads=16, mlp_dim=4096, patch=patch, grid=grid)


@preset
def vit_xl(latent_dim: int, patch: int = 16, grid: int | tuple[int, int] = 16) -> ViTDecoder:
    """RAE's released ViT-XL decoder: width 1152, 28 layers, 16 heads of 72.

    Args:
        latent_dim: width of the tokens it decodes.
        patch: side of a token's patch of output pixels.
        grid: token grid it decodes at.
    """
    return ViTDecoder(latent_dim, dim=1152, depth=28, heads=16, mlp_dim=4096, patch=patch, grid=grid)
