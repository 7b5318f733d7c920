"""A module that cannot be imported: a library is missing."""

from __future__ import annotations

import srcflow_brokenplugin_missing_library

from srcflow.encoders.base import Encoder


class NeedsMore(Encoder):
    """Never reached."""

    library = srcflow_brokenplugin_missing_library
