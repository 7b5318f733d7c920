"""What the processes of one run know of each other: who launched whom, and who has gone."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from srcflow.errors import LostRankError, StoppedError

LAUNCHER = "SRCFLOW_LAUNCHER"
"""Environment variable with the number of the process that launches the other ranks of its node, if Lightning does it."""
POLL, GRACE = 1.0, 5.0
"""Seconds between two looks at the launcher, and seconds that a rank has to end by itself once it has gone."""


def launched() -> bool:
    """Whether this process is a rank that another srcflow process launched, and not torchrun, srun or a user."""
    return "LOCAL_RANK" in os.environ and os.environ.get(LAUNCHER, str(os.getpid())) != str(os.getpid())


@contextmanager
def company() -> Iterator[None]:
    """Inside this block a launcher is known to the ranks it launches, and a launched rank ends soon after its launcher has gone."""
    before = os.environ.get(LAUNCHER)
    done = threading.Event()
    if launched():
        launcher = int(os.environ[LAUNCHER])  # it may have gone before this process came so far
        threading.Thread(target=_watch, args=(launcher, done), daemon=True, name="launcher-observer").start()
    elif "LOCAL_RANK" not in os.environ:
        os.environ[LAUNCHER] = str(os.getpid())
    try:
        yield
    finally:
        done.set()
        if before is None:
            os.environ.pop(LAUNCHER, None)
        else:
            os.environ[LAUNCHER] = before


def _watch(launcher: int, done: threading.Event) -> None:
    while not done.wait(POLL):
        if os.getppid() != launcher:
            if not done.wait(GRACE):  # it hangs, most likely in a collective
                rank = os.environ["LOCAL_RANK"]
                os.write(2, f"error: process {launcher}, local rank 0, has gone; rank {rank} hangs and is ended.\n".encode())
                os._exit(1)
            return


def lost(processes: Sequence[subprocess.Popen[Any]], patience: float = 2.0) -> LostRankError | None:
    """Why a collective failed, if it did because another process of this node has gone.

    Args:
        processes: local ranks 1, 2, ..., where this process launched them.
        patience: seconds to wait for the first that has gone; an error in a collective may come before the end of its process is known.
    """
    end = time.monotonic() + patience
    launcher = os.environ.get(LAUNCHER) if launched() else None
    while time.monotonic() < end:
        for rank, process in enumerate(processes, 1):
            if status := process.poll():
                how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
                return LostRankError(f"rank {rank} (process {process.pid}) {how}, so the others cannot go on.", 75 if status == 75 else 1)
        if not processes and launcher is None:
            return None
        if not processes and launcher != str(os.getppid()):
            return LostRankError(f"process {launcher}, local rank 0, has gone, so rank {os.environ['LOCAL_RANK']} cannot go on.")
        time.sleep(0.05)
    return None


class _Stop(BaseException):
    """Raised where the program stands as a signal comes; not an Exception, so that no library takes it for an error of its own."""


def end_loaders() -> None:
    """End the processes that load data: one that is still starting would report that its rank has gone, with a traceback."""
    children = multiprocessing.active_children()
    if not children:
        return
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if in_main_thread() else None  # torch's raises where such a process dies
    for child in children:
        child.kill()
    for child in children:
        child.join()
    if before is not None:
        signal.signal(signal.SIGCHLD, before)


def in_main_thread() -> bool:
    """Whether this thread may set handlers of signals."""
    return threading.current_thread() is threading.main_thread()


class Early:
    """Handler of the signals that ask for a stop before training takes them over (`StopSignals.install`).

    It raises, and notes the signal as well: an exception that is raised while a module is imported may get lost. In a destructor, which
    nothing can be raised from, it only notes the signal; the run then stops at its first step.

    Attributes:
        came: the signal, 0 if none came.
    """

    def __init__(self) -> None:
        self.came = 0
        self._since = 0.0

    def __call__(self, signum: int, frame: Any) -> None:
        now = time.monotonic()
        leaving = self.came != 0 and now - self._since < GRACE  # a second one must not disturb the way out
        if not leaving:
            self.came, self._since = signum, now
            if _in_destructor(frame):
                return
            end_loaders()
            raise _Stop from self.error()

    def error(self) -> StoppedError:
        """What the run ends with."""
        return StoppedError(self.came, "before the first step; the same command starts again.", agreed=False)


def _in_destructor(frame: Any) -> bool:
    """Whether a frame, or one that called it, is a `__del__`."""
    while frame is not None:
        if frame.f_code.co_name == "__del__":
            return True
        frame = frame.f_back
    return False


@contextmanager
def stoppable() -> Iterator[None]:
    """Until training takes the signals over, SIGTERM and SIGUSR1 end the run with the status that means "start again".

    Raises:
        StoppedError: one of them came; whatever else failed after it is a consequence.
    """
    early, before = Early(), {}
    if in_main_thread():
        before = {number: signal.signal(number, early) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    except StoppedError:
        end_loaders()
        raise
    except BaseException as e:
        if early.came:
            raise early.error() from (None if isinstance(e, _Stop) else e)
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
