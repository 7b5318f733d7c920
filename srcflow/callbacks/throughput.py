"""How fast training runs."""

from __future__ import annotations

import time
from typing import Any

import lightning as L

from srcflow.errors import ConfigError


class Throughput(L.Callback):
    """Logs `train/images_per_second`, over all ranks, loading included and validation excluded; also in the progress bar.

    The number of each window of steps is the mean over that window. The first step (compilation, warm-up of the loaders) is not counted.

    Args:
        window: batches between two numbers.
    """

    def __init__(self, window: int = 50) -> None:
        if window < 1:
            raise ConfigError("throughput.window", window, "must be at least 1.")
        self.window = window
        self._since: float | None = None
        self._images = self._batches = 0
        self._seconds = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start anew."""
        self._since, self._images, self._batches, self._seconds = None, 0, 0, 0.0

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop the clock; it starts again with the end of the next training batch."""
        self._since = None

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count a batch; log at the end of a window."""
        now = time.perf_counter()
        if self._since is not None:
            self._seconds += now - self._since
            self._images += len(batch["indices"]) * trainer.world_size
            self._batches += 1
        self._since = now
        if self._batches == self.window:
            pl_module.log("train/images_per_second", self._images / max(self._seconds, 1e-9), prog_bar=True)
            self._images, self._batches, self._seconds = 0, 0, 0.0
