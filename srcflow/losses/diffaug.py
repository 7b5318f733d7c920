"""Differentiable augmentation of what a discriminator sees (Zhao et al., 2020, arXiv 2006.10738)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from srcflow.errors import ConfigError
from srcflow.registry import Recorded

Operation = Literal["colour", "translation", "cutout"]


class DiffAug(metaclass=Recorded):
    """Random colour, translation and cutout, differentiable in the images.

    Per sample: brightness shifts by up to a quarter of the range, saturation is scaled by 0 to 2 and contrast by 0.5 to 1.5 (around the
    pixel's grey and the image's mean), the image moves by up to `shift` of its side, and a square of `hole` of its side is blanked; what is
    uncovered is mid-grey.

    Args:
        operations: which of colour, translation, cutout; always applied in this order.
        probability: chance that a sample is augmented at all.
        shift: largest translation as a fraction of each side.
        hole: side of the blanked rectangle as a fraction of each side.
    """

    def __init__(
        self,
        operations: Sequence[Operation] = ("colour", "translation", "cutout"),
        probability: float = 1.0,
        shift: float = 0.125,
        hole: float = 0.2,
    ) -> None:
        unknown = set(operations) - set(get_args(Operation))
        if unknown:
            raise ConfigError(
                "augment.operations",
                list(operations),
                f"no such operation: {', '.join(sorted(unknown))}.",
                f"Known: {get_args(Operation)}.",
            )
        for name, value in (("probability", probability), ("shift", shift), ("hole", hole)):
            if not 0 <= value <= 1:
                raise ConfigError(f"augment.{name}", value, "lies between 0 and 1.")
        self.operations, self.probability, self.shift, self.hole = tuple(operations), probability, shift, hole

    def __call__(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Augmented images.

        Args:
            images: (B, 3, H, W), nominally in [0, 1].
            generator: a CPU generator; the result is a function of the images and its state. None for torch's global one. All
                operations draw, whether they are used or not, so switching one off leaves the others' numbers as they were.

        Returns:
            (B, 3, H, W).
        """
        if self.probability == 0 or not self.operations:
            return images
        u = torch.rand(images.shape[0], 8, generator=generator, dtype=torch.float64).to(torch.float32)  # rand(1.0) rounds up in float32
        u = u.clamp(max=1 - 2**-24).to(images.device)
        x = images - 0.5  # mid-grey is 0
        if "colour" in self.operations:
            x = self._colour(x, u[:, 1].to(x.dtype), u[:, 2].to(x.dtype), u[:, 3].to(x.dtype))
        if "translation" in self.operations:
            x = self._translation(x, u[:, 4], u[:, 5])
        if "cutout" in self.operations:
            x = self._cutout(x, u[:, 6], u[:, 7])
        chosen = (u[:, 0] < self.probability).reshape(-1, 1, 1, 1)
        return torch.where(chosen, x + 0.5, images)

    @staticmethod
    def _colour(x: Tensor, brightness: Tensor, saturation: Tensor, contrast: Tensor) -> Tensor:
        b, s, c = (t.reshape(-1, 1, 1, 1) for t in (brightness, saturation, contrast))
        x = x + 0.5 * (b - 0.5)
        grey = x.mean(1, keepdim=True)
        x = grey + (x - grey) * 2 * s
        mean = x.mean((1, 2, 3), keepdim=True)
        return mean + (x - mean) * (c + 0.5)

    def _translation(self, x: Tensor, down: Tensor, right: Tensor) -> Tensor:
        for dim, u in ((2, down), (3, right)):
            size = x.shape[dim]
            most = round(size * self.shift)
            offset = (u * (2 * most + 1)).floor().long() - most
            source = torch.arange(size, device=x.device) - offset[:, None]  # (B, size)
            inside = (source >= 0) & (source < size)
            shape = [x.shape[0], 1, 1, 1]
            shape[dim] = size
            index = source.clamp(0, size - 1).reshape(shape).expand(x.shape)
            x = x.gather(dim, index) * inside.reshape(shape)
        return x

    def _cutout(self, x: Tensor, down: Tensor, right: Tensor) -> Tensor:
        covered = []
        for dim, u in ((2, down), (3, right)):
            size = x.shape[dim]
            side = round(size * self.hole)
            centre = (u * (size + 1 - side % 2)).floor().long()  # holes may hang over the border, as in the paper
            start = (centre - side // 2)[:, None]
            at = torch.arange(size, device=x.device)
            covered.append((at >= start) & (at < start + side))
        return x * ~(covered[0][:, None, :, None] & covered[1][:, None, None, :])
