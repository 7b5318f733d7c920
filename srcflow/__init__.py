"""srcflow: transformer normalizing flows over images and compressed representation-autoencoder features.

Importing this package loads neither torch nor lightning; the public names below are resolved on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from srcflow.lazy import lazy

if TYPE_CHECKING:
    from srcflow.flows import presets as presets
    from srcflow.flows.flow import Flow as Flow
    from srcflow.pipeline import Pipeline as Pipeline
    from srcflow.types import Condition as Condition

__version__ = "0.2.0"
__getattr__, __dir__, _names = lazy(
    __name__, {"flows.flow": ["Flow"], "flows.presets": ["presets"], "pipeline": ["Pipeline"], "types": ["Condition"]}
)
__all__ = [*_names, "__version__"]
