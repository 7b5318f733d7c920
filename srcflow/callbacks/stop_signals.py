"""Signals that ask a run to stop: noted when they come, acted upon between two steps, by all ranks at the same one."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterable
from typing import Any

import lightning as L
import torch

LONGEST = 1000
"""Steps after which ranks agree at the latest."""
MOST = 1000
"""Above every signal's number."""


class StopSignals:
    """Notes the signals that ask for a stop, in place of Lightning's handlers, which would save or wait for other ranks where they stand.

    Args:
        numbers: the signals; an interrupt from the keyboard among them is only noted the first time and raised the second.
        seconds: how often ranks ask each other, about; one small all-reduce each time.

    Attributes:
        caught: the signal that came; of several the one that `counts`, or else the one with the highest number. 0: none.
        counts: a signal that the answer to the others must not hide: that for which a scheduler starts the job again.
    """

    def __init__(self, numbers: Iterable[int] = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT), seconds: float = 1.0) -> None:
        self.numbers, self.seconds = tuple(numbers), seconds
        self.caught = 0
        self.counts: int | None = None
        self._before: dict[int, Any] = {}
        self._left, self._gap, self._since = 1, 1, 0.0

    def install(self) -> None:
        """Take the signals over; only the main thread can. One that came before is noted, if the handler until now says so (`came`)."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in self.numbers:
            if not self._ours(number):
                self._before[number] = before = signal.signal(number, self._note)
                for handler in (before, *getattr(before, "signal_handlers", ())):  # Lightning puts several into one
                    if came := getattr(handler, "came", 0):
                        self._note(came, None)

    def restore(self) -> None:
        """Give the signals back."""
        self.caught = 0
        if threading.current_thread() is threading.main_thread():
            for number, handler in self._before.items():
                if handler is not None and self._ours(number):  # at the end of a fit Lightning has put back what was there before it
                    signal.signal(number, handler)
        self._before = {}

    def _ours(self, number: int) -> bool:
        """Whether the handler is this one's, or what `_note` makes of SIGINT."""
        handler = signal.getsignal(number)
        return handler == self._note or (number == signal.SIGINT and self.caught == number and handler is signal.default_int_handler)

    def _note(self, signum: int, frame: Any) -> None:
        self.caught = max(self.caught, signum, key=self._weight)
        if signum == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if os.environ.get("LOCAL_RANK", "0") == "0":  # print is not allowed to be interrupted by itself
                os.write(2, b"\nStopping at the end of this step. Interrupt once more to stop without a checkpoint.\n")

    def _weight(self, signum: int) -> int:
        return signum + (MOST if signum == self.counts else 0)

    def agreed(self, trainer: L.Trainer) -> int:
        """The signal for which all ranks stop now, or 0. To be called by every rank after every step."""
        if trainer.world_size == 1:
            return self.caught
        self._left -= 1
        if self._left > 0:
            return 0
        now = time.monotonic()
        steps = self.seconds * self._gap / max(now - self._since, 1e-9)
        weight = self._weight(self.caught)
        asked = torch.tensor([weight, min(max(int(steps), 1), LONGEST)], dtype=torch.float32, device=trainer.strategy.root_device)
        caught, gap = trainer.strategy.reduce(asked, reduce_op="max").tolist()
        self._left = self._gap = int(gap)
        self._since = now
        return int(caught) % MOST
