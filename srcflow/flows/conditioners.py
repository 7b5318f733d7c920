"""How a block sees the condition."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from srcflow.errors import ConfigError, one_of
from srcflow.registry import Recorded
from srcflow.types import Condition

Kind = Literal["labels", "text"]


class Conditioner(nn.Module, metaclass=Recorded):
    """Turns a condition into a vector added to every token, or tokens put in front of the sequence. Conditions arrive resolved by the flow.

    Attributes:
        kind: which field of a `Condition` it reads.
    """

    kind: ClassVar[Kind]

    @abstractmethod
    def added(self, condition: Condition) -> Tensor | None:
        """(B, 1, width) to add to every token, or None."""

    @abstractmethod
    def prefix(self, condition: Condition) -> Tensor | None:
        """(B, L, width) to put in front, or None."""


class ClassTable(Conditioner):
    """One vector per class, added to every token. Label -1 takes the null vector (E11).

    Args:
        num_classes: number of classes.
        width: width of the block.
        null: "mean" of the table (TARFlow) or a "learned" vector of its own.
    """

    kind = "labels"

    def __init__(self, num_classes: int, width: int, null: Literal["mean", "learned"] = "mean") -> None:
        super().__init__()
        one_of("class_table.null", null, ("mean", "learned"))
        self.num_classes, self.null = _classes(num_classes), null
        self.weight = nn.Parameter(torch.randn(num_classes + (null == "learned"), width) * 1e-2)

    def added(self, condition: Condition) -> Tensor:
        """See `Conditioner.added`."""
        labels = _labels(condition)
        null = self.weight[-1] if self.null == "learned" else self.weight.mean(0)
        rows = self.weight[labels.clamp(min=0)]
        return torch.where((labels < 0)[:, None], null, rows)[:, None]

    def prefix(self, condition: Condition) -> None:
        """See `Conditioner.prefix`: none."""
        return


class ClassToken(Conditioner):
    """One token per class in front of the sequence; label -1 takes a learned null token (STARFlow's one-token prefix).

    Args:
        num_classes: number of classes.
        width: width of the block.
    """

    kind = "labels"

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.num_classes = _classes(num_classes)
        self.weight = nn.Parameter(torch.randn(num_classes + 1, width) * 1e-2)

    def added(self, condition: Condition) -> None:
        """See `Conditioner.added`: none."""
        return

    def prefix(self, condition: Condition) -> Tensor:
        """See `Conditioner.prefix`."""
        labels = _labels(condition)
        return self.weight[torch.where(labels < 0, self.num_classes, labels)][:, None]


class TextPrefix(Conditioner):
    """Text features through a linear map in front of the image tokens; padding is multiplied by its mask before the map (STARFlow, E12).

    Args:
        text_dim: width T of the text features.
        width: width of the block.
    """

    kind = "text"

    def __init__(self, text_dim: int, width: int) -> None:
        super().__init__()
        self.text_dim = text_dim
        self.proj = nn.Linear(text_dim, width)

    def added(self, condition: Condition) -> None:
        """See `Conditioner.added`: none."""
        return

    def prefix(self, condition: Condition) -> Tensor:
        """See `Conditioner.prefix`."""
        text = condition.text
        if text is None:
            raise ConfigError(
                "condition.text", None, "this block is conditioned on text.", "Give Condition(text=...), or call Flow.set_null."
            )
        if condition.mask is not None:
            text = text * condition.mask[..., None].to(text.dtype)
        return self.proj(text.to(self.proj.weight.dtype))  # type: ignore[no-any-return]  # torch is untyped here


def _classes(n: int) -> int:
    if n < 1:
        raise ConfigError(
            "num_classes", n, "a conditioner needs at least one class.", "Leave the conditioner out for an unconditional block."
        )
    return n


def _labels(condition: Condition) -> Tensor:
    if condition.labels is None:
        raise ConfigError(
            "condition.labels", None, "this block is conditioned on classes.", "Give Condition(labels=...), -1 for the null class."
        )
    return condition.labels
