"""Callbacks of tests, named in a configuration by class path: they end a process where the test wants it."""

from __future__ import annotations

import os
from typing import Any

import lightning as L


class Dies(L.Callback):
    """Ends this process at once, as `kill -9` does, while a batch of some optimizer step is worked on.

    Args:
        at: the step.
    """

    def __init__(self, at: int) -> None:
        self.at = at

    def on_before_backward(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.at:
            os._exit(9)


class Records(L.Callback):
    """Writes which samples every batch holds: one line of the step and the indices per batch, one file per rank.

    Args:
        folder: where.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        with open(f"{self.folder}/rank-{trainer.global_rank}.txt", "a", encoding="utf-8") as f:
            print(trainer.fit_loop.epoch_loop.total_batch_idx, *batch["indices"].tolist(), file=f)
