"""Images in WebDataset tar shards: map-style with random access, or streamed through webdataset.

Both need local files and read the tar headers once (`ShardIndex.scan`), which gives counts, global sample indices and the certainty that no
shard is cut. Map-style suits everything that fits on a local disk; streaming reads each shard from front to back, for disks that are slow
at random access.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import webdataset as wds
from torch.utils.data import IterableDataset, get_worker_info

from srcflow.data.batches import Sample
from srcflow.data.images import ImageDataset
from srcflow.data.shard_index import ShardIndex, parse_label, read_span
from srcflow.data.transforms import EXTENSIONS, ImageTransform, decode
from srcflow.errors import DataError
from srcflow.randomness import key, permutation
from srcflow.types import NULL_LABEL


class ImageShardsDataset(ImageDataset):
    """Random access to the samples of tar shards, by byte offsets.

    Args:
        index: of the shards.
        transform: from RGB image to tensor.
        num_classes: 0 for no labels; otherwise every sample needs a `cls` or a `json` with an integer "label".
    """

    def __init__(self, index: ShardIndex, transform: ImageTransform, num_classes: int = 0) -> None:
        super().__init__(transform, num_classes)
        self.index = index

    def __len__(self) -> int:
        return len(self.index)

    def key(self, index: int) -> str:
        return self.index.keys[index]

    def where(self, index: int) -> str:
        return self.index.name(index)

    def read(self, index: int) -> tuple[bytes, int]:
        path = self.index.paths[self.index.shard_of(index)]
        offset, size, label_offset, label_size = self.index.spans[index].tolist()
        label = NULL_LABEL
        if self.num_classes:
            if label_offset < 0:
                raise DataError(f"{self.where(index)}: has no label (cls or json). Set data.num_classes: 0 for images without labels.")
            label = parse_label(read_span(path, label_offset, label_size), bool(self.index.json_label[index]), self.where(index))
        return read_span(path, offset, size), label

    def fingerprint(self) -> str:
        return self.index.fingerprint()


def opened(source: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Pipeline stage: open each shard and close it when it is done with (webdataset's own opener leaves that to the garbage collector)."""
    for shard in source:
        with open(shard["url"], "rb") as stream:
            yield {**shard, "stream": stream}


class ImageShardsStream(IterableDataset[Sample]):
    """A rank's endless stream of shuffled samples through webdataset, cut to `steps` batches per epoch and rank.

    In every epoch the shards are dealt anew to ranks and workers. A worker that reaches the end of its shards before its share of the steps
    goes through them again in another order; one that has more leaves the rest (which falls to others in later epochs). So all ranks take
    equally many steps, whatever the shards' sizes. The rank is given, not guessed in a worker; the epoch reaches persistent workers through
    shared memory.

    Args:
        index: of the shards.
        transform: from RGB image to tensor.
        num_classes: as in `ImageShardsDataset`.
        batch_size: per rank.
        seed: key of the orders.
        rank: this process.
        world_size: number of processes.
        buffer: samples (as bytes) in each worker's shuffle buffer.
    """

    shares_ranks = True  # a rank's stream is its own share

    def __init__(
        self,
        index: ShardIndex,
        transform: ImageTransform,
        num_classes: int = 0,
        *,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        buffer: int = 2000,
    ) -> None:
        self.samples = ImageShardsDataset(index, transform, num_classes)
        self.batch_size, self.seed, self.rank, self.world_size, self.buffer = batch_size, seed, rank, world_size, buffer
        self.steps = len(index) // (world_size * batch_size)
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]  # torch is untyped here

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration yields, in all workers."""
        self._epoch.fill_(epoch)

    def __iter__(self) -> Iterator[Sample]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        epoch = int(self._epoch)
        batches = self.steps // workers + (worker < self.steps % workers)  # DataLoader asks the workers in turn
        return self._take(batches * self.batch_size, epoch, worker, workers)

    def _take(self, quota: int, epoch: int, worker: int, workers: int) -> Iterator[Sample]:
        shards = permutation(len(self.samples.index.paths), seed=self.seed, purpose="shards", step=epoch).tolist()
        mine = shards[self.rank :: self.world_size][worker::workers]
        turn = 0
        while quota > 0:
            purpose = f"stream/{self.rank}/{worker}/{turn}"
            order = [mine[i] for i in permutation(len(mine), seed=self.seed, purpose=purpose, step=epoch).tolist()]
            rng = random.Random(key(self.seed, purpose, epoch, 0))
            pipeline = wds.DataPipeline(
                wds.SimpleShardList([self.samples.index.paths[s] for s in order]),
                opened,
                wds.tariterators.tar_file_expander,
                wds.tariterators.group_by_keys,
                self._numbered,
                wds.shuffle(self.buffer, initial=self.buffer // 2, rng=rng),
            )
            for raw in pipeline:
                yield self._sample(raw, epoch)
                quota -= 1
                if quota == 0:
                    return
            turn += 1

    def _numbered(self, source: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Add the global index, and make sure that each shard gives exactly what its headers promised."""
        index = self.samples.index
        place = {path: i for i, path in enumerate(index.paths)}
        url, position = "", 0
        for raw in source:
            if raw["__url__"] != url:
                self._check_end(url, position)
                url = raw["__url__"]
                position = int(index.starts[place[url]])
            if position >= index.starts[place[url] + 1] or index.keys[position] != raw["__key__"]:
                raise DataError(
                    f"{url}: gave {raw['__key__']!r} where its headers promised another sample. The shards changed while they were in use."
                )
            yield {**raw, "index": position}
            position += 1
        self._check_end(url, position)

    def _check_end(self, url: str, position: int) -> None:
        if url and position != (end := int(self.samples.index.starts[self.samples.index.paths.index(url) + 1])):
            raise DataError(f"{url}: ended {end - position} samples early: it is damaged, or changed while it was in use.")

    def _sample(self, raw: dict[str, Any], epoch: int) -> Sample:
        i, data = raw["index"], self.samples
        label = NULL_LABEL
        if data.num_classes:
            extension = "cls" if "cls" in raw else "json"
            if extension not in raw:
                raise DataError(f"{data.where(i)}: has no label (cls or json). Set data.num_classes: 0 for images without labels.")
            label = parse_label(raw[extension], extension == "json", data.where(i))
        data.check_label(label, i)
        picture = next(raw[e] for e in EXTENSIONS if e in raw)
        image, flipped = data.transform(decode(picture, data.where(i)), epoch=epoch, index=i)
        return Sample(image=image, label=label, index=i, valid=True, flipped=flipped)
