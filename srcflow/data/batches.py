"""From samples to the batches that cross borders (`types.Batch`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import torch
from torch import Tensor

from srcflow.types import Batch


class Sample(TypedDict):
    """One image as a dataset yields it."""

    image: Tensor  # (3, H, W) uint8
    label: int  # -1 where there is none
    index: int  # global sample index: stable across epochs, ranks and workers
    valid: bool
    flipped: bool


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack samples of equal size into a batch."""
    return Batch(
        images=torch.stack([s["image"] for s in samples]),
        labels=torch.tensor([s["label"] for s in samples], dtype=torch.int64),
        indices=torch.tensor([s["index"] for s in samples], dtype=torch.int64),
        valid=torch.tensor([s["valid"] for s in samples], dtype=torch.bool),
        flipped=torch.tensor([s["flipped"] for s in samples], dtype=torch.bool),
    )
