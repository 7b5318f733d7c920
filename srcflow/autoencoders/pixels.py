"""Pixels as features: flows directly on images, with true bits per dimension."""

from __future__ import annotations

import torch
from torch import Tensor

from srcflow.autoencoders.base import Autoencoder
from srcflow.errors import ConfigError, ShapeError
from srcflow.nn.patchify import pair, patchify, unpatchify
from srcflow.noise import Dequantisation
from srcflow.types import Grid


class PixelPatches(Autoencoder):
    """Patches of pixels in [-1, 1), as TARFlow takes them (arXiv 2412.06329); nothing to train.

    Grey level k of L becomes 2 k / L - 1, and uniform noise of one level, [0, 2 / L), turns the discrete pixels into a density on [-1, 1)
    (E14). `decode` finds the grey level again, noise or not: it is exact on what `normalize` gives.

    Args:
        image_size: one number or [height, width], multiples of `patch_size`.
        patch_size: side p of a patch; tokens have channels * p * p numbers, channel slowest.
        levels: grey levels L, a power of two up to 256; 8-bit images are reduced to their leading bits.
        channels: of the images.

    Raises:
        ConfigError: `image_size` is no multiple of `patch_size`, or `levels` is no such power of two.
    """

    pixel_density = True

    def __init__(self, image_size: int | tuple[int, int], patch_size: int, levels: int = 256, channels: int = 3) -> None:
        super().__init__()
        self.image_size = pair(image_size, "image_size")
        if patch_size < 1 or any(s % patch_size for s in self.image_size):
            raise ConfigError("patch_size", patch_size, f"does not divide image_size = {self.image_size}.")
        if levels not in (2, 4, 8, 16, 32, 64, 128, 256):
            raise ConfigError("levels", levels, "must be a power of two from 2 to 256 (8-bit images).")
        self.patch_size, self.levels, self.channels = patch_size, levels, channels
        self.grid: Grid = (self.image_size[0] // patch_size, self.image_size[1] // patch_size)
        self.dim = channels * patch_size * patch_size
        self.bin_width = 2 / levels

    @torch.no_grad()
    def features(self, images: Tensor) -> tuple[Tensor, Grid]:
        """See `Autoencoder.features`; images are taken as 8-bit, x = k / 255.

        Raises:
            ShapeError: the images have another number of channels, or do not divide into patches.
        """
        if images.shape[1] != self.channels:
            raise ShapeError(f"images with {images.shape[1]} channels were given to PixelPatches with channels = {self.channels}.")
        x = images.to(torch.promote_types(images.dtype, torch.float32))
        grey = (x * 255).round().clamp(0, 255)
        level = (grey * (self.levels / 256)).floor()
        height, width = images.shape[-2:]
        tokens = patchify(level * (2 / self.levels) - 1, self.patch_size, order="cpp")
        return tokens, (height // self.patch_size, width // self.patch_size)

    def normalize(self, raw: Tensor, noise: Tensor | None = None) -> Tensor:
        """See `Autoencoder.normalize`: the pixels are normalised already; the noise is added."""
        return raw if noise is None else raw + noise

    def decode(self, x: Tensor, grid: Grid | None = None) -> Tensor:
        """See `Autoencoder.decode`: the grey level each number lies in, as k / (L - 1). A step function: no gradient passes."""
        tokens = x.to(torch.promote_types(x.dtype, torch.float32))
        level = ((tokens + 1) * (self.levels / 2)).floor()
        return unpatchify(level / (self.levels - 1), self.patch_size, self.grid if grid is None else grid, order="cpp")

    def default_noise(self) -> Dequantisation:
        """Uniform noise of one grey level."""
        return Dequantisation(self.levels)
