"""The contract of map-style image datasets."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

from torch.utils.data import Dataset

from srcflow.data.batches import Sample
from srcflow.data.sampler import Draw
from srcflow.data.transforms import ImageTransform, decode
from srcflow.errors import DataError


class ImageDataset(Dataset[Sample], ABC):
    """Images from files, decoded and transformed on request.

    An item is asked for by a `Draw` (from `KeyedSampler`, which carries the epoch to the workers) or by a plain index, which means the
    epoch given to `set_epoch`. The index is the global sample index: it follows from the data alone.

    Args:
        transform: from RGB image to tensor.
        num_classes: labels are checked to be below it; 0: every label is -1, and none is read.
    """

    def __init__(self, transform: ImageTransform, num_classes: int) -> None:
        self.transform, self.num_classes, self.epoch = transform, num_classes, 0

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def key(self, index: int) -> str:
        """A sample's name, unique within the data set and free of this machine's paths."""

    @abstractmethod
    def read(self, index: int) -> tuple[bytes, int]:
        """A sample's image file, and its label (-1 where `num_classes` is 0)."""

    @abstractmethod
    def where(self, index: int) -> str:
        """What to call a sample in an error message: the file it is in."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash of what the data set holds (names, sizes, labels; not the pixels)."""

    def set_epoch(self, epoch: int) -> None:
        """The epoch of items asked for by a plain index. Workers see the value from when they were started; a `Draw` is always right."""
        self.epoch = epoch

    def __getitem__(self, draw: Draw | int) -> Sample:
        epoch, index, valid = (draw.epoch, draw.index, draw.valid) if isinstance(draw, Draw) else (self.epoch, int(draw), True)
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        data, label = self.read(index)
        self.check_label(label, index)
        image, flipped = self.transform(decode(data, self.where(index)), epoch=epoch, index=index)
        return Sample(image=image, label=label, index=index, valid=valid, flipped=flipped)

    def check_label(self, label: int, index: int) -> None:
        """Refuse a label that the model has no class for.

        Raises:
            DataError: names the sample.
        """
        if self.num_classes and not 0 <= label < self.num_classes:
            raise DataError(
                f"{self.where(index)}: label {label} is not in 0 .. {self.num_classes - 1} (data.num_classes = {self.num_classes})."
            )


def hash_of(lines: Iterable[Any]) -> str:
    """sha256 over the lines' text."""
    digest = hashlib.sha256()
    for line in lines:
        digest.update(f"{line}\n".encode())
    return digest.hexdigest()
