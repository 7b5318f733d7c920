"""What is drawn for a sample depends on its key alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st

from srcflow import randomness

from .drawn import Feature, covering, every

KEY = {"seed": 3, "purpose": "noise", "step": 7}


def test_numbers_do_not_change_between_versions() -> None:
    """Seeds stand in papers and in metrics.json: other numbers for the same key would change every recorded result."""
    assert randomness.key(0, "noise", 0, 0) == 0x89BC75EB3A23FE99F1BFBC5D36BFBE18
    key = {"seed": 0, "purpose": "noise", "step": 0, "indices": [0, 5]}
    normal = torch.tensor([[0.6169798374, -0.1326770186], [-0.7939310670, -0.2462448627]])
    uniform = torch.tensor([[0.7883567810, 0.0724896789], [0.9091462493, 0.2397286296]])
    torch.testing.assert_close(randomness.normal((2,), **key), normal, rtol=0, atol=1e-7)
    torch.testing.assert_close(randomness.uniform((2,), **key), uniform, rtol=0, atol=1e-7)
    assert randomness.permutation(6, seed=0, purpose="shuffle").tolist() == [3, 0, 2, 1, 4, 5]


def test_every_part_of_the_key_matters() -> None:
    keys = {randomness.key(*parts) for parts in product((0, 1, 11), ("a", "a/1", "1/a"), (0, 1, 11), (0, 1, 11))}
    assert len(keys) == 81
    assert all(0 <= k < 2**128 for k in keys)


@pytest.mark.parametrize("draw", [randomness.normal, randomness.uniform])
def test_rows_do_not_depend_on_the_batch(draw: Callable[..., torch.Tensor]) -> None:
    batch = draw((4, 2), indices=[9, 2, 5, 2], **KEY)
    assert batch.shape == (4, 4, 2)
    assert batch.dtype == torch.float32
    for row, index in zip(batch, (9, 2, 5, 2), strict=True):
        assert torch.equal(draw((4, 2), indices=[index], **KEY)[0], row)
    assert torch.equal(draw((4, 2), indices=torch.tensor([5, 9]), **KEY), batch[[2, 0]])
    assert not torch.equal(batch[0], batch[1])
    for change in ({"seed": 4}, {"purpose": "dropout"}, {"step": 8}):
        assert not torch.equal(draw((4, 2), indices=[9], **{**KEY, **change}), batch[:1])


def shown(order: list[int], size: int) -> Iterator[Feature]:
    yield from (("size", size), ("order", "kept" if order == sorted(order) else "changed"))


@covering(
    settings(max_examples=25),
    st.permutations(range(8)),
    st.integers(1, 8),
    features=shown,
    needed=every(size=range(1, 9), order=["kept", "changed"]),
)
def test_order_and_batch_size_do_not_matter(order: list[int], size: int) -> None:
    whole = randomness.normal((3,), indices=range(8), **KEY)
    parts = torch.cat([randomness.normal((3,), indices=order[i : i + size], **KEY) for i in range(0, 8, size)])
    assert torch.equal(parts, whole[order])


def test_laws() -> None:
    normal = randomness.normal((500,), indices=range(40), **KEY).double()
    assert normal.mean().item() == pytest.approx(0, abs=4 / 20000**0.5)
    assert normal.var().item() == pytest.approx(1, abs=4 * (2 / 20000) ** 0.5)
    assert (normal**4).mean().item() == pytest.approx(3, abs=4 * (96 / 20000) ** 0.5)
    uniform = randomness.uniform((500,), indices=range(40), **KEY).double()
    assert float(uniform.min()) >= 0
    assert float(uniform.max()) < 1
    assert uniform.mean().item() == pytest.approx(0.5, abs=4 * (1 / 12 / 20000) ** 0.5)
    rows = randomness.normal((2000,), indices=range(2), **KEY).double()
    assert abs(torch.corrcoef(rows)[0, 1].item()) < 4 / 2000**0.5, "two samples' numbers are correlated"
    coins = randomness.bernoulli(0.2, indices=range(2000), **KEY)
    assert coins.dtype == torch.bool
    assert coins.shape == (2000,)
    assert coins.double().mean().item() == pytest.approx(0.2, abs=4 * (0.16 / 2000) ** 0.5)
    assert not randomness.bernoulli(0.0, indices=range(100), **KEY).any()
    assert randomness.bernoulli(1.0, indices=range(100), **KEY).all()


def test_scalars_and_empty_batches_have_the_stated_type() -> None:
    for draw in (randomness.normal, randomness.uniform):
        assert draw((), indices=[1, 2], **KEY).dtype == torch.float32
        assert draw((), indices=[1, 2], **KEY).shape == (2,)
        assert draw((3, 2), indices=[], **KEY).shape == (0, 3, 2)
    assert randomness.bernoulli(0.5, indices=[], **KEY).shape == (0,)


def test_global_generators_are_neither_read_nor_moved() -> None:
    torch.manual_seed(0)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first = randomness.normal((3,), indices=[1], **KEY)
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == numpy_before).all()  # noqa: NPY002
    torch.manual_seed(1)
    assert torch.equal(randomness.normal((3,), indices=[1], **KEY), first)


def test_permutation() -> None:
    order = randomness.permutation(100, seed=1, purpose="shuffle", step=2)
    assert order.dtype == torch.int64
    assert sorted(order.tolist()) == list(range(100))
    assert order.tolist() != list(range(100))
    assert torch.equal(randomness.permutation(100, seed=1, purpose="shuffle", step=2), order)
    assert not torch.equal(randomness.permutation(100, seed=1, purpose="shuffle", step=3), order)
    assert randomness.permutation(0, seed=1, purpose="shuffle").shape == (0,)
