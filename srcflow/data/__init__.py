"""Data sets of images and of stored features, in plain torch.

The names below are imported on first use; importing the package alone loads neither torch nor Lightning.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from srcflow.lazy import lazy

if TYPE_CHECKING:
    from srcflow.data.feature_store import FeatureStoreDataset as FeatureStoreDataset
    from srcflow.data.feature_store import FeatureStoreWriter as FeatureStoreWriter
    from srcflow.data.image_folder import ImageFolderDataset as ImageFolderDataset
    from srcflow.data.image_shards import ImageShardsDataset as ImageShardsDataset
    from srcflow.data.transforms import ImageTransform as ImageTransform

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "feature_store": ["FeatureStoreDataset", "FeatureStoreWriter"],
        "image_folder": ["ImageFolderDataset"],
        "image_shards": ["ImageShardsDataset"],
        "transforms": ["ImageTransform"],
    },
)
