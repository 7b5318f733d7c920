"""norm2: the normalisation of the codes as an invertible first layer of the flow, with its log-determinant."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn

from srcflow.errors import ConfigError, ShapeError
from srcflow.nn.attention import without_autocast
from srcflow.registry import Recorded


class Normalization(nn.Module, metaclass=Recorded):
    """An invertible affine map per token, fitted once from the codes' moments under the flow's own noise; never trained.

    Args:
        channels: width d of a token.
    """

    fitted: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.register_buffer("fitted", torch.tensor(False))

    @abstractmethod
    def fit(self, mean: Tensor, covariance: Tensor) -> None:
        """Set the map from the mean (d,) and covariance (d, d) of the codes' channels over samples and positions, float64.

        Raises:
            ConfigError: a variance is zero or the covariance singular.
        """

    @abstractmethod
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """y (B, N, d) and the summed log-determinant (B,) in nats, at least float32, of x (B, N, d)."""

    @abstractmethod
    def inverse(self, y: Tensor) -> Tensor:
        """x (B, N, d) of y (B, N, d)."""

    def _check(self, mean: Tensor, covariance: Tensor) -> None:
        d = self.channels
        if mean.shape != (d,) or covariance.shape != (d, d):
            raise ShapeError(
                f"normalization.channels = {d}: the codes' mean is {tuple(mean.shape)} and their covariance {tuple(covariance.shape)}."
            )
        smallest = float(covariance.diagonal().min())
        if not smallest > 0:
            raise ConfigError(
                "flow.normalization",
                smallest,
                "a channel of the codes does not vary, so its density is infinite.",
                "Use fewer code channels, or more noise.",
            )


class ChannelNormalization(Normalization):
    """y = (x - mean) / std per channel (SRC-Flow's norm2, E13).

    Args:
        channels: width d of a token.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))

    def fit(self, mean: Tensor, covariance: Tensor) -> None:
        """See `Normalization.fit`."""
        self._check(mean, covariance)
        self.mean.copy_(mean)
        self.std.copy_(covariance.diagonal().sqrt())
        self.fitted.fill_(True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `Normalization.forward`."""
        dtype = torch.promote_types(x.dtype, self.std.dtype)
        y = (x.to(dtype) - self.mean) / self.std
        return y, -self.std.to(dtype).log().sum().mul(x.shape[1]).expand(x.shape[0])

    def inverse(self, y: Tensor) -> Tensor:
        """See `Normalization.inverse`."""
        return y * self.std + self.mean


class Whitening(Normalization):
    """y = L^-1 (x - mean) with L the Cholesky factor of the channels' covariance: full-covariance whitening (E13).

    Only L is stored; map, inverse and log-determinant are all derived from it, so they agree in any floating type.

    Args:
        channels: width d of a token.
    """

    mean: Tensor
    factor: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("factor", torch.eye(channels))

    def fit(self, mean: Tensor, covariance: Tensor) -> None:
        """See `Normalization.fit`."""
        self._check(mean, covariance)
        factor, failed = torch.linalg.cholesky_ex(covariance.double())
        if int(failed) or bool((factor.diagonal().square() <= 1e-10 * covariance.diagonal()).any()):
            raise ConfigError(
                "flow.normalization", "Whitening", "the codes' covariance is singular.", "Use fewer code channels, or more noise."
            )
        self.mean.copy_(mean)
        self.factor.copy_(factor)
        self.fitted.fill_(True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `Normalization.forward`."""
        dtype = torch.promote_types(x.dtype, self.factor.dtype)
        factor = self.factor.to(dtype)
        y = torch.linalg.solve_triangular(factor, (x.to(dtype) - self.mean).mT, upper=False).mT
        return y, -factor.diagonal().log().sum().mul(x.shape[1]).expand(x.shape[0])

    def inverse(self, y: Tensor) -> Tensor:
        """See `Normalization.inverse`."""
        with without_autocast(y):
            dtype = torch.promote_types(y.dtype, self.factor.dtype)
            return y.to(dtype) @ self.factor.to(dtype).T + self.mean
