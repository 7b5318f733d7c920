"""ADM's resizing, and squares cut from its result without making the rest of it.

An image of 1 x 20,000 pixels whose short side becomes 256 would be 5 million pixels long before it is cropped. Of such an image only the
window that the square depends on is resized. The pixels are the same: Pillow resizes the two axes one after the other, so the long axis can
be worked out here, with Pillow's own coefficients, for the rows (or columns) that are wanted.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

MOST = 4
"""Resized images are made whole up to this aspect ratio, if that enlarges them at all."""
PRECISION = 22  # bits behind the binary point of Pillow's coefficients for 8-bit pixels


def halvings(size: tuple[int, int], short: int) -> tuple[int, int]:
    """Width and height after the halvings that come before the bicubic step: while the short side is at least twice `short`."""
    width, height = size
    while min(width, height) >= 2 * short:
        width, height = width // 2, height // 2
    return width, height


def resized(size: tuple[int, int], short: int) -> tuple[int, int]:
    """Width and height of an image whose short side was resized to `short` (`resize_short_side`)."""
    width, height = halvings(size, short)
    scale = short / min(width, height)
    return round(width * scale), round(height * scale)


def resize_short_side(image: Image.Image, size: int) -> Image.Image:
    """Short side to `size`: halvings with a box filter while it is at least twice that, then bicubic (ADM)."""
    target = resized(image.size, size)
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    return image.resize(target, Image.Resampling.BICUBIC)


def crop_resized(image: Image.Image, short: int, size: int, place: Callable[[int, int], tuple[int, int]]) -> Image.Image:
    """A square of `resize_short_side(image, short)`, in bounded memory whatever the aspect ratio.

    Args:
        image: 8 bits per channel, e.g. RGB.
        short: short side of the resized image, at least `size`.
        size: side of the square.
        place: width and height of the resized image -> left and top of the square.
    """
    width, height = resized(image.size, short)
    left, top = place(width, height)
    if min(image.size) < short and max(width, height) > MOST * short:
        return _window(image, (width, height), (left, top), size)
    return resize_short_side(image, short).crop((left, top, left + size, top + size))


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's centre crop: short side to `size`, then the middle square (Dhariwal and Nichol 2021)."""
    return crop_resized(image, size, size, lambda width, height: ((width - size) // 2, (height - size) // 2))


def _window(image: Image.Image, whole: tuple[int, int], corner: tuple[int, int], size: int) -> Image.Image:
    """The square at `corner` of the image resized to `whole`, which is an enlargement."""
    upright = whole[1] > whole[0]
    axis = 1 if upright else 0
    first, weights = coefficients(image.size[axis], whole[axis], corner[axis], size)
    start, stop = int(first.min()), int(first.max()) + weights.shape[1]
    box = (0, start, image.width, min(stop, image.height)) if upright else (start, 0, min(stop, image.width), image.height)
    part = image.crop(box)
    if upright:  # Pillow's order: the horizontal axis first
        part = part.resize((whole[0], part.height), Image.Resampling.BICUBIC)
        part = part.crop((corner[0], 0, corner[0] + size, part.height))
        return Image.fromarray(_combine(np.asarray(part), first - start, weights))
    columns = _combine(np.asarray(part).swapaxes(0, 1), first - start, weights).swapaxes(0, 1)
    part = Image.fromarray(np.ascontiguousarray(columns)).resize((size, whole[1]), Image.Resampling.BICUBIC)
    return part.crop((0, corner[1], size, corner[1] + size))


def coefficients(length: int, target: int, start: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pillow's bicubic coefficients of some pixels of a resized axis.

    Args:
        length: pixels of the axis.
        target: pixels of the resized axis, at least `length`.
        start: first of the wanted pixels.
        count: how many are wanted.

    Returns:
        (count,) first source pixel of each, and (count, 5) weights of the source pixels from there on, in units of 2^-22.
    """
    scale = length / target
    centre = (np.arange(start, start + count) + 0.5) * scale
    first = np.trunc(centre - 2 + 0.5).astype(np.int64).clip(0)
    last = np.trunc(centre + 2 + 0.5).astype(np.int64).clip(max=length)
    at = first[:, None] + np.arange(5)
    x = np.abs(at - centre[:, None] + 0.5)
    near, far = ((-0.5 + 2.0) * x - (-0.5 + 3.0)) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5
    weights = np.where(at < last[:, None], np.where(x < 1, near, np.where(x < 2, far, 0.0)), 0.0)
    total = np.zeros(count)
    for column in weights.T:  # in Pillow's order, so that the sum is rounded like its
        total += column
    weights /= total[:, None]
    return first, np.trunc(weights * (1 << PRECISION) + np.where(weights < 0, -0.5, 0.5)).astype(np.int64)


def _combine(rows: NDArray[np.uint8], first: NDArray[np.int64], weights: NDArray[np.int64]) -> NDArray[np.uint8]:
    """(count, ...) weighted sums of (m, ...) rows: row k of the result from rows first[k], first[k] + 1, ..."""
    total = np.full((len(first), *rows.shape[1:]), 1 << (PRECISION - 1), np.int64)
    for i in range(weights.shape[1]):
        weight = weights[:, i].reshape(-1, *[1] * (rows.ndim - 1))
        total += weight * rows[(first + i).clip(max=len(rows) - 1)]
    return (total >> PRECISION).clip(0, 255).astype(np.uint8)
