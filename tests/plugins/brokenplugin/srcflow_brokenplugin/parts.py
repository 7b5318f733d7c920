"""A part whose entry point has another name, one that belongs to no family, and a sound one that must load all the same."""

from __future__ import annotations

from srcflow.couplings.additive import Additive


class Misnamed(Additive):
    """Sound, but its entry point calls it Alias."""


class Sound(Additive):
    """Sound."""


class NotARule:
    """No Guidance."""
