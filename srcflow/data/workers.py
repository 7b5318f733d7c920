"""What every loader process does first."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.util import Finalize
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader

T_co = TypeVar("T_co", covariant=True)
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""The signals that ask a run to stop."""
POLL = 0.2  # seconds
_leaving: dict[int, Tensor] = {}  # by process: one flag for all loaders of a rank, in shared memory


class SteadyLoader(DataLoader[T_co]):
    """A DataLoader whose processes are started with the stopping signals held back.

    A process that is spawned would die by a signal until it has come to ignore it, and take the run with it as an error; and an exception
    that a signal raises while processes are started would leave a loader that is half made.
    """

    def __iter__(self) -> Any:
        """As DataLoader's."""
        if self.num_workers:
            context: Any = self.multiprocessing_context or multiprocessing
            if context.get_start_method() != "fork":
                resource_tracker.ensure_running()  # where it has to be started inside the block, it lets the signals through
        with held_back():
            return super().__iter__()


@contextmanager
def held_back() -> Iterator[None]:
    """Signals that ask for a stop wait until the end of the block, and in the processes started inside it until these ignore them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING) if hasattr(signal, "pthread_sigmask") else None  # Windows has none
    try:
        yield
    finally:
        if before is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


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
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(leaving,), daemon=True).start()


def _end_with(leaving: Tensor) -> None:
    while not leaving[0].item():
        time.sleep(POLL)
    os._exit(0)
