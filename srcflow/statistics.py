"""Exact streaming statistics in float64: the same for any batch size, order and number of ranks (to 1e-10 relative).

Running averages with a momentum, as published code uses for latent statistics, depend on batch size and order; these do not. Batches are
merged by the pairwise update of Chan, Golub and LeVeque (1979), which never subtracts two large sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

from srcflow.errors import ConfigError, DataError, ShapeError

EpsConvention = Literal["variance", "std"]
"""Where a normalisation adds its epsilon: sqrt(var + eps) (RAE) or sqrt(var) + eps (diffusers)."""


class Moments:
    """Mean and variance, or mean and full covariance, of a stream of samples.

    `shape` is the shape of one sample; every leading axis of what `update` gets counts samples. So `Moments(D)` fed with (B, N, D) gives
    statistics per channel, `Moments((N, D))` statistics per position and channel, `Moments(D, covariance=True)` the (D, D) covariance.

    >>> moments = Moments(1)
    >>> moments.update(torch.tensor([[1.0], [2.0], [6.0]]))
    >>> moments.count, moments.mean.item(), round(moments.var.item(), 6)
    (3, 3.0, 4.666667)

    Args:
        shape: shape of one sample, or its width.
        covariance: also keep the full covariance; for samples with one axis.
    """

    def __init__(self, shape: int | Sequence[int], covariance: bool = False) -> None:
        self.shape: tuple[int, ...] = (shape,) if isinstance(shape, int) else tuple(shape)
        if covariance and len(self.shape) != 1:
            raise ConfigError("shape", self.shape, "a covariance is kept for samples with one axis.", "Give the number of channels.")
        self.has_covariance = covariance
        self.count = 0
        self._mean = torch.zeros(self.shape, dtype=torch.float64, device="cpu")
        # sum of squared (or of products of) deviations from the mean
        self._m2 = torch.zeros(self.shape * 2 if covariance else self.shape, dtype=torch.float64, device="cpu")

    @torch.no_grad()
    def update(self, x: Tensor, valid: Tensor | None = None) -> None:
        """Add samples.

        Args:
            x: (..., *shape) of any floating or integer type; sums are kept on its device where that has float64.
            valid: (B,) bool, False for rows of the first axis that must not count.

        Raises:
            ShapeError: the last axes of `x` are not `shape`.
        """
        k = len(self.shape)
        if x.ndim < k or tuple(x.shape[x.ndim - k :]) != self.shape:
            raise ShapeError(f"samples of shape (..., {', '.join(map(str, self.shape))}) were expected, got {tuple(x.shape)}.")
        if valid is not None:
            x = x[valid.to(x.device)]
        rows = (x.cpu() if x.device.type == "mps" else x).reshape(-1, *self.shape).to(torch.float64)
        if rows.shape[0] == 0:
            return
        mean = rows.mean(0)
        rows = rows - mean
        residue = rows.mean(0)  # what rounding left of the mean (corrected two-pass algorithm)
        rows = rows - residue
        self._merge(rows.shape[0], mean + residue, rows.T @ rows if self.has_covariance else (rows * rows).sum(0))

    def merge(self, other: Moments) -> None:
        """Add the samples that `other` has seen.

        Raises:
            ShapeError: the two do not keep the same statistics.
        """
        if (self.shape, self.has_covariance) != (other.shape, other.has_covariance):
            raise ShapeError(f"moments of {other.shape} (covariance: {other.has_covariance}) cannot be added to moments of {self.shape}.")
        self._merge(other.count, other._mean, other._m2)

    def _merge(self, count: int, mean: Tensor, m2: Tensor) -> None:
        if count == 0:
            return
        if self._mean.device != mean.device:
            self._mean, self._m2 = self._mean.to(mean.device), self._m2.to(mean.device)
        total = self.count + count
        delta = mean - self._mean
        self._m2 = self._m2 + m2 + self._outer(delta) * (self.count * (count / total))
        self._mean = self._mean + delta * (count / total)
        self.count = total

    def _outer(self, x: Tensor) -> Tensor:
        return torch.outer(x, x) if self.has_covariance else x * x

    @torch.no_grad()
    def all_reduced(self) -> Moments:
        """The moments of all ranks' samples together, equal on every rank; without a process group, a copy. Every rank must call it."""
        out = Moments(self.shape, self.has_covariance)
        out.count, out._mean, out._m2 = self.count, self._mean.clone(), self._m2.clone()
        if not (dist.is_available() and dist.is_initialized()):
            return out
        device = torch.device("cuda", torch.cuda.current_device()) if "nccl" in dist.get_backend() else torch.device("cpu")
        mean, m2 = out._mean.to(device), out._m2.to(device)
        count = torch.tensor([self.count], dtype=torch.int64, device=device)
        dist.all_reduce(count)
        out.count = int(count.item())
        # one rank's mean is the origin for all, so that no large numbers are subtracted
        origin = mean.clone() if self.count else torch.zeros_like(mean)
        holder = torch.tensor([dist.get_rank() if self.count else dist.get_world_size()], dtype=torch.int64, device=device)
        dist.all_reduce(holder, op=dist.ReduceOp.MIN)
        if out.count == 0:
            return out
        dist.broadcast(origin, src=int(holder.item()))
        share = (mean - origin) * (self.count / out.count)
        dist.all_reduce(share)
        out._mean = origin + share
        out._m2 = m2 + self._outer(mean - out._mean) * self.count
        dist.all_reduce(out._m2)
        return out

    @property
    def mean(self) -> Tensor:
        """(*shape) float64. Raises DataError if nothing was seen, or a value was not finite."""
        return self._finite(self._mean)

    @property
    def var(self) -> Tensor:
        """(*shape) float64, biased (divided by the count): RAE's convention. Raises DataError as `mean` does."""
        return self._finite(self._m2.diagonal() if self.has_covariance else self._m2) / self.count

    @property
    def covariance(self) -> Tensor:
        """(D, D) float64, biased, symmetric. Raises DataError as `mean` does, ConfigError if no covariance is kept."""
        if not self.has_covariance:
            raise ConfigError("covariance", False, "these moments keep no covariance.", "Build them with covariance=True.")
        m2 = self._finite(self._m2)
        return (m2 + m2.T) / (2 * self.count)

    def _finite(self, x: Tensor) -> Tensor:
        if self.count == 0:
            raise DataError("statistics of no samples: nothing was added to these moments.")
        if not bool(torch.isfinite(x).all()):
            raise DataError(f"statistics over {self.count} samples are not finite: the data held nan or inf.")
        return x


class PrincipalComponents(NamedTuple):
    """A principal component analysis, float64 on the CPU; largest variance first."""

    mean: Tensor  # (D,)
    components: Tensor  # (k, D), orthonormal rows
    variances: Tensor  # (k,)
    total: float  # the variance of all D components together

    @property
    def explained(self) -> float:
        """Share of the variance that the k components keep."""
        return float(self.variances.sum()) / self.total if self.total > 0 else 1.0


def principal_components(moments: Moments, k: int) -> PrincipalComponents:
    """The k leading principal components. Signs are fixed (each component's largest entry in absolute value is positive).

    Args:
        moments: of D channels, with covariance.
        k: how many components, 1 <= k <= D.

    Raises:
        ConfigError: k is out of range, or no covariance was kept.
        DataError: the moments are empty or not finite.
    """
    (dim,) = moments.shape if len(moments.shape) == 1 else (0,)
    covariance = moments.covariance.cpu()
    if not 1 <= k <= dim:
        raise ConfigError("code_dim", k, f"features of width {dim} have 1 to {dim} principal components.")
    variances, vectors = torch.linalg.eigh(covariance)
    variances, vectors = variances.flip(0).clamp_min(0), vectors.flip(1).T
    largest = vectors.abs().argmax(1, keepdim=True)
    components = vectors * vectors.gather(1, largest).sign()
    return PrincipalComponents(moments.mean.cpu(), components[:k].contiguous(), variances[:k].clone(), float(variances.sum()))


def scale(var: Tensor, eps: float, convention: EpsConvention = "variance") -> Tensor:
    """What a normalisation divides by: sqrt(var + eps) for "variance", sqrt(var) + eps for "std". Same type and shape as `var`."""
    if convention == "variance":
        return (var + eps).sqrt()
    if convention == "std":
        return var.sqrt() + eps
    raise ConfigError("eps_convention", convention, "no such convention.", "Known: variance, std.")
