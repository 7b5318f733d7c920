"""A flow on stored features, one of them not a number. test_replay.py uses it, also on two processes: `bad_step.py ddp|fsdp2 DIR`."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor

from srcflow import artifacts
from srcflow.autoencoders.pixels import PixelPatches
from srcflow.callbacks.ema import EMA, full
from srcflow.callbacks.non_finite import BadStep
from srcflow.data.feature_store import FeatureStoreWriter
from srcflow.datamodules.feature_store import FeatureStore
from srcflow.flows import presets
from srcflow.tasks import dump
from srcflow.tasks.flow import FlowTask
from srcflow.tasks.optimization import Optimization
from srcflow.testing import perturb

SAMPLES, POISONED = 48, 29


def prepare(root: Path, spoiled: bool = True) -> None:
    """A codec of pixel patches, and a store of its features, one of them spoiled or not."""
    codec = PixelPatches(8, 4)
    artifacts.save(root / "codec", codec)
    images = torch.randint(0, 256, (SAMPLES, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    features, grid = codec.features(images.float() / 255)
    facts: dict[str, Any] = {"grid": grid, "encoder": {"spec": {}, "weights": "none"}, "transform": {"size": 8}}
    with FeatureStoreWriter(
        root / "store", n=SAMPLES, tokens=features.shape[1], dim=features.shape[2], image_size=(8, 8), dtype="float32", manifest=facts
    ) as w:
        w.write(torch.arange(SAMPLES), features, images, torch.arange(SAMPLES) % 3, [f"key{i}" for i in range(SAMPLES)])
    if spoiled:
        np.load(root / "store" / "features.npy", mmap_mode="r+")[POISONED, 1, 2] = np.nan


def make(root: Path, seed: int = 0, learn_prior: bool = True) -> FlowTask:
    """A flow, not fresh (heads start at zero), with a learned prior or with log-scales."""
    torch.manual_seed(seed)
    flow = perturb(presets.tarflow((2, 2), 48, 32, 2, [1, 2], head_dim=16, num_classes=3, volume_preserving=learn_prior))
    return FlowTask(flow, str(root / "codec"), label_dropout=0.5, seed=7, optimization=Optimization(2e-3, dump_bad_steps=1))


class Watch(L.Callback):
    """Dumps one good step too, and notes whether a dropped step changed anything."""

    def __init__(self, dumped: int = -1) -> None:
        self.dumped = dumped
        self.before: dict[str, Tensor] = {}
        self.changed: list[list[str]] = []
        self.seen: list[dict[str, Any]] = []

    def state(self, trainer: L.Trainer, task: Any) -> dict[str, Tensor]:
        """Weights, buffers, moments, counts of updates, and the average."""
        state = {k: full(v).clone() for k, v in task.state_dict().items()}
        for i, moments in enumerate(trainer.optimizers[0].state.values()):
            state.update({f"moment.{i}.{k}": full(v).clone() for k, v in moments.items()})
        ema = task.ema
        state.update({f"ema.{k}": v for k, v in ema.weights(task, "ema").items()})
        return {**state, "updates": torch.tensor(ema.updates)}

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self.before = self.state(trainer, pl_module)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        if trainer.global_step == self.dumped:  # before the guard, which clips
            guard = pl_module.guard
            norm = torch.nn.utils.get_total_norm([p.grad for p in pl_module.parameters() if p.grad is not None])
            loss = float(sum(guard._losses))
            dump.account(pl_module, BadStep(guard._batches, guard._losses, loss, float(full(norm)), 0, 0, True))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        now = self.state(trainer, pl_module)
        changed = [k for k, v in now.items() if k not in self.before or not torch.equal(v, self.before[k])]
        self.seen.append({k: v for k, v in now.items() if not k.startswith("moment")})
        self.changed.append(changed)


def fit(root: Path, *callbacks: L.Callback, task: FlowTask | None = None, ckpt: Path | None = None, seed: int = 0, **more: Any) -> FlowTask:
    """One epoch or less."""
    task = make(root) if task is None else task
    settings: dict[str, Any] = {"devices": 1, "max_steps": 3, "max_epochs": 1, **more}
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[EMA(0.5), *callbacks], default_root_dir=root, num_sanity_val_steps=0, limit_val_batches=0, **settings,
    )  # fmt: skip
    data = FeatureStore(str(root / "store"), batch_size=8, num_classes=3, with_images=False, seed=seed)
    trainer.fit(task, datamodule=data, ckpt_path=ckpt, weights_only=True)
    return task


def main(mode: str, root: Path) -> None:
    """Two processes; rank zero prints what happened."""
    warnings.simplefilter("ignore")
    watch, said = Watch(dumped=0), []
    show = warnings.showwarning
    warnings.simplefilter("always", UserWarning)
    warnings.showwarning = lambda message, *rest, **more: said.append(str(message))  # type: ignore[assignment]
    strategy: Any = "ddp"
    if mode == "fsdp2":
        strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=False)
    task = fit(root, watch, devices=2, strategy=strategy, max_steps=3)
    warnings.showwarning = show
    digest = torch.stack([v.double().sum() for v in watch.seen[-1].values()])
    everyone = task.all_gather(digest)
    if task.trainer.is_global_zero:
        same = bool((everyone == everyone[0]).all())
        counts = {"skipped": task.guard.skipped, "updates": task.ema.updates if task.ema else -1}
        said = [text for text in said if "skipped" in text]
        print("RESULT" + json.dumps({"changed": [len(c) for c in watch.changed], "same": same, "said": said, **counts}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
