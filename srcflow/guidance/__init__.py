"""Guidance rules, and schedules of their strength.

The names below are imported on first use; importing the package alone loads neither torch nor Lightning.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from srcflow.lazy import lazy

if TYPE_CHECKING:
    from srcflow.guidance.base import Guidance as Guidance
    from srcflow.guidance.base import Negative as Negative
    from srcflow.guidance.gaussian import Gaussian as Gaussian
    from srcflow.guidance.guided import GuidedBlock as GuidedBlock
    from srcflow.guidance.linear import Linear as Linear
    from srcflow.guidance.schedules import Annealed as Annealed
    from srcflow.guidance.schedules import Constant as Constant
    from srcflow.guidance.schedules import Interval as Interval
    from srcflow.guidance.schedules import Schedule as Schedule

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "base": ["Guidance", "Negative"],
        "gaussian": ["Gaussian"],
        "guided": ["GuidedBlock"],
        "linear": ["Linear"],
        "schedules": ["Annealed", "Constant", "Interval", "Schedule"],
    },
)
