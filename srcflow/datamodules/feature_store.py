"""Features that `srcflow encode` has stored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch.utils.data import Dataset

from srcflow.autoencoders.base import Autoencoder
from srcflow.data.feature_store import FeatureStoreDataset
from srcflow.data.manifest import made_by
from srcflow.data.shard_labels import count_labels
from srcflow.datamodules.base import SPLITS, DataModule, Split
from srcflow.errors import ConfigError


class FeatureStore(DataModule):
    """Stored features (`srcflow encode`), with what belongs to them: images, labels, flip flags, the features' deviation, further keys.

    Training draws from all rows (mirror images are rows of their own); evaluation sees each image once, not mirrored. All splits must come
    from the same encoder, weights, grid, dtype and transform.

    Args:
        path_train: store of the training data.
        path_val: store of the validation data.
        path_test: store of the test data.
        batch_size: per rank.
        num_workers: loader processes per rank; 0 is enough, since batches are slices of a memory map.
        num_classes: labels are checked to be below it; 0: labels are given as -1.
        seed: key of the order.
        with_images: also yield the uint8 images.

    Raises:
        ConfigError: sizes that cannot be.
        ArtifactError: in setup: no finished store there.
        ManifestMismatchError: in setup: splits that do not belong together; from `check`: a store that does not belong to the run.
        DataError: in setup: labels that do not fit num_classes.
    """

    place_key = "data.path_{}"
    place_options: ClassVar[frozenset[str]] = frozenset({"path_train", "path_val", "path_test"})

    def __init__(
        self,
        path_train: str | None = None,
        path_val: str | None = None,
        path_test: str | None = None,
        *,
        batch_size: int = 64,
        num_workers: int = 0,
        num_classes: int = 0,
        seed: int = 0,
        with_images: bool = True,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, num_classes=num_classes, seed=seed)
        self.places: dict[Split, str | None] = {"train": path_train, "val": path_val, "test": path_test}
        self.with_images = with_images

    def place(self, split: Split) -> str | None:
        return self.places[split]

    def open(self, split: Split, training: bool) -> Dataset[Any]:
        data = FeatureStoreDataset(str(self.places[split]), with_images=self.with_images, originals_only=not training)
        data.check_labels(self.num_classes)
        if self.num_classes == 0:
            data.labels[:] = -1
        for _, other in sorted(self._opened.items())[:1]:
            common = ("encoder", "autoencoder", "deviation", "extras", "transform", "grid", "dim", "dtype", "image_size", "precision")
            data.check({name: getattr(other.manifest, name) for name in common})
        return data

    def label_counts(self) -> Mapping[int, int] | None:
        return count_labels(self.dataset("train", training=True).labels)

    def describe(self, split: Split) -> dict[str, Any]:
        manifest = self.dataset(split, training=split == "train").manifest.as_dict()
        return {k: v for k, v in manifest.items() if k not in ("versions", "version")}

    def check(self, expected: Mapping[str, Any]) -> None:
        """Refuse stores that do not belong to a run; only fields that `expected` has are compared.

        Args:
            expected: manifest fields, e.g. `manifest.made_by(autoencoder)`.

        Raises:
            ConfigError: no split is configured.
            ManifestMismatchError: names each field that differs.
        """
        for data in self._configured():
            data.check(expected)

    def check_maker(self, autoencoder: Autoencoder) -> None:
        """Refuse stores whose features are not those of a run's autoencoder (`Autoencoder.feature_source`).

        A store that a program of its own wrote without saying what made the features passes, unless the autoencoder's features are those
        of a frozen encoder.

        Args:
            autoencoder: with its weights, of which a hash is taken.

        Raises:
            ConfigError: no split is configured.
            ManifestMismatchError: names each field that differs.
        """
        expected = made_by(autoencoder)
        for data in self._configured():
            manifest = data.manifest
            if "encoder" in expected or manifest.autoencoder or manifest.encoder.get("spec"):
                data.check(expected)

    def _configured(self) -> list[FeatureStoreDataset]:
        configured = [s for s in SPLITS if self.places[s] is not None]
        if not configured:
            raise ConfigError("data", type(self).__name__, "no store is configured.", "Set path_train, path_val or path_test.")
        return [self.dataset(split, training=split == "train") for split in configured]
