"""Memory that a step is said to need, against what PyTorch really keeps, allocates and stores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from srcflow.autoencoders.pixels import PixelPatches
from srcflow.compressors.identity import Identity
from srcflow.flows import presets
from srcflow.flows.denoiser import Denoiser
from srcflow.flows.flow import Flow
from srcflow.flows.positions import Rotary
from srcflow.noise import Constant
from srcflow.plan.memory import largest_wraps, lasting, nbytes, passing
from srcflow.plan.step import Stage
from srcflow.tasks.autoencoder import AutoencoderTask
from srcflow.tasks.flow import FlowTask

BATCH = 4


def denoised() -> Flow:
    """A flow with a learnable denoiser, whose training takes the score and goes backward through the flow a second time."""
    base = presets.srcflow(grid=8, channels=8, width=64, layers=[1, 2], num_classes=0, head_dim=32)
    return Flow(list(base.blocks), denoiser=Denoiser(8, 64, Rotary((8, 8)), 2, head_dim=32))


FLOWS: dict[str, Callable[[], Flow]] = {
    "srcflow": lambda: presets.srcflow(grid=12, channels=8, width=128, layers=[2, 2, 4], num_classes=10, head_dim=32),
    "gated": lambda: presets.srcflow(grid=12, channels=16, width=128, layers=[1, 3], num_classes=0, head_dim=64, mlp="gated", qk_norm=True),
    "tarflow": lambda: presets.tarflow(12, 24, 96, blocks=3, layers=2, num_classes=5, head_dim=32),
    "denoised": denoised,
}


def task_of(make: Callable[[], Flow], every: int = 0, device: str = "meta") -> FlowTask:
    with torch.device(device):
        return FlowTask(make(), codec="nowhere", noise=Constant(0.4), checkpoint_every=every)


def kept(function: Callable[[], Any], known: list[Tensor]) -> tuple[int, Any]:
    """Bytes that autograd keeps of what `function` computes, each storage once, `known` tensors not; and its result."""
    found: dict[int, torch.UntypedStorage] = {}
    own = {t.untyped_storage()._cdata for t in known}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage._cdata not in own:
            found[storage._cdata] = storage
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = function()
    return sum(s.nbytes() for s in found.values()), result


@pytest.mark.parametrize("mixed", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("every", [0, 1, 2])
@pytest.mark.parametrize("name", ["srcflow", "gated", "tarflow"])
def test_activations_are_what_autograd_keeps(name: str, every: int, mixed: bool) -> None:
    planned = passing(Stage(task_of(FLOWS[name], every)), BATCH, mixed=mixed, like="cpu", backward=False)
    real = task_of(FLOWS[name], every, "cpu")
    known = [*real.parameters(), *real.buffers()]
    captured: dict[str, int] = {}

    def watch(part: str, function: Callable[[], Any]) -> Any:
        if part != "forward":
            return function()
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            captured[part], result = kept(function, known)
        return result

    Stage(real).run(watch, BATCH, "cpu")
    assert captured["forward"] > 1e6
    assert planned.activations == pytest.approx(captured["forward"], rel=0.08)  # the codes live beside what is kept


@pytest.mark.parametrize("mixed", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("every", [0, 1])
@pytest.mark.parametrize("name", FLOWS)
def test_the_peak_is_what_the_allocator_sees(name: str, every: int, mixed: bool) -> None:
    planned = passing(Stage(task_of(FLOWS[name], every)), BATCH, mixed=mixed, like="cpu")
    real = Stage(task_of(FLOWS[name], every, "cpu"))

    def step(part: str, function: Callable[[], Any]) -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed and part != "backward"):
            return function()

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        real.run(step, BATCH, "cpu")
    now = peak = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    assert planned.peak == pytest.approx(peak, rel=0.1)
    gradients = nbytes(p.grad for p in real.task.parameters() if p.grad is not None)
    assert planned.work <= planned.peak <= planned.work + gradients
