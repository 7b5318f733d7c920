"""What a flow looks at in its blocks besides the protocol's methods: attributes that a block may have, and their defaults."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeGuard

from srcflow.conditioners.base import Field
from srcflow.errors import ConfigError
from srcflow.nn.permutation import Order
from srcflow.types import CausalBlock, Grid, ParallelBlock

Block = CausalBlock | ParallelBlock


def is_causal(block: Any) -> TypeGuard[CausalBlock]:
    """Whether a block follows the `CausalBlock` protocol."""
    return isinstance(block, CausalBlock)


def is_parallel(block: Any) -> TypeGuard[ParallelBlock]:
    """Whether a block follows the `ParallelBlock` protocol, and not `CausalBlock`."""
    return isinstance(block, ParallelBlock) and not isinstance(block, CausalBlock)


def order_of(block: Any) -> Order:
    """The order in which a block visits the tokens; raster unless it says otherwise."""
    order: Order = getattr(block, "order", "raster")
    return order


def fields_of(block: Any) -> tuple[Field, ...]:
    """The fields of the condition that a block (or denoiser) reads; none unless it has `fields`."""
    return tuple(getattr(block, "fields", ()))


def is_identity(block: Any) -> bool:
    """Whether a block changes nothing."""
    return bool(getattr(block, "identity", False))


def shape_of(blocks: Sequence[Any], channels: int | None, grid: Grid | None) -> tuple[int, Grid]:
    """Channels and grid of a flow.

    Args:
        blocks: its blocks; those that have `channels` or `grid` must agree.
        channels: what the flow was given; None: what the blocks say.
        grid: likewise.

    Raises:
        ConfigError: something that is not a block, blocks that disagree, or nobody says what the shape is.
    """
    for i, block in enumerate(blocks):
        if not (is_causal(block) or is_parallel(block)):
            why = "is neither a CausalBlock (coupling, params, start, extend) nor a ParallelBlock (forward, inverse)."
            raise ConfigError(f"flow.blocks[{i}]", type(block).__name__, why, "See srcflow.testing.check_block.")
    found: dict[str, Any] = {"channels": channels, "grid": None if grid is None else (int(grid[0]), int(grid[1]))}
    owner = dict.fromkeys(found, "the flow")
    for i, block in enumerate(blocks):
        for name in found:
            said = getattr(block, name, None)
            if said is None:
                continue
            said = tuple(said) if name == "grid" else said
            if found[name] is None:
                found[name], owner[name] = said, f"block {i}"
            elif found[name] != said:
                raise ConfigError(f"flow.blocks[{i}].{name}", said, f"{owner[name]} has {name} = {found[name]}.", "Make them equal.")
    for name, value in found.items():
        if value is None:
            raise ConfigError(f"flow.{name}", None, "none of the blocks says it.", f"Give Flow({name}=...).")
    return found["channels"], found["grid"]
