"""The Frechet distance between two sets of feature vectors (Heusel et al., 2017, arXiv 1706.08500)."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from srcflow.errors import ConfigError, DataError, ShapeError
from srcflow.metrics.double_metric import DoubleMetric, valid_rows
from srcflow.metrics.non_finite import check_rows

SMALLEST_SAMPLE = 2048
"""Below so many vectors a Frechet distance is mostly bias and has to be asked for."""

ROUNDING = 1e-5
"""What rounding may have done to a reference covariance, as float32 does: how far it may be from symmetric, in units of its largest entry,
and its smallest eigenvalue below 0, in units of the largest. Eigenvalues below 0 count as 0."""

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


def load_reference(path: str | Path, dim: int | None = None, *, key: str = "reference") -> tuple[Tensor, Tensor]:
    """(mu, sigma), float64, from a reference file as ADM's evaluator writes it: an npz with the arrays `mu` (D,) and `sigma` (D, D).

    Args:
        path: the file.
        dim: width of the extractor that it is to be compared with; None: any.
        key: the configuration key that names the file, for messages.

    Raises:
        DataError: no such file, it is damaged or holds no such arrays, they are of another width, not finite, or sigma is not a covariance:
            not symmetric, or with eigenvalues below 0, by more than `ROUNDING`. Says the key, the file and the cure.
    """
    path = Path(path)
    start = f"{key} = {str(path)!r}:"
    if not os.path.isfile(path):  # unlike Path.is_file, it raises nothing
        raise DataError(f"{start} there is no file {path}. Name an npz with mu and sigma of the real images, or null for the test images.")
    cure = "Make it again from features of the real images (srcflow.metrics.frechet.save_reference), or write null for the test images."
    try:
        with path.open("rb") as opened:  # numpy leaves what it opened itself open if the file is damaged
            file = np.load(opened, allow_pickle=False)
            if isinstance(file, np.ndarray):
                raise TypeError("it holds a single array, as a .npy does.")
            found = {name: np.asarray(file[name]) for name in ("mu", "sigma")}
        if wrong := [f"{name} of {array.dtype}" for name, array in found.items() if array.dtype.kind not in "fiu"]:
            raise TypeError(f"it has {' and '.join(wrong)}, not of real numbers.")
        mu, sigma = (torch.from_numpy(array.astype(np.float64)) for array in found.values())
    except Exception as e:  # a damaged file lets numpy, zipfile and zlib raise nearly anything
        raise DataError(f"{start} is not an npz file with the arrays mu and sigma ({type(e).__name__}: {e}). {cure}") from e
    if mu.ndim != 1 or not len(mu) or sigma.shape != (len(mu), len(mu)):
        raise DataError(f"{start} mu has shape {tuple(mu.shape)} and sigma {tuple(sigma.shape)}; (D,) and (D, D) are wanted. {cure}")
    if dim is not None and len(mu) != dim:
        raise DataError(f"{start} is of features of width {len(mu)}, the extractor gives {dim}. Name a file of the same extractor.")
    if problem := _no_covariance(mu, sigma):
        raise DataError(f"{start} {problem} {cure}")
    return mu, sigma


def _no_covariance(mu: Tensor, sigma: Tensor) -> str | None:
    """Why these are not the moments of anything; None if they can be."""
    for name, values in (("mu", mu), ("sigma", sigma)):
        if bad := int((~values.isfinite()).sum()):
            return f"{bad} of the {values.numel()} numbers of {name} are not finite."
    largest = float(sigma.abs().max())
    skew = float((sigma - sigma.mT).abs().max())
    if skew > ROUNDING * largest:
        return f"sigma is not symmetric: it differs from its transpose by up to {skew:.3g}, its largest entry is {largest:.3g}."
    values = torch.linalg.eigvalsh((sigma + sigma.mT) / 2)
    if values[0] < -ROUNDING * values.abs().max():
        return f"sigma is not a covariance: it has the eigenvalue {float(values[0]):.3g} (the largest is {float(values[-1]):.3g})."
    return None


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


def check_counts(name: str, real: int | None, fake: int, wanted: int, *, lost_real: int = 0, lost_fake: int = 0) -> None:
    """Make sure that both sides of a distance are of as many images as its name says.

    Args:
        name: of the distance.
        real: vectors on the real side; None: it is a reference.
        fake: vectors on the other side.
        wanted: how many there should be on each.
        lost_real: how many of them were left out since they were not finite, and are counted and reported.
        lost_fake: likewise.

    Raises:
        DataError: there are more or fewer.
    """
    if fake + lost_fake != wanted or (real is not None and real + lost_real != wanted):
        sides = f"{fake} images" + ("" if real is None else f" with {real}")
        raise DataError(
            f"{name} compares {sides}, not {wanted} on either side: the data did not give every image exactly once. Look for a sampler, "
            "a limit or indices that leave some out."
        )


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
    real_count: Tensor
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
            DataError: it cannot be used; see `load_reference`.
        """
        if self.reference is not None:
            self._reference = load_reference(self.reference, self.dim, key="frechet.reference")

    def update(self, features: Tensor, real: bool = False, valid: Tensor | None = None) -> None:
        """Count a batch.

        Args:
            features: (B, D).
            real: whether they belong to the real side.
            valid: (B,) bool, False for rows that do not count.

        Raises:
            ShapeError: the width differs from `dim`.
            DataError: a row that counts is not finite; says on which side. No moment would mean anything with it.
        """
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise ShapeError(f"features have shape {tuple(features.shape)}; (B, {self.dim}) is wanted.")
        if real and self.reference is not None:
            raise DataError(f"the real side comes from {self.reference}; real features cannot be added to it.")
        (x,) = valid_rows(valid, self.to_state(features))
        side = "real" if real else "fake"
        check_rows(x, f"features of the {side} side", "Mark them as not valid, and report how many there were.")
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
