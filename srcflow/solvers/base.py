"""The contract of solvers: how a causal block is inverted."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from srcflow.registry import Recorded
from srcflow.types import CausalBlock, Context, Solution


class Solver(metaclass=Recorded):
    """Finds u with z = block(u). Works in the block's own order; every cache and iterate belongs to the call.

    Guidance is inside the block (`guidance.guided.GuidedBlock`), so a solver need not know of it. A sample's result does not depend on the
    batch it is in.

    Attributes:
        tolerance: largest error of u that the solver promises, relative to max(1, largest |u|); None: that of rounding.
    """

    tolerance: float | None = None

    @abstractmethod
    def __call__(self, block: CausalBlock, z: Tensor, ctx: Context) -> Solution:
        """Invert one block.

        Args:
            block: the block.
            z: (B, N, d) noise-side tokens in the block's own order.
            ctx: condition, grid and attention temperature of the call; `ctx.block` is the block's position in its flow of `ctx.blocks`
                blocks, 0 on the data side.

        Returns:
            u (B, N, d), iterations (B,), residual (B,) and fallback (B,).
        """

    def check_blocks(self, blocks: int) -> None:
        """Refuse a flow of so many blocks, before anything is computed. Most solvers take any.

        Raises:
            ConfigError: the solver names blocks that the flow does not have.
        """
