"""Images in WebDataset tar shards."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader, Dataset

from srcflow.data.image_shards import ImageShardsDataset, ImageShardsStream
from srcflow.data.shard_index import ShardIndex, expand
from srcflow.data.transforms import ImageTransform
from srcflow.data.workers import leave_signals_to_the_rank
from srcflow.datamodules.base import DataModule, Split, as_batch
from srcflow.errors import ConfigError
from srcflow.types import Batch

Shards = str | list[str]


class ImageShards(DataModule):
    """Images in local WebDataset tar shards: one jpg, jpeg, png or webp per sample, and a label as `cls` or as "label" in a `json`.

    A split is a path, a brace range (`data/train-{000000..000054}.tar`), a glob (`data/train-*.tar`), or a list of these; the order given
    is the order of the global sample index. The headers of all shards are read and checked in setup (about 20 microseconds per file in a
    shard).

    Args:
        train: shards of the training images.
        val: shards of the validation images.
        test: shards of the test images.
        size: side of the images in pixels.
        num_classes: labels are checked to be below it; 0: labels are not read.
        batch_size: per rank.
        mode: how training reads. "map": at random, a true shuffle, for local disks. "stream": each shard from front to back through
            webdataset, shards and a buffer shuffled, for slow disks; needs at least ranks x workers shards. Evaluation is always "map".
        shuffle_buffer: samples in the shuffle buffer of each worker (mode "stream").
        crop: "centre" (ADM's), or "random" in training: a random square of the image resized to `resize`. Evaluation always uses the
            centre.
        resize: short side before the random crop (RAE: 384 for size 256); None means `size`.
        flip: mirror training images with probability 1/2.
        num_workers: loader processes per rank.
        seed: key of the order, crops and flips.

    Raises:
        ConfigError: sizes that do not fit each other; fewer shards than ranks x workers.
        DataError: in setup: shards that are missing, empty, cut or damaged (all are listed); in a loader: a sample that cannot be decoded
            (names it).
    """

    def __init__(
        self,
        train: Shards | None = None,
        val: Shards | None = None,
        test: Shards | None = None,
        *,
        size: int = 256,
        num_classes: int = 0,
        batch_size: int = 64,
        mode: Literal["map", "stream"] = "map",
        shuffle_buffer: int = 2000,
        crop: Literal["centre", "random"] = "centre",
        resize: int | None = None,
        flip: bool = False,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, num_classes=num_classes, seed=seed)
        if mode not in ("map", "stream"):
            raise ConfigError("data.mode", mode, "no such mode.", "Known: map, stream.")
        if shuffle_buffer < 1:
            raise ConfigError("data.shuffle_buffer", shuffle_buffer, "must be at least 1.")
        self.places: dict[Split, Shards | None] = {"train": train, "val": val, "test": test}
        self.transform = ImageTransform(size, crop, resize, flip, seed)
        self.mode, self.shuffle_buffer = mode, shuffle_buffer
        self._indices: dict[Split, ShardIndex] = {}

    def place(self, split: Split) -> Shards | None:
        return self.places[split]

    def open(self, split: Split, training: bool) -> Dataset[Any]:
        if split not in self._indices:
            self._indices[split] = ShardIndex.scan(expand(self.places[split] or [], f"data.{split}"))
        return ImageShardsDataset(self._indices[split], self.transform if training else self.transform.evaluation(), self.num_classes)

    def describe(self, split: Split) -> dict[str, Any]:
        data = self.dataset(split, training=split == "train")
        return {"samples": len(data), "content": data.fingerprint(), "transform": data.transform.describe()}

    def train_dataloader(self) -> Any:
        """Shuffled, augmented, complete batches."""
        if self.mode == "map":
            return super().train_dataloader()
        index: ShardIndex = self.dataset("train", training=True).index
        rank, world = self.share()
        if len(index.paths) < world * max(self.num_workers, 1):
            raise ConfigError(
                "data.mode",
                self.mode,
                f"streaming needs a shard for each worker: {len(index.paths)} shards, {world} ranks x {max(self.num_workers, 1)} workers.",
                "Lower data.num_workers, write more and smaller shards, or set data.mode: map.",
            )
        stream = ImageShardsStream(
            index,
            self.transform,
            self.num_classes,
            batch_size=self.batch_size,
            seed=self.seed,
            rank=rank,
            world_size=world,
            buffer=self.shuffle_buffer,
        )
        return StreamLoader(stream, self.num_workers)


class StreamLoader:
    """A loader over a stream, with a length and an epoch that Lightning sets (on what it finds as `sampler`).

    Args:
        stream: the rank's samples.
        num_workers: loader processes.
    """

    def __init__(self, stream: ImageShardsStream, num_workers: int) -> None:
        self.sampler = stream
        self._loader: DataLoader[Batch] = DataLoader(
            stream,  # type: ignore[arg-type]  # samples become batches in collate_fn
            batch_size=stream.batch_size,
            collate_fn=as_batch,
            drop_last=True,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=leave_signals_to_the_rank,
        )

    def __len__(self) -> int:
        return self.sampler.steps

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._loader)
