"""FLOPs of a training step, counted by running it on the meta device.

They are torch.utils.flop_counter's: 2 per multiply-add of every matrix product, convolution and attention product; causal attention counts
as full, and everything else (norms, activations, resizing) counts nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import TypeVar
from unittest import mock

import torch
from torch.utils.flop_counter import FlopCounterMode

from srcflow.plan.step import Stage
from srcflow.tasks.flow import FlowTask

T = TypeVar("T")


class Counted:
    """FLOPs of the named parts of a step."""

    def __init__(self) -> None:
        self.flops: dict[str, int] = {}

    def __call__(self, name: str, function: Callable[[], T]) -> T:
        """Run `function`, and add what it costs to `name`."""
        with FlopCounterMode(display=False) as counter:
            result = function()
        self.flops[name] = self.flops.get(name, 0) + counter.get_total_flops()
        return result


def count_flops(stage: Stage, *, recomputed: bool = False) -> dict[str, int]:
    """FLOPs of one image in one training step, by part; nothing if nothing is trained.

    Args:
        stage: the task and its frozen parts, on the meta device; not changed.
        recomputed: also count what activation checkpointing computes a second time, as the configuration has it.
    """
    ready = stage.copied()
    if isinstance(ready.task, FlowTask) and not recomputed:
        ready.task.flow.set_checkpointing(0, heads=False)
    counted = Counted()
    # autocast does not know the meta device, and changes no count
    no_autocast = mock.patch.object(torch, "autocast", return_value=nullcontext())
    with no_autocast, mock.patch.object(torch, "is_autocast_enabled", return_value=False):
        ready.run(counted, 1, "meta")
    return counted.flops
