"""Frozen encoders: images to tokens of unit RMS.

The names below are imported on first use; importing the package alone loads neither torch nor Lightning.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from srcflow.lazy import lazy

if TYPE_CHECKING:
    from srcflow.encoders.base import Encoder as Encoder
    from srcflow.encoders.dinov2 import DINOv2 as DINOv2
    from srcflow.encoders.efficientnet_lite import EfficientNetLite as EfficientNetLite
    from srcflow.encoders.intermediates import HasIntermediates as HasIntermediates
    from srcflow.encoders.intermediates import feature_dims as feature_dims
    from srcflow.encoders.intermediates import feature_maps as feature_maps
    from srcflow.encoders.mae import MAE as MAE
    from srcflow.encoders.siglip2 import SigLIP2 as SigLIP2
    from srcflow.encoders.timm_vit import TimmViT as TimmViT

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "base": ["Encoder"],
        "dinov2": ["DINOv2"],
        "efficientnet_lite": ["EfficientNetLite"],
        "intermediates": ["HasIntermediates", "feature_dims", "feature_maps"],
        "mae": ["MAE"],
        "siglip2": ["SigLIP2"],
        "timm_vit": ["TimmViT"],
    },
)
