"""Loaders over shards that are read from front to back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Generic, TypeVar, cast

import torch

from srcflow.data.batches import Bad, BadSamples, join, unchanged
from srcflow.data.shard_stream import EvaluationStream, ShardImages, TrainingStream
from srcflow.data.workers import SteadyLoader
from srcflow.datamodules.base import worker_options
from srcflow.types import Batch


class StreamPosition:
    """Where a training stream is. Lightning finds it as the loader's `sampler` and sets the epoch.

    Attributes:
        epoch: what the next iteration yields.
        step: how many batches of that epoch it leaves out, because they were given before.
    """

    shares_ranks = True  # a rank's stream is its own share

    def __init__(self) -> None:
        self.epoch = self.step = 0

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch; within the present one nothing moves."""
        if epoch != self.epoch:
            self.epoch, self.step = epoch, 0


Stream = TypeVar("Stream", TrainingStream, EvaluationStream)


class _Reader(Generic[Stream]):
    """A DataLoader behind a loader of our own: its length, and its worker processes, which Lightning ends with a stage."""

    stream: Stream
    _loader: SteadyLoader[Any]

    def __len__(self) -> int:
        return self.stream.steps

    @property
    def _iterator(self) -> Any:
        """Where Lightning looks for workers to end."""
        return self._loader._iterator

    @_iterator.setter
    def _iterator(self, iterator: Any) -> None:
        self._loader._iterator = iterator


class StreamLoader(_Reader[TrainingStream]):
    """Endless epochs of complete batches from a `TrainingStream`; each `iter` yields what is left of the present one, which may be nothing.

    The position moves on with every batch that is handed out, and into the next epoch with the last one. Its state is the same on every
    rank and counts samples over all ranks; a run that goes on from it gets the very next batch, and opens only the shards that it needs.

    Args:
        stream: the rank's share.
        batch_size: per rank.
        world_size: number of ranks.
        num_workers: loader processes, at most one per stream of the rank.
        start_method: of the workers: fork, spawn or forkserver; None: the platform's.
        max_bad_fraction: how many of an epoch's samples may fail to decode before the run stops.

    Attributes:
        sampler: the position.
        bad: what did not decode.
    """

    def __init__(
        self,
        stream: TrainingStream,
        *,
        batch_size: int,
        world_size: int = 1,
        num_workers: int = 0,
        start_method: str | None = None,
        max_bad_fraction: float = 0.0,
    ) -> None:
        self.stream, self.batch_size, self.world_size = stream, batch_size, world_size
        self.sampler = StreamPosition()
        self.bad = BadSamples(max_bad_fraction, stream.rules)
        self._shares = max(num_workers, 1)
        self._loader = SteadyLoader(stream, batch_size=None, collate_fn=unchanged, **worker_options(num_workers, start_method))

    def __iter__(self) -> Iterator[Batch]:
        position, steps = self.sampler, len(self)  # a generator: it starts at the first batch, when the epoch is known
        epoch, first = position.epoch, position.step
        if first >= steps:  # nothing is left
            position.set_epoch(epoch + 1)
            return
        self.stream.seek(epoch, first)
        items = iter(self._loader)
        for step in range(first, steps):
            shares: list[tuple[Batch, Bad]] = [next(items) for _ in range(self._shares)]
            batch, bad = join(shares, pin=torch.cuda.is_available(), rules=self.stream.rules)
            if step + 1 == steps:
                position.set_epoch(epoch + 1)
            else:
                position.step = step + 1
            yield self.bad.mend(batch, bad, epoch=epoch, samples=steps * self.batch_size)

    def state_dict(self) -> dict[str, int]:
        """The position: `epoch`, and `done`, how many samples of it all ranks have been given."""
        return {"epoch": self.sampler.epoch, "done": self.sampler.step * self.batch_size * self.world_size}

    def rewound(self, batches: int) -> dict[str, int]:
        """`state_dict` as it was some batches ago, in the same epoch."""
        epoch, step = self.sampler.epoch, self.sampler.step
        if batches and step == 0:  # the epoch's last batch was handed out
            epoch, step = epoch - 1, len(self)
        return {"epoch": epoch, "done": (step - batches) * self.batch_size * self.world_size}

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        """Go to a position."""
        if state_dict:
            step = state_dict["done"] // (self.batch_size * self.world_size)
            self.sampler.epoch, self.sampler.step = state_dict["epoch"], min(step, len(self))  # another batch size may leave nothing of it


class EvaluationLoader(_Reader[EvaluationStream]):
    """Batches of an `EvaluationStream`.

    Args:
        stream: the rank's share.
        num_workers: loader processes.
        start_method: of the workers: fork, spawn or forkserver; None: the platform's.

    Attributes:
        sampler: says that the stream is a rank's share.
        batch_size: per rank.
    """

    def __init__(self, stream: EvaluationStream, *, num_workers: int = 0, start_method: str | None = None) -> None:
        self.stream, self.batch_size, self.sampler = stream, stream.batch_size, StreamPosition()
        options = worker_options(min(num_workers, stream.steps), start_method)
        self._loader = SteadyLoader(stream, batch_size=None, collate_fn=unchanged, **options)

    @property
    def dataset(self) -> ShardImages:
        """What is read."""
        return self.stream.images

    def __iter__(self) -> Iterator[Batch]:
        for share in self._loader:
            yield join([cast(tuple[Batch, Bad], share)], pin=torch.cuda.is_available(), rules=self.stream.rules)[0]
