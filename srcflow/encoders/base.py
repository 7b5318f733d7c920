"""The contract of encoders: frozen networks that turn images into tokens of unit RMS."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from srcflow.errors import DataError
from srcflow.registry import Recorded
from srcflow.types import Grid


class Encoder(nn.Module, metaclass=Recorded):
    """A frozen image encoder. A third party implements `__init__` (which touches no file), `tokens`, and `setup` if it has weights to load.

    `forward` resizes, normalises, calls `tokens` and applies a LayerNorm without affine over the channels, so every token has mean 0 and
    RMS 1: noise levels mean the same for every encoder. Submodules and parameters are frozen as soon as they are assigned, and the module
    stays in eval mode whatever it is told; gradients still pass to the input images.

    Attributes:
        dim: feature width D.
        patch_size: side of a token in input pixels (after the encoder's own resizing).
        mean, std: (3,) normalisation of RGB images in [0, 1].
        input_size: the size images are resized to, (height, width), or None to take them as they come.
        norm_eps: epsilon of the final LayerNorm.
    """

    dim: int
    patch_size: int
    mean: Tensor
    std: Tensor
    input_size: tuple[int, int] | None = None
    norm_eps: float = 1e-6

    def __init__(
        self,
        dim: int,
        patch_size: int,
        mean: tuple[float, ...] = (0.5, 0.5, 0.5),
        std: tuple[float, ...] = (0.5, 0.5, 0.5),
        input_size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.patch_size, self.input_size = dim, patch_size, input_size
        self.register_buffer("mean", torch.tensor(mean), persistent=True)
        self.register_buffer("std", torch.tensor(std), persistent=True)
        self.train(False)

    @abstractmethod
    def tokens(self, images: Tensor) -> tuple[Tensor, Grid]:
        """Tokens (B, N, D) in row-major order without prefix tokens, and their grid, from resized and normalised images (B, 3, H, W).

        The final LayerNorm is applied by `forward`.
        """

    def setup(self) -> None:
        """Load pretrained weights. Called once by a task before training; never called on a module restored from an artifact.

        Raises:
            ConfigError: the weights' file is missing or does not fit.
        """

    def forward(self, images: Tensor) -> tuple[Tensor, Grid]:
        """Features of images.

        Args:
            images: (B, 3, H, W) in [0, 1], any size.

        Returns:
            (B, N, D) tokens with mean 0 and RMS 1 over the channels, at least float32, and their grid (h, w), N = h * w.

        Raises:
            DataError: the images are integers.
        """
        x, grid = self.tokens(self.prepare(images))
        dtype = torch.promote_types(x.dtype, torch.float32)
        return F.layer_norm(x.to(dtype), (self.dim,), eps=self.norm_eps), grid

    def prepare(self, images: Tensor) -> Tensor:
        """Resized (to `input_size`) and normalised images, as `tokens` takes them, from images (B, 3, H, W) in [0, 1]."""
        if not images.is_floating_point():
            raise DataError(f"{type(self).__name__} takes images as floats in [0, 1], got {images.dtype}; divide by 255.")
        if self.input_size is not None and tuple(images.shape[-2:]) != tuple(self.input_size):
            # RAE's preprocessing: bicubic, no antialias, no clamp (E1)
            images = F.interpolate(images, size=self.input_size, mode="bicubic", align_corners=False)
        shape = (1, -1, 1, 1)
        return (images - self.mean.reshape(shape)) / self.std.reshape(shape)

    def __setattr__(self, name: str, value: Any) -> None:
        """Freeze what is assigned, so that no constructor can forget to."""
        if isinstance(value, nn.Module):
            value.train(False).requires_grad_(False)
        elif isinstance(value, nn.Parameter):
            value.requires_grad_(False)
        super().__setattr__(name, value)

    def train(self, mode: bool = True) -> Encoder:
        """Stay in eval mode and frozen, whatever `mode` says."""
        super().train(False)
        for p in self.parameters():
            p.requires_grad_(False)
        return self
