from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from srcflow.data.transforms import ImageTransform, centre_crop, decode, resize_short_side
from srcflow.errors import ConfigError, DataError


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def as_file(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def test_centre_crop_halves_with_a_box_filter() -> None:
    image = noise(64, 64)
    blocks = np.asarray(image, dtype=np.float64).reshape(16, 4, 16, 4, 3).mean((1, 3))
    got = np.asarray(centre_crop(image, 16), dtype=np.float64)
    assert np.abs(got - blocks).max() <= 2  # two halvings, and each rounds
    bicubic = np.asarray(image.resize((16, 16), Image.Resampling.BICUBIC), dtype=np.float64)
    assert np.abs(got - bicubic).max() > 5


@pytest.mark.parametrize("size", [(50, 37), (37, 50), (31, 31), (100, 20), (16, 16), (5, 9)])
def test_centre_crop_takes_the_middle(size: tuple[int, int]) -> None:
    image = noise(*size)
    got = centre_crop(image, 16)
    assert got.size == (16, 16)
    whole = resize_short_side(image, 16)
    left, top = (whole.width - 16) // 2, (whole.height - 16) // 2
    np.testing.assert_array_equal(np.asarray(got), np.asarray(whole)[top : top + 16, left : left + 16])
    assert min(whole.size) == 16


def test_bicubic_upscaling_agrees_with_the_kernel() -> None:
    """PIL's bicubic (a = -0.5), worked out for one pixel of a doubled ramp."""
    row = np.array([0, 0, 0, 100, 200, 200, 200, 200], np.uint8)
    image = Image.fromarray(np.repeat(np.repeat(row[None, :, None], 8, 0), 3, 2))
    got = np.asarray(resize_short_side(image, 16))[8, :, 0].astype(float)
    x = (6 + 0.5) / 2 - 0.5  # output pixel 6
    weights = [
        np.where(abs(t) < 1, 1.5 * abs(t) ** 3 - 2.5 * abs(t) ** 2 + 1, -0.5 * (abs(t) ** 3 - 5 * abs(t) ** 2 + 8 * abs(t) - 4))
        for t in x - np.arange(1, 5)
    ]
    assert got[6] == pytest.approx(float(np.dot(weights, row[1:5].astype(float))), abs=1)


def test_rgb_of_every_mode() -> None:
    grey = Image.new("L", (4, 4), 77)
    assert np.asarray(decode(as_file(grey), "x")).tolist() == [[[77] * 3] * 4] * 4
    half = Image.new("RGBA", (4, 4), (0, 0, 0, 128))
    assert np.asarray(decode(as_file(half), "x"))[0, 0].tolist() == [127] * 3  # over white
    clear = Image.new("LA", (4, 4), (10, 0))
    assert np.asarray(decode(as_file(clear), "x"))[0, 0].tolist() == [255] * 3
    palette = noise(8, 8).quantize(4)
    np.testing.assert_array_equal(np.asarray(decode(as_file(palette), "x")), np.asarray(palette.convert("RGB")))
    see_through = Image.new("P", (4, 4), 0)
    see_through.putpalette([9, 9, 9] * 256)
    assert np.asarray(decode(as_file(see_through, transparency=0), "x"))[0, 0].tolist() == [255] * 3
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    r, g, b = np.asarray(decode(as_file(cmyk, "JPEG"), "x"))[4, 4].tolist()
    assert r > 200 > 60 > max(g, b)
    deep = Image.fromarray(np.full((4, 4), 0x8034, np.uint16))
    assert np.asarray(decode(as_file(deep), "x"))[0, 0].tolist() == [0x80] * 3


def test_exif_orientation_is_ignored() -> None:
    image = noise(12, 8)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    assert decode(as_file(image, "JPEG", exif=exif), "x").size == (12, 8)


def test_damaged_files_are_named() -> None:
    data = as_file(noise(32, 32), "JPEG")
    for bad in (data[:200], b"no image", b""):
        with pytest.raises(DataError, match=r"shard.tar: img_7.*cannot be decoded"):
            decode(bad, "shard.tar: img_7")
    palette = as_file(Image.new("P", (4, 4)), "PNG")
    without = palette[: palette.index(b"PLTE") - 4] + palette[palette.index(b"IDAT") - 4 :]
    with pytest.raises(DataError, match="x: cannot be decoded: AssertionError"):
        decode(without, "x")
    with pytest.raises(DataError, match="x: floating-point"):
        decode(as_file(Image.new("F", (3, 3)), "TIFF"), "x")


def test_random_crop_and_flip_depend_on_seed_epoch_and_index_only() -> None:
    image = noise(80, 64)
    transform = ImageTransform(32, "random", 48, flip=True, seed=1)
    draws = {(e, i): transform(image, epoch=e, index=i) for e in range(3) for i in range(10)}
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002  # the global state must not matter
    for (e, i), (pixels, flipped) in draws.items():
        again, flipped_again = transform(image, epoch=e, index=i)
        assert torch.equal(pixels, again)
        assert flipped == flipped_again
        assert pixels.shape == (3, 32, 32)
        assert pixels.dtype == torch.uint8
        assert pixels.is_contiguous()
    assert len({p.numpy().tobytes() for p, _ in draws.values()}) > 25
    assert 5 < sum(f for _, f in draws.values()) < 25
    assert not torch.equal(draws[0, 0][0], ImageTransform(32, "random", 48, flip=True, seed=2)(image, epoch=0, index=0)[0])
    plain, flipped = ImageTransform(32, "random", 48, seed=1)(image, epoch=0, index=0)
    assert not flipped
    assert torch.equal(draws[0, 0][0].flip(-1) if draws[0, 0][1] else draws[0, 0][0], plain)


def test_evaluation_view() -> None:
    image = noise(80, 64)
    pixels, flipped = ImageTransform(32, "random", 48, flip=True).evaluation()(image, epoch=3, index=9)
    assert not flipped
    assert torch.equal(pixels, torch.from_numpy(np.array(centre_crop(image, 32))).permute(2, 0, 1))


def test_sizes_that_do_not_fit() -> None:
    with pytest.raises(ConfigError, match=r"data.resize = 16.*data.size = 32"):
        ImageTransform(32, "random", 16)
    with pytest.raises(ConfigError, match=r"data.resize = 64.*centre"):
        ImageTransform(32, "centre", 64)
    with pytest.raises(ConfigError, match=r"data.size = 0"):
        ImageTransform(0)
