from __future__ import annotations

import pytest
import torch

from srcflow.errors import DataError
from srcflow.metrics.features.encoder import EncoderFeatures
from srcflow.metrics.features.quantisation import to_uint8
from srcflow.metrics.non_finite import finite_name, finite_rows, to_unit_range, without_non_finite

BAD = [float("nan"), float("inf"), float("-inf")]


@pytest.mark.parametrize("bad", BAD)
def test_nothing_that_is_not_finite_becomes_a_pixel(bad: float) -> None:
    images = torch.rand(3, 3, 4, 4) * 3 - 1
    expected = images.clamp(0, 1)
    images[1, 2, 3, 0] = bad
    found = to_unit_range(images)
    assert finite_rows(found).tolist() == [True, False, True]
    assert torch.equal(found[finite_rows(found)], expected[[0, 2]])
    assert int(found.isnan().sum()) == 1
    zeroed, finite = without_non_finite(found)
    assert finite.tolist() == [True, False, True]
    assert float(zeroed[1].abs().max()) == 0
    with pytest.raises(DataError, match="no 8-bit pixels"):
        to_uint8(images)


def test_images_of_codes_that_are_not_finite_are_none() -> None:
    codes = torch.zeros(2, 4, 3)
    codes[0, 1, 1] = torch.inf
    assert finite_rows(to_unit_range(torch.rand(2, 3, 4, 4), codes)).tolist() == [False, True]


def test_float64_beyond_float32_is_not_finite() -> None:
    assert not bool(finite_rows(to_unit_range(torch.full((1, 3, 2, 2), 1e300, dtype=torch.float64))))


@pytest.mark.parametrize("bad", BAD)
def test_no_extractor_sees_them(bad: float) -> None:
    from srcflow.encoders.efficientnet_lite import EfficientNetLite
    from srcflow.metrics.features.inception import Inception

    images = torch.rand(1, 3, 32, 32)
    images[0, 0, 0, 0] = bad
    with pytest.raises(DataError, match="no 8-bit pixels"):
        EncoderFeatures(EfficientNetLite("lite0", image_size=32, stage=2))(images)
    inception = Inception()
    inception.network = lambda x: pytest.fail("the network has seen them")  # type: ignore[assignment,return-value]
    with pytest.raises(DataError, match="no 8-bit pixels"):
        inception(images)


def test_names_say_how_many_were_left_out() -> None:
    assert finite_name("l1", 8, 8) == "l1"
    assert finite_name("l1", 7, 8) == "l1_7_finite_of_8"
