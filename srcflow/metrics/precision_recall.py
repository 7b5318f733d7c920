"""Improved precision and recall (Kynkaanniemi et al., 2019, arXiv 1904.06991)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from srcflow.errors import ConfigError, DataError
from srcflow.metrics.double_metric import valid_rows
from srcflow.metrics.non_finite import check_rows


class PrecisionRecall(Metric):
    """Share of generated samples on the real manifold (precision: fidelity) and of real samples on the generated one (recall: coverage).

    A manifold is the union of balls around its samples, each reaching to its k-th nearest neighbour in the same set (itself not counted).
    All features are kept in memory, in the precision they arrive in; distances are computed block by block in float32 or better.

    Args:
        k: which neighbour bounds a ball.
        block: rows of a distance matrix held at a time.
        kwargs: torchmetrics' own (synchronisation).
    """

    full_state_update = False
    is_differentiable = False
    real: list[Tensor]
    fake: list[Tensor]

    def __init__(self, k: int = 3, block: int = 4096, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if k < 1:
            raise ConfigError("precision_recall.k", k, "a neighbour has a positive number.")
        if block < 1:
            raise ConfigError("precision_recall.block", block, "at least one row is held at a time.")
        self.k, self.block = k, block
        self.add_state("real", default=[], dist_reduce_fx="cat")
        self.add_state("fake", default=[], dist_reduce_fx="cat")

    def update(self, features: Tensor, real: bool = False, valid: Tensor | None = None) -> None:
        """Keep a batch of features (B, D) of one side; `valid` (B,) bool marks the rows that count.

        Raises:
            DataError: a row that counts is not finite; says on which side. Neither side's manifold would mean anything with it.
        """
        (x,) = valid_rows(valid, features.detach())
        check_rows(x, f"features of the {'real' if real else 'fake'} side", "Mark them as not valid, and report how many there were.")
        (self.real if real else self.fake).append(x.to(torch.promote_types(x.dtype, torch.float32)))

    def compute(self) -> dict[str, float]:
        """{"precision", "recall"}, each in [0, 1].

        Raises:
            DataError: a side has no more than k samples.
        """
        real, fake = self._all("real"), self._all("fake")
        return {"precision": self._share(fake, real), "recall": self._share(real, fake)}

    def _all(self, side: str) -> Tensor:
        kept = getattr(self, side)
        x: Tensor = dim_zero_cat(kept) if len(kept) else torch.empty(0, 0)
        if len(x) <= self.k:
            raise DataError(f"precision and recall with k = {self.k} need more than {self.k} {side} samples, not {len(x)}.")
        return x

    def _share(self, queries: Tensor, manifold: Tensor) -> float:
        """Share of the queries that lie in some ball of the manifold."""
        blocks = torch.split(manifold, self.block)
        radii = torch.cat([_distances(rows, manifold).kthvalue(self.k + 1, dim=1).values for rows in blocks])
        inside = [(_distances(rows, manifold) <= radii).any(1) for rows in torch.split(queries, self.block)]
        return float(torch.cat(inside).double().mean())


def _distances(a: Tensor, b: Tensor) -> Tensor:
    # without the matrix-product shortcut, which loses what distinguishes close neighbours far from the origin
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
