"""The Frechet distance between two sets of feature vectors (Heusel et al., 2017, arXiv 1706.08500)."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from srcflow.errors import ConfigError, DataError, ShapeError
from srcflow.metrics.double_metric import DoubleMetric, valid_rows

SMALLEST_SAMPLE = 2048
"""Below so many vectors a Frechet distance is mostly bias and has to be asked for."""

FULL_SAMPLE = 50_000
"""A distance of at least so many samples carries no number in its name."""


def frechet_distance(mu1: Tensor, sigma1: Tensor, mu2: Tensor, sigma2: Tensor) -> Tensor:
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)), in float64.

    The trace of the root is the nuclear norm of sigma1^(1/2) sigma2^(1/2), whose factors come from symmetric eigendecompositions: nothing
    can fail to converge or turn complex, and singular covariances (fewer samples than dimensions) are fine.

    Args:
        mu1: mean (D,).
        sigma1: covariance (D, D).
        mu2: mean (D,).
        sigma2: covariance (D, D).

    Returns:
        A float64 scalar, at least 0.

    Raises:
        ShapeError: the dimensions differ.
        DataError: a moment is not finite.
    """
    d = mu1.shape[0]
    if mu1.shape != mu2.shape or sigma1.shape != (d, d) or sigma2.shape != (d, d):
        raise ShapeError(
            f"moments of shapes {tuple(mu1.shape)}, {tuple(sigma1.shape)} and {tuple(mu2.shape)}, {tuple(sigma2.shape)} do not match."
        )
    mu1, sigma1, mu2, sigma2 = (t.to(torch.float64) for t in (mu1, sigma1, mu2, sigma2))
    if not all(bool(torch.isfinite(t).all()) for t in (mu1, sigma1, mu2, sigma2)):
        raise DataError("the moments of a Frechet distance are not finite: some features were NaN or infinite.")
    root = torch.linalg.svdvals(_symmetric_root(sigma1) @ _symmetric_root(sigma2)).sum()
    distance = (mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * root
    bounded: Tensor = distance.clamp_min(0)
    return bounded  # the exact value is not negative; rounding can leave -1e-13 for equal sets


def _symmetric_root(sigma: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh((sigma + sigma.mT) / 2)
    rounding = len(values) * torch.finfo(values.dtype).eps * values.abs().max()  # a root would lift 1e-16 to 1e-8
    return (vectors * torch.where(values > rounding, values, 0).sqrt()) @ vectors.mT  # type: ignore[no-any-return]  # torch is untyped here


def load_reference(path: str | Path) -> tuple[Tensor, Tensor]:
    """(mu, sigma), float64, from a reference file as ADM's evaluator writes it: an npz with the arrays `mu` (D,) and `sigma` (D, D).

    Raises:
        DataError: no such file, or it holds no such arrays.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"reference moments: there is no file {path}.")
    try:
        with np.load(path, allow_pickle=False) as file:
            mu, sigma = (torch.from_numpy(np.asarray(file[k], dtype=np.float64)) for k in ("mu", "sigma"))
    except (KeyError, ValueError, OSError) as e:
        raise DataError(f"reference moments: {path} is not an npz file with the arrays mu and sigma: {e}") from e
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        raise DataError(
            f"reference moments: in {path}, mu has shape {tuple(mu.shape)} and sigma {tuple(sigma.shape)}; (D,) and (D, D) are wanted."
        )
    return mu, sigma


def save_reference(path: str | Path, mu: Tensor, sigma: Tensor) -> None:
    """Write (mu, sigma) in the format that `load_reference` and ADM's evaluator read."""
    with Path(path).open("wb") as file:  # a file object: numpy would append .npz to another name
        np.savez(file, mu=mu.double().cpu().numpy(), sigma=sigma.double().cpu().numpy())


def sized_name(prefix: str, samples: int) -> str:
    """The name under which a distance of so many samples is reported.

    >>> sized_name("gfid", 50_000), sized_name("gfid", 10_000), sized_name("rfid", 2_048)
    ('gfid', 'gfid_10k', 'rfid_2048')
    """
    if samples >= FULL_SAMPLE:
        return prefix
    return f"{prefix}_{samples // 1000}k" if samples % 1000 == 0 and samples else f"{prefix}_{samples}"


class FrechetDistance(DoubleMetric):
    """Streaming Frechet distance of features that somebody else extracts.

    Count, sum and sum of outer products are kept in float64, so the result does not depend on batch size, order or rank count (to 1e-9
    relative), nor on the run's precision; covariances are unbiased (N - 1). The other side is either a reference file or
    `update(..., real=True)`.

    Args:
        dim: feature width D.
        reference: npz file with mu and sigma of the real side (read by `setup`), or None to accumulate the real side.
        small_sample: allow fewer than 2048 vectors on a side, where the distance is dominated by its bias and compares only with others
            of the same N and extractor.
        keep_real: `reset` leaves the real side as it is.
        kwargs: torchmetrics' own (synchronisation).
    """

    higher_is_better = False
    is_differentiable = False
    fake_count: Tensor

    def __init__(self, dim: int, reference: str | None = None, small_sample: bool = False, keep_real: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if dim < 1:
            raise ConfigError("frechet.dim", dim, "a feature width is positive.")
        self.dim, self.reference, self.small_sample, self.keep_real = dim, reference, small_sample, keep_real
        self._reference: tuple[Tensor, Tensor] | None = None
        for side in ("real", "fake"):
            self.add_sum(f"{side}_count")
            self.add_sum(f"{side}_sum", dim)
            self.add_sum(f"{side}_outer", dim, dim)

    def setup(self) -> None:
        """Read the reference file, if there is one.

        Raises:
            DataError: it is missing or damaged.
            ShapeError: it was made with an extractor of another width.
        """
        if self.reference is not None:
            mu, sigma = load_reference(self.reference)
            if len(mu) != self.dim:
                raise ShapeError(f"frechet.reference = {self.reference} has features of width {len(mu)}, the extractor {self.dim}.")
            self._reference = mu, sigma

    def update(self, features: Tensor, real: bool = False, valid: Tensor | None = None) -> None:
        """Count a batch.

        Args:
            features: (B, D).
            real: whether they belong to the real side.
            valid: (B,) bool, False for rows that do not count.

        Raises:
            ShapeError: the width differs from `dim`.
        """
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise ShapeError(f"features have shape {tuple(features.shape)}; (B, {self.dim}) is wanted.")
        if real and self.reference is not None:
            raise DataError(f"the real side comes from {self.reference}; real features cannot be added to it.")
        (x,) = valid_rows(valid, self.to_state(features))
        side = "real" if real else "fake"
        getattr(self, f"{side}_count").add_(x.shape[0])
        getattr(self, f"{side}_sum").add_(x.sum(0))
        getattr(self, f"{side}_outer").add_(x.mT @ x)

    def compute(self) -> Tensor:
        """The distance, a float64 scalar on the states' device.

        Raises:
            DataError: too few vectors.
        """
        fake = self.moments(real=False)
        real = self.moments(real=True)
        return frechet_distance(*fake, *(t.to(fake[0].device) for t in real))

    def moments(self, real: bool) -> tuple[Tensor, Tensor]:
        """(mu (D,), sigma (D, D)), float64, of one side as this rank has it (of all ranks inside `compute`).

        Raises:
            DataError: too few vectors.
        """
        if real and self.reference is not None:
            if self._reference is None:
                raise ConfigError("frechet.reference", self.reference, "has not been read.", "Call setup() first.")
            return self._reference
        side = "real" if real else "fake"
        n = int(getattr(self, f"{side}_count"))
        least = 2 if self.small_sample else SMALLEST_SAMPLE
        if n < least:
            ask = "" if self.small_sample else " Set small_sample: true to have it anyway, under a name with its sample count."
            raise DataError(f"a Frechet distance of {n} {side} samples; at least {least} are needed.{ask}")
        if n <= self.dim and not self.small_sample:
            warnings.warn(f"{n} {side} samples of {self.dim} features: the covariance is singular and the distance biased.", stacklevel=2)
        mean = getattr(self, f"{side}_sum") / n
        sigma = (getattr(self, f"{side}_outer") - n * torch.outer(mean, mean)) / (n - 1)
        return mean, sigma

    @property
    def samples(self) -> int:
        """Vectors on the generated side, on this rank."""
        return int(self.fake_count)

    def reset(self) -> None:
        """Forget both sides, or the generated one only if `keep_real`."""
        kept = {k: getattr(self, k) for k in self._defaults if k.startswith("real_")} if self.keep_real else {}
        super().reset()
        for name, value in kept.items():
            setattr(self, name, value)
