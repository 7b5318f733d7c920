"""Files to images: decoding, upright orientation, conversion to RGB, ADM's centre crop, the random crop of autoencoder training, flips."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError, features
from torch import Tensor

from srcflow.data.resize import centre_crop, crop_resized
from srcflow.errors import ConfigError, DataError, UndecodableError, one_of
from srcflow.randomness import generator

Exif = Literal["transpose", "ignore"]
EXIF = ("transpose", "ignore")
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "JPEG2000", "MPO", "PPM")
"""Pillow's names of the image formats that are read; of files with several frames the first."""


def _extensions() -> tuple[str, ...]:
    """File name endings of `FORMATS`, as far as this Pillow reads them, the usual ones first."""
    known = Image.registered_extensions()  # loads Pillow's plug-ins
    lacking = set() if features.check("jpg_2000") else {"JPEG2000"}
    found = {e[1:] for e, name in known.items() if name in FORMATS and name in Image.OPEN and name not in lacking}
    usual = ("jpg", "jpeg", "png", "webp")
    return (*usual, *sorted(found - {*usual, "pfm"}))  # pfm: floating-point pixels


EXTENSIONS = _extensions()
"""Endings of the image files that folders and shards may hold, in lower case."""
ORIENTATION = 0x0112  # of EXIF
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What turns an image upright, by its EXIF orientation."""


def decode(data: bytes, name: str, exif: Exif = "transpose") -> Image.Image:
    """Decode an image file to RGB.

    Args:
        data: the file's content.
        name: what to call it in an error message.
        exif: "transpose": turned upright as its EXIF orientation says (`upright`); "ignore": the pixels as they are stored (but for TIFF
            files, which Pillow itself turns upright).

    Raises:
        UndecodableError: names the file.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            return to_rgb(upright(image) if exif == "transpose" else image)
    except Exception as e:  # damaged files make PIL's decoders raise of every kind, AssertionError and MemoryError too
        raise undecodable(name, e) from e


def undecodable(name: str, error: Exception) -> UndecodableError:
    """What to raise for whatever an image file raised.

    Args:
        name: the file.
        error: what was raised.
    """
    if isinstance(error, DataError):
        return error if isinstance(error, UndecodableError) else UndecodableError(f"{name}: {error}")
    if isinstance(error, UnidentifiedImageError):
        why = "not a known image format"
    elif isinstance(error, MemoryError):
        why = "it takes more memory than there is"
    else:
        why = str(error).rstrip(".") or type(error).__name__
    return UndecodableError(f"{name}: cannot be decoded: {why}. Repair or remove it; no sample is skipped in silence.")


def upright(image: Image.Image) -> Image.Image:
    """Turn and mirror an image as its EXIF orientation says. EXIF data that cannot be read say nothing.

    Args:
        image: decoded.
    """
    try:
        method = UPRIGHT.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # whatever damaged EXIF data make Pillow raise: the pixels are sound
        return image
    return image if method is None else image.transpose(method)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any 8- or 16-bit image to RGB: grey is replicated, transparency is laid over white, CMYK and palettes are converted.

    Raises:
        DataError: pixels without a defined range (floating-point, or integers of more than 16 bits).
    """
    if image.mode == "RGB":
        return image.copy()
    if image.mode.startswith("I"):  # 16 bits per pixel; PIL's own conversion would clip instead of scaling
        deep = np.asarray(image).astype(np.int64)
        if deep.min() < 0 or deep.max() > 0xFFFF:
            raise DataError(f"pixels between {deep.min()} and {deep.max()} have no defined range. Store 8- or 16-bit images.")
        return Image.fromarray((deep >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise DataError("floating-point pixels have no defined range. Store 8-bit images.")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


@dataclass(frozen=True)
class ImageTransform:
    """RGB image -> (3, size, size) uint8, and whether it was mirrored. Its randomness is keyed by (seed, purpose, epoch, index).

    Args:
        size: side of the result in pixels.
        crop: "centre" (ADM) or "random": a random square of the image whose short side was resized to `resize`.
        resize: short side before the random crop, at least `size`; None means `size`.
        flip: mirror with probability 1/2.
        seed: key of crops and flips.
        exif: what the decoder before it does with EXIF orientation (`decode`): "transpose" or "ignore".

    Raises:
        ConfigError: sizes that do not fit each other; an unknown `crop` or `exif`.
    """

    size: int
    crop: Literal["centre", "random"] = "centre"
    resize: int | None = None
    flip: bool = False
    seed: int = 0
    exif: Exif = "transpose"

    def __post_init__(self) -> None:
        one_of("data.exif", self.exif, EXIF)
        if self.size < 1:
            raise ConfigError("data.size", self.size, "an image has at least one pixel.")
        if self.crop not in ("centre", "random"):
            raise ConfigError("data.crop", self.crop, "no such crop.", "Known: centre, random.")
        if self.resize is not None and self.crop == "centre":
            raise ConfigError(
                "data.resize",
                self.resize,
                "the centre crop always resizes the short side to data.size.",
                "Remove it, or set data.crop: random.",
            )
        if self.resize is not None and self.resize < self.size:
            raise ConfigError("data.resize", self.resize, f"is smaller than the crop, data.size = {self.size}.")

    def __call__(self, image: Image.Image, *, epoch: int, index: int) -> tuple[Tensor, bool]:
        """Crop, and perhaps mirror, an RGB image.

        Args:
            image: of any size.
            epoch: training epoch.
            index: global sample index.

        Returns:
            (3, size, size) uint8, and whether it is mirrored.
        """
        if self.crop == "random":
            where = generator(self.seed, "crop", epoch, index)

            def place(width: int, height: int) -> tuple[int, int]:
                return int(where.integers(width - self.size + 1)), int(where.integers(height - self.size + 1))

            image = crop_resized(image, self.resize or self.size, self.size, place)
        else:
            image = centre_crop(image, self.size)
        pixels = np.array(image)  # a copy: tensors are writable
        flipped = self.flip and bool(generator(self.seed, "flip", epoch, index).random() < 0.5)
        if flipped:
            pixels = pixels[:, ::-1]
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))), flipped

    def evaluation(self) -> ImageTransform:
        """The transform without randomness: centre crop, no flip."""
        return ImageTransform(self.size, exif=self.exif)

    def describe(self) -> dict[str, Any]:
        """JSON-able description of what happens to the pixels (the seed left out)."""
        return {k: v for k, v in asdict(self).items() if k != "seed"}
