"""The order in which a block visits the tokens."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

Order = Literal["raster", "reverse"]


def permute(x: Tensor, order: Order) -> Tensor:
    """Tokens (B, N, ...) from raster order to a block's own order. Both orders are their own inverse, so this is the way back, too."""
    return x if order == "raster" else x.flip(1)
