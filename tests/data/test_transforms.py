from __future__ import annotations

import io
import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image

from srcflow.data.images import ImageSource
from srcflow.data.resize import _window, centre_crop, crop_resized, resize_short_side, resized
from srcflow.data.sampler import Draw
from srcflow.data.transforms import EXTENSIONS, ImageTransform, decode
from srcflow.errors import ConfigError, DataError, UndecodableError


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


def oriented(number: int, size: tuple[int, int] = (12, 8), form: str = "PNG") -> tuple[Image.Image, bytes]:
    """An image, and a file that stores it in another orientation and says which."""
    image, exif = noise(*size), Image.Exif()
    exif[0x0112] = number
    stored = {
        1: image,
        2: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: image.rotate(180),
        4: image.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: image.transpose(Image.Transpose.TRANSPOSE),
        6: image.rotate(90, expand=True),  # shown after a turn by 90 degrees clockwise
        7: image.transpose(Image.Transpose.TRANSVERSE),
        8: image.rotate(-90, expand=True),
    }[number]
    return image, as_file(stored, form, exif=exif)


@pytest.mark.parametrize("number", range(1, 9))
def test_images_are_turned_upright_as_their_exif_data_say(number: int) -> None:
    image, data = oriented(number)
    np.testing.assert_array_equal(np.asarray(decode(data, "x")), np.asarray(image))
    np.testing.assert_array_equal(np.asarray(decode(oriented(number, form="TIFF")[1], "x")), np.asarray(image))
    stored = decode(data, "x", exif="ignore")
    assert stored.size == ((8, 12) if number > 4 else (12, 8))
    assert (number == 1) == np.array_equal(np.asarray(stored).reshape(-1), np.asarray(image).reshape(-1))


@pytest.mark.parametrize("form", ["JPEG", "WEBP", "AVIF"])
def test_orientation_in_other_formats(form: str) -> None:
    if form.lower() not in EXTENSIONS and form != "JPEG":
        pytest.skip("this Pillow lacks it")
    assert decode(oriented(6, (40, 24), form)[1], "x").size == (40, 24)


def test_damaged_exif_data_say_nothing() -> None:
    """The pixels are sound, so the image counts; whatever Pillow raises over the rest."""
    image = noise(12, 8)
    for exif in (
        b"Exif\0\0garbage",
        b"Exif\0\0MM\0*\0\0\0\x08\xff\xff",
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\xff\xff\xff\xff\0\0\0\0",
    ):
        np.testing.assert_array_equal(np.asarray(decode(as_file(image, "PNG", exif=exif), "x")), np.asarray(image))
    for number in (0, 9, 77):
        exif = Image.Exif()
        exif[0x0112] = number
        assert decode(as_file(image, "PNG", exif=exif), "x").size == (12, 8)


def test_the_choice_about_exif_is_part_of_the_transform() -> None:
    assert ImageTransform(8).describe()["exif"] == "transpose"
    assert ImageTransform(8, exif="ignore").evaluation().describe()["exif"] == "ignore"
    with pytest.raises(ConfigError, match=r"data.exif = 'rotate': unknown. Known: transpose, ignore"):
        ImageTransform(8, exif="rotate")  # type: ignore[arg-type]


def test_formats_by_their_endings() -> None:
    assert EXTENSIONS[:4] == ("jpg", "jpeg", "png", "webp")
    assert {"bmp", "gif", "jfif", "tif", "tiff", "ppm"} < set(EXTENSIONS)
    assert not {"pfm", "pdf", "eps", "psd", "h5", "mpg"} & set(EXTENSIONS)
    image = noise(16, 16)
    for form in ("BMP", "TIFF", "PPM"):
        np.testing.assert_array_equal(np.asarray(decode(as_file(image, form), "x")), np.asarray(image))
    frames = [Image.new("RGB", (4, 4), (200 * i, 0, 0)) for i in (1, 0)]
    assert np.asarray(decode(as_file(frames[0], "GIF", save_all=True, append_images=frames[1:]), "x"))[0, 0].tolist() == [200, 0, 0]


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


def test_a_square_of_a_long_image_has_the_pixels_of_the_whole() -> None:
    """Many shapes, places and sizes, against resizing everything and cropping then."""
    rng = np.random.default_rng(0)
    for trial in range(300):
        size = int(rng.integers(1, 40))
        short = size + int(rng.integers(0, 20))
        narrow, long = int(rng.integers(1, short + 1)), int(rng.integers(1, 400))
        image = noise(narrow, long, trial) if trial % 2 else noise(long, narrow, trial)
        whole = resize_short_side(image, short)
        assert whole.size == resized(image.size, short)
        ends = [(0, 0), (whole.width - size, whole.height - size)]
        corner = ends[trial % 5] if trial % 5 < 2 else tuple(int(rng.integers(0, n - size + 1)) for n in whole.size)
        expected = np.asarray(whole.crop((*corner, corner[0] + size, corner[1] + size)))
        got = crop_resized(image, short, size, lambda *_, corner=corner: corner)
        np.testing.assert_array_equal(np.asarray(got), expected)
        if min(image.size) < short:  # also where the whole would be made
            np.testing.assert_array_equal(np.asarray(_window(image, whole.size, corner, size)), expected)


@pytest.mark.parametrize("size", [(1, 20_000), (20_000, 1), (3, 60_000)])
def test_long_images_take_no_more_memory_than_they_have_pixels(size: tuple[int, int]) -> None:
    """Resized as a whole, these would have more pixels than Pillow can count, or need gigabytes."""
    image = noise(*size)
    tracemalloc.start()
    try:
        centre = ImageTransform(256)(image, epoch=0, index=0)[0]
        drawn = ImageTransform(256, "random", 384)(image, epoch=0, index=0)[0]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert centre.shape == drawn.shape == (3, 256, 256)
    assert peak < 30e6
    if 1 in size:  # the middle 20 pixels give the same square
        box = (0, 9_990, 1, 10_010) if size[0] == 1 else (9_990, 0, 10_010, 1)
        assert np.array_equal(centre.permute(1, 2, 0).numpy(), np.asarray(resize_short_side(image.crop(box), 256).crop(MIDDLE[size])))


MIDDLE = {(1, 20_000): (0, 2432, 256, 2688), (20_000, 1): (2432, 0, 2688, 256)}


class Source(ImageSource):
    """No files of its own; `make` is what is tested."""

    def __len__(self) -> int:
        return 1

    def key(self, index: int) -> str:
        return "x"

    def fingerprint(self) -> str:
        return "x"


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (MemoryError(), "more memory than there is"),
        (Image.DecompressionBombError("too large."), "too large. Repair"),
        (AssertionError(), "AssertionError"),
    ],
)
@pytest.mark.parametrize("place", ["open", "resize"])
def test_whatever_an_image_raises_is_a_bad_sample(place: str, error: Exception, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = as_file(noise(8, 8))

    def fail(*args: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(Image if place == "open" else Image.Image, place, fail)
    sample = Source(ImageTransform(4), 0, tolerant=True).make(data, -1, Draw(0, 3), "cat/long.png")
    assert sample["error"].startswith("cat/long.png: cannot be decoded: ")
    assert why in sample["error"]
    assert sample["index"] == 3
    assert not sample["image"].any()
    with pytest.raises(UndecodableError, match=f"cat/long.png: cannot be decoded: .*{why}"):
        Source(ImageTransform(4), 0).make(data, -1, Draw(0, 3), "cat/long.png")


def test_integers_without_a_range_are_refused() -> None:
    wide = Image.fromarray(np.full((4, 4), 1 << 20, np.int32))
    with pytest.raises(UndecodableError, match=r"x: pixels between 1048576 and 1048576 have no defined range"):
        decode(as_file(wide, "TIFF"), "x")
