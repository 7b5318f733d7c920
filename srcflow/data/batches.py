"""From samples to the batches that cross borders (`types.Batch`)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, TypedDict, cast

import torch
from torch import Tensor
from torch.utils.data import default_collate

from srcflow.errors import DataError, UndecodableError
from srcflow.types import Batch

Bad = list[tuple[int, str]]
"""Rows of a batch whose images do not decode, with what was said of each."""


class _Sample(TypedDict):
    image: Tensor  # (3, H, W) uint8
    label: int  # -1 where there is none
    index: int  # global sample index: stable across epochs, ranks and workers
    valid: bool
    flipped: bool


class Sample(_Sample, total=False):
    """One image as a dataset yields it."""

    error: str  # why the image is black: it could not be decoded


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack samples of equal size into a batch.

    Raises:
        UndecodableError: one of them could not be decoded.
    """
    for sample in samples:
        if "error" in sample:
            raise UndecodableError(sample["error"])
    return _stack(samples)


def collate_tolerantly(samples: Sequence[Sample]) -> tuple[Batch, Bad]:
    """Stack samples, and say which of them could not be decoded; `BadSamples.mend` replaces them."""
    return _stack(samples), [(row, s["error"]) for row, s in enumerate(samples) if "error" in s]


def as_batch(samples: Any) -> Batch:
    """Samples to a batch; a data set that reads whole batches has made one already."""
    return samples if isinstance(samples, dict) else collate(samples)  # type: ignore[return-value]  # a Batch is a dict


def as_training_batch(samples: Any) -> Batch | tuple[Batch, Bad]:
    """As `as_batch`, with a list of the samples that could not be decoded."""
    return samples if isinstance(samples, dict) else collate_tolerantly(samples)  # type: ignore[return-value]  # a Batch is a dict


def unchanged(item: Any) -> Any:
    """What a worker made is a batch, or a part of one, already."""
    return item


def _stack(samples: Sequence[Sample]) -> Batch:
    return Batch(
        images=default_collate([s["image"] for s in samples]),  # in a worker: straight into shared memory
        labels=torch.tensor([s["label"] for s in samples], dtype=torch.int64),
        indices=torch.tensor([s["index"] for s in samples], dtype=torch.int64),
        valid=torch.tensor([s["valid"] for s in samples], dtype=torch.bool),
        flipped=torch.tensor([s["flipped"] for s in samples], dtype=torch.bool),
    )


def join(shares: Sequence[tuple[Batch, Bad]], *, pin: bool = False) -> tuple[Batch, Bad]:
    """Put parts of a batch one behind the other.

    Args:
        shares: with equal keys.
        pin: into page-locked memory, from which copies to a GPU are faster.
    """
    joined: dict[str, Tensor] = {}
    for name in shares[0][0]:
        columns = [cast(dict[str, Tensor], batch)[name] for batch, _ in shares]
        shape = (sum(len(c) for c in columns), *columns[0].shape[1:])
        out = torch.empty(shape, dtype=columns[0].dtype, pin_memory=True) if pin else None
        joined[name] = columns[0] if len(columns) == 1 and not pin else torch.cat(columns, out=out)
    bad: Bad = []
    before = 0
    for batch, found in shares:
        bad += [(before + row, message) for row, message in found]
        before += len(batch["indices"])
    return cast(Batch, joined), bad


class BadSamples:
    """Counts the training samples of this rank that do not decode, puts good ones in their place, and stops the run when they are too many.

    Args:
        fraction: of an epoch's samples that may be bad; 0: none.

    Attributes:
        messages: what was said of each bad sample of the present epoch, by its global index.
        total: how many were met in all epochs.
        spare: the last good row given, of one sample; None: none yet.
    """

    def __init__(self, fraction: float) -> None:
        self.fraction = fraction
        self.messages: dict[int, str] = {}
        self.total = 0
        self.spare: dict[str, Tensor] | None = None
        self._epoch: int | None = None

    def mend(self, batch: Batch, bad: Bad, *, epoch: int, samples: int) -> Batch:
        """Replace a batch's bad rows, each by the next good row of the batch, or, where it has none, all by the last one given before.

        Args:
            batch: changed in place.
            bad: its bad rows.
            epoch: in which it was drawn; the count starts anew in each.
            samples: of this rank in an epoch.

        Returns:
            The batch.

        Raises:
            DataError: the epoch has more bad samples than it may have, or there was no good one yet; lists them.
        """
        if epoch != self._epoch:
            self._epoch, self.messages = epoch, {}
        rows = {row for row, _ in bad}
        size = len(batch["indices"])
        for row, message in bad:
            index = int(batch["indices"][row])
            if index not in self.messages:
                self.total += 1
                self.messages[index] = message
                warnings.warn(f"bad sample {len(self.messages)} of epoch {epoch}, replaced by another: {message}", stacklevel=2)
        if len(self.messages) > self.fraction * samples:
            self._stop(f"more than data.max_bad_fraction = {self.fraction:g} of this rank's {samples} samples in an epoch")
        columns = {name: column for name, column in cast(dict[str, Any], batch).items() if isinstance(column, Tensor)}
        if len(rows) == size and self.spare is None:
            self._stop("with no good one before them to put in their place")
        for row in rows:
            good = next((r % size for r in range(row + 1, row + size) if r % size not in rows), None)
            for name, column in columns.items():
                column[row] = cast(dict[str, Tensor], self.spare)[name] if good is None else column[good]
        if self.fraction:  # else the first bad one ends the run
            self.spare = {name: column[size - 1].clone() for name, column in columns.items()}
        return batch

    def _stop(self, why: str) -> None:
        shown = list(self.messages.values())[:20]
        more = f"\n  ... and {len(self.messages) - 20} more" if len(self.messages) > 20 else ""
        raise DataError(f"{len(self.messages)} samples of epoch {self._epoch} do not decode, {why}:\n  " + "\n  ".join(shown) + more)
