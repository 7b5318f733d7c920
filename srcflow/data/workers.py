"""What every loader process does first."""

from __future__ import annotations

import signal


def leave_signals_to_the_rank(worker: int) -> None:
    """Ignore the signals that stop a run: a scheduler and a terminal send them to all processes, and the rank still needs its data.

    Loader processes end by themselves once their rank has gone.

    Args:
        worker: number of the process.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
