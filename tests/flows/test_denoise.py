"""Tweedie's mean: where it is known in closed form, against differences, and what cannot be a deviation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from srcflow.errors import ConfigError, ShapeError
from srcflow.flows import denoise, presets
from srcflow.flows.flow import Flow
from srcflow.flows.normalization import ChannelNormalization, Whitening
from srcflow.testing import perturb
from srcflow.types import Condition

GRID, N, D = (2, 3), 6, 4


def tokens(batch: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(batch, N, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def identity() -> Flow:
    """The density is standard normal: grad log p = -x."""
    return presets.tarflow(GRID, D, 32, 2, 1, head_dim=16).double()


def conditional() -> Flow:
    return perturb(presets.srcflow(GRID, D, 32, [1, 2], num_classes=3, head_dim=16), 0.1).double()


@pytest.mark.parametrize(
    "sigma",
    [
        0.5,
        0.0,
        torch.tensor(0.5),
        torch.arange(D) / 5,
        torch.linspace(0, 1, N, dtype=torch.float64)[:, None],
        torch.arange(N * D).reshape(N, D) / 30,
    ],
    ids=["number", "zero", "scalar", "per channel", "per token", "per element"],
)
def test_a_standard_normal_shrinks(sigma: float | Tensor) -> None:
    x = tokens()
    expected = x - torch.as_tensor(sigma, dtype=torch.float64) ** 2 * x
    torch.testing.assert_close(denoise.tweedie(identity(), x, sigma), expected)


def test_the_posterior_mean_of_a_gaussian() -> None:
    # clean y ~ N(m, t^2 - s^2) and x = y + s n ~ N(m, t^2): E[y | x] = m + (t^2 - s^2) / t^2 (x - m), channel by channel
    m, t, s = (torch.tensor(v, dtype=torch.float64) for v in ([0.5, -1, 0, 2], [1, 2, 0.7, 0.5], [0.5, 0.1, 0.7, 0.2]))
    flow = identity()
    norm2 = ChannelNormalization(D).double()
    norm2.fit(m, torch.diag(t**2))
    flow.normalization = norm2
    x = tokens()
    torch.testing.assert_close(denoise.tweedie(flow, x, s), m + (t**2 - s**2) / t**2 * (x - m))


def test_correlated_channels_help_each_other() -> None:
    a = torch.randn(D, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    covariance, s = a @ a.T + torch.eye(D, dtype=torch.float64), torch.tensor([0.5, 0.1, 0.7, 0.2], dtype=torch.float64)
    flow = identity()
    norm2 = Whitening(D).double()
    norm2.fit(torch.zeros(D, dtype=torch.float64), covariance)
    flow.normalization = norm2
    x = tokens()
    torch.testing.assert_close(denoise.tweedie(flow, x, s), x - s**2 * (x @ torch.linalg.inv(covariance)))


def test_the_step_is_the_gradient_of_the_density_under_the_condition() -> None:
    flow, x, labels = conditional(), tokens(), Condition(labels=torch.tensor([0, 2, -1]))
    score = (denoise.tweedie(flow, x, 0.3, labels) - x) / 0.09
    direction, h = tokens(seed=1), 1e-5
    difference = (flow.log_prob(x + h * direction, labels) - flow.log_prob(x - h * direction, labels)) / (2 * h)
    torch.testing.assert_close((score * direction).flatten(1).sum(1), difference.detach(), atol=1e-6, rtol=1e-6)
    assert not torch.allclose(denoise.tweedie(flow, x, 0.3), denoise.tweedie(flow, x, 0.3, labels), atol=1e-4)


def test_a_learned_prior_plays_no_part() -> None:
    flow, x = identity(), tokens()
    learned = presets.tarflow(GRID, D, 32, 2, 1, head_dim=16, volume_preserving=True).double()
    learned.prior_std.fill_(3.0)
    torch.testing.assert_close(denoise.tweedie(learned, x, 0.5), denoise.tweedie(flow, x, 0.5))


def test_it_takes_its_own_gradient_and_leaves_none() -> None:
    flow, x = conditional(), tokens().requires_grad_(True)
    expected = denoise.tweedie(flow, x, 0.3)
    assert not expected.requires_grad
    assert x.grad is None
    assert all(p.grad is None for p in flow.parameters())
    with torch.no_grad():
        assert torch.equal(denoise.tweedie(flow, x, 0.3), expected)


def test_under_inference_mode() -> None:
    text = perturb(presets.starflow(GRID, D, 64, [1, 2], head_dim=32, text_dim=6), 0.1)
    for flow, condition in (
        (conditional().float(), Condition(labels=torch.tensor([0, 2, -1]))),
        (text, Condition(text=torch.randn(3, 5, 6), mask=torch.ones(3, 5, dtype=torch.bool))),
    ):
        x = tokens().float()
        expected = denoise.tweedie(flow, x, 0.3, condition)
        with torch.inference_mode():  # what a Trainer evaluates in: autograd cannot keep tensors that are made here
            there = condition.map(torch.clone)
            assert torch.equal(denoise.tweedie(flow, x.clone(), torch.tensor(0.3), there), expected)


def test_under_autocast_the_result_is_float32_and_near() -> None:
    flow, x = conditional().float(), tokens().float()
    expected = denoise.tweedie(flow, x, 0.3)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        flow.inverse(x)  # leaves copies of the weights
        found = denoise.tweedie(flow, x, 0.3)
    assert found.dtype == torch.float32
    assert 0 < float((found - expected).abs().max()) < 0.05
    assert denoise.tweedie(flow, x.bfloat16(), 0.3).dtype == torch.float32


@pytest.mark.parametrize(
    ("sigma", "error", "words"),
    [
        (-0.1, ConfigError, "sigma = -0.1"),
        (float("nan"), ConfigError, "finite"),
        (float("inf"), ConfigError, "finite"),
        (torch.tensor([0.1, -0.2, 0.1, 0.1]), ConfigError, "-0.2"),
        (torch.tensor([0.1, 0.1, float("nan"), 0.1]), ConfigError, "nan"),
        (torch.ones(D + 1), ShapeError, r"\(5,\) does not broadcast.*\(6, 4\)"),
        (torch.ones(3, N, D), ShapeError, r"\(3, 6, 4\) does not broadcast"),
        (torch.ones(0), ShapeError, "does not broadcast"),
    ],
)
def test_what_is_no_deviation_is_refused(sigma: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        denoise.tweedie(identity(), tokens(), sigma)
