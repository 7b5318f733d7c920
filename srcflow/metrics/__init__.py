"""Measures of images, codes and likelihoods.

The names below are imported on first use; importing the package alone loads neither torch nor Lightning.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from srcflow.lazy import lazy

if TYPE_CHECKING:
    from srcflow.metrics.codes import CodeHealth as CodeHealth
    from srcflow.metrics.frechet import FrechetDistance as FrechetDistance
    from srcflow.metrics.frechet import frechet_distance as frechet_distance
    from srcflow.metrics.frechet import load_reference as load_reference
    from srcflow.metrics.frechet import save_reference as save_reference
    from srcflow.metrics.likelihood import GaussianBaseline as GaussianBaseline
    from srcflow.metrics.likelihood import bits_per_dim as bits_per_dim
    from srcflow.metrics.precision_recall import PrecisionRecall as PrecisionRecall
    from srcflow.metrics.reconstruction import ReconstructionMetrics as ReconstructionMetrics

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "codes": ["CodeHealth"],
        "frechet": ["FrechetDistance", "frechet_distance", "load_reference", "save_reference"],
        "likelihood": ["GaussianBaseline", "bits_per_dim"],
        "precision_recall": ["PrecisionRecall"],
        "reconstruction": ["ReconstructionMetrics"],
    },
)
