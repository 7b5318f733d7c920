"""How the blocks of a flow were inverted, over many samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from srcflow.types import Solution


class SolverReport:
    """Sums over the samples of many calls, one entry per block, noise side first.

    >>> report = SolverReport()
    >>> rows = torch.tensor([4, 2]), torch.tensor([0.0, 1e-3]), torch.tensor([False, True])
    >>> report.update([Solution(torch.zeros(2, 4, 3), *rows)])
    >>> report.summary()["iterations"], report.summary()["fallbacks"]
    ([3.0], 1)
    """

    def __init__(self) -> None:
        self._sums: Tensor | None = None  # (blocks, 3) float64 on the CPU: samples, iterations, fallbacks
        self._residual: Tensor | None = None  # (blocks,) float64

    def update(self, solutions: Sequence[Solution], counted: Tensor | None = None) -> None:
        """Take in a call's solutions, noise side first; `counted` (B,) bool marks the samples that count."""
        sums, residuals = [], []
        for solution in solutions:
            keep = torch.ones_like(solution.fallback) if counted is None else counted.to(solution.fallback.device)
            values = torch.stack([keep.double(), solution.iterations.double(), solution.fallback.double()]) * keep
            sums.append(values.sum(1).cpu())
            residuals.append(torch.where(keep, solution.residual.double(), 0.0).amax().cpu())
        rows, worst = torch.stack(sums), torch.stack(residuals)
        self._sums = rows if self._sums is None else self._sums + rows
        self._residual = worst if self._residual is None else torch.maximum(self._residual, worst)

    def summary(self, reduce: Callable[[Tensor, Literal["sum", "max"]], Tensor] | None = None) -> dict[str, Any]:
        """Numbers for a report: `iterations` (mean) and `residual` (largest) per block, noise side first; `fallbacks` and `samples`.

        Args:
            reduce: combines a tensor of this rank with the others', by "sum" or "max"; None: there is one rank.
        """
        if self._sums is None or self._residual is None:
            return {"samples": 0, "iterations": [], "residual": [], "fallbacks": 0}
        sums = self._sums if reduce is None else reduce(self._sums.clone(), "sum")
        residual = self._residual if reduce is None else reduce(self._residual.clone(), "max")
        samples = sums[:, 0].clamp_min(1)
        return {
            "samples": int(sums[0, 0]),
            "iterations": (sums[:, 1] / samples).tolist(),
            "residual": residual.tolist(),
            "fallbacks": int(sums[:, 2].sum()),
        }
