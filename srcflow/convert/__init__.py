"""Published weights in and out: TARFlow, STARFlow, RAE, diffusers' RAE, and transformers' encoders (docs/howto/published-weights.md)."""

from __future__ import annotations

from srcflow.convert.diffusers import rae_diffusers, to_diffusers
from srcflow.convert.encoder import encoder, to_transformers
from srcflow.convert.rae import rae, to_rae
from srcflow.convert.rae_decoder import rae_decoder, to_rae_decoder
from srcflow.convert.starflow import starflow
from srcflow.convert.tarflow import tarflow
from srcflow.convert.to_flows import to_starflow, to_tarflow

__all__ = [
    "encoder",
    "rae",
    "rae_decoder",
    "rae_diffusers",
    "starflow",
    "tarflow",
    "to_diffusers",
    "to_rae",
    "to_rae_decoder",
    "to_starflow",
    "to_tarflow",
    "to_transformers",
]
