"""Whether a run's images have the size that its autoencoder decodes."""

from __future__ import annotations

from typing import Any

from srcflow.autoencoders.base import Autoencoder
from srcflow.data.transforms import ImageTransform
from srcflow.datamodules.feature_store import FeatureStore
from srcflow.errors import ConfigError


def check_data(datamodule: Any, autoencoder: Autoencoder) -> None:
    """Refuse data whose configuration says that its images have another size than the decoded ones.

    Args:
        datamodule: the run's, set up; where one does not tell its size, `check_images` looks at every batch.
        autoencoder: decodes the images.

    Raises:
        ConfigError: names the data's size, the decoder's, and the cure.
    """
    transform = getattr(datamodule, "transform", None)
    if isinstance(transform, ImageTransform):
        _compare("data.size", transform.size, (transform.size, transform.size), autoencoder)
    elif isinstance(datamodule, FeatureStore):
        for split, manifest in datamodule.fingerprint().items():
            if isinstance(manifest, dict):
                size = tuple(manifest["image_size"])
                _compare(f"image_size of data.path_{split}", size, size, autoencoder)


def check_images(size: tuple[int, ...], autoencoder: Autoencoder) -> None:
    """Refuse images (height, width) of another size than the decoded ones; raises as `check_data` does."""
    _compare("size of the images", size, size, autoencoder)


def _compare(key: str, value: Any, size: tuple[int, ...], autoencoder: Autoencoder) -> None:
    wanted = tuple(autoencoder.image_size)
    if size == wanted:
        return
    height, width = wanted
    if key == "data.size":
        cure = f"Write data.size: {height}" if height == width else "Give images of that size"
    else:
        cure = "Encode images of that size (srcflow encode)" if key.startswith("image_size") else "Give images of that size"
    raise ConfigError(
        key,
        value,
        f"the autoencoder ({type(autoencoder).__name__}) decodes images of {height} x {width} pixels.",
        f"{cure}, or use an autoencoder for this size.",
    )
