"""A solver for each block, and what a flow reports of its solvers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from srcflow.errors import ConfigError
from srcflow.flows import presets
from srcflow.registry import build, spec_of
from srcflow.solvers.base import Solver
from srcflow.solvers.per_block import PerBlock
from srcflow.solvers.sequential import Sequential
from srcflow.testing import check_solver, perturb
from srcflow.types import CausalBlock, Context, Solution


class Marked(Sequential):
    """Notes which blocks it was given; marks its solutions."""

    def __init__(self, mark: int) -> None:
        self.mark = mark
        self.seen: list[tuple[int, int]] = []

    def __call__(self, block: CausalBlock, z: Tensor, ctx: Context) -> Solution:
        self.seen.append((ctx.block, ctx.blocks))
        solution = super().__call__(block, z, ctx)
        return solution._replace(residual=solution.residual + self.mark, fallback=~solution.fallback)


def flow() -> torch.nn.Module:
    return perturb(presets.starflow((2, 2), 3, 64, [1, 1, 1], head_dim=32)).double()


def test_the_contract_of_solvers_holds() -> None:
    check_solver(PerBlock(Sequential(), {-1: Sequential()}))


def test_blocks_are_counted_from_both_sides() -> None:
    model = flow()
    z = torch.randn(2, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    default, first, last = Marked(1), Marked(2), Marked(3)
    solved = model.solve(z, solver=PerBlock(default, {0: first, -1: last}))  # type: ignore[operator]  # a Flow
    assert (last.seen, default.seen, first.seen) == ([(2, 3)], [(1, 3)], [(0, 3)])
    assert [float(s.residual[0]) for s in solved.solutions] == [3, 1, 2]
    assert all(bool(s.fallback.all()) for s in solved.solutions)
    assert torch.equal(solved.x, model.inverse(z))  # type: ignore[operator]  # a Flow


@pytest.mark.parametrize(("blocks", "message"), [({3: Sequential()}, r"-3 \.\. 2"), ({-1: Sequential(), 2: Sequential()}, "same blocks")])
def test_positions_outside_the_flow_are_refused(blocks: dict[int, Solver], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        flow().inverse(torch.zeros(1, 4, 3, dtype=torch.float64), solver=PerBlock(Sequential(), blocks))  # type: ignore[operator]  # a Flow


def test_its_specification_has_the_positions() -> None:
    spec = spec_of(PerBlock(Sequential(), {-1: Sequential()}))
    again = build(spec, Solver)
    assert isinstance(again, PerBlock)
    assert list(again.blocks) == [-1]
    with pytest.raises(ConfigError, match="not the position"):
        PerBlock(Sequential(), {"deep": Sequential()})  # type: ignore[dict-item]  # on purpose


def test_the_tolerance_is_the_loosest_of_the_parts() -> None:
    class Loose(Sequential):
        tolerance = 1e-3

    assert PerBlock(Sequential(), {}).tolerance is None
    assert PerBlock(Sequential(), {1: Loose()}).tolerance == 1e-3
