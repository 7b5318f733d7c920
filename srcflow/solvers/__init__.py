"""Solvers: how a block is inverted.

The names below are imported on first use; importing the package alone loads neither torch nor Lightning.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from srcflow.lazy import lazy

if TYPE_CHECKING:
    from srcflow.solvers.base import Solver as Solver
    from srcflow.solvers.per_block import PerBlock as PerBlock
    from srcflow.solvers.sequential import Sequential as Sequential

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "base": ["Solver"],
        "per_block": ["PerBlock"],
        "sequential": ["Sequential"],
    },
)
