"""L1, PSNR and SSIM over images, masks and batches."""

from __future__ import annotations

import pytest
import torch
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

from srcflow.errors import DataError, ShapeError
from srcflow.metrics.reconstruction import ReconstructionMetrics


def pair(n: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    target = torch.rand(n, 3, 16, 16, generator=g)
    scale = torch.linspace(0.01, 0.3, n).reshape(-1, 1, 1, 1)  # images of different quality: averages of PSNR and of MSE differ
    return (target + scale * torch.randn(n, 3, 16, 16, generator=g)).clamp(0, 1), target


def test_values() -> None:
    pred, target = pair()
    metrics = ReconstructionMetrics()
    metrics.update(pred, target)
    result = metrics.compute()
    assert result["l1"] == pytest.approx((pred - target).abs().mean().item(), rel=1e-5)
    psnr = PeakSignalNoiseRatio(data_range=1.0, dim=(1, 2, 3), reduction="elementwise_mean")
    assert result["psnr"] == pytest.approx(psnr(pred, target).item(), rel=1e-5)
    assert result["ssim"] == pytest.approx(StructuralSimilarityIndexMeasure(data_range=1.0)(pred, target).item(), rel=1e-5)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_any_batches_and_padding(batch: int) -> None:
    pred, target = pair()
    whole, parts = ReconstructionMetrics(), ReconstructionMetrics()
    whole.update(pred, target)
    for p, t in zip(pred.split(batch), target.split(batch), strict=True):
        p, t = (torch.cat([x, torch.full_like(x[:1], torch.nan)]) for x in (p, t))
        parts.update(p, t, valid=torch.arange(len(p)) < len(p) - 1)
    parts.update(pred, target, valid=torch.zeros(5, dtype=torch.bool))
    assert parts.compute() == pytest.approx(whole.compute(), rel=1e-6)


def test_predictions_are_clamped() -> None:
    metrics = ReconstructionMetrics()
    metrics.update(torch.full((2, 3, 16, 16), 1.7), torch.ones(2, 3, 16, 16))
    assert metrics.compute() == pytest.approx({"l1": 0, "psnr": 100, "ssim": 1})


def test_low_precision_and_casts_do_not_round_the_sums() -> None:
    pred, target = pair()
    metrics = ReconstructionMetrics().to(torch.bfloat16)
    metrics.update(pred.bfloat16(), target)
    exact = ReconstructionMetrics()
    exact.update(pred.bfloat16().float(), target)
    assert metrics.compute() == exact.compute()
    assert metrics.l1.dtype == torch.float64


def test_errors() -> None:
    with pytest.raises(DataError, match="no image"), pytest.warns(UserWarning, match="before the"):
        ReconstructionMetrics().compute()
    with pytest.raises(ShapeError, match="at least 11"):
        ReconstructionMetrics().update(torch.zeros(1, 3, 8, 16), torch.zeros(1, 3, 8, 16))
    with pytest.raises(ShapeError, match=r"\(1, 3, 16, 16\).*\(2, 3, 16, 16\)"):
        ReconstructionMetrics().update(torch.zeros(1, 3, 16, 16), torch.zeros(2, 3, 16, 16))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused_before_it_is_clamped(bad: float) -> None:
    good, broken = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16)
    broken[1, 0, 3, 3] = bad
    metrics = ReconstructionMetrics()
    with pytest.raises(DataError, match=r"1 of 2 reconstructions \(pred\) are not finite"):
        metrics.update(broken, good)
    with pytest.raises(DataError, match=r"1 of 2 images \(target\) are not finite"):
        metrics.update(good, broken)
    metrics.update(broken, good, valid=torch.tensor([True, False]))
    assert int(metrics.count) == 1
