"""The flow, its blocks and the models that were published.

The names below are imported on first use; importing the package alone loads neither torch nor Lightning.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from srcflow.lazy import lazy

if TYPE_CHECKING:
    from srcflow.flows.block import TransformerBlock as TransformerBlock
    from srcflow.flows.denoiser import Denoiser as Denoiser
    from srcflow.flows.flow import Flow as Flow
    from srcflow.flows.normalization import ChannelNormalization as ChannelNormalization
    from srcflow.flows.normalization import Normalization as Normalization
    from srcflow.flows.normalization import Whitening as Whitening
    from srcflow.flows.positions import Learned as Learned
    from srcflow.flows.positions import Positions as Positions
    from srcflow.flows.positions import Rotary as Rotary
    from srcflow.flows.presets import srcflow as srcflow
    from srcflow.flows.presets import starflow as starflow
    from srcflow.flows.presets import tarflow as tarflow
    from srcflow.flows.split_block import SplitBlock as SplitBlock

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "block": ["TransformerBlock"],
        "denoiser": ["Denoiser"],
        "flow": ["Flow"],
        "normalization": ["ChannelNormalization", "Normalization", "Whitening"],
        "positions": ["Learned", "Positions", "Rotary"],
        "presets": ["srcflow", "starflow", "tarflow"],
        "split_block": ["SplitBlock"],
    },
)
