"""Flows of blocks that are not TransformerBlocks: the reference block of the contracts, parallel blocks, identities."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from srcflow.conditioners.class_table import ClassTable
from srcflow.couplings.additive import Additive
from srcflow.couplings.affine import Affine
from srcflow.couplings.softplus_affine import SoftplusAffine
from srcflow.errors import ConfigError
from srcflow.flows.block import TransformerBlock
from srcflow.flows.flow import Flow
from srcflow.flows.positions import Learned, Rotary
from srcflow.flows.split_block import SplitBlock
from srcflow.guidance.base import Negative
from srcflow.guidance.linear import Linear
from srcflow.testing import ReferenceBlock, check_block, perturb
from srcflow.types import Condition, Context

GRID = (2, 3)


def split(swap: bool = False, **changes: object) -> SplitBlock:
    arguments: dict[str, object] = {"coupling": SoftplusAffine(), "head_dim": 8, **changes}
    return SplitBlock(3, 16, 1, Rotary(GRID), swap=swap, **arguments)  # type: ignore[arg-type]  # as its arguments are


def tokens(batch: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(batch, 6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def mixed() -> Flow:
    blocks: list[nn.Module] = [
        ReferenceBlock(dim=3, classes=4),
        split(),
        TransformerBlock(3, 16, 1, Rotary(GRID), Affine(), head_dim=8, order="reverse"),
        split(swap=True, conditioner=ClassTable(4, 16)),
        TransformerBlock(3, 16, 0, Learned(GRID, 16), Affine(), head_dim=8, order="reverse"),
    ]
    return perturb(Flow(blocks)).double()


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("coupling", [Affine(), SoftplusAffine(), Additive()], ids=lambda c: type(c).__name__)
def test_split_blocks_pass_the_contract(swap: bool, coupling: object) -> None:
    check_block(
        split(swap, coupling=coupling, conditioner=ClassTable(4, 16)), condition=Condition(labels=torch.tensor([0, 3, -1])), grid=GRID
    )


class Crooked(SplitBlock):
    """Its log-determinant is half of what it should be."""

    def forward(self, x: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        z, logdet = super().forward(x, ctx)
        return z, logdet / 2


class OneWay(SplitBlock):
    """Its inverse is its forward."""

    def inverse(self, z: Tensor, ctx: Context) -> Tensor:
        return self.forward(z, ctx)[0]


@pytest.mark.parametrize(("kind", "message"), [(Crooked, "autograd"), (OneWay, "inverse of forward")])
def test_broken_parallel_blocks_fail_the_contract(kind: type[SplitBlock], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_block(kind(3, 16, 1, Rotary(GRID), SoftplusAffine(), head_dim=8), grid=GRID)


def test_a_flow_of_mixed_blocks_is_exact_both_ways() -> None:
    flow, x = mixed(), tokens()
    condition = Condition(labels=torch.tensor([1, -1]))
    out = flow(x, condition)
    solved = flow.solve(out.z, condition)
    torch.testing.assert_close(solved.x, x, atol=1e-9, rtol=0)
    assert [s.iterations.tolist() for s in solved.solutions] == [[0, 0], [1, 1], [6, 6], [1, 1], [6, 6]]
    one = Condition(labels=torch.tensor([1]))
    jacobian = torch.autograd.functional.jacobian(lambda v: flow(v.reshape(1, 6, 3), one).z.reshape(-1), x[:1].reshape(-1))
    torch.testing.assert_close(out.logdet[0], torch.linalg.slogdet(jacobian).logabsdet, atol=1e-9, rtol=0)
    assert not torch.allclose(flow(x).z, out.z)
    expected = torch.stack([flow.log_prob(x, Condition(labels=torch.full((2,), y))) for y in range(4)], 1)
    torch.testing.assert_close(flow.class_log_probs(x), expected, atol=1e-10, rtol=0)
    for a, b in zip(
        flow.blocks_inverse(out.z, condition), reversed([x, *[o.z for o in flow.blocks_forward(x, condition)[:-1]]]), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=0)


def test_gradients_reach_every_block_of_a_mixed_flow() -> None:
    flow = mixed()
    flow.log_prob(tokens(), Condition(labels=torch.tensor([1, -1]))).sum().backward()
    assert [n for n, p in flow.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_guidance_acts_on_causal_blocks_and_refuses_parallel_ones() -> None:
    flow, z = mixed(), tokens(seed=1)
    condition = Condition(labels=torch.tensor([1, 2]))
    with pytest.raises(ConfigError, match=r"block 3 \(SplitBlock\) is not causal"):
        flow.inverse(z, condition, guidance=Linear(1.0))
    blocks: list[nn.Module] = [ReferenceBlock(dim=3, classes=4), split()]
    model = perturb(Flow(blocks)).double()
    assert not torch.allclose(model.inverse(z, condition, guidance=Linear(1.0)), model.inverse(z, condition))
    with pytest.raises(ConfigError, match="SplitBlock"):
        model.inverse(z, condition, guidance=Linear(1.0, negative=Negative(attention_temperature=2.0)))


def test_what_is_not_a_block_is_refused() -> None:
    with pytest.raises(ConfigError, match="neither a CausalBlock"):
        Flow([nn.Linear(2, 2)])
    with pytest.raises(ConfigError, match=r"flow\.grid = None: none of the blocks says it"):
        Flow([ReferenceBlock(dim=3)])
    with pytest.raises(ConfigError, match=r"blocks\[1\]\.channels = 2: block 0 has channels = 3"):
        Flow([split(), ReferenceBlock(dim=2)])
    with pytest.raises(ConfigError, match=r"the flow has grid = \(1, 6\)"):
        Flow([split()], grid=(1, 6))
    flow = Flow([ReferenceBlock(dim=3)], grid=GRID).double()
    assert flow.prior_std.shape == (6, 3)
    torch.testing.assert_close(flow.inverse(flow(tokens()).z), tokens(), atol=1e-8, rtol=0)


def test_identity_blocks_are_not_solved() -> None:
    class Refusing(ReferenceBlock):
        identity = True

        def start(self, *args: object, **kwargs: object) -> tuple[object, Tensor]:
            raise RuntimeError("solved")

    flow = Flow([Refusing(dim=3)], grid=GRID)
    z = tokens().float()
    solved = flow.solve(z)
    assert torch.equal(solved.x, z)
    assert solved.solutions[0].iterations.tolist() == [0, 0]
