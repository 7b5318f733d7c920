"""Extractors: the features that distances between sets of images compare.

The names below are imported on first use; importing the package alone loads neither torch nor Lightning.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from srcflow.lazy import lazy

if TYPE_CHECKING:
    from srcflow.metrics.features.base import Extractor as Extractor
    from srcflow.metrics.features.encoder import EncoderFeatures as EncoderFeatures
    from srcflow.metrics.features.inception import Inception as Inception

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "base": ["Extractor"],
        "encoder": ["EncoderFeatures"],
        "inception": ["Inception"],
    },
)
