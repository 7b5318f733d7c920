"""Which samples a rank sees, in which order: one sampler for training and evaluation, and the draw it hands to a dataset."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset, DistributedSampler

from srcflow.randomness import permutation


@dataclass(frozen=True)
class Draw:
    """One request to a dataset. It carries the epoch, so that workers (persistent ones too) know which random numbers the sample gets."""

    epoch: int
    index: int
    valid: bool = True  # False: padding, which evaluation must not count


class KeyedSampler(DistributedSampler[Any]):
    """Yields `Draw`s. The order of an epoch depends on (seed, epoch) alone; rank r of R takes positions r, r + R, ... of it.

    So one global batch holds the same samples for any number of ranks. Every rank gets equally many draws: in evaluation the missing ones
    are repeated with `valid` False, so that each sample counts exactly once; in training a remainder is dropped, and it is another one in
    each epoch. It is a `DistributedSampler`, hence Lightning neither replaces nor wraps it, and calls `set_epoch` on it.

    Args:
        dataset: anything with a length.
        shuffle: a new order in every epoch, and no padding (training); otherwise ascending and padded (evaluation).
        seed: key of the order.
        rank: this process.
        world_size: number of processes that share the data.
        limit: take the first `limit` samples only.

    Attributes:
        epoch: what the next iteration yields.
        start: how many of this rank's draws of that epoch it leaves out, because they were made before.
    """

    epoch: int

    def __init__(
        self, dataset: Dataset[Any], *, shuffle: bool, seed: int = 0, rank: int = 0, world_size: int = 1, limit: int | None = None
    ) -> None:
        super().__init__(dataset, num_replicas=world_size, rank=rank, shuffle=shuffle, seed=seed, drop_last=shuffle)
        length = len(dataset)  # type: ignore[arg-type]  # a map-style dataset has a length
        self.total = length if limit is None else min(limit, length)
        self.world_size = world_size
        self.num_samples = self.total // world_size if shuffle else -(-self.total // world_size)
        self.start = 0

    def __len__(self) -> int:
        return self.num_samples

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch; within the present one nothing moves."""
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    def __iter__(self) -> Iterator[Any]:
        epoch, start = self.epoch, self.start  # both may move while this runs
        order = permutation(self.total, seed=self.seed, purpose="order", step=epoch) if self.shuffle else torch.arange(self.total)
        for i in range(start, self.num_samples):
            position = i * self.world_size + self.rank
            valid = position < self.total
            yield Draw(epoch, int(order[position if valid else 0]), valid)
