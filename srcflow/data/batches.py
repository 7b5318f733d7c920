"""From samples to the batches that cross borders (`types.Batch`)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NoReturn, TypedDict, cast

import torch
from torch import Tensor
from torch.utils.data import default_collate

from srcflow.data.rules import BUILT_IN, Columns, Common, Rules
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
    """One image as a dataset yields it. Further keys enter batches by the rules that the data set declares (`rules.Rule`)."""

    error: str  # why the image is black: it could not be decoded


def collate(samples: Sequence[Sample], rules: Rules = BUILT_IN) -> Batch:
    """Stack samples of equal size into a batch.

    Args:
        samples: from a data set.
        rules: of their further keys.

    Raises:
        UndecodableError: one of them could not be decoded.
        DataError: a key without a rule, or with one that does not fit.
    """
    for sample in samples:
        if "error" in sample:
            raise UndecodableError(sample["error"])
    return _stack(samples, rules)


def collate_tolerantly(samples: Sequence[Sample], rules: Rules = BUILT_IN) -> tuple[Batch, Bad]:
    """Stack samples, and say which of them could not be decoded; `BadSamples.mend` replaces them.

    Further keys are missing in the batch where none of them could be decoded.
    """
    return _stack(samples, rules), [(row, s["error"]) for row, s in enumerate(samples) if "error" in s]


def as_batch(samples: Any, rules: Rules = BUILT_IN) -> Batch:
    """Samples to a batch; a data set that reads whole batches has made one already. Raises as `collate` does."""
    return rules.checked(cast(Batch, samples)) if isinstance(samples, dict) else collate(samples, rules)


def as_training_batch(samples: Any, rules: Rules = BUILT_IN) -> Batch | tuple[Batch, Bad]:
    """As `as_batch`, with a list of the samples that could not be decoded."""
    return rules.checked(cast(Batch, samples)) if isinstance(samples, dict) else collate_tolerantly(samples, rules)


def unchanged(item: Any) -> Any:
    """What a worker made is a batch, or a part of one, already."""
    return item


def _stack(samples: Sequence[Sample], rules: Rules) -> Batch:
    batch = Batch(
        images=default_collate([s["image"] for s in samples]),  # in a worker: straight into shared memory
        labels=torch.tensor([s["label"] for s in samples], dtype=torch.int64),
        indices=torch.tensor([s["index"] for s in samples], dtype=torch.int64),
        valid=torch.tensor([s["valid"] for s in samples], dtype=torch.bool),
        flipped=torch.tensor([s["flipped"] for s in samples], dtype=torch.bool),
    )
    cast(Columns, batch).update(rules.collate(samples))
    return batch


def join(shares: Sequence[tuple[Batch, Bad]], *, pin: bool = False, rules: Rules = BUILT_IN) -> tuple[Batch, Bad]:
    """Put parts of a batch one behind the other.

    Args:
        shares: with equal keys; one without a sample that could be decoded may lack those that were declared.
        pin: into page-locked memory, from which copies to a GPU are faster.
        rules: of their further keys.

    Raises:
        DataError: parts that do not fit each other.
    """
    rows = [len(batch["indices"]) for batch, _ in shares]
    joined = rules.join([(cast(Columns, batch), n, len(bad) < n) for (batch, bad), n in zip(shares, rows, strict=True)], pin=pin)
    bad: Bad = []
    for i, (_, found) in enumerate(shares):
        bad += [(sum(rows[:i]) + row, message) for row, message in found]
    return cast(Batch, joined), bad


class BadSamples:
    """Counts the training samples of this rank that do not decode, puts good ones in their place, and stops the run when they are too many.

    Args:
        fraction: of an epoch's samples that may be bad; 0: none.
        rules: of the batches' further keys.

    Attributes:
        messages: what was said of each bad sample of the present epoch, by its global index.
        total: how many were met in all epochs.
        spare: the last row given, by the sample's keys; None: none yet.
    """

    def __init__(self, fraction: float, rules: Rules = BUILT_IN) -> None:
        self.fraction, self.rules = fraction, rules
        self.messages: dict[int, str] = {}
        self.total = 0
        self.spare: Columns | None = None
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
        columns = cast(Columns, batch)
        if len(rows) < size:
            own = [column for name, column in columns.items() if not isinstance(self.rules.columns.get(name), Common)]
            for row in rows:
                good = next(r % size for r in range(row + 1, row + size) if r % size not in rows)
                for column in own:
                    column[row] = column[good]
        elif self.spare is None:
            self._stop("with no good one before them to put in their place")
        else:
            for key, value in self.spare.items():
                columns.update(self.rules.columns[key].collate(key, [value] * size))
        if self.fraction:  # else the first bad one ends the run
            self.spare = {key: rule.value(key, columns, size - 1) for key, rule in self.rules.columns.items() if key in columns}
        return batch

    def _stop(self, why: str) -> NoReturn:
        shown = list(self.messages.values())[:20]
        more = f"\n  ... and {len(self.messages) - 20} more" if len(self.messages) > 20 else ""
        raise DataError(f"{len(self.messages)} samples of epoch {self._epoch} do not decode, {why}:\n  " + "\n  ".join(shown) + more)
