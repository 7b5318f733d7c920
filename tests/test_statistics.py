"""The moments are exact, whatever the batches, their order and the number of ranks."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor
from torch import multiprocessing as mp

from srcflow.errors import ConfigError, DataError, ShapeError
from srcflow.statistics import Moments, principal_components, scale

from .drawn import Feature, covering, every


def data(n: int = 257, d: int = 5, offset: float = 100.0) -> Tensor:
    g = torch.Generator().manual_seed(0)
    mix = torch.randn(d, d, generator=g, dtype=torch.float64)
    return torch.randn(n, d, generator=g, dtype=torch.float64) @ mix + offset * torch.randn(d, generator=g, dtype=torch.float64)


def fed(x: Tensor, splits: list[int], covariance: bool = True) -> Moments:
    moments = Moments(x.shape[1:], covariance)
    for part in x.split(splits):
        moments.update(part)
    return moments


def relative(a: Tensor, b: Tensor) -> float:
    """Largest difference relative to the scale of b: for a covariance, to sqrt(c_ii c_jj)."""
    s = b.diagonal().sqrt() if b.ndim == 2 else b.abs()
    return float(((a - b).abs() / (torch.outer(s, s) if b.ndim == 2 else s)).max())


def shown(cuts: list[int], seed: int, ranks: int) -> Iterator[Feature]:
    yield from (("ranks", ranks), ("batches", "one" if not cuts else "several"))
    yield "a rank without samples", ranks > len(cuts) + 1
    yield "a batch of one", any(b - a == 1 for a, b in itertools.pairwise([0, *sorted(cuts), 257]))


@covering(
    settings(max_examples=40, deadline=None),
    st.lists(st.integers(1, 256), max_size=8, unique=True),
    st.integers(0, 99),
    st.integers(1, 4),
    features=shown,
    needed=every(
        ranks=range(1, 5),
        batches=["one", "several"],
        **{"a rank without samples": [False, True], "a batch of one": [False, True]},
    ),
)
def test_any_batching_order_and_rank_count_gives_the_same(cuts: list[int], seed: int, ranks: int) -> None:
    x = data()
    whole = fed(x, [len(x)])
    edges = [0, *sorted(cuts), len(x)]
    shuffled = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))]
    parts = shuffled.split([b - a for a, b in itertools.pairwise(edges)])
    total = Moments(5, covariance=True)
    for r in range(ranks):
        mine = Moments(5, covariance=True)
        for part in parts[r::ranks]:
            mine.update(part)
        total.merge(mine)
    assert total.count == whole.count == 257
    assert relative(total.mean, whole.mean) < 1e-10
    assert relative(total.covariance, whole.covariance) < 1e-10


def test_matches_the_definition_far_from_the_origin() -> None:
    x = data(offset=0) + 1e5
    moments = fed(x, [10, 100, 147])
    centred = x - x.mean(0)
    assert relative(moments.mean, x.mean(0)) < 1e-14
    assert relative(moments.covariance, centred.T @ centred / len(x)) < 1e-10
    assert relative(moments.var, x.var(0, correction=0)) < 1e-10


def test_float32_input_is_accumulated_in_float64() -> None:
    x = (data(20000, 3, 0) + 1000).float()
    moments = fed(x, [7] * 2857 + [1], covariance=False)
    assert relative(moments.mean, x.double().mean(0)) < 1e-12
    assert relative(moments.var, x.double().var(0, correction=0)) < 1e-10


def test_shapes() -> None:
    x = data(24, 4).reshape(6, 4, 4)
    channel, position = Moments(4), Moments((4, 4))
    channel.update(x)
    position.update(x)
    assert (channel.count, position.count) == (24, 6)
    torch.testing.assert_close(channel.var, x.reshape(-1, 4).var(0, correction=0))
    torch.testing.assert_close(position.mean, x.mean(0))
    torch.testing.assert_close(position.var, x.var(0, correction=0))


def test_rows_that_are_not_valid_do_not_count() -> None:
    x = data(8, 3).reshape(4, 2, 3)
    moments = Moments(3)
    moments.update(x, valid=torch.tensor([True, False, True, False]))
    torch.testing.assert_close(moments.mean, x[::2].reshape(-1, 3).mean(0))
    moments.update(x, valid=torch.zeros(4, dtype=torch.bool))
    assert moments.count == 4


def test_errors() -> None:
    with pytest.raises(DataError, match="no samples"):
        _ = Moments(3).mean
    with pytest.raises(ShapeError, match=r"\(\.\.\., 3\)"):
        Moments(3).update(torch.zeros(2, 4))
    with pytest.raises(ShapeError):
        Moments(3).merge(Moments(3, covariance=True))
    with pytest.raises(ConfigError, match="one axis"):
        Moments((2, 3), covariance=True)
    with pytest.raises(ConfigError, match="covariance=True"):
        _ = fed(data(), [257], covariance=False).covariance
    bad = Moments(2)
    bad.update(torch.tensor([[1.0, float("nan")], [0.0, 0.0]]))
    with pytest.raises(DataError, match="not finite"):
        _ = bad.var


def test_principal_components() -> None:
    moments = fed(data(500, 6, 3.0), [500])
    pca = principal_components(moments, 6)
    eye = torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(pca.components @ pca.components.T, eye)
    torch.testing.assert_close(pca.components.T @ pca.variances.diag() @ pca.components, moments.covariance)
    assert bool((pca.variances.diff() <= 0).all())
    largest = pca.components.gather(1, pca.components.abs().argmax(1, keepdim=True))
    assert bool((largest > 0).all())  # signs do not depend on the LAPACK at hand
    assert pca.explained == pytest.approx(1)
    two = principal_components(moments, 2)
    assert torch.equal(two.components, pca.components[:2])
    assert two.explained == pytest.approx(float(pca.variances[:2].sum() / pca.variances.sum()))
    for k in (0, 7):
        with pytest.raises(ConfigError, match="1 to 6"):
            principal_components(moments, k)


def test_scale() -> None:
    var = torch.tensor([0.0, 4.0])
    torch.testing.assert_close(scale(var, 0.25), torch.tensor([0.5, 4.25**0.5]))
    torch.testing.assert_close(scale(var, 0.25, "std"), torch.tensor([0.25, 2.25]))
    with pytest.raises(ConfigError):
        scale(var, 0.25, "neither")  # type: ignore[arg-type]


def _rank(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(GLOO_SOCKET_IFNAME="lo")
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    mine = Moments(5, covariance=True)
    if rank > 0:  # the first rank saw nothing
        mine.update(data()[:200] if rank == 1 else data()[200:])
    for _ in range(2):  # reducing twice counts nothing twice
        total = mine.all_reduced()
    torch.save((total.count, total.mean, total.covariance), Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_all_reduced_over_processes(tmp_path: Path) -> None:
    mp.start_processes(_rank, args=(3, str(tmp_path)), nprocs=3, start_method="fork")
    whole = fed(data(), [257])
    ranks = [torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in range(3)]
    for count, mean, covariance in ranks:
        assert count == 257
        assert relative(mean, whole.mean) < 1e-10
        assert relative(covariance, whole.covariance) < 1e-10
        assert torch.equal(mean, ranks[0][1])
        assert torch.equal(covariance, ranks[0][2])


def test_all_reduced_alone_is_a_copy() -> None:
    moments = fed(data(), [257])
    copy = moments.all_reduced()
    assert torch.equal(copy.covariance, moments.covariance)
    copy.update(data())
    assert moments.count == 257
