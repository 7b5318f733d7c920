"""The contract of autoencoders: images to normalised features and back."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn

from srcflow.noise import Noise
from srcflow.registry import Recorded
from srcflow.types import Grid


class Autoencoder(nn.Module, metaclass=Recorded):
    """Images <-> normalised features. `decode(normalize(features(x)[0]), grid)` reconstructs x.

    Attributes:
        dim: feature width D.
        grid: nominal token grid (rows, columns): what `decode` and the next stages are built for.
        image_size: nominal image size (height, width) of `decode`'s output.
        pixel_density: True if features are an invertible image of the pixels, so bits per dimension are defined.
        bin_width: width of one grey level in units of the features, where `pixel_density`; None elsewhere.
    """

    dim: int
    grid: Grid
    image_size: tuple[int, int]
    pixel_density: bool = False
    bin_width: float | None = None

    def setup(self) -> None:
        """Load pretrained weights that the constructor names. Called once by a task that builds the autoencoder from its configuration."""

    @property
    def needs_statistics(self) -> bool:
        """Whether latent statistics still have to be fitted (`fit_statistics`) before `normalize` can be used."""
        return False

    @abstractmethod
    def features(self, images: Tensor) -> tuple[Tensor, Grid]:
        """Raw features (B, N, D) of images (B, 3, H, W) in [0, 1], and their grid; no gradient."""

    @torch.no_grad()
    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor | None, Grid]:
        """Mean (B, N, D) and standard deviation (B, N, D) of the raw features, and their grid; no gradient.

        The deviation is None where features are a function of the image; then the mean is `features`.
        """
        features, grid = self.features(images)
        return features, None, grid

    def feature_source(self) -> tuple[str, nn.Module]:
        """What determines `posterior`: the field of a feature store's manifest that it stands in, and the module whose specification and
        weights have to be the same for stored features to be those of this autoencoder.
        """
        return "autoencoder", self

    @abstractmethod
    def normalize(self, raw: Tensor, noise: Tensor | None = None) -> Tensor:
        """Normalised features (B, N, D): noise (B, N, D) is added to the raw features, then the latent statistics are applied (E2)."""

    @abstractmethod
    def decode(self, x: Tensor, grid: Grid | None = None) -> Tensor:
        """Images (B, 3, H, W) of nominal range [0, 1], not clamped, from normalised features (B, N, D)."""

    def default_noise(self) -> Noise | None:
        """The noise a flow on these features is meant to be trained under, if the autoencoder determines it (dequantisation for pixels)."""
        return None

    def noise_scale(self) -> Tensor | float:
        """By how much `normalize` scales noise that was added to the raw features: a number, or (N, D) per position and channel.

        A member whose `normalize` multiplies must say by what; one whose `normalize` is not affine, element by element, has no such scale.
        """
        return 1.0

    def last_layer(self) -> nn.Parameter | None:
        """The parameter at which the adaptive weight of an adversarial loss compares gradient norms; None if nothing is trained."""
        return None
