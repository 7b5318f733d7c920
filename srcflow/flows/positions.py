"""How a block tells its tokens' places apart."""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor, nn

from srcflow.errors import ConfigError, ShapeError
from srcflow.nn.permutation import Order, permute
from srcflow.nn.rope import angles
from srcflow.registry import Recorded
from srcflow.types import Grid


class Positions(nn.Module, metaclass=Recorded):
    """A block's positions: something added to the input (`table`), rotations of queries and keys (`rotation`), or both."""

    grid: Grid

    @abstractmethod
    def table(self, grid: Grid, order: Order) -> Tensor | None:
        """(1, N, width) to add to the tokens, in the block's own order, or None."""

    @abstractmethod
    def rotation(self, grid: Grid, prefix: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """cos and sin (prefix + N, head_dim / 2) per sequence slot, or None."""


class Learned(Positions):
    """TARFlow's table: one vector per image position; it is reversed along with the tokens (arXiv 2412.06329).

    Args:
        grid: (rows, columns); other grids are refused.
        width: width of the block.
    """

    def __init__(self, grid: Grid, width: int) -> None:
        super().__init__()
        self.grid = (grid[0], grid[1])
        self.weight = nn.Parameter(torch.randn(grid[0] * grid[1], width) * 1e-2)

    def table(self, grid: Grid, order: Order) -> Tensor:
        """See `Positions.table`."""
        if tuple(grid) != self.grid:
            raise ShapeError(
                f"learned positions were built for the grid {self.grid}, not {tuple(grid)}; use rotary positions for other sizes."
            )
        return permute(self.weight[None], order)

    def rotation(self, grid: Grid, prefix: int, head_dim: int, device: torch.device) -> None:
        """See `Positions.rotation`: none."""
        return


class Rotary(Positions):
    """STARFlow's two-dimensional rotary positions, by sequence slot: not reversed in reversed blocks (arXiv 2506.06276, E18).

    Args:
        grid: (rows, columns) that the model is built for; other grids are rescaled to its mean side.
        text_axis: reserve a third axis for text; set in every block of a model that takes text.
        side: mean side P that coordinates are rescaled to; None means that of `grid`.
    """

    def __init__(self, grid: Grid, text_axis: bool = False, side: float | None = None) -> None:
        super().__init__()
        self.grid = (grid[0], grid[1])
        self.text_axis = text_axis
        if side is not None and not side > 0:
            raise ConfigError("positions.side", side, "must be positive.", "Leave it out for the grid's own.")
        self.side = math.sqrt(grid[0] * grid[1]) if side is None else float(side)

    def table(self, grid: Grid, order: Order) -> None:
        """See `Positions.table`: none."""
        return

    def rotation(self, grid: Grid, prefix: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """See `Positions.rotation`."""
        exact = device if device.type != "mps" else torch.device("cpu")  # Metal has no float64
        a = angles(head_dim, self.side, grid, prefix, self.text_axis, exact)
        cos, sin = a.cos(), a.sin()
        return (cos, sin) if exact == device else (cos.float().to(device), sin.float().to(device))
