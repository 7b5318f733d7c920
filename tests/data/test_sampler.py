from __future__ import annotations

import pytest
from torch.utils.data import DistributedSampler

from srcflow.data.sampler import Draw, KeyedSampler

DATA = list(range(23))


def draws(shuffle: bool, rank: int = 0, world: int = 1, epoch: int = 0, seed: int = 0, limit: int | None = None) -> list[Draw]:
    sampler = KeyedSampler(DATA, shuffle=shuffle, seed=seed, rank=rank, world_size=world, limit=limit)  # type: ignore[arg-type]
    sampler.set_epoch(epoch)
    found = list(sampler)
    assert len(found) == len(sampler)
    return found


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_evaluation_sees_each_sample_once_in_equally_many_steps(world: int) -> None:
    ranks = [draws(False, r, world) for r in range(world)]
    assert len({len(r) for r in ranks}) == 1
    assert sorted(d.index for r in ranks for d in r if d.valid) == DATA


@pytest.mark.parametrize("world", [2, 3, 4])
def test_global_batches_do_not_depend_on_the_rank_count(world: int) -> None:
    alone = [d.index for d in draws(True, epoch=5)]
    ranks = [[d.index for d in draws(True, r, world, epoch=5)] for r in range(world)]
    together = [i for step in zip(*ranks, strict=True) for i in step]
    assert together == alone[: len(together)]
    assert len(together) == len(DATA) // world * world


def test_orders_differ_by_epoch_and_seed_and_can_be_repeated() -> None:
    orders = [tuple(d.index for d in draws(True, epoch=e, seed=s)) for e in range(3) for s in range(2)]
    assert len(set(orders)) == 6
    assert all(sorted(o) == DATA for o in orders)
    assert draws(True, epoch=2) == draws(True, epoch=2)
    assert all(d.epoch == 2 for d in draws(True, epoch=2))


def test_limit() -> None:
    assert [d.index for d in draws(False, limit=4)] == [0, 1, 2, 3]
    assert len(draws(False, limit=99)) == 23


def test_lightning_leaves_it_alone() -> None:
    assert isinstance(KeyedSampler(DATA, shuffle=True), DistributedSampler)  # type: ignore[arg-type]
