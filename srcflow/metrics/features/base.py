"""The contract of feature extractors: networks that judge images, never the one that made the codes."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor, nn

from srcflow.registry import Recorded


class Extractor(nn.Module, metaclass=Recorded):
    """Images -> one feature vector each, for Frechet distances.

    Attributes:
        name: what the number is called in reports, e.g. "inception-v3-compat" or "EfficientNetLite(lite1)"; two different networks or
            preprocessings never share a name.
        dim: feature width.
    """

    name: str
    dim: int

    def setup(self) -> None:
        """Load weights; called once before the first use.

        Raises:
            ConfigError: the weights are not at hand; says where they are looked up.
        """

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """Features (B, dim), float32, of images (B, 3, H, W) in [0, 1]; quantising to 8 bits, resizing and normalising are its own."""
