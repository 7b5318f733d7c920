"""Health of a compressor's codes: whether a density on them exists and can be learned.

A likelihood grows without bound where codes collapse: a channel that noise does not reach, or a direction without variance, makes the
flow's number a lie. These are measured before a flow is trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from srcflow.errors import ConfigError, DataError, ShapeError
from srcflow.metrics.double_metric import DoubleMetric, valid_rows

Health = dict[str, float]

NOISE_STD_FLOOR = 0.02
"""Smallest healthy ratio of a channel's std over noise draws to its std over everything."""

EIGENVALUE_FLOOR = 1e-4
"""Smallest healthy ratio of the least to the mean eigenvalue of the codes' channel covariance."""

KURTOSIS_CEILING = 30.0
"""Largest healthy kurtosis of a channel (3 for a Gaussian)."""


class CodeHealth(DoubleMetric):
    """Streaming statistics of codes under several noise draws; float64 sums, so the result does not depend on batch size or rank count.

    Args:
        code_dim: d.
        kwargs: torchmetrics' own (synchronisation).
    """

    is_differentiable = False
    groups: Tensor
    rows: Tensor
    within: Tensor
    powers: Tensor
    outer: Tensor
    least: Tensor
    greatest: Tensor

    def __init__(self, code_dim: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if code_dim < 1:
            raise ConfigError("code_dim", code_dim, "codes have at least one channel.")
        d = self.code_dim = code_dim
        self.add_sum("groups")  # (image, token) pairs
        self.add_sum("rows")  # (draw, image, token) triples
        self.add_sum("within", d)  # sum over groups of the variance over draws
        self.add_sum("powers", 4, d)  # sums of x, x^2, x^3, x^4
        self.add_sum("outer", d, d)
        inf = torch.full((d,), torch.inf, dtype=torch.float64)
        self.add_state("least", default=inf.clone(), dist_reduce_fx="min")
        self.add_state("greatest", default=-inf, dist_reduce_fx="max")

    def update(self, codes: Tensor, valid: Tensor | None = None) -> None:
        """Count a batch.

        Args:
            codes: (K, B, N, d), K >= 2 noise draws of the same images.
            valid: (B,) bool, False for images that do not count.

        Raises:
            ShapeError: another shape.
        """
        if codes.ndim != 4 or codes.shape[0] < 2 or codes.shape[3] != self.code_dim:
            raise ShapeError(f"codes have shape {tuple(codes.shape)}; (K, B, N, {self.code_dim}) with K >= 2 noise draws is wanted.")
        (by_image,) = valid_rows(valid, self.to_state(codes).transpose(0, 1))  # (B, K, N, d)
        if not len(by_image):
            return
        x = by_image.reshape(-1, self.code_dim)
        self.groups += by_image.shape[0] * by_image.shape[2]
        self.rows += len(x)
        self.within += by_image.var(1, correction=1).sum((0, 1))
        self.powers += torch.stack([x.sum(0), x.square().sum(0), x.pow(3).sum(0), x.pow(4).sum(0)])
        self.outer += x.mT @ x
        self.least = torch.minimum(self.least, x.amin(0))
        self.greatest = torch.maximum(self.greatest, x.amax(0))

    def compute(self) -> Health:
        """What the codes are like.

        Returns:
            `std_min`, `std_max`: least and greatest standard deviation of a channel, over images, tokens and draws.
            `noise_std_min`, `noise_std_mean`: least and mean standard deviation of a channel over noise draws of the same image.
            `noise_share_min`: least ratio, over channels, of the standard deviation over draws to that over everything.
            `eigenvalue_min`: smallest eigenvalue of the channel covariance.
            `eigenvalue_ratio`: smallest over mean eigenvalue.
            `kurtosis_max`: greatest kurtosis of a channel (3 for a Gaussian).
            `abs_z_max`: greatest distance of a value from its channel's mean, in standard deviations.

        Raises:
            DataError: no codes were counted, or some are not finite.
        """
        rows = float(self.rows)
        if rows == 0:
            raise DataError("no codes were counted: there is nothing to examine.")
        m1, m2, m3, m4 = self.powers / rows
        sigma = self.outer / rows - torch.outer(m1, m1)
        if not bool(torch.isfinite(sigma).all()):
            raise DataError("some codes are not finite: the compressor has diverged.")
        variance = sigma.diagonal().clamp_min(0)
        tiny = torch.finfo(torch.float64).tiny
        std = variance.sqrt()
        fourth = m4 - 4 * m1 * m3 + 6 * m1.square() * m2 - 3 * m1.pow(4)
        noise_std = (self.within / self.groups).sqrt()
        eigenvalues = torch.linalg.eigvalsh((sigma + sigma.mT) / 2)
        reach = torch.maximum(self.greatest - m1, m1 - self.least)
        varied = variance > 1e-14 * m2  # below that, the variance is rounding

        def over_std(x: Tensor, power: int) -> Tensor:
            return torch.where(varied, x / std.clamp_min(tiny ** (1 / 8)).pow(power), 0)

        return {
            "std_min": float(std.min()),
            "std_max": float(std.max()),
            "noise_std_min": float(noise_std.min()),
            "noise_std_mean": float(noise_std.mean()),
            "noise_share_min": float(over_std(noise_std, 1).min()),
            "eigenvalue_min": float(eigenvalues.min()),
            "eigenvalue_ratio": float(eigenvalues.min() / eigenvalues.mean().clamp_min(tiny)),
            "kurtosis_max": float(over_std(fourth, 4).max()),
            "abs_z_max": float(over_std(reach, 1).max()),
        }


def warnings_for(
    health: Mapping[str, float],
    *,
    noise_share: float = NOISE_STD_FLOOR,
    eigenvalue_ratio: float = EIGENVALUE_FLOOR,
    kurtosis: float = KURTOSIS_CEILING,
) -> list[str]:
    """What is unhealthy about codes, in words; empty if nothing is.

    Args:
        health: from `CodeHealth.compute`.
        noise_share: floor of `noise_share_min`.
        eigenvalue_ratio: floor of `eigenvalue_ratio`.
        kurtosis: ceiling of `kurtosis_max`.
    """
    found = []
    if health["noise_share_min"] < noise_share:
        found.append(
            f"a channel's std over noise draws is {health['noise_share_min']:.2g} of its std (floor {noise_share:g}): its code is nearly "
            "deterministic, and the likelihood of a flow on it is not bounded. Train with more noise, or use a smaller code_dim."
        )
    if health["eigenvalue_ratio"] < eigenvalue_ratio:
        found.append(
            f"the smallest eigenvalue of the code covariance is {health['eigenvalue_ratio']:.2g} of the mean "
            f"(floor {eigenvalue_ratio:g}): some combination of channels is nearly constant. Use a smaller code_dim."
        )
    if health["kurtosis_max"] > kurtosis:
        found.append(
            f"a channel's kurtosis is {health['kurtosis_max']:.3g} (ceiling {kurtosis:g}): rare values reach "
            f"{health['abs_z_max']:.3g} standard deviations, which a flow fits badly."
        )
    return found
