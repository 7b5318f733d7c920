"""The order of training streams: promises of `srcflow.data.shard_plan`, for any data."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st

from srcflow.data.shard_plan import Piece, ShardPlan, buffered_order, default_streams, pieces_between

from ..drawn import Feature, covering, every

counts = st.lists(st.integers(1, 30), min_size=1, max_size=12)
epochs = st.integers(0, 3)


def plan_of(sizes: list[int], streams: int, buffer: int, seed: int = 0) -> ShardPlan:
    return ShardPlan(np.array(sizes), streams, sum(sizes) // streams, buffer, seed)


def shown(sizes: list[int], streams: int, buffer: int, epoch: int) -> Iterator[Feature]:
    length = sum(sizes) // streams
    yield from (("epoch", epoch), ("streams", streams), ("shards", "one" if len(sizes) == 1 else "several"))
    yield "length", "none" if length == 0 else "less than all" if length * streams < sum(sizes) else "all"
    yield "buffer", "one" if buffer == 1 else "holds a stream" if buffer >= length else "smaller"
    yield "spans", "within shards" if length < min(sizes) else "over shards"


NEEDED = every(epoch=range(4), streams=range(1, 9), shards=["one", "several"], length=["none", "less than all", "all"])
NEEDED |= every(buffer=["one", "holds a stream", "smaller"], spans=["within shards", "over shards"])


def plans(test: Callable[..., None]) -> Callable[[], None]:
    """A property of plans of every kind."""
    drawn = (counts, st.integers(1, 8), st.integers(1, 40), epochs)
    return covering(settings(max_examples=100), *drawn, features=shown, needed=NEEDED)(test)


@plans
def test_each_sample_comes_once_but_for_less_than_a_round(sizes: list[int], streams: int, buffer: int, epoch: int) -> None:
    plan = plan_of(sizes, streams, buffer)
    seen = np.concatenate([plan.indices(epoch, s) for s in range(streams)])
    assert len(np.unique(seen)) == len(seen) == streams * plan.length > sum(sizes) - streams
    assert not len(seen) or (seen.min() >= 0 and seen.max() < sum(sizes))


@plans
def test_pieces_and_order_say_the_same_as_the_indices(sizes: list[int], streams: int, buffer: int, epoch: int) -> None:
    plan, starts = plan_of(sizes, streams, buffer), np.cumsum([0, *sizes])
    for stream in range(streams):
        pieces = plan.pieces(epoch, stream)
        assert all(p.size > 0 and p.first + p.size <= sizes[p.shard] for p in pieces)
        read = [starts[p.shard] + p.first + i for p in pieces for i in range(p.size)]
        assert [read[k] for k in plan.order(epoch, stream)] == plan.indices(epoch, stream).tolist()


def shown_by_a_buffer(n: int, buffer: int, seed: int) -> Iterator[Feature]:
    yield "samples", "none" if n == 0 else "fewer" if n <= buffer else "more"
    yield from (("buffer", "one" if buffer == 1 else "more"), ("seed", seed))


@covering(
    settings(max_examples=100),
    st.integers(0, 200),
    st.integers(1, 50),
    st.integers(0, 5),
    features=shown_by_a_buffer,
    needed=every(samples=["none", "fewer", "more"], buffer=["one", "more"], seed=range(6)),
)
def test_a_reader_holds_no_more_than_the_buffer(n: int, buffer: int, seed: int) -> None:
    order = buffered_order(n, buffer, np.random.default_rng(seed))
    assert sorted(order) == list(range(n))
    read = 0
    for given_out, at in enumerate(order.tolist()):
        read = max(read, at + 1)
        assert read - given_out <= buffer


def test_a_buffer_of_one_keeps_the_order_and_a_large_one_does_not() -> None:
    rng = np.random.default_rng(0)
    assert buffered_order(50, 1, rng).tolist() == list(range(50))
    moved = np.abs(buffered_order(1000, 200, rng) - np.arange(1000))
    assert moved.mean() > 50
    assert np.unique(buffered_order(1000, 5000, rng)).size == 1000


def test_epochs_and_seeds_have_other_shards_and_other_orders() -> None:
    def signature(epoch: int, seed: int) -> tuple[int, ...]:
        return tuple(plan_of([7] * 9, 3, 5, seed).indices(epoch, 0).tolist())

    assert len({signature(e, s) for e in range(4) for s in range(3)}) == 12
    assert signature(2, 1) == signature(2, 1)
    firsts = {plan_of([7] * 9, 3, 5).pieces(e, 0)[0].shard for e in range(20)}
    assert len(firsts) > 4


def test_what_an_epoch_leaves_out_is_seen_in_others() -> None:
    plan = ShardPlan(np.array([5, 6, 4]), 2, 6, 4)
    left = [set(range(15)) - {int(i) for s in range(2) for i in plan.indices(e, s)} for e in range(6)]
    assert all(len(rest) == 3 for rest in left)
    assert not set.intersection(*left)


def test_equal_shards_are_read_from_their_starts_and_nothing_is_left_out_for_ever() -> None:
    """What is read in vain is only what the epoch leaves out: here 3 of the 19 samples of a span, and not a shard's beginning."""
    plan = ShardPlan(np.full(8, 19), 8, 16, 4)
    pieces = [plan.pieces(e, s) for e in range(40) for s in range(8)]
    assert all(len(p) == 1 and p[0].first <= 3 for p in pieces)
    assert {p[0].first for p in pieces} == {0, 1, 2, 3}
    assert len({int(i) for e in range(40) for s in range(8) for i in plan.indices(e, s)}) == 8 * 19
    longer = ShardPlan(np.full(8, 19), 4, 36, 4)
    assert all(longer.pieces(e, s)[0].first <= 2 for e in range(4) for s in range(4))


def test_pieces_of_a_sequence() -> None:
    sizes = np.array([3, 4, 2])
    assert list(pieces_between([2, 0, 1], sizes, 1, 8)) == [Piece(2, 1, 1), Piece(0, 0, 3), Piece(1, 0, 3)]
    assert list(pieces_between([0, 1, 2], sizes, 3, 7)) == [Piece(1, 0, 4)]
    assert list(pieces_between([0, 1, 2], sizes, 4, 4)) == []


def shown_by_sizes(shards: int, batch: int, world: int) -> Iterator[Feature]:
    yield "shards", "too few" if shards < world else "fewer than the batch" if shards < batch * world else "many"
    yield "world", "one" if world == 1 else "a power of two" if world & (world - 1) == 0 else "another"


@covering(
    settings(max_examples=100),
    st.integers(1, 300),
    st.integers(1, 64),
    st.integers(1, 16),
    features=shown_by_sizes,
    needed=every(shards=["too few", "fewer than the batch", "many"], world=["one", "a power of two", "another"]),
)
def test_the_default_number_of_streams(shards: int, batch: int, world: int) -> None:
    streams, whole = default_streams(shards, batch * world, world), batch * world
    if shards < world:
        assert streams is None
        return
    assert streams is not None
    assert world <= streams <= shards
    assert whole % streams == 0
    assert streams % world == 0


@pytest.mark.parametrize("shards", [16, 100, 1024])
def test_powers_of_two_have_the_same_streams_on_any_number_of_ranks(shards: int) -> None:
    assert len({default_streams(shards, 512, world) for world in (1, 2, 4, 8, 16)}) == 1
