"""What image data sets share: how files become samples, and the contract of the map-style ones."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, cast

import torch
from PIL import Image
from torch.utils.data import Dataset

from srcflow.data.batches import Sample
from srcflow.data.rules import OWN, Rule
from srcflow.data.sampler import Draw
from srcflow.data.shard_labels import outside
from srcflow.data.transforms import ImageTransform, decode, undecodable
from srcflow.errors import DataError


class ImageSource(ABC):
    """Numbered image files with labels, and what is done to them. The index is the global sample index: it follows from the data alone.

    A subclass that adds keys to its samples implements `extras` and declares in `rules` what becomes of each in a batch.

    Args:
        transform: from RGB image to tensor.
        num_classes: labels are checked to be below it; 0: every label is -1, and none is read.
        tolerant: a file that does not decode, whatever it raises, becomes a black sample with an `error`, for a loader that counts and
            replaces it (`batches.collate_tolerantly`); otherwise it is raised.
    """

    rules: Mapping[str, Rule] = MappingProxyType({})

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

    def extras(self, draw: Draw, picture: Image.Image) -> Mapping[str, Any]:
        """What a sample holds besides the image, by key; each key needs a rule in `rules`.

        Random numbers have to be keyed by `draw` (`srcflow.randomness`), so that they depend on neither workers nor resumption. It is not
        called for an image that does not decode. A data set whose extra values come from other files should add them to `fingerprint`.

        Args:
            draw: which sample, in which epoch.
            picture: the decoded image, before the transform.
        """
        return {}

    def make(self, data: bytes, label: int, draw: Draw, where: str) -> Sample:
        """A sample from an image file.

        Args:
            data: the file's content.
            label: -1 where there is none.
            draw: which sample, in which epoch.
            where: what to call it in an error message.

        Raises:
            UndecodableError: the file cannot be decoded (unless `tolerant`).
            DataError: a label that the model has no class for, or extra keys that are the sample's own.
        """
        if self.num_classes and not 0 <= label < self.num_classes:
            raise DataError(outside(label, self.num_classes, where))
        try:
            picture = decode(data, where, self.transform.exif)
            image, flipped = self.transform(picture, epoch=draw.epoch, index=draw.index)
        except Exception as e:
            error = undecodable(where, e)
            if not self.tolerant:
                raise error from e
            black = torch.zeros(3, self.transform.size, self.transform.size, dtype=torch.uint8)
            return Sample(image=black, label=label, index=draw.index, valid=draw.valid, flipped=False, error=str(error))
        sample = Sample(image=image, label=label, index=draw.index, valid=draw.valid, flipped=flipped)
        if extras := self.extras(draw, picture):
            if own := sorted(OWN & extras.keys()):
                raise DataError(f"{where}: extras() gives {own[0]!r}, which the sample holds already. Choose another key.")
            cast(dict[str, Any], sample).update(extras)
        return sample


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
