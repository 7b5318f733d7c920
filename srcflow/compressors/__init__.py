"""Compressors: features to the codes that a flow models, and back.

The names below are imported on first use; importing the package alone loads neither torch nor Lightning.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from srcflow.lazy import lazy

if TYPE_CHECKING:
    from srcflow.compressors.base import Compressor as Compressor
    from srcflow.compressors.conv import Conv as Conv
    from srcflow.compressors.identity import Identity as Identity
    from srcflow.compressors.linear import Linear as Linear
    from srcflow.compressors.pca import PCA as PCA
    from srcflow.compressors.semantic import Semantic as Semantic

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "base": ["Compressor"],
        "conv": ["Conv"],
        "identity": ["Identity"],
        "linear": ["Linear"],
        "pca": ["PCA"],
        "semantic": ["Semantic"],
    },
)
