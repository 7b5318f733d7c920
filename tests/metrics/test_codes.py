"""Code health: the numbers, and the warnings for codes that are unhealthy on purpose."""

from __future__ import annotations

import pytest
import scipy.stats
import torch
from torch import Tensor

from srcflow.errors import DataError, ShapeError
from srcflow.metrics.codes import CodeHealth, warnings_for

D = 4


def codes(draws: int = 3, images: int = 40, tokens: int = 5, noise: float = 0.5, seed: int = 0) -> Tensor:
    """(K, B, N, D): a code of each image plus noise of each draw."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(1, images, tokens, D, generator=g) + noise * torch.randn(draws, images, tokens, D, generator=g)


def health(x: Tensor) -> dict[str, float]:
    metric = CodeHealth(x.shape[-1])
    metric.update(x)
    return metric.compute()


def test_values() -> None:
    x = codes().double() * torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64) + 10
    result, flat = health(x), x.reshape(-1, D)
    std = flat.std(0, correction=0)
    noise = x.var(0).mean((0, 1)).sqrt()
    sigma = torch.linalg.eigvalsh(flat.T.cov(correction=0))
    expected = {
        "std_min": std.min().item(),
        "std_max": std.max().item(),
        "noise_std_min": noise.min().item(),
        "noise_std_mean": noise.mean().item(),
        "noise_share_min": (noise / std).min().item(),
        "eigenvalue_min": sigma.min().item(),
        "eigenvalue_ratio": (sigma.min() / sigma.mean()).item(),
        "kurtosis_max": max(scipy.stats.kurtosis(flat.numpy(), fisher=False)),
        "abs_z_max": ((flat - flat.mean(0)) / std).abs().max().item(),
    }
    assert result == pytest.approx(expected, rel=1e-7)


def test_noise_is_told_from_variation_between_images() -> None:
    assert health(codes(noise=0.1, images=500))["noise_std_mean"] == pytest.approx(0.1, rel=0.05)


@pytest.mark.parametrize("batch", [1, 7, 40])
def test_any_batches_and_masks(batch: int) -> None:
    x = codes()
    metric = CodeHealth(D).to(torch.bfloat16)
    for part in x.split(batch, dim=1):
        padded = torch.cat([part, torch.full_like(part[:, :1], torch.inf)], dim=1)
        metric.update(padded, valid=torch.arange(padded.shape[1]) < part.shape[1])
    assert metric.compute() == pytest.approx(health(x), rel=1e-9)


def test_healthy_codes_raise_no_warning() -> None:
    assert warnings_for(health(codes())) == []


def test_a_channel_without_noise_is_warned_about() -> None:
    x = codes()
    x[..., 2] = x[:1, ..., 2]
    (message,) = warnings_for(health(x))
    assert "noise draws" in message
    assert "floor 0.02" in message


def test_a_dead_channel_is_warned_about() -> None:
    x = codes()
    x[..., 1] = 5.0
    result = health(x)
    assert result["std_min"] < 1e-6
    assert len(warnings_for(result)) == 2  # no noise in it, and a zero eigenvalue


def test_codes_on_a_plane_are_warned_about() -> None:
    x = codes()
    x[..., 3] = x[..., 0] + x[..., 1]
    (message,) = warnings_for(health(x))
    assert "eigenvalue" in message


def test_rare_large_values_are_warned_about() -> None:
    x = codes()
    x[0, 0, 0, 0] = 1000.0
    assert any("kurtosis" in m for m in warnings_for(health(x)))


def test_floors_can_be_set() -> None:
    assert len(warnings_for(health(codes()), noise_share=0.9, eigenvalue_ratio=1.0, kurtosis=1.0)) == 3


def test_errors() -> None:
    with pytest.raises(DataError, match="no codes"), pytest.warns(UserWarning, match="before the"):
        CodeHealth(D).compute()
    with pytest.raises(ShapeError, match="K >= 2"):
        CodeHealth(D).update(codes(draws=1))
    with pytest.raises(DataError, match="not finite"):
        health(codes() / 0)
