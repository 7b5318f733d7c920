"""`perturb` moves every parameter, and leaves flows that can be inverted whatever the size of the noise."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from srcflow.compressors.semantic import Semantic
from srcflow.couplings.additive import Additive
from srcflow.flows import presets
from srcflow.flows.block import TransformerBlock
from srcflow.flows.flow import Flow
from srcflow.testing import perturb, perturbation
from srcflow.testing.expect import finite, normal
from srcflow.types import Condition, Context

FLOWS: dict[str, Callable[[], Flow]] = {
    "no norm before the head": lambda: presets.tarflow((2, 3), 12, 32, 3, 1, head_dim=16),
    "classes": lambda: presets.tarflow((2, 2), 12, 32, 2, [1, 2], num_classes=3, head_dim=16),
    "additive": lambda: presets.tarflow((2, 3), 3, 32, 3, 1, head_dim=16, volume_preserving=True),
    "text": lambda: presets.starflow((2, 2), 3, 64, [1, 0, 2], head_dim=32, text_dim=5),
    "class token, no clip": lambda: presets.srcflow((2, 2), 8, 64, [1, 2], num_classes=3, head_dim=32, condition="token", clip=0.0),
}


def trial(flow: Flow, rows: int, seed: int) -> tuple[Tensor, Condition | None]:
    condition = None
    if "labels" in flow.fields:
        condition = Condition(labels=torch.arange(rows) % (flow.num_classes + 1) - 1)
    if "text" in flow.fields:
        condition = Condition(text=normal(rows, 4, 5, seed=seed + 1))
    return normal(rows, flow.grid[0] * flow.grid[1], flow.channels, seed=seed), condition


@pytest.fixture(params=FLOWS, ids=str)
def flow(request: pytest.FixtureRequest) -> Flow:
    torch.manual_seed(0)
    return FLOWS[request.param]()


def test_every_parameter_moves_by_the_stated_amount() -> None:
    module = nn.Sequential(nn.Linear(50, 40), nn.LayerNorm(40))
    before = {k: v.clone() for k, v in module.state_dict().items()}
    assert perturb(module) is module
    moved = torch.cat([(v - before[k]).flatten() for k, v in module.state_dict().items()])
    assert bool((moved != 0).all())
    assert moved.std().item() == pytest.approx(0.05, rel=0.05)
    again = nn.Sequential(nn.Linear(50, 40), nn.LayerNorm(40))
    again.load_state_dict(before)
    torch.testing.assert_close(perturb(again).state_dict(), module.state_dict(), rtol=0, atol=0)


def test_modules_without_a_head_are_moved_by_noise_alone() -> None:
    module = Semantic(8, 2, width=32, layers=1, head_dim=16, grid=2)
    before = [p.clone() for p in module.parameters()]
    moved = torch.cat([(p - b).detach().flatten() for p, b in zip(perturb(module, 0.3).parameters(), before, strict=True)])
    assert moved.std().item() == pytest.approx(0.3, rel=0.05)


@pytest.mark.parametrize("std", [0.05, 0.1, 0.5])
@torch.no_grad()
def test_what_a_block_predicts_is_bounded_and_not_zero(flow: Flow, std: float) -> None:
    clips = [b.clip for b in flow.blocks]
    perturb(flow.double(), std)
    assert [b.clip for b in flow.blocks] == clips
    x, condition = trial(flow, 8, seed=40)
    for b in flow.blocks:
        if b.identity:
            continue
        b.clip = 0.0  # the bound is the head's own
        params = b.params(perturbation.TOKENS * x, Context(condition, flow.grid)).abs()
        scales = params[..., list(b.coupling.scale_rows), :]
        assert float(params.max()) < 2 * perturbation.SHIFT  # these are other tokens than those it was fitted on
        if not isinstance(b.coupling, Additive):
            assert 0.1 * perturbation.LOG_SCALE < float(scales.max()) < 2 * perturbation.LOG_SCALE
        assert bool((b.head.weight != 0).all())


@pytest.mark.parametrize("std", [0.05, 0.1, 0.5])
@torch.no_grad()
def test_perturbed_flows_are_inverted_in_float32(flow: Flow, std: float) -> None:
    """Noise of up to four deviations and more comes back to data of like size, and from there to itself."""
    perturb(flow, std)
    z, condition = trial(flow, 64, seed=50)
    z = 1.5 * z.float()
    if condition is not None and condition.text is not None:
        condition = Condition(text=condition.text.float())
    x = flow.inverse(z, condition)
    finite(x, flow, "the inverse of noise")
    assert float(x.abs().max()) < 10 * float(z.abs().max())
    assert float((x - z).abs().max()) > 0.3
    again = flow(x, condition)
    finite(again.logdet, flow, "the log-determinant of samples")
    assert float((again.z - z).abs().max()) < 1e-3


def test_bounds_leave_no_trace_of_the_precision(flow: Flow) -> None:
    double = perturb(copy.deepcopy(flow).double(), 0.2)
    single = perturb(flow, 0.2)
    for (name, p), q in zip(single.named_parameters(), double.parameters(), strict=True):
        torch.testing.assert_close(p.double(), q, atol=1e-6, rtol=1e-6, msg=name)


@torch.no_grad()
def test_a_block_on_its_own_is_bounded_too() -> None:
    source = FLOWS["class token, no clip"]().blocks[-1]
    assert isinstance(source, TransformerBlock)
    head = perturb(source, 0.5).head.weight
    assert float(head[: source.channels].norm(dim=1).max()) < 0.5  # noise alone: about 0.5 * sqrt(64) = 4
    assert float(head.abs().min()) > 0


def test_parameters_that_are_not_finite_are_named() -> None:
    flow = FLOWS["additive"]()
    with torch.no_grad():
        flow.blocks[1].proj_in.weight.fill_(float("inf"))
    with pytest.raises(AssertionError, match=r"TransformerBlock: the parameters of a perturbed block: .* not finite"):
        perturb(flow)
