"""What image data sets share: how files become samples, and the contract of the map-style ones."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils.data import Dataset

from srcflow.data.batches import Sample
from srcflow.data.sampler import Draw
from srcflow.data.shard_labels import outside
from srcflow.data.transforms import ImageTransform, decode, undecodable
from srcflow.errors import DataError


class ImageSource(ABC):
    """Numbered image files with labels, and what is done to them. The index is the global sample index: it follows from the data alone.

    Args:
        transform: from RGB image to tensor.
        num_classes: labels are checked to be below it; 0: every label is -1, and none is read.
        tolerant: a file that does not decode, whatever it raises, becomes a black sample with an `error`, for a loader that counts and
            replaces it (`batches.collate_tolerantly`); otherwise it is raised.
    """

    def __init__(self, transform: ImageTransform, num_classes: int, tolerant: bool = False) -> None:
        self.transform, self.num_classes, self.tolerant = transform, num_classes, tolerant

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def key(self, index: int) -> str:
        """A sample's name, unique within the data set and free of this machine's paths."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash of what the data set holds (names, sizes, labels; not the pixels)."""

    def make(self, data: bytes, label: int, draw: Draw, where: str) -> Sample:
        """A sample from an image file.

        Args:
            data: the file's content.
            label: -1 where there is none.
            draw: which sample, in which epoch.
            where: what to call it in an error message.

        Raises:
            UndecodableError: the file cannot be decoded (unless `tolerant`).
            DataError: a label that the model has no class for.
        """
        if self.num_classes and not 0 <= label < self.num_classes:
            raise DataError(outside(label, self.num_classes, where))
        try:
            image, flipped = self.transform(decode(data, where, self.transform.exif), epoch=draw.epoch, index=draw.index)
        except Exception as e:
            error = undecodable(where, e)
            if not self.tolerant:
                raise error from e
            black = torch.zeros(3, self.transform.size, self.transform.size, dtype=torch.uint8)
            return Sample(image=black, label=label, index=draw.index, valid=draw.valid, flipped=False, error=str(error))
        return Sample(image=image, label=label, index=draw.index, valid=draw.valid, flipped=flipped)


class ImageDataset(ImageSource, Dataset[Sample]):
    """Images from files, decoded and transformed on request.

    An item is asked for by a `Draw` (from `KeyedSampler`, which carries the epoch to the workers) or by a plain index, which means the
    epoch given to `set_epoch`.

    Args:
        transform: as in `ImageSource`.
        num_classes: as in `ImageSource`.
        tolerant: as in `ImageSource`.
    """

    epoch = 0

    @abstractmethod
    def read(self, index: int) -> tuple[bytes, int]:
        """A sample's image file, and its label (-1 where `num_classes` is 0)."""

    @abstractmethod
    def where(self, index: int) -> str:
        """What to call a sample in an error message: the file it is in."""

    def set_epoch(self, epoch: int) -> None:
        """The epoch of items asked for by a plain index. Workers see the value from when they were started; a `Draw` is always right."""
        self.epoch = epoch

    def __getitem__(self, draw: Draw | int) -> Sample:
        draw = draw if isinstance(draw, Draw) else Draw(self.epoch, int(draw))
        if not 0 <= draw.index < len(self):
            raise IndexError(f"sample {draw.index} of {len(self)}")
        return self.make(*self.read(draw.index), draw, self.where(draw.index))


def hash_of(lines: Iterable[Any]) -> str:
    """sha256 over the lines' text."""
    digest = hashlib.sha256()
    for line in lines:
        digest.update(f"{line}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()
