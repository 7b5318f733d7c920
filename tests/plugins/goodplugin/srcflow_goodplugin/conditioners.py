"""A condition on class labels that srcflow does not know."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from srcflow.conditioners.base import Conditioner, Field
from srcflow.types import Condition


class LabelDirections(Conditioner):
    """A learned mixture of fixed random directions per class, added to every token; the null is a direction of its own.

    Args:
        num_classes: number of classes.
        width: width of the block.
        seed: of the directions.
    """

    directions: Tensor

    def __init__(self, num_classes: int, width: int, seed: int = 0) -> None:
        super().__init__()
        self.fields = (Field("labels", "index", num_classes),)
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("directions", torch.randn(num_classes + 1, width, generator=generator))
        self.proj = nn.Linear(width, width)

    def added(self, condition: Condition) -> Tensor:
        """(B, 1, width): the class's direction through the map."""
        labels = condition.fields["labels"]
        rows = self.directions[torch.where(labels < 0, len(self.directions) - 1, labels)]
        return self.proj(rows)[:, None]  # type: ignore[no-any-return]  # torch is untyped here
