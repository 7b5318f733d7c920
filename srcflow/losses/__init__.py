"""Terms of the reconstruction losses of stages 0 and 1.

The names below are imported on first use; importing the package alone loads neither torch nor Lightning.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from srcflow.lazy import lazy

if TYPE_CHECKING:
    from srcflow.losses.adversarial import Adversarial as Adversarial
    from srcflow.losses.adversarial import hinge_loss as hinge_loss
    from srcflow.losses.diffaug import DiffAug as DiffAug
    from srcflow.losses.perceptual import LPIPS as LPIPS
    from srcflow.losses.perceptual import EncoderPerceptual as EncoderPerceptual
    from srcflow.losses.perceptual import Perceptual as Perceptual
    from srcflow.losses.reconstruction import feature_loss as feature_loss
    from srcflow.losses.reconstruction import pixel_loss as pixel_loss

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "adversarial": ["Adversarial", "hinge_loss"],
        "diffaug": ["DiffAug"],
        "perceptual": ["LPIPS", "EncoderPerceptual", "Perceptual"],
        "reconstruction": ["feature_loss", "pixel_loss"],
    },
)
