from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from srcflow.errors import ConfigError, ProblemsError
from srcflow.tasks.optimization import Optimization, warmup_cosine


def test_schedule_is_the_published_formula_and_does_not_rise_again() -> None:
    peak, low, w, total = 1e-3, 1e-5, 10, 110
    rates = [warmup_cosine(n, peak=peak, minimum=low, warmup=w, total=total) for n in range(300)]
    assert rates[0] == low
    assert rates[w] == peak == max(rates)
    for n in range(w):
        assert rates[n] == pytest.approx(low + (peak - low) * n / w)
    for n in range(w, total):
        assert rates[n] == pytest.approx(low + 0.5 * (1 + math.cos(math.pi * (n - w) / (total - w))) * (peak - low))
    assert set(rates[total:]) == {low}
    assert warmup_cosine(0, peak=peak, minimum=low, warmup=0, total=5) == peak


def test_the_scheduler_sets_the_rates_of_the_formula() -> None:
    settings = Optimization(learning_rate=0.1, min_learning_rate=0.01, warmup_steps=2)
    optimizer = settings.optimizer([nn.Parameter(torch.ones(1))])
    scheduler = settings.scheduler(optimizer, 6)
    seen = []
    for _ in range(8):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert seen == pytest.approx([settings.learning_rate_at(n, 6) for n in range(8)])


@pytest.mark.parametrize(("decay", "expected"), [("all", {"weight", "bias"}), ("matrices", {"weight"})])
def test_what_decays(decay: str, expected: set[str]) -> None:
    model = nn.Linear(2, 2)
    nn.init.ones_(model.weight)
    nn.init.ones_(model.bias)
    frozen = nn.Parameter(torch.ones(3), requires_grad=False)
    optimizer = Optimization(learning_rate=0.1, weight_decay=0.5, decay=decay).optimizer([*model.parameters(), frozen])  # type: ignore[arg-type]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    moved = {k for k, p in model.named_parameters() if not torch.equal(p, torch.ones_like(p))}
    assert moved == expected
    assert sum(len(g["params"]) for g in optimizer.param_groups) == 2


def test_bad_settings_are_named_together() -> None:
    with pytest.raises(ProblemsError) as e:
        Optimization(learning_rate=-1.0, weight_decay=-0.1, max_bad_steps=0)
    for key in ("learning_rate", "weight_decay", "max_bad_steps"):
        assert f"optimization.{key}" in str(e.value)
    with pytest.raises(ConfigError, match="min_learning_rate"):
        Optimization(learning_rate=1e-5, min_learning_rate=1e-4)
    with pytest.raises(ConfigError, match="warmup_steps"):
        Optimization(warmup_steps=10).scheduler(torch.optim.SGD([nn.Parameter(torch.ones(1))], 1.0), 10)
