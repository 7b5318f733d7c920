"""Callbacks of Lightning's Trainer.

The names below are imported on first use; importing the package alone loads neither torch nor Lightning.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from srcflow.lazy import lazy

if TYPE_CHECKING:
    from srcflow.callbacks.checkpoints import Checkpoints as Checkpoints
    from srcflow.callbacks.ema import EMA as EMA
    from srcflow.callbacks.non_finite import NonFiniteGuard as NonFiniteGuard
    from srcflow.callbacks.sample_grid import ReconstructionGrid as ReconstructionGrid
    from srcflow.callbacks.sample_grid import SampleGrid as SampleGrid
    from srcflow.callbacks.spike_monitor import SpikeMonitor as SpikeMonitor
    from srcflow.callbacks.throughput import Throughput as Throughput

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "checkpoints": ["Checkpoints"],
        "ema": ["EMA"],
        "non_finite": ["NonFiniteGuard"],
        "sample_grid": ["ReconstructionGrid", "SampleGrid"],
        "spike_monitor": ["SpikeMonitor"],
        "throughput": ["Throughput"],
    },
)
