"""One start of a run at a time: a lock in its directory, which the system takes back when the process ends, however it ends."""

from __future__ import annotations

import errno
import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from srcflow.errors import RunningError

try:
    import fcntl as _fcntl
except ImportError:  # no such locks on this system
    fcntl: Any = None
else:
    fcntl = _fcntl

FILE = "run.lock"
TAKEN = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
PATIENCE = 10.0
"""Seconds that the lock of a process that has gone is waited for."""
_held: set[int] = set()


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold the lock of a run directory; to be taken by one process of a run.

    It is a lock on the open file `run.lock`, not the file's being there: nothing is left to clean up after a kill. The file says who holds
    it. Where the file system has no locks, this does nothing.

    Args:
        folder: trainer.default_root_dir; it is made.

    Raises:
        RunningError: another start holds it; says which.
    """
    handle = _lock(folder / FILE)
    if handle is None:
        yield
        return
    _held.add(handle)
    facts = {"pid": os.getpid(), "host": platform.node(), "since": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    with suppress(OSError):  # on a full disk the lock holds all the same
        os.ftruncate(handle, 0)
        os.write(handle, json.dumps(facts).encode())
    try:
        yield
    finally:
        if handle in _held:  # not in a forked process
            _held.discard(handle)
            with suppress(OSError):
                os.ftruncate(handle, 0)
            os.close(handle)


def _lock(path: Path) -> int | None:
    """The locked file's descriptor, or None where there are no locks."""
    if fcntl is None:
        return None
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)  # not inherited by programs that are started
    end = time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return handle
        except OSError as e:
            who, gone = _holder(handle)
            if gone and e.errno in TAKEN and time.monotonic() < end:  # killed, and the system is still clearing up
                time.sleep(0.05)
                continue
            os.close(handle)
            if e.errno not in TAKEN:
                return None
            cure = "Wait for it or stop it, then start again; or name another trainer.default_root_dir."
            raise RunningError(f"trainer.default_root_dir = {str(path.parent)!r} is in use by a start that still runs{who}. {cure}") from e


def _holder(handle: int) -> tuple[str, bool]:
    """Who holds the lock, for a message, and whether that process is known to have gone."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        facts = json.loads(os.pread(handle, 4096, 0))
        gone = False
        if facts["host"] == platform.node():
            try:
                os.kill(int(facts["pid"]), 0)
            except ProcessLookupError:
                gone = True
        return f": process {facts['pid']} on {facts['host']}, since {facts['since']}", gone
    return "", False


def _leave() -> None:
    """A forked process (a loader's worker) lets go, since the lock would otherwise live as long as the last of them."""
    for handle in _held:
        with suppress(OSError):
            os.close(handle)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave)
