"""Likelihoods in the units they are reported in, and the Gaussian that a flow has to beat.

Two names for two things: `nll` is in nats per dimension of the compact space, of the noisy code; `bits_per_dim` is for pixel models only,
and is that of the discrete pixels.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from srcflow.errors import ConfigError, DataError, ShapeError
from srcflow.statistics import Moments


def nll_per_dim(log_prob: Tensor, dims: int) -> Tensor:
    """Negative log-likelihood in nats per dimension, of the shape of `log_prob`, at least float32.

    >>> nll_per_dim(torch.tensor([-8.0]), dims=4)
    tensor([2.])

    Args:
        log_prob: log-density in nats, summed over dimensions.
        dims: number of dimensions, e.g. N * d of the codes.

    Raises:
        ConfigError: no dimensions.
    """
    if dims < 1:
        raise ConfigError("dims", dims, "a density has at least one dimension.")
    return -log_prob.to(torch.promote_types(log_prob.dtype, torch.float32)) / dims


def bits_per_dim(log_prob: Tensor, dims: int, *, bin_width: float) -> Tensor:
    """Bits per dimension of discrete pixels from the density of dequantised ones: an upper bound (Theis et al., arXiv 1511.01844).

    A pixel's probability is its density times the width of a grey level, in the units that the density is of: `2 / 256` for 8-bit images
    scaled to [-1, 1), which adds 7 bits; `1 / 256` for [0, 1), which adds 8. Every later change of scale (a normalisation's
    log-determinant) must already be part of `log_prob`.

    >>> bits_per_dim(torch.tensor([-12.0 * math.log(2.0)]), dims=12, bin_width=1 / 256)  # log-density of a uniform on [0, 2)^12
    tensor([9.])

    Args:
        log_prob: log-density in nats of the dequantised image, summed over dimensions.
        dims: 3 * H * W.
        bin_width: width of one grey level.

    Raises:
        ConfigError: no dimensions, or a width that is not positive.
    """
    if not bin_width > 0:
        raise ConfigError("bin_width", bin_width, "a grey level has a positive width.", "Write 2 / 256 for 8-bit images in [-1, 1).")
    return nll_per_dim(log_prob, dims) / math.log(2) - math.log2(bin_width)


class GaussianBaseline:
    """The Gaussian of largest likelihood for a stream of noisy codes: the least that a flow on them must beat.

    Fitted in float64 without shrinkage or ridge. Fit it on training codes and evaluate it on held-out ones, under the noise seeds that the
    flow is evaluated under.

    Args:
        tokens: N.
        code_dim: d.
        kind: "full", one covariance over all N * d dimensions (needs more samples than dimensions), or "token", one over the d channels of
            every token, all tokens alike and independent.
    """

    def __init__(self, tokens: int, code_dim: int, kind: Literal["full", "token"] = "full") -> None:
        if kind not in ("full", "token"):
            raise ConfigError("gaussian.kind", kind, "no such Gaussian.", "Known: full, token.")
        if tokens < 1 or code_dim < 1:
            raise ConfigError("gaussian.tokens/code_dim", (tokens, code_dim), "codes have at least one token and one channel.")
        self.tokens, self.code_dim, self.kind = tokens, code_dim, kind
        self._moments = Moments(self.width, covariance=True)
        self._mean: Tensor | None = None
        self._cholesky: Tensor | None = None

    @property
    def dims(self) -> int:
        """Dimensions of one code, N * d."""
        return self.tokens * self.code_dim

    @property
    def width(self) -> int:
        """Side of the covariance."""
        return self.dims if self.kind == "full" else self.code_dim

    def update(self, codes: Tensor, valid: Tensor | None = None) -> None:
        """Add noisy training codes (B, N, d); `valid` (B,) bool marks the rows that count. `fit` must be called afterwards.

        Raises:
            ShapeError: not codes of this size.
        """
        self._moments.update(self._rows(codes), valid)
        self._mean = self._cholesky = None

    def fit(self) -> GaussianBaseline:
        """Compute the Gaussian of everything seen so far, on all ranks (every rank must call it).

        Raises:
            DataError: the covariance is singular, for want of samples or because the codes lie in a subspace.
        """
        moments = self._moments.all_reduced()
        sigma = moments.covariance
        seen = moments.count
        if seen <= self.width:
            raise DataError(
                f"a full covariance over {self.width} dimensions needs more than {self.width} samples, not {seen}. "
                "Fit on more codes, or use kind: token."
            )
        factor, failed = torch.linalg.cholesky_ex(sigma)
        # rounding can let a singular matrix pass: its pivots are then of the size of rounding errors
        pivots = factor.diagonal()
        if int(failed) or bool((pivots.square() <= 1e-13 * sigma.diagonal()).any()):
            raise DataError(
                f"the covariance of {seen} codes over {self.width} dimensions is singular: some combination of channels is "
                "constant, and no density exists. Add noise to the features, or drop channels that carry nothing."
            )
        self._mean, self._cholesky = moments.mean, factor
        return self

    def log_prob(self, codes: Tensor) -> Tensor:
        """Log-density in nats, (B,) float64, of codes (B, N, d).

        Raises:
            ShapeError: not codes of this size.
            DataError: `fit` was not called after the last `update`.
        """
        if self._mean is None or self._cholesky is None:
            raise DataError("the Gaussian baseline has not been fitted: call fit() after the last update().")
        x = self._rows(codes).to(self._mean.device, torch.float64)
        factor, shape = self._cholesky, x.shape[:-1]
        white = torch.linalg.solve_triangular(factor, (x - self._mean).reshape(-1, self.width).mT, upper=False)
        constant = 0.5 * self.width * math.log(2 * math.pi) + factor.diagonal().log().sum()
        density = (-0.5 * white.square().sum(0) - constant).reshape(shape)
        return density if self.kind == "full" else density.sum(-1)  # type: ignore[no-any-return]  # torch is untyped here

    def nll(self, codes: Tensor) -> Tensor:
        """Negative log-likelihood in nats per dimension, (B,) float64; raises as `log_prob` does."""
        return nll_per_dim(self.log_prob(codes), self.dims)

    def _rows(self, codes: Tensor) -> Tensor:
        """(B, N * d) or (B, N, d), by `kind`."""
        if codes.ndim != 3 or tuple(codes.shape[1:]) != (self.tokens, self.code_dim):
            raise ShapeError(f"codes have shape {tuple(codes.shape)}; (B, {self.tokens}, {self.code_dim}) is wanted.")
        return codes.flatten(1) if self.kind == "full" else codes
