"""Learning-rate schedules: a rate for every update of a run, warm-up included (docs/reference/equations.md E19)."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import ClassVar, Literal

from srcflow.errors import ConfigError, one_of
from srcflow.registry import Recorded

SHAPES = ("sqrt", "linear", "cosine")
DECAY_SHARE = 0.2


class LearningRateSchedule(metaclass=Recorded):
    """A learning rate for every update. With `n` updates finished, of `T`, warm-up `W`, peak `hi` and minimum `lo`:

    `lr(n) = lo + (hi - lo) n / W` for `n < W`, and then `lo + (hi - lo) share(n)`, where a member says what `share` is.

    Attributes:
        uses_minimum: whether there is a minimum; without one `lo` is 0, and only the warm-up starts there.
    """

    uses_minimum: ClassVar[bool] = True

    @abstractmethod
    def share(self, step: int, *, warmup: int, total: int) -> float:
        """Share of the way from the minimum to the peak, in [0, 1].

        Args:
            step: finished updates, at least `warmup`; may be more than `total`.
            warmup: updates of warm-up.
            total: updates of the run.
        """

    def __call__(self, step: int, *, peak: float, minimum: float, warmup: int, total: int) -> float:
        """Learning rate of the update that follows `step` finished ones.

        >>> [Cosine()(n, peak=1.0, minimum=0.0, warmup=2, total=6) for n in (0, 1, 2, 4, 6, 60)]
        [0.0, 0.5, 1.0, 0.5, 0.0, 0.0]
        """
        if step < warmup:
            return minimum + (peak - minimum) * step / warmup
        return minimum + self.share(step, warmup=warmup, total=total) * (peak - minimum)

    def check(self, warmup: int, total: int, key: str) -> None:  # most have nothing to refuse
        """Refuse a run that is too short.

        Args:
            warmup: updates of warm-up, fewer than `total`.
            total: updates of the run.
            key: where the schedule stands in the configuration, for messages.

        Raises:
            ConfigError: it is.
        """

    def __repr__(self) -> str:
        arguments: dict[str, object] = getattr(self, "_recorded_spec", ("", {}))[1]
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in arguments.items())})"


class Cosine(LearningRateSchedule):
    """Half a cosine from the peak to the minimum at the run's end, where it stays (TARFlow, STARFlow; the default).

    `share(n) = 1/2 (1 + cos(pi (n - W) / (T - W)))` for `n < T`, then 0. The published form rises again after `T`.
    """

    def share(self, step: int, *, warmup: int, total: int) -> float:
        """See `LearningRateSchedule.share`."""
        return 0.0 if step >= total else 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


class Constant(LearningRateSchedule):
    """The peak, after a warm-up from 0: `share(n) = 1`. There is no minimum."""

    uses_minimum: ClassVar[bool] = False

    def share(self, step: int, *, warmup: int, total: int) -> float:
        """See `LearningRateSchedule.share`."""
        return 1.0


class WSD(LearningRateSchedule):
    """Warm-up, stable, decay: the peak until the last `D` updates, then down to the minimum (arXiv 2404.06395, arXiv 2405.18392).

    With `x = (n - (T - D)) / D`: `share(n) = 1` for `x < 0`; `1 - sqrt(x)` ("sqrt"), `1 - x` ("linear") or `1/2 (1 + cos(pi x))` ("cosine")
    for `0 <= x < 1`; then 0. A run can be made longer from any checkpoint of its stable part: until there its rates are the same.

    Args:
        decay_share: `D` as a share of the run's updates, rounded, at least 1; null: 0.2, unless decay_steps is given.
        decay_steps: `D` itself.
        shape: "sqrt" (best in arXiv 2405.18392), "linear" or "cosine".

    Raises:
        ConfigError: both are given, or one is out of its range; in `check`: warm-up and decay are longer than the run.
    """

    def __init__(
        self, decay_share: float | None = None, decay_steps: int | None = None, shape: Literal["sqrt", "linear", "cosine"] = "sqrt"
    ) -> None:
        key = "optimization.schedule"
        if decay_share is not None and decay_steps is not None:
            raise ConfigError(f"{key}.decay_steps", decay_steps, f"decay_share = {decay_share} is given, too.", "Give one of the two.")
        if decay_share is not None and not 0 < decay_share <= 1:
            raise ConfigError(f"{key}.decay_share", decay_share, "must lie in (0, 1].", "Write Constant for a rate that does not fall.")
        if decay_steps is not None and decay_steps < 1:
            raise ConfigError(f"{key}.decay_steps", decay_steps, "must be at least 1.", "Write Constant for a rate that does not fall.")
        one_of(f"{key}.shape", shape, SHAPES)
        self.decay_share = DECAY_SHARE if decay_share is None and decay_steps is None else decay_share
        self.decay_steps, self.shape = decay_steps, shape

    def decay(self, total: int) -> int:
        """`D` of a run of `total` updates."""
        return self.decay_steps if self.decay_share is None else max(1, round(self.decay_share * total))  # type: ignore[return-value]

    def share(self, step: int, *, warmup: int, total: int) -> float:
        """See `LearningRateSchedule.share`."""
        decay = self.decay(total)
        x = (step - (total - decay)) / decay
        if x >= 1:
            return 0.0
        if x <= 0:
            return 1.0
        return {"sqrt": 1 - math.sqrt(x), "linear": 1 - x, "cosine": 0.5 * (1 + math.cos(math.pi * x))}[self.shape]

    def check(self, warmup: int, total: int, key: str) -> None:
        """See `LearningRateSchedule.check`."""
        decay = self.decay(total)
        if warmup + decay > total:
            name, value = ("decay_steps", self.decay_steps) if self.decay_share is None else ("decay_share", self.decay_share)
            why = f"{warmup} updates of warm-up and {decay} of decay do not fit into {total} (trainer.max_steps)."
            raise ConfigError(f"{key}.schedule.{name}", value, why, f"Lower it, or {key}.warmup_steps.")
