"""Feature maps from inside an encoder, for losses that compare or judge images at several scales.

An encoder may offer, besides its tokens, the optional pair of

- `intermediate_dims`: the channels C of each map, shallowest first, known after construction;
- `intermediates(images)`: the maps (B, C, h, w) themselves, from images (B, 3, H, W) in [0, 1], resized and normalised as `forward` does,
  with gradients to the images.

An encoder without them is used through its final tokens, as one map.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from srcflow.encoders.base import Encoder
from srcflow.errors import ConfigError


@runtime_checkable
class HasIntermediates(Protocol):
    """An encoder that shows feature maps from inside."""

    @property
    def intermediate_dims(self) -> Sequence[int]:
        """Channels of each map, shallowest first."""

    def intermediates(self, images: Tensor) -> list[Tensor]:
        """Maps (B, C, h, w) of images (B, 3, H, W) in [0, 1], shallowest first."""


def feature_dims(encoder: Encoder, layers: Sequence[int] | None = None, *, key: str = "layers") -> list[int]:
    """Channels of the maps that `feature_maps` returns for these layers.

    Raises:
        ConfigError: a layer that the encoder does not have, or no layer at all.
    """
    dims = list(encoder.intermediate_dims) if isinstance(encoder, HasIntermediates) else [encoder.dim]
    if layers is None:
        return dims
    name = type(encoder).__name__
    if not layers:
        raise ConfigError(key, layers, "no layer is named.", f"Name layers of {name} (0 to {len(dims) - 1}), or write null for all.")
    wrong = [i for i in layers if not -len(dims) <= i < len(dims)]
    if wrong:
        have = f"{name} has feature maps 0 to {len(dims) - 1}" if len(dims) > 1 else f"{name} shows its final tokens only (layer 0)"
        raise ConfigError(key, list(layers), f"there is no layer {wrong[0]}: {have}.", "Name layers it has, or write null for all.")
    return [dims[i] for i in layers]


def feature_maps(encoder: Encoder, images: Tensor, layers: Sequence[int] | None = None) -> list[Tensor]:
    """Feature maps of images.

    Args:
        encoder: any encoder; its final tokens are the only map if it has no `intermediates`.
        images: (B, 3, H, W) in [0, 1]; gradients pass to them.
        layers: which maps, in this order; None for all, shallowest first.

    Returns:
        One (B, C, h, w) per layer.
    """
    if isinstance(encoder, HasIntermediates):
        maps = encoder.intermediates(images)
    else:
        tokens, (rows, columns) = encoder(images)
        maps = [tokens.transpose(1, 2).unflatten(2, (rows, columns))]
    return maps if layers is None else [maps[i] for i in layers]
