"""Text features in front of the sequence."""

from __future__ import annotations

from torch import Tensor, nn

from srcflow.conditioners.base import Conditioner, Field
from srcflow.errors import ConfigError, ShapeError
from srcflow.types import Condition


class TextPrefix(Conditioner):
    """Text features through a linear map in front of the image tokens; padding is multiplied by its mask before the map (STARFlow, E12).

    Args:
        text_dim: width T of the text features.
        width: width of the block.

    Raises:
        ConfigError: a width that cannot be.
    """

    def __init__(self, text_dim: int, width: int) -> None:
        super().__init__()
        self.fields = (Field("text", "sequence", text_dim, mask="mask"),)
        self.text_dim = text_dim
        self.proj = nn.Linear(text_dim, width)

    def prefix(self, condition: Condition) -> Tensor:
        """The text's tokens (B, L, width).

        Raises:
            ConfigError: the condition has no text.
            ShapeError: its features have another width.
        """
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
