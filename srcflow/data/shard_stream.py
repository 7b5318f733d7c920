"""Images in tar shards that are read from front to back: local files, URLs and pipes, opened by webdataset.

What webdataset passes over in silence is an error here: a shard that ends early or goes on too long, and names that it would skip, merge or
split. Samples that a stream does not need (before its span begins, or seen before a resumed run stopped) are neither kept nor decoded.
"""

from __future__ import annotations

import subprocess
import tarfile
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, suppress
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from srcflow.data.batches import Bad, Sample, collate, collate_tolerantly
from srcflow.data.images import ImageSource
from srcflow.data.rules import Rules, rules_of
from srcflow.data.sampler import Draw
from srcflow.data.shard_index import ENCODING, LABELS, METADATA, grouped, is_file, parts, split_name
from srcflow.data.shard_labels import NO_LABEL, parse_label
from srcflow.data.shard_plan import Ints, Piece, ShardPlan, global_indices, pieces_between
from srcflow.data.shard_sources import ShardList, file_name, open_shard
from srcflow.data.transforms import EXTENSIONS, ImageTransform
from srcflow.errors import DataError
from srcflow.types import NULL_LABEL, Batch

WANTED = (*EXTENSIONS, *LABELS)


class Raw(NamedTuple):
    """An undecoded sample."""

    key: str
    files: dict[str, bytes]  # by extension


class ShardImages(ImageSource):
    """The samples of shards, to be read in the order of `pieces`.

    Args:
        shards: where they are, and how many samples each holds.
        transform: from RGB image to tensor.
        num_classes: 0 for no labels; otherwise every sample needs a `cls` or a `json` with an integer "label".
        tolerant: as in `ImageSource`.
    """

    def __init__(self, shards: ShardList, transform: ImageTransform, num_classes: int = 0, tolerant: bool = False) -> None:
        super().__init__(transform, num_classes, tolerant)
        self.shards = shards

    def __len__(self) -> int:
        return len(self.shards)

    def label_counts(self) -> dict[int, int] | None:
        """How many samples have which label; None where that was not recorded."""
        return self.shards.labels

    def key(self, index: int) -> str:
        """The WebDataset key, or, where no header was read yet, the shard's name and the sample's number in it."""
        if self.shards.keys is not None:
            return self.shards.keys[index]
        starts = self.shards.starts
        shard = int(np.searchsorted(starts, index, side="right")) - 1
        return f"{file_name(self.shards.urls[shard])}/{index - int(starts[shard])}"

    def fingerprint(self) -> str:
        return self.shards.fingerprint()

    def sample(self, raw: Raw, draw: Draw, shard: int) -> Sample:
        """Decode and transform.

        Raises:
            DataError: it cannot be decoded (unless `tolerant`), or has no label that can be used; names shard and key.
        """
        where = f"{self.shards.urls[shard]}: {raw.key}"
        image, extension = parts(self.shards.urls[shard], raw.key, raw.files)
        label = NULL_LABEL
        if self.num_classes:
            if extension is None:
                raise DataError(f"{where}: {NO_LABEL}")
            label = parse_label(raw.files[extension], extension == "json", where)
        return self.make(raw.files[image], label, draw, where)

    def samples(self, pieces: Sequence[Piece], order: Ints, epoch: int, start: int = 0) -> Generator[Sample, None, None]:
        """The samples of `pieces`, the `order[k]`-th in reading order as number k, from k = `start` on.

        A shard is opened when its first needed sample is due. Samples that were read and are not due yet are held undecoded.

        Args:
            pieces: what to read, in reading order.
            order: (n,) a permutation.
            epoch: for the transform.
            start: how many were seen before.
        """
        due = np.empty(len(order), np.int64)
        due[order] = np.arange(len(order))
        indices = global_indices(pieces, self.shards.counts)
        held: dict[int, tuple[Raw, int]] = {}
        with closing(self._read(pieces, due >= start)) as source:
            for at in order[start:].tolist():
                while at not in held:
                    position, raw, shard = next(source)
                    held[position] = raw, shard
                raw, shard = held.pop(at)
                yield self.sample(raw, Draw(epoch, int(indices[at])), shard)

    def _read(self, pieces: Sequence[Piece], needed: Any) -> Generator[tuple[int, Raw, int], None, None]:
        """Position in reading order, sample and shard of what is needed; `needed` is (n,) bool."""
        before = 0
        for shard, first, count in pieces:
            wanted = needed[before : before + count]
            if wanted.any():
                last = first + int(np.flatnonzero(wanted)[-1])

                def take(position: int, first: int = first, wanted: Any = wanted) -> bool:
                    return first <= position < first + len(wanted) and bool(wanted[position - first])

                with closing(self._shard(shard, take, last)) as samples:
                    for position, raw in samples:
                        yield before + position - first, raw, shard
            before += count

    def _shard(self, shard: int, take: Callable[[int], bool], last: int) -> Generator[tuple[int, Raw], None, None]:
        """Position and content of the samples of a shard that `take` wants, up to `last`. Its end is checked if `last` is there."""
        url, count = self.shards.urls[shard], int(self.shards.counts[shard])
        keys, start = self.shards.keys, int(self.shards.counts[:shard].sum())
        stream = open_shard(url)
        try:
            with tarfile.open(fileobj=stream, mode="r|", **ENCODING) as tar:
                position = -1
                for position, (key, files) in enumerate(grouped(url, _files(url, tar, take))):
                    if position >= count:
                        raise DataError(f"{url}: holds more samples than the {count} its index says: {key!r} is one too many.")
                    if keys is not None and keys[start + position] != key:
                        raise DataError(f"{url}: gave {key!r} where its headers promised another sample. It changed while it was in use.")
                    if take(position):
                        if position == count - 1:
                            pending = position, Raw(key, {e: data for e, data in files.items() if data is not None})
                        else:
                            yield position, Raw(key, {e: data for e, data in files.items() if data is not None})
                    if position == last < count - 1:
                        return
            while stream.read(1 << 20):  # what pads the archive; a command that is cut off would report an error
                pass
            stream.close()
        except DataError:
            raise
        except Exception as e:  # damaged headers make tarfile raise of every kind
            why = f"{str(e) or type(e).__name__}{_status(stream)}"
            raise DataError(f"{url}: cannot be read: {why}. It is damaged, or no tar archive.") from e
        finally:
            _drop(stream)
        if position + 1 != count:
            raise DataError(f"{url}: gave {position + 1} samples, its index says {count}. It is cut, damaged, or changed since.")
        yield pending


def _files(url: str, tar: tarfile.TarFile, take: Callable[[int], bool]) -> Iterator[tuple[str, bytes | None]]:
    """Names of an archive's files, and the content of those that are needed.

    Raises:
        DataError: a link, or the like, in place of a file.
    """
    position, current = -1, None
    while (member := tar.next()) is not None:
        tar.members = []  # type: ignore[attr-defined]  # tarfile would keep every header
        if METADATA.match(member.name) or not is_file(url, member):
            continue
        key, extension = split_name(member.name)
        if key != current:
            position, current = position + 1, key
        content = tar.extractfile(member) if extension in WANTED and take(position) else None
        yield member.name, None if content is None else content.read()


def _status(stream: Any) -> str:
    """What to say of the command behind a stream that broke off."""
    process = getattr(stream, "proc", None)
    if process is None:
        return ""
    with suppress(subprocess.TimeoutExpired):
        process.wait(1.0)
    return f" (exit status {process.poll()})" if process.poll() else ""


def _drop(stream: Any) -> None:
    """Close a stream, and end the command behind it if it is still at work."""
    process = getattr(stream, "proc", None)
    with suppress(OSError, subprocess.TimeoutExpired):
        if process is not None:
            stream.timeout = 5.0  # seconds; webdataset's are 7200
            if process.poll() is None:
                process.kill()  # loader workers ignore SIGTERM, and their commands inherit that
        stream.close()


class TrainingStream(IterableDataset[tuple[Batch, Bad]]):
    """A rank's steps of an epoch. An item is one loader worker's part of a step: chunks of the streams that the worker reads.

    The rank is given, not guessed in a worker; the position reaches persistent workers through shared memory. Item i of a DataLoader over
    this data set (`batch_size` None) comes from worker i mod W, so W items make up a step, in the order of the streams (`StreamLoader`).

    Args:
        images: what is read.
        plan: the order.
        chunk: samples that a step takes from each stream.
        rank: this process.
        world_size: number of processes; divides the plan's streams.
        rules: of the samples' further keys; None: those that `images` declares.
    """

    def __init__(
        self, images: ShardImages, plan: ShardPlan, *, chunk: int, rank: int = 0, world_size: int = 1, rules: Rules | None = None
    ) -> None:
        self.images, self.plan, self.chunk = images, plan, chunk
        self.rules = rules_of(images) if rules is None else rules
        per_rank = plan.streams // world_size
        self.streams = range(rank * per_rank, (rank + 1) * per_rank)
        self.steps = plan.length // chunk
        self._position = torch.zeros(2, dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]  # torch is untyped here

    def seek(self, epoch: int, step: int) -> None:
        """Choose where the next iteration begins, in all workers."""
        self._position.copy_(torch.tensor([epoch, step]))

    def __iter__(self) -> Iterator[tuple[Batch, Bad]]:
        worker, workers = _worker()
        epoch, step = self._position.tolist()
        return self._take(np.array_split(np.array(self.streams), workers)[worker].tolist(), epoch, step)

    def _take(self, streams: Sequence[int], epoch: int, step: int) -> Iterator[tuple[Batch, Bad]]:
        plan = self.plan
        readers = [self.images.samples(plan.pieces(epoch, s), plan.order(epoch, s), epoch, step * self.chunk) for s in streams]
        try:
            for _ in range(step, self.steps):
                yield collate_tolerantly([next(reader) for reader in readers for _ in range(self.chunk)], self.rules)
        finally:
            for reader in readers:
                reader.close()


class EvaluationStream(IterableDataset[tuple[Batch, Bad]]):
    """A rank's share of all samples, each once: contiguous, in ascending order, split into contiguous runs of batches for the workers.

    Ranks get equally many batches of equal size; what fills the last ones repeats a sample with `valid` False.

    Args:
        images: what is read.
        batch_size: per rank.
        rank: this process.
        world_size: number of processes.
        limit: the first samples only.
        rules: of the samples' further keys; None: those that `images` declares.
    """

    def __init__(
        self,
        images: ShardImages,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        limit: int | None = None,
        rules: Rules | None = None,
    ) -> None:
        self.images, self.batch_size = images, batch_size
        self.rules = rules_of(images) if rules is None else rules
        self.total = len(images) if limit is None else min(limit, len(images))
        per_rank = -(-self.total // world_size)
        self.start, self.stop = rank * per_rank, (rank + 1) * per_rank
        self.steps = -(-per_rank // batch_size)

    def __iter__(self) -> Iterator[tuple[Batch, Bad]]:
        worker, workers = _worker()
        batches = np.array_split(np.arange(self.steps), workers)[worker].tolist()
        slots = [range(begin, min(begin + self.batch_size, self.stop)) for b in batches for begin in [self.start + b * self.batch_size]]
        return self._take(slots) if slots else iter(())

    def _take(self, batches: Sequence[range]) -> Iterator[tuple[Batch, Bad]]:
        first = min(batches[0].start, self.total - 1)  # there may be nothing but padding
        last = max(min(batches[-1].stop, self.total), first + 1)
        counts = self.images.shards.counts
        pieces = list(pieces_between(range(len(counts)), counts, first, last))
        with closing(self.images.samples(pieces, np.arange(last - first), epoch=0)) as samples:
            sample = None
            for slots in batches:
                found = []
                for slot in slots:
                    valid = slot < self.total
                    if valid or sample is None:
                        sample = next(samples)
                    found.append(cast(Sample, {**sample, "valid": valid}))
                yield collate(found, self.rules), []


def _worker() -> tuple[int, int]:
    """(number of this worker, how many there are)."""
    info = get_worker_info()
    return (0, 1) if info is None else (info.id, info.num_workers)
