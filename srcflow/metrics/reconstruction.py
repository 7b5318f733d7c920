"""How well images are reconstructed: L1, PSNR and SSIM, averaged over images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from srcflow.errors import DataError, ShapeError
from srcflow.metrics.double_metric import DoubleMetric, valid_rows
from srcflow.metrics.non_finite import check_rows

PSNR_LIMIT = 100.0
"""PSNR of a perfect reconstruction, in dB (a mean squared error below 1e-10 counts as 1e-10)."""

SMALLEST_SIDE = 11
"""SSIM's window."""


def l1_per_image(pred: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference (B,) of images (B, 3, H, W)."""
    return (pred - target).abs().flatten(1).mean(1)


def psnr_per_image(pred: Tensor, target: Tensor) -> Tensor:
    """Peak signal-to-noise ratio (B,) in dB of images (B, 3, H, W) of range 1, at most `PSNR_LIMIT`."""
    error = (pred - target).square().flatten(1).mean(1)
    return -10 * error.clamp_min(10 ** (-PSNR_LIMIT / 10)).log10()


def ssim_per_image(pred: Tensor, target: Tensor) -> Tensor:
    """Structural similarity (B,) of images (B, 3, H, W) of range 1, sides of 11 pixels or more: Gaussian window 11, sigma 1.5."""
    value = structural_similarity_index_measure(pred, target, data_range=1.0, reduction="none")
    return value.reshape(-1)  # type: ignore[union-attr]  # a tensor, as no maps are asked for


class ReconstructionMetrics(DoubleMetric):
    """L1, PSNR and SSIM per image, averaged over the images of all ranks; float64 sums.

    PSNR is averaged over images, as papers do (not the PSNR of the pooled error).

    Args:
        kwargs: torchmetrics' own (synchronisation).
    """

    is_differentiable = False
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("count", "l1", "psnr", "ssim"):
            self.add_sum(name)

    def update(self, pred: Tensor, target: Tensor, valid: Tensor | None = None) -> None:
        """Count a batch.

        Args:
            pred: (B, 3, H, W), clamped here to [0, 1].
            target: (B, 3, H, W) in [0, 1].
            valid: (B,) bool, False for rows that do not count.

        Raises:
            ShapeError: the shapes differ, or a side has fewer than 11 pixels.
            DataError: an image that counts is not finite; says on which side.
        """
        if pred.shape != target.shape or pred.ndim != 4:
            raise ShapeError(f"pred has shape {tuple(pred.shape)} and target {tuple(target.shape)}; both must be the same (B, 3, H, W).")
        if min(pred.shape[-2:]) < SMALLEST_SIDE:
            raise ShapeError(f"images of {tuple(pred.shape[-2:])} pixels: SSIM needs sides of at least {SMALLEST_SIDE}.")
        pred, target = valid_rows(valid, pred.detach(), target.detach())
        if not len(pred):
            return
        check_rows(pred, "reconstructions (pred)", "Mark them as not valid, and report how many there were.")
        check_rows(target, "images (target)")
        dtype = torch.promote_types(torch.promote_types(pred.dtype, target.dtype), torch.float32)
        pred, target = pred.to(dtype).clamp(0, 1), target.to(dtype)
        self.count += len(pred)
        for name, values in (("l1", l1_per_image), ("psnr", psnr_per_image), ("ssim", ssim_per_image)):
            getattr(self, name).add_(self.to_state(values(pred, target)).sum())

    def compute(self) -> dict[str, float]:
        """{"l1", "psnr" (dB), "ssim"}.

        Raises:
            DataError: no image was counted.
        """
        n = float(self.count)
        if n == 0:
            raise DataError("no image was reconstructed: there is nothing to average.")
        return {name: float(getattr(self, name)) / n for name in ("l1", "psnr", "ssim")}
