"""Small encoders for the tests of losses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from srcflow.encoders.base import Encoder
from srcflow.types import Grid


class TokensOnly(Encoder):
    """Random convolution, no intermediates."""

    def __init__(self, dim: int = 8) -> None:
        super().__init__(dim, 4)
        self.conv = nn.Conv2d(3, dim, 4, stride=4)

    def tokens(self, images: Tensor) -> tuple[Tensor, Grid]:
        x = self.conv(images)
        return x.flatten(2).transpose(1, 2), (x.shape[2], x.shape[3])


class Pyramid(Encoder):
    """Two random convolutions whose outputs are the intermediates; counts the images it sees."""

    intermediate_dims = (8, 16)

    def __init__(self) -> None:
        super().__init__(16, 4)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1)
            self.second = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.loaded = False
        self.sizes: list[tuple[int, ...]] = []

    def setup(self) -> None:
        self.loaded = True

    def tokens(self, images: Tensor) -> tuple[Tensor, Grid]:
        x = self.second(self.first(images).relu())
        return x.flatten(2).transpose(1, 2), (x.shape[2], x.shape[3])

    def intermediates(self, images: Tensor) -> list[Tensor]:
        self.sizes.append(tuple(images.shape))
        shallow = self.first(images * 2 - 1).relu()
        return [shallow, self.second(shallow)]


@pytest.fixture
def pyramid() -> Pyramid:
    return Pyramid()


@pytest.fixture
def tokens_only() -> TokensOnly:
    torch.manual_seed(1)
    return TokensOnly()
