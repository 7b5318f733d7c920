"""Errors that other code raises for a user's mistake or a full disk, as messages of srcflow's."""

from __future__ import annotations

import errno
import sys
import traceback
from pathlib import Path

from srcflow.errors import SrcflowError

PLACES = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP}
"""What can be wrong with a place that a user named."""
DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}
"""What can be wrong with a disk."""
WHERE = "(`srcflow --debug ...` shows where.)"


def explained(error: Exception) -> SrcflowError | None:
    """The message for an error that is not srcflow's own; None for one that may be a fault of the program."""
    return _of_system(error) or _of_lightning(error)


def _of_system(error: Exception) -> SrcflowError | None:
    if not isinstance(error, OSError) or error.errno is None:
        return None
    if error.errno in DISK or (error.errno in PLACES and error.filename is not None):
        place = "" if error.filename is None else f"{error.filename}: "
        return SrcflowError(f"{place}{error.strerror}. {WHERE}")
    return None


def _of_lightning(error: Exception) -> SrcflowError | None:
    """What Lightning raises on purpose: a MisconfigurationException, or a ValueError of its own code."""
    exceptions = sys.modules.get("lightning.fabric.utilities.exceptions")
    if exceptions is None:  # not loaded, so it raised nothing
        return None
    frames = traceback.extract_tb(error.__traceback__)
    inside = bool(frames) and "lightning" in Path(frames[-1].filename).parts
    if isinstance(error, exceptions.MisconfigurationException) or (type(error) is ValueError and inside):
        return SrcflowError(f"{sentence(error)} {WHERE}")
    return None


def sentence(error: Exception) -> str:
    """The message of an error in one line, ending with a full stop."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if text.endswith((".", "!", "?")) else f"{text}."
