from __future__ import annotations

from typing import Any

import pytest
import torch

from srcflow.autoencoders.base import Autoencoder
from srcflow.autoencoders.pixels import PixelPatches
from srcflow.errors import ConfigError, ShapeError
from srcflow.noise import Constant, Dequantisation, draw
from srcflow.registry import build, spec_of


def every_grey_level() -> torch.Tensor:
    return torch.arange(3 * 256).remainder(256).reshape(1, 3, 16, 16) / 255


def test_features_are_grey_levels_in_minus_one_to_one() -> None:
    p = PixelPatches(16, 4)
    raw, grid = p.features(every_grey_level())
    assert (grid, raw.shape, p.dim, p.pixel_density) == ((4, 4), (1, 16, 48), 48, True)
    assert raw.unique().tolist() == [k / 128 - 1 for k in range(256)]
    assert torch.equal(raw[0, 0, :4], every_grey_level()[0, 0, 0, :4] * 255 / 128 - 1)  # channel slowest


@pytest.mark.parametrize("levels", [2, 32, 256])
def test_round_trip_with_and_without_dequantisation(levels: int) -> None:
    p = PixelPatches((16, 16), 2, levels=levels)
    x = every_grey_level()
    if levels < 256:
        x = p.decode(p.features(x)[0])
        assert len(x.unique()) == levels
        assert (float(x.min()), float(x.max())) == (0, 1)
    raw, grid = p.features(x)
    torch.testing.assert_close(p.decode(p.normalize(raw), grid), x)
    noise = p.default_noise()
    assert isinstance(noise, Dequantisation)
    eps = draw(noise, raw, seed=0, purpose="test", step=0, indices=[0])
    assert eps is not None
    noisy = p.normalize(raw, eps)
    assert float(noisy.min()) >= -1
    assert float(noisy.max()) < 1
    assert float(noisy.max()) > 1 - 2 / levels
    torch.testing.assert_close(p.decode(noisy), x)


def test_rectangles_and_specification() -> None:
    p = build(spec_of(PixelPatches([8, 12], 4, channels=1)), Autoencoder)
    x = torch.randint(0, 256, (2, 1, 8, 12)) / 255
    raw, grid = p.features(x)
    assert grid == p.grid == (2, 3)
    torch.testing.assert_close(p.decode(raw, grid), x)
    assert not p.needs_statistics


def test_the_linear_scale_is_two_x_minus_one_of_any_value() -> None:
    p = PixelPatches((8, 12), 4, scale="linear")
    x = torch.rand(2, 3, 8, 12, dtype=torch.float64)
    raw, grid = p.features(x)
    assert (grid, raw.shape, raw.dtype) == ((2, 3), (2, 6, 48), torch.float64)
    torch.testing.assert_close(raw[0, 0, :4], 2 * x[0, 0, 0, :4] - 1)  # channel slowest
    torch.testing.assert_close(raw[1, 5, -4:], 2 * x[1, 2, 7, 8:] - 1)
    torch.testing.assert_close(p.decode(p.normalize(raw), grid), x)
    black, white = (p.features(torch.full((1, 3, 8, 12), v))[0] for v in (0.0, 1.0))
    assert (black.unique().tolist(), white.unique().tolist()) == ([-1.0], [1.0])


def test_the_linear_scale_decodes_noise_unclamped_and_lets_gradients_pass() -> None:
    p = PixelPatches(8, 4, scale="linear")
    raw, _ = p.features(torch.rand(2, 3, 8, 8))
    eps = draw(Constant(2.0), raw, seed=0, purpose="test", step=0, indices=[0, 1])
    assert eps is not None
    noisy = p.normalize(raw, eps).requires_grad_(True)
    images = p.decode(noisy)
    assert bool((images < 0).any() and (images > 1).any())
    (gradient,) = torch.autograd.grad(images.sum(), noisy)
    assert (gradient == 0.5).all()
    assert p.decode(raw.half()).dtype == torch.float32


def test_only_grey_levels_have_bits_per_dimension_and_a_noise_of_their_own() -> None:
    levels, linear = PixelPatches(8, 4, levels=32), build(spec_of(PixelPatches(8, 4, scale="linear")), Autoencoder)
    assert (levels.pixel_density, levels.bin_width) == (True, 2 / 32)
    assert (linear.pixel_density, linear.bin_width, linear.default_noise()) == (False, None, None)
    assert levels.noise_scale() == linear.noise_scale() == 1.0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"patch_size": 5}, "patch_size"),
        ({"levels": 100}, "power of two"),
        ({"levels": 32, "scale": "linear"}, "levels = 32: the scale linear has no grey levels"),
        ({"scale": "log"}, "scale = 'log'.*levels, linear"),
    ],
)
def test_typing_errors_are_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        PixelPatches(**{"image_size": 16, "patch_size": 4, **arguments})


def test_images_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ShapeError, match="channels = 3"):
        PixelPatches(16, 4).features(torch.zeros(1, 1, 16, 16))
