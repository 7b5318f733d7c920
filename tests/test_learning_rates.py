"""Every schedule is its formula, at every update."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from srcflow import registry
from srcflow.errors import ConfigError
from srcflow.learning_rates import WSD, Constant, Cosine, LearningRateSchedule

PEAK, LOW, WARMUP, TOTAL = 1e-3, 1e-5, 10, 110
RUN = {"peak": PEAK, "minimum": LOW, "warmup": WARMUP, "total": TOTAL}


def test_cosine_is_the_published_formula_and_does_not_rise_again() -> None:
    rates = [Cosine()(n, **RUN) for n in range(300)]  # type: ignore[arg-type]
    assert rates[0] == LOW
    assert rates[WARMUP] == PEAK == max(rates)
    for n in range(WARMUP):
        assert rates[n] == pytest.approx(LOW + (PEAK - LOW) * n / WARMUP)
    for n in range(WARMUP, TOTAL):
        assert rates[n] == pytest.approx(LOW + 0.5 * (1 + math.cos(math.pi * (n - WARMUP) / (TOTAL - WARMUP))) * (PEAK - LOW))
    assert set(rates[TOTAL:]) == {LOW}
    assert Cosine()(0, peak=PEAK, minimum=LOW, warmup=0, total=5) == PEAK


def test_constant_rises_from_its_minimum_and_stays() -> None:
    rates = [Constant()(n, peak=0.3, minimum=0.0, warmup=4, total=8) for n in range(20)]
    assert rates[:4] == pytest.approx([0, 0.075, 0.15, 0.225])
    assert set(rates[4:]) == {0.3}


SHAPES = {"sqrt": lambda x: 1 - math.sqrt(x), "linear": lambda x: 1 - x, "cosine": lambda x: 0.5 * (1 + math.cos(math.pi * x))}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("arguments", "decay"), [({}, 22), ({"decay_share": 0.3}, 33), ({"decay_steps": 7}, 7), ({"decay_share": 1e-4}, 1)]
)
def test_wsd_is_flat_until_its_last_updates(shape: str, arguments: dict[str, float], decay: int) -> None:
    schedule = WSD(**arguments, shape=shape)  # type: ignore[arg-type]
    rates = [schedule(n, **RUN) for n in range(150)]  # type: ignore[arg-type]
    start = TOTAL - decay
    assert rates[:WARMUP] == [Cosine()(n, **RUN) for n in range(WARMUP)]  # type: ignore[arg-type]
    assert set(rates[WARMUP : start + 1]) == {PEAK}
    for n in range(start, TOTAL):
        assert rates[n] == pytest.approx(LOW + SHAPES[shape]((n - start) / decay) * (PEAK - LOW), rel=1e-12)
    assert all(a > b for a, b in pairwise(rates[start : TOTAL + 1]))
    assert set(rates[TOTAL:]) == {LOW}


def test_a_longer_wsd_run_has_the_same_rates_until_the_shorter_one_decays() -> None:
    short, long = ([WSD(decay_steps=5)(n, peak=1.0, minimum=0.0, warmup=3, total=t) for n in range(60)] for t in (20, 40))
    assert short[:16] == long[:16]
    assert short[16] < long[16]


def test_decay_that_cannot_be_is_refused() -> None:
    for arguments, said in (
        ({"decay_share": 0.0}, r"schedule\.decay_share = 0\.0: must lie in \(0, 1\]"),
        ({"decay_share": 1.1}, r"schedule\.decay_share = 1\.1"),
        ({"decay_steps": 0}, r"schedule\.decay_steps = 0: must be at least 1"),
        ({"decay_share": 0.1, "decay_steps": 3}, "Give one of the two"),
        ({"shape": "exponential"}, "Known: sqrt, linear, cosine"),
    ):
        with pytest.raises(ConfigError, match=said):
            WSD(**arguments)  # type: ignore[arg-type]
    WSD(decay_steps=6).check(4, 10, "optimization")
    with pytest.raises(
        ConfigError, match=r"optimization\.schedule\.decay_steps = 7: 4 updates of warm-up and 7 of decay do not fit into 10"
    ):
        WSD(decay_steps=7).check(4, 10, "optimization")
    with pytest.raises(ConfigError, match=r"optimization\.schedule\.decay_share = 0\.2"):
        WSD().check(9, 10, "optimization")


@pytest.mark.parametrize("schedule", [Cosine(), Constant(), WSD(), WSD(decay_steps=3, shape="linear"), WSD(decay_share=0.5)])
def test_a_schedule_is_built_from_its_specification(schedule: LearningRateSchedule) -> None:
    spec = registry.spec_of(schedule)
    again = registry.build(spec, LearningRateSchedule)
    assert registry.spec_of(again) == spec
    assert [again(n, **RUN) for n in range(120)] == [schedule(n, **RUN) for n in range(120)]  # type: ignore[arg-type]
    assert repr(again) == repr(schedule)
