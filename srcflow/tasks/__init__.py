"""The stages as LightningModules.

The names below are imported on first use; importing the package alone loads neither torch nor Lightning.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from srcflow.lazy import lazy

if TYPE_CHECKING:
    from srcflow.tasks.autoencoder import AutoencoderTask as AutoencoderTask
    from srcflow.tasks.base import Task as Task
    from srcflow.tasks.compressor import CompressorTask as CompressorTask
    from srcflow.tasks.flow import FlowTask as FlowTask

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "autoencoder": ["AutoencoderTask"],
        "base": ["Task"],
        "compressor": ["CompressorTask"],
        "flow": ["FlowTask"],
    },
)
