"""What is recomputed in the backward pass: the same numbers bit for bit, from less that is kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from srcflow.flows import presets
from srcflow.flows.denoiser import Denoiser
from srcflow.flows.flow import Flow
from srcflow.flows.likelihood import normal_log_prob
from srcflow.flows.positions import Rotary
from srcflow.flows.trunk import recomputed
from srcflow.testing import perturb
from srcflow.types import Condition

BATCH, WIDTH, GRID = 3, 96, 8
FLOWS: dict[str, Callable[[], Flow]] = {
    "srcflow": lambda: presets.srcflow(grid=GRID, channels=4, width=WIDTH, layers=[1, 3], num_classes=3, head_dim=32),
    "starflow": lambda: presets.starflow(GRID, 4, WIDTH, [0, 1, 2], head_dim=32, num_classes=3),
    "tarflow": lambda: presets.tarflow(GRID, 4, WIDTH, 2, 2, num_classes=3, head_dim=32),
    "volume-preserving": lambda: presets.tarflow(GRID, 4, WIDTH, 2, 2, num_classes=3, head_dim=32, volume_preserving=True),
}
# (checkpoint_every, whether heads and couplings are recomputed); the first keeps everything
WAYS = [(0, False), (0, True), (1, False), (1, True), (2, True)]


@pytest.fixture(params=FLOWS, ids=str)
def flow(request: pytest.FixtureRequest) -> Flow:
    torch.manual_seed(0)
    return perturb(FLOWS[request.param]())


def inputs(flow: Flow, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Condition]:
    x = torch.randn(BATCH, GRID**2, flow.channels, generator=torch.Generator().manual_seed(1), dtype=dtype)
    return x, Condition(labels=torch.tensor([2, -1, 0]))


def kept(function: Callable[[], Any], flow: Flow) -> tuple[list[Tensor], Any]:
    """What autograd keeps of a call besides the flow's own tensors, a tensor for each storage; and the call's result."""
    own = {t.untyped_storage()._cdata for t in (*flow.parameters(), *flow.buffers())}
    found: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage()._cdata not in own:
            found[t.untyped_storage()._cdata] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = function()
    return list(found.values()), result


def size(tensors: list[Tensor]) -> int:
    return sum(t.untyped_storage().nbytes() for t in tensors)


@pytest.mark.parametrize("mixed", [False, True], ids=["float32", "bf16"])
def test_values_and_gradients_are_those_of_the_plain_way_bit_for_bit(flow: Flow, mixed: bool) -> None:
    x, condition = inputs(flow)
    seen: list[list[Tensor]] = []
    for every, heads in WAYS:
        flow.set_checkpointing(every, heads=heads)
        flow.zero_grad()
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            steps = flow.steps(leaf, condition)
            loss = -(normal_log_prob(steps.blocks[-1].z) + steps.logdet).mean() + 1e-2 * steps.blocks[0].z.square().mean()
        loss.backward()
        gradients = [p.grad for p in flow.parameters() if p.grad is not None]
        assert leaf.grad is not None
        seen.append([loss.detach(), leaf.grad, *gradients, *(o.params.detach() for o in steps.blocks)])
    for other in seen[1:]:
        assert len(other) == len(seen[0]) > 10
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))


def test_less_is_kept(flow: Flow) -> None:
    x, condition = inputs(flow)
    sizes: dict[tuple[int, bool], int] = {}
    for way in WAYS:
        flow.set_checkpointing(way[0], heads=way[1])
        sizes[way] = size(kept(lambda: flow(x, condition), flow)[0])
    assert sizes[0, False] > 1.4 * sizes[2, True] > 1.4 * 1.2 * sizes[1, True]
    # where the head begins with a norm, more than the layers' output was kept
    normed = any(p.numel() == WIDTH for k, p in flow.named_parameters() if "final_norm" in k)
    assert (sizes[0, False] > sizes[0, True]) or not normed
    assert (sizes[1, False] > 1.3 * sizes[1, True]) or not normed


def test_no_float32_copy_of_the_activations_is_kept_under_autocast() -> None:
    torch.manual_seed(0)
    flow = perturb(FLOWS["srcflow"]())
    x, condition = inputs(flow)

    def wide(heads: bool) -> list[Tensor]:
        flow.set_checkpointing(0, heads=heads)
        with torch.autocast("cpu", torch.bfloat16):
            tensors = kept(lambda: flow(x, condition), flow)[0]
        return [t for t in tensors if t.dtype == torch.float32 and t.numel() >= BATCH * GRID**2 * WIDTH]

    assert len(wide(False)) >= 2 * len(flow.blocks)  # before and after the scale of each head's norm
    assert not [t for t in wide(True) if t.shape[-1] == WIDTH]


def test_gradients_are_exact_in_float64() -> None:
    torch.manual_seed(0)
    flow = perturb(presets.srcflow(grid=2, channels=2, width=16, layers=[1, 1], num_classes=0, head_dim=8)).double()
    flow.set_checkpointing(1)
    x = torch.randn(2, 4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: flow(t), x)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("every", [0, 1])
def test_the_jacobian_can_be_taken_by_torch_func(every: int) -> None:
    torch.manual_seed(0)
    flow = perturb(presets.srcflow(grid=2, channels=2, width=16, layers=[1, 1], num_classes=0, head_dim=8)).double()
    flow.set_checkpointing(every)
    x = torch.randn(1, 4, 2, dtype=torch.float64)
    jacobian = torch.func.jacrev(lambda t: flow(t)[0])(x)
    assert torch.allclose(torch.linalg.slogdet(jacobian.reshape(8, 8)).logabsdet, flow(x)[1])


@pytest.mark.parametrize("every", [0, 1])
def test_the_score_can_be_taken_before_the_backward_pass(every: int) -> None:
    torch.manual_seed(0)
    blocks = presets.srcflow(grid=GRID, channels=4, width=WIDTH, layers=[1, 2], num_classes=0, head_dim=32).blocks
    flow = perturb(Flow(list(blocks), denoiser=Denoiser(4, WIDTH, Rotary((GRID, GRID)), 2, head_dim=32)))  # type: ignore[arg-type]
    found = []
    for heads in (False, True):
        flow.set_checkpointing(every, heads=heads)
        flow.zero_grad()
        x = inputs(flow)[0].requires_grad_()
        steps = flow.steps(x)
        density = normal_log_prob(steps.blocks[-1].z) + steps.logdet
        (score,) = torch.autograd.grad(density.sum(), x, retain_graph=True)
        error = (flow.denoiser(x.detach()) + score.detach()).square().mean()
        (error - density.mean()).backward()
        found.append([score, *(p.grad for p in flow.parameters() if p.grad is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_nothing_is_kept_without_gradients() -> None:
    calls = []

    def double(x: Tensor) -> Tensor:
        calls.append(1)
        return 2 * x

    with torch.no_grad():
        recomputed(double, torch.ones(2))
    assert len(calls) == 1
    x = torch.ones(2, requires_grad=True)
    recomputed(double, x).sum().backward()
    assert len(calls) >= 2  # forward, and not the result of the forward
