"""The contract of solvers: how a causal block is inverted."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from srcflow.guidance.base import Guidance
from srcflow.registry import Recorded
from srcflow.types import CausalBlock, Context, Solution


class Solver(metaclass=Recorded):
    """Finds u with z = block(u). Works in the block's own order; every cache and iterate belongs to the call."""

    @abstractmethod
    def __call__(self, block: CausalBlock, z: Tensor, ctx: Context, guidance: Guidance | None = None) -> Solution:
        """Invert one block.

        Args:
            block: the block.
            z: (B, N, d) noise-side tokens in the block's own order.
            ctx: condition, grid and attention temperature of the call.
            guidance: a rule to combine a positive and a negative stream, or None.

        Returns:
            u (B, N, d), iterations (B,), residual (B,) and fallback (B,).
        """
