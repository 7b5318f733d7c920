"""check_guidance passes sound rules and fails each broken one for the reason that is broken."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from srcflow.guidance.base import Guidance, Negative
from srcflow.guidance.linear import Linear
from srcflow.testing import (
    check_guidance,
)
from srcflow.types import AffineParams


class DeadKnobRule(Linear):
    def __init__(self, strength: Any, gain: float = 1.0, blocks: Any = "all", negative: Negative | None = None) -> None:
        super().__init__(strength, blocks=blocks, negative=negative)


class UncheckedKnobRule(Linear):
    def __init__(self, strength: Any, mode: str = "linear", blocks: Any = "all", negative: Negative | None = None) -> None:
        super().__init__(strength, blocks=blocks, negative=negative)


class GainRule(Guidance):
    """Sound."""

    def __init__(self, strength: Any, gain: float = 1.0, mode: str = "up", blocks: Any = "all", negative: Negative | None = None) -> None:
        super().__init__(strength, blocks, negative)
        self.gain = gain if mode == "up" else -gain

    def __call__(self, positive: AffineParams, negative: AffineParams, progress: Tensor) -> AffineParams:
        w = self.gain * self.weights(progress, positive.shift)
        return AffineParams(*(p + w * (p - n) for p, n in zip(positive, negative, strict=True)))


class DeafRule(Linear):
    def __call__(self, positive: AffineParams, negative: AffineParams, progress: Tensor) -> AffineParams:
        return positive


class BiasedRule(Linear):
    def __call__(self, positive: AffineParams, negative: AffineParams, progress: Tensor) -> AffineParams:
        guided = super().__call__(positive, negative, progress)
        return AffineParams(guided.log_scale, guided.shift + 1e-3)


class ScalingRule(Linear):
    """Moves away from zero, not from the negative stream."""

    def __call__(self, positive: AffineParams, negative: AffineParams, progress: Tensor) -> AffineParams:
        w = self.weights(progress, positive.shift)
        return AffineParams(positive.log_scale + w * (positive.log_scale - negative.log_scale), (1 + w) * positive.shift)


class FlatRule(Linear):
    """Ignores where it is."""

    def weights(self, progress: Tensor, like: Tensor) -> Tensor:
        return super().weights(torch.ones_like(progress), like)


class OverflowingRule(Linear):
    """The same map through sigma instead of log sigma."""

    def __call__(self, positive: AffineParams, negative: AffineParams, progress: Tensor) -> AffineParams:
        w = self.weights(progress, positive.shift)
        guided = super().__call__(positive, negative, progress)
        ratio = (positive.log_scale.exp() / negative.log_scale.exp()) ** (4 * w)
        return AffineParams(positive.log_scale + ratio.log() / 4, guided.shift) if self.what == "both" else guided


class NarrowRule(Linear):
    def __call__(self, positive: AffineParams, negative: AffineParams, progress: Tensor) -> AffineParams:
        guided = super().__call__(positive, negative, progress)
        return AffineParams(guided.log_scale.float(), guided.shift.float())


class PoolingRule(Linear):
    """Looks at the whole run of tokens, which a solver never shows it."""

    def __call__(self, positive: AffineParams, negative: AffineParams, progress: Tensor) -> AffineParams:
        guided = super().__call__(positive, negative, progress)
        gap = (positive.shift - negative.shift).mean(1, keepdim=True)
        return AffineParams(guided.log_scale, guided.shift + self.weights(progress, gap) * gap)


class StubbornBlocksRule(Linear):
    def __init__(self, strength: Any, blocks: Any = "all", negative: Negative | None = None) -> None:
        super().__init__(strength, blocks="all", negative=negative)


class ForgetfulNegativeRule(Linear):
    def __init__(self, strength: Any, blocks: Any = "all", negative: Negative | None = None) -> None:
        super().__init__(strength, blocks=blocks)


class SwallowingRule(Linear):
    def __init__(self, strength: Any, blocks: Any = "all", negative: Negative | None = None, **unused: Any) -> None:
        super().__init__(strength, blocks=blocks, negative=negative)


class NoNegativeRule(Linear):
    def __init__(self, strength: Any, blocks: Any = "all") -> None:
        super().__init__(strength, blocks=blocks)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (DeadKnobRule, "the knob gain does nothing: 1.0 and 0.5"),
        (UncheckedKnobRule, "its knob mode is not checked"),
        (DeafRule, "constant|does nothing|strength"),
        (BiasedRule, "strength 0 changes the positive stream: shift: differ by"),
        (ScalingRule, "equal streams are changed"),
        (FlatRule, "Annealed at progress 0.00"),
        (OverflowingRule, "not finite"),
        (NarrowRule, "float32|differ"),
        (PoolingRule, "tokens|Annealed"),
        (StubbornBlocksRule, "blocks='conditioned' is not kept"),
        (ForgetfulNegativeRule, "negative is not kept"),
        (SwallowingRule, "swallows"),
        (NoNegativeRule, "takes no argument negative"),
    ],
)
def test_broken_rules_fail(rule: type[Guidance], message: str) -> None:
    with pytest.raises(AssertionError, match=f"{rule.__name__}: .*({message})"):
        check_guidance(rule)


def test_sound_rules_pass() -> None:
    check_guidance(Linear)
    check_guidance(GainRule, alternatives={"mode": ["up", "down"]})
    check_guidance(Linear, alternatives={"what": ["shift", "both"]})


def test_alternatives_are_checked_too() -> None:
    with pytest.raises(AssertionError, match=r"alternatives are given for \['what_not'\]"):
        check_guidance(Linear, alternatives={"what_not": [1, 2]})
    with pytest.raises(AssertionError, match="the knob mode does nothing: 'up' and 'up'"):
        check_guidance(GainRule, alternatives={"mode": ["up", "up"]})
