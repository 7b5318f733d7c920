"""Units of likelihoods, and the Gaussian baseline against torch's own."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from srcflow.errors import ConfigError, DataError, ShapeError
from srcflow.metrics.likelihood import GaussianBaseline, bits_per_dim, nll_per_dim

N, D = 3, 2


def codes(n: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(N * D, N * D, generator=torch.Generator().manual_seed(7))
    return (torch.randn(n, N * D, generator=g) @ mix + 2).reshape(n, N, D)


def test_uniform_pixels_cost_eight_bits_in_any_units() -> None:
    """Images whose 256 grey levels are equally likely: 8 bits, whatever units the density is of."""
    dims = 12
    assert bits_per_dim(torch.zeros(2), dims, bin_width=1 / 256).tolist() == pytest.approx([8, 8])  # [0, 1): density 1
    symmetric = torch.full((2,), -dims * math.log(2))  # [-1, 1): density 1/2
    assert bits_per_dim(symmetric, dims, bin_width=2 / 256).tolist() == pytest.approx([8, 8])


def test_bits_of_a_linear_flow_with_a_closed_form() -> None:
    """x = 0.5 z, z ~ N(0, 1): the density carries the scale's log-determinant."""
    z = torch.randn(4, 6, dtype=torch.float64)
    log_prob = (-0.5 * z.square() - 0.5 * math.log(2 * math.pi) - math.log(0.5)).sum(1)
    expected = -torch.distributions.Normal(0.0, 0.5).log_prob(0.5 * z).sum(1) / (6 * math.log(2)) + 7
    torch.testing.assert_close(bits_per_dim(log_prob, 6, bin_width=2 / 256), expected)


def test_nll_per_dim() -> None:
    assert nll_per_dim(torch.tensor([6.0], dtype=torch.bfloat16), 3).dtype == torch.float32
    assert nll_per_dim(torch.tensor([6.0], dtype=torch.float64), 3).dtype == torch.float64
    with pytest.raises(ConfigError, match="dims"):
        nll_per_dim(torch.tensor([1.0]), 0)
    with pytest.raises(ConfigError, match="bin_width"):
        bits_per_dim(torch.tensor([1.0]), 2, bin_width=0.0)


@pytest.mark.parametrize("kind", ["full", "token"])
@pytest.mark.parametrize("batch", [1, 13, 500])
def test_gaussian_against_torch(kind: str, batch: int) -> None:
    train, test = codes(500), codes(9, seed=1)
    baseline = GaussianBaseline(N, D, kind)  # type: ignore[arg-type]
    for part in train.split(batch):
        baseline.update(part)
    baseline.fit()
    rows = (train.flatten(1) if kind == "full" else train.flatten(0, 1)).double()
    reference = MultivariateNormal(rows.mean(0), rows.T.cov(correction=0))
    expected = reference.log_prob((test.flatten(1) if kind == "full" else test).double())
    expected = expected if kind == "full" else expected.sum(1)
    torch.testing.assert_close(baseline.log_prob(test), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(baseline.nll(test), -expected / (N * D), rtol=1e-9, atol=1e-9)


def test_gaussian_has_the_entropy_of_its_sample() -> None:
    """On its own training data the average nll is the entropy: half a nat per dimension plus the log-determinant's share."""
    train = codes(400)
    baseline = GaussianBaseline(N, D)
    baseline.update(train)
    sigma = train.double().flatten(1).T.cov(correction=0)
    entropy = 0.5 * (math.log(2 * math.pi) + 1) + 0.5 * torch.logdet(sigma) / (N * D)
    torch.testing.assert_close(baseline.fit().nll(train).mean(), entropy)


def test_masked_rows_do_not_count() -> None:
    train = codes(50)
    a, b = GaussianBaseline(N, D), GaussianBaseline(N, D)
    a.update(train)
    b.update(torch.cat([train, torch.full((3, N, D), torch.nan)]), valid=torch.arange(53) < 50)
    torch.testing.assert_close(a.fit().log_prob(train), b.fit().log_prob(train))


def test_singular_covariances_are_refused() -> None:
    few = GaussianBaseline(N, D)
    few.update(codes(6))
    with pytest.raises(DataError, match="more than 6 samples, not 6"):
        few.fit()
    flat = codes(100)
    flat[..., 1] = flat[..., 0] * 2 + 1
    for kind in ("full", "token"):
        baseline = GaussianBaseline(N, D, kind)  # type: ignore[arg-type]
        baseline.update(flat)
        with pytest.raises(DataError, match="singular"):
            baseline.fit()
    constant = codes(100)
    constant[..., 1] = 3
    baseline = GaussianBaseline(N, D, "token")
    baseline.update(constant)
    with pytest.raises(DataError, match="singular"):
        baseline.fit()


def test_must_be_fitted_after_every_update() -> None:
    baseline = GaussianBaseline(N, D)
    baseline.update(codes(50))
    with pytest.raises(DataError, match=r"fit\(\)"):
        baseline.nll(codes(2))
    baseline.fit()
    baseline.update(codes(50, seed=3))
    with pytest.raises(DataError, match=r"fit\(\)"):
        baseline.nll(codes(2))
    with pytest.raises(ShapeError, match=r"\(B, 3, 2\)"):
        baseline.update(torch.zeros(4, 2, 3))
