"""Differentiable augmentation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from srcflow.errors import ConfigError
from srcflow.losses.diffaug import DiffAug


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_is_a_function_of_images_and_generator() -> None:
    x, augment = torch.rand(4, 3, 16, 16), DiffAug()
    first = augment(x, generator(1))
    torch.manual_seed(99)  # the global generator plays no part
    torch.testing.assert_close(augment(x, generator(1)), first, rtol=0, atol=0)
    assert not torch.equal(augment(x, generator(2)), first)


def test_samples_get_different_draws_and_do_not_mix() -> None:
    x = torch.rand(1, 3, 16, 16).repeat(3, 1, 1, 1)
    out = DiffAug()(x, generator())
    assert not torch.equal(out[0], out[1])
    changed = x.clone()
    changed[2] = 0
    torch.testing.assert_close(DiffAug()(changed, generator())[:2], out[:2], rtol=0, atol=0)


@pytest.mark.parametrize("operation", ["colour", "translation", "cutout"])
def test_derivative(operation: str) -> None:
    augment = DiffAug(operations=(operation,))  # type: ignore[arg-type]
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: augment(t, generator()), (x,))


def test_probability() -> None:
    x = torch.rand(2000, 3, 4, 4)
    assert DiffAug(probability=0.0)(x, generator()) is x
    share = (DiffAug(probability=0.3, operations=("colour",))(x, generator()) != x).flatten(1).any(1).float().mean().item()
    assert share == pytest.approx(0.3, abs=0.04)


def test_translation_moves_by_whole_pixels_and_pads_with_grey() -> None:
    size, most = 16, 4
    x = torch.full((500, 3, size, size), 0.5)
    x[:, :, 8, 8] = 1.0
    out = DiffAug(operations=("translation",), shift=most / size)(x, generator())
    where = (out[:, 0] == 1).nonzero()[:, 1:] - 8
    assert len(where) == 500  # the bright pixel is never lost, nothing else appears
    assert {int(v) for v in where.flatten()} == set(range(-most, most + 1))
    edges = DiffAug(operations=("translation",), shift=0.5)(torch.zeros(50, 3, size, size), generator())
    assert set(edges.unique().tolist()) == {0.0, 0.5}


def test_cutout_blanks_a_rectangle() -> None:
    out = DiffAug(operations=("cutout",), hole=0.25)(torch.ones(300, 3, 16, 16), generator())
    area = (out[:, 0] == 0.5).flatten(1).sum(1)
    assert set(out.unique().tolist()) == {0.5, 1.0}
    assert area.max() == 16
    assert area.min() < 16  # some holes hang over the border
    assert area.min() >= 4


def test_colour_ranges() -> None:
    def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.mean((1, 2, 3)), x.flatten(1).std(1)

    x = torch.rand(1, 1, 8, 8).expand(1000, 3, 8, 8)  # grey: saturation has no effect
    mean, std = statistics(x)
    new_mean, new_std = statistics(DiffAug(operations=("colour",))(x, generator()))
    shift, gain = new_mean - mean, new_std / std
    assert -0.25 <= shift.min() < -0.2
    assert 0.2 < shift.max() <= 0.25
    assert 0.5 - 1e-4 <= gain.min() < 0.55
    assert 1.45 < gain.max() <= 1.5 + 1e-4


def test_bad_values_are_named() -> None:
    with pytest.raises(ConfigError, match="blur"):
        DiffAug(operations=("blur",))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"augment\.probability"):
        DiffAug(probability=1.5)
