"""Feed-forward layers of the flow's transformer."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

MLPName = Literal["gelu", "gated"]


class MLP(nn.Module):
    """Linear, GELU (erf), Linear.

    Args:
        width: input and output width.
        hidden: inner width.
        bias: whether the linear layers have biases.
    """

    def __init__(self, width: int, hidden: int, bias: bool = True) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden, bias=bias)
        self.fc2 = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) to (..., width)."""
        return self.fc2(F.gelu(self.fc1(x)))  # type: ignore[no-any-return]  # torch is untyped here


class GatedMLP(nn.Module):
    """down(GELU_tanh(gate(x)) * up(x)).

    Args:
        width: input and output width.
        hidden: inner width.
        bias: whether the linear layers have biases.
    """

    def __init__(self, width: int, hidden: int, bias: bool = True) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=bias)
        self.up = nn.Linear(width, hidden, bias=bias)
        self.down = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) to (..., width)."""
        return self.down(F.gelu(self.gate(x), approximate="tanh") * self.up(x))  # type: ignore[no-any-return]  # torch is untyped here
