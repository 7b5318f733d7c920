"""Sums over how blocks were inverted."""

from __future__ import annotations

import torch

from srcflow.autoencoders.pixels import PixelPatches
from srcflow.flows import presets
from srcflow.pipeline import Pipeline
from srcflow.solvers.report import SolverReport
from srcflow.testing import perturb
from srcflow.types import Solution


def solution(iterations: list[int], residual: list[float], fallback: list[bool]) -> Solution:
    return Solution(torch.zeros(len(iterations), 4, 3), torch.tensor(iterations), torch.tensor(residual), torch.tensor(fallback))


def test_means_maxima_and_counts_are_over_the_samples_that_count() -> None:
    report = SolverReport()
    report.update([solution([4, 2], [0.0, 0.5], [False, True]), solution([1, 1], [0.25, 0.0], [False, False])])
    report.update([solution([9, 3], [8.0, 0.75], [True, False]), solution([5, 7], [0.0, 0.0], [True, True])], torch.tensor([False, True]))
    assert report.summary() == {"samples": 3, "iterations": [3.0, 3.0], "residual": [0.75, 0.25], "fallbacks": 2}
    doubled = report.summary(lambda x, how: 2 * x if how == "sum" else x)
    assert doubled == {"samples": 6, "iterations": [3.0, 3.0], "residual": [0.75, 0.25], "fallbacks": 4}
    assert SolverReport().summary() == {"samples": 0, "iterations": [], "residual": [], "fallbacks": 0}


def test_a_pipeline_reports_every_block_noise_side_first() -> None:
    flow = perturb(presets.srcflow(2, 12, 32, [1, 0, 1], num_classes=3, head_dim=16, normalization="none"))
    pipeline, report = Pipeline(PixelPatches(4, 2), flow=flow), SolverReport()
    plain = pipeline.sample(3, seed=0)
    assert torch.equal(pipeline.sample(3, seed=0, report=report), plain)
    pipeline.sample(2, seed=1, report=report)
    assert report.summary() == {"samples": 5, "iterations": [4.0, 0.0, 4.0], "residual": [0.0, 0.0, 0.0], "fallbacks": 0}
