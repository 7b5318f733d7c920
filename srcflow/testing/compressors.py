"""The contract of compressors."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from srcflow import registry
from srcflow.compressors.base import Compressor
from srcflow.errors import ConfigError, ShapeError
from srcflow.testing.expect import check_construction, check_dead_parameters, close, device_of, differ, fail, finite, require
from srcflow.testing.perturbation import perturb
from srcflow.types import Grid


def check_compressor(compressor: Compressor, grid: Grid = (4, 4), *, seed: int = 0) -> None:
    """Check everything that `Compressor` promises: shapes, live parameters, rows that do not mix, and codes that fill their space.

    Args:
        compressor: the compressor; small ones make the check quick.
        grid: the token grid it is built for.
        seed: of the trial features and of the perturbation.

    Raises:
        AssertionError: what is broken, and by how much.
    """
    for name in ("dim", "code_dim"):
        value = getattr(compressor, name, None)
        require(isinstance(value, int) and value > 0, compressor, f"{name} is {value!r}.")
    device = device_of(compressor)
    compressor = copy.deepcopy(compressor)
    mean, components, x = (t.to(device) for t in _features(compressor.dim, compressor.code_dim, grid, seed))
    if compressor.needs_pca:
        compressor.init_from_pca(mean, components)
        require(not compressor.needs_pca, compressor, "still needs_pca after init_from_pca.")
    _pca(compressor, mean, components, x, grid)
    perturb(compressor, seed=seed)
    compressor.eval()
    with torch.no_grad():
        codes = _shapes(compressor, x, grid)
        _repeatable(compressor, x, codes, grid)
        _other_grid(compressor, x, grid)
        _autocast(compressor, x, grid)
        again = check_construction(compressor, Compressor)
        require(not again.needs_pca, compressor, "needs_pca again after its weights were loaded: the flag must live in the state_dict.")
        close(
            again.compress(x, grid), codes, 1e-5, compressor, "codes of the compressor, and of what its specification and state_dict build"
        )
        close(again.expand(codes, grid), compressor.expand(codes, grid), 1e-5, compressor, "features expanded by both")
        _channel_norm(compressor, grid, seed)
    _gradients(compressor, x, grid)


def _features(dim: int, code_dim: int, grid: Grid, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, principal components and a batch of features that are correlated and whose tokens differ in size."""
    g = torch.Generator().manual_seed(seed)
    mean = 0.2 * torch.randn(dim, generator=g)
    basis = torch.linalg.qr(torch.randn(dim, dim, generator=g, dtype=torch.float64)).Q.float()
    components = basis[: min(code_dim, dim)]
    spectrum = torch.linspace(2.0, 0.2, dim)
    size = torch.rand(3, grid[0] * grid[1], 1, generator=g) + 0.5
    return mean, components, mean + size * (torch.randn(3, grid[0] * grid[1], dim, generator=g) * spectrum) @ basis


def _shapes(compressor: Compressor, x: Tensor, grid: Grid) -> Tensor:
    codes = compressor.compress(x, grid)
    n, d = compressor.out_shape((int(x.shape[1]), int(x.shape[2])))
    require(d == compressor.code_dim, compressor, f"out_shape says width {d}, code_dim is {compressor.code_dim}.")
    require(
        tuple(codes.shape) == (x.shape[0], n, d), compressor, f"codes have shape {tuple(codes.shape)}; out_shape says {(x.shape[0], n, d)}."
    )
    back = compressor.expand(codes, grid)
    require(back.shape == x.shape, compressor, f"expanded features have shape {tuple(back.shape)}, expected {tuple(x.shape)}.")
    for what, t in (("codes", codes), ("expanded features", back)):
        require(t.dtype == torch.float32, compressor, f"{what} of float32 features are {t.dtype}.")
        finite(t, compressor, what)
    both = compressor(x, grid)
    close(both[0], codes, 1e-6, compressor, "codes of forward and of compress")
    close(both[1], back, 1e-5, compressor, "features of forward and of expand(compress)")
    differ(compressor.expand(codes + 0.5, grid), back, compressor, "expanded features do not depend on the codes.")
    return codes


def _repeatable(compressor: Compressor, x: Tensor, codes: Tensor, grid: Grid) -> None:
    close(compressor.compress(x, grid), codes, 0.0, compressor, "codes of the same features, called twice")
    back = compressor.expand(codes, grid)
    close(compressor.expand(codes, grid), back, 0.0, compressor, "expansion of the same codes, called twice")
    close(compressor.compress(x[1:2], grid), codes[1:2], 1e-4, compressor, "codes of a sample alone and in a batch")
    close(compressor.expand(codes[1:2], grid), back[1:2], 1e-4, compressor, "expansion of a sample alone and in a batch")
    other = x.clone()
    other[0] = -3.0 * x[0]
    close(compressor.compress(other, grid)[1:], codes[1:], 1e-4, compressor, "codes of the other rows before and after one row changed")


def _other_grid(compressor: Compressor, x: Tensor, grid: Grid) -> None:
    other = (grid[0], grid[1] + 1)
    more = torch.cat([x, x], dim=1)[:, : other[0] * other[1]]
    if more.shape[1] != other[0] * other[1]:
        return
    try:
        codes = compressor.compress(more, other)
        back = compressor.expand(codes, other)
    except (ShapeError, ConfigError):
        return  # refusing is fine as long as it is said
    except Exception as e:
        fail(compressor, f"the grid {other} raises {type(e).__name__} ({e}); it must work, or raise ShapeError or ConfigError.")
    n, d = compressor.out_shape((int(more.shape[1]), int(more.shape[2])))
    require(
        tuple(codes.shape) == (x.shape[0], n, d),
        compressor,
        f"codes on the grid {other} have shape {tuple(codes.shape)}; out_shape says {(n, d)}.",
    )
    require(back.shape == more.shape, compressor, f"expanded features on the grid {other} have shape {tuple(back.shape)}.")


def _autocast(compressor: Compressor, x: Tensor, grid: Grid) -> None:
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        codes = compressor.compress(x, grid)
        back = compressor.expand(codes, grid)
    require(codes.dtype == torch.float32, compressor, f"codes under bfloat16 autocast are {codes.dtype}, expected float32.")
    finite(back, compressor, "expanded features under bfloat16 autocast")


def _channel_norm(compressor: Compressor, grid: Grid, seed: int) -> None:
    """Codes must not lie on an axis-aligned ellipsoid sum_c (a_c y_c^2 + b_c y_c) = 1, which is where a LayerNorm or RMSNorm puts them,
    with or without an affine part: the density there is infinite. Least squares looks for such a surface through all tokens."""
    d = compressor.code_dim
    tokens, wanted = grid[0] * grid[1], 16 * d + 64
    x = torch.cat([_features(compressor.dim, d, grid, seed + 10 + i)[2] for i in range(-(-wanted // (3 * tokens)))]).to(
        device_of(compressor)
    )
    y = compressor.compress(x, grid).reshape(-1, d).double()
    y = y / y.square().mean().sqrt().clamp(min=1e-12)
    terms = torch.cat([y.square(), y], dim=1)
    ones = torch.ones(len(y), 1, dtype=torch.float64, device=y.device)
    solution = torch.linalg.lstsq(terms.cpu(), ones.cpu(), driver="gelsd").solution.to(y.device)
    residual = float((terms @ solution - ones).square().mean().sqrt())
    norms = y.norm(dim=1)
    require(
        residual > 0.02,
        compressor,
        f"all codes lie on one ellipsoid (residual {residual:.2g}; their norms vary by {float(norms.std() / norms.mean()):.2g}): "
        "the codes carry a channel norm, where a density is infinite.",
    )


def _gradients(compressor: Compressor, x: Tensor, grid: Grid) -> None:
    trainable = [n for n, p in compressor.named_parameters() if p.requires_grad]
    if not compressor.trainable:
        require(not trainable, compressor, f"says trainable = False, but {', '.join(trainable[:5])} require a gradient.")
        require(compressor.last_layer() is None, compressor, "says trainable = False, but has a last_layer.")
    else:
        require(bool(trainable), compressor, "says trainable = True, but has no trainable parameter.")
        last = compressor.last_layer()
        require(any(last is p for p in compressor.parameters()), compressor, "last_layer() is not one of its parameters.")
    compressor.train()
    compressor.zero_grad(set_to_none=True)
    leaf = x.clone().requires_grad_()
    codes, back = compressor(leaf, grid)
    (codes_gradient,) = torch.autograd.grad(back.square().mean(), codes, retain_graph=True)
    require(bool(codes_gradient.any()), compressor, "no gradient reaches the codes from the expanded features.")
    target = torch.randn(back.shape, generator=torch.Generator().manual_seed(1)).to(back)
    (back - target).square().mean().backward()
    require(leaf.grad is not None and bool(leaf.grad.any()), compressor, "no gradient reaches the features.")
    check_dead_parameters(compressor, compressor)


def _pca(compressor: Compressor, mean: Tensor, components: Tensor, x: Tensor, grid: Grid) -> None:
    fresh = registry.build(registry.spec_of(compressor), Compressor).to(x.device).eval()
    if not fresh.needs_pca:
        return
    fresh.init_from_pca(mean, components)
    centred = x - mean
    expected = mean + centred @ components.T @ components
    with torch.no_grad():
        got = fresh.expand(fresh.compress(x, grid), grid)
    close(got, expected, 1e-4, compressor, "the start from PCA: expand(compress(x)) and the principal components' own reconstruction")
