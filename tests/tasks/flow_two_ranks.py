"""A FlowTask on two processes, fit and test: `python flow_two_ranks.py ddp|fsdp2 DIRECTORY`. Run by test_flow_two_ranks.py."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.tensor import DTensor

from srcflow import artifacts
from srcflow.autoencoders.pixels import PixelPatches
from srcflow.callbacks.ema import EMA
from srcflow.guidance.gaussian import Gaussian
from srcflow.tasks.flow_evaluation import Evaluation


def main(mode: str, root: Path) -> None:
    import test_flow as parts  # beside this file

    if not (root / "codec").exists():
        artifacts.save(root / "codec", PixelPatches(12, 6))
    evaluation = Evaluation(samples=24, extractor=parts.Means(), classified=20, baseline_batches=0)
    task = parts.make(str(root / "codec"), evaluation=evaluation, metrics_file=str(root / f"{mode}.json"))
    strategy: Any = "ddp"
    if mode == "fsdp2":
        strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=False)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        max_steps=6,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[EMA(0.9)],
        default_root_dir=root,
    )
    trainer.fit(task, parts.SquaresData())
    if (mode == "fsdp2") != any(isinstance(p, DTensor) for p in task.flow.parameters()):
        raise AssertionError("the flow is sharded under FSDP2, and there alone")
    trainer.test(task, parts.SquaresData(), verbose=False)
    task.guidance, task.metrics_file = Gaussian(1e30), str(root / f"{mode}-runaway.json")
    trainer.test(task, parts.SquaresData(), verbose=False)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
