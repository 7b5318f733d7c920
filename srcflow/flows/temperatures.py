"""What a temperature can be."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from srcflow.errors import ConfigError


def check_temperature(key: str, value: float | Tensor) -> None:
    """Refuse what is no temperature: 0 and less, NaN, infinity.

    Args:
        key: what the value is called, for the message.
        value: a number, or one per row.

    Raises:
        ConfigError: a value is not positive and finite.
    """
    if isinstance(value, Tensor):
        if not bool(((value > 0) & torch.isfinite(value)).all()):
            raise ConfigError(key, value.tolist(), "temperatures are positive and finite.", "Write 1 for none.")
    elif not 0 < value < math.inf:
        raise ConfigError(key, value, "a temperature is positive and finite.", "Write 1 for none.")
