"""Images in WebDataset tar shards."""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Literal

from srcflow.data.image_shards import ImageShardsDataset
from srcflow.data.images import ImageSource
from srcflow.data.shard_index import ShardIndex, scan_shard
from srcflow.data.shard_labels import unusable_labels
from srcflow.data.shard_plan import ShardPlan, default_streams
from srcflow.data.shard_sources import Entry, ShardList, check_labels, find_entries, is_remote, labels_of, resolve, unusable
from srcflow.data.shard_stream import EvaluationStream, ShardImages, TrainingStream
from srcflow.data.transforms import ImageTransform
from srcflow.datamodules.base import DataModule, Split
from srcflow.datamodules.stream_loader import EvaluationLoader, StreamLoader
from srcflow.errors import ConfigError, Problems, one_of

Shards = str | list[str]
START_METHODS = ("fork", "spawn", "forkserver")


class ImageShards(DataModule):
    """Images in WebDataset tar shards: one image per sample (a jpg, png or webp, or one in another of `data.transforms.FORMATS`), and a
    label as `cls` or as "label" in a `json`.

    A split is a path, a URL (http, https, and what else webdataset opens), a command (`pipe:aws s3 cp s3://... -`), with a brace range
    (`data/train-{000000..000054}.tar`) or, of local files, a glob (`data/train-*.tar`), or a list of these; the order given is the order
    of the global sample index. An `index.json` beside the shards says how many samples each holds (`srcflow index` writes it). URLs and
    commands need it; local shards are checked against it. For random access, and without an index, the headers and labels of local
    shards are read in setup (about 20 microseconds per file in a shard). Labels of shards that are streamed by an index are checked in
    setup if it records them (`srcflow index --labels`), otherwise when they are read.

    Args:
        train: shards of the training images.
        val: shards of the validation images.
        test: shards of the test images.
        size: side of the images in pixels.
        num_classes: labels are checked to be below it; 0: labels are not read.
        batch_size: per rank.
        mode: how training reads. "map": at random, a true shuffle, for local disks. "stream": each shard from front to back, shards and a
            buffer shuffled, for slow disks and for what is not local. Evaluation reads local shards at random and others as streams.
        streams: mode "stream": in how many places the shards are read at once, on all ranks; a divisor of batch_size x ranks, a multiple
            of the ranks, and at least ranks x workers. None: `shard_plan.default_streams`.
        shuffle_buffer: mode "stream": undecoded samples in the shuffle buffers of all streams together.
        index: index of all shards of all splits, a file or URL; None: the `index.json` beside each.
        crop: "centre" (ADM's), or "random" in training: a random square of the image resized to `resize`. Evaluation always uses the
            centre.
        resize: short side before the random crop (RAE: 384 for size 256); None means `size`.
        flip: mirror training images with probability 1/2.
        exif: "transpose": images are turned upright as their EXIF orientation says, as viewers show them; "ignore": pixels as they are
            stored, as ADM's protocol has them.
        num_workers: loader processes per rank.
        start_method: how these, if there are any, are started: "fork", "spawn" or "forkserver"; None: the platform's way.
        seed: key of the order, crops and flips.
        max_bad_fraction: training images that cannot be decoded are counted, named and replaced by others of this rank; the run stops
            when they are more than this fraction of a rank's samples in an epoch. In evaluation there may be none.

    Raises:
        ConfigError: sizes that do not fit each other, options without effect; in setup: fewer shards or streams than ranks x workers.
        DataError: in setup: shards that are missing, empty, cut, damaged, without an index or other than it says, and labels that are
            missing, no integers or out of range (all are listed); in a loader: a shard that ends early or goes on too long, images that
            cannot be decoded (names them).
    """

    free_options: ClassVar[frozenset[str]] = frozenset({"index", "start_method"})
    place_options: ClassVar[frozenset[str]] = frozenset({"train", "val", "test"})
    earlier_options: ClassVar[Mapping[str, Any]] = MappingProxyType({"exif": "ignore"})

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
        streams: int | None = None,
        shuffle_buffer: int = 10_000,
        index: str | None = None,
        crop: Literal["centre", "random"] = "centre",
        resize: int | None = None,
        flip: bool = False,
        exif: Literal["transpose", "ignore"] = "transpose",
        num_workers: int = 0,
        start_method: Literal["fork", "spawn", "forkserver"] | None = None,
        seed: int = 0,
        max_bad_fraction: float = 1e-3,
    ) -> None:
        super().__init__(
            batch_size=batch_size, num_workers=num_workers, num_classes=num_classes, seed=seed, max_bad_fraction=max_bad_fraction
        )
        one_of("data.mode", mode, ("map", "stream"))
        if start_method is not None:
            one_of("data.start_method", start_method, START_METHODS)
        for name, value in (("shuffle_buffer", shuffle_buffer), ("streams", streams)):
            if value is not None and value < 1:
                raise ConfigError(f"data.{name}", value, "must be at least 1.")
        if streams is not None and mode == "map":
            raise ConfigError("data.streams", streams, "has no effect in data.mode: map.", "Remove it, or set data.mode: stream.")
        if start_method is not None and num_workers == 0:
            problem = "has no effect without loader processes (data.num_workers = 0)."
            raise ConfigError("data.start_method", start_method, problem, "Remove it, or raise data.num_workers.")
        self.places: dict[Split, Shards | None] = {"train": train, "val": val, "test": test}
        self.transform = ImageTransform(size, crop, resize, flip, seed, exif)
        self.mode, self.streams, self.shuffle_buffer, self.index, self.start_method = mode, streams, shuffle_buffer, index, start_method
        self._indices: dict[Split, ShardIndex] = {}

    def place(self, split: Split) -> Shards | None:
        return self.places[split]

    def open(self, split: Split, training: bool) -> Any:
        transform = self.transform if training else self.transform.evaluation()
        shards = self._shards(split, training)
        if isinstance(shards, ShardIndex):
            return ImageShardsDataset(shards, transform, self.num_classes, tolerant=training)
        return ShardImages(shards, transform, self.num_classes, tolerant=training)

    def _shards(self, split: Split, training: bool) -> ShardIndex | ShardList:
        """Find and check a split's shards; those for random access have been read.

        Raises:
            SrcflowError: everything that is wrong with them.
        """
        problems, streamed = Problems(), training and self.mode == "stream"
        urls, lines = resolve(self.places[split] or [])
        remote = [u for u in urls if is_remote(u)]
        if lines:
            problems.add(unusable(f"data.{split}", lines))
        if training and self.mode == "map" and remote:
            problems.add(ConfigError("data.mode", "map", f"reads at random, and {remote[0]} is no local file.", "Set data.mode: stream."))
        if streamed:
            with problems.collect():
                self._check_shard_count(len(urls))
        entries = find_entries(urls, self.index, f"data.{split}", problems)
        bad = {line.partition(": ")[0] for line in lines}
        if remote or (streamed and len(entries) == len(urls)):
            problems.raise_if_any()
            for url in urls:
                if url not in entries:  # a local one beside remote ones
                    with problems.collect():
                        counted = labels_of(url, self.num_classes) if self.num_classes else None
                        entries[url] = Entry(url, len(scan_shard(url)), os.path.getsize(url), labels=counted)
            if self.num_classes and (wrong := check_labels(urls, entries, self.num_classes)):
                problems.add(unusable_labels(wrong, f"data.{split}"))
            problems.raise_if_any()
            return ShardList.of(urls, entries)
        with problems.collect():
            if split not in self._indices:
                expected = {url: entry.nsamples for url, entry in entries.items()}
                self._indices[split] = ShardIndex.scan([u for u in urls if u not in bad], expected, self.num_classes)
        if problems.found:
            self._indices.pop(split, None)
        problems.raise_if_any()
        return ShardList.scanned(self._indices[split]) if streamed else self._indices[split]

    def _check_shard_count(self, shards: int) -> None:
        world, workers = self.share()[1], max(self.num_workers, 1)
        if shards < world * workers:
            raise ConfigError(
                "data.mode",
                self.mode,
                f"streaming needs a shard for each worker: {shards} shards, {world} ranks x {workers} workers.",
                "Lower data.num_workers, write more and smaller shards, or set data.mode: map.",
            )

    def stream_count(self, shards: int, batch_size: int, world_size: int) -> int:
        """How many streams training reads at once, on all ranks.

        Args:
            shards: how many there are.
            batch_size: per rank.
            world_size: ranks.

        Raises:
            ConfigError: there is no such number, or not the configured one; says which ones work.
        """
        workers, whole = max(self.num_workers, 1), batch_size * world_size
        streams = self.streams or default_streams(shards, whole, world_size) or 0
        possible = [t for t in range(world_size * workers, shards + 1) if whole % t == 0 and t % world_size == 0]
        if streams in possible:
            return streams
        known = ", ".join(map(str, possible)) or "none"
        rule = f"at least {world_size} ranks x {workers} workers, at most {shards} shards, a divisor of the {whole} samples of a step"
        if self.streams is not None:
            raise ConfigError("data.streams", self.streams, f"must be {rule}, and a multiple of the ranks.", f"Possible: {known}.")
        problem = f"each rank reads {streams // world_size} streams, and each worker needs one."
        cure = f"Lower it to {streams // world_size}, or set data.streams ({rule}; possible: {known})."
        raise ConfigError("data.num_workers", self.num_workers, problem, cure)

    def check_training(self, samples: int, world_size: int) -> None:
        super().check_training(samples, world_size)
        data = self.dataset("train", training=True)
        if isinstance(data, ShardImages):
            self.stream_count(len(data.shards.urls), self.batch_size, world_size)

    def describe(self, split: Split) -> dict[str, Any]:
        training = split == "train" and ((split, True) in self._opened or (split, False) not in self._opened)
        data: ImageSource = self.dataset(split, training=training)  # a view that is open: the other one may be refused
        transform = self.transform if split == "train" else self.transform.evaluation()
        return {"samples": len(data), "content": data.fingerprint(), "transform": transform.describe()}

    def loader(self, split: Split, *, training: bool = False, limit: int | None = None, batch_size: int | None = None) -> Any:
        data = self.dataset(split, training=training)
        if not isinstance(data, ShardImages):
            return super().loader(split, training=training, limit=limit, batch_size=batch_size)
        if overfit := getattr(self.trainer, "overfit_batches", 0):  # Lightning would ask the loader for its dataset in order
            problem = "a stream of shards cannot stay at its first batches."
            raise ConfigError("trainer.overfit_batches", overfit, problem, "Use local shards and data.mode: map.")
        (rank, world), size, rules = self.share(), batch_size or self.batch_size, self.rules_for(data)
        if not training:
            shares = EvaluationStream(data, batch_size=size, rank=rank, world_size=world, limit=limit, rules=rules)
            return EvaluationLoader(shares, num_workers=self.num_workers, start_method=self.start_method)
        if limit is not None:
            raise ConfigError("limit", limit, "a training stream has none.", "Use the trainer's limit_train_batches.")
        streams = self.stream_count(len(data.shards.urls), size, world)
        chunk = size * world // streams
        steps = len(data) // (size * world)
        plan = ShardPlan(data.shards.counts, streams, steps * chunk, max(self.shuffle_buffer // streams, 1), self.seed)
        return StreamLoader(
            TrainingStream(data, plan, chunk=chunk, rank=rank, world_size=world, rules=rules),
            batch_size=size,
            world_size=world,
            num_workers=self.num_workers,
            start_method=self.start_method,
            max_bad_fraction=self.max_bad_fraction,
        )
