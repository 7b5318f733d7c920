"""Classes as a token in front of the sequence."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from srcflow.conditioners.base import Conditioner, Field
from srcflow.conditioners.class_table import labels_of
from srcflow.types import Condition


class ClassToken(Conditioner):
    """One token per class in front of the sequence; label -1 takes a learned null token (STARFlow's one-token prefix).

    Args:
        num_classes: number of classes.
        width: width of the block.
        bias: a vector added to every class's token. Published STARFlow has one: it maps one-hot vectors through a linear layer.

    Raises:
        ConfigError: no class.
    """

    def __init__(self, num_classes: int, width: int, bias: bool = False) -> None:
        super().__init__()
        self.fields = (Field("labels", "index", num_classes),)
        self.num_classes = num_classes
        self.weight = nn.Parameter(torch.randn(num_classes + 1, width) * 1e-2)
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def prefix(self, condition: Condition) -> Tensor:
        """The class's token (B, 1, width)."""
        labels = labels_of(condition)
        tokens = self.weight[torch.where(labels < 0, self.num_classes, labels)][:, None]
        return tokens if self.bias is None else tokens + self.bias
