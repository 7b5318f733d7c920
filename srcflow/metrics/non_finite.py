"""Images and features that are not finite: told apart before anything is clamped, cast to pixels or averaged.

`clamp(0, 1)` turns an infinite pixel into a white one, and a cast to 8 bits turns NaN into a black one; both then look like images, and
distances of them like results.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from srcflow.errors import DataError


class NonFiniteImagesWarning(UserWarning):
    """Some images are not finite."""


@contextmanager
def counted_by_caller() -> Iterator[None]:
    """Inside this block nobody gives a `NonFiniteImagesWarning`: the caller counts such images and reports them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NonFiniteImagesWarning)
        yield


def finite_rows(x: Tensor) -> Tensor:
    """Which rows of x (B, ...) hold finite numbers only, (B,) bool."""
    return x.detach().isfinite().flatten(1).all(1)


def to_unit_range(images: Tensor, codes: Tensor | None = None) -> Tensor:
    """Decoded images (B, 3, H, W) as float32 clamped to [0, 1]; what is not finite becomes NaN, so that it cannot pass for a pixel.

    >>> to_unit_range(torch.tensor([-0.5, 0.5, 1.5, torch.inf, torch.nan])).tolist()
    [0.0, 0.5, 1.0, nan, nan]

    Args:
        images: as a decoder gives them.
        codes: (B, N, d) what they were decoded from: an image of codes that are not finite is NaN everywhere, whatever the decoder made of
            them.
    """
    images = images.float()
    pixels = torch.where(images.isfinite(), images.clamp(0.0, 1.0), torch.nan)
    if codes is None:
        return pixels
    return torch.where(finite_rows(codes).reshape(-1, *[1] * (images.ndim - 1)), pixels, torch.nan)


def without_non_finite(images: Tensor) -> tuple[Tensor, Tensor]:
    """Images (B, ...) with zeros in place of those that are not finite everywhere, and which are, (B,) bool."""
    finite = finite_rows(images)
    return torch.where(finite.reshape(-1, *[1] * (images.ndim - 1)), images, 0.0), finite


def check_rows(x: Tensor, what: str, cure: str = "") -> None:
    """Refuse rows (B, ...) that are not finite.

    Raises:
        DataError: names `what`, and says how many of its rows are not.
    """
    bad = int((~finite_rows(x)).sum()) if x.numel() else 0
    if bad:
        raise DataError(f"{bad} of {len(x)} {what} are not finite (NaN or infinite)." + (f" {cure}" if cure else ""))


def finite_name(name: str, finite: int, total: int) -> str:
    """The name of a number that leaves out what is not finite; its plain name if nothing was left out.

    >>> finite_name("gfid_32", 32, 32), finite_name("gfid", 29, 32)
    ('gfid_32', 'gfid_29_finite_of_32')

    Args:
        name: the plain one, without a count where something is left out.
        finite: how many it is of.
        total: how many it should be of.
    """
    return name if finite == total else f"{name}_{finite}_finite_of_{total}"
