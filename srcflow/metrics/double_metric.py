"""The base of our streaming metrics: states in float64, whatever precision the run has."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from srcflow.errors import ShapeError


class DoubleMetric(Metric):
    """A torchmetrics Metric whose tensor states are sums, minima or maxima in float64 and stay so.

    torchmetrics casts states along with a module's `.to(bfloat16)`, which destroys sums; here only the device is followed (on a device
    without float64 the states stay on the CPU). `update` needs no gradient; states are not part of checkpoints.
    """

    full_state_update = False

    def add_sum(self, name: str, *shape: int) -> None:
        """Add a float64 state of zeros that is summed over ranks."""
        self.add_state(name, default=torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def to_state(self, x: Tensor) -> Tensor:
        """`x` in the states' dtype and on their device."""
        return x.detach().to(_state_device(x.device)).to(torch.float64)

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = ()) -> Metric:
        states = {name: getattr(self, name) for name in self._defaults}
        super()._apply(fn, exclude_state=list(self._defaults))
        device = _state_device(self._device)
        for name, value in states.items():
            default = self._defaults[name]
            self._defaults[name] = default.to(device) if isinstance(default, Tensor) else default
            setattr(self, name, value.to(device) if isinstance(value, Tensor) else [v.to(device) for v in value])
        return self

    def set_dtype(self, dst_type: str | torch.dtype) -> Metric:
        """Leave the states in float64."""
        return self


def _state_device(device: torch.device) -> torch.device:
    return torch.device("cpu") if device.type == "mps" else device


def valid_rows(valid: Tensor | None, *tensors: Tensor) -> list[Tensor]:
    """The rows of `tensors` that count.

    Args:
        valid: (B,) bool, False for padding; None if all rows count.
        tensors: any, of B rows.

    Raises:
        ShapeError: the numbers of rows differ.
    """
    rows = {t.shape[0] for t in tensors} | ({valid.shape[0]} if valid is not None else set())
    if len(rows) > 1:
        raise ShapeError(f"the inputs of a metric must have equally many rows, not {sorted(rows)}.")
    return list(tensors) if valid is None else [t[valid.to(t.device)] for t in tensors]
