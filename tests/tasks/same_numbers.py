"""Evaluates one flow under one process, DDP and FSDP2: `python same_numbers.py one|two DIRECTORY`. Run by test_same_numbers.py."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset

from srcflow import artifacts
from srcflow.autoencoders.pixels import PixelPatches
from srcflow.callbacks.ema import EMA
from srcflow.data.sampler import Draw
from srcflow.datamodules.base import DataModule, Split
from srcflow.flows import presets
from srcflow.guidance.linear import Linear
from srcflow.noise import Constant
from srcflow.tasks import artifact
from srcflow.tasks.flow import FlowTask
from srcflow.tasks.flow_evaluation import Evaluation


def shared() -> Any:
    """The data of test_flow.py."""
    spec = importlib.util.spec_from_file_location("flow_test", Path(__file__).with_name("test_flow.py"))
    if spec is None or spec.loader is None:
        raise ImportError("test_flow.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PARTS = shared()


class Drawn(Dataset[dict[str, Any]]):
    """Squares by the draws of a KeyedSampler, hence with padding."""

    def __init__(self, n: int, offset: int) -> None:
        self.data = PARTS.Squares(n, offset)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, draw: Draw) -> dict[str, Any]:
        i = draw.index
        return {"image": self.data.images[i], "label": int(self.data.labels[i]), "index": i, "valid": draw.valid, "flipped": False}


class Data(DataModule):
    """44 test images: batches of 8 do not divide them, neither on one rank nor on two."""

    def __init__(self) -> None:
        super().__init__(batch_size=8, num_workers=0, num_classes=3, seed=0)

    def open(self, split: Split, training: bool) -> Drawn:
        return Drawn(96 if split == "train" else 44, 0 if split == "train" else 1000)

    def describe(self, split: Split) -> dict[str, Any]:
        return {"squares": split}

    def place(self, split: Split) -> str:
        return "memory"


def make(root: Path, file: str = "") -> FlowTask:
    """A flow that learns its prior, on pixels."""
    torch.manual_seed(0)
    flow = presets.tarflow((2, 2), 108, 64, 2, 2, head_dim=32, num_classes=3, volume_preserving=True)
    evaluation = Evaluation(draws=2, samples=40, extractor=PARTS.Means(), classified=20, round_trip=4, denoise=0.1)
    return FlowTask(flow, str(root / "codec"), noise=Constant(0.1), guidance=Linear(0.5), evaluation=evaluation, metrics_file=file)


def trainer(root: Path, devices: int, strategy: Any, **more: Any) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu", devices=devices, strategy=strategy, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, default_root_dir=root, **more,
    )  # fmt: skip


def evaluate(root: Path, mode: str, double: bool) -> None:
    """Write what every command gives of the checkpoint: val/nll, metrics.json, samples, the artifact."""
    name = f"{mode}{64 if double else 32}"
    strategies = {"one": "auto", "ddp": "ddp"}
    strategy: Any = strategies.get(mode) or ModelParallelStrategy(
        data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=False
    )
    checkpoint = str(root / f"fit{64 if double else 32}.ckpt")
    task = make(root, str(root / f"{name}.json"))
    precision: Any = "64-true" if double else "32-true"
    if double and mode == "fsdp2":  # Lightning has no 64-true for this strategy
        task, precision = task.double(), "32-true"
    run = trainer(root, 1 if mode == "one" else 2, strategy, precision=precision)
    (validated,) = run.validate(task, Data(), ckpt_path=checkpoint, verbose=False)
    if (mode == "fsdp2") != any(isinstance(p, DTensor) for p in task.flow.parameters()):
        raise AssertionError("the flow is sharded under FSDP2, and there alone")
    run.test(task, Data(), ckpt_path=checkpoint, verbose=False)
    task.prepare_outside()
    samples = task.sample_images(torch.tensor([0, 1, 2, -1]), seed=3)
    artifact.write(task, str(root / f"artifact-{name}"))
    torch.save({"samples": samples, "val/nll": validated["val/nll"]}, root / f"{name}-{run.global_rank}.pt")


def main(ranks: str, root: Path) -> None:
    warnings.filterwarnings("ignore")
    if ranks == "one":
        artifacts.save(root / "codec", PixelPatches(12, 6))
        for double in (False, True):
            fit = trainer(root, 1, "auto", max_steps=6, callbacks=[EMA(0.9)], precision="64-true" if double else "32-true")
            fit.fit(make(root), Data())
            fit.save_checkpoint(root / f"fit{64 if double else 32}.ckpt")
            evaluate(root, "one", double)
    else:
        for mode in ("ddp", "fsdp2"):
            for double in (False, True):
                evaluate(root, mode, double)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
