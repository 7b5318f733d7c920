"""Pixel and feature losses."""

from __future__ import annotations

import pytest
import torch

from srcflow.errors import ConfigError, ShapeError
from srcflow.losses.reconstruction import feature_loss, pixel_loss


def test_pixel_values() -> None:
    a, b = torch.tensor([0.0, 1.0, 3.0]), torch.tensor([0.0, 3.0, 2.0])
    assert pixel_loss(a, b).item() == pytest.approx(1.0)
    assert pixel_loss(a, b, "l2").item() == pytest.approx(5 / 3)


@pytest.mark.parametrize(
    ("given", "wanted"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)]
)
def test_at_least_float32(given: torch.dtype, wanted: torch.dtype) -> None:
    a, b = torch.rand(2, 3, 4, 4).to(given), torch.rand(2, 3, 4, 4).to(given)
    assert pixel_loss(a, b).dtype == wanted
    assert feature_loss(a.flatten(2), b.flatten(2)).dtype == wanted
    # the sum itself is not rounded to the input's precision
    torch.testing.assert_close(pixel_loss(a, b).double(), (a.double() - b.double()).abs().mean(), rtol=1e-6, atol=1e-8)


def test_feature_loss_is_mse_plus_one_minus_cosine() -> None:
    a = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
    b = torch.tensor([[[0.0, 1.0], [0.0, 1.0]]])  # orthogonal; parallel
    assert feature_loss(a, b).item() == pytest.approx((1 + 1 + 0 + 1) / 4 + (1 + 0) / 2)
    assert feature_loss(a, a).item() == pytest.approx(0, abs=1e-7)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ShapeError, match=r"\(2, 3\).*\(1, 3\)"):
        pixel_loss(torch.zeros(2, 3), torch.zeros(1, 3))
    with pytest.raises(ConfigError, match="l1, l2"):
        pixel_loss(torch.zeros(2), torch.zeros(2), "huber")  # type: ignore[arg-type]
