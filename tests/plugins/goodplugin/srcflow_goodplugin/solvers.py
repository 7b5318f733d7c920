"""A solver that treats the blocks of a flow differently."""

from __future__ import annotations

import torch
from torch import Tensor

from srcflow.errors import ConfigError
from srcflow.solvers.base import Solver
from srcflow.solvers.sequential import Sequential
from srcflow.types import CausalBlock, Context, Solution


class ShallowSweeps(Solver):
    """Fixed-point sweeps over runs of tokens in every block but the deep one (on the noise side), which is inverted token by token.

    A run of m tokens is exact after m sweeps, so nothing is approximated.

    Args:
        run: tokens of a run.
    """

    def __init__(self, run: int = 4) -> None:
        if run < 1:
            raise ConfigError("solver.run", run, "a run has at least one token.")
        self.run = run

    def __call__(self, block: CausalBlock, z: Tensor, ctx: Context) -> Solution:
        """Invert one block."""
        if ctx.blocks > 1 and ctx.block == ctx.blocks - 1:
            return Sequential()(block, z, ctx)
        batch, tokens, _ = z.shape
        state, first = block.start(ctx, batch, tokens, z.dtype)
        u = torch.zeros_like(z)
        sweeps = 0
        for at in range(0, tokens, self.run):
            end = min(at + self.run, tokens)
            for _ in range(end - at):
                after = block.extend(u[:, at:end], at, state)
                u[:, at:end] = block.coupling.inverse(z[:, at:end], torch.cat([first, after[:, :-1]], 1))
                sweeps += 1
            first = block.extend(u[:, at:end], at, state)[:, -1:]
        rows = z.new_zeros(batch, dtype=torch.float32)
        return Solution(u, torch.full((batch,), sweeps, device=z.device), rows, torch.zeros(batch, dtype=torch.bool, device=z.device))
