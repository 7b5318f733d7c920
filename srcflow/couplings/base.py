"""The contract of couplings: weightless invertible maps of one token, given its parameters."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from srcflow.registry import Recorded
from srcflow.types import AffineParams


class Coupling(metaclass=Recorded):
    """An invertible map x -> z whose parameters a causal network predicts. Weightless and size-free, so YAML names it without sizes.

    All-zero parameters are the identity. Nothing outside a coupling's own file assumes that it acts element by element: a token's channels
    may be mixed, as long as the map of token i depends on its own channels and parameters only.

    Attributes:
        params_per_channel: how many parameters the network predicts for each channel (p).
        scale_rows: which of the p parameters are log-scales: what a soft clip of the log-scale touches.
    """

    params_per_channel: int
    scale_rows: tuple[int, ...] = ()

    @abstractmethod
    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Data to noise.

        Args:
            x: (B, m, d).
            params: (B, m, p, d).

        Returns:
            z (B, m, d) and log|dz/dx| per element (B, m, d) in nats, at least float32. A map that mixes channels may put its
            log-determinant in any of the token's elements; only the sum is used.
        """

    @abstractmethod
    def inverse(self, z: Tensor, params: Tensor) -> Tensor:
        """Noise (B, m, d) to data (B, m, d) with the same parameters."""

    def affine(self, params: Tensor) -> AffineParams | None:
        """The elementwise affine view u = z * exp(log_scale) + shift that guidance works on; None if the map is not of that form."""
        return None
