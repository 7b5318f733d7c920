"""Token-by-token inversion."""

from __future__ import annotations

import torch
from torch import Tensor

from srcflow.solvers.base import Solver
from srcflow.types import CausalBlock, Context, Solution


class Sequential(Solver):
    """Exact inversion, one token after another, with a key/value cache that lives in the call (arXiv 2412.06329, E8)."""

    def __call__(self, block: CausalBlock, z: Tensor, ctx: Context) -> Solution:
        """Invert one block. Iterations are N, residual 0, fallback False: nothing is approximated."""
        batch, tokens, _ = z.shape
        with torch.compiler.set_stance("force_eager"):  # a compiled layer would be compiled anew for every token
            state, params = block.start(ctx, batch, tokens, z.dtype)
            u = torch.empty_like(z, dtype=torch.promote_types(z.dtype, torch.float32))
            for i in range(tokens):
                u[:, i : i + 1] = block.coupling.inverse(z[:, i : i + 1], params)
                if i + 1 < tokens:
                    params = block.extend(u[:, i : i + 1], i, state)
        rows = z.new_zeros(batch, dtype=torch.float32)
        return Solution(u, torch.full((batch,), tokens, device=z.device), rows, torch.zeros(batch, dtype=torch.bool, device=z.device))
