"""Shared bricks with weights or shapes."""

from srcflow.nn.patchify import patchify, unpatchify

__all__ = ["patchify", "unpatchify"]
