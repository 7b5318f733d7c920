"""Noise laws. That rows are keyed by their sample is tested for every member in test_contracts.py."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from srcflow.errors import ConfigError
from srcflow.noise import Constant, Dequantisation, Noise, Uniform, draw

KEY: dict[str, Any] = {"seed": 0, "purpose": "train", "step": 0}


def test_constant_has_the_stated_level() -> None:
    eps = Constant(0.4).sample((50, 20), indices=range(20), **KEY)
    assert eps.double().std().item() == pytest.approx(0.4, rel=4 / math.sqrt(2 * 20000))
    assert eps.double().mean().item() == pytest.approx(0, abs=4 * 0.4 / math.sqrt(20000))
    assert not Constant(0.0).sample((3,), indices=[0], **KEY).any()


def test_levels_of_one_key_scale_the_same_numbers() -> None:
    """So that a curve over noise levels compares like with like."""
    one, two = (Constant(s).sample((5,), indices=[3], **KEY) for s in (1.0, 2.0))
    torch.testing.assert_close(2 * one, two)


def test_uniform_draws_one_level_per_sample() -> None:
    eps = Uniform(0.8).sample((40, 50), indices=range(400), **KEY).double()
    levels = eps.flatten(1).std(dim=1)
    assert float(levels.max()) < 0.8 * 1.1
    # the level's law: U(0, 0.8)
    assert levels.mean().item() == pytest.approx(0.4, abs=4 * 0.8 / math.sqrt(12 * 400))
    assert levels.std().item() == pytest.approx(0.8 / math.sqrt(12), rel=0.1)
    # and within a sample the noise is normal: kurtosis 3 after division by the sample's own level
    scaled = eps / levels[:, None, None]
    assert scaled.pow(4).mean().item() == pytest.approx(3, abs=0.05)


def test_uniform_level_and_noise_are_independent_draws() -> None:
    eps = Uniform(0.8).sample((), indices=range(3000), **KEY).double()
    assert eps.mean().item() == pytest.approx(0, abs=4 * eps.std().item() / math.sqrt(3000)), "the level leaks into the noise"


def test_dequantisation_fills_one_grey_level() -> None:
    eps = Dequantisation(256).sample((100,), indices=range(100), **KEY)
    assert float(eps.min()) >= 0
    assert float(eps.max()) < 2 / 256
    assert eps.double().mean().item() == pytest.approx(1 / 256, rel=0.03)
    assert float(Dequantisation(2).sample((100,), indices=range(10), **KEY).max()) > 0.9


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: Constant(-0.1), "noise.sigma"),
        (lambda: Uniform(-1.0), "noise.maximum"),
        (lambda: Dequantisation(1), "noise.levels"),
    ],
)
def test_impossible_levels_are_refused(make: Any, key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        make()


def test_draw_follows_the_features() -> None:
    features = torch.zeros(3, 4, 2, dtype=torch.float64)
    eps = draw(Constant(0.4), features, indices=[5, 6, 7], **KEY)
    assert eps is not None
    assert eps.shape == features.shape
    assert eps.dtype == torch.float64
    low = draw(Constant(0.4), features.bfloat16(), indices=[5, 6, 7], **KEY)
    assert low is not None
    assert low.dtype == torch.float32, "noise is at least float32"
    assert torch.equal(low.double(), eps)
    assert draw(None, features, indices=[5, 6, 7], **KEY) is None


def test_a_law_of_ones_own_needs_only_sample() -> None:
    with pytest.raises(TypeError, match="sample"):
        Noise()  # type: ignore[abstract]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -0.1])
def test_a_deviation_is_a_finite_number(bad: float) -> None:
    for make in (Constant, Uniform):
        with pytest.raises(ConfigError, match="finite and not negative"):
            make(bad)
