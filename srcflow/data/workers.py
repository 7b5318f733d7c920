"""What every loader process does first."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.util import Finalize

import torch
from torch import Tensor

POLL = 0.2  # seconds
_leaving: dict[int, Tensor] = {}  # by process: one flag for all loaders of a rank, in shared memory


def worker_start() -> Callable[[int], None]:
    """What the loader processes of this rank are to do first: `leave_signals_to_the_rank`."""
    rank = os.getpid()
    if rank not in _leaving:
        _leaving.clear()  # a parent's, after a fork
        _leaving[rank] = torch.zeros(1, dtype=torch.uint8).share_memory_()  # type: ignore[no-untyped-call]  # torch is untyped here
        # multiprocessing calls it before it terminates and joins the processes that are left
        Finalize(None, _leaving[rank].fill_, args=(1,), exitpriority=100)
    return partial(leave_signals_to_the_rank, _leaving[rank])


def leave_signals_to_the_rank(leaving: Tensor, worker: int) -> None:
    """Ignore the signals that stop a run: a scheduler and a terminal send them to all processes, and the rank still needs its data.

    Loader processes end when their rank says that it is leaving (after an uncaught error too, when multiprocessing's SIGTERM is all that
    they would get), and by themselves once it has gone.

    Args:
        leaving: (1,) set by the rank as it ends.
        worker: number of the process.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(leaving,), daemon=True).start()


def _end_with(leaving: Tensor) -> None:
    while not leaving[0].item():
        time.sleep(POLL)
    os._exit(0)
