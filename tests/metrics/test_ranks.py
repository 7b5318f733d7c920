"""Metrics over two processes give what one process gives."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch import distributed as dist

from srcflow.metrics.codes import CodeHealth
from srcflow.metrics.frechet import FrechetDistance
from srcflow.metrics.precision_recall import PrecisionRecall
from srcflow.metrics.reconstruction import ReconstructionMetrics

WORLD = 2


def data() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    return {
        "real": torch.randn(61, 4, generator=g),
        "fake": torch.randn(60, 4, generator=g) + 0.5,
        "pred": torch.rand(7, 3, 12, 12, generator=g),
        "target": torch.rand(7, 3, 12, 12, generator=g),
        "codes": torch.randn(2, 9, 3, 5, generator=g),
    }


def measure(rank: int, world: int) -> dict[str, float]:
    d = data()
    frechet, health = FrechetDistance(4, small_sample=True), CodeHealth(5)
    images, manifold = ReconstructionMetrics(), PrecisionRecall()
    for metric in (frechet, manifold):
        metric.update(d["real"][rank::world], real=True)
        metric.update(d["fake"][rank::world])
    images.update(d["pred"][rank::world], d["target"][rank::world])
    health.update(d["codes"][:, rank::world])
    return {"frechet": float(frechet.compute()), **images.compute(), **health.compute(), **manifold.compute()}


def work(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    torch.save(measure(rank, WORLD), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_equal_one(tmp_path: Path) -> None:
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    ranks = [subprocess.Popen([sys.executable, __file__, str(rank), str(tmp_path)], env=environment) for rank in range(WORLD)]
    expected = measure(0, 1)
    assert [rank.wait(timeout=120) for rank in ranks] == [0] * WORLD
    for rank in range(WORLD):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert abs(found[name] - value) <= 1e-6 * max(1, abs(value)), name


if __name__ == "__main__":
    work(int(sys.argv[1]), sys.argv[2])
