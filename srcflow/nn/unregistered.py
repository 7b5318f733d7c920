"""A frozen network that its owner uses but does not own: a judge, not a part of the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


class Unregistered(nn.Module, Generic[M]):
    """Holds a frozen network outside the module tree.

    Assigned to an attribute of another module, it follows that module from device to device, but adds nothing to its `parameters()`,
    `state_dict()`, `modules()` or summary: the network is not saved, averaged, sharded, synchronised or put in training mode. The network
    is frozen and in eval mode, and stays at least float32 whatever `.half()` or `.to(bfloat16)` ask for (inputs should be cast up to
    `dtype`); float64 is followed.

    Args:
        module: the network to hold.
    """

    def __init__(self, module: M) -> None:
        super().__init__()
        self._held: tuple[M] = (module,)  # a tuple hides it from nn.Module's registration
        module.requires_grad_(False)
        module.eval()

    @property
    def module(self) -> M:
        """The held network."""
        return self._held[0]

    @property
    def dtype(self) -> torch.dtype:
        """Floating dtype of the network's parameters (float32 if it has none)."""
        return next((t.dtype for t in self.module.parameters() if t.is_floating_point()), torch.float32)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the held network."""
        return self.module(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Unregistered[M]:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch is untyped here
        self.module._apply(lambda t: _at_least_float32(t, fn(t)), recurse)  # type: ignore[no-untyped-call]  # torch is untyped here
        return self


def _at_least_float32(before: Tensor, after: Tensor) -> Tensor:
    if after.is_floating_point() and before.is_floating_point() and torch.promote_types(after.dtype, torch.float32) != after.dtype:
        return before.to(after.device)
    return after
