"""Pixels as features: flows directly on images, with true bits per dimension or under Gaussian noise."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from srcflow.autoencoders.base import Autoencoder
from srcflow.errors import ConfigError, ShapeError, one_of
from srcflow.nn.patchify import pair, patchify, unpatchify
from srcflow.noise import Dequantisation
from srcflow.types import Grid


class PixelPatches(Autoencoder):
    """Patches of pixels in [-1, 1], as TARFlow takes them (arXiv 2412.06329); nothing to train. There are two scales.

    `levels`, for likelihood: grey level k of L becomes 2 k / L - 1, and uniform noise of one level, [0, 2 / L), turns the discrete pixels
    into a density on [-1, 1) (E14). `decode` finds the grey level again, noise or not: it is exact on what `normalize` gives.

    `linear`, for flows under Gaussian noise: 2 x - 1 of images x in [0, 1], whatever their levels, and back. Published TARFlow models take
    noise of deviation 0.05 (64 px), 0.07 or 0.15 (128 px) in this unit; the noise must be named, and bits per dimension are not defined.

    Args:
        image_size: one number or [height, width], multiples of `patch_size`.
        patch_size: side p of a patch; tokens have channels * p * p numbers, channel slowest.
        levels: grey levels L, a power of two up to 256; 8-bit images are reduced to their leading bits. Of the scale "levels" only.
        channels: of the images.
        scale: "levels" (discrete grey levels) or "linear" (continuous).

    Raises:
        ConfigError: `image_size` is no multiple of `patch_size`, `levels` is no such power of two or goes with "linear", or there is no
            such scale.
    """

    def __init__(
        self,
        image_size: int | tuple[int, int],
        patch_size: int,
        levels: int = 256,
        channels: int = 3,
        scale: Literal["levels", "linear"] = "levels",
    ) -> None:
        super().__init__()
        self.image_size = pair(image_size, "image_size")
        if patch_size < 1 or any(s % patch_size for s in self.image_size):
            raise ConfigError("patch_size", patch_size, f"does not divide image_size = {self.image_size}.")
        one_of("scale", scale, ("levels", "linear"))
        if scale == "linear" and levels != 256:
            raise ConfigError("levels", levels, "the scale linear has no grey levels.", "Leave levels out, or write scale: levels.")
        if levels not in (2, 4, 8, 16, 32, 64, 128, 256):
            raise ConfigError("levels", levels, "must be a power of two from 2 to 256 (8-bit images).")
        self.patch_size, self.levels, self.channels, self.scale = patch_size, levels, channels, scale
        self.grid: Grid = (self.image_size[0] // patch_size, self.image_size[1] // patch_size)
        self.dim = channels * patch_size * patch_size
        self.pixel_density = scale == "levels"
        self.bin_width = 2 / levels if self.pixel_density else None

    @torch.no_grad()
    def features(self, images: Tensor) -> tuple[Tensor, Grid]:
        """See `Autoencoder.features`, at least float32; the scale "levels" takes images as 8-bit, x = k / 255.

        Raises:
            ShapeError: the images have another number of channels, or do not divide into patches.
        """
        if images.shape[1] != self.channels:
            raise ShapeError(f"images with {images.shape[1]} channels were given to PixelPatches with channels = {self.channels}.")
        x = images.to(torch.promote_types(images.dtype, torch.float32))
        if self.scale == "levels":
            grey = (x * 255).round().clamp(0, 255)
            scaled = (grey * (self.levels / 256)).floor() * (2 / self.levels) - 1
        else:
            scaled = 2 * x - 1
        height, width = images.shape[-2:]
        return patchify(scaled, self.patch_size, order="cpp"), (height // self.patch_size, width // self.patch_size)

    def normalize(self, raw: Tensor, noise: Tensor | None = None) -> Tensor:
        """See `Autoencoder.normalize`: the pixels are normalised already; the noise is added."""
        return raw if noise is None else raw + noise

    def decode(self, x: Tensor, grid: Grid | None = None) -> Tensor:
        """See `Autoencoder.decode`, at least float32.

        "levels": the grey level each number lies in, as k / (L - 1): a step function, no gradient passes. "linear": (x + 1) / 2.
        """
        tokens = x.to(torch.promote_types(x.dtype, torch.float32))
        shifted = tokens + 1
        pixels = (shifted * (self.levels / 2)).floor() / (self.levels - 1) if self.scale == "levels" else shifted / 2
        return unpatchify(pixels, self.patch_size, self.grid if grid is None else grid, order="cpp")

    def default_noise(self) -> Dequantisation | None:
        """Uniform noise of one grey level; None for the scale "linear", whose Gaussian noise is the run's to name."""
        return Dequantisation(self.levels) if self.scale == "levels" else None
