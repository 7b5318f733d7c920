"""Parameters that look like trained ones: off zero, so that no contract holds vacuously, and bounded, so that every flow can be inverted.

Noise alone makes heads whose log-scale grows with the tokens that it reads, where no norm stands before the head (TARFlow). Inverting such
a block is a recursion x_i = z_i exp(a(x_<i)) + m(x_<i) that can grow doubly exponentially: it overflows, or not, depending on the last bits
of a matrix product, which differ between processors. So `perturb` keeps what a block predicts within `LOG_SCALE` and `SHIFT`.
"""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import nn

from srcflow.flows.block import TransformerBlock
from srcflow.testing.expect import finite, normal
from srcflow.types import Condition, Context

M = TypeVar("M", bound=nn.Module)

TOKENS = 3.0
"""Standard deviation of the tokens on which the bounds hold: three times that of the data and the noise that flows are made for."""
LOG_SCALE = 1.0
"""Bound of a perturbed block's log-scales on these tokens, in nats: scales between 1/e and e."""
SHIFT = 3.0
"""Bound of every other parameter, such as the shift, on these tokens: it stays below their own size."""
ROWS = 8  # of the trial: the null class and the first seven


def perturb(module: M, std: float = 0.05, seed: int = 0) -> M:
    """Add N(0, std^2) to every floating-point parameter of `module`, in place, and bound what its causal blocks predict.

    Fresh modules end in zeros, so contracts would hold for no good reason; a perturbed one looks like a trained one. The rows of a block's
    head that predict log-scales are then halved until every log-scale lies within `LOG_SCALE` on tokens N(0, `TOKENS`^2), before any soft
    clip, and the rows that predict shifts until every shift lies within `SHIFT`. Halving is exact: how the trial was rounded leaves no
    trace in the parameters.

    Args:
        module: the module to perturb; returned.
        std: standard deviation of what is added.
        seed: of the noise.

    Raises:
        AssertionError: a block predicts numbers that are not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            if p.is_floating_point():
                p.add_(torch.randn(p.shape, generator=generator, dtype=torch.float64).mul_(std).to(p.device, p.dtype))
        for block in module.modules():
            if isinstance(block, TransformerBlock) and not block.identity:
                _bound(block)
    return module


def _bound(block: TransformerBlock) -> None:
    """Halve the rows of the head that exceed their bound."""
    weight, p = block.head.weight, block.coupling.params_per_channel
    tokens = block.grid[0] * block.grid[1]
    u = TOKENS * normal(ROWS, tokens, block.channels, seed=0)
    clip, block.clip = block.clip, 0.0  # the bound holds before the clip, or the head could be of any size
    try:
        params = block.params(u.to(weight.device, weight.dtype), Context(_condition(block), block.grid))
    finally:
        block.clip = clip
    finite(params, block, "the parameters of a perturbed block")
    largest = params.double().abs().amax((0, 1, 3))  # one for each of the p parameters
    for row in range(p):
        bound = LOG_SCALE if row in block.coupling.scale_rows else SHIFT
        halvings = max(0, math.ceil(math.log2(max(float(largest[row]), bound) / bound)))
        for t in (weight, block.head.bias):
            t.view(p, block.channels, *t.shape[1:])[row].mul_(0.5**halvings)


def _condition(block: TransformerBlock) -> Condition | None:
    """A condition for the trial tokens: the null class and the first classes, and standard normal features, four to a text."""
    device, dtype = block.head.weight.device, block.head.weight.dtype
    values = {}
    for field in block.fields:
        if field.kind == "index":
            values[field.name] = (torch.arange(ROWS) % (field.size + 1) - 1).to(device)
        else:
            length = (4,) if field.kind == "sequence" else ()
            values[field.name] = normal(ROWS, *length, field.size, seed=1).to(device, dtype)
    return Condition(**values) if values else None
