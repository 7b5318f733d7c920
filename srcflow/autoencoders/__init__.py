"""Autoencoders: images to normalised features and back.

The names below are imported on first use; importing the package alone loads neither torch nor Lightning.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from srcflow.lazy import lazy

if TYPE_CHECKING:
    from srcflow.autoencoders.base import Autoencoder as Autoencoder
    from srcflow.autoencoders.pixels import PixelPatches as PixelPatches
    from srcflow.autoencoders.representation import RepresentationAutoencoder as RepresentationAutoencoder
    from srcflow.autoencoders.vit_decoder import ViTDecoder as ViTDecoder
    from srcflow.autoencoders.vit_decoder import vit_b as vit_b
    from srcflow.autoencoders.vit_decoder import vit_l as vit_l
    from srcflow.autoencoders.vit_decoder import vit_xl as vit_xl

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "base": ["Autoencoder"],
        "pixels": ["PixelPatches"],
        "representation": ["RepresentationAutoencoder"],
        "vit_decoder": ["ViTDecoder", "vit_b", "vit_l", "vit_xl"],
    },
)
