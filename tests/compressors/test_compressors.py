"""Compressors: exact PCA starts, round trips, shapes, gradients and precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from srcflow.compressors.base import Compressor
from srcflow.compressors.conv import Conv
from srcflow.compressors.identity import Identity
from srcflow.compressors.linear import Linear
from srcflow.compressors.pca import PCA
from srcflow.compressors.semantic import Semantic
from srcflow.errors import ConfigError, ShapeError
from srcflow.registry import build, spec_of
from srcflow.statistics import Moments, principal_components
from srcflow.testing import check_compressor

D, d, GRID = 12, 5, (3, 4)


def features(batch: int = 3, grid: tuple[int, int] = GRID, dim: int = D, dtype: torch.dtype = torch.float32) -> Tensor:
    g = torch.Generator().manual_seed(1)
    scales = torch.linspace(0.2, 3, dim)
    return (torch.randn(batch, grid[0] * grid[1], dim, generator=g) * scales + scales).to(dtype)


def pca_of(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    moments = Moments(x.shape[-1], covariance=True)
    moments.update(x)
    found = principal_components(moments, k)
    return found.mean, found.components


def semantic(**changes: Any) -> Semantic:
    return Semantic(**{"dim": D, "code_dim": d, "width": 16, "layers": 2, "head_dim": 8, "grid": GRID, **changes})


def conv(**changes: Any) -> Conv:
    return Conv(**{"dim": D, "code_dim": d, "width": 16, "layers": 2, **changes})


def linear(**changes: Any) -> Linear:
    return Linear(**{"dim": D, "code_dim": d, **changes})


LEARNED: list[Callable[..., Compressor]] = [semantic, conv, linear]


def perturb(module: torch.nn.Module) -> None:
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in module.parameters():
            p += 0.05 * torch.randn(p.shape, generator=g)


@pytest.mark.parametrize("make", [*LEARNED, lambda: PCA(D, d), lambda: semantic(width=8), lambda: semantic(width=24), lambda: conv(width=8),
                                  lambda: semantic(code_dim=D), lambda: semantic(layers=0)])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_start_is_pca(make: Callable[..., Compressor], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    c = make().to(dtype)
    x = features(dtype=dtype)
    mean, components = pca_of(x, c.code_dim)
    assert c.needs_pca
    c.init_from_pca(mean, components)
    assert not c.needs_pca
    codes, back = c(x, GRID)
    want = (x.double() - mean) @ components.T
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(codes.double(), want, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(back.double(), want @ components + mean, rtol=tolerance, atol=tolerance)
    assert c.out_shape((12, D)) == tuple(codes.shape[1:])


@pytest.mark.parametrize("make", [lambda: PCA(D, D), lambda: linear(code_dim=D), lambda: semantic(code_dim=D), lambda: conv(code_dim=D)])
def test_full_rank_pca_is_a_round_trip(make: Callable[..., Compressor]) -> None:
    c, x = make(), features()
    c.init_from_pca(*pca_of(x, D))
    torch.testing.assert_close(c(x, GRID)[1], x, rtol=1e-5, atol=1e-5)


def test_identity() -> None:
    c, x = Identity(D), features()
    codes, back = c(x, GRID)
    assert torch.equal(codes, x)
    assert torch.equal(back, x)
    assert (c.trainable, c.needs_pca, c.last_layer(), c.out_shape((7, D))) == (False, False, None, (7, D))


@pytest.mark.parametrize("make", [*LEARNED, lambda: PCA(D, d), lambda: Identity(D), lambda: semantic(start="random")])
def test_public_contract(make: Callable[..., Compressor]) -> None:
    torch.manual_seed(0)
    check_compressor(make(), GRID)


@pytest.mark.parametrize("make", LEARNED)
@pytest.mark.parametrize("start", ["pca", "random"])
def test_every_parameter_and_the_input_get_gradients(make: Callable[..., Compressor], start: str) -> None:
    torch.manual_seed(0)
    c = make(start=start)
    assert c.needs_pca == (start == "pca")
    x = features()
    c.init_from_pca(*pca_of(x, d))
    perturb(c)
    x.requires_grad_()
    c(x, GRID)[1].square().sum().backward()
    dead = [n for n, p in c.named_parameters() if p.grad is None or not bool(p.grad.abs().max() > 0)]
    assert not dead
    assert x.grad is not None
    assert bool((x.grad.abs().sum(-1) > 0).all())
    last = c.last_layer()
    assert last is not None
    assert last.shape[0] == D
    assert any(last is p for p in c.parameters())


@pytest.mark.parametrize("make", [semantic, conv])
def test_training_leaves_the_start(make: Callable[..., Compressor]) -> None:
    """From the exact PCA start, with branches at zero, a few steps reach every parameter."""
    torch.manual_seed(0)
    c, x = make(), features()
    c.init_from_pca(*pca_of(x, d))
    before = {n: p.detach().clone() for n, p in c.named_parameters()}
    optimizer = torch.optim.AdamW(c.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        loss = (c(x, GRID)[1] - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert not [n for n, p in c.named_parameters() if torch.equal(p, before[n])]
    assert losses[-1] < 0.9 * losses[0]  # below PCA, which is the best linear map


@pytest.mark.parametrize("start", ["random", "pca"])
def test_random_start_ignores_pca(start: str) -> None:
    c = semantic(start=start)
    before = {n: p.detach().clone() for n, p in c.named_parameters()}
    c.init_from_pca(*pca_of(features(), d))
    unchanged = all(torch.equal(p, before[n]) for n, p in c.named_parameters())
    assert unchanged == (start == "random")


def test_attention_is_global_and_convolutions_are_local() -> None:
    torch.manual_seed(0)
    grid = (1, 9)
    x = features(1, grid).requires_grad_()
    for c, reach in ((semantic(start="random", grid=grid), 9), (conv(start="random", layers=1, kernel=3), 3), (linear(start="random"), 1)):
        (grad,) = torch.autograd.grad(c.compress(x, grid)[0, 0].sum(), x)
        assert int((grad[0].abs().sum(-1) > 0).sum()) == reach


@pytest.mark.parametrize("make", LEARNED)
def test_other_grids(make: Callable[..., Compressor]) -> None:
    torch.manual_seed(0)
    c = make(start="random")
    x = features(2, (5, 2))
    codes, back = c(x, (5, 2))
    assert (codes.shape, back.shape) == ((2, 10, d), (2, 10, D))
    with pytest.raises(ShapeError, match=r"3 \* 4"):
        c.compress(x, (3, 4))
    with pytest.raises(ShapeError):
        c.expand(x, (5, 2))


def test_positions_are_resampled_smoothly() -> None:
    c = semantic(start="random", layers=0, grid=(4, 4))
    ramp = torch.arange(4.0)[:, None].expand(4, 4).reshape(16, 1).expand(16, 16)
    with torch.no_grad():
        c.enc.positions.copy_(ramp)
    table = c.enc._positions((8, 4)).reshape(8, 4, 16)
    assert torch.equal(table[:, :1].expand(8, 4, 16), table)  # nothing changes along the columns
    assert bool((table[1:] > table[:-1]).all())


@pytest.mark.parametrize("make", [*LEARNED, lambda **_: PCA(D, d)])
def test_codes_are_float32_under_autocast(make: Callable[..., Compressor]) -> None:
    torch.manual_seed(0)
    c, x = make(), features()
    c.init_from_pca(*pca_of(x, d))
    exact = c(x, GRID)
    with torch.autocast("cpu", torch.bfloat16):
        codes, back = c(x, GRID)
    assert codes.dtype == back.dtype == torch.float32
    torch.testing.assert_close(codes, exact[0], rtol=0.02, atol=0.1)
    # not merely stored in float32: rounding to bfloat16 would change them
    assert not torch.equal(codes, codes.bfloat16().float())
    assert not torch.equal(back, back.bfloat16().float())


@pytest.mark.parametrize("make", [*LEARNED, lambda **_: PCA(D, d), lambda **_: Identity(D)])
def test_specification_state_and_meta_device(make: Callable[..., Compressor]) -> None:
    torch.manual_seed(0)
    c, x = make(), features()
    c.init_from_pca(*pca_of(x, c.code_dim))
    perturb(c)
    again = build(spec_of(c), Compressor)
    again.load_state_dict(c.state_dict())
    assert not again.needs_pca  # the state says that the start has been made
    assert torch.equal(again.compress(x, GRID), c.compress(x, GRID))
    with torch.device("meta"):
        meta = make()
    assert {n: t.shape for n, t in meta.state_dict().items()} == {n: t.shape for n, t in c.state_dict().items()}
    assert all(t.is_meta for t in meta.state_dict().values())


def test_default_width() -> None:
    with torch.device("meta"):
        assert Semantic(768).width == 768
        assert Semantic(112, 8).width == 128
        assert Conv(112, 8).width == 128
        assert Semantic(1152).enc.layers[0].attention.heads == 18


@pytest.mark.parametrize(("make", "key"), [
    (lambda: semantic(width=20), "compressor.width"),
    (lambda: semantic(width=4, head_dim=4), "compressor.code_dim"),
    (lambda: semantic(code_dim=13), "compressor.dim"),
    (lambda: semantic(start="zero"), "compressor.start"),
    (lambda: semantic(layers=-1), "compressor.layers"),
    (lambda: conv(kernel=4), "compressor.kernel"),
    (lambda: PCA(4, 5), "compressor.code_dim"),
    (lambda: PCA(4, 2).compress(torch.zeros(1, 1, 4), (1, 1)), "fitted"),
])  # fmt: skip
def test_errors_name_the_key(make: Callable[[], Any], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        make()


def test_pca_of_other_sizes_is_refused() -> None:
    for c in (PCA(D, d), semantic()):
        with pytest.raises(ShapeError, match="code_dim = 5"):
            c.init_from_pca(*pca_of(features(), 4))
