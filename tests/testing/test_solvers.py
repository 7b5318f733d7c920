"""check_solver and check_block pass sound members and fail each broken one for the reason that is broken."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from srcflow.couplings.affine import Affine
from srcflow.guidance.base import Negative
from srcflow.guidance.guided import GuidedBlock
from srcflow.solvers.sequential import Sequential
from srcflow.testing import (
    ReferenceBlock,
    check_block,
    check_solver,
)
from srcflow.types import CausalBlock, Context, Solution


class LateSolver(Sequential):
    """Stops a token early."""

    def __call__(self, block: CausalBlock, z: Tensor, ctx: Context) -> Solution:
        solution = super().__call__(block, z, ctx)
        solution.u[:, -1] = z[:, -1]
        return solution


class RememberingSolver(Sequential):
    """Keeps its first solution and hands it out again."""

    def __init__(self) -> None:
        self._last: list[Solution] = []

    def __call__(self, block: CausalBlock, z: Tensor, ctx: Context) -> Solution:
        self._last.append(super().__call__(block, z, ctx))
        return self._last[-1]


class BatchSolver(Sequential):
    """Exact on the batch of the round trip, but what a row becomes depends on how many others there are."""

    def __call__(self, block: CausalBlock, z: Tensor, ctx: Context) -> Solution:
        solution = super().__call__(block, z, ctx)
        return solution._replace(u=solution.u + 1e-6 * (3 - z.shape[0]))


class UnguidedSolver(Sequential):
    """Inverts the positive stream's block alone."""

    def __call__(self, block: CausalBlock, z: Tensor, ctx: Context) -> Solution:
        return super().__call__(block.block if isinstance(block, GuidedBlock) else block, z, ctx)


class NullOnlySolver(Sequential):
    """Ignores the rule's own negative condition."""

    def __call__(self, block: CausalBlock, z: Tensor, ctx: Context) -> Solution:
        if isinstance(block, GuidedBlock):
            guidance = copy.copy(block.guidance)
            guidance.negative = Negative(attention_temperature=guidance.negative.attention_temperature)
            block = GuidedBlock(block.block, guidance)
        return super().__call__(block, z, ctx)


class CoolSolver(Sequential):
    """Ignores the attention temperature."""

    def __call__(self, block: CausalBlock, z: Tensor, ctx: Context) -> Solution:
        return super().__call__(block, z, replace(ctx, attention_temperature=1.0))


class NarrowSolver(Sequential):
    def __call__(self, block: CausalBlock, z: Tensor, ctx: Context) -> Solution:
        solution = super().__call__(block, z.float(), ctx)
        return solution._replace(u=solution.u.to(z.dtype))


class VagueSolver(Sequential):
    def __call__(self, block: CausalBlock, z: Tensor, ctx: Context) -> Solution:
        solution = super().__call__(block, z, ctx)
        return solution._replace(fallback=solution.residual)


@pytest.mark.parametrize(
    ("solver", "message"),
    [
        (LateSolver(), "u and what the block made z from, in torch.float64"),
        (RememberingSolver(), "leave state behind in the solver._last"),
        (BatchSolver(), "a row alone and in a batch"),
        (UnguidedSolver(), "guidance by attention temperature changes nothing"),
        (NullOnlySolver(), "guidance by negative condition"),
        (CoolSolver(), "an attention temperature"),
        (NarrowSolver(), "float64"),
        (VagueSolver(), "fallback is torch.float32"),
    ],
)
def test_broken_solvers_fail(solver: Sequential, message: str) -> None:
    with pytest.raises(AssertionError, match=f"{type(solver).__name__}: .*{message}"):
        check_solver(solver)


def test_a_sound_solver_passes_on_any_coupling() -> None:
    check_solver(Sequential())
    check_solver(Sequential(), ReferenceBlock(ViewlessCoupling(), dim=2), shape=(2, 4, 2))


class ViewlessCoupling(Affine):
    """No affine view: check_solver leaves the guided trials out."""

    def affine(self, params: Tensor) -> None:  # type: ignore[override]
        return None


class AcausalBlock(ReferenceBlock):
    def params(self, u: Tensor, ctx: Context) -> Tensor:
        return super().params(u, ctx) + 0.01 * u.mean((1, 2))[:, None, None, None]


class StaleBlock(ReferenceBlock):
    """Adds to its cache instead of overwriting."""

    def extend(self, u_new: Tensor, at: int, state: Any) -> Tensor:
        old = state.values[:, at : at + u_new.shape[1]]
        out = super().extend(u_new, at, state)
        state.values[:, at : at + u_new.shape[1]] += old
        return out if not bool(old.any()) else out + 0.01


class SlowBlock(ReferenceBlock):
    """Sees the tokens up to i - 2 only."""

    def params(self, u: Tensor, ctx: Context) -> Tensor:
        full = super().params(u, ctx)
        return torch.cat([full[:, :1], full[:, :-1]], dim=1)


class CrookedStartBlock(ReferenceBlock):
    def start(self, ctx: Context, batch: int, tokens: int, dtype: torch.dtype) -> tuple[Any, Tensor]:
        state, first = super().start(ctx, batch, tokens, dtype)
        return state, first + 0.01 * tokens

    def params(self, u: Tensor, ctx: Context) -> Tensor:
        state, first = super().start(ctx, u.shape[0], u.shape[1], u.dtype)
        return torch.cat([first, self.extend(u, 0, state)[:, :-1]], dim=1)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (AcausalBlock(), "is not causal"),
        (StaleBlock(), "overwritten|includes the last token"),
        (SlowBlock(), "no influence on the next"),
        (CrookedStartBlock(), "start's parameters"),
        (nn.Linear(2, 2), "lacks one of coupling"),
    ],
)
def test_broken_blocks_fail(block: nn.Module, message: str) -> None:
    with pytest.raises(AssertionError, match=f"{type(block).__name__}: .*({message})"):
        check_block(block)


def test_a_broken_block_is_not_blamed_on_the_solver() -> None:
    with pytest.raises(AssertionError, match="AcausalBlock: is not causal"):
        check_solver(Sequential(), AcausalBlock())
