"""The contract of guidance: how the parameters of a conditional and a negative stream are combined."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any, Literal

from torch import Tensor, nn

from srcflow.errors import ConfigError
from srcflow.guidance.schedules import Constant, Schedule
from srcflow.registry import Recorded
from srcflow.types import AffineParams, Condition

Blocks = Literal["conditioned", "deep", "all"]


class Negative(metaclass=Recorded):
    """What the negative stream is: any combination of another condition, another attention temperature and another flow.

    Args:
        condition: the negative condition; None means the flow's null condition.
        attention_temperature: divides the attention logits of the negative stream only (1: none); how unconditional models are guided.
        flow: another Flow whose parameters serve as the negative (autoguidance), or the directory of its stage, which
            Pipeline reads (`srcflow.pipeline.load_negative`); None means the same flow.
    """

    def __init__(self, condition: Condition | None = None, attention_temperature: float = 1.0, flow: nn.Module | str | None = None) -> None:
        if not 0 < attention_temperature < math.inf:
            raise ConfigError("guidance.negative.attention_temperature", attention_temperature, "a temperature is positive and finite.")
        self.condition, self.attention_temperature, self.flow = condition, attention_temperature, flow

    def __repr__(self) -> str:
        kinds = [f"{k}=..." for k in ("condition", "flow") if getattr(self, k) is not None]
        return f"Negative({', '.join([*kinds, f'attention_temperature={self.attention_temperature}'])})"


class Guidance(metaclass=Recorded):
    """A rule that combines positive and negative affine parameters, token by token.

    Args:
        strength: guidance strength w >= 0, or a schedule over progress; 0 switches guidance off, and no negative stream is run.
        blocks: where it acts: blocks that see the condition, the deep one (the last, on the noise side), or all.
        negative: what the negative stream is.
    """

    def __init__(self, strength: float | Schedule, blocks: Blocks = "conditioned", negative: Negative | None = None) -> None:
        if blocks not in ("conditioned", "deep", "all"):
            raise ConfigError("guidance.blocks", blocks, "unknown.", 'Write "conditioned", "deep" or "all".')
        self.strength: Schedule = strength if isinstance(strength, Schedule) else Constant(float(strength))
        self.blocks: Blocks = blocks
        self.negative = negative if negative is not None else Negative()

    @abstractmethod
    def __call__(self, positive: AffineParams, negative: AffineParams, progress: Tensor) -> AffineParams:
        """Guided parameters (B, m, d) from two streams' parameters (B, m, d).

        Args:
            positive: parameters under the wanted condition.
            negative: parameters of the negative stream.
            progress: (m,) position of each token in [0, 1] in the block's own order.
        """

    def weights(self, progress: Tensor, like: Tensor) -> Tensor:
        """The strength per token, shaped (1, m, 1) and in `like`'s dtype."""
        return self.strength(progress).to(like.dtype).reshape(1, -1, 1)

    def __repr__(self) -> str:
        arguments: dict[str, Any] = getattr(self, "_recorded_spec", ("", {}))[1]
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in arguments.items())})"
