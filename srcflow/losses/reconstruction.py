"""Plain distances between images and between features. At least float32, whatever comes in; float64 stays float64."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from srcflow.errors import ConfigError, ShapeError

PixelKind = Literal["l1", "l2"]


def pixel_loss(pred: Tensor, target: Tensor, kind: PixelKind = "l1") -> Tensor:
    """Mean absolute or mean squared difference of images.

    Args:
        pred: images, any shape, not clamped.
        target: images of the same shape.
        kind: "l1" (RAE) or "l2".

    Returns:
        A scalar.

    Raises:
        ConfigError: an unknown kind.
        ShapeError: the shapes differ.
    """
    pred, target = _pair(pred, target)
    if kind == "l1":
        return (pred - target).abs().mean()
    if kind == "l2":
        return (pred - target).square().mean()
    raise ConfigError("pixel_loss", kind, "no such pixel loss.", "Known: l1, l2.")


def feature_loss(pred: Tensor, target: Tensor) -> Tensor:
    """Mean squared error plus one minus the cosine of every token, averaged over tokens.

    Args:
        pred: features (B, N, D).
        target: features (B, N, D); gradients pass to it too unless it is detached.

    Returns:
        A scalar; 0 for equal features, and invariant to the order of the tokens.

    Raises:
        ShapeError: the shapes differ.
    """
    pred, target = _pair(pred, target)
    return (pred - target).square().mean() + (1 - F.cosine_similarity(pred, target, dim=-1)).mean()


def _pair(pred: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    if pred.shape != target.shape:
        raise ShapeError(f"pred has shape {tuple(pred.shape)} and target {tuple(target.shape)}; a loss compares equal shapes.")
    dtype = torch.promote_types(torch.promote_types(pred.dtype, target.dtype), torch.float32)
    return pred.to(dtype), target.to(dtype)
