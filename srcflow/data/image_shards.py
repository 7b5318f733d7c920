"""Images in local WebDataset tar shards, map-style: random access by byte offsets, which `ShardIndex.scan` takes from the tar headers once.

`shard_stream` has the other way to read shards: from front to back.
"""

from __future__ import annotations

from srcflow.data.images import ImageDataset
from srcflow.data.shard_index import ShardIndex, read_span
from srcflow.data.shard_labels import NO_LABEL, count_labels, parse_label
from srcflow.data.transforms import ImageTransform
from srcflow.errors import DataError
from srcflow.types import NULL_LABEL


class ImageShardsDataset(ImageDataset):
    """Random access to the samples of tar shards, by byte offsets.

    Args:
        index: of the shards.
        transform: from RGB image to tensor.
        num_classes: 0 for no labels; otherwise every sample needs a `cls` or a `json` with an integer "label".
        tolerant: as in `ImageSource`.
    """

    def __init__(self, index: ShardIndex, transform: ImageTransform, num_classes: int = 0, tolerant: bool = False) -> None:
        super().__init__(transform, num_classes, tolerant)
        self.index = index

    def __len__(self) -> int:
        return len(self.index)

    def label_counts(self) -> dict[int, int] | None:
        """How many samples have which label; None where they were not read before."""
        return None if self.index.labels is None else count_labels(self.index.labels)

    def key(self, index: int) -> str:
        return self.index.keys[index]

    def where(self, index: int) -> str:
        return self.index.name(index)

    def read(self, index: int) -> tuple[bytes, int]:
        path = self.index.paths[self.index.shard_of(index)]
        offset, size, label_offset, label_size = self.index.spans[index].tolist()
        label = NULL_LABEL
        if self.num_classes and self.index.labels is not None:
            label = int(self.index.labels[index])
        elif self.num_classes:
            if label_offset < 0:
                raise DataError(f"{self.where(index)}: {NO_LABEL}")
            label = parse_label(read_span(path, label_offset, label_size), bool(self.index.json_label[index]), self.where(index))
        return read_span(path, offset, size), label

    def fingerprint(self) -> str:
        return self.index.fingerprint()
