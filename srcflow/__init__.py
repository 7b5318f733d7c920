"""srcflow: transformer normalizing flows over images and compressed representation-autoencoder features.

Importing this package loads neither torch nor lightning; the public names below are resolved on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

_PUBLIC = {
    "Pipeline": "srcflow.pipeline",
    "Flow": "srcflow.flows.flow",
    "Condition": "srcflow.types",
    "presets": "srcflow.flows.presets",
}
__all__ = ["Condition", "Flow", "Pipeline", "__version__", "presets"]

if TYPE_CHECKING:
    from srcflow.flows import presets
    from srcflow.flows.flow import Flow
    from srcflow.pipeline import Pipeline
    from srcflow.types import Condition


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'srcflow' has no attribute {name!r}")
    module = importlib.import_module(_PUBLIC[name])
    return module if module.__name__.rpartition(".")[2] == name else getattr(module, name)
