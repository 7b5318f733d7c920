from __future__ import annotations

import pytest
import torch

from srcflow.errors import ConfigError
from srcflow.guidance.base import Negative
from srcflow.guidance.gaussian import Gaussian
from srcflow.guidance.linear import Linear
from srcflow.guidance.schedules import Annealed, Constant, Interval, Schedule


@pytest.mark.parametrize("make", [Constant, Annealed, Interval])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_strength_is_as_exact_as_the_progress(make: type[Schedule], dtype: torch.dtype) -> None:
    strength = make(0.1)(torch.tensor([0.5, 1.0], dtype=dtype))[1]  # type: ignore[call-arg]  # every schedule here takes one
    assert strength.dtype == dtype
    assert torch.equal(strength, torch.tensor(0.1, dtype=dtype))


def test_an_interval_includes_its_ends() -> None:
    progress = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    assert Interval(2.0, 0.25, 0.75)(progress).tolist() == [0.0, 2.0, 2.0, 2.0, 0.0]
    assert Interval(2.0)(progress).tolist() == [2.0] * 5


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_strengths_are_finite_numbers(bad: float) -> None:
    for make in (Constant, Annealed, Interval, Gaussian, Linear):
        with pytest.raises(ConfigError, match=r"guidance.strength = .*Write a finite number of at least 0"):
            make(bad)
    for ends in ((bad, 1.0), (0.0, bad)):
        with pytest.raises(ConfigError, match=r"schedule.start/stop"):
            Interval(1.0, *ends)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0, -1.0])
def test_the_negative_streams_temperature_is_one(bad: float) -> None:
    with pytest.raises(ConfigError, match=r"guidance.negative.attention_temperature"):
        Negative(attention_temperature=bad)
