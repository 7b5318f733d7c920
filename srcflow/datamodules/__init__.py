"""Lightning's datamodules over the data sets of `srcflow.data`.

The names below are imported on first use; importing the package alone loads neither torch nor Lightning.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from srcflow.lazy import lazy

if TYPE_CHECKING:
    from srcflow.datamodules.base import DataModule as DataModule
    from srcflow.datamodules.feature_store import FeatureStore as FeatureStore
    from srcflow.datamodules.image_folder import ImageFolder as ImageFolder
    from srcflow.datamodules.image_shards import ImageShards as ImageShards

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "base": ["DataModule"],
        "feature_store": ["FeatureStore"],
        "image_folder": ["ImageFolder"],
        "image_shards": ["ImageShards"],
    },
)
