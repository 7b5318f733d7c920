"""Couplings: invertible maps of a token, whose parameters a block predicts.

The names below are imported on first use; importing the package alone loads neither torch nor Lightning.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from srcflow.lazy import lazy

if TYPE_CHECKING:
    from srcflow.couplings.additive import Additive as Additive
    from srcflow.couplings.affine import Affine as Affine
    from srcflow.couplings.base import Coupling as Coupling
    from srcflow.couplings.softplus_affine import SoftplusAffine as SoftplusAffine

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "additive": ["Additive"],
        "affine": ["Affine"],
        "base": ["Coupling"],
        "softplus_affine": ["SoftplusAffine"],
    },
)
