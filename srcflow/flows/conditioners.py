"""How a block sees the condition."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from srcflow.errors import ConfigError, ShapeError, one_of
from srcflow.registry import Recorded
from srcflow.types import NULL_LABEL, Condition

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
        bias: a vector added to every class's token. Published STARFlow has one: it maps one-hot vectors through a linear layer.
    """

    kind = "labels"

    def __init__(self, num_classes: int, width: int, bias: bool = False) -> None:
        super().__init__()
        self.num_classes = _classes(num_classes)
        self.weight = nn.Parameter(torch.randn(num_classes + 1, width) * 1e-2)
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def added(self, condition: Condition) -> None:
        """See `Conditioner.added`: none."""
        return

    def prefix(self, condition: Condition) -> Tensor:
        """See `Conditioner.prefix`."""
        labels = _labels(condition)
        tokens = self.weight[torch.where(labels < 0, self.num_classes, labels)][:, None]
        return tokens if self.bias is None else tokens + self.bias


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
        if text.shape[-1] != self.text_dim:
            raise ShapeError(f"condition.text has features of width {text.shape[-1]}, the model takes text_dim = {self.text_dim}.")
        if condition.mask is not None:
            text = text * condition.mask[..., None].to(text.dtype)
        return self.proj(text.to(self.proj.weight.dtype))  # type: ignore[no-any-return]  # torch is untyped here


def resolve(
    condition: Condition | None,
    batch: int,
    *,
    kind: Kind | None,
    num_classes: int,
    null: tuple[Tensor, Tensor | None] | None,
    device: torch.device,
) -> Condition | None:
    """The condition with every null filled in, for `batch` rows; None for an unconditional model.

    Args:
        condition: labels or text; None means the null condition. With text, label -1 marks the rows that take the null text.
        batch: number of rows.
        kind: which field the model reads; None for none.
        num_classes: of a model that reads labels.
        null: the null text (L, T) and its mask (L,) or None, if they are known.
        device: of the result.

    Raises:
        ConfigError: the condition is not of this kind, or a null text is needed and not known.
        ShapeError: its number of rows is not `batch`.
    """
    given = Condition() if condition is None else condition
    if kind is None:
        if given.labels is not None or given.text is not None:
            what = "labels" if given.labels is not None else "text"
            raise ConfigError("condition", what, "this flow is unconditional.", "Pass no condition.")
        return None
    given = given.to(device)
    for name, field in (("labels", given.labels), ("text", given.text)):
        if field is not None and field.shape[0] != batch:
            raise ShapeError(f"condition.{name} has {field.shape[0]} rows for a batch of {batch}.")
    if given.text is not None and given.text.ndim != 3:
        raise ShapeError(f"condition.text is (B, L, T), not {tuple(given.text.shape)}.")
    if given.mask is not None and (given.text is None or given.mask.shape != given.text.shape[:2]):
        shape = None if given.text is None else tuple(given.text.shape)
        raise ShapeError(f"condition.mask {tuple(given.mask.shape)} is not (B, L) of condition.text {shape}.")
    if kind == "labels":
        return _resolved_labels(given, batch, num_classes, device)
    dropped = None if given.labels is None else given.labels < 0
    if given.text is not None and dropped is None:
        return Condition(text=given.text, mask=given.mask)
    if given.text is None and dropped is not None and dropped.device.type == "cpu" and not bool(dropped.all()):
        raise ConfigError("condition.labels", "without text", "this flow is conditioned on text.", "Give Condition(text=...).")
    if null is None:
        raise ConfigError("condition.text", None, "the null text is not known.", "Call Flow.set_null(text), or give Condition(text=...).")
    rows, mask = null[0].expand(batch, -1, -1), None if null[1] is None else null[1].expand(batch, -1)
    if given.text is None or dropped is None:
        return Condition(text=rows, mask=mask)
    if given.text.shape[1:] != rows.shape[1:]:
        raise ShapeError(f"condition.text is {tuple(given.text.shape)}, the null text {tuple(null[0].shape)}: pad them to one length.")
    text = torch.where(dropped[:, None, None], rows.to(given.text.dtype), given.text)
    if given.mask is None and mask is None:
        return Condition(text=text)
    ones = torch.ones(text.shape[:2], dtype=torch.bool, device=device)
    merged = torch.where(dropped[:, None], ones if mask is None else mask, ones if given.mask is None else given.mask)
    return Condition(text=text, mask=merged)


def _resolved_labels(given: Condition, batch: int, num_classes: int, device: torch.device) -> Condition:
    if given.text is not None:
        raise ConfigError("condition.text", tuple(given.text.shape), "this flow is conditioned on class labels.")
    labels = given.labels if given.labels is not None else torch.full((batch,), NULL_LABEL, device=device)
    # on an accelerator the look would wait for everything before it; indexing fails there by itself
    if labels.device.type == "cpu" and labels.numel() and not (int(labels.min()) >= NULL_LABEL and int(labels.max()) < num_classes):
        raise ConfigError("condition.labels", (int(labels.min()), int(labels.max())), f"labels lie in -1 .. {num_classes - 1}.")
    return Condition(labels=labels)


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
