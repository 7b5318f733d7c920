"""A solver for each block."""

from __future__ import annotations

from torch import Tensor

from srcflow.errors import ConfigError
from srcflow.solvers.base import Solver
from srcflow.types import CausalBlock, Context, Solution


class PerBlock(Solver):
    """One solver for most blocks, and others for some.

    Args:
        default: inverts the blocks that `blocks` does not name.
        blocks: solvers by the block's position: 0, 1, ... from the data side, -1, -2, ... from the noise side.

    Raises:
        ConfigError: a position that is not an integer.

    >>> from srcflow.solvers.sequential import Sequential
    >>> PerBlock(Sequential(), {-1: Sequential()}).solver_of(3, 4) is not None
    True
    """

    def __init__(self, default: Solver, blocks: dict[int, Solver] | None = None) -> None:
        self.default = default
        self.blocks: dict[int, Solver] = {}
        for key, solver in (blocks or {}).items():  # the keys of JSON are strings
            try:
                self.blocks[int(key)] = solver
            except ValueError as e:
                raise ConfigError("solver.blocks", key, "is not the position of a block.", "Write 0, 1, ... or -1, -2, ...") from e

    @property
    def tolerance(self) -> float | None:  # type: ignore[override]  # follows from the parts
        """The largest of the parts' tolerances; None if none of them states one."""
        stated = [s.tolerance for s in (self.default, *self.blocks.values()) if s.tolerance is not None]
        return max(stated, default=None)

    def solver_of(self, block: int, blocks: int) -> Solver:
        """The solver of one of `blocks` blocks."""
        return self.blocks.get(block, self.blocks.get(block - blocks, self.default))

    def check_blocks(self, blocks: int) -> None:
        """Refuse positions outside the flow, and a block that is named twice.

        Raises:
            ConfigError: names them.
        """
        outside = [k for k in self.blocks if not -blocks <= k < blocks]
        if outside:
            raise ConfigError("solver.blocks", outside, f"the flow has {blocks} blocks.", f"Positions are {-blocks} .. {blocks - 1}.")
        twice = [k for k in self.blocks if k < 0 and k + blocks in self.blocks]
        if twice:
            raise ConfigError("solver.blocks", twice, f"name the same blocks as {[k + blocks for k in twice]}.", "Name each block once.")
        for solver in (self.default, *self.blocks.values()):
            solver.check_blocks(blocks)

    def __call__(self, block: CausalBlock, z: Tensor, ctx: Context) -> Solution:
        """Invert one block by its own solver; see `Solver.__call__`."""
        return self.solver_of(ctx.block, ctx.blocks)(block, z, ctx)
