from __future__ import annotations

import pytest
import torch

from srcflow.autoencoders.base import Autoencoder
from srcflow.autoencoders.pixels import PixelPatches
from srcflow.errors import ConfigError, ShapeError
from srcflow.noise import Dequantisation, draw
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


def test_errors() -> None:
    with pytest.raises(ConfigError, match="patch_size"):
        PixelPatches(16, 5)
    with pytest.raises(ConfigError, match="power of two"):
        PixelPatches(16, 4, levels=100)
    with pytest.raises(ShapeError, match="channels = 3"):
        PixelPatches(16, 4).features(torch.zeros(1, 1, 16, 16))
