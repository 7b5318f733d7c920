"""Reads docstrings for the site: their doctests become code blocks, with or without a section "Examples" (an extension of griffe)."""

from __future__ import annotations

import re
from typing import Any

import griffe

DOCTEST = re.compile(r"^(?P<indent> *)>>> .*(?:\n(?P=indent)\S.*)*", re.M)


def fenced(text: str) -> str:
    """The text with every doctest, up to its first empty line, between code fences."""
    return DOCTEST.sub(lambda m: f"{m['indent']}```pycon\n{m[0]}\n{m['indent']}```", text)


class Doctests(griffe.Extension):
    """Applies `fenced` to every docstring that is read."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """See griffe."""
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)
