"""The objectives of stages 0 and 1: reconstructed images (RAE, arXiv 2510.11690), and the features that they are decoded from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from srcflow.losses.adversarial import Adversarial
from srcflow.losses.perceptual import Perceptual
from srcflow.losses.reconstruction import PixelKind, feature_loss, pixel_loss
from srcflow.objectives.base import Objective


@dataclass(frozen=True)
class ImageWeights:
    """Factors of the image losses.

    Args:
        pixel: of the pixel loss.
        pixel_kind: mean absolute ("l1") or mean squared ("l2") difference.
        perceptual: of the perceptual distance.
    """

    pixel: float = 1.0
    pixel_kind: PixelKind = "l1"
    perceptual: float = 1.0


def image_objective(fake: Tensor, real: Tensor, weights: ImageWeights, perceptual: Perceptual | None = None) -> Objective:
    """Weighted pixel and perceptual losses of reconstructions.

    Args:
        fake: (B, 3, H, W) reconstructions, not clamped.
        real: (B, 3, H, W) in [0, 1].
        weights: the factors; a term of weight 0 is not computed.
        perceptual: a perceptual distance; None: none.

    Returns:
        the total, at least float32, and the terms under the pixel loss's kind ("l1" or "l2") and "perceptual".
    """
    fake = fake.to(torch.promote_types(fake.dtype, torch.float32))
    total, terms = fake.new_zeros(()), dict[str, Tensor]()
    if weights.pixel > 0:
        pixels = pixel_loss(fake, real, weights.pixel_kind)
        total, terms[weights.pixel_kind] = total + weights.pixel * pixels, pixels.detach()
    if perceptual is not None and weights.perceptual > 0:
        distance: Tensor = perceptual(fake, real)
        total, terms["perceptual"] = total + weights.perceptual * distance, distance.detach()
    return Objective(total, terms)


def adversarial_objective(
    adversarial: Adversarial, reconstruction: Tensor, fake: Tensor, last_layer: Tensor, generator: torch.Generator | None = None
) -> Objective:
    """The generator's adversarial loss, weighted by the ratio of the gradients that it and the reconstruction have at the last layer.

    Args:
        adversarial: the loss, whose heads get no gradient.
        reconstruction: scalar from `image_objective`, with its graph.
        fake: (B, 3, H, W) reconstructions, not clamped.
        last_layer: the parameter at which gradients are compared.
        generator: CPU generator of the augmentation.

    Returns:
        the weighted total, and the terms "adversarial" and "adversarial_weight".
    """
    term = adversarial.generator_loss(fake.to(torch.promote_types(fake.dtype, torch.float32)), generator=generator)
    weight = adversarial.adaptive_weight(reconstruction, term, last_layer)
    return Objective(weight * term, {"adversarial": term.detach(), "adversarial_weight": weight})


def feature_objective(pred: Tensor, clean: Tensor, weight: float) -> Objective:
    """Weighted distance of expanded codes from clean normalised features: mean squared error and cosine (SRC-Flow, arXiv 2605.18267).

    Args:
        pred: (B, N, D) features that were expanded from the codes of noisy ones.
        clean: (B, N, D) clean features.
        weight: the factor.

    Returns:
        the total, and the term "feature".
    """
    term = feature_loss(pred, clean)
    return Objective(weight * term, {"feature": term.detach()})
