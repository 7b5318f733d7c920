"""An autoencoder whose features have a deviation."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from srcflow.autoencoders.base import Autoencoder
from srcflow.types import Grid


class HalfMeans(Autoencoder):
    """Means of the two halves of an image, times a weight that `setup` gives; dropout would show outside of eval mode."""

    dim, grid, image_size = 3, (1, 2), (16, 16)

    def __init__(self, deviation: float = 0.25) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.encoder = nn.Dropout()  # a name that says nothing
        self.deviation = deviation

    def setup(self) -> None:
        with torch.no_grad():
            self.weight.fill_(2.0)

    @torch.no_grad()
    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor | None, Grid]:
        halves = self.encoder(F.adaptive_avg_pool2d(images, (1, 2)).flatten(2).mT * self.weight)
        return halves, torch.full_like(halves, self.deviation), (1, 2)

    def features(self, images: Tensor) -> tuple[Tensor, Grid]:
        mean, _, grid = self.posterior(images)
        return mean, grid

    def normalize(self, raw: Tensor, noise: Tensor | None = None) -> Tensor:
        return raw if noise is None else raw + noise

    def decode(self, x: Tensor, grid: Grid | None = None) -> Tensor:
        return F.interpolate(x.mT.unflatten(-1, (1, 2)), size=self.image_size)
