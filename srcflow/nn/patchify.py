"""Images to tokens and back, and the token grid itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from einops import rearrange
from torch import Tensor

from srcflow.errors import ConfigError, ShapeError
from srcflow.types import Grid

Order = Literal["cpp", "ppc"]
"""Order of a token's numbers: channel, patch row, patch column (TARFlow), or patch row, patch column, channel (STARFlow, RAE)."""


_AXES = {"cpp": "c p q", "ppc": "p q c"}


def patchify(images: Tensor, patch_size: int, order: Order = "cpp") -> Tensor:
    """Cut images into square patches.

    Args:
        images: (B, C, H, W); H and W are multiples of `patch_size`.
        patch_size: side p of a patch.
        order: order of a token's C * p * p numbers: "cpp" (channel slowest) or "ppc" (channel fastest).

    Returns:
        (B, N, C * p * p) tokens in row-major order, N = (H / p) * (W / p).

    Raises:
        ShapeError: H or W is not a multiple of `patch_size`.
        ConfigError: there is no such order.
    """
    height, width = images.shape[-2:]
    p = patch_size
    if height % p or width % p:
        raise ShapeError(f"images of {height} x {width} pixels cannot be cut into patches of side patch_size = {p}; resize or crop them.")
    return rearrange(images, f"b c (h p) (w q) -> b (h w) ({_AXES[_checked(order)]})", p=p, q=p)


def unpatchify(tokens: Tensor, patch_size: int, grid: Grid, order: Order = "cpp") -> Tensor:
    """Put patches together again: the inverse of `patchify`.

    Args:
        tokens: (B, N, C * p * p) in row-major order.
        patch_size: side p of a patch.
        grid: (rows, columns), N = rows * columns.
        order: order of a token's numbers, as in `patchify`.

    Returns:
        (B, C, rows * p, columns * p) images.

    Raises:
        ShapeError: N or the width of the tokens does not fit the grid or the patch size.
        ConfigError: there is no such order.
    """
    n, width = tokens.shape[-2:]
    (rows, columns), p = grid, patch_size
    if n != rows * columns or width % (p * p):
        raise ShapeError(f"tokens (B, {n}, {width}) do not fill a grid of {rows} x {columns} patches of side patch_size = {p}.")
    return rearrange(tokens, f"b (h w) ({_AXES[_checked(order)]}) -> b c (h p) (w q)", h=rows, w=columns, p=p, q=p)


def pair(value: int | Sequence[int], key: str) -> tuple[int, int]:
    """(height, width) from one number (a square) or two.

    Raises:
        ConfigError: `value` is not one or two positive integers; `key` names it.
    """
    values = (value, value) if isinstance(value, int) else tuple(value)
    if len(values) != 2 or any(not isinstance(v, int) or isinstance(v, bool) or v < 1 for v in values):
        raise ConfigError(key, value, "is not a size.", "Write one positive integer for a square, or [height, width].")
    return values[0], values[1]


def _checked(order: str) -> str:
    if order not in ("cpp", "ppc"):
        raise ConfigError("order", order, "no such order of a token's numbers.", "Known: cpp, ppc.")
    return order
