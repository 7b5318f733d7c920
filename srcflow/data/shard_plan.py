"""Which sample comes when, in a pass over shards that are read from front to back: a pure function of the data and the seed.

In each epoch the shards are put in a new order. The sequence of their samples is cut into T equal spans, one for each stream, which leaves
out the few samples of its span that make no complete batch: some at its start and the others at its end, drawn anew in each epoch. Each
stream is shuffled through a bounded buffer. Step t of a global batch G takes the t-th G / T samples of every stream. So the samples of a
step depend neither on the number of loader workers nor, while T and G stay the same, on the number of ranks, and each sample comes once per
epoch, up to the last incomplete batch.

A span may begin inside a shard, and what is before it is then read and thrown away: at most a shard per stream and epoch. If all shards
hold equally many samples, and T divides their number, every span begins where a shard does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from srcflow.randomness import generator, permutation

Ints = NDArray[np.int64]
MOST_STREAMS = 64
"""Streams of a small global batch; a large one has up to a stream for 8 samples."""


class Piece(NamedTuple):
    """A run of samples of one shard."""

    shard: int
    first: int  # of the shard's samples
    size: int


def default_streams(shards: int, global_batch: int, world_size: int = 1) -> int | None:
    """The number of streams: the largest divisor of the global batch that is not above the shards (nor above 64 or a stream for 8 samples).

    It does not depend on the number of ranks, unless that does not divide it: then it is the largest divisor that is a multiple of them.

    Args:
        shards: how many there are.
        global_batch: samples of one step on all ranks, a multiple of `world_size`.
        world_size: ranks.

    Returns:
        T; None if there are fewer shards than ranks.

    >>> default_streams(1024, 512), default_streams(10, 512), default_streams(1000, 60)
    (64, 8, 60)
    >>> default_streams(1000, 96, 32), default_streams(1024, 4096, 64), default_streams(2, 96, 32)
    (32, 512, None)
    """
    limit = min(shards, max(MOST_STREAMS, global_batch // 8, world_size))
    divisors = [t for t in range(limit, 0, -1) if global_batch % t == 0]
    if divisors and divisors[0] % world_size == 0:
        return divisors[0]
    return next((t for t in divisors if t % world_size == 0), None)


def pieces_between(shards: Sequence[int], counts: Ints, start: int, stop: int) -> Iterator[Piece]:
    """The pieces that make up samples start .. stop - 1 of a sequence of shards.

    Args:
        shards: their order.
        counts: (S,) samples of each shard.
        start: first position in the sequence.
        stop: behind the last.
    """
    ends = np.cumsum(counts[np.asarray(shards, np.int64)])
    at = int(np.searchsorted(ends, start, side="right"))
    while start < stop:
        begin = int(ends[at] - counts[shards[at]])
        end = min(int(ends[at]), stop)
        yield Piece(int(shards[at]), start - begin, end - start)
        start, at = end, at + 1


def buffered_order(n: int, buffer: int, rng: np.random.Generator) -> Ints:
    """A shuffle of 0 .. n - 1 that a reader with room for `buffer` samples can make: entry k is below k + `buffer`.

    Args:
        n: samples.
        buffer: at least 1 (which keeps the order).
        rng: what draws.
    """
    pool = list(range(min(buffer, n)))
    out = np.empty(n, np.int64)
    picks = rng.integers(0, buffer, max(n - buffer, 0)).tolist()
    for k, j in enumerate(picks):  # sample k + buffer takes the place of the one that leaves
        out[k] = pool[j]
        pool[j] = k + buffer
    out[len(picks) :] = rng.permutation(np.array(pool, np.int64))
    return out


@dataclass(frozen=True)
class ShardPlan:
    """The order of a training stream.

    Args:
        counts: (S,) samples of each shard.
        streams: T.
        length: samples of each stream in an epoch; T x length must not exceed all samples.
        buffer: samples in the shuffle buffer of each stream.
        seed: key of the orders.
    """

    counts: Ints
    streams: int
    length: int
    buffer: int
    seed: int = 0

    def pieces(self, epoch: int, stream: int) -> list[Piece]:
        """What a stream reads, in reading order."""
        shards = permutation(len(self.counts), seed=self.seed, purpose="shards", step=epoch).tolist()
        total = int(self.counts.sum())
        start, stop = stream * total // self.streams, (stream + 1) * total // self.streams
        start += int(generator(self.seed, "span", epoch, stream).integers(0, stop - start - self.length + 1))
        return list(pieces_between(shards, self.counts, start, start + self.length))

    def order(self, epoch: int, stream: int) -> Ints:
        """(length,) which of the samples that the stream reads, counted in reading order, comes when."""
        return buffered_order(self.length, self.buffer, generator(self.seed, "stream", epoch, stream))

    def indices(self, epoch: int, stream: int) -> Ints:
        """(length,) global sample indices in the order in which they come."""
        return global_indices(self.pieces(epoch, stream), self.counts)[self.order(epoch, stream)]


def global_indices(pieces: Sequence[Piece], counts: Ints) -> Ints:
    """Global sample indices of pieces, in reading order."""
    starts = np.cumsum(counts) - counts
    return np.concatenate([np.arange(p.size) + starts[p.shard] + p.first for p in pieces] or [np.empty(0, np.int64)])
