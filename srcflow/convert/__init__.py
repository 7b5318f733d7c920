"""Published weights in and out: TARFlow, STARFlow, RAE, diffusers' RAE, and transformers' encoders (docs/howto/published-weights.md)."""

from __future__ import annotations

from srcflow.convert.starflow import starflow, to_starflow
from srcflow.convert.tarflow import tarflow, to_tarflow

__all__ = ["starflow", "tarflow", "to_starflow", "to_tarflow"]
