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
