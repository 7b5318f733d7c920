"""An encoder without training."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from srcflow import randomness
from srcflow.encoders.base import Encoder
from srcflow.errors import ConfigError, ShapeError
from srcflow.types import Grid


class PatchProjection(Encoder):
    """Random projections of patches: a token is a fixed linear image of its patch.

    Args:
        dim: feature width D.
        patch_size: side of a patch in pixels.
        image_size: side that images are resized to, a multiple of the patch; null: as they come.
        seed: of the projection.
    """

    def __init__(self, dim: int = 24, patch_size: int = 8, image_size: int | None = None, seed: int = 0) -> None:
        if image_size is not None and image_size % patch_size:
            raise ConfigError("encoder.image_size", image_size, f"is no multiple of encoder.patch_size = {patch_size}.")
        super().__init__(dim, patch_size, input_size=None if image_size is None else (image_size, image_size))
        self.project = nn.Conv2d(3, dim, patch_size, stride=patch_size, bias=False)
        rows = randomness.normal((3, patch_size, patch_size), seed=seed, purpose="PatchProjection", step=0, indices=range(dim))
        with torch.no_grad():
            self.project.weight.copy_(rows / rows.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1))

    def tokens(self, images: Tensor) -> tuple[Tensor, Grid]:
        """See `Encoder.tokens`."""
        if images.shape[-2] % self.patch_size or images.shape[-1] % self.patch_size:
            raise ShapeError(f"images of {tuple(images.shape[-2:])} pixels cannot be cut into patches of {self.patch_size}.")
        x = self.project(images)
        return x.flatten(2).transpose(1, 2), (int(x.shape[2]), int(x.shape[3]))
