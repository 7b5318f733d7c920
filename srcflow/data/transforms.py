"""Files to images: decoding, conversion to RGB, ADM's centre crop, the random crop of autoencoder training, flips.

EXIF orientation is ignored, as in the ImageNet pipelines of ADM, RAE and TARFlow: pixels are taken as they are stored.
"""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from srcflow.errors import ConfigError, DataError, UndecodableError
from srcflow.randomness import generator

EXTENSIONS = ("jpg", "jpeg", "png", "webp")
"""Image formats that folders and shards may hold, by extension in lower case."""


def decode(data: bytes, name: str) -> Image.Image:
    """Decode an image file to RGB.

    Args:
        data: the file's content.
        name: what to call it in an error message.

    Raises:
        UndecodableError: names the file.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            return to_rgb(image)
    except DataError as e:
        raise UndecodableError(f"{name}: {e}") from e
    except MemoryError:
        raise
    except Exception as e:  # damaged files make PIL's decoders raise of every kind, AssertionError too
        why = "not a known image format" if isinstance(e, UnidentifiedImageError) else str(e) or type(e).__name__
        raise UndecodableError(f"{name}: cannot be decoded: {why}. Repair or remove it; no sample is skipped in silence.") from e


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any 8- or 16-bit image to RGB: grey is replicated, transparency is laid over white, CMYK and palettes are converted.

    Raises:
        DataError: pixels without a defined range (32-bit float).
    """
    if image.mode == "RGB":
        return image.copy()
    if image.mode.startswith("I"):  # 16 bits per pixel; PIL's own conversion would clip instead of scaling
        return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise DataError("floating-point pixels have no defined range. Store 8-bit images.")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def resize_short_side(image: Image.Image, size: int) -> Image.Image:
    """Short side to `size`: halvings with a box filter while it is at least twice that, then bicubic (ADM)."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's centre crop: short side to `size`, then the middle square (Dhariwal and Nichol 2021)."""
    image = resize_short_side(image, size)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


@dataclass(frozen=True)
class ImageTransform:
    """RGB image -> (3, size, size) uint8, and whether it was mirrored. Its randomness is keyed by (seed, purpose, epoch, index).

    Args:
        size: side of the result in pixels.
        crop: "centre" (ADM) or "random": a random square of the image whose short side was resized to `resize`.
        resize: short side before the random crop, at least `size`; None means `size`.
        flip: mirror with probability 1/2.
        seed: key of crops and flips.

    Raises:
        ConfigError: sizes that do not fit each other.
    """

    size: int
    crop: Literal["centre", "random"] = "centre"
    resize: int | None = None
    flip: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
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
            image = resize_short_side(image, self.resize or self.size)
            where = generator(self.seed, "crop", epoch, index)
            left = int(where.integers(image.width - self.size + 1))
            top = int(where.integers(image.height - self.size + 1))
            image = image.crop((left, top, left + self.size, top + self.size))
        else:
            image = centre_crop(image, self.size)
        pixels = np.array(image)  # a copy: tensors are writable
        flipped = self.flip and bool(generator(self.seed, "flip", epoch, index).random() < 0.5)
        if flipped:
            pixels = pixels[:, ::-1]
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))), flipped

    def evaluation(self) -> ImageTransform:
        """The transform without randomness: centre crop, no flip."""
        return ImageTransform(self.size)

    def describe(self) -> dict[str, Any]:
        """JSON-able description of what happens to the pixels (the seed left out)."""
        return {k: v for k, v in asdict(self).items() if k != "seed"}
