"""The density of a flow's prior."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LOG_2PI = math.log(2.0 * math.pi)


def normal_log_prob(z: Tensor, std: Tensor | None = None) -> Tensor:
    """Log-density (B,) in nats, at least float32, of z (B, N, d) under independent normals of mean 0 and deviation `std` (N, d)."""
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    constant = 0.5 * z.shape[1:].numel() * LOG_2PI
    if std is None:
        return -0.5 * z.square().flatten(1).sum(1) - constant
    std = std.to(z.dtype)
    return -0.5 * (z / std).square().flatten(1).sum(1) - std.log().sum() - constant
