"""Numbers that must not drift: a gradient, one AdamW step, and the loss curve of 100 steps of a tiny flow on fixed seeds.

They were written by `python tests/flows/test_regression.py` and change only with a deliberate change of the model or its training. All
inputs come from srcflow's keyed generators, the initial weights too, so that nothing rests on torch's own random numbers. Everything is
in float64, so that the sums of other instruction sets and libraries agree to far more digits than a change of the model would leave.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from srcflow import randomness
from srcflow.flows import presets
from srcflow.flows.flow import Flow
from srcflow.objectives.flow import flow_objective
from srcflow.tasks.optimization import Optimization
from srcflow.types import Condition

FILE = Path(__file__).parents[1] / "reference" / "flow_regression.json"


def seeded(flow: Flow, std: float) -> Flow:
    """Every parameter drawn anew: N(0, std^2) by its own key."""
    with torch.no_grad():
        for i, p in enumerate(flow.parameters()):
            p.copy_(randomness.normal(p.shape, seed=0, purpose="weights", step=0, indices=[i])[0] * std)
    return flow


def flow() -> Flow:
    return seeded(presets.srcflow(4, 3, 32, [1, 1, 2], num_classes=3, head_dim=16), 0.05)


def batch(step: int, n: int = 16) -> tuple[Tensor, Condition]:
    """Float64 tokens of three classes: correlated, skewed, with a mean that tells the class."""
    e = randomness.normal((16, 3), seed=1, purpose="data", step=step, indices=range(n)).double()
    labels = torch.arange(n) % 3
    walk = e.cumsum(1) / torch.arange(1, 17).sqrt()[:, None]
    return 0.3 * walk.exp() + 0.2 * e + labels[:, None, None] - 1.0, Condition(labels=labels)


def one_step() -> dict[str, list[float]]:
    """Norm of every parameter's gradient, and of its change in one AdamW step, in float64."""
    model = flow().double()
    x, condition = batch(0, 32)
    optimizer = Optimization(learning_rate=1e-3, weight_decay=1e-2).build_optimizer(model.parameters())
    before = [p.detach().clone() for p in model.parameters()]
    flow_objective(model, x, condition).total.backward()
    gradients = [float(p.grad.norm()) for p in model.parameters() if p.grad is not None]
    optimizer.step()
    return {"gradients": gradients, "changes": [float((p.detach() - b).norm()) for p, b in zip(model.parameters(), before, strict=True)]}


def curve() -> list[float]:
    """Losses of 100 steps in float64, averaged over 5 at a time."""
    model = flow().double()
    settings = Optimization(learning_rate=3e-3, warmup_steps=10, weight_decay=1e-4)
    optimizer = settings.build_optimizer(model.parameters())
    scheduler = settings.scheduler(optimizer, 100)
    losses = []
    for step in range(100):
        x, condition = batch(step)
        loss = flow_objective(model, x, condition).total
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        losses.append(float(loss.detach()))
    return [sum(losses[i : i + 5]) / 5 for i in range(0, 100, 5)]


@pytest.fixture(scope="module")
def stored() -> dict[str, Any]:
    return json.loads(FILE.read_text())


@pytest.mark.parametrize("what", ["gradients", "changes"])
def test_one_step(stored: dict[str, Any], what: str) -> None:
    found = one_step()[what]
    assert len(found) == len(stored[what])
    assert found == pytest.approx(stored[what], rel=1e-7, abs=1e-12)


def test_loss_curve(stored: dict[str, Any]) -> None:
    found = curve()
    assert found == pytest.approx(stored["curve"], rel=1e-6)
    assert found[-1] < found[0] - 0.5  # and it learns


if __name__ == "__main__":
    FILE.write_text(json.dumps({**one_step(), "curve": curve()}, indent=1) + "\n")
