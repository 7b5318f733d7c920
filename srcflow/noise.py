"""Noise laws: how much noise a sample of features gets. Noise is an argument of the calls that take it, never a mode of a module.

The unit is the encoder's: raw tokens have unit RMS, and the noise is added before the latent statistics are applied (RAE's order,
docs/reference/equations.md E2).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from srcflow import randomness
from srcflow.errors import ConfigError
from srcflow.randomness import Indices
from srcflow.registry import Recorded


class Noise(metaclass=Recorded):
    """A law of additive noise. Members are listed by `srcflow plugins`."""

    @abstractmethod
    def sample(self, shape: Sequence[int], *, seed: int, purpose: str, step: int, indices: Indices) -> Tensor:
        """Noise (B, *shape), float32 on the CPU, ready to be added; row b is keyed by (seed, purpose, step, indices[b])."""


class Constant(Noise):
    """Gaussian noise of one level: what a flow is trained under (SRC-Flow: 0.4; STARFlow: 0.3).

    Args:
        sigma: standard deviation in units of the encoder's unit-RMS tokens.
    """

    def __init__(self, sigma: float = 0.4) -> None:
        if not 0 <= sigma < math.inf:
            raise ConfigError("noise.sigma", sigma, "a standard deviation is finite and not negative.")
        self.sigma = sigma

    def sample(self, shape: Sequence[int], *, seed: int, purpose: str, step: int, indices: Indices) -> Tensor:
        """See `Noise.sample`."""
        return randomness.normal(shape, seed=seed, purpose=purpose, step=step, indices=indices).mul_(self.sigma)


class Uniform(Noise):
    """Gaussian noise whose level is drawn per sample, sigma ~ U(0, maximum): RAE's and SRC's training noise (0.8).

    Args:
        maximum: upper end of the standard deviation's range.
    """

    def __init__(self, maximum: float = 0.8) -> None:
        if not 0 <= maximum < math.inf:
            raise ConfigError("noise.maximum", maximum, "a standard deviation is finite and not negative.")
        self.maximum = maximum

    def sample(self, shape: Sequence[int], *, seed: int, purpose: str, step: int, indices: Indices) -> Tensor:
        """See `Noise.sample`."""
        level = randomness.uniform((), seed=seed, purpose=purpose + ".level", step=step, indices=indices) * self.maximum
        eps = randomness.normal(shape, seed=seed, purpose=purpose, step=step, indices=indices)
        return eps.mul_(level.reshape(-1, *[1] * len(shape)))


class Dequantisation(Noise):
    """Uniform noise of one 8-bit grey level for images in [-1, 1): makes a density of discrete pixels (bits per dimension, E14).

    Args:
        levels: number of grey levels of the data.
    """

    def __init__(self, levels: int = 256) -> None:
        if levels < 2:
            raise ConfigError("noise.levels", levels, "images have at least two grey levels.")
        self.levels = levels

    def sample(self, shape: Sequence[int], *, seed: int, purpose: str, step: int, indices: Indices) -> Tensor:
        """See `Noise.sample`."""
        return randomness.uniform(shape, seed=seed, purpose=purpose, step=step, indices=indices).mul_(2.0 / self.levels)


def draw(noise: Noise | None, like: Tensor, *, seed: int, purpose: str, step: int, indices: Indices) -> Tensor | None:
    """Noise for a batch of features `like` (B, N, D), on its device, at least float32; None if there is no noise."""
    if noise is None:
        return None
    eps = noise.sample(like.shape[1:], seed=seed, purpose=purpose, step=step, indices=indices)
    return eps.to(like.device, torch.promote_types(like.dtype, torch.float32), non_blocking=True)
