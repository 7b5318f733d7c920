"""Images in folders."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Literal

from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import Dataset

from srcflow.data.image_folder import ImageFolderDataset, resolve_classes
from srcflow.data.transforms import ImageTransform
from srcflow.datamodules.base import SPLITS, DataModule, Split
from srcflow.errors import printable


class ImageFolder(DataModule):
    """Images (jpg, png, webp, and what else `data.transforms.FORMATS` lists) in folders, with one sub-folder per class, or without labels.

    Labels are positions in the sorted names of the training folder's sub-folders, each of which must have images. Links are followed;
    hidden files and files of other kinds are left out, and counted in one line (`data.folder_walk`).

    Args:
        train: folder of the training images.
        val: folder of the validation images.
        test: folder of the test images.
        size: side of the images in pixels.
        num_classes: number of class folders, checked; 0: images without labels, in any arrangement.
        batch_size: per rank.
        crop: "centre" (ADM's), or "random" in training: a random square of the image resized to `resize`. Evaluation always uses the
            centre.
        resize: short side before the random crop (RAE: 384 for size 256); None means `size`.
        flip: mirror training images with probability 1/2.
        exif: "transpose": images are turned upright as their EXIF orientation says, as viewers show them; "ignore": pixels as they are
            stored, as ADM's protocol has them.
        num_workers: loader processes per rank.
        seed: key of the order, crops and flips.
        max_bad_fraction: training images that cannot be decoded are counted, named and replaced by others of this rank; the run stops
            when they are more than this fraction of a rank's samples in an epoch. In evaluation there may be none.

    Raises:
        ConfigError: sizes that do not fit each other; in setup: another number of classes than found.
        DataError: in setup: missing or empty folders, classes without images, links to nothing; in a loader: files that
            cannot be decoded (names them).
    """

    place_options: ClassVar[frozenset[str]] = frozenset({"train", "val", "test"})
    earlier_options: ClassVar[Mapping[str, Any]] = MappingProxyType({"exif": "ignore"})

    def __init__(
        self,
        train: str | None = None,
        val: str | None = None,
        test: str | None = None,
        *,
        size: int = 256,
        num_classes: int = 0,
        batch_size: int = 64,
        crop: Literal["centre", "random"] = "centre",
        resize: int | None = None,
        flip: bool = False,
        exif: Literal["transpose", "ignore"] = "transpose",
        num_workers: int = 0,
        seed: int = 0,
        max_bad_fraction: float = 1e-3,
    ) -> None:
        super().__init__(
            batch_size=batch_size, num_workers=num_workers, num_classes=num_classes, seed=seed, max_bad_fraction=max_bad_fraction
        )
        self.places: dict[Split, str | None] = {"train": train, "val": val, "test": test}
        self.transform = ImageTransform(size, crop, resize, flip, seed, exif)

    def place(self, split: Split) -> str | None:
        return self.places[split]

    def open(self, split: Split, training: bool) -> Dataset[Any]:
        transform = self.transform if training else self.transform.evaluation()
        folders = [p for s in SPLITS if (p := self.places[s]) is not None]
        classes = resolve_classes(folders, self.num_classes)
        data = ImageFolderDataset(str(self.places[split]), transform, classes, tolerant=training)
        if data.unused and (split, not training) not in self._opened:  # said once
            rank_zero_info(printable(data.unused))
        return data

    def describe(self, split: Split) -> dict[str, Any]:
        data = self.dataset(split, training=split == "train")
        return {"samples": len(data), "content": data.fingerprint(), "transform": data.transform.describe()}
