"""Two-dimensional rotary positions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from srcflow.errors import ConfigError
from srcflow.types import Grid

BASE = 10000.0
TEXT_FREQUENCIES = 8


def angles(head_dim: int, side: float, grid: Grid, text: int, text_axis: bool, device: torch.device) -> Tensor:
    """Rotation angles of every sequence slot (text + N, head_dim / 2), float64: pairs laid out row, column, third axis (E18).

    Image slot (r, c) has coordinates r * side / sqrt(h w) and c * side / sqrt(h w), so grids of another shape keep the mean side; text
    slot t has row = column = 0 and third coordinate t * side / text.

    Args:
        head_dim: width of a head.
        side: side of the grid that the model is built for.
        grid: (rows, columns) of this call.
        text: number of text tokens in front of the image tokens.
        text_axis: whether 8 frequencies are reserved for the third axis (models built with text, also in their blocks without).
        device: where to put the result.
    """
    pairs = head_dim // 2 - (TEXT_FREQUENCIES if text_axis else 0)
    if head_dim % 4 or pairs < 2:
        raise ConfigError(
            "head_dim", head_dim, "rotary positions need a multiple of 4" + (" of at least 20 with a text axis." if text_axis else ".")
        )
    f = BASE ** (-2.0 * torch.arange(pairs // 2, device=device, dtype=torch.float64) / pairs)
    h, w = grid
    scale = side / math.sqrt(h * w)
    row = torch.arange(h, device=device, dtype=torch.float64).repeat_interleave(w) * scale
    column = torch.arange(w, device=device, dtype=torch.float64).repeat(h) * scale
    image = [row[:, None] * f, column[:, None] * f]
    if not text_axis:
        if text:
            raise ConfigError("positions.text_axis", text_axis, "text in front of the image needs the third axis.", "Set text_axis: true.")
        return torch.cat(image, dim=1)
    third = BASE ** (-torch.arange(TEXT_FREQUENCIES, device=device, dtype=torch.float64) / TEXT_FREQUENCIES)
    t = torch.arange(text, device=device, dtype=torch.float64) * (side / max(text, 1))
    prefix = torch.cat([t.new_zeros(text, pairs), t[:, None] * third], dim=1)
    body = torch.cat([*image, row.new_zeros(h * w, TEXT_FREQUENCIES)], dim=1)
    return torch.cat([prefix, body])


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate neighbouring channel pairs (2i, 2i+1) of x (B, heads, m, head_dim) by angles given by cos and sin (m, head_dim / 2)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    high, cos, sin = x.to(dtype), cos.to(dtype), sin.to(dtype)
    if torch.compiler.is_compiling():  # which does not fuse complex numbers
        swapped = high.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)  # type: ignore[no-untyped-call]  # torch is untyped here
        signed = torch.stack([-sin, sin], dim=-1).flatten(-2)
        rotated: Tensor = high * cos.repeat_interleave(2, dim=-1) + swapped * signed
        return rotated.to(x.dtype)
    # one complex product: several times as fast in eager mode as strided halves
    pairs = high.unflatten(-1, (-1, 2)).contiguous()  # type: ignore[no-untyped-call]  # torch is untyped here
    turned = torch.view_as_complex(pairs) * torch.complex(cos, sin)
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)
