"""The way back through a flow, block by block: which blocks are guided, against what, and who inverts them."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from srcflow.errors import ConfigError
from srcflow.flows.traits import fields_of, is_causal, is_identity, is_parallel, order_of
from srcflow.guidance.base import Guidance
from srcflow.guidance.guided import GuidedBlock
from srcflow.nn.permutation import permute
from srcflow.solvers.base import Solver
from srcflow.types import CausalBlock, Condition, Context, Solution

if TYPE_CHECKING:
    from srcflow.flows.flow import Flow


class GuidanceWarning(UserWarning):
    """Guidance was asked for but cannot have an effect."""


def invert(flow: Flow, z: Tensor, ctx: Context, guidance: Guidance | None, solver: Solver) -> tuple[Tensor, list[Solution]]:
    """Undo every block.

    Args:
        flow: the flow.
        z: (B, N, d) noise in raster order, times the temperature.
        ctx: condition (resolved), grid and attention temperature.
        guidance: how to move away from a negative stream.
        solver: what inverts a causal block.

    Returns:
        what the first block's inversion gives, (B, N, d) in raster order, and a `Solution` per block in the block's own order, noise side
        first.
    """
    solver.check_blocks(len(flow.blocks))
    guided = guided_blocks(flow, guidance)
    negative = negative_condition(flow, guidance, z.shape[0]) if guidance is not None and guided else None
    x, solutions = z, []
    for k in reversed(range(len(flow.blocks))):
        own = flow.block(k)
        here = ctx.replace(block=k, blocks=len(flow.blocks))
        if is_parallel(own):
            solution = _direct(own.inverse(x, here), 1)
        elif is_identity(own) and k not in guided:
            solution = _direct(permute(x, order_of(own)), 0)
        else:
            block: CausalBlock = own  # type: ignore[assignment]  # the flow's constructor takes nothing else
            if guidance is not None and k in guided:
                other = None if guidance.negative.flow is None else negative_flow(flow, guidance)
                against: CausalBlock | None = None if other is None else other.block(k)  # type: ignore[assignment]  # see guided_blocks
                block = GuidedBlock(block, guidance, negative_block=against, negative_condition=negative)
            solution = solver(block, permute(x, order_of(own)), here)
        x = permute(solution.u, order_of(own))
        solutions.append(solution)
    return x, solutions


def _direct(u: Tensor, iterations: int) -> Solution:
    """The solution of a block that needs no solver."""
    rows = (u.shape[0],)
    count = torch.full(rows, iterations, dtype=torch.int64, device=u.device)
    return Solution(u, count, u.new_zeros(rows, dtype=torch.float32), torch.zeros(rows, dtype=torch.bool, device=u.device))


def shape(flow: Flow) -> tuple[Any, ...]:
    """Channels, grid and the order of every block: what two flows must share to be each other's negative."""
    return flow.channels, flow.grid, tuple(order_of(b) for b in flow.blocks)


def negative_flow(flow: Flow, guidance: Guidance) -> Flow:
    """The flow of the negative stream: the guidance's own, or `flow` itself.

    Raises:
        ConfigError: it is not a flow of the same shape.
    """
    other = guidance.negative.flow
    if other is None:
        return flow
    if not isinstance(other, type(flow)) or shape(other) != shape(flow):
        what = other if isinstance(other, str) else type(other).__name__
        raise ConfigError("guidance.negative.flow", what, "is not a Flow with the same blocks, orders, channels and grid.")
    return other


def guided_blocks(flow: Flow, guidance: Guidance | None) -> set[int]:
    """Positions of the blocks where the guided stream can differ from the positive one; warns if there is none.

    Raises:
        ConfigError: the negative flow does not fit, or a block that guidance names has no parameters to guide.
    """
    if guidance is None or guidance.strength.is_zero:
        return set()
    negative = guidance.negative
    blocks, against = list(flow.blocks), list(negative_flow(flow, guidance).blocks)
    conditioned = {i for i, b in enumerate(blocks) if fields_of(b)}
    if guidance.blocks == "all":
        chosen = {i for i, (b, o) in enumerate(zip(blocks, against, strict=True)) if not (is_identity(b) and is_identity(o))}
    elif guidance.blocks == "deep":
        chosen = {flow.deep}
    else:
        chosen = conditioned
    # elsewhere both streams are the same
    effective = chosen & conditioned if negative.flow is None and negative.attention_temperature == 1.0 else chosen
    if parallel := sorted(i for i in effective if not (is_causal(blocks[i]) and is_causal(against[i]))):
        names = ", ".join(f"{i} ({type(blocks[i]).__name__})" for i in parallel)
        why = f"block {names} is not causal, and guidance combines a causal block's parameters."
        raise ConfigError("guidance.blocks", guidance.blocks, why, "Choose other blocks, or sample without guidance.")
    if not effective:
        why = "no block sees a condition" if not flow.fields else "the blocks it names see no condition"
        warnings.warn(
            f"{guidance!r} has no effect: {why} and the negative stream differs in nothing else. "
            'Give negative an attention_temperature or a flow, or name other blocks ("all", "deep").',
            GuidanceWarning,
            stacklevel=5,
        )
    return effective


def negative_condition(flow: Flow, guidance: Guidance, batch: int) -> Condition | None:
    """The negative stream's condition, resolved by its own flow, for `batch` rows."""
    condition = guidance.negative.condition
    if condition is not None and len(condition) == 1 and batch != 1:
        condition = condition.index(torch.zeros(batch, dtype=torch.long))
    return negative_flow(flow, guidance).resolve(condition, batch)
