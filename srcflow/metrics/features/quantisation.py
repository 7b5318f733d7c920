"""Images as they are stored: 8 bits."""

from __future__ import annotations

import torch
from torch import Tensor

from srcflow.errors import DataError


def to_uint8(images: Tensor) -> Tensor:
    """Images in [0, 1] as uint8: clamped, times 255, rounded to the nearest level, halves up (as a PNG of them is written).

    >>> to_uint8(torch.tensor([-0.2, 0.0, 0.5, 1.0, 1.3])).tolist()
    [0, 0, 128, 255, 255]

    Raises:
        DataError: a number is not finite; it has no pixel.
    """
    if not bool(images.isfinite().all()):
        raise DataError("images with NaN or infinite numbers have no 8-bit pixels. Leave them out, and report how many there were.")
    x = images.detach().to(torch.promote_types(images.dtype, torch.float32))
    return (x.clamp(0, 1) * 255 + 0.5).floor().to(torch.uint8)
