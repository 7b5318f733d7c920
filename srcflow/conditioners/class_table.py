"""Classes as a vector on every token."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from srcflow.conditioners.base import Conditioner, Field
from srcflow.errors import ConfigError, one_of
from srcflow.types import Condition


class ClassTable(Conditioner):
    """One vector per class, added to every token. Label -1 takes the null vector (E11).

    Args:
        num_classes: number of classes.
        width: width of the block.
        null: "mean" of the table (TARFlow) or a "learned" vector of its own.

    Raises:
        ConfigError: no class, or an unknown null.
    """

    def __init__(self, num_classes: int, width: int, null: Literal["mean", "learned"] = "mean") -> None:
        super().__init__()
        one_of("class_table.null", null, ("mean", "learned"))
        self.fields = (Field("labels", "index", num_classes),)
        self.num_classes, self.null = num_classes, null
        self.weight = nn.Parameter(torch.randn(num_classes + (null == "learned"), width) * 1e-2)

    def added(self, condition: Condition) -> Tensor:
        """The class's vector (B, 1, width)."""
        labels = labels_of(condition)
        null = self.weight[-1] if self.null == "learned" else self.weight.mean(0)
        rows = self.weight[labels.clamp(min=0)]
        return torch.where((labels < 0)[:, None], null, rows)[:, None]


def labels_of(condition: Condition) -> Tensor:
    """The labels (B,) of a resolved condition.

    Raises:
        ConfigError: it has none.
    """
    if condition.labels is None:
        raise ConfigError(
            "condition.labels", None, "this block is conditioned on classes.", "Give Condition(labels=...), -1 for the null class."
        )
    return condition.labels
