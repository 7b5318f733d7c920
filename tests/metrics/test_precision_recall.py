"""Improved precision and recall on sets whose answer is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from srcflow.errors import DataError
from srcflow.metrics.precision_recall import PrecisionRecall


def measure(real: Tensor, fake: Tensor, block: int = 64) -> dict[str, float]:
    metric = PrecisionRecall(block=block)
    for part in real.split(50):
        metric.update(part, real=True)
    for part in fake.split(50):
        metric.update(part)
    return metric.compute()


def clusters(centres: list[float], n: int, seed: int, spread: float = 1.0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.cat([torch.randn(n, 8, generator=g) * spread + c for c in centres])


def test_mode_collapse_is_precise_and_recalls_nothing() -> None:
    real = clusters([0.0, 100.0], 150, seed=0)
    fake = real[:1] + 1e-3 * clusters([0.0], 300, seed=1)  # one mode, shrunk to a point of the data
    result = measure(real, fake)
    assert result["precision"] == 1
    assert result["recall"] <= 1 / 300  # the one sample it collapsed to


def test_a_missing_mode_halves_the_recall() -> None:
    real = clusters([0.0, 100.0], 200, seed=0)
    result = measure(real, clusters([0.0], 400, seed=1))
    assert result["precision"] > 0.8
    assert 0.35 < result["recall"] <= 0.5


def test_noise_recalls_but_is_not_precise() -> None:
    real = clusters([0.0], 300, seed=0)
    result = measure(real, torch.cat([clusters([0.0], 150, seed=1), clusters([50.0], 150, seed=2)]))
    assert 0.35 < result["precision"] <= 0.5
    assert result["recall"] > 0.8


def test_the_same_set_has_both() -> None:
    x = clusters([0.0], 200, seed=0)
    assert measure(x, x.clone()) == {"precision": 1, "recall": 1}


def test_blocks_change_nothing() -> None:
    real, fake = clusters([0.0], 120, seed=0), clusters([0.7], 90, seed=1)
    assert measure(real, fake, block=7) == measure(real, fake, block=1000)


def test_against_the_definition() -> None:
    real, fake = clusters([0.0], 60, seed=0), clusters([0.7], 50, seed=1)

    def inside(queries: Tensor, manifold: Tensor) -> float:
        hits = 0
        for q in queries:
            for i, m in enumerate(manifold):
                others = (torch.cat([manifold[:i], manifold[i + 1 :]]) - m).norm(dim=1)
                if (q - m).norm() <= others.sort().values[2]:
                    hits += 1
                    break
        return hits / len(queries)

    assert measure(real, fake) == pytest.approx({"precision": inside(fake, real), "recall": inside(real, fake)})


def test_needs_more_than_k_samples() -> None:
    with pytest.raises(DataError, match="more than 3 fake samples, not 0"):
        measure(torch.randn(10, 8), torch.randn(0, 8))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("real", [True, False])
def test_features_that_are_not_finite_are_refused(bad: float, real: bool) -> None:
    metric = PrecisionRecall()
    x = torch.randn(6, 8)
    x[2, 1] = bad
    with pytest.raises(DataError, match=f"1 of 6 features of the {'real' if real else 'fake'} side are not finite"):
        metric.update(x, real=real)
    metric.update(x, real=real, valid=torch.arange(6) != 2)
    assert len(metric.real if real else metric.fake) == 1
