"""FlowTask under options of DDP and under FSDP2, on two processes: `python strategies_two_ranks.py DIRECTORY`; prints what it counted.

Run by test_strategies_two_ranks.py.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook, bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from srcflow import artifacts
from srcflow.autoencoders.pixels import PixelPatches
from srcflow.callbacks.ema import EMA
from srcflow.callbacks.sample_grid import SampleGrid
from srcflow.errors import ConfigError
from srcflow.flows import presets
from srcflow.tasks.flow import FlowTask


def shared() -> Any:
    """The data and the task of test_flow.py."""
    spec = importlib.util.spec_from_file_location("flow_test", Path(__file__).with_name("test_flow.py"))
    if spec is None or spec.loader is None:
        raise ImportError("test_flow.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PARTS = shared()


class Counted(L.Callback):
    """Counts DDP's all-reduces by a hook that does what DDP does without one; or reduces in bfloat16."""

    def __init__(self, hook: Any = allreduce_hook) -> None:
        self.hook, self.reductions = hook, 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        def counting(state, bucket):  # type: ignore[no-untyped-def]  # torch compares annotations, which are strings here
            self.reductions += 1
            return self.hook(None, bucket)

        model = trainer.strategy.model
        if isinstance(model, DistributedDataParallel):
            model.register_comm_hook(None, counting)


def fit(root: Path, task: FlowTask, strategy: Any, steps: int = 4, *callbacks: L.Callback, **more: Any) -> L.Trainer:
    trainer = L.Trainer(
        accelerator="cpu", devices=2, strategy=strategy, max_steps=steps, logger=False, enable_checkpointing=False, num_sanity_val_steps=0,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[EMA(0.9), *callbacks], default_root_dir=root, limit_val_batches=0,
        **more,
    )  # fmt: skip
    trainer.fit(task, PARTS.SquaresData())
    return trainer


def weights(task: FlowTask) -> float:
    """One number that changes with any weight."""
    return float(sum((p.detach().double() * (1 + i)).sum() for i, p in enumerate(task.flow.parameters())))


def under_ddp(root: Path) -> dict[str, Any]:
    """Final weights by options, and how many times gradients were reduced in 4 steps."""
    found: dict[str, Any] = {}
    options: dict[str, tuple[dict[str, Any], int]] = {
        "plain": ({}, 1),
        "view": ({"gradient_as_bucket_view": True}, 1),
        "static": ({"gradient_as_bucket_view": True, "static_graph": True}, 1),
        "accumulated": ({}, 3),
        "accumulated view": ({"gradient_as_bucket_view": True}, 3),
    }
    for name, (arguments, accumulate) in options.items():
        counter, task = Counted(), PARTS.make(str(root / "codec"))
        fit(root, task, DDPStrategy(**arguments), 4, counter, accumulate_grad_batches=accumulate)
        found[name] = weights(task)
        found[f"{name} reductions"] = counter.reductions
    task = PARTS.make(str(root / "codec"))
    fit(root, task, DDPStrategy(), 4, Counted(bf16_compress_hook))
    found["bf16"] = weights(task)
    try:
        fit(root, PARTS.make(str(root / "codec")), DDPStrategy(static_graph=True), accumulate_grad_batches=2)
    except ConfigError as e:
        found["static accumulated"] = str(e)
    return found


class Extra(FlowTask):
    """A task with a trained parameter outside of the flow."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.scale = nn.Parameter(torch.ones(()))


class Gathers(TorchDispatchMode):
    """Counts FSDP2's all-gathers inside."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "all_gather_copy_in" in str(func)
        return func(*args, **(kwargs or {}))


def under_fsdp2(root: Path) -> dict[str, Any]:
    """All-gathers of a sample by its number of tokens, and what a parameter outside is told."""
    found: dict[str, Any] = {}

    def strategy(data: int = 2, tensor: int = 1) -> ModelParallelStrategy:
        return ModelParallelStrategy(data_parallel_size=data, tensor_parallel_size=tensor, save_distributed_checkpoint=False)

    for patch in (6, 3):
        codec, grid = str(root / f"codec{patch}-{dist.get_rank()}"), 12 // patch
        artifacts.save(codec, PixelPatches(12, patch))
        shards = []
        for pictures in ([], [SampleGrid(every_n_steps=1, columns=1)]):
            torch.manual_seed(0)
            flow = presets.srcflow((grid, grid), 3 * patch**2, 64, [1, 2], num_classes=3, head_dim=32)
            task = PARTS.make(codec, flow=flow)
            fit(root, task, strategy(), 3, *pictures)
            shards.append([p.detach().to_local().clone() for p in task.flow.parameters()])  # type: ignore[attr-defined]  # DTensors
        found[f"{grid * grid} tokens, undisturbed"] = all(torch.equal(a, b) for a, b in zip(*shards, strict=True))
        for name in ("gathers", "gathers again"):  # what was gathered is sharded again
            with Gathers() as counter:
                task.sample_images(torch.tensor([0, 1, -1]), 0)
            found[f"{grid * grid} tokens, {name}"] = counter.count
        with Gathers() as counter:
            task.flow.inverse(torch.zeros(1, grid * grid, 3 * patch**2))
        found[f"{grid * grid} tokens, gathers of the flow itself"] = counter.count
    for name, task, wanted in (
        ("outside", Extra(PARTS.make("").flow, str(root / "codec")), strategy()),
        ("split", PARTS.make(str(root / "codec")), strategy(1, 2)),
    ):
        try:
            fit(root, task, wanted)
        except ConfigError as e:
            found[name] = str(e)
    return found


def main(root: Path) -> None:
    warnings.filterwarnings("ignore")
    if not (root / "codec").exists():
        artifacts.save(root / "codec", PixelPatches(12, 6))
    found = {**under_ddp(root), **under_fsdp2(root)}
    print(f"RESULT{json.dumps(found)}" if dist.get_rank() == 0 else "")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
